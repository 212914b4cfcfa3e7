"""Bands of satellite images: their names, how --bands chooses some, and GeoTIFFs that hold them."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from datasets.pictures import read_cached
from system.process import ReportedError, first_line, progress
from system.resources import available_cores

# --------------------------------------------------------------------------------------------------
# Names


class Band(NamedTuple):
    """A band of Sentinel-2's instrument."""

    wavelength: int  # its centre in nm
    resolution: int  # in m; EuroSAT has all of them at 10 m
    title: str


# In the order of EuroSAT's files, with B8A last: github.com/phelber/EuroSAT/issues/7. torchgeo had
# it after B08 until its pull request 2480; means and deviations by band from before are shifted.
SENTINEL_2 = {
    "B01": Band(443, 60, "aerosol"),
    "B02": Band(490, 10, "blue"),
    "B03": Band(560, 10, "green"),
    "B04": Band(665, 10, "red"),
    "B05": Band(705, 20, "red edge"),
    "B06": Band(740, 20, "red edge"),
    "B07": Band(783, 20, "red edge"),
    "B08": Band(842, 10, "near infrared"),
    "B09": Band(945, 60, "water vapour"),
    "B10": Band(1375, 60, "cirrus"),
    "B11": Band(1610, 20, "short-wave infrared"),
    "B12": Band(2190, 20, "short-wave infrared"),
    "B8A": Band(865, 20, "near infrared, narrow"),
}
RED_GREEN_BLUE = ("B04", "B03", "B02")
RGB, ALL = "rgb", "all"  # --bands, besides lists of names


def chosen_bands(text, known, dataset):
    """The names that --bands stands for, of the `known` ones, in its order.

    Raises ReportedError for a name that the data set does not have.
    """
    if text == ALL:
        return known
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ReportedError(
            f"--bands={text}: {dataset} has no band {', '.join(unknown)}: choose from "
            f"{', '.join(known)}"
        )
    return names


# --------------------------------------------------------------------------------------------------
# GeoTIFFs

# Increment it with every change to what is read from a GeoTIFF, so that older caches do not count.
READER = 2
TYPES = ("uint8", "uint16", "int16", "float32")  # of rasterio, NumPy and PyTorch alike


def open_raster(path):
    """An open GeoTIFF of rasterio. Raises ReportedError if it is none."""
    try:
        import rasterio  # when needed: pictures of three bands are read without it
    except ImportError as error:
        raise ReportedError(
            f"--bands needs rasterio, which cannot be loaded ({first_line(error)}): install "
            "requirements.txt again, or give --bands=rgb"
        ) from None
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise ReportedError(f"{path} is no GeoTIFF: --bands reads no others, --bands=rgb does")
    try:
        return rasterio.open(path, driver="GTiff")
    except Exception as error:  # GDAL raises whatever a damaged file's bytes trigger
        raise damaged(path, error) from None


def damaged(path, error):
    """The ReportedError for a file that GDAL cannot read."""
    reason = first_line(error.__cause__ or error)  # rasterio's own text points to the cause
    return ReportedError(f"{path} cannot be read ({reason}): replace it")


def count_bands(path):
    """The number of bands of a GeoTIFF."""
    with quiet(), open_raster(path) as raster:
        return raster.count


@contextmanager
def quiet():
    """Hide rasterio's warning of each file that has no place on earth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Raster(NamedTuple):
    """The traits of a GeoTIFF that all files of a data set have in common."""

    count: int  # bands
    dtype: str  # one of TYPES
    height: int
    width: int

    def __str__(self):
        return f"{self.count} bands of {self.dtype}, {self.width}x{self.height} pixels"


def raster_of(raster):
    """The `Raster` of an open GeoTIFF."""
    return Raster(raster.count, raster.dtypes[0], raster.height, raster.width)


def read_rasters(listing, cache, im_size, fill_nodata, count=None):
    """`Images` of GeoTIFFs with all their bands, in their own type; cached as pictures are.

    fill_nodata  the value for pixels without data (NaN, or the file's nodata); None: refused
    count        the number of bands that a file must have; None: as many as the first one

    Raises ReportedError for files that cannot be read, or that differ from the first one.
    """
    first = listing.folder / listing.paths[0]
    with quiet(), open_raster(first) as raster:
        form = raster_of(raster)
    check_form(first, form, im_size, count)
    check_fill(fill_nodata, form.dtype)
    version = ("bands", READER, form, fill_nodata)
    shape = form.count, im_size, im_size
    return read_cached(listing, cache, shape, version, decode_rasters, (form, fill_nodata))


def check_form(path, form, im_size, count):
    """Raise ReportedError if files like this one are not read."""
    if count and form.count != count:
        raise ReportedError(
            f"{path} has {form.count} bands, not {count}: replace it, or read such files by "
            "--dataset=ImageFolder"
        )
    if form.dtype not in TYPES:
        raise ReportedError(
            f"{path} holds {form.dtype}: save it again as one of {', '.join(TYPES)}"
        )
    if form.height != form.width:
        raise ReportedError(f"{path} is {form.width}x{form.height} pixels: cut it into squares")
    if form.height != im_size:
        raise ReportedError(
            f"{path} is {form.width}x{form.height} pixels, and GeoTIFFs are not scaled: give "
            f"--im_size={form.height}, or cut it"
        )


def check_fill(fill_nodata, dtype):
    """Raise ReportedError if pixels of this type cannot be --fill_nodata."""
    kind = np.dtype(dtype)
    if fill_nodata is None or kind.kind == "f":
        return
    limits = np.iinfo(kind)
    if not (fill_nodata.is_integer() and limits.min <= fill_nodata <= limits.max):
        raise ReportedError(
            f"--fill_nodata={fill_nodata:g}: the files hold {dtype}, whole numbers from "
            f"{limits.min} to {limits.max}: choose one"
        )


def decode_rasters(paths, form, fill_nodata):
    """GeoTIFFs of one form as a tensor (N, C, H, W) in their type, read in parallel."""
    images = torch.empty(
        len(paths), form.count, form.height, form.width, dtype=getattr(torch, form.dtype)
    )
    pixels = images.numpy()  # of the same memory

    def decode(index):
        pixels[index], without_data = read_raster(paths[index], form)
        if fill_nodata is not None:
            pixels[index][without_data] = fill_nodata
        return int(without_data.sum())

    with quiet(), ThreadPoolExecutor(available_cores()) as pool:  # GDAL releases the GIL
        counts = pool.map(decode, range(len(paths)))
        counts = list(progress(counts, total=len(paths), desc="reading GeoTIFFs", unit="images"))
    holes = [path for path, count in zip(paths, counts) if count]
    if holes and fill_nodata is None:
        raise ReportedError(
            f"{sum(counts)} values in {len(holes)} of {len(paths)} GeoTIFFs are NaN, nodata or "
            f"masked, for example in {holes[0]}: give --fill_nodata=VALUE, or replace the files"
        )
    return images


def read_raster(path, form):
    """The pixels (C, H, W) of a GeoTIFF of this form, and which of them have no data.

    Raises ReportedError for a file that is damaged, has a palette, or another form.
    """
    with open_raster(path) as raster:
        found = raster_of(raster)
        if found != form or len(set(raster.dtypes)) > 1:
            raise ReportedError(f"{path} has {found}, but the first file has {form}: replace it")
        if raster.colorinterp[0].name == "palette":
            raise ReportedError(
                f"{path} has a palette, whose numbers measure nothing: save its colours as bands"
            )
        try:
            pixels = raster.read()
            return pixels, holes_of(raster, pixels)
        except Exception as error:  # GDAL raises whatever a damaged file's bytes trigger
            raise damaged(path, error) from None


def holes_of(raster, pixels):
    """Which of the pixels (C, H, W) have no data: NaN, the file's nodata, or masked.

    An alpha band masks nothing here, since it is read as a band.
    """
    from rasterio.enums import MaskFlags  # when needed, as in `open_raster`

    holes = np.zeros(pixels.shape, bool)
    if pixels.dtype.kind == "f":
        holes |= ~np.isfinite(pixels)
    for band, (nodata, flags) in enumerate(zip(raster.nodatavals, raster.mask_flag_enums)):
        if nodata is not None:
            holes[band] |= pixels[band] == nodata
        if MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
            holes[band] |= raster.read_masks(band + 1) == 0
    return holes


def write_raster(path, pixels, names):
    """Write pixels (C, H, W) as a GeoTIFF of float32, with the names of its bands."""
    import rasterio  # when needed, as in `open_raster`

    count, height, width = pixels.shape
    form = {"driver": "GTiff", "count": count, "height": height, "width": width}
    with quiet(), rasterio.open(path, "w", dtype="float32", compress="deflate", **form) as raster:
        raster.write(np.asarray(pixels, np.float32))
        raster.descriptions = names
