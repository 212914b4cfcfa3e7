"""Data sets by name: where each is found, and how it is read."""

import hashlib
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import kornia
import numpy as np
import torch
from torch.nn import functional as F

import files
from pictures import Images, Listing, data_digest, read_pictures
from preprocessing import ZCA_EPS, Data, Form, channel_statistics, fit_zca, split_dataset
from process import ReportedError, first_line, progress
from toysat import draw_toysat


def torchvision_datasets():
    """torchvision's data sets. Imported when needed: it takes a third of a script's start."""
    from torchvision import datasets

    return datasets


# --------------------------------------------------------------------------------------------------
# EuroSAT

CLASS_NAMES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
IM_SIZE = 64
EUROSAT_SIZE = 27_000  # images
EUROSAT_FOLDERS = (".", "2750", "EuroSAT_RGB", "EuroSAT", "EuroSAT/2750", "eurosat/2750")
EUROSAT_ARCHIVES = ("EuroSAT.zip", "EuroSAT_RGB.zip")  # in any case
EUROSAT_CACHE = "eurosat_cache.pt"
ARCHIVE_LIMIT = 2 * 10**9  # bytes that an archive may unpack to


def load_eurosat(data_path):
    """All `Images` of EuroSAT below `data_path`, 64×64, sorted by class and name.

    Raises ReportedError if the data is unavailable, incomplete or damaged.
    """
    with files.locked(data_path, reader=True):  # one process unpacks, others wait for it
        folder = find_eurosat(data_path)
    paths, labels = [], []
    for label, name in enumerate(CLASS_NAMES):
        names = list_jpegs(folder, name)
        paths += names
        labels += [label] * len(names)
    if len(paths) != EUROSAT_SIZE:
        warnings.warn(f"{folder} holds {len(paths)} images, EuroSAT has {EUROSAT_SIZE}")
    listing = Listing(folder, paths, labels, CLASS_NAMES)
    return read_pictures(listing, data_path / EUROSAT_CACHE, IM_SIZE)


def find_eurosat(data_path):
    """The folder of EuroSAT's class folders below `data_path`, unpacked or downloaded first."""
    if folder := class_parent(data_path):
        return folder
    if archive := find_archive(data_path):
        unpack_eurosat(archive)
        return class_parent(data_path)
    print(f"EuroSAT is not in {data_path}; downloading it (90 MB)", flush=True)
    try:
        return download_eurosat(data_path)
    except Exception as error:  # torchvision passes on whatever the network raises
        raise ReportedError(
            f"EuroSAT is not in --data_path={data_path}: looked for class folders "
            f"({CLASS_NAMES[0]}, ...) in {', '.join(EUROSAT_FOLDERS)} and for "
            f"{' or '.join(EUROSAT_ARCHIVES)}, and the download failed ({error}). Either unpack "
            "the data there, or put the archive there (EuroSAT_RGB.zip from "
            "zenodo.org/records/7711810), or run once with access to the network."
        ) from None


def class_parent(data_path):
    """The folder that has class folders, if there is one."""
    for folder in (in_any_case(data_path, name) for name in EUROSAT_FOLDERS):
        if folder and class_folders(folder):
            return folder
    return None


def in_any_case(folder, name):
    """The subfolder `name`, in upper or lower case; None if there is none."""
    for part in Path(name).parts:
        exact = folder / part
        alike = folder.iterdir() if folder.is_dir() and not exact.is_dir() else ()
        found = (p for p in sorted(alike) if p.name.lower() == part.lower() and p.is_dir())
        folder = exact if exact.is_dir() else next(found, None)
        if folder is None:
            return None
    return folder


def class_folders(folder):
    """The names of EuroSAT's class folders in a folder, in any case, by class."""
    if not folder.is_dir():
        return {}
    lower = {name.lower(): name for name in CLASS_NAMES}
    found = {}
    for entry in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        if name := lower.get(entry.lower()):
            if name in found:
                raise ReportedError(f"{folder} holds {found[name]} and {entry}: make them one")
            found[name] = entry
    return found


def find_archive(data_path):
    """EuroSAT's archive in a folder; None: there is none."""
    if not data_path.is_dir():
        return None
    wanted = [name.lower() for name in EUROSAT_ARCHIVES]
    found = (p for p in sorted(data_path.iterdir()) if p.name.lower() in wanted and p.is_file())
    return next(found, None)


def download_eurosat(data_path):
    """Let torchvision fetch and unpack EuroSAT into `2750/` below `data_path`, which it returns."""
    data_path.mkdir(parents=True, exist_ok=True)
    with scratch_folder(data_path) as scratch:
        torchvision_datasets().EuroSAT(scratch, download=True)
        unpacked = Path(scratch) / "eurosat" / "2750"
        return unpacked.rename(data_path / "2750")  # whole or not at all


def scratch_folder(parent):
    """A temporary folder. If a killed process leaves it behind, `files.locked` removes it."""
    return tempfile.TemporaryDirectory(dir=parent, prefix=".unpack", suffix=files.TEMPORARY)


def unpack_eurosat(archive):
    """Unpack the JPEGs of EuroSAT's class folders, wherever they are, to `2750/` beside `archive`.

    Raises ReportedError for an archive that is damaged, too large, or not EuroSAT's.
    """
    with scratch_folder(archive.parent) as scratch:
        unpacked = Path(scratch) / "2750"
        unpacked.mkdir()
        try:
            with zipfile.ZipFile(archive) as zipped:
                unpack_jpegs(zipped, unpacked)
        # zipfile raises RuntimeError for an encrypted archive.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
            raise ReportedError(f"{archive} cannot be unpacked ({error}): fetch it again") from None
        missing = [name for name in CLASS_NAMES if not (unpacked / name).is_dir()]
        if missing:
            raise ReportedError(
                f"{archive} lacks JPEGs of {len(missing)} of EuroSAT's {len(CLASS_NAMES)} classes "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): is it the "
                "complete RGB archive? Nothing was unpacked"
            )
        os.replace(unpacked, archive.parent / "2750")  # whole or not at all


def unpack_jpegs(zipped, target):
    """Unpack JPEGs in class folders. Only the last two names of a path are used."""
    # Some tools write backslashes.
    named = [(member.filename.replace("\\", "/"), member) for member in zipped.infolist()]
    members = {name: member for name, member in named if is_jpeg(name.rpartition("/")[2])}
    size = sum(member.file_size for member in members.values())  # zipfile reads no more than that
    if size > ARCHIVE_LIMIT:
        raise ReportedError(
            f"{zipped.filename} unpacks to {size / 1e9:.0f} GB, EuroSAT to 0.1: fetch it again"
        )
    lower = {name.lower(): name for name in CLASS_NAMES}
    for full_name, member in progress(members.items(), desc="unpacking EuroSAT", unit="images"):
        *_, folder, name = ("", *full_name.split("/"))
        if folder.lower() in lower:
            path = target / lower[folder.lower()] / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(zipped.read(member))


def is_jpeg(name):
    """Whether a file of this name is an image, unlike the `._*.jpg` that macOS leaves beside it."""
    return name.lower().endswith((".jpg", ".jpeg")) and not name.startswith(".")


def list_jpegs(folder, name):
    """Sorted paths, relative to `folder`, of the JPEGs of class `name`."""
    place = class_folders(folder).get(name)
    if not place:
        raise ReportedError(
            f"class folder {folder / name} is missing: EuroSAT has {len(CLASS_NAMES)}, unpack it "
            "again"
        )
    others = [entry.name for entry in os.scandir(folder / place)]
    names = sorted(f"{place}/{entry}" for entry in others if is_jpeg(entry))
    if not names:
        kinds = {Path(entry).suffix.lower() for entry in others}
        found = "holds no JPEG: unpack EuroSAT again"
        if kinds & {".tif", ".tiff"}:
            found = "holds TIFFs, as EuroSAT-MS with its 13 bands: fetch the RGB archive"
        elif ".png" in kinds:
            found = "holds PNGs: read them by --dataset=ImageFolder --im_size=64"
        raise ReportedError(f"class folder {folder / place} {found}")
    return names


# --------------------------------------------------------------------------------------------------
# ToySAT, CIFAR


def load_toysat(data_path, im_size=IM_SIZE, per_class=300):
    """`Images` of ToySAT, a drawn stand-in for EuroSAT; `data_path` is not read."""
    images, labels = map(torch.from_numpy, draw_toysat(per_class))
    # A version instead of a digest, since the last bit of a sine differs between processors.
    # Increment it with every change to the drawing, so that older experts and caches no longer fit.
    version = f"toysat-1-{per_class}"
    if im_size != IM_SIZE:
        images = F.interpolate(images.float(), size=im_size, mode="area").round().byte()
        version += f"-{im_size}"
    return Images(images, labels, version, CLASS_NAMES)


def load_cifar(name, data_path):
    """`Images`, 32×32, of "CIFAR10" or "CIFAR100", as torchvision reads them.

    torchvision unpickles the files, but verifies their checksums first. Raises ReportedError if
    they are missing or damaged and cannot be downloaded.
    """
    dataset = getattr(torchvision_datasets(), name)
    with files.locked(data_path, reader=True):
        if not any((data_path / part).exists() for part in (dataset.base_folder, dataset.filename)):
            print(f"{name} is not in {data_path}; downloading it (170 MB)", flush=True)
        try:
            parts = [dataset(data_path, train=train, download=True) for train in (True, False)]
        except Exception as error:  # torchvision passes on whatever the network raises
            raise ReportedError(
                f"{name} is not in --data_path={data_path}, or is damaged, and the download failed "
                f"({first_line(error)}). Put {dataset.filename} there ({dataset.url}), or run once "
                "with access to the network"
            ) from None
    pixels = torch.from_numpy(np.concatenate([part.data for part in parts]))  # (N, H, W, 3)
    images = pixels.permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label for part in parts for label in part.targets])
    num_test = len(parts[1])
    digest = data_digest(images, labels, num_test)
    return Images(images, labels, digest, tuple(parts[0].classes), num_test)


# --------------------------------------------------------------------------------------------------
# Folders of pictures


def load_image_folder(data_path, im_size):
    """`Images` of any folder of class folders, as torchvision's ImageFolder takes it.

    Pictures are scaled to cover the square, then centre-cropped. Raises ReportedError if a class
    has none, or if one cannot be decoded.
    """
    classes, *parts = image_folders(data_path)
    samples = [list_pictures(data_path, part, classes) for part in parts]
    paths, labels = zip(*(sample for part in samples for sample in part))
    num_test = len(samples[1]) if len(samples) > 1 else None
    listing = Listing(data_path, paths, labels, classes, num_test)
    cache = data_path / f"imagefolder_{im_size}_cache.pt"
    return read_pictures(listing, cache, im_size, crop=True)


OTHER_PICTURES = (".gif", ".jp2", ".j2k", ".jfif", ".heic", ".avif")


def list_pictures(data_path, part, classes):
    """Paths relative to `data_path`, and labels, of the pictures below its subfolder `part`.

    Sorted by class and path. Hidden files are left out, as are files that torchvision does not take
    for pictures.
    """

    folder = torchvision_datasets().folder

    def is_picture(path):
        names = os.path.relpath(path, data_path / part).split(os.sep)
        is_hidden = any(name.startswith(".") for name in names)
        return path.lower().endswith(folder.IMG_EXTENSIONS) and not is_hidden

    def looks_like_one(path):
        return path.lower().endswith(OTHER_PICTURES)

    labels_of = {name: label for label, name in enumerate(classes)}
    place = data_path / part
    others = folder.make_dataset(place, labels_of, is_valid_file=looks_like_one, allow_empty=True)
    if others:
        kinds = ", ".join(sorted({Path(path).suffix.lower() for path, _ in others}))
        warnings.warn(
            f"{len(others)} pictures below {place} are left out ({kinds}): convert them to PNG to "
            "include them"
        )
    try:
        samples = folder.make_dataset(data_path / part, labels_of, is_valid_file=is_picture)
    except FileNotFoundError as error:  # a class without pictures
        raise ReportedError(
            f"{data_path / part}: {first_line(error)} Add pictures, or remove the folder"
        ) from None
    return [(os.path.relpath(path, data_path), label) for path, label in samples]


PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval"}


def image_folders(data_path):
    """Class names, and the subfolder of their folders, or those for training and for testing.

    The latter if there are train/ and test/, val/ or val/images/, as in Tiny ImageNet. Raises
    ReportedError for fewer than two classes, or if training and testing have different ones.
    """
    classes, parts = classes_in(data_path, "."), ["."]
    tests = [part for part in ("test", "val", "val/images") if (data_path / part).is_dir()]
    if "train" in classes and tests:
        classes = classes_in(data_path, "train")
        alike = [part for part in tests if classes_in(data_path, part) == classes]
        if not alike:
            raise ReportedError(
                f"--data_path={data_path}: {' and '.join(tests)} do not have the {len(classes)} "
                "class folders of train: sort the pictures into them, or name train itself to "
                "have it split"
            )
        parts = ["train", alike[0]]
    names = ", ".join(classes) or "none"
    if classes and all(name.lower() in PARTS for name in classes):
        raise ReportedError(
            f"--data_path={data_path} holds {names}, which are no classes: call them train and "
            "test (or val), with a folder per class, or name one of them to have it split"
        )
    if len(classes) < 2:
        raise ReportedError(
            f"--data_path={data_path} holds {len(classes)} class folders ({names}): name the "
            "folder in which every class has one, with its pictures"
        )
    return classes, *parts


def classes_in(data_path, part):
    """The sorted names of the folders in a subfolder, without hidden ones."""
    try:
        entries = [entry for entry in os.scandir(data_path / part) if entry.is_dir()]
    except OSError as error:
        raise ReportedError(
            f"--data_path={data_path} cannot be read ({first_line(error)})"
        ) from None
    return tuple(sorted(entry.name for entry in entries if not entry.name.startswith(".")))


# --------------------------------------------------------------------------------------------------
# By name


@dataclass(frozen=True)
class DataSet:
    load: Callable  # makes `Images` from --data_path and, if it `scales`, the side of the images
    num_classes: int | None = None  # None: as many as the folder has
    im_size: int = IM_SIZE  # side of the images in pixels
    scales: bool = False  # to any side
    # Mean and standard deviation of each channel, in [0, 1]; None: of the training images.
    statistics: tuple | None = None


EUROSAT_STATISTICS = [0.344, 0.380, 0.407], [0.202, 0.136, 0.115]  # ToySAT's are close
CIFAR_STATISTICS = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]  # MTT's, for both

DATASETS = {  # --dataset
    "EuroSAT": DataSet(load_eurosat, 10, statistics=EUROSAT_STATISTICS),
    "ToySAT": DataSet(load_toysat, 10, scales=True, statistics=EUROSAT_STATISTICS),
    "CIFAR10": DataSet(partial(load_cifar, "CIFAR10"), 10, 32, statistics=CIFAR_STATISTICS),
    "CIFAR100": DataSet(partial(load_cifar, "CIFAR100"), 100, 32, statistics=CIFAR_STATISTICS),
    "ImageFolder": DataSet(load_image_folder, scales=True),
}


def form_of(dataset, data_path, im_size):
    """The `Form` of a data set, before its images are read; `im_size` None: its own side.

    Raises ReportedError for a side other than its own, unless it scales.
    """
    source = DATASETS[dataset]
    if im_size not in (None, source.im_size) and not source.scales:
        raise ReportedError(
            f"--im_size={im_size}: the images of {dataset} have {source.im_size} pixels a side: "
            "leave the flag out, or use --dataset=ImageFolder, which scales"
        )
    num_classes = source.num_classes or len(image_folders(data_path)[0])
    return Form(num_classes, im_size or source.im_size)


def load_data(dataset, data_path, zca, val_fraction, device, im_size=None, check=None):
    """Load, split and preprocess a data set of `DATASETS`.

    `check` is called with the settings before whitening, which takes minutes, and may raise. Raises
    ReportedError if the data is unavailable.
    """
    source = DATASETS[dataset]
    form = form_of(dataset, data_path, im_size)
    raw = source.load(data_path, form.im_size) if source.scales else source.load(data_path)
    split = split_dataset(raw.labels, val_fraction, raw.classes, raw.num_test)
    settings = {"dataset": dataset, "digest": raw.digest, "val_fraction": val_fraction, "zca": zca}
    if source.scales:
        settings["im_size"] = form.im_size
    whitening = None
    if zca:
        settings["zca_eps"] = ZCA_EPS
        if check:
            check(settings)
        key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]
        with files.locked(data_path, reader=True):  # one process whitens, others read its cache
            images, whitening = whiten(raw.images, split.train, data_path / f"zca_{key}.pt", device)
    else:
        mean, std = source.statistics or channel_statistics(raw.images[split.train])
        settings |= {"mean": mean, "std": std}
        if check:
            check(settings)
        shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        images = raw.images.float().div_(255).sub_(shift).div_(scale)
    parts = [
        (images[indices].to(device), raw.labels[indices].to(device))
        for indices in (split.train, split.val, split.test)
    ]
    return Data(*parts, raw.classes, settings, whitening)


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
