"""Real and synthetic images of each class, under the same augmentation, for matches."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

import utils
from datasets.preprocessing import Data
from utils import Augment, Batch

# Real images at once on a CPU. In parts of 16, which stay in its caches, features of 256 take two
# thirds of the time, and gradients three quarters. By `vmap` over classes, gradients take 2.5 times
# as long as class by class.
CPU_PART = 16


def in_parts(function, theta, images, *labels):
    """Yield each part's share of images (B, C, H, W), and the results of a function of the part.

    The function takes θ, images and, if given, labels.
    """
    size = CPU_PART if images.device.type == "cpu" else len(images)
    for part in zip(*(tensor.split(size) for tensor in (images, *labels))):
        yield len(part[0]) / len(images), function(theta, *part)


def mean_over_parts(function, theta, images, *labels):
    """The mean over images of a function that computes means, a tuple of one tensor."""
    parts = in_parts(function, theta, images, *labels)
    return sum(share * mean for share, (mean,) in parts)


class Draw(NamedTuple):
    """All that is random about a class in a match; both have the same augmentation."""

    real: Batch  # of training images
    syn: Batch  # of synthetic images, or of their tiles


@dataclass(frozen=True)
class Views:
    """The augmented images of a match, by class, made when asked for.

    256 images of 64×64 pixels take 13 MB. Those of all classes need not be there at once.
    """

    train: tuple  # real images (N, C, H, H) and labels (N,)
    image_syn: torch.Tensor  # a leaf, (K, C, H, H)
    label_syn: torch.Tensor  # (n,)
    augments: tuple  # `Augment` of real images and of synthetic ones
    draws: list  # a `Draw` for each class

    @property
    def labels(self):
        return range(len(self.draws))

    def real(self, label):
        """Real images (B, C, H, H) of a class, and their labels."""
        images, labels = self.train
        return self.augments[0](images, self.draws[label].real, labels)

    def syn(self, label):
        """Synthetic images (n, C, H, H) of a class, and their labels."""
        return self.augments[1](self.image_syn, self.draws[label].syn, self.label_syn)


@dataclass(frozen=True)
class Pairs:
    """`pairs.draw(state, random)`: the `Views` of a match."""

    data: Data
    members: list  # for each class, its training images' indices
    batch: int  # real images of a class, at most as many as each has
    augment: Augment  # of synthetic images

    def draw(self, state, random):
        labels = state.label_syn.cpu()
        real_batches, syn_batches = [], []
        for label, members in enumerate(self.members):
            real = members[torch.randperm(len(members), generator=random)[: self.batch]]
            syn = torch.nonzero(labels == label).flatten()
            real_batch, syn_batch = self.siamese([real, syn], random)
            real_batches.append(real_batch)
            syn_batches.append(syn_batch)
        batches = utils.to_device([*real_batches, *syn_batches], state.label_syn.device)
        count = len(self.members)
        draws = [Draw(*pair) for pair in zip(batches[:count], batches[count:])]
        image_syn = state.learned["images"].detach().requires_grad_(True)
        augments = replace(self.augment, factor=1), self.augment
        return Views(self.data.train, image_syn, state.label_syn, augments, draws)

    def siamese(self, parts, random):
        """A `Batch` for each of `parts`, indices (B,), under one augmentation of all images."""
        if not self.augment.groups:
            return [Batch(indices) for indices in parts]
        group, drawn = utils.draw_group(self.augment.groups, 1, self.augment.side, random)
        batches = []
        for indices in parts:
            parameters = tuple(p.repeat_interleave(len(indices), dim=0) for p in drawn)
            batches.append(Batch(indices, (), group, parameters))
        return batches
