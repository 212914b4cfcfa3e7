"""Data sets, read, split and preprocessed: `load_data` does all of it, `form_of` tells what networks must fit.

the data sets: EuroSAT, ToySAT, CIFAR-10 and CIFAR-100, any folder of class folders
splits
ZCA, normalisation
"""

import hashlib
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import kornia
import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

import files
import utils
from files import ReportedError, first_line
from toysat import draw_toysat


class Images(NamedTuple):
    """A data set as it is read."""

    images: torch.Tensor  # uint8 (N, 3, H, H)
    labels: torch.Tensor  # int64 (N,)
    digest: str  # of both: what tells one data set from another in records
    classes: tuple  # names, by label
    num_test: int | None = None  # so many of the last images are its official test set; None: it has none


def data_digest(images, labels, num_test=None):
    """What tells one data set from another in records: a hash of its pixels, labels and test set."""
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    if num_test is not None:
        digest.update(str(num_test).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Picture files


def read_pictures(folder, paths, labels, cache, im_size, *, crop=False, num_test=None):
    """Picture files as uint8 images (N, 3, im_size, im_size), and the digest of images and `labels` (N,).

    The first call decodes them in parallel and leaves the file `cache`; it is used as long as no file's name (`paths`,
    relative to `folder`), size or time changes. Raises ReportedError for a picture that cannot be used.
    """
    stats = [(path, (stat := os.stat(folder / path)).st_size, stat.st_mtime_ns) for path in paths]
    fingerprint = hashlib.sha256(repr(stats).encode()).hexdigest()
    cached = files.read_cache(cache, "fingerprint", "images", "digest")
    if cached and cached["fingerprint"] == fingerprint:
        return cached["images"], cached["digest"]
    images = decode_pictures([folder / path for path in paths], im_size, crop)
    digest = data_digest(images, labels, num_test)
    files.write_cache(cache, {"fingerprint": fingerprint, "images": images, "digest": digest})
    return images, digest


def decode_pictures(paths, im_size, crop):
    """Decode pictures in parallel threads (the decoder releases Python's lock): uint8 (N, 3, im_size, im_size).

    Pictures of another size are scaled to cover that square, and their centre is taken (`crop`), or refused.
    """
    images = torch.empty(len(paths), 3, im_size, im_size, dtype=torch.uint8)

    def decode(index):
        path, fault = paths[index], None
        try:
            with Image.open(path) as image:  # its size is known before it is decoded: a few bytes can hold gigabytes
                if image.size != (im_size, im_size) and not crop:
                    fault = f"is {image.width}x{image.height} pixels, not {im_size}x{im_size}"
                elif image.width * image.height > Image.MAX_IMAGE_PIXELS:  # of which Pillow itself only warns
                    fault = f"is {image.width}x{image.height} pixels, more than is safe to decode"
                elif image.mode.startswith(("I", "F")):
                    fault = f"has more than 8 bits per channel (mode {image.mode}); convert it"
                else:
                    square = ImageOps.fit(image.convert("RGB"), (im_size, im_size), Image.Resampling.BILINEAR)
                    images[index] = torch.from_numpy(np.array(square)).permute(2, 0, 1)  # from (H, W, 3)
        except Exception as error:  # Pillow raises whatever a damaged file's bytes happen to trigger
            fault = f"cannot be decoded ({first_line(error)})"
        if fault:
            raise ReportedError(f"{path} {fault}: replace it")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in utils.progress(pool.map(decode, range(len(paths))), total=len(paths), desc="decoding pictures",
                                unit="images"):
            pass
    return images


# ---------------------------------------------------------------------------------------------------------------------
# EuroSAT

CLASS_NAMES = ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
               "Residential", "River", "SeaLake")
IM_SIZE = 64
EUROSAT_FOLDERS = (".", "2750", "EuroSAT_RGB", "eurosat/2750")
EUROSAT_ARCHIVES = ("EuroSAT.zip", "EuroSAT_RGB.zip")
EUROSAT_CACHE = "eurosat_cache.pt"
ARCHIVE_LIMIT = 2 * 10**9  # bytes that an archive may unpack to


def load_eurosat(data_path):
    """All `Images` of EuroSAT below `data_path`, 64×64, sorted by class and name.

    Raises ReportedError where the data cannot be had, is incomplete or damaged.
    """
    with files.locked(data_path, reader=True):  # of several processes, one decodes, and the others read its cache
        folder = find_eurosat(data_path)
        of_classes = [list_jpegs(folder, name) for name in CLASS_NAMES]
        paths = [path for part in of_classes for path in part]
        labels = torch.tensor([label for label, part in enumerate(of_classes) for _ in part])
        images, digest = read_pictures(folder, paths, labels, data_path / EUROSAT_CACHE, IM_SIZE)
        return Images(images, labels, digest, CLASS_NAMES)


def find_eurosat(data_path):
    """The folder of EuroSAT's class folders below `data_path`; where there is none, unpack an archive or download."""

    def found():
        for folder in (data_path / name for name in EUROSAT_FOLDERS):
            if any((folder / name).is_dir() for name in CLASS_NAMES):
                return folder

    if folder := found():
        return folder
    for archive in (data_path / name for name in EUROSAT_ARCHIVES):
        if archive.is_file():
            unpack_eurosat(archive)
            return found()
    print(f"EuroSAT is not in {data_path}; downloading it (90 MB)", flush=True)
    try:
        return download_eurosat(data_path)
    except Exception as error:  # torchvision passes on whatever the network raises
        raise ReportedError(
            f"EuroSAT is not in --data_path={data_path}: looked for class folders ({CLASS_NAMES[0]}, ...) in "
            f"{', '.join(EUROSAT_FOLDERS)} and for {' or '.join(EUROSAT_ARCHIVES)}, and the download failed ({error}). "
            "Either unpack the data there, or put the archive there (EuroSAT_RGB.zip from zenodo.org/records/7711810), "
            "or run once with access to the network.") from None


def download_eurosat(data_path):
    """Let torchvision fetch and unpack EuroSAT; returns the folder of its class folders, `2750/` in `data_path`."""
    data_path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_path, prefix=".download", suffix=files.TEMPORARY) as temporary:
        torchvision.datasets.EuroSAT(temporary, download=True)
        return (Path(temporary) / "eurosat" / "2750").rename(data_path / "2750")  # whole or not at all


def unpack_eurosat(archive):
    """Unpack the JPEGs of EuroSAT's class folders, wherever they lie in the archive, into `2750/` beside it."""
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpack", suffix=files.TEMPORARY) as temporary:
        unpacked = Path(temporary) / "2750"
        unpacked.mkdir()
        try:
            with zipfile.ZipFile(archive) as zipped:
                members = [member for member in zipped.infolist() if is_jpeg(Path(member.filename).name)]
                size = sum(member.file_size for member in members)  # more than that, zipfile does not read
                if size > ARCHIVE_LIMIT:
                    raise ReportedError(f"{archive} unpacks to {size / 1e9:.0f} GB, EuroSAT to 0.1: fetch it again")
                for member in utils.progress(members, desc=f"unpacking {archive.name}"):
                    *_, folder, name = ("", *member.filename.split("/"))  # all else of the path is left out
                    if folder in CLASS_NAMES:
                        path = unpacked / folder / name
                        path.parent.mkdir(exist_ok=True)
                        path.write_bytes(zipped.read(member))
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:  # RuntimeError: encrypted
            raise ReportedError(f"{archive} cannot be unpacked ({error}): fetch it again") from None
        if not any(unpacked.iterdir()):
            raise ReportedError(f"{archive} holds none of EuroSAT's classes: is it the RGB archive?")
        os.replace(unpacked, archive.parent / "2750")  # in one step, so that no part of it is ever taken for the whole


def is_jpeg(name):
    """Whether a file of this name is an image; macOS leaves `._*.jpg` beside it, which are none."""
    return name.lower().endswith((".jpg", ".jpeg")) and not name.startswith(".")


def list_jpegs(folder, name):
    """Sorted paths, relative to `folder`, of the JPEGs of class `name`."""
    if not (folder / name).is_dir():
        raise ReportedError(f"class folder {folder / name} is missing: EuroSAT has {len(CLASS_NAMES)}, unpack it again")
    names = sorted(f"{name}/{entry.name}" for entry in os.scandir(folder / name) if is_jpeg(entry.name))
    if not names:
        raise ReportedError(f"class folder {folder / name} holds no JPEG: unpack EuroSAT again")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Other data sets


def load_toysat(data_path, per_class=300):
    """ToySAT, a drawn stand-in for EuroSAT, in the form of `load_eurosat`; `data_path` is not read."""
    images, labels = map(torch.from_numpy, draw_toysat(per_class))
    # A version instead of a digest, since a sine's last bit differs between processors. Raise it with every change of
    # the drawing, so that experts and caches made before are not taken for those of the new images.
    return Images(images, labels, f"toysat-1-{per_class}", CLASS_NAMES)


def write_toysat(folder, per_class, seed=0):
    """Write ToySAT as JPEGs in class folders below `folder`, shaped like EuroSAT's."""
    images, labels = map(torch.from_numpy, draw_toysat(per_class, seed))
    for index, (image, label) in enumerate(zip(images, labels)):
        path = folder / CLASS_NAMES[label] / f"{CLASS_NAMES[label]}_{index % per_class + 1}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=90)


def load_cifar(dataset, data_path):
    """CIFAR-10 or CIFAR-100, which the torchvision class `dataset` reads, or downloads: `Images`, 32×32.

    torchvision unpickles their files, after it has compared them with the checksums that it knows.
    """
    with files.locked(data_path, reader=True):
        if not any((data_path / name).exists() for name in (dataset.base_folder, dataset.filename)):
            print(f"{dataset.__name__} is not in {data_path}; downloading it (170 MB)", flush=True)
        try:
            parts = [dataset(data_path, train=train, download=True) for train in (True, False)]
        except Exception as error:  # torchvision passes on whatever the network raises
            raise ReportedError(
                f"{dataset.__name__} is not in --data_path={data_path}, or is damaged, and the download failed "
                f"({first_line(error)}). Put {dataset.filename} there ({dataset.url}), or run once with access to the "
                "network") from None
    images = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label for part in parts for label in part.targets])
    num_test = len(parts[1])
    return Images(images, labels, data_digest(images, labels, num_test), tuple(parts[0].classes), num_test)


def load_image_folder(data_path, im_size):
    """The pictures of any folder of class folders, as torchvision's ImageFolder takes it: `Images` of this side.

    They are scaled to cover the square, and its centre is taken. Raises ReportedError where a class has none, where one
    cannot be decoded, or is there twice.
    """
    classes, *parts = image_folders(data_path)
    samples = [list_pictures(data_path, part, classes) for part in parts]
    paths, labels = zip(*(sample for part in samples for sample in part))
    labels, num_test = torch.tensor(labels), len(samples[1]) if len(samples) > 1 else None
    places = {}
    for path in paths:
        if (first := places.setdefault(os.path.realpath(data_path / path), path)) != path:
            raise ReportedError(f"--data_path={data_path}: {first} and {path} are one file, by a link: remove one")
    with files.locked(data_path, reader=True):
        images, digest = read_pictures(data_path, paths, labels, data_path / f"imagefolder_{im_size}_cache.pt", im_size,
                                       crop=True, num_test=num_test)
    return Images(images, labels, digest, classes, num_test)


def list_pictures(data_path, part, classes):
    """Paths relative to `data_path`, and labels, of the pictures in the class folders of its subfolder `part`.

    They are sorted by class and path. What is hidden is left out, and what torchvision does not take for a picture.
    """

    def is_picture(path):
        hidden = any(name.startswith(".") for name in os.path.relpath(path, data_path / part).split(os.sep))
        return path.lower().endswith(IMG_EXTENSIONS) and not hidden

    labels_of = {name: label for label, name in enumerate(classes)}
    try:
        samples = make_dataset(data_path / part, labels_of, is_valid_file=is_picture)
    except FileNotFoundError as error:  # of a class without pictures
        raise ReportedError(f"{data_path / part}: {first_line(error)} Add pictures, or remove the folder") from None
    return [(os.path.relpath(path, data_path), label) for path, label in samples]


PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval"}


def image_folders(data_path):
    """Class names in an image folder, and the subfolder that has their folders; or that for training and that for
    testing, where there are train/ and test/, val/ or val/images/ (as in Tiny ImageNet).

    Raises ReportedError where there are not two classes, those for training and testing differ, or a name is none.
    """

    def classes_in(part):
        try:
            with os.scandir(data_path / part) as entries:
                return tuple(sorted(entry.name for entry in entries
                                    if entry.is_dir() and not entry.name.startswith(".")))
        except OSError as error:
            raise ReportedError(f"--data_path={data_path} cannot be read ({first_line(error)})") from None

    classes, parts = classes_in("."), ["."]
    tests = [part for part in ("test", "val", "val/images") if (data_path / part).is_dir()]
    if "train" in classes and tests:
        classes = classes_in("train")
        parts = ["train", *(part for part in tests if classes_in(part) == classes)][:2]
        if len(parts) < 2:
            raise ReportedError(f"--data_path={data_path}: {' and '.join(tests)} do not have the {len(classes)} class "
                                "folders of train: sort the pictures into them, or name train itself, and it is split")
    if classes and all(name.lower() in PARTS for name in classes):
        raise ReportedError(f"--data_path={data_path} holds {', '.join(classes)}, which are no classes: call them "
                            "train and test (or val), with a folder per class, or name one of them, and it is split")
    for name in classes:
        if not name.isprintable():  # as where it is no UTF-8
            raise ReportedError(f"--data_path={data_path}: the folder {name!a} cannot be printed: rename it")
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise ReportedError(f"--data_path={data_path} holds {len(classes)} class folders ({found}): name the folder in "
                            "which every class has one, with its pictures")
    return classes, *parts


class Form(NamedTuple):
    """What networks must fit."""

    num_classes: int
    im_size: int  # side of the square images in pixels


@dataclass(frozen=True)
class DataSet:
    load: Callable  # from --data_path, and where `form` is None, --im_size: `Images`
    form: Form | None  # None: that of the folder
    mean: list | None  # of each channel, pixels in [0, 1]; None: of the training images
    std: list | None


EUROSAT_MEAN, EUROSAT_STD = [0.344, 0.380, 0.407], [0.202, 0.136, 0.115]
CIFAR_MEAN, CIFAR_STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]  # MTT's, for both of them
DATASETS = {  # --dataset
    "EuroSAT": DataSet(load_eurosat, Form(10, IM_SIZE), EUROSAT_MEAN, EUROSAT_STD),
    "ToySAT": DataSet(load_toysat, Form(10, IM_SIZE), EUROSAT_MEAN, EUROSAT_STD),  # its own are close
    "CIFAR10": DataSet(partial(load_cifar, torchvision.datasets.CIFAR10), Form(10, 32), CIFAR_MEAN, CIFAR_STD),
    "CIFAR100": DataSet(partial(load_cifar, torchvision.datasets.CIFAR100), Form(100, 32), CIFAR_MEAN, CIFAR_STD),
    "ImageFolder": DataSet(load_image_folder, None, None, None),
}


def form_of(dataset, data_path, im_size):
    """The `Form` of a data set, known before its images are read. Raises ReportedError where `im_size` is not its own.
    """
    form = DATASETS[dataset].form
    if form is None:
        return Form(len(image_folders(data_path)[0]), im_size or IM_SIZE)
    if im_size not in (None, form.im_size):
        raise ReportedError(f"--im_size={im_size}: the images of {dataset} have {form.im_size} pixels a side; leave it "
                            "out, or use --dataset=ImageFolder, which scales")
    return form


# ---------------------------------------------------------------------------------------------------------------------
# Splits

TEST_FRACTION = 0.1


@dataclass(frozen=True)
class Split:
    """Indices into a data set's images, int64."""

    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor


def split_dataset(labels, val_fraction, classes=CLASS_NAMES, num_test=None):
    """Split by class: TEST_FRACTION, or the last `num_test` images, for testing, then `val_fraction` of the rest.

    It depends on nothing but the labels.

    Raises ReportedError where one of `classes` is too small to have an image in each part.
    """
    random = np.random.RandomState(42)  # a frozen stream: NumPy keeps it the same for ever
    parts = [], [], [np.arange(len(labels) - (num_test or 0), len(labels))]
    labels = labels.numpy()[:len(labels) - (num_test or 0)]
    for label, name in enumerate(classes):
        members = random.permutation(np.flatnonzero(labels == label))
        num_test_here = 0 if num_test else round(TEST_FRACTION * len(members))
        num_val = round(val_fraction * (len(members) - num_test_here))
        num_train = len(members) - num_test_here - num_val
        if (num_test_here == 0 and not num_test) or (val_fraction > 0 and num_val == 0) or num_train == 0:
            raise ReportedError(
                f"class {name} has only {len(members)} images, too few to split "
                f"{'' if num_test else f'{TEST_FRACTION:.0%} for testing and '}"
                f"--val_fraction={val_fraction} for validation: add some, or change --val_fraction (0: no validation)")
        for part, indices in zip(parts, np.split(members, [num_train, num_train + num_val])):
            part.append(indices)
    return Split(*(torch.from_numpy(np.sort(np.concatenate(part))) for part in parts))


# ---------------------------------------------------------------------------------------------------------------------
# ZCA, normalisation

ZCA_EPS = 0.1


def fit_zca(images, eps=ZCA_EPS):
    """kornia's ZCAWhitening(eps, compute_inv=True), fitted on float images (N, C, H, W) in [0, 1].

    kornia takes the singular values of the D×D covariance C; here its eigenvectors V and eigenvalues λ are computed,
    or, where there are fewer images than dimensions, those of the N×N Gram matrix, which has the same λ > 0. Both
    transforms are written as a multiple of the identity plus a correction on the span of V, so that the null space
    needs no vectors:

        (C + ε)^{−½} = ε^{−½} I − V diag(λ / (√(λ+ε) √ε (√(λ+ε) + √ε))) Vᵀ
        (C + ε)^{+½} = ε^{+½} I + V diag(λ / (√(λ+ε) + √ε)) Vᵀ
    """
    flat = images.flatten(1)
    mean = flat.mean(0, keepdim=True)
    centred = (flat - mean) / math.sqrt(len(flat) - 1)  # (N, D), so that C = centredᵀ centred
    if len(flat) < flat.shape[1]:
        eigenvalues, vectors = torch.linalg.eigh(centred @ centred.T)
        keep = eigenvalues > eigenvalues[-1] * 1e-6  # below: rounding
        eigenvalues = eigenvalues[keep]
        vectors = centred.T @ (vectors[:, keep] * eigenvalues.rsqrt())  # (D, rank)
    else:
        covariance = centred.T @ centred
        del centred  # 1 GB for EuroSAT
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        del covariance
        eigenvalues = eigenvalues.clamp(min=0)
    root, root_eps = (eigenvalues + eps).sqrt(), math.sqrt(eps)
    zca = kornia.enhance.ZCAWhitening(eps=eps, compute_inv=True)
    zca.mean_vector = mean
    zca.transform_matrix = (vectors * (-eigenvalues / (root * root_eps * (root + root_eps)))) @ vectors.T
    zca.transform_matrix.diagonal().add_(1 / root_eps)
    zca.transform_inv = (vectors * (eigenvalues / (root + root_eps))) @ vectors.T
    zca.transform_inv.diagonal().add_(root_eps)
    zca.fitted = True
    return zca


def whiten(images, train, cache):
    """ZCA fitted on `images[train]` and applied to all uint8 `images` (N, C, H, W): float32 images, and the transform.

    Fitting takes minutes at 12,288 dimensions. Both results, 2.5 GB for EuroSAT, are kept in the file `cache` and read
    back by memory map.
    """
    zca = kornia.enhance.ZCAWhitening(eps=ZCA_EPS, compute_inv=True)
    if cached := files.read_cache(cache, "images", "mean", "transform", "inverse"):
        images, zca.mean_vector, zca.transform_matrix, zca.transform_inv = cached.values()
        zca.fitted = True
        return images, zca
    size = 4 * images.numel() + 8 * images[0].numel() ** 2  # of the images, and of the transform and its inverse
    print(f"fitting ZCA on {len(train)} images; kept in {cache} ({size / 1e9:.1f} GB)", flush=True)
    zca = fit_zca(images[train].float().div_(255))
    white = torch.empty(images.shape)
    for part, out in zip(images.split(2048), white.split(2048)):
        out.copy_(zca(part.float().div_(255)))
    fit = {"mean": zca.mean_vector, "transform": zca.transform_matrix, "inverse": zca.transform_inv}
    files.write_cache(cache, fit | {"images": white})
    return white, zca


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@dataclass(frozen=True)
class Data:
    """A data set ready for use: of each part, float32 images (N, 3, H, H) and int64 labels (N,), on one device."""

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
        """Undo the preprocessing: images (B, 3, H, W) on the CPU, [0, 1] where they are real ones."""
        if self.zca:
            return self.zca.inverse_transform(images.cpu())
        shift, scale = (torch.tensor(self.settings[name]).view(3, 1, 1) for name in ("mean", "std"))
        return images.cpu() * scale + shift


def channel_statistics(images):
    """Mean and standard deviation of each channel of uint8 images (N, 3, H, H), pixels in [0, 1], the same everywhere.
    """
    counts = torch.zeros(3, 256, dtype=torch.float64)  # of each value: whole numbers, whose sums are exact
    for part in images.split(2048):
        counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in part.transpose(0, 1)])
    share, values = counts / counts.sum(1, keepdim=True), torch.arange(256) / 255
    mean = share @ values.double()
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    std[std == 0] = 1  # of a channel that is the same everywhere, and stays 0
    return [[round(value, 6) for value in part.tolist()] for part in (mean, std)]


def load_data(dataset, data_path, zca, val_fraction, device, im_size=None):
    """Load, split and preprocess a data set of `DATASETS`; raises ReportedError where it cannot be had."""
    known, form = DATASETS[dataset], form_of(dataset, data_path, im_size)
    raw = known.load(data_path) if known.form else known.load(data_path, form.im_size)
    split = split_dataset(raw.labels, val_fraction, raw.classes, raw.num_test)
    settings = {"dataset": dataset, "digest": raw.digest, "val_fraction": val_fraction, "zca": zca}
    if not known.form:
        settings["im_size"] = form.im_size
    if zca:
        settings["zca_eps"] = ZCA_EPS
        key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]
        with files.locked(data_path, reader=True):  # of several processes, one whitens, and the others read its cache
            images, whitening = whiten(raw.images, split.train, data_path / f"zca_{key}.pt")
    else:
        mean, std = (known.mean, known.std) if known.mean else channel_statistics(raw.images[split.train])
        settings |= {"mean": mean, "std": std}
        shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        images, whitening = raw.images.float().div_(255).sub_(shift).div_(scale), None
    parts = [(images[indices].to(device), raw.labels[indices].to(device))
             for indices in (split.train, split.val, split.test)]
    return Data(*parts, raw.classes, settings, whitening)


def add_flags(parser):
    """The flags that say which data, and how they are prepared."""
    add = parser.topic("data")
    add("--dataset", choices=list(DATASETS), default="EuroSAT",
        help="ToySAT: a drawn stand-in for trying things out; ImageFolder: any folder of class folders of pictures")
    add("--data_path", type=utils.expanded_path, default=Path("data"), metavar="DIR",
        help="folder of the data set and of its caches")
    add("--im_size", type=utils.number(int, 2, below=4097), metavar="PIXELS",
        help=f"with --dataset=ImageFolder: side that its pictures are scaled to (default: {IM_SIZE})")
    utils.add_flag(add, "--zca", help="ZCA whitening instead of normalisation by channel")
    add("--val_fraction", type=utils.number(float, 0, below=1), default=0.1, metavar="[0,1)",
        help="part of the training images kept to choose the best iteration; 0: choose on the test set, as MTT does")
