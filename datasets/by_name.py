"""Data sets by name: the table `DATASETS`, and how its rows are read."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from datasets import cifar
from datasets.bands import ALL, RGB, SENTINEL_2, chosen_bands
from datasets.eurosat import CLASS_NAMES, IM_SIZE, load_eurosat, load_eurosat_bands
from datasets.folders import class_names, folder_bands, load_folder_bands, load_image_folder
from datasets.lists import listed_split
from datasets.normalised import channel_statistics, unit_of
from datasets.pictures import Images
from datasets.preprocessing import Form, Raw
from datasets.splits import split_dataset
from datasets.toysat import BANDS as TOYSAT_BANDS
from datasets.toysat import draw_toysat
from datasets.whitening import ZCA_EPS
from system.process import ReportedError


def load_toysat(data_path, im_size=IM_SIZE, per_class=300):
    """`Images` of ToySAT, a drawn stand-in for EuroSAT; `data_path` is not read."""
    # A version instead of a digest, since the last bit of a sine differs between processors.
    # Increment it with every change to the drawing, so that older experts and caches no longer fit.
    return toysat_images(draw_toysat(per_class), f"toysat-1-{per_class}", im_size)


def load_toysat_bands(data_path, im_size=IM_SIZE, fill_nodata=None, per_class=300):
    """The same with all of ToySAT's bands. Raises ReportedError for --fill_nodata."""
    if fill_nodata is not None:
        raise ReportedError(
            f"--fill_nodata={fill_nodata:g}: every pixel of ToySAT has data: leave it out"
        )
    drawn = draw_toysat(per_class, bands=len(TOYSAT_BANDS))
    return toysat_images(drawn, f"toysat-bands-1-{per_class}", im_size)


def toysat_bands(data_path):
    """The names of ToySAT's bands; `data_path` is not read."""
    return TOYSAT_BANDS


def toysat_images(drawn, version, im_size):
    """`Images` of drawn images and labels, scaled."""
    images, labels = map(torch.from_numpy, drawn)
    if im_size != IM_SIZE:
        images = F.interpolate(images.float(), size=im_size, mode="area").round().byte()
        version += f"-{im_size}"
    return Images(images, labels, version, CLASS_NAMES)


@dataclass(frozen=True)
class DataSet:
    load: Callable  # makes `Images` from --data_path and, if it `scales`, the side of the images
    num_classes: int | None = None  # None: as many as the folder has
    im_size: int = IM_SIZE  # side of the images in pixels
    scales: bool = False  # to any side
    # Mean and standard deviation of each channel, in [0, 1]; None: of the training images.
    statistics: tuple | None = None
    classes: tuple | None = None  # names, where they are known without the data
    # With --bands: the names of all bands below --data_path, and `Images` that have them all, from
    # --data_path, their side and --fill_nodata. None: there is nothing but red, green and blue.
    bands: Callable | None = None
    load_bands: Callable | None = None


@dataclass(frozen=True)
class Selection:
    """The part of a data set that is used, as flags say it."""

    bands: str = RGB  # --bands
    fill_nodata: float | None = None  # --fill_nodata
    split: Path | None = None  # --split


def sentinel_bands(data_path):
    """The names of Sentinel-2's bands in EuroSAT's order; `data_path` is not read."""
    return tuple(SENTINEL_2)


EUROSAT_STATISTICS = [0.344, 0.380, 0.407], [0.202, 0.136, 0.115]  # ToySAT's are close
EUROSAT_BANDS = {"bands": sentinel_bands, "load_bands": load_eurosat_bands}
DRAWN_BANDS = {"bands": toysat_bands, "load_bands": load_toysat_bands}
FOLDER_BANDS = {"bands": folder_bands, "load_bands": load_folder_bands}
SATELLITE = {"statistics": EUROSAT_STATISTICS, "classes": CLASS_NAMES}
CIFAR = {"statistics": ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])}  # MTT's, for both


DATASETS = {  # --dataset
    "EuroSAT": DataSet(load_eurosat, 10, **SATELLITE, **EUROSAT_BANDS),
    "ToySAT": DataSet(load_toysat, 10, scales=True, **SATELLITE, **DRAWN_BANDS),
    "CIFAR10": DataSet(
        partial(cifar.load_cifar, "CIFAR10"), 10, 32, **CIFAR, classes=cifar.CLASSES_10
    ),
    "CIFAR100": DataSet(partial(cifar.load_cifar, "CIFAR100"), 100, 32, **CIFAR),
    "ImageFolder": DataSet(load_image_folder, scales=True, **FOLDER_BANDS),
}


def is_in_use(data_path):
    """Tell whether a folder, or an archive in it, has caches of this project or of torchvision."""
    folder = data_path.parent if data_path.is_file() else data_path
    return any(path for name in ("*_cache.pt", "zca_*.pt", "cifar-*") for path in folder.glob(name))


def form_of(dataset, data_path, im_size, selection=Selection()):
    """The `Form` of a data set, before its images are read; `im_size` None: its own side.

    Raises ReportedError for a side other than its own, unless it scales, and for unknown bands.
    """
    source = DATASETS[dataset]
    side = side_of(dataset, im_size)
    num_classes = source.num_classes or len(class_names(data_path))
    names = bands_of(dataset, data_path, selection)
    return Form(num_classes, side, len(names) if names else 3)


def bands_of(dataset, data_path, selection):
    """The names of the chosen bands; None: red, green and blue, as pictures have them.

    Raises ReportedError for bands that the data set does not have, and without --bands for
    --fill_nodata.
    """
    if selection.bands == RGB:
        if selection.fill_nodata is not None:
            raise ReportedError(
                f"--fill_nodata={selection.fill_nodata:g} is for GeoTIFFs: give --bands={ALL}, or "
                "leave it out"
            )
        return None
    source = DATASETS[dataset]
    if source.bands is None:
        able = ", ".join(name for name, of in DATASETS.items() if of.bands)
        raise ReportedError(
            f"--bands={selection.bands}: {dataset} has no other bands than {RGB}; {able} have"
        )
    return chosen_bands(selection.bands, source.bands(data_path), dataset)


def check_whitening(zca, form, selection):
    """Raise ReportedError if --zca is given with other bands, with the size that it would need."""
    if not zca or selection.bands == RGB:
        return
    side = form.channels * form.im_size**2
    raise ReportedError(
        f"--zca with --bands={selection.bands}: whitening is for red, green and blue. Two matrices "
        f"of {side:,} x {side:,} numbers would take {4 * side**2 / 1e9:.2g} GB each: leave --zca "
        "out, and each band is normalised by its mean and deviation"
    )


def side_of(dataset, im_size):
    """The side of a data set's images in pixels, as `form_of` says."""
    source = DATASETS[dataset]
    if im_size not in (None, source.im_size) and not source.scales:
        raise ReportedError(
            f"--im_size={im_size}: the images of {dataset} have {source.im_size} pixels a side: "
            "leave the flag out, or use --dataset=ImageFolder, which scales"
        )
    return im_size or source.im_size


def read_dataset(name, data_path, im_size, val_fraction, zca, selection=Selection()):
    """Read and split a data set of `DATASETS`: `Raw` images, with the settings of their use.

    `im_size` is as in `form_of`. Raises ReportedError if the data is unavailable.
    """
    source = DATASETS[name]
    form = form_of(name, data_path, im_size, selection)
    check_whitening(zca, form, selection)
    names = bands_of(name, data_path, selection)
    if names:
        read = read_bands(name, data_path, form.im_size, names, selection.fill_nodata)
    else:
        read = source.load(data_path, form.im_size) if source.scales else source.load(data_path)
    if selection.split:
        split = listed_split(selection.split, read)
        read = read._replace(digest=digest_of(read.digest, split))
    else:
        split = split_dataset(read.labels, val_fraction, read.classes, read.num_test)
    settings = {"dataset": name, "digest": read.digest, "val_fraction": val_fraction, "zca": zca}
    if source.scales:
        settings["im_size"] = form.im_size
    settings |= pixel_settings(source, read.images, split.train, names, zca)
    folder = data_path.parent if data_path.is_file() else data_path  # an archive's
    return Raw(read.images, read.labels, split, read.classes, settings, folder, read.names)


def pixel_settings(source, images, train, names, zca):
    """The settings by which pixels are preprocessed: statistics of the training images, or ZCA's.

    `train` are the training images' indices, and `names` their bands, None for red, green and blue.
    """
    if names:
        mean, std = channel_statistics(images, train)
        mean, std = ([float(f"{value:.7g}") for value in part] for part in (mean, std))
        return {"bands": list(names), "unit": unit_of(images), "mean": mean, "std": std}
    if zca:
        return {"zca_eps": ZCA_EPS}
    mean, std = source.statistics or channel_statistics(images, train)
    mean, std = ([round(value, 6) for value in part] for part in (mean, std))
    return {"mean": mean, "std": std}


def digest_of(digest, split):
    """The digest of a data set that lists split: another split is other data to all records."""
    digest = hashlib.sha256(digest.encode())
    for part in (split.train, split.val, split.test):
        digest.update(part.numpy())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def read_bands(name, data_path, side, names, fill_nodata):
    """`Images` of a data set with the bands `names`. One cache of all bands serves any choice."""
    source = DATASETS[name]
    read = source.load_bands(data_path, side, fill_nodata)
    known = source.bands(data_path)
    chosen = [known.index(band) for band in names]
    digest = hashlib.sha256(repr((read.digest, names)).encode()).hexdigest()[:16]
    is_all = chosen == list(range(read.images.shape[1]))
    images = read.images if is_all else read.images[:, chosen]  # a copy, of gigabytes
    return read._replace(images=images, digest=digest)
