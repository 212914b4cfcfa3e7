"""Types of arguments, as argparse takes them: functions of the text."""

import argparse
import math

from datasets.bands import ALL, RGB
from datasets.by_name import DATASETS
from networks import ALIASES
from system import files
from utils import AUGMENTATIONS


def boolean(text):
    """MTT's booleans (`--dsa True`). argparse's `type=bool` would take "False" as true."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def number(kind, minimum, *, exclusive=False, below=math.inf):
    """An argument type: numbers from `minimum` (above it if `exclusive`) to less than `below`."""
    what = "a whole number" if kind is int else "a number"
    limit = f"{'more than' if exclusive else 'at least'} {minimum}"
    if below < math.inf:
        limit += f" and less than {below}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        in_range = minimum <= value < below  # false for NaN
        if not in_range or (exclusive and value == minimum):
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {limit}")
        return value

    return parse


count = number(int, 1, below=2**31)
positive = number(float, 0, exclusive=True, below=1e30)  # below: what float32 holds
not_negative = number(float, 0, below=1e30)
fraction = number(float, 0, below=1)
folder_path = files.expanded


def name(what, without):
    """An argument type: a name that has none of the characters `without`."""

    def parse(text):
        if text in ("", ".", "..") or any(character in text for character in without):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a valid {what}: use some characters, none of {without}"
            )
        return text

    return parse


folder_name = name("folder name in --log_dir", "/\\")
wandb_name = name("wandb name", "/\\#?%:")


def choice(names, hint=""):
    """An argument type that takes one of `names`; errors end with the `hint`."""

    def parse(text):
        if text not in names:
            known = ", ".join(names)
            raise argparse.ArgumentTypeError(f"{text!r} is unknown: choose from {known}{hint}")
        return text

    parse.metavar = "|".join(names) if len(names) <= 4 else None
    return parse


FOLDERS = "; ImageFolder reads any folder of class folders (Tiny ImageNet: --preset=tiny-1)"
dataset = choice(DATASETS, FOLDERS)


def model(text):
    """The name of a network, where it was given by an alias."""
    return ALIASES.get(text, text)


def bands(text):
    """Bands as --bands takes them: rgb, all, or names or positions joined by commas."""
    names = [band_name(part) for part in text.split(",")]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise argparse.ArgumentTypeError(f"band {repeated[0]} is named twice")
    for word in (RGB, ALL):
        if word in names and len(names) > 1:
            raise argparse.ArgumentTypeError(f"{word!r} stands for all of its bands: give it alone")
    return ",".join(names)


def band_name(text):
    """The name of a band as this project writes it: B04 for b4, B8A for B08A."""
    band = text.strip().upper()
    digits = band.removeprefix("B").lstrip("0")
    if not band.startswith("B") or not digits.removesuffix("A").isdigit():
        return text.strip()
    return f"B{digits}" if len(digits) > 1 else f"B0{digits}"


def strategy(text):
    """A DSA strategy: names of `AUGMENTATIONS`, joined by underscores."""
    unknown = [group for group in text.split("_") if group not in AUGMENTATIONS]
    if unknown:
        known = "_".join(AUGMENTATIONS)
        raise argparse.ArgumentTypeError(
            f"unknown group {unknown[0]!r}: join some of {known} by underscores"
        )
    return text
