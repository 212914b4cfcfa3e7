"""Saved sets of synthetic images, of this project and of other tools, checked."""

import math
import warnings
from typing import NamedTuple

import torch

from datasets.coresets import REAL_SETS
from datasets.preprocessing import PIX_INIT
from datasets.set_files import find_set, read_record, saved_folder
from system import files
from system.process import ReportedError

# What flags take besides saved sets.
OTHERS = {"--evaluate": ", ".join(REAL_SETS), "--pix_init": ", ".join(PIX_INIT)}


class SyntheticSet(NamedTuple):
    """A checked set of synthetic images."""

    images: torch.Tensor  # float32 (N, C, H, H)
    labels: torch.Tensor  # of images, or tiles: classes (n,) int64, or probabilities (n, classes)
    classes: torch.Tensor  # the same as classes
    targets: torch.Tensor | None = None  # of kernel machines, float32 (n, classes)

    def to(self, device):
        """The same on a device."""
        return SyntheticSet(*(part if part is None else part.to(device) for part in self))


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
    """The same in float32, contiguous."""
    found = found.detach().contiguous()
    return found.float() if found.is_floating_point() else found


def as_labels(found):
    """Classes as int64, probabilities and one-hot rows as float32."""
    found = found.detach().contiguous()
    if found.dim() != 1:
        return found.float()
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
