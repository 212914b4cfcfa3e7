"""Folders of pictures, one for each class, as torchvision's ImageFolder takes them."""

import os
import warnings
from pathlib import Path

from datasets.pictures import Listing, read_pictures
from system.process import ReportedError, first_line


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
    from torchvision.datasets import folder  # when needed: it takes a third of a script's start

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
