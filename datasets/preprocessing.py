"""A data set ready for use: how it is split, normalised or whitened, and sampled."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import kornia
import numpy as np
import torch
from torch.nn import functional as F

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
    split: "Split"
    classes: tuple  # names, by label
    settings: dict  # of its preprocessing, which experts and distillation must have in common
    folder: Path  # for caches
    names: tuple = ()  # of the files; empty: there are none

    def preprocessed(self, device):
        """Normalise or whiten the images as the settings say: `Data` on `device`."""
        indices = (self.split.train, self.split.val, self.split.test)
        if self.settings["zca"]:
            key = hashlib.sha256(repr(sorted(self.settings.items())).encode()).hexdigest()[:16]
            # One process whitens, others read its cache.
            with files.locked(self.folder, reader=True):
                cache = self.folder / f"zca_{key}.pt"
                images, whitening = whiten(self.images, self.split.train, cache, device)
            parts = [images[chosen].to(device) for chosen in indices]
        else:
            parts, whitening = [self.normalised(chosen).to(device) for chosen in indices], None
        parts = [(part, self.labels[i].to(device)) for part, i in zip(parts, indices)]
        names = [self.names[index] for index in self.split.test.tolist()] if self.names else []
        return Data(*parts, self.classes, self.settings, whitening, tuple(names))

    def normalised(self, chosen):
        """The images `chosen` (n,), normalised: float32, on the CPU."""
        shift, scale = channels(self.settings)
        images = self.images[chosen].float()
        return images.div_(unit_of(self.images)).sub_(shift).div_(scale)


@dataclass(frozen=True)
class Data:
    """A data set ready for use, on one device.

    Each part is preprocessed float32 images (N, C, H, H) and int64 labels (N,).
    """

    train: tuple[torch.Tensor, torch.Tensor]
    val: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
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


# --------------------------------------------------------------------------------------------------
# Coresets


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
        chosen.append(int(nearest.argmax()))
    return chosen


CORESETS = {"herding": herding, "k_center": k_center}


def coreset(data, ipc, choose, features):
    """`ipc` training images per class, chosen by one of CORESETS, and their labels.

    `features` maps images (B, C, H, H) to the features that they are compared by, (B, D).
    """
    images, labels = data.train
    chosen = []
    for label in range(data.form.num_classes):
        members = members_of(data, label, ipc).to(images.device)
        chosen.append(members[choose(features(images[members]), ipc)])
    chosen = torch.cat(chosen)
    return images[chosen], labels[chosen]


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
    sizes = labels[:num_rest].bincount(minlength=len(classes)).tolist()
    check_sizes(dict(zip(classes, sizes)), val_fraction, not num_test)
    train, val, test = [], [], [np.arange(num_rest, len(labels))]
    for label, size in enumerate(sizes):
        members = random.permutation(np.flatnonzero(labels[:num_rest].numpy() == label))
        for_train, for_val, _ = part_sizes(size, val_fraction, not num_test)
        parts = np.split(members, [for_train, for_train + for_val])
        for part, indices in zip((train, val, test), parts):
            part.append(indices)
    return Split(*(torch.from_numpy(np.sort(np.concatenate(p))) for p in (train, val, test)))


def part_sizes(size, val_fraction, tests):
    """The numbers of training, validation and, if it `tests`, test images of a class of a size."""
    for_test = round(TEST_FRACTION * size) if tests else 0
    for_val = round(val_fraction * (size - for_test))
    return size - for_test - for_val, for_val, for_test


def check_sizes(sizes, val_fraction, tests):
    """Raise ReportedError, naming them all, if classes of these sizes, by name, are too small."""

    def lacks(size, fraction):
        for_train, for_val, for_test = part_sizes(size, fraction, tests)
        return not for_train or (fraction and not for_val) or (tests and not for_test)

    small = {name: size for name, size in sizes.items() if lacks(size, val_fraction)}
    if not small:
        return
    named = ", ".join(f"{name} ({size})" for name, size in small.items())
    parts = [f"{TEST_FRACTION:.0%} for testing"] * tests
    parts += [f"--val_fraction={val_fraction} for validation"] * (val_fraction > 0)
    # What helps all of them: another fraction, none, or more images.
    helpful = [f for f in (0.1, 0.2, 0.3, 0.5, 0) if not any(lacks(n, f) for n in small.values())]
    remedy = "add images, or move their folders away"
    if helpful:
        remedy += f", or give --val_fraction={helpful[0]:g}"
        remedy += " (the test set selects)" if not helpful[0] else ""
    raise ReportedError(
        f"classes with too few images to split ({' and '.join(parts)}): {named}: {remedy}"
    )


# --------------------------------------------------------------------------------------------------
# Normalisation, and ZCA whitening

ZCA_EPS = 0.1


def channels(settings):
    """Mean and standard deviation of each channel, (C, 1, 1) each."""
    return [torch.tensor(settings[name]).view(-1, 1, 1) for name in ("mean", "std")]


def unit_of(images):
    """The number that stands for 1: 255 in 8 bits. Others are taken as their files have them."""
    return 255 if images.dtype == torch.uint8 else 1


def channel_statistics(images):
    """Mean and standard deviation of each channel of uint8 images (N, C, H, H), in [0, 1].

    They are the same on every machine, since they are computed from counts.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)  # of each value
    for part in images.split(2048):
        counts += torch.stack([c.flatten().bincount(minlength=256) for c in part.transpose(0, 1)])
    share = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    std[std == 0] = 1  # a channel that is the same everywhere stays 0
    return [[round(value, 6) for value in part.tolist()] for part in (mean, std)]


def band_statistics(images):
    """Mean and standard deviation of each band of images (N, C, H, H), in the unit of `unit_of`.

    Sums of integers are exact, so that they are the same on every machine. Floating-point numbers
    are summed in float64. Both have seven digits.
    """
    unit, count = unit_of(images), images[:, 0].numel()
    exact = not images.is_floating_point()
    total, squares = [0] * images.shape[1], [0] * images.shape[1]
    for part in images.split(512):
        wide = part.long() if exact else part.double()
        for band, values in enumerate(wide.transpose(0, 1)):
            total[band] += values.sum().item()
            squares[band] += values.square().sum().item()
    mean, std = [], []
    for of_values, of_squares in zip(total, squares):
        variance = max(count * of_squares - of_values**2, 0) / count**2
        mean.append(float(f"{of_values / count / unit:.7g}"))
        std.append(
            float(f"{math.sqrt(variance) / unit:.7g}") or 1.0
        )  # the same everywhere: stays 0
    return mean, std


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


def whiten(images, train, cache, device="cpu"):
    """ZCA fitted to `images[train]` and applied to all: float32 images, and the transform.

    images  uint8 (N, C, H, W)
    cache   a file that keeps both, 2.5 GB for EuroSAT, and is memory-mapped when read back: fitting
            takes minutes at 12,288 dimensions
    device  where it is fitted
    """
    zca = kornia.enhance.ZCAWhitening(eps=ZCA_EPS, compute_inv=True)
    if cached := files.read_cache(cache, "images", "mean", "transform", "inverse"):
        images, zca.mean_vector, zca.transform_matrix, zca.transform_inv = cached.values()
        zca.fitted = True
        return images, zca
    size = 4 * images.numel() + 8 * images[0].numel() ** 2  # the images, and both transforms
    print(f"fitting ZCA on {len(train)} images; kept in {cache} ({size / 1e9:.1f} GB)", flush=True)
    zca = fit_zca(images[train].float().div_(255), device=device)
    white = torch.empty(images.shape)
    for part, out in zip(images.split(2048), white.split(2048)):
        out.copy_(zca(part.float().div_(255)))
    fit = {"mean": zca.mean_vector, "transform": zca.transform_matrix, "inverse": zca.transform_inv}
    files.write_cache(cache, fit | {"images": white})
    return white, zca
