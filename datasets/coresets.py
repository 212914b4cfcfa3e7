"""Real training images for training: random ones, coresets, all."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from datasets.preprocessing import members_of


def herding(features, count):
    """Rows of `features` (N, D) whose mean is close to the mean of all, chosen one by one.

    Herding (Welling 2009) as used for data sets (Rebuffi et al. 2017, iCaRL, algorithm 4).
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    chosen = []
    for size in range(1, count + 1):
        distances = ((total + features) / size - mean).square().sum(1)
        distances[chosen] = math.inf
        chosen.append(int(distances.argmin()))
        total += features[chosen[-1]]
    return chosen


def k_center(features, count):
    """Rows of `features` (N, D) that leave no other row far from all of them, chosen one by one.

    Greedy k-centre (Sener & Savarese 2018, algorithm 1), from the row nearest to the mean.
    """
    chosen = [int((features - features.mean(0)).square().sum(1).argmin())]
    nearest = torch.full_like(features[:, 0], math.inf)  # squared distance to what is chosen
    while len(chosen) < count:
        distances = (features - features[chosen[-1]]).square().sum(1)
        nearest = torch.minimum(nearest, distances)
        nearest[chosen] = -1  # never twice, where rows are equal
        chosen.append(int(nearest.argmax()))
    return chosen


class RealSet(NamedTuple):
    """A value of --evaluate that is no saved set: real training images."""

    choose: Callable | None = None  # by features, a coreset; None: no features are needed
    takes_ipc: bool = True  # else all images
    takes_tiles: bool = False  # of which several make an image (--factor)
    epochs: int | None = None  # the default, where it is another than that of small sets


REAL_SETS = {
    "random": RealSet(takes_tiles=True),
    "herding": RealSet(choose=herding),
    "k_center": RealSet(choose=k_center),
    "full": RealSet(takes_ipc=False, epochs=50),  # an epoch has far more steps
}


def is_saved(what):
    """Tell whether --evaluate names a saved set."""
    return what is not None and what not in REAL_SETS


def coreset(data, ipc, choose, features):
    """`ipc` training images per class, chosen by a coreset's `choose`, and their labels.

    `features` maps images (B, C, H, H) to the features that they are compared by, (B, D).
    """
    images, labels = data.train
    chosen = []
    for label in range(data.form.num_classes):
        members = members_of(data, label, ipc).to(images.device)
        chosen.append(members[choose(features(images[members]), ipc)])
    chosen = torch.cat(chosen)
    return images[chosen], labels[chosen]
