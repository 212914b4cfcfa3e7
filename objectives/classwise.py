"""Objectives that compare real and synthetic images class by class, on networks that come and go.

An iteration is one match: sums over the classes, and an update of the images. A network serves
`outer` iterations. Before each match but its first, it is trained on the synthetic images for
`inner` epochs, by SGD at 0.01, as in DC (Zhao et al. 2021, algorithm 1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.utils import parameters_to_vector

import utils
from datasets.preprocessing import Form
from objectives.pairs import Pairs
from objectives.segments import student_augment
from reparam_module import Unroll
from run.state import Step
from system.process import ReportedError
from system.ranks import Ranks
from utils import Augment

NETWORK_RATE = 0.01  # of the network's training


class Loops(NamedTuple):
    """Matches of a network, and its epochs on the synthetic images between two of them."""

    outer: int
    inner: int


NO_TRAINING = Loops(1, 0)
LOOPS = {1: Loops(1, 1), 10: Loops(10, 50), 20: Loops(20, 25)}  # by images per class, as in DC
LOOPS |= {30: Loops(30, 20), 40: Loops(40, 15), 50: Loops(50, 10)}


def loops_of(ipc):
    """DC's loops for so many images per class: those of the next lower number that it gives."""
    return LOOPS[max(known for known in LOOPS if known <= ipc)]


@dataclass(frozen=True)
class Networks:
    """The networks of the matches: fresh for every `outer`-th, else trained since the last one."""

    model: str
    form: Form
    loops: Loops
    advance: Callable  # steps of SGD on synthetic images, of an engine of reparam_module.py
    augment: Augment  # in these steps
    batch: int  # images of a step
    seed: int

    def parameters(self, state, it, number):
        """θ (P,) of network `number` in iteration `it`."""
        random = utils.make_generator("network", self.seed, it, number)
        device = state.label_syn.device
        if it % self.loops.outer == 0:
            network = utils.initial_network(self.model, self.form, random, "cpu")
            theta = parameters_to_vector(network.parameters()).detach()
            return utils.send([theta], device)[0]  # a GPU waits for nothing
        count = len(state.label_syn)
        steps = self.loops.inner * -(-count // self.batch)
        drawn = utils.draw_batches(count, self.batch, steps, self.augment, random)
        rate = torch.tensor(NETWORK_RATE, device=device)
        synthetic = [state.learned["images"].detach()]
        theta = state.carried["theta"][number]
        return self.advance(theta, synthetic, rate, utils.to_device(drawn, device))


@dataclass(frozen=True)
class Classwise:
    """`classwise(state, it)`: the `Step` of iteration `it`, means over S networks.

    The draws of network s in iteration `it` follow from the seed, `it` and s. The ranks share out
    the classes, and train the same networks.
    """

    goal: Callable  # L and its gradient, of θ, `pairs.Views` and the classes of this rank
    networks: Networks
    pairs: Pairs
    count: int  # S
    seed: int
    ranks: Ranks

    def __call__(self, state, it):
        """The same `Step` on every rank."""
        own = self.ranks.mine(range(len(self.pairs.members)))
        total, thetas = None, []
        for number in range(self.count):
            theta = self.networks.parameters(state, it, number)
            random = utils.make_generator("match", self.seed, it, number)
            values = self.goal(theta, self.pairs.draw(state, random), own)
            total = values if total is None else [a + b for a, b in zip(total, values)]
            thetas.append(theta)
        means = self.ranks.mean(list(total))
        loss, gradient = (mean * (self.ranks.size / self.count) for mean in means)
        match = it % self.networks.loops.outer
        carried = {"theta": torch.stack(thetas)} if self.networks.loops.outer > 1 else None
        log, source = {"Match": match}, f"match {match + 1} of its network"
        return Step(loss, {"images": gradient}, log, source, carried)


# --------------------------------------------------------------------------------------------------
# The flags, as these objectives take them


def check_classes(args, form, size):
    """Raise ReportedError if there are more ranks than classes."""
    if size > form.num_classes:
        raise ReportedError(
            f"{size} processes cannot share out {form.num_classes} classes: start at most "
            f"{form.num_classes} (--nproc-per-node)"
        )


def check_balance(label_syn, form):
    """Raise ReportedError if there are not as many synthetic images of each class."""
    counts = torch.bincount(label_syn, minlength=form.num_classes).tolist()
    if min(counts) != max(counts):
        raise ReportedError(
            f"--pix_init: the set has {min(counts)} to {max(counts)} images of a class, but "
            "--objective compares as many of each: choose another set"
        )


def make_classwise(args, inputs, state, goal, loops):
    """The iteration of an objective whose `goal` compares class by class."""
    data, compiler = inputs.data, inputs.machine.compiler
    check_balance(state.label_syn, data.form)
    augment = student_augment(args, data.form, utils.group_function(compiler, data.device))
    train = Unroll(inputs.student, state.batch_maker(augment), compiler.function)
    labels = data.train[1].cpu()
    members = [torch.nonzero(labels == label).flatten() for label in range(data.form.num_classes)]
    batch = min(args.batch_objective, *map(len, members))
    networks = Networks(
        model=args.model,
        form=data.form,
        loops=loops,
        advance=compiler.retrying(train.advance),
        augment=augment,
        batch=min(args.batch_train, len(state.label_syn)),
        seed=args.seed,
    )
    return Classwise(
        goal=compiler.retrying(goal),
        networks=networks,
        pairs=Pairs(data, members, batch, augment),
        count=args.segments,
        seed=args.seed,
        ranks=inputs.machine.ranks,
    )
