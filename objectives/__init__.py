"""The objectives that an iteration may lower: the table of --objective.

A row's `make(args, inputs, state)` returns a function of `State` and the iteration's number, which
computes a `Step`: the objective, and its gradients by the names of what is learned. Each file has
the objectives of one family of papers. Those that unroll a student share segments.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from objectives.real_loss import make_real_loss
from objectives.trajectory import make_trajectory


@dataclass(frozen=True)
class Objective:
    """A value of --objective."""

    make: Callable
    title: str  # for messages and curves
    log_key: str  # on Weights & Biases
    needs_experts: bool  # to follow them; labels may need them too
    clips: bool  # the default of --clip
    standstill: float | None = None  # the objective of a student that does not move, if known


OBJECTIVES = {  # --objective
    "trajectory": Objective(
        make_trajectory,
        "matching loss",
        "Grand_Loss",
        needs_experts=True,
        clips=False,
        standstill=1.0,
    ),
    "loss": Objective(
        make_real_loss,
        "loss on real images",
        "Real_Loss",
        needs_experts=False,
        clips=True,
    ),
}
