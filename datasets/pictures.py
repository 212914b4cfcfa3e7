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


class Images(NamedTuple):
    """A data set as it is read."""

    images: torch.Tensor  # uint8 (N, 3, H, H)
    labels: torch.Tensor  # int64 (N,)
    digest: str  # identifies the data set in records
    classes: tuple  # names, by label
    num_test: int | None = None  # images of an official test set, which come last


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


def read_pictures(listing, cache, im_size, crop=False):
    """`Images` with sides of `im_size` pixels, from picture files or from the file `cache`.

    The cache is valid as long as no picture's name, size or time changes. Raises ReportedError for
    a picture that cannot be used.
    """
    with files.locked(cache.parent, reader=True):  # one process decodes, others read its cache
        paths = [listing.folder / path for path in listing.paths]
        stats = [os.stat(path) for path in paths]
        known = [(p, s.st_size, s.st_mtime_ns) for p, s in zip(listing.paths, stats)]
        fingerprint = hashlib.sha256(repr(known).encode()).hexdigest()
        labels = torch.tensor(listing.labels)
        cached = files.read_cache(cache, "fingerprint", "images", "digest")
        if cached and cached["fingerprint"] == fingerprint:
            images, digest = cached["images"], cached["digest"]
        else:
            print(f"reading {len(paths)} pictures; kept in {cache}", flush=True)
            images = decode_pictures(paths, im_size, crop)
            digest = data_digest(images, labels, listing.num_test)
            content = {"fingerprint": fingerprint, "images": images, "digest": digest}
            files.write_cache(cache, content)
    return Images(images, labels, digest, listing.classes, listing.num_test)


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
            fault = f"cannot be decoded ({first_line(error)}): replace it"
        if fault:
            raise ReportedError(f"{paths[index]} {fault}")
        return losses

    lost = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        # Pillow's decoders release the GIL. Its own warnings do not name the file.
        warnings.simplefilter("ignore")
        done = pool.map(decode, range(len(paths)))
        done = progress(done, total=len(paths), desc="decoding pictures", unit="images")
        for path, losses in zip(paths, done):
            for loss in losses:
                lost.setdefault(loss, []).append(path)
    for loss, of in lost.items():
        warnings.warn(f"{len(of)} of {len(paths)} pictures {loss}, for example {of[0]}")
    return images


BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277  # tags of TIFF


def picture_fault(image, im_size, crop):
    """The reason to refuse an opened picture, with a remedy, or None. Decodes nothing."""
    size = f"is {image.width}x{image.height} pixels"
    if image.size != (im_size, im_size) and not crop:
        return f"{size}, not {im_size}x{im_size}: replace it"
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # a few bytes can hold gigabytes
        return f"{size}, more than is safe to decode: replace it"
    if depth := depth_of(image):
        return f"has {depth} per channel: scale its values to 8 bits and save it again"
    return None


def depth_of(image):
    """Name the depth of an opened picture of more than 8 bits per channel; None: 8 or fewer.

    Of 16-bit colours, Pillow silently keeps only the high byte: its mode is RGB. The tags of a
    TIFF, and the arguments of a PNG's decoder, as "RGB;16B", say what the file holds.
    """
    if image.mode.startswith("F"):
        return "floating-point values"
    if image.mode.startswith("I"):
        return "more than 8 bits"
    is_wide = image.format == "TIFF" and max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8
    if is_wide or (image.format == "PNG" and ";16" in image.tile[0][3]):
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
