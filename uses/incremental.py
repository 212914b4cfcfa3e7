"""The task `incremental`: classes come two at a time, and images of old ones are rehearsed.

At each step a network is trained from scratch on the images of all classes so far, as in GDumb
(Prabhu et al. 2020) and in Zhao & Bilen 2021 (arXiv 2110.04181, section 4.3).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

import training
import utils
from run.scores import spread
from system import process
from system.process import ReportedError
from uses.study import Outcome, herding_images, new_figure, random_images

CLASSES_PER_STEP = 2


@dataclass(frozen=True)
class Curve:
    """The accuracy of a set after each step."""

    trained_on: str
    syn_lr: float
    steps: list  # of Scores

    @property
    def means(self):
        """The mean over the steps, of each network."""
        return np.mean([scores.test for scores in self.steps], axis=0).tolist()


def learn_in_steps(study):
    """Train networks on the classes so far: distilled images, and real ones in their memory."""
    num_classes = len(study.data.classes)
    order = torch.randperm(num_classes, generator=utils.make_generator("classes", study.seed))
    sizes = [*range(CLASSES_PER_STEP, num_classes, CLASSES_PER_STEP), num_classes]
    steps = [order[:size] for size in sizes]
    if not torch.isin(study.classes, steps[0]).any():
        first = " or ".join(study.data.classes[label] for label in steps[0].tolist())
        raise ReportedError(
            f"--task=incremental: the set has no image of {first}, which come first: give another "
            "--seed, or a set with all classes"
        )
    sets = study.distilled, random_images(study), herding_images(study)
    curves = [curve_of(each, steps, study) for each in sets]
    rows = [vars(c) | {"steps": [vars(s) for s in c.steps], "means": c.means} for c in curves]
    names = [study.data.classes[label] for label in order.tolist()]
    content = {"order": names, "classes": sizes, "rows": rows}
    return Outcome(table_of(curves, sizes, names), content, picture_of(curves, sizes))


def curve_of(training_set, steps, study):
    """The `Curve` of a set; α is chosen once, with all classes."""
    title = training_set.title
    process.write_line(f"\n{title}")
    training_set = training_set.with_alpha(study.key)
    scores = []
    for seen in steps:
        step = of_classes(training_set, seen, study)
        scores.append(step.scores((*study.key, "classes", len(seen))))
        process.write_line(f"{len(seen):4} classes: test {spread(scores[-1].test)}")
    return Curve(title, training_set.alpha, scores)


def of_classes(training_set, seen, study):
    """The part of a set, and of the data, that has the classes `seen` (k,), numbered 0 to k - 1.

    Networks have an output for each of them. Probabilities keep those of these classes, and are
    divided by their sum.
    """
    chosen = torch.nonzero(torch.isin(study.classes, seen)).flatten()
    part = training_set.subset(chosen)
    labels = part.labels
    seen = seen.to(labels.device)
    if labels.is_floating_point():
        labels = labels[..., seen]
        labels = labels / labels.sum(-1, keepdim=True).clamp(min=1e-8)
    else:
        labels = renumbered(labels, seen)
    data = data_of_classes(study.data, seen)
    (name,) = part.evaluator.pool
    pool = {name: training.make_sgd_step(name, data.form, study.machine)}
    evaluator = replace(part.evaluator, data=data, pool=pool)
    return replace(part, labels=labels, evaluator=evaluator)


def data_of_classes(data, seen):
    """`Data` to test with, of the classes `seen` alone."""
    parts = []
    for images, labels in (data.val, data.test):
        of_seen = torch.isin(labels, seen)
        parts.append((images[of_seen], renumbered(labels[of_seen], seen)))
    names = tuple(data.classes[label] for label in seen.tolist())
    # Nobody trains on these data, and copies of the training images would take a gigabyte.
    return replace(data, train=data.no_images, val=parts[0], test=parts[1], classes=names)


def renumbered(labels, seen):
    """Each label's place in `seen`."""
    place = torch.zeros(int(seen.max()) + 1, dtype=torch.int64, device=seen.device)
    place[seen] = torch.arange(len(seen), device=seen.device)
    return place[labels]


def table_of(curves, sizes, names):
    """Test accuracy: a row for each step and for their mean, a column for each set."""
    head = "   ".join(f"{curve.trained_on:28}" for curve in curves)
    lines = [f"Order: {', '.join(names)}", "", f"{'classes so far':14} {head}"]
    for number, size in enumerate(sizes):
        cells = "   ".join(f"{spread(curve.steps[number].test):28}" for curve in curves)
        lines.append(f"{size:<14} {cells}")
    cells = "   ".join(f"{spread(curve.means):28}" for curve in curves)
    lines.append(f"{'mean':14} {cells}")
    alphas = "   ".join(f"{curve.syn_lr:<28.5g}" for curve in curves)
    lines.append(f"{'α':14} {alphas}")
    return "\n".join(line.rstrip() for line in lines)


def picture_of(curves, sizes):
    """A Figure of the accuracy on the classes so far, against their number."""
    figure = new_figure(6, 4)
    axis = figure.subplots()
    for curve in curves:
        means = [100 * np.mean(scores.test) for scores in curve.steps]
        errors = [100 * np.std(scores.test) for scores in curve.steps]
        axis.errorbar(sizes, means, errors, marker="o", capsize=3, label=curve.trained_on)
    chance = [100 / size for size in sizes]
    axis.plot(sizes, chance, ":", color="grey", label="chance")
    axis.set(xlabel="classes so far", ylabel="test accuracy on them, %", xticks=sizes)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure
