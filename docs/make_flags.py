"""The tables of flags and presets in docs/hyperparameters.md, made from the code.

    python docs/make_flags.py

writes them between the page's marks; a test compares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distillation  # found through the line above
import expert_trajectories
from cli.presets import EUROSAT_OTHERS, PRESETS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hyperparameters.md"
FLAGS = "<!-- flags: made by docs/make_flags.py -->\n"
TABLES = "<!-- presets: made by docs/make_flags.py -->\n"
END = "<!-- end -->\n"


def parsers():
    """The parser of each script, by its name."""
    scripts = expert_trajectories, distillation
    return {f"{script.__name__}.py": script.make_parser() for script in scripts}


def tables():
    """A table for both scripts' flags, and one for each script's own."""
    by_script = {script: list(rows(parser)) for script, parser in parsers().items()}
    first, second = by_script.values()
    shared = [row for row in first if row in second]
    names = {row.split("`")[1] for row in shared}
    parts = {"Both scripts": shared}
    for script, of in by_script.items():
        parts[f"`{script}`"] = [row for row in of if row.split("`")[1] not in names]
    head = "| flag | meaning |\n|---|---|\n"
    return "\n".join(f"{title}:\n\n{head}{''.join(of)}" for title, of in parts.items())


def rows(parser):
    """A row of Markdown for each flag, in the order of --help."""
    for group in parser.topics.values():
        for action in group._group_actions:
            flag = action.option_strings[0]
            takes_value = action.nargs != 0
            value = f"={action.metavar or action.dest.upper()}" if takes_value else ""
            if flag == "--device":  # its default depends on the machine
                continue
            cells = f"`{flag}{value}`".replace("=BOOL", ""), action.help
            yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"


def presets(names):
    """A table of presets: a row for each flag that one of them sets, a column for each preset."""
    chosen = {name: PRESETS[name]["distillation"] for name in names}
    flags = dict.fromkeys(flag for preset in chosen.values() for flag in preset)
    lines = [["flag", *(f"`{name}`" for name in names)], ["---"] * (len(names) + 1)]
    for flag in flags:
        values = (preset.get(flag, "–") for preset in chosen.values())
        lines.append([f"`--{flag}`", *(f"{v:g}" if type(v) is float else str(v) for v in values)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def preset_tables():
    """The tables of EuroSAT's presets, of those for other objectives, and of MTT's."""
    ours = [name for name in PRESETS if name.startswith("eurosat")]
    others = [name for name in ours if name.rpartition("-")[2] in EUROSAT_OTHERS]
    groups = [name for name in ours if name not in others], others
    groups += ([name for name in PRESETS if name not in ours],)
    return "\n".join(presets(group) for group in groups)


def page():
    """The page with its tables up to date."""
    text = PAGE.read_text()
    for mark, made in ((FLAGS, tables()), (TABLES, preset_tables())):
        before, _, rest = text.partition(mark)
        text = f"{before}{mark}\n{made}\n{END}{rest.partition(END)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
