"""The files of saved sets, of this project and of other tools: read as they are, and written."""

import json
from typing import NamedTuple

import numpy as np
import torch

from system import files
from system.process import ReportedError


class SavedSet(NamedTuple):
    """The content of a set's files, unchecked; None if there is no such file."""

    images: object
    labels: object
    syn_lr: object
    classes: object = None  # beside soft labels
    targets: object = None  # of kernel machines
    record: object = None  # of the run, as text


def saved_folder(what):
    """The folder of a saved set, given by itself or by one of its files."""
    path = files.expanded(what)
    return path if path.is_dir() else path.parent


TILED = "tiled_images"  # of this project's exports: the images before their tiles are enlarged


def find_set(what, flag):
    """The `SavedSet` that a path names: a run's folder, or a file of this project or of others.

    They are images_*.pt with labels_*.pt and syn_lr_*.pt (this project, MTT) or lr_*.pt (DATM)
    beside it, dd_ranking.pt (DD-Ranking), and res_*.pt (DC, DM), whose last experiment is taken.
    Raises ReportedError for a file that cannot be read.
    """
    path = files.expanded(what)
    if path.is_dir():
        exported = path / "dd_ranking.pt"
        path = path / "images_best.pt"
        path = exported if exported.exists() and not path.exists() else path
    content = read_file(path, flag)
    if isinstance(content, dict):
        return set_in(content, path, flag)

    def beside(name):
        if "images" not in path.name:
            return None
        return read_file(path.with_name(path.name.replace("images", name, 1)), flag)

    syn_lr = beside("syn_lr")
    syn_lr = beside("lr") if syn_lr is None else syn_lr
    return SavedSet(content, beside("labels"), syn_lr, targets=beside("targets"))


def set_in(content, path, flag):
    """The `SavedSet` in a dict of DD-Ranking or of DC."""
    match content:
        case {"data": [*_, [images, labels]]}:  # a pair for each experiment
            return SavedSet(images, labels, None)
        case {"image_tensor": images}:
            images = content.get(TILED, images)
            soft, hard = content.get("soft_labels"), content.get("hard_labels")
            labels = hard if soft is None else soft
            rest = (content.get(name) for name in ("targets", "record"))
            return SavedSet(images, labels, content.get("syn_lr"), hard, *rest)
    keys = ", ".join(map(str, list(content)[:8])) or "none"
    raise ReportedError(
        f"{flag}: {path} holds no images with labels, but a dict with the keys {keys}. Known are "
        "image_tensor with soft_labels or hard_labels (DD-Ranking), and data (DC)"
    )


SCALAR = np.float64(0).__reduce__()[0]  # its place differs between versions of NumPy
NUMPY_SCALARS = [SCALAR, (SCALAR, "numpy.core.multiarray.scalar"), np.dtype]
NUMPY_SCALARS += [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]


def read_file(path, flag):
    """Read what `torch.save` wrote; None if there is no such file."""
    fault = files.foreign_damage(path)
    if fault:
        raise ReportedError(f"{flag}: {path} is damaged ({fault})")
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):  # accuracies, in DC's files
            return files.load_tensors(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # a foreign or damaged file raises whatever its bytes trigger
        fault = files.load_fault(error)
        raise ReportedError(f"{flag}: {path} cannot be read ({fault})") from None


REMEDY = "restore it from a copy, or remove it and give the flags of its run"


def read_record(what, flag):
    """The `files.RunRecord` of the run that made a saved set; None: it has none, as MTT's.

    An exported set has its own, whatever lies beside it. Raises ReportedError for a damaged record.
    """
    content = find_set(what, flag).record
    if content is None:
        return files.read_run(saved_folder(what), REMEDY)
    try:
        return files.RunRecord(**files.entries(json.loads(content), **files.RECORD_KINDS))
    except (TypeError, ValueError) as error:
        raise ReportedError(f"{flag}: the record in {what} is damaged ({error})") from None


def save_set(folder, tag, images, labels, syn_lr, targets=None):
    """Write a set as MTT's tools read it: bare tensors images_{tag}.pt and labels_{tag}.pt.

    images   (K, C, S, S)
    labels   classes (n,), or probabilities (n, classes)
    syn_lr   α, written to syn_lr_{tag}.pt
    targets  of kernel machines (n, classes), written to targets_{tag}.pt; None: there are none
    """
    content = {"images": images, "labels": labels, "syn_lr": torch.tensor(syn_lr)}
    if targets is not None:
        content["targets"] = targets
    for name, tensor in content.items():
        files.write_tensors(folder / f"{name}_{tag}.pt", tensor.cpu().clone())
