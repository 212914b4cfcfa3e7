"""Segments: unrolled students whose gradients are averaged over an iteration, and all ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

import utils
from reparam_module import UNROLLS
from run.state import Step
from system import resources
from system.process import ReportedError
from system.ranks import Ranks
from utils import Augment


class Task(NamedTuple):
    """One segment to unroll. L is a function of θ_N, after N differentiated steps."""

    theta: torch.Tensor  # the student's parameters at the start, (P,)
    steps_before: int  # steps on synthetic images before the differentiated ones
    objective: Callable  # L, (P,) → ()
    log: dict  # what is logged about the draw
    source: str  # what was drawn, for messages


@dataclass(frozen=True)
class Segments:
    """`segments(state, it)`: the `Step` of iteration `it`, means over S segments.

    The draws of segment s in iteration `it` follow from the seed, `it` and s, so they are the same
    on any number of ranks. The ranks share out the segments. With `shard_batch`, each rank takes
    all segments, with a part of every batch.
    """

    goal: Callable  # its `draw(random)` returns a `Task`
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
        """The same `Step` on every rank, except for its log and source, the first segment's."""
        numbers = range(self.count)
        mine = numbers if self.shard_batch else self.ranks.mine(numbers)
        total, first = None, None
        for number in mine:
            task, values = self.unrolled(state, it, number)
            first = first or task
            total = values if total is None else [a + b for a, b in zip(total, values)]
        if len(mine) > 1:
            total = [value / len(mine) for value in total]
        loss, *gradients = self.ranks.mean(total)
        return Step(loss, dict(zip(state.learned, gradients)), first.log, first.source)

    def unrolled(self, state, it, number):
        """The `Task` of a segment; its loss, and gradients in the order of `state.learned`."""
        # Draw where the student starts, what it should reach, and the batches on its way.
        random = utils.make_generator("segment", self.seed, it, number)
        task = self.goal.draw(random)
        steps = task.steps_before + self.syn_steps
        count = len(state.label_syn)
        drawn = utils.draw_batches(count, self.batch_syn, steps, self.augment, random)
        if self.shard_batch:
            drawn = [self.augment.part(batch, self.ranks) for batch in drawn]
        drawn = utils.to_device(drawn, state.label_syn.device)
        before, batches = drawn[: task.steps_before], drawn[task.steps_before :]

        # Unroll the student, and differentiate the objective at its end.
        *synthetic, syn_lr = state.leaves()
        theta = self.advance(task.theta, synthetic, syn_lr, before)
        return task, self.unroll(theta, task.objective, synthetic, syn_lr, batches)


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


def check_shares(args, form, size):
    """Raise ReportedError if `size` ranks cannot share out an iteration's work evenly."""
    if not args.shard_batch:
        if args.segments % size:
            raise ReportedError(
                f"--segments={args.segments} cannot be shared out among {size} processes: give a "
                f"multiple of {size}, or --shard_batch"
            )
        return
    batch_syn = batch_syn_of(args, form)
    num_images = args.ipc * args.factor**2 * form.num_classes
    for batch in {batch_syn, num_images % batch_syn or batch_syn}:
        if batch % size:
            raise ReportedError(
                f"--shard_batch: batches of {batch} synthetic images cannot be split among {size} "
                f"processes: choose --batch_syn and --ipc so that {size} divides them"
            )


def student_augment(args, form, apply=utils.apply_group):
    """The student's augmentation of the synthetic images."""
    # Plain augmentation cannot be differentiated.
    augments = args.dsa and not args.no_aug
    groups = utils.augment_groups(True, args.dsa_strategy) if augments else ()
    windows = args.canvas_samples if args.texture else 0
    return Augment(form.im_size, groups, windows, args.factor, apply)


def make_unroll(args, inputs, make_batch):
    """The engine that --unroll names, and its `advance`."""
    memory = resources.activation_memory(args.unroll_memory, inputs.data.device)
    compiler, ranks = inputs.machine.compiler, inputs.machine.ranks
    options = {"momentum": args.mom_syn, "memory": memory}
    if args.shard_batch:
        options["mean"] = lambda tensor: ranks.mean([tensor])[0]
    engine = UNROLLS[args.unroll](inputs.student, make_batch, compiler.function, **options)
    if args.shard_batch and ranks.size > 1:  # a rank that tries again would be out of step
        return engine, engine.advance
    return compiler.retrying(engine), compiler.retrying(engine.advance)


def make_segments(args, inputs, state, goal):
    """The iteration of an objective whose `goal` is drawn for each segment."""
    apply = utils.group_function(inputs.machine.compiler, inputs.data.device)
    augment = student_augment(args, inputs.data.form, apply)
    unroll, advance = make_unroll(args, inputs, state.batch_maker(augment))
    return Segments(
        goal=goal,
        unroll=unroll,
        advance=advance,
        augment=augment,
        count=args.segments,
        syn_steps=args.syn_steps,
        batch_syn=batch_syn_of(args, inputs.data.form),
        seed=args.seed,
        shard_batch=args.shard_batch,
        ranks=inputs.machine.ranks,
    )
