"""docs/ipc.png: accuracy against images per class, drawn from the table in docs/results.md.

python docs/make_figure.py
"""

import re
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
LINES = {  # lines of the figure, and how the rows of the table begin from which they are drawn
    "random real images": ["random real images"],
    "the same, labelled by the experts": ["the same, labelled by the experts"],
    "distilled": ["the same, then the loss", "trajectory, hard labels"],
}
EVERYTHING = "all training images, evaluation's recipe"


def accuracies(row):
    """Images per class, and the first accuracy and spread in each cell that has one."""
    text = (DOCS / "results.md").read_text()
    cells = re.search(rf"^\| {re.escape(row)}[^|]*\|(.*)\|$", text, re.MULTILINE)[1].split("|")
    found = (re.search(r"([\d.]+)(?: ± ([\d.]+))?", cell) for cell in cells)
    return [(ipc, float(m[1]), float(m[2] or 0)) for ipc, m in zip((1, 10, 50), found) if m]


def draw():
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    for label, rows in LINES.items():
        points = [point for row in rows for point in accuracies(row)]
        ipc, mean, spread = zip(*points)
        axis.errorbar(ipc, mean, spread, marker="o", capsize=3, label=label)
    ((_, everything, _),) = accuracies(EVERYTHING)
    axis.axhline(everything, color="grey", linestyle=":", label="all 21,870 training images")
    axis.set(xscale="log", xlabel="images per class", ylabel="test accuracy, %", ylim=(0, 100))
    axis.set_xticks([1, 10, 50], ["1", "10", "50"])
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower right")
    figure.savefig(DOCS / "ipc.png", dpi=110)


if __name__ == "__main__":
    draw()
