"""The segments of an iteration: drawn, unrolled, and their gradients averaged over all ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import process
import utils
from objectives import MatchTrajectory, RealLoss, real_loss
from process import ReportedError
from ranks import Ranks
from reparam_module import UNROLLS
from utils import Augment


@dataclass(frozen=True)
class Segments:
    """`segments(state, it)`: the mean loss and gradients of iteration `it`, over S segments.

    The draws of segment s in iteration `it` follow from the seed, `it` and s, so they are the same
    on any number of ranks. The ranks share out the segments. With `shard_batch`, each rank takes
    all segments, with a part of every batch.
    """

    objective: MatchTrajectory | RealLoss
    unroll: Callable  # an engine of reparam_module.py
    advance: Callable  # its `advance`
    augment: Augment  # of synthetic images
    count: int  # S
    syn_steps: int  # N
    batch_syn: int  # synthetic images per step
    seed: int
    shard_batch: bool
    ranks: Ranks

    def __call__(self, state, it):
        """L (), its gradients by the names of `state.learned`, and the first segment's `Task`.

        L and its gradients are means over all segments, the same on every rank.
        """
        numbers = range(self.count)
        mine = numbers if self.shard_batch else self.ranks.mine(numbers)
        total, first = None, None
        for number in mine:
            task, *values = self.unrolled(state, it, number)
            first = first or task
            total = values if total is None else [a + b for a, b in zip(total, values)]
        if len(mine) > 1:
            total = [value / len(mine) for value in total]
        loss, *gradients = self.ranks.mean(total)
        return loss, dict(zip(names_of(state), gradients)), first

    def unrolled(self, state, it, number):
        """The `Task` of a segment, its loss and gradients."""
        # Draw where the student starts, what it should reach, and the batches on its way.
        random = utils.make_generator("segment", self.seed, it, number)
        task = self.objective.draw(random)
        steps = task.steps_before + self.syn_steps
        count = len(state.label_syn)
        drawn = utils.draw_batches(count, self.batch_syn, steps, self.augment, random)
        if self.shard_batch:
            drawn = [self.augment.part(batch, self.ranks) for batch in drawn]
        drawn = utils.to_device(drawn, state.label_syn.device)
        before, batches = drawn[: task.steps_before], drawn[task.steps_before :]

        # Unroll the student, and differentiate the objective at its end.
        synthetic = tuple(state.learned[name] for name in names_of(state) if name != "alpha")
        syn_lr = state.syn_lr
        theta = self.advance(task.theta, synthetic, syn_lr, before)
        return task, *self.unroll(theta, task.objective, synthetic, syn_lr, batches)


def names_of(state):
    """The names of what is learned, in the engines' order."""
    return [name for name in ("images", "labels", "alpha") if name in state.learned]


# --------------------------------------------------------------------------------------------------
# What the flags ask for


def batch_syn_of(args, form):
    """Synthetic images per step. Raises ReportedError if --batch_syn is more than there are."""
    num_images = args.ipc * args.factor**2 * form.num_classes
    if args.batch_syn and args.batch_syn > num_images:
        raise ReportedError(
            f"--batch_syn={args.batch_syn} is more than the {num_images} synthetic images: "
            "lower it, or raise --ipc"
        )
    return args.batch_syn or num_images


def check_shares(count, shard_batch, num_syn, batch_syn, size):
    """Raise ReportedError if `size` ranks cannot share out an iteration's work evenly.

    count               segments of an iteration
    num_syn, batch_syn  synthetic images, and those of a step
    """
    if not shard_batch:
        if count % size:
            raise ReportedError(
                f"--segments={count} cannot be shared out among {size} processes: give a multiple "
                f"of {size}, or --shard_batch"
            )
        return
    for batch in {batch_syn, num_syn % batch_syn or batch_syn}:
        if batch % size:
            raise ReportedError(
                f"--shard_batch: batches of {batch} synthetic images cannot be split among {size} "
                f"processes: choose --batch_syn and --ipc so that {size} divides them"
            )


def student_augment(args, form, apply=utils.apply_group):
    """How the student sees the synthetic images."""
    # Plain augmentation cannot be differentiated.
    augments = args.dsa and not args.no_aug
    groups = utils.augment_groups(True, args.dsa_strategy) if augments else ()
    windows = args.canvas_samples if args.texture else 0
    return Augment(form.im_size, groups, windows, args.factor, apply)


def make_unroll(args, inputs, make_batch):
    """The engine that --unroll names, and its `advance`."""
    memory = process.activation_memory(args.unroll_memory, inputs.data.train[0].device)
    compiler, ranks = inputs.compiler, inputs.ranks
    options = {"mean": lambda tensor: ranks.mean([tensor])[0]} if args.shard_batch else {}
    engine = UNROLLS[args.unroll](inputs.student, make_batch, compiler.function, memory, **options)
    if args.shard_batch and ranks.size > 1:  # a rank that tries again would be out of step
        return engine, engine.advance
    return compiler.retrying(engine), compiler.retrying(engine.advance)


def make_objective(args, inputs):
    """What --objective names."""
    device = inputs.data.train[0].device
    if args.objective == "trajectory":
        experts = inputs.experts
        if args.load_all:  # otherwise each segment is read from disk, 3 MB for ConvNet
            experts = experts.on_device(args.max_start_epoch + args.expert_epochs, device)
        return MatchTrajectory(experts, args.max_start_epoch, args.expert_epochs, device)
    return RealLoss(
        model=args.model,
        data=inputs.data,
        augment=replace(inputs.evaluator.augment, windows=0),
        batch=args.batch_objective,
        total_steps=args.total_steps,
        syn_steps=args.syn_steps,
        loss=inputs.compiler.function(real_loss(inputs.student)),
    )


def make_segments(args, inputs, state):
    """What an iteration computes."""
    device = inputs.data.train[0].device
    augment = student_augment(args, inputs.data.form, inputs.compiler.augmentation(device))
    unroll, advance = make_unroll(args, inputs, state.batch_maker(augment))
    return Segments(
        objective=make_objective(args, inputs),
        unroll=unroll,
        advance=advance,
        augment=augment,
        count=args.segments,
        syn_steps=args.syn_steps,
        batch_syn=batch_syn_of(args, inputs.data.form),
        seed=args.seed,
        shard_batch=args.shard_batch,
        ranks=inputs.ranks,
    )
