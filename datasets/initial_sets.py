"""Initial synthetic images of a run, by --pix_init: real images, noise, or a saved set."""

import hashlib

from datasets import saved_sets, set_files
from datasets.preprocessing import PIX_INIT
from system import files
from system.process import ReportedError

FLAG = "--pix_init"


def pix_init(text):
    """A value of --pix_init: one of PIX_INIT, or the path of a saved set."""
    return text if text in PIX_INIT else files.expanded(text)


def has_soft_labels(pix_init):
    """Tell whether --pix_init is a saved set with a row of labels for each image or tile."""
    if pix_init in PIX_INIT:
        return False
    labels = set_files.find_set(pix_init, FLAG).labels
    return saved_sets.is_plain(labels) and labels.dim() == 2


def initial_set(pix_init, layout, texture, data, generator):
    """The initial `SyntheticSet` of a run, images (K, C, S, S), and what --pix_init stands for.

    Raises ReportedError if a saved set does not have this `preprocessing.Layout`, or was made for
    other data.
    """
    if pix_init in PIX_INIT:
        images, classes = PIX_INIT[pix_init](data, layout, generator)
        return saved_sets.SyntheticSet(images, classes, classes), pix_init
    loaded = saved_sets.load_set(pix_init, data.form, layout.factor, FLAG)
    images = loaded.images
    saved_sets.check_set(pix_init, images, texture, data.settings, data.form, FLAG)
    shape = layout.shape(data.form)
    if images.shape != shape:
        raise ReportedError(
            f"{FLAG}: {pix_init} holds images {tuple(images.shape)}, not {shape}: change "
            "--ipc, or with --texture --canvas_size"
        )
    digest = hashlib.sha256(images.numpy())
    digest.update(loaded.labels.numpy())
    return loaded, f"set {digest.hexdigest()[:16]}"
