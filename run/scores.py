"""Accuracies of an evaluation, and of all evaluations of a run."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Tested(NamedTuple):
    """The accuracy of a trained network."""

    val: float | None  # accuracy on the validation images, in [0, 1]; None: there are none
    test: float
    classes: list  # test accuracy on each class
    is_finite: bool  # whether its logits are


def spread(accuracies):
    """Mean ± population standard deviation, in percent. A single network has no spread."""
    if not accuracies:
        return ""
    deviation = f" ± {np.std(accuracies):6.2%}" if len(accuracies) > 1 else ""
    return f"{np.mean(accuracies):7.2%}{deviation}"


@dataclass(frozen=True)
class Scores:
    """Accuracies, in [0, 1], of the networks of one evaluation."""

    val: list  # empty without a validation set
    test: list
    classes: list = field(default_factory=list)  # test accuracy per class, a list per network
    diverged: int = 0  # networks that count as guessing

    def __str__(self):
        return "   ".join(f"{spread(part):16}" for part in (self.val, self.test))

    @property
    def selection_accuracy(self):
        """The accuracy that selects the best iteration: validation, or without it, test.

        Using the test set is MTT's rule.
        """
        return np.mean(self.val or self.test)


def scores_of(tested):
    """The `Scores` of several networks, each `Tested`."""
    return Scores(
        [each.val for each in tested if each.val is not None],
        [each.test for each in tested],
        [each.classes for each in tested],
        sum(not each.is_finite for each in tested),
    )


def mean_selection_accuracy(scores):
    """The mean over networks, of their `scores` by name."""
    return np.mean([score.selection_accuracy for score in scores.values()])


def selection_rank(scores):
    """The key by which `scores`, by network, are compared: those with a diverged network last."""
    diverged = sum(score.diverged for score in scores.values())
    return not diverged, mean_selection_accuracy(scores)


class Evaluations:
    """All evaluations of a run, oldest first."""

    def __init__(self, rows=()):
        self.rows = list(rows)

    @property
    def comparable(self):
        """The evaluations of the same networks as the latest one, trained for as many epochs."""

        def kind(row):
            return row["scores"].keys(), row["epochs"]

        return [row for row in self.rows if kind(row) == kind(self.rows[-1])]

    @property
    def best(self):
        """The comparable evaluation with the highest selection accuracy, the first if tied."""
        return max(self.comparable, key=lambda row: selection_rank(row["scores"]))

    @property
    def best_accuracy(self):
        """The selection accuracy of the best evaluation."""
        return mean_selection_accuracy(self.best["scores"])

    @property
    def latest_is_best(self):
        return self.best is self.rows[-1]

    def has(self, iteration, names):
        """Tell whether the networks called `names` were evaluated at an iteration."""
        at = (row["scores"].keys() for row in self.rows if row["iteration"] == iteration)
        return any(of_row == names for of_row in at)

    def add(self, scores, syn_lr, losses, seconds, epochs):
        """Add an evaluation by networks of so many epochs, after iterations with these losses."""
        recent = losses[self.rows[-1]["iteration"] if self.rows else 0 :]
        row = {
            "iteration": len(losses),
            "syn_lr": syn_lr,
            "loss": float(np.mean(recent)) if recent else None,  # mean since the last evaluation
            "seconds": round(seconds, 1),
            "epochs": epochs,
            "scores": scores,
        }
        self.rows.append(row)


def to_json(rows):
    """Evaluations as dictionaries, lists and numbers only."""
    return [
        row | {"scores": {name: vars(scores) for name, scores in row["scores"].items()}}
        for row in rows
    ]


def from_json(rows):
    """Restore what `to_json` was given."""
    return [
        row | {"scores": {name: Scores(**scores) for name, scores in row["scores"].items()}}
        for row in rows
    ]
