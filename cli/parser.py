"""The parser of both scripts: topics, layers of flags, errors of one line."""

import argparse
import shutil

from cli.types import boolean
from run.folder import COMMANDS
from system import files, process
from system.process import ReportedError


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
            metavar = getattr(type, "metavar", None)
            if metavar:
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
