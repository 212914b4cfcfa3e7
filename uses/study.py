"""A set under study, and the sets of real images that it is compared with."""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

import evaluation
import training
import utils
from datasets.coresets import coreset, herding
from datasets.preprocessing import Layout
from evaluation import Evaluator
from system.machine import Machine
from system.process import ReportedError
from trajectories import Experts


@dataclass(frozen=True)
class TrainingSet:
    """A set of images, and how networks are trained on it.

    images  (N, C, S, S), or (num_eval, N, C, S, S), a set for each network
    labels  those of their tiles, as `Evaluator` takes them
    alpha   α; None: the validation images choose it
    targets  of kernel machines, as many as labels; None: they take the labels
    """

    title: str
    images: torch.Tensor
    labels: torch.Tensor
    evaluator: Evaluator
    alpha: float | None = None
    targets: torch.Tensor | None = None

    @property
    def axis(self):
        """The dimension that counts the images, and the labels."""
        return len(self.images.shape) - 4

    @property
    def tiles(self):
        """The number of labels of each image."""
        return self.labels.shape[self.axis] // self.images.shape[self.axis]

    def alphas(self, key):
        """α for each network of the evaluator."""
        if self.alpha is None:
            return evaluation.search_alphas(self.evaluator, self.images, self.labels, key)
        return dict.fromkeys(self.evaluator.pool, self.alpha)

    def with_alpha(self, key):
        """The same with α chosen, for an evaluator of one network."""
        (alpha,) = self.alphas(key).values()
        return replace(self, alpha=alpha)

    def scores(self, key):
        """`Scores` of the only network of the evaluator."""
        parts = self.images, self.labels, self.alpha, key, self.targets
        (scores,) = self.evaluator(*parts).values()
        return scores

    def of_network(self, name, alpha):
        """The same for the networks called `name` alone, at α."""
        return replace(self, evaluator=self.evaluator.of_network(name), alpha=alpha)

    def measure(self, test, key):
        """`test(network, forward)` of each network, trained as `scores` trains them."""
        (name,) = self.evaluator.pool
        plans = self.evaluator.plans(self.images, self.labels, self.alpha, key)
        return self.evaluator.measure(name, plans, test)

    def subset(self, chosen):
        """The images `chosen` (n,), with their labels; targets are those of the whole set."""
        axis = self.axis
        chosen = chosen.to(self.images.device)
        by_image = self.labels.unflatten(axis, (-1, self.tiles))
        labels = by_image.index_select(axis, chosen).flatten(axis, axis + 1)
        images = self.images.index_select(axis, chosen)
        return replace(self, images=images, labels=labels, targets=None)


@dataclass(frozen=True)
class Study:
    """The set that a task works on, and what it is compared with."""

    what: str  # the set that --evaluate names
    distilled: TrainingSet
    classes: torch.Tensor  # of each image (N,), on the CPU
    model: str  # the network that the set was made for
    experts: Experts  # of this network; none, where --buffer_path has none
    machine: Machine
    seed: int

    @property
    def data(self):
        return self.distilled.evaluator.data

    @property
    def student(self):
        """The network of the experts, as a function of its parameters."""
        return training.make_student(self.model, self.data.form, self.machine)

    @property
    def key(self):
        """The seed of networks, as in an evaluation without a task."""
        return self.seed, "saved"


class Outcome(NamedTuple):
    """The result of a task."""

    table: str  # to be printed
    content: dict  # of its JSON file
    picture: Figure


# --------------------------------------------------------------------------------------------------
# Real images, as many of each class as the set has


def random_images(study):
    """A `TrainingSet` of random real images for each network."""
    evaluator = evaluation.of_real_images(study.distilled.evaluator)
    wanted, there = most_of_a_class(study.classes), fewest_of_a_class(study.data)
    if wanted > there:
        raise ReportedError(
            f"--task: {study.what} has {wanted} images of a class, and the data {there} training "
            "images of another, which are too few to compare with: only --task=size needs none"
        )
    layout = Layout(wanted, evaluator.augment.factor)
    real = evaluation.random_real_sets(study.data, layout, evaluator.num_eval, study.seed)
    drawn = TrainingSet("random real images", *real, evaluator)
    return drawn.subset(alike(study.classes))


def labelled_by_experts(study, real):
    """The same images with the experts' probabilities as labels."""
    tiles = utils.decode(real.images.flatten(0, -4), real.evaluator.augment.factor)
    labels = study.experts.labels(study.student, tiles).unflatten(0, real.labels.shape)
    return replace(real, title="the same, experts' labels", labels=labels)


def herding_images(study):
    """A `TrainingSet` of real images chosen by herding, which are not cut into tiles.

    Features are the first expert's. Without experts, they are those of a network that is not
    trained, and the title says so.
    """
    evaluator = evaluation.of_real_images(study.distilled.evaluator)
    evaluator = replace(evaluator, augment=replace(evaluator.augment, factor=1))
    title = "herding" if study.experts.members else "herding, untrained features"
    features = partial(feature_experts(study).features, study.student)
    count = most_of_a_class(study.classes)
    found = coreset(study.data, count, herding, features)
    found = study.machine.ranks.from_first([part.cpu() for part in found])  # rounding may differ
    found = [part.to(study.data.device) for part in found]
    return TrainingSet(title, *found, evaluator).subset(alike(study.classes))


def feature_experts(study):
    """The experts, or a single one that is not trained, drawn from the seed."""
    if study.experts.members:
        return study.experts
    random = utils.make_generator("features", study.seed)
    network = utils.initial_network(study.model, study.data.form, random, study.data.device)
    return Experts.of_snapshot([p.detach() for p in network.parameters()])


def most_of_a_class(classes):
    """The number of times that the most frequent of `classes` (n,) occurs."""
    return int(classes.bincount().max())


def fewest_of_a_class(data):
    """The number of training images of the class that has the fewest."""
    return int(data.train[1].bincount(minlength=data.form.num_classes).min())


def alike(classes):
    """Indices of real images that have the same `classes` (n,) in the same order.

    Of each class there are as many real images as `classes` has of its most frequent one.
    """
    seen = F.one_hot(classes).cumsum(0)  # of each class, up to each image
    rank = seen.gather(1, classes[:, None]).flatten() - 1
    return classes * most_of_a_class(classes) + rank


# --------------------------------------------------------------------------------------------------
# Pictures


def new_figure(width, height):
    """An empty Figure, sides in inches."""
    return Figure(figsize=(width, height), layout="constrained")
