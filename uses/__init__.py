"""The uses of a set, each measured by a task: the table of --task.

A row's `run(study)` trains networks on the set of a `Study`, and on what it is compared with, and
returns an `Outcome`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from uses.incremental import learn_in_steps
from uses.membership import attack_members
from uses.size import compare_formats
from uses.transfer import compare_networks


@dataclass(frozen=True)
class Task:
    """A value of --task."""

    run: Callable
    eval_mode: str | None = None  # networks by default; None: --model, and no others
    own_alpha: bool = True  # train on the set at its own α, where it has one
    needs_validation: bool = True  # to choose α
    takes_experts: bool = False  # where --buffer_path has some


TASKS = {  # --task
    "transfer": Task(compare_networks, eval_mode="T", own_alpha=False, takes_experts=True),
    "incremental": Task(learn_in_steps, takes_experts=True),
    "membership": Task(attack_members),
    "size": Task(compare_formats, needs_validation=False, takes_experts=True),
}
