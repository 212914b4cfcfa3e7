"""A saved set for users in Python: all that training on it takes, from a path alone."""

from pathlib import Path
from types import NoneType
from typing import NamedTuple

import torch

from datasets.bands import RGB
from datasets.by_name import DATASETS, Selection
from datasets.folders import class_names
from datasets.preprocessing import Form
from datasets.saved_sets import load_set, saved_step_size
from datasets.set_files import read_record, saved_folder
from system import files
from system.process import ReportedError
from utils import decode


class DistilledSet(NamedTuple):
    """A set of images, and how real images become alike.

    Real images are to be normalised by `mean` and `std`: in [0, 1] those of 8 bits, in the numbers
    of their files those of 16 bits and float32. They are None of whitened images, and of a folder
    of pictures before the first evaluation.
    """

    images: torch.Tensor  # (n, C, S, S), float32, preprocessed; each tile is one, enlarged
    labels: torch.Tensor  # classes (n,), or probabilities (n, classes)
    alpha: float | None  # the step size; None: not saved
    classes: tuple | None  # names, by label; None: CIFAR-100's before the first evaluation
    mean: list | None  # of each channel
    std: list | None


def load_distilled(path):
    """The `DistilledSet` of a run's folder, of a file images_*.pt in it, or of an exported set.

    Raises ReportedError if the folder has no record of a run, or no such images, as of --texture.
    """
    if not files.expanded(path).exists():
        raise ReportedError(f"{path} does not exist: give a run's folder, or a file in it")
    record = read_record(path, "--evaluate")
    if record is None:
        raise ReportedError(
            f"{path} belongs to no run (there is no run.json), so its data set is unknown: read "
            "its tensors with torch.load"
        )
    flags = checked(record.flags, FLAGS, path)
    if flags["texture"]:
        raise ReportedError(
            f"{path} holds canvases (--texture), of which networks see random windows: read its "
            "tensors with torch.load"
        )
    facts = checked(recorded_facts(record, saved_folder(path)), FACTS, path)
    dataset, data_path = flags["dataset"], Path(flags["data_path"])
    if dataset not in DATASETS:
        raise ReportedError(f"{path} was made of --dataset={dataset}, which is unknown here")
    source = DATASETS[dataset]
    classes = source.classes or facts["classes"]
    if not (classes or source.num_classes):
        classes = class_names(data_path)
    of_bands = {"bands": flags["bands"], "fill_nodata": flags["fill_nodata"]}
    selection = Selection(dataset, data_path, flags["im_size"], **of_bands)
    names = facts["bands"] or selection.names
    form = Form(source.num_classes or len(classes), selection.side, len(names) if names else 3)
    factor = flags["factor"]
    saved = load_set(path, form, factor, "--evaluate")
    images = decode(saved.images, factor)
    alpha = saved_step_size(path, "--evaluate")
    mean, std = None, None
    if not flags["zca"]:
        known = source.statistics if selection.bands == RGB else None
        mean, std = known or (facts["mean"], facts["std"])
    return DistilledSet(images, saved.labels, alpha, classes, mean, std)


# Entries of a record with their types, and their values where they are missing.
FLAGS = {
    "dataset": (str, None),
    "data_path": (str, "data"),
    "im_size": ((int, NoneType), None),
    "bands": (str, RGB),
    "fill_nodata": ((int, float, NoneType), None),
    "zca": (bool, False),
    "factor": (int, 1),
    "texture": (bool, False),
}
FACTS = dict.fromkeys(("classes", "bands", "mean", "std"), ((list, NoneType), None))


def checked(content, kinds, path):
    """The entries `kinds` of a record. Raises ReportedError if one is of another type."""
    found = {}
    for name, (kind, missing) in kinds.items():
        found[name] = content.get(name, missing)
        if not isinstance(found[name], kind):
            raise ReportedError(
                f"the record of {path} is damaged ({name}={found[name]!r}): restore it from a copy"
            )
    return found


def recorded_facts(record, folder):
    """Facts about the data: those of an exported set's record, or of a run's results.json.

    Without either, as of a run before its first evaluation, there are none.
    """
    if "classes" in record.settings:
        return record.settings
    path = folder / "results.json"
    try:
        return files.read_json(path, data=dict)["data"]
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ReportedError(f"{path} is damaged ({error}): restore it from a copy") from None
