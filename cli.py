"""The command line of both scripts: types of arguments, the parser, and the presets."""

import argparse
import math
import os
import shutil
from pathlib import Path

from datasets.by_name import DATASETS
from networks import ALIASES
from run.folder import COMMANDS
from system import files, process
from system.process import ReportedError
from utils import AUGMENTATIONS

# --------------------------------------------------------------------------------------------------
# Types of arguments


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


def folder_path(text):
    """A folder's path with `~` expanded, which shells leave alone after `--flag=`."""
    return Path(os.path.expanduser(text))  # pathlib's version raises an error for an unknown user


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


def choice(names):
    """An argument type that takes one of `names`."""

    def parse(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown: choose from {', '.join(names)}")
        return text

    parse.metavar = "|".join(names) if len(names) <= 4 else None
    return parse


def dataset(text):
    """The name of a data set."""
    if text not in DATASETS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is unknown: choose from {', '.join(DATASETS)}; ImageFolder reads any folder "
            "of class folders (Tiny ImageNet: --preset=tiny-1)"
        )
    return text


def model(text):
    """The full name of a network."""
    return ALIASES.get(text, text)


def strategy(text):
    """A DSA strategy: names of `AUGMENTATIONS`, joined by underscores."""
    unknown = [group for group in text.split("_") if group not in AUGMENTATIONS]
    if unknown:
        known = "_".join(AUGMENTATIONS)
        raise argparse.ArgumentTypeError(
            f"unknown group {unknown[0]!r}: join some of {known} by underscores"
        )
    return text


# --------------------------------------------------------------------------------------------------
# The parser


class HelpFormatter(argparse.HelpFormatter):
    """Wide enough that most flags take one line."""

    def __init__(self, prog):
        width = min(120, shutil.get_terminal_size((100, 24)).columns)
        super().__init__(prog, max_help_position=34, width=width)


class Parser(argparse.ArgumentParser):
    """argparse with topics, layers of flags, no abbreviations, and one-line errors.

    `given` parses the command line once, and returns only the flags on it. `complete` lays them
    over other layers, such as the flags of a preset or of a saved run, and over the defaults.
    """

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            usage="%(prog)s [flags]",
            argument_default=argparse.SUPPRESS,
        )
        self.add_argument("--version", action="version", version=process.VERSION)
        self.topics = {}
        self.types = {}
        self.defaults = {}

    def topic(self, title):
        """A function that adds a flag under this heading of the help."""
        if title not in self.topics:
            self.topics[title] = self.add_argument_group(title)
        group = self.topics[title]

        def add(flag, *, help, default=None, type=str, **keywords):
            name = flag.removeprefix("--")
            self.types[name] = type
            self.defaults[name] = default
            if default is not None:
                help += f" (default: {default})"
            if type is boolean:
                keywords |= {"nargs": "?", "const": True, "metavar": "BOOL"}
            if metavar := getattr(type, "metavar", None):
                keywords["metavar"] = metavar
            group.add_argument(flag, type=type, help=help, **keywords)

        return add

    def given(self):
        """The flags on the command line, a dictionary."""
        return vars(self.parse_args())

    def complete(self, *layers):
        """All flags as a namespace. Layers are dictionaries, and later ones win."""
        values = dict(self.defaults)
        for layer in layers:
            values |= layer
        return argparse.Namespace(**values)

    def checked(self, flags, source):
        """Flags from a file, converted as on the command line.

        Raises ReportedError, naming the file `source`, for flags that the command line would
        reject, and for COMMANDS, which no run records.
        """
        values = {}
        for name, value in flags.items():
            try:
                if name in COMMANDS:
                    raise ValueError("no run records it")
                is_default = value is None and self.defaults[name] is None
                values[name] = None if is_default else self.types[name](str(value))
            except (LookupError, ValueError, argparse.ArgumentTypeError) as error:
                raise ReportedError(f"{source} is damaged (flag {name!r}: {error})") from None
        return values

    def recorded(self, folder):
        """The flags of the run in a folder; none if there is no run, as beside MTT's images."""
        record = files.read_run(folder)
        return self.checked(record.flags, folder / files.RUN_RECORD) if record else {}

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


# --------------------------------------------------------------------------------------------------
# Presets: docs/hyperparameters.md says where each comes from, and what it reached


MTT_EXPERTS = {"num_experts": 100, "train_epochs": 50, "batch_train": 256, "lr_teacher": 0.01}
EUROSAT_EXPERTS = {"num_experts": 16, "train_epochs": 12, "batch_train": 128, "lr_teacher": 0.01}

# MTT's experts see all training images, and its best iteration is chosen on the test set.
MTT_RULE = {"val_fraction": 0.0}
CIFAR10 = {"dataset": "CIFAR10"} | MTT_RULE
CIFAR100 = {"dataset": "CIFAR100"} | MTT_RULE
TINY = {"dataset": "ImageFolder", "im_size": 64, "model": "ConvNetD4"} | MTT_RULE
EUROSAT = {"dataset": "EuroSAT", "model": "ConvNetW32"}
ZCA = {"zca": True}

FLAGS = ("ipc", "syn_steps", "expert_epochs", "max_start_epoch", "lr_img", "lr_lr", "lr_teacher")
FLAGS += ("batch_syn", "labels")
TABLE = {  # for both scripts, for experts, for distillation: values of FLAGS, None: default
    "cifar10-1": (CIFAR10 | ZCA, MTT_EXPERTS, (1, 50, 2, 2, 100.0, 1e-7, 0.01)),
    "cifar10-10": (CIFAR10 | ZCA, MTT_EXPERTS, (10, 30, 2, 20, 100.0, 1e-5, 0.001)),
    "cifar10-50": (CIFAR10, MTT_EXPERTS, (50, 30, 2, 40, 1000.0, 1e-5, 0.001)),
    "cifar100-1": (CIFAR100 | ZCA, MTT_EXPERTS, (1, 20, 3, 20, 1000.0, 1e-5, 0.01)),
    "cifar100-10": (CIFAR100, MTT_EXPERTS, (10, 20, 2, 20, 1000.0, 1e-5, 0.01)),
    "cifar100-50": (CIFAR100 | ZCA, MTT_EXPERTS, (50, 80, 2, 40, 1000.0, 1e-5, 0.01, 125)),
    "eurosat-1": (EUROSAT, EUROSAT_EXPERTS, (1, 40, 2, 2, 10000.0, 3e-6, 0.02, None, "learned")),
    "eurosat-10": (EUROSAT, EUROSAT_EXPERTS, (10, 20, 2, 4, 10000.0, 1e-5, 0.02)),
    "eurosat-50": (EUROSAT, EUROSAT_EXPERTS, (50, 20, 2, 5, 10000.0, 1e-5, 0.02, 100)),
    "tiny-1": (TINY, MTT_EXPERTS, (1, 10, 2, 10, 10000.0, 1e-4, 0.01)),
    "tiny-10": (TINY, MTT_EXPERTS, (10, 20, 2, 40, 10000.0, 1e-4, 0.01, 200)),
    "tiny-50": (TINY, MTT_EXPERTS, (50, 20, 2, 40, 10000.0, 1e-4, 0.01, 300)),
}
PRESETS = {
    name: {
        "experts": data | experts,
        "distillation": data | {k: v for k, v in zip(FLAGS, values) if v is not None},
    }
    for name, (data, experts, values) in TABLE.items()
}


def preset_flags(name, script):
    """Print and return a preset's flags (None: none) for "experts" or "distillation"."""
    if name is None:
        return {}
    flags = PRESETS[name][script]
    words = " ".join(f"--{key}={value}" for key, value in flags.items())
    print(f"--preset={name}: {words}", flush=True)
    return flags
