"""A saved set for users in Python: all that training on it takes, from a path alone."""

from pathlib import Path
from typing import NamedTuple

import torch

from datasets.bands import RGB
from datasets.by_name import DATASETS, Selection, form_of
from datasets.folders import class_names
from datasets.saved_sets import load_set, saved_folder, saved_step_size
from system import files
from system.process import ReportedError


class DistilledSet(NamedTuple):
    """A set of images, and how real images become alike.

    Real images in [0, 1] are to be normalised by `mean` and `std`. They are None of whitened
    images, and of a folder of pictures whose run has not ended.
    """

    images: torch.Tensor  # (N, C, S, S), float32, preprocessed
    labels: torch.Tensor  # classes (n,), or probabilities (n, classes), of images or tiles
    alpha: float | None  # the step size; None: not saved
    classes: tuple | None  # names, by label; None: CIFAR-100's, which its data has
    mean: list | None  # of each channel
    std: list | None


def load_distilled(path):
    """The `DistilledSet` of a run's folder, or of a file images_*.pt in it.

    Raises ReportedError if the folder has no record of a run, or no such images.
    """
    folder = saved_folder(path)
    record = files.read_run(folder)
    if record is None:
        raise ReportedError(
            f"{path} belongs to no run (there is no run.json), so its data set is unknown: read "
            "its tensors with torch.load"
        )
    flags = record.flags
    data_path = Path(flags.get("data_path", "data"))
    selection = Selection(flags.get("bands", RGB), flags.get("fill_nodata"))
    form = form_of(flags["dataset"], data_path, flags["im_size"], selection)
    images, labels, _ = load_set(path, form, flags.get("factor", 1), "--evaluate")
    source = DATASETS[flags["dataset"]]
    classes = source.classes if source.num_classes else class_names(data_path)
    mean, std = None, None
    if not flags["zca"]:
        known = source.statistics if selection.bands == RGB else None
        mean, std = known or recorded_statistics(folder)
    return DistilledSet(images, labels, saved_step_size(path, "--evaluate"), classes, mean, std)


def recorded_statistics(folder):
    """Mean and standard deviation of each channel, as a run recorded them at its end."""
    try:
        data = files.read_json(folder / "results.json", data=dict)["data"]
    except FileNotFoundError:
        return None, None
    return data["mean"], data["std"]
