"""The command line of both scripts: types of arguments, the parser, and the presets."""

import argparse
import math
import shutil

from datasets.bands import ALL, RGB
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
    """The full name of a network."""
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
    name = text.strip().upper()
    number = name.removeprefix("B").lstrip("0")
    if not name.startswith("B") or not number.removesuffix("A").isdigit():
        return text.strip()
    return f"B{number}" if len(number) > 1 else f"B0{number}"


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

    def __init__(self, docstring):
        super().__init__(
            description=docstring and docstring.splitlines()[0],  # python -OO leaves none
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
        text = process.one_line(f"{self.prog}: error: {message} (see {self.prog} --help)")
        self.exit(2, f"{text}\n")


# --------------------------------------------------------------------------------------------------
# Presets: docs/hyperparameters.md says where each comes from, and what it reached


# MTT's experts see all training images, and its best iteration is chosen on the test set.
MTT_EXPERTS = {"num_experts": 100, "train_epochs": 50, "batch_train": 256, "lr_teacher": 0.01}
MTT_RULE = {"val_fraction": 0.0}
CIFAR10 = {"dataset": "CIFAR10"} | MTT_RULE
CIFAR100 = {"dataset": "CIFAR100"} | MTT_RULE
TINY = {"dataset": "ImageFolder", "im_size": 64, "model": "ConvNetD4"} | MTT_RULE
ZCA = {"zca": True}
MTT_FLAGS = ("ipc", "syn_steps", "expert_epochs", "max_start_epoch", "lr_img", "lr_lr")
MTT_FLAGS += ("lr_teacher", "batch_syn")
MTT_TABLE = {  # for both scripts, and values of MTT_FLAGS
    "cifar10-1": (CIFAR10 | ZCA, (1, 50, 2, 2, 100.0, 1e-7, 0.01)),
    "cifar10-10": (CIFAR10 | ZCA, (10, 30, 2, 20, 100.0, 1e-5, 0.001)),
    "cifar10-50": (CIFAR10, (50, 30, 2, 40, 1000.0, 1e-5, 0.001)),
    "cifar100-1": (CIFAR100 | ZCA, (1, 20, 3, 20, 1000.0, 1e-5, 0.01)),
    "cifar100-10": (CIFAR100, (10, 20, 2, 20, 1000.0, 1e-5, 0.01)),
    "cifar100-50": (CIFAR100 | ZCA, (50, 80, 2, 40, 1000.0, 1e-5, 0.01, 125)),
    "tiny-1": (TINY, (1, 10, 2, 10, 10000.0, 1e-4, 0.01)),
    "tiny-10": (TINY, (10, 20, 2, 40, 10000.0, 1e-4, 0.01, 200)),
    "tiny-50": (TINY, (50, 20, 2, 40, 10000.0, 1e-4, 0.01, 300)),
}

EUROSAT = {"dataset": "EuroSAT", "model": "ConvNetW32"}
EUROSAT_EXPERTS = {"num_experts": 8, "train_epochs": 12, "batch_train": 128, "lr_teacher": 0.01}
EUROSAT_RECIPE = {
    "syn_steps": 40,
    "mom_syn": 0.9,
    "expert_epochs": 2,
    "max_start_epoch": 2,
    "labels": "learned",
    "optimizer_img": "adam",
    "lr_img": 0.02,
    "optimizer_lr": "log_adam",
    "lr_teacher": 0.004,
    "ema": 0.99,
    "eval_it": 300,
}
EUROSAT_LOSS = {  # continues a set of `eurosat-1`: --pix_init=RUN
    "objective": "loss",
    "syn_steps": 30,
    "total_steps": 150,
    "mom_syn": 0.9,
    "labels": "learned",
    "lr_labels": 1.0,
    "optimizer_img": "adam",
    "lr_img": 0.005,
    "optimizer_lr": "log_adam",
    "lr_lr": 0.005,
    "ema": 0.98,
}
EUROSAT_HARD = {"expert_epochs": 2, "lr_img": 10000.0, "lr_lr": 1e-5, "lr_teacher": 0.02}
EUROSAT_OTHERS = {  # other objectives: iterations at 1 and at 10 images per class, and more flags
    "dc": (300, 300, {"eval_it": 100}),
    "dsa": (300, 300, {"eval_it": 100}),
    "dm": (300, 300, {"eval_it": 150}),
    "cafe": (300, 300, {"eval_it": 100}),
    "kip": (1500, 1500, {"eval_it": 300, "eval_mode": "K"}),
}
EUROSAT_TABLE = {
    "eurosat-1": {"ipc": 1, "Iteration": 1500} | EUROSAT_RECIPE,
    "eurosat-1-loss": {"ipc": 1, "Iteration": 300} | EUROSAT_LOSS,
    "eurosat-10": {"ipc": 10, "syn_steps": 20, "max_start_epoch": 4} | EUROSAT_HARD,
    "eurosat-50": {"ipc": 50, "syn_steps": 20, "max_start_epoch": 5, "batch_syn": 100}
    | EUROSAT_HARD,
}
for objective, (at_1, at_10, more) in EUROSAT_OTHERS.items():
    for ipc, iterations in ((1, at_1), (10, at_10)):
        own = {"objective": objective, "ipc": ipc, "Iteration": iterations}
        EUROSAT_TABLE[f"eurosat-{ipc}-{objective}"] = own | more
PRESETS = {
    name: {"experts": data | MTT_EXPERTS, "distillation": data | dict(zip(MTT_FLAGS, values))}
    for name, (data, values) in MTT_TABLE.items()
} | {
    name: {"experts": EUROSAT | EUROSAT_EXPERTS, "distillation": EUROSAT | flags}
    for name, flags in EUROSAT_TABLE.items()
}


def preset_flags(name, script):
    """Print and return a preset's flags (None: none) for "experts" or "distillation"."""
    if name is None:
        return {}
    flags = PRESETS[name][script]
    words = " ".join(f"--{key}={value}" for key, value in flags.items())
    print(f"--preset={name}: {words}", flush=True)
    return flags
