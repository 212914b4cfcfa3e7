"""The split of a data set into images for training, validation and testing."""

from dataclasses import dataclass

import numpy as np
import torch

from system.process import ReportedError

TEST_FRACTION = 0.1


@dataclass(frozen=True)
class Split:
    """Indices into a data set's images, int64."""

    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor


def split_dataset(labels, val_fraction, classes, num_test=None):
    """Split by class: TEST_FRACTION for testing, then `val_fraction` of the rest for validation.

    An official test set, the last `num_test` images, stays the test set. The split depends only on
    the labels (N,). Raises ReportedError if one of `classes` is too small to have an image in each
    part.
    """
    random = np.random.RandomState(42)  # a frozen stream: NumPy never changes it
    num_rest = len(labels) - (num_test or 0)
    sizes = labels[:num_rest].bincount(minlength=len(classes)).tolist()
    check_sizes(dict(zip(classes, sizes)), val_fraction, not num_test)
    train, val, test = [], [], [np.arange(num_rest, len(labels))]
    for label, size in enumerate(sizes):
        members = random.permutation(np.flatnonzero(labels[:num_rest].numpy() == label))
        for_train, for_val, _ = part_sizes(size, val_fraction, not num_test)
        parts = np.split(members, [for_train, for_train + for_val])
        for part, indices in zip((train, val, test), parts):
            part.append(indices)
    return Split(*(torch.from_numpy(np.sort(np.concatenate(p))) for p in (train, val, test)))


def part_sizes(size, val_fraction, tests):
    """The numbers of training, validation and, if it `tests`, test images of a class of a size."""
    for_test = round(TEST_FRACTION * size) if tests else 0
    for_val = round(val_fraction * (size - for_test))
    return size - for_test - for_val, for_val, for_test


def check_sizes(sizes, val_fraction, tests):
    """Raise ReportedError, naming them all, if classes of these sizes, by name, are too small."""

    def lacks(size, fraction):
        for_train, for_val, for_test = part_sizes(size, fraction, tests)
        return not for_train or (fraction and not for_val) or (tests and not for_test)

    small = {name: size for name, size in sizes.items() if lacks(size, val_fraction)}
    if not small:
        return
    named = ", ".join(f"{name} ({size})" for name, size in small.items())
    parts = []
    if tests:
        parts.append(f"{TEST_FRACTION:.0%} for testing")
    if val_fraction:
        parts.append(f"--val_fraction={val_fraction} for validation")
    # What helps all of them: another fraction, none, or more images.
    helpful = [f for f in (0.1, 0.2, 0.3, 0.5, 0) if not any(lacks(n, f) for n in small.values())]
    remedy = "add images, or move their folders away"
    if helpful:
        remedy += f", or give --val_fraction={helpful[0]:g}"
        remedy += " (the test set selects)" if not helpful[0] else ""
    raise ReportedError(
        f"classes with too few images to split ({' and '.join(parts)}): {named}: {remedy}"
    )
