"""The objectives that an iteration may lower: the table of --objective.

A row's `make(args, inputs, state)` returns a function of `State` and the iteration's number, which
computes a `Step`: the objective, and its gradients by the names of what is learned. Each file has
the objectives of one family of papers. Those that unroll a student share segments.py, and those
that compare real and synthetic images class by class share classwise.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from objectives.classwise import check_classes
from objectives.features import make_distributions, make_features
from objectives.gradients import make_gradients
from objectives.kernel import check_batch, make_kernel
from objectives.real_loss import make_real_loss
from objectives.segments import check_shares
from objectives.trajectory import make_trajectory

# Flags of a student that is unrolled, and of the α that it learns.
OF_STUDENTS = ("syn_steps", "mom_syn", "total_steps", "batch_syn", "unroll", "unroll_memory")
OF_STUDENTS += ("shard_batch", "optimizer_lr", "lr_lr")
OF_EXPERTS = ("expert_epochs", "max_start_epoch", "load_all")
NO_STUDENT = (*OF_STUDENTS, *OF_EXPERTS, "texture")


@dataclass(frozen=True)
class Objective:
    """A value of --objective."""

    make: Callable
    title: str  # for messages and curves
    log_key: str  # on Weights & Biases
    check_ranks: Callable = check_classes  # raises if ranks cannot share out the work
    needs_experts: bool = False  # to follow them; labels may need them too
    clips: bool = False  # gradients at twice their running norms
    standstill: float | None = None  # the objective of a student that does not move, if known
    learns_alpha: bool = False
    labels: tuple = ("hard",)  # the values of --labels that it takes
    defaults: dict = field(default_factory=dict)  # its own, by flag
    refuses: tuple = NO_STUDENT  # flags that have no meaning for it
    halvings: tuple = ()  # iterations after which the images' rate is halved


GRADIENTS = {"lr_img": 0.1, "batch_objective": 256}

OBJECTIVES = {  # --objective
    "trajectory": Objective(
        make_trajectory,
        "matching loss",
        "Grand_Loss",
        check_ranks=check_shares,
        needs_experts=True,
        standstill=1.0,
        learns_alpha=True,
        labels=("hard", "soft", "learned"),
        refuses=("total_steps", "batch_objective"),
    ),
    "loss": Objective(
        make_real_loss,
        "loss on real images",
        "Real_Loss",
        check_ranks=check_shares,
        clips=True,
        learns_alpha=True,
        labels=("hard", "soft", "learned"),
        refuses=OF_EXPERTS,
    ),
    "dc": Objective(
        make_gradients,
        "distance of gradients",
        "Gradient_Loss",
        defaults=GRADIENTS | {"no_aug": True},
    ),
    "dsa": Objective(
        make_gradients,
        "distance of gradients",
        "Gradient_Loss",
        defaults=GRADIENTS,
    ),
    "dm": Objective(
        make_distributions,
        "distance of mean features",
        "Distribution_Loss",
        defaults={"lr_img": 1.0, "batch_objective": 256},
    ),
    "cafe": Objective(
        make_features,
        "alignment of features",
        "Feature_Loss",
        defaults=GRADIENTS,
        halvings=(1200,),
    ),
    "kip": Objective(
        make_kernel,
        "loss of the kernel machine",
        "Kernel_Loss",
        check_ranks=check_batch,
        labels=("targets", "hard"),
        defaults={
            "optimizer_img": "adam",
            "lr_img": 0.04,
            "batch_objective": 2048,
            "labels": "targets",
        },
        refuses=(*NO_STUDENT, "segments", "no_aug"),
    ),
}
