"""Data sets by name: the table `DATASETS`, and how its rows are read."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from datasets import cifar, eurosat, toysat
from datasets.bands import ALL, RGB, chosen_bands
from datasets.eurosat import CLASS_NAMES, IM_SIZE, place_of
from datasets.folders import class_names, folder_bands, load_folder_bands, load_image_folder
from datasets.lists import listed_split
from datasets.normalised import channel_statistics, unit_of
from datasets.preprocessing import Form, Raw
from datasets.splits import split_dataset
from datasets.whitening import ZCA_EPS
from system.process import ReportedError


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


EUROSAT_STATISTICS = [0.344, 0.380, 0.407], [0.202, 0.136, 0.115]  # ToySAT's are close
EUROSAT_BANDS = {"bands": eurosat.band_names, "load_bands": eurosat.load_eurosat_bands}
DRAWN_BANDS = {"bands": toysat.band_names, "load_bands": toysat.load_toysat_bands}
FOLDER_BANDS = {"bands": folder_bands, "load_bands": load_folder_bands}
SATELLITE = {"statistics": EUROSAT_STATISTICS, "classes": CLASS_NAMES}
CIFAR = {"statistics": ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])}  # MTT's, for both


DATASETS = {  # --dataset
    "EuroSAT": DataSet(eurosat.load_eurosat, 10, **SATELLITE, **EUROSAT_BANDS),
    "ToySAT": DataSet(toysat.load_toysat, 10, scales=True, **SATELLITE, **DRAWN_BANDS),
    "CIFAR10": DataSet(
        partial(cifar.load_cifar, "CIFAR10"), 10, 32, **CIFAR, classes=cifar.CLASSES_10
    ),
    "CIFAR100": DataSet(partial(cifar.load_cifar, "CIFAR100"), 100, 32, **CIFAR),
    "ImageFolder": DataSet(load_image_folder, scales=True, **FOLDER_BANDS),
}


@dataclass(frozen=True)
class Selection:
    """A data set, and the part of it that is used, as flags say it."""

    dataset: str
    data_path: Path
    im_size: int | None = None  # None: its own
    val_fraction: float = 0.1
    zca: bool = False
    bands: str = RGB
    fill_nodata: float | None = None
    split: Path | None = None

    @property
    def source(self):
        """The row of DATASETS."""
        return DATASETS[self.dataset]

    @property
    def side(self):
        """The side of the images in pixels.

        Raises ReportedError for another than the data set's own, unless it scales.
        """
        own = self.source.im_size
        if self.im_size not in (None, own) and not self.source.scales:
            raise ReportedError(
                f"--im_size={self.im_size}: the images of {self.dataset} have {own} pixels a side: "
                "leave the flag out, or use --dataset=ImageFolder, which scales"
            )
        return self.im_size or own

    @cached_property
    def names(self):
        """The names of the chosen bands; None: red, green and blue, as pictures have them.

        Raises ReportedError for bands that the data set does not have, and without --bands for
        --fill_nodata.
        """
        if self.bands == RGB:
            if self.fill_nodata is not None:
                raise ReportedError(
                    f"--fill_nodata={self.fill_nodata:g} is for GeoTIFFs: give --bands={ALL}, or "
                    "leave it out"
                )
            return None
        if self.source.bands is None:
            able = ", ".join(name for name, of in DATASETS.items() if of.bands)
            raise ReportedError(
                f"--bands={self.bands}: {self.dataset} has no other bands than {RGB}; {able} have"
            )
        return chosen_bands(self.bands, self.all_names, self.dataset)

    @cached_property
    def all_names(self):
        """The names of all bands that the data set has."""
        return self.source.bands(self.data_path)

    @cached_property
    def form(self):
        """The `Form` of the images, before they are read, with the errors of `side` and `names`."""
        side = self.side
        num_classes = self.source.num_classes or len(class_names(self.data_path))
        return Form(num_classes, side, len(self.names) if self.names else 3)


def is_in_use(data_path):
    """Tell whether a folder, or an archive in it, has caches of this project or of torchvision."""
    folder = place_of(data_path)
    return any(path for name in ("*_cache.pt", "zca_*.pt", "cifar-*") for path in folder.glob(name))


def check_whitening(selection):
    """Raise ReportedError if --zca is given with other bands, with the size that it would need."""
    if not selection.zca or selection.bands == RGB:
        return
    side = selection.form.channels * selection.form.im_size**2
    raise ReportedError(
        f"--zca with --bands={selection.bands}: whitening is for red, green and blue. Two matrices "
        f"of {side:,} x {side:,} numbers would take {4 * side**2 / 1e9:.2g} GB each: leave --zca "
        "out, and each band is normalised by its mean and deviation"
    )


def read_dataset(selection):
    """Read and split a data set: `Raw` images, with the settings of their use.

    Raises ReportedError if the data is unavailable.
    """
    source, form = selection.source, selection.form
    check_whitening(selection)
    if selection.names:
        read = read_bands(selection)
    else:
        size = [form.im_size] if source.scales else []
        read = source.load(selection.data_path, *size)
    if selection.split:
        split = listed_split(selection.split, read)
        read = read._replace(digest=digest_of(read.digest, split))
    else:
        split = split_dataset(read.labels, selection.val_fraction, read.classes, read.num_test)
    settings = {"dataset": selection.dataset, "digest": read.digest}
    settings |= {"val_fraction": selection.val_fraction, "zca": selection.zca}
    if source.scales:
        settings["im_size"] = form.im_size
    settings |= pixel_settings(selection, read.images, split.train)
    folder = place_of(selection.data_path)
    return Raw(read.images, read.labels, split, read.classes, settings, folder, read.names)


def pixel_settings(selection, images, train):
    """The settings by which pixels are preprocessed: statistics of the training images, or ZCA's.

    `train` are the training images' indices.
    """
    if selection.names:
        mean, std = channel_statistics(images, train)
        mean, std = ([float(f"{value:.7g}") for value in part] for part in (mean, std))
        return {"bands": list(selection.names), "unit": unit_of(images), "mean": mean, "std": std}
    if selection.zca:
        return {"zca_eps": ZCA_EPS}
    mean, std = selection.source.statistics or channel_statistics(images, train)
    mean, std = ([round(value, 6) for value in part] for part in (mean, std))
    return {"mean": mean, "std": std}


def digest_of(digest, split):
    """The digest of a data set that lists split: another split is other data to all records."""
    digest = hashlib.sha256(digest.encode())
    for part in (split.train, split.val, split.test):
        digest.update(part.numpy())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def read_bands(selection):
    """`Images` with the chosen bands. One cache of all bands serves any choice."""
    load = selection.source.load_bands
    read = load(selection.data_path, selection.form.im_size, selection.fill_nodata)
    chosen = [selection.all_names.index(band) for band in selection.names]
    digest = hashlib.sha256(repr((read.digest, selection.names)).encode()).hexdigest()[:16]
    is_all = chosen == list(range(read.images.shape[1]))
    images = read.images if is_all else read.images[:, chosen]  # a copy, of gigabytes
    return read._replace(images=images, digest=digest)
