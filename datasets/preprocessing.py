"""A data set ready for use: normalised or whitened, and sampled."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import kornia
import torch
from torch.nn import functional as F

from datasets.normalised import Normalised, channels
from datasets.splits import Split
from datasets.whitening import whiten
from system import files
from system.process import ReportedError


class Form(NamedTuple):
    """The form of images that networks must fit."""

    num_classes: int
    im_size: int  # side of the square images in pixels
    channels: int = 3


@dataclass(frozen=True)
class Raw:
    """A data set as it was read."""

    images: torch.Tensor  # (N, C, H, H), uint8, or the type of GeoTIFFs
    labels: torch.Tensor  # int64 (N,)
    split: Split
    classes: tuple  # names, by label
    settings: dict  # of its preprocessing, which experts and distillation must have in common
    folder: Path  # for caches
    names: tuple = ()  # of the files; empty: there are none

    def preprocessed(self, device):
        """Normalise or whiten the images as the settings say: `Data` on `device`."""
        rows = [part.to(device) for part in (self.split.train, self.split.val, self.split.test)]
        labels, whitening = self.labels.to(device), None
        if self.settings["zca"]:
            key = hashlib.sha256(repr(sorted(self.settings.items())).encode()).hexdigest()[:16]
            # One process whitens, others read its cache.
            with files.locked(self.folder, reader=True):
                cache = self.folder / f"zca_{key}.pt"
                images, whitening = whiten(self.images, self.split.train, cache, device)
            parts = [images[chosen.cpu()].to(device) for chosen in rows]
        else:
            mean, std = (of.to(device) for of in channels(self.settings))
            stored = self.images.to(device)
            parts = [Normalised(stored, chosen, mean, std) for chosen in rows]
        parts = [(part, labels[chosen]) for part, chosen in zip(parts, rows)]
        names = [self.names[index] for index in self.split.test.tolist()] if self.names else []
        return Data(*parts, self.classes, self.settings, whitening, tuple(names))


@dataclass(frozen=True)
class Data:
    """A data set ready for use, on one device.

    Each part is preprocessed float32 images (N, C, H, H) and int64 labels (N,). The images are
    `Normalised`, of which a slice or an index is a tensor, or whitened, a tensor.
    """

    train: tuple[Normalised | torch.Tensor, torch.Tensor]
    val: tuple[Normalised | torch.Tensor, torch.Tensor]
    test: tuple[Normalised | torch.Tensor, torch.Tensor]
    classes: tuple  # names, by label
    settings: dict  # what experts and distillation must have in common
    zca: kornia.enhance.ZCAWhitening | None
    test_names: tuple = ()  # files of the test images; empty: there are none

    @property
    def device(self):
        return self.train[0].device

    @property
    def form(self):
        channels, im_size = self.train[0].shape[1:3]
        return Form(len(self.classes), im_size, channels)

    @property
    def no_images(self):
        """A part that has no images."""
        return tuple(part[:0] for part in self.train)

    def to_pixels(self, images):
        """Images (B, C, H, H) with preprocessing undone, on the CPU.

        Real ones are in [0, 1] if they have 8 bits, else in the numbers of their files.
        """
        if self.zca:
            return self.zca.inverse_transform(images.cpu())
        shift, scale = channels(self.settings)
        return images.cpu() * scale + shift


class Layout(NamedTuple):
    """The make-up of a set: `ipc` images for each class, in the order of the classes.

    A canvas (--texture) is a square of canvas_size × canvas_size images. With a factor, each image
    holds factor × factor tiles.
    """

    ipc: int
    factor: int = 1
    canvas_size: int = 1

    def shape(self, form):
        """The shape of all images (K, C, S, S)."""
        side = self.canvas_size * form.im_size
        return self.ipc * form.num_classes, form.channels, side, side

    def classes(self, form):
        """The class of each tile (n,), n = K * factor²."""
        return torch.arange(form.num_classes).repeat_interleave(self.ipc * self.factor**2)


def check_factor(factor, form):
    """Raise ReportedError if images of this form cannot be cut into factor × factor tiles."""
    if form.im_size % factor:
        raise ReportedError(
            f"--factor={factor}: images of {form.im_size} pixels a side cannot be cut into that "
            "many tiles: choose a divisor"
        )


def members_of(data, label, ipc):
    """The training images of a class, as indices. Raises ReportedError for fewer than `ipc`."""
    members = torch.nonzero(data.train[1].cpu() == label).flatten()
    if ipc > len(members):
        raise ReportedError(
            f"--ipc={ipc} is more than the {len(members)} training images of "
            f"{data.classes[label]}: lower it"
        )
    return members


def random_real(data, layout, generator):
    """Random training images in this `Layout` (K, C, S, S), and the classes of their tiles (n,).

    Tiles are shrunk to H / factor pixels a side. Raises ReportedError if a class has too few.
    """
    grid = layout.factor * layout.canvas_size
    rows = []
    for _ in range(grid):
        cells = [random_images(data, layout.ipc, generator) for _ in range(grid)]
        rows.append(torch.cat(cells, dim=3))
    images = torch.cat(rows, dim=2)
    if layout.factor > 1:
        side = layout.canvas_size * data.form.im_size
        images = F.interpolate(images, size=side, mode="area")
    return images, layout.classes(data.form).to(images.device)


def random_images(data, ipc, generator):
    """`ipc` random training images of each class, in their order: (ipc * classes, C, H, H)."""
    chosen = []
    for label in range(data.form.num_classes):
        members = members_of(data, label, ipc)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:ipc]])
    images = data.train[0]
    return images[torch.cat(chosen).to(images.device)]


def noise(data, layout, generator):
    """Images of Gaussian noise in this `Layout`, and the classes of their tiles."""
    shape = layout.shape(data.form)
    return torch.randn(shape, generator=generator), layout.classes(data.form)


PIX_INIT = {"real": random_real, "noise": noise}  # --pix_init, besides saved sets
