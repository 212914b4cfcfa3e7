"""The tables of all flags in docs/hyperparameters.md, made from the parsers.

    python docs/make_flags.py

writes them between the page's two marks; a test compares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distillation  # found through the line above
import expert_trajectories

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hyperparameters.md"
BEGIN, END = "<!-- made by docs/make_flags.py -->\n", "<!-- end -->\n"


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


def page():
    """The page with its tables up to date."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page())
