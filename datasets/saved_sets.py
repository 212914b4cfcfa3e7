"""Saved sets of synthetic images, of this project and of other tools: written, read, checked."""

import json
import math
import warnings
from typing import NamedTuple

import numpy as np
import torch

from datasets.coresets import CORESETS
from datasets.preprocessing import PIX_INIT
from system import files
from system.process import ReportedError

# What flags take besides saved sets.
REAL_SETS = ("random", *CORESETS, "full")
OTHERS = {"--evaluate": ", ".join(REAL_SETS), "--pix_init": ", ".join(PIX_INIT)}


def is_saved(what):
    """Tell whether --evaluate names a saved set."""
    return what is not None and what not in REAL_SETS


def saved_folder(what):
    """The folder of a saved set, given by itself or by one of its files."""
    path = files.expanded(what)
    return path if path.is_dir() else path.parent


class SavedSet(NamedTuple):
    """The content of a set's files, unchecked; None if there is no such file."""

    images: object
    labels: object
    syn_lr: object
    classes: object = None  # beside soft labels
    targets: object = None  # of kernel machines
    record: object = None  # of the run, as text


class SyntheticSet(NamedTuple):
    """A checked set of synthetic images."""

    images: torch.Tensor  # float32 (N, C, H, H)
    labels: torch.Tensor  # of images, or tiles: classes (n,) int64, or probabilities (n, classes)
    classes: torch.Tensor  # the same as classes
    targets: torch.Tensor | None = None  # of kernel machines, float32 (n, classes)

    def to(self, device):
        """The same on a device."""
        return SyntheticSet(*(part if part is None else part.to(device) for part in self))


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


def saved_step_size(what, flag):
    """The α of a saved set; None if it was not saved, as by MTT.

    Raises ReportedError if the file holds something else.
    """
    syn_lr = find_set(what, flag).syn_lr
    if syn_lr is None:
        return None
    try:
        alpha = float(syn_lr)
    except (TypeError, ValueError, RuntimeError):
        alpha = math.nan
    if not 0 < alpha < 1e30:
        raise ReportedError(
            f"{flag}: what is saved with {what} as α (syn_lr_*.pt) is no step size, a positive "
            f"number, but {description(syn_lr)}"
        )
    return alpha


def load_set(what, form, factor, flag):
    """The `SyntheticSet` of a saved set.

    Labels are those of the factor² tiles of each image. Those that are no probabilities are taken
    as logits, with a warning. Raises ReportedError if they are missing, or do not fit this
    `preprocessing.Form`.
    """
    found = find_set(what, flag)
    for name, part in (("images", found.images), ("labels", found.labels)):
        if part is None:
            raise ReportedError(
                f"{flag}={what}: there are no {name}: name a run's folder, a file images_*.pt with "
                f"labels_*.pt beside it, dd_ranking.pt, res_*.pt of DC, or {OTHERS[flag]}"
            )
        if not is_plain(part):
            raise ReportedError(
                f"{flag}: {what} holds no synthetic images: its {name} are a "
                f"{type(part).__name__}, not a dense tensor of real numbers"
            )
    images, labels = as_images(found.images), as_labels(found.labels)
    fits = is_image_set(images, form)
    count = len(images) * factor**2 if fits else 0
    if fits and labels.dim() and len(labels) != count:
        check_tiles(len(labels) / len(images), factor, f"{flag}: {what}")
    if images.dim() == 4 and images.shape[1] != form.channels:
        raise ReportedError(
            f"{flag}: the images of {what} have {images.shape[1]} bands, not {form.channels}: use "
            "the --bands that they were made with"
        )
    if not (fits and is_label_set(labels, count, form)):
        size, last = form.im_size, form.num_classes - 1
        raise ReportedError(
            f"{flag}: {what} holds no synthetic images of these classes: (N, {form.channels}, "
            f"{size}, {size}) float32, finite, and labels (N,) int64 from 0 to {last}, or "
            f"probabilities (N, {last + 1}) float32; found images {description(found.images)} and "
            f"labels {description(found.labels)}"
        )
    if labels.dim() == 2 and not is_probability(labels):
        warnings.warn(f"{flag}: the labels of {what} are no probabilities: taken as logits (DATM)")
        labels = labels.softmax(1)
    classes = classes_of(labels)
    if is_plain(found.classes) and found.classes.shape == classes.shape:
        own = as_labels(found.classes)
        classes = own if is_label_set(own, count, form) else classes
    targets = checked_targets(found.targets, (count, form.num_classes), f"{flag}: {what}")
    return SyntheticSet(images, labels, classes, targets)


def check_tiles(of_each, factor, where):
    """Raise ReportedError if another --factor has as many labels for each image."""
    if of_each > 1 and math.isqrt(int(of_each)) ** 2 == of_each:
        raise ReportedError(
            f"{where} has {of_each:.0f} labels for each image, one for each of its tiles: give "
            f"--factor={math.isqrt(int(of_each))}"
        )
    if of_each == 1:
        raise ReportedError(f"{where} has one label for each image: leave out --factor={factor}")


def checked_targets(found, shape, where):
    """The targets of kernel machines, float32 of this shape; None if there are none.

    Raises ReportedError if they do not fit.
    """
    if found is None:
        return None
    fits = is_plain(found) and found.is_floating_point() and found.shape == shape
    if not (fits and found.isfinite().all()):
        raise ReportedError(
            f"{where} holds no targets of a kernel machine, {shape} float32 and finite, but "
            f"{description(found)}"
        )
    return found.float()


def as_images(found):
    """The same in float32."""
    return found.detach().float() if found.is_floating_point() else found


def as_labels(found):
    """Classes as int64, probabilities and one-hot rows as float32."""
    if found.dim() != 1:
        return found.detach().float()
    classes = found.to(torch.int64)
    return classes if torch.equal(classes.to(found.dtype), found) else found


def is_plain(found):
    """Tell whether this is a dense tensor of real numbers."""
    if not isinstance(found, torch.Tensor) or found.is_meta:
        return False
    return found.layout == torch.strided and not found.is_complex()


def description(found):
    """Describe the content of a file in a few words."""
    if not isinstance(found, torch.Tensor):
        return f"a {type(found).__name__}"
    kind = str(found.dtype).removeprefix("torch.")
    values = ""
    if found.numel() and is_plain(found):
        values = f", {found.double().min():.4g} to {found.double().max():.4g}"
    return f"{tuple(found.shape)} {kind}{values}"


def is_image_set(images, form):
    if images.dtype != torch.float32 or images.dim() != 4:
        return False
    if not len(images) or images.shape[1] != form.channels:
        return False
    height, width = images.shape[2:]
    return height == width >= form.im_size and bool(images.isfinite().all())


def is_label_set(labels, count, form):
    if labels.dtype == torch.float32:
        return labels.shape == (count, form.num_classes) and bool(labels.isfinite().all())
    if labels.dtype != torch.int64:
        return False
    return labels.shape == (count,) and 0 <= labels.min() <= labels.max() < form.num_classes


def is_probability(labels):
    """Tell whether rows of labels (n, classes) are probabilities."""
    return bool((labels >= 0).all() and ((labels.sum(1) - 1).abs() < 1e-3).all())


def check_set(what, images, texture, settings, form, flag):
    """Raise ReportedError if images were made for other data, or need --texture.

    `settings` are those of the data, and `form` their `preprocessing.Form`.
    """
    record = read_record(what, flag)
    if record:
        now = {key: settings[key] for key in ("dataset", "zca", "val_fraction")}
        now |= {"data": settings["digest"], "texture": texture}
        lists = record.settings.get("split")  # of an exported set, whose flags name no folder
        remedy = f"set. It was made with the lists --split={lists}" if lists else "set"
        files.check_record(saved_folder(what), record.flags | record.settings, now, remedy)
    else:
        warnings.warn(
            f"{flag}: {what} has no record of its settings. If it was not made for "
            f"--dataset={settings['dataset']} --zca={settings['zca']}, its images are on another "
            "scale, and accuracy means nothing"
        )
    if images.shape[2] != form.im_size and not texture:
        raise ReportedError(
            f"{flag}: the images of {what} have {images.shape[2]} pixels a side, not "
            f"{form.im_size}: canvases need --texture"
        )


def classes_of(labels):
    """The classes (N,) of labels: classes, or probabilities (N, classes).

    A learned label's likeliest class may be another than its image has started from. Sets of this
    project, and of MTT and its successors, are in the order of their classes, with as many images
    of each. A set is taken for one of these if most labels agree. In others, the likeliest counts.
    """
    if labels.dim() == 1:
        return labels
    count, num_classes = labels.shape
    likeliest = labels.argmax(1)
    if count % num_classes:
        return likeliest
    ordered = torch.arange(num_classes, device=labels.device).repeat_interleave(
        count // num_classes
    )
    return ordered if (ordered == likeliest).float().mean() >= 0.5 else likeliest


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
