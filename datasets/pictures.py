"""Picture files: read in parallel, checked, and kept decoded in a cache."""

import hashlib
import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from system import files
from system.process import ReportedError, first_line, progress
from system.resources import available_cores


class Images(NamedTuple):
    """A data set as it is read."""

    images: torch.Tensor  # (N, C, H, H): uint8, or the type of GeoTIFFs
    labels: torch.Tensor  # int64 (N,)
    digest: str  # identifies the data set in records
    classes: tuple  # names, by label
    num_test: int | None = None  # images of an official test set, which come last
    names: tuple = ()  # of the files, with the folders of their classes; empty: there are none


def data_digest(images, labels, num_test=None):
    """A hash of a data set's pixels, labels and test set."""
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    if num_test is not None:
        digest.update(str(num_test).encode())
    return digest.hexdigest()[:16]


class Listing(NamedTuple):
    """The picture files of a data set."""

    folder: Path
    paths: list  # relative to the folder
    labels: list
    classes: tuple
    num_test: int | None = None


# Increment it with every change to what is read from a picture, so that older caches do not count.
READER = 2


def read_pictures(listing, cache, im_size, crop=False):
    """`Images` with sides of `im_size` pixels, from picture files or from the file `cache`.

    Raises ReportedError for a picture that cannot be used.
    """
    shape = 3, im_size, im_size
    return read_cached(listing, cache, shape, READER, decode_pictures, (im_size, crop))


def read_cached(listing, cache, shape, version, decode, options):
    """`Images` of a `shape` (C, H, H), by `decode(paths, *options)` or from the file `cache`.

    The cache is valid as long as the `version` of the reader, no file's name, size or time, nor
    its own pixels change.
    """
    with files.locked(cache.parent, reader=True):  # one process decodes, others read its cache
        paths = [listing.folder / path for path in listing.paths]
        stats = [os.stat(path) for path in paths]
        known = [(p, s.st_size, s.st_mtime_ns) for p, s in zip(listing.paths, stats)]
        fingerprint = hashlib.sha256(repr((version, known)).encode()).hexdigest()
        labels = torch.tensor(listing.labels)
        shape = len(paths), *shape
        content = files.read_cache(cache, "fingerprint", "images", "digest")
        if not (content and is_of(content, fingerprint, shape, labels, listing.num_test)):
            print(f"reading {len(paths)} pictures; kept in {cache}", flush=True)
            images = decode(paths, *options)
            warn_of_copies(images, paths)
            digest = data_digest(images, labels, listing.num_test)
            content = {"fingerprint": fingerprint, "images": images, "digest": digest}
            files.write_cache(cache, content)
    images, digest, names = content["images"], content["digest"], tuple(listing.paths)
    return Images(images, labels, digest, listing.classes, listing.num_test, names)


def is_of(content, fingerprint, shape, labels, num_test):
    """Tell whether a cache's content is that of these pictures. Half a second for EuroSAT."""
    images = content["images"]
    if content["fingerprint"] != fingerprint or images.shape != shape:
        return False
    return content["digest"] == data_digest(images, labels, num_test)


def decode_pictures(paths, im_size, crop):
    """Picture files as uint8 (N, 3, im_size, im_size), decoded in parallel, rotated as EXIF says.

    With `crop`, those of another size are scaled to cover that square and centre-cropped. Without
    it, they are refused with a ReportedError. Warns about what is left out.
    """
    images = torch.empty(len(paths), 3, im_size, im_size, dtype=torch.uint8)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # its errors are raised as well

    def decode(index):
        try:
            with Image.open(paths[index]) as image:
                fault, losses = picture_fault(image, im_size, crop), losses_of(image)
                if not fault:
                    square = (im_size, im_size)
                    image = ImageOps.exif_transpose(image).convert("RGB")
                    image = ImageOps.fit(image, square, Image.Resampling.BILINEAR)
                    pixels = torch.from_numpy(np.array(image))  # (H, W, 3)
                    images[index] = pixels.permute(2, 0, 1)
        except Exception as error:  # Pillow raises whatever a damaged file's bytes trigger
            losses = []
            fault = f"cannot be decoded ({first_line(error)}): replace it"
            if paths[index].suffix.lower() in (".tif", ".tiff"):
                fault += ", or give --bands=all if it is a GeoTIFF"
        return fault, losses

    faults, lost = [], {}
    with ThreadPoolExecutor(available_cores()) as pool, warnings.catch_warnings():
        # Pillow's decoders release the GIL. Its own warnings do not name the file.
        warnings.simplefilter("ignore")
        done = pool.map(decode, range(len(paths)))
        done = progress(done, total=len(paths), desc="decoding pictures", unit="images")
        for path, (fault, losses) in zip(paths, done):
            if fault:
                faults.append(f"{path} {fault}")
            for loss in losses:
                lost.setdefault(loss, []).append(path)
    if faults:
        others = f"; {len(faults) - 1} more cannot be used" if len(faults) > 1 else ""
        raise ReportedError(faults[0] + others)
    for loss, of in lost.items():
        warnings.warn(f"{len(of)} of {len(paths)} pictures {loss}, for example {of[0]}")
    return images


def warn_of_copies(images, paths):
    """Warn of pictures with the same pixels: some may train a network, and others test it."""
    first, copies = {}, []
    for image, path in zip(images, paths):
        original = first.setdefault(hashlib.sha256(image.numpy()).digest(), path)
        if original is not path:
            copies.append((path, original))
    if copies:
        path, original = copies[0]
        warnings.warn(
            f"{len(copies)} of {len(paths)} pictures have the same pixels as another, for example "
            f"{path} and {original}: training and test images may share them"
        )


# Tags of TIFF, and the values of the last: unsigned, or not said.
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, SAMPLE_FORMAT = 258, 277, 339
UNSIGNED = (1, 4)
# Formats of which the depth is known below, or always 8 bits. Pillow reads more, and keeps 8 bits.
FORMATS = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


def picture_fault(image, im_size, crop):
    """The reason to refuse an opened picture, with a remedy, or None. Decodes nothing."""
    size = f"is {image.width}x{image.height} pixels"
    if image.size != (im_size, im_size) and not crop:
        return f"{size}, not {im_size}x{im_size}: replace it"
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # a few bytes can hold gigabytes
        return f"{size}, more than is safe to decode: replace it"
    if image.format not in FORMATS:
        return f"is a {image.format}, whatever its name says: convert it to PNG"
    values = odd_values(image)
    if values:
        return f"has {values} per channel: scale its values to 8 bits and save it again"
    return None


def odd_values(image):
    """Name the values of an opened picture, if not of at most 8 bits without a sign; else None.

    Pillow takes signed bytes for unsigned ones, and silently keeps only the high byte of 16-bit
    colours: its mode is RGB. The tags of a TIFF, and the arguments of the decoders of PNG, as
    "RGB;16B", and PPM, as ("RGB", 65535), say what the file holds.
    """
    if image.mode.startswith("F"):
        return "floating-point values"
    if image.mode.startswith("I"):
        return "more than 8 bits"
    if image.format == "TIFF":
        formats = image.tag_v2.get(SAMPLE_FORMAT, UNSIGNED[:1])
        if max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8:
            return "16 bits"
        if not set(formats) <= set(UNSIGNED):
            return "signed values"
    arguments = image.tile[0][3] if image.tile else None
    if image.format == "PNG" and ";16" in arguments:
        return "16 bits"
    if image.format == "PPM" and isinstance(arguments, tuple) and arguments[1] > 255:
        return "16 bits"
    return None


def losses_of(image):
    """Name each part of an opened picture that is left out."""
    losses = []
    if image.format == "TIFF" and image.tag_v2.get(SAMPLES_PER_PIXEL, 1) > len(image.getbands()):
        losses.append("have more bands than red, green and blue, which are left out")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        losses.append("have an alpha channel, which is left out")
    if getattr(image, "n_frames", 1) > 1:
        losses.append("hold several frames, of which the first is taken")
    return losses
