"""Published splits: lists of training, validation and test images, as --split names them."""

from collections import Counter
from pathlib import PurePosixPath

import torch

from datasets.splits import Split
from system.process import ReportedError, first_line

TRAIN = "train"
PARTS = (TRAIN, "val", "test")


def list_files(split):
    """The paths of the three lists of --split, by part.

    split  the list of training images, such as eurosat-spatial-train.txt of torchgeo, beside which
           the others lie, or a folder that has one such list

    Raises ReportedError if there are not all three.
    """
    if split.is_dir():
        found = sorted(split.glob(f"*{TRAIN}.txt"))
        if len(found) != 1:
            raise ReportedError(
                f"--split={split} holds {len(found)} lists called *{TRAIN}.txt: name the one to use"
            )
        split = found[0]
    if not split.exists():
        raise ReportedError(f"--split={split} is not there: name a list of files, or its folder")
    head, name, tail = split.name.rpartition(TRAIN)
    if not name:
        raise ReportedError(
            f"--split={split} is not called after training images: name the list *{TRAIN}.txt, "
            "beside which *val.txt and *test.txt lie"
        )
    return {part: split.with_name(f"{head}{part}{tail}") for part in PARTS}


def read_list(path):
    """The lines of a list, without empty ones."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ReportedError(f"--split: {path} cannot be read ({first_line(error)})") from None
    return [line.strip() for line in lines if line.strip()]


def key_of(name, folders):
    """A file's name without its suffix, as lists may have other formats, and with some folders."""
    parts = PurePosixPath(name.replace("\\", "/")).with_suffix("").parts
    return "/".join(parts[-1 - folders :])


def index_by_key(names):
    """Indices of `names` by name, and by class folder and name, unless two images share one."""
    keys = [[key_of(name, folders) for name in names] for folders in (0, 1)]
    counts = Counter(keys[0]) + Counter(keys[1])
    return {key: index for of in keys for index, key in enumerate(of) if counts[key] == 1}


def listed_split(split, read):
    """The `Split` that lists make of these `Images`.

    Raises ReportedError, with a count and an example, for names that are unknown, listed twice, or
    in no list, and for a class that a list lacks.
    """
    if not read.names:
        raise ReportedError(f"--split={split}: these images have no files: leave it out")
    index = index_by_key(read.names)
    lines = {part: read_list(path) for part, path in list_files(split).items()}
    keys = {part: [key_of(line, 1) for line in of] for part, of in lines.items()}
    every = [key for of in keys.values() for key in of]
    refuse(split, [key for key in every if key not in index], "are of no image or of several")
    counts = Counter(index[key] for key in every)
    refuse(split, [read.names[i] for i, n in counts.items() if n > 1], "are listed twice")
    left_out = [name for i, name in enumerate(read.names) if i not in counts]
    refuse(split, left_out, "are in no list")
    parts = [torch.tensor(sorted(index[key] for key in keys[part])).long() for part in PARTS]
    for part, chosen in zip(PARTS, parts):
        sizes = read.labels[chosen].bincount(minlength=len(read.classes)).tolist()
        lacking = [name for name, size in zip(read.classes, sizes) if not size]
        refuse(split, lacking, f"have no images in the {part} list")
    return Split(*parts)


def refuse(split, names, fault):
    """Raise ReportedError if there are names with this fault."""
    if names:
        raise ReportedError(
            f"--split={split}: {len(names)} names {fault}, for example {names[0]}: correct it"
        )
