"""A data set ready for use: how it is split, normalised or whitened, and sampled."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import kornia
import numpy as np
import torch
from torch.nn import functional as F

from process import ReportedError


class Form(NamedTuple):
    """What networks must fit."""

    num_classes: int
    im_size: int  # side of the square images in pixels


@dataclass(frozen=True)
class Data:
    """A data set ready for use, on one device.

    Each part is preprocessed float32 images (N, 3, H, H) and int64 labels (N,).
    """

    train: tuple[torch.Tensor, torch.Tensor]
    val: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: tuple  # names, by label
    settings: dict  # what experts and distillation must have in common
    zca: kornia.enhance.ZCAWhitening | None

    @property
    def form(self):
        return Form(len(self.classes), self.train[0].shape[-1])

    def to_pixels(self, images):
        """Images (B, 3, H, H) with preprocessing undone, on the CPU. Real ones are in [0, 1]."""
        if self.zca:
            return self.zca.inverse_transform(images.cpu())
        shift, scale = (torch.tensor(self.settings[name]).view(3, 1, 1) for name in ("mean", "std"))
        return images.cpu() * scale + shift


def members_of(data, label, ipc):
    """The training images of a class, as indices. Raises ReportedError for fewer than `ipc`."""
    members = torch.nonzero(data.train[1].cpu() == label).flatten()
    if ipc > len(members):
        raise ReportedError(
            f"--ipc={ipc} is more than the {len(members)} training images of "
            f"{data.classes[label]}: lower it"
        )
    return members


def random_real(data, ipc, generator):
    """`ipc` random training images of each class, (ipc * classes, 3, H, H), and their labels.

    They are ordered by class. Raises ReportedError if a class has fewer.
    """
    images, labels = data.train
    chosen = []
    for label in range(data.form.num_classes):
        members = members_of(data, label, ipc)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:ipc]])
    chosen = torch.cat(chosen).to(images.device)
    return images[chosen], labels[chosen]


def real_tiles(data, ipc, factor, generator):
    """Images (ipc * classes, 3, H, H) of factor × factor random real ones each, and labels.

    The real images are shrunk into tiles of H / factor pixels a side. Labels are those of the
    tiles, (ipc * factor² * classes,).
    """
    canvases, labels = initial_images(data, ipc, "real", factor, generator)
    images = F.interpolate(canvases, size=data.form.im_size, mode="area")
    return images, labels.repeat_interleave(factor**2).to(images.device)


def initial_images(data: Data, ipc, pix_init, canvas_size, generator):
    """Initial images (ipc * classes, 3, S, S), S = canvas_size * im_size, and labels."""
    label_syn = torch.arange(data.form.num_classes).repeat_interleave(ipc)
    if pix_init == "noise":
        side = canvas_size * data.form.im_size
        return torch.randn(len(label_syn), 3, side, side, generator=generator), label_syn
    # A canvas of the texture mode is tiled with different real images.
    rows = []
    for _ in range(canvas_size):
        tiles = [random_real(data, ipc, generator)[0] for _ in range(canvas_size)]
        rows.append(torch.cat(tiles, dim=3))
    return torch.cat(rows, dim=2), label_syn


# --------------------------------------------------------------------------------------------------
# Splits

TEST_FRACTION = 0.1


@dataclass(frozen=True)
class Split:
    """Indices into a data set's images, int64."""

    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor


def split_dataset(labels, val_fraction, classes, num_test=None):
    """Split by class: TEST_FRACTION for testing, then `val_fraction` of the rest for validation.

    An official test set, the last `num_test` images, stays the test set. The split depends only on
    the labels (N,). Raises ReportedError if one of `classes` is too small to have an image in each
    part.
    """
    random = np.random.RandomState(42)  # a frozen stream: NumPy never changes it
    num_rest = len(labels) - (num_test or 0)
    train, val, test = [], [], [np.arange(num_rest, len(labels))]
    for label, name in enumerate(classes):
        members = random.permutation(np.flatnonzero(labels[:num_rest].numpy() == label))
        size = len(members)
        for_test = 0 if num_test else round(TEST_FRACTION * size)
        for_val = round(val_fraction * (size - for_test))
        for_train = size - for_test - for_val
        lacks_test = not (for_test or num_test)
        if lacks_test or (val_fraction and not for_val) or not for_train:
            raise ReportedError(
                f"class {name} has only {size} images, too few to split "
                f"{'' if num_test else f'{TEST_FRACTION:.0%} for testing and '}"
                f"--val_fraction={val_fraction} for validation: add some, or change --val_fraction "
                "(0: no validation)"
            )
        parts = np.split(members, [for_train, for_train + for_val])
        for part, indices in zip((train, val, test), parts):
            part.append(indices)
    return Split(*(torch.from_numpy(np.sort(np.concatenate(p))) for p in (train, val, test)))


# --------------------------------------------------------------------------------------------------
# Normalisation, and ZCA whitening

ZCA_EPS = 0.1


def channel_statistics(images):
    """Mean and standard deviation of each channel of uint8 images (N, 3, H, H), in [0, 1].

    They are the same on every machine, since they are computed from counts.
    """
    counts = torch.zeros(3, 256, dtype=torch.float64)  # of each value
    for part in images.split(2048):
        counts += torch.stack([c.flatten().bincount(minlength=256) for c in part.transpose(0, 1)])
    share = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    std[std == 0] = 1  # a channel that is the same everywhere stays 0
    return [[round(value, 6) for value in part.tolist()] for part in (mean, std)]


def eigenvectors(matrix, device):
    """Eigenvalues in ascending order and eigenvectors of a symmetric matrix, both on the CPU."""
    return [result.cpu() for result in torch.linalg.eigh(matrix.to(device))]


def fit_zca(images, eps=ZCA_EPS, device="cpu"):
    """kornia's ZCAWhitening(eps, compute_inv=True), fitted to float images (N, C, H, W) in [0, 1].

    `device` computes the eigenvectors, which takes longest. Images and transforms are on the CPU.

    kornia uses the singular values of the D×D covariance C. Here its eigenvectors V and eigenvalues
    λ are computed. With fewer images than dimensions, those of the N×N Gram matrix are computed
    instead, which has the same λ > 0. Both transforms are a multiple of the identity plus a
    correction on the span of V, so that the null space needs no vectors:

        (C + ε)^{−½} = ε^{−½} I − V diag(λ / (√(λ+ε) √ε (√(λ+ε) + √ε))) Vᵀ
        (C + ε)^{+½} = ε^{+½} I + V diag(λ / (√(λ+ε) + √ε)) Vᵀ
    """
    flat = images.flatten(1)
    mean = flat.mean(0, keepdim=True)
    centred = (flat - mean) / math.sqrt(len(flat) - 1)  # (N, D), so that C = centredᵀ centred
    if len(flat) < flat.shape[1]:
        eigenvalues, vectors = eigenvectors(centred @ centred.T, device)
        keep = eigenvalues > eigenvalues[-1] * 1e-6  # below: rounding
        eigenvalues = eigenvalues[keep]
        vectors = centred.T @ (vectors[:, keep] * eigenvalues.rsqrt())  # (D, rank)
    else:
        covariance = centred.T @ centred
        del centred  # 1 GB for EuroSAT
        eigenvalues, vectors = eigenvectors(covariance, device)
        del covariance
        eigenvalues = eigenvalues.clamp(min=0)
    root, root_eps = (eigenvalues + eps).sqrt(), math.sqrt(eps)
    zca = kornia.enhance.ZCAWhitening(eps=eps, compute_inv=True)
    zca.mean_vector = mean
    zca.transform_matrix = (
        vectors * (-eigenvalues / (root * root_eps * (root + root_eps)))
    ) @ vectors.T
    zca.transform_matrix.diagonal().add_(1 / root_eps)
    zca.transform_inv = (vectors * (eigenvalues / (root + root_eps))) @ vectors.T
    zca.transform_inv.diagonal().add_(root_eps)
    zca.fitted = True
    return zca
