"""docs/ipc.png and docs/minutes.png: accuracy against images per class, and against time.

    python docs/make_figure.py

draws them from the tables in docs/results.md.
"""

import re
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
LINES = {  # lines of the figure, and how the rows of the table begin from which they are drawn
    "random real images": ["random real images"],
    "the same, labelled by the experts": ["the same, labelled by the experts"],
    "distilled by DM, hard labels": ["[DM](#other-objectives), hard labels"],
    "distilled along trajectories": ["the same, then the loss", "trajectory, hard labels"],
    "tiles in the same storage": ["as 40 tiles", "as 400 tiles"],
}
METHODS = ("KIP, a kernel machine", "DM", "CAFE", "DC", "DSA", "trajectory")
COLORS = {name: f"C{number}" for number, name in enumerate(METHODS)}  # of the courses
PANELS = ("one image per class", "ten images per class")
EVERYTHING = "all training images, evaluation's recipe"


def accuracies(row):
    """Images per class, and the first accuracy and spread in each cell that has one."""
    text = (DOCS / "results.md").read_text()
    cells = re.search(rf"^\| {re.escape(row)}[^|]*\|(.*)\|$", text, re.MULTILINE)[1].split("|")
    found = (re.search(r"([\d.]+)(?: ± ([\d.]+))?", cell) for cell in cells)
    return [(ipc, float(m[1]), float(m[2] or 0)) for ipc, m in zip((1, 10, 50), found) if m]


def courses(panel):
    """The methods in a table of courses: names, minutes and accuracies at its iterations."""
    text = (DOCS / "results.md").read_text()
    table = text.split("| method | minutes before")[panel + 1]
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| (0: [^|]+) \|$", table, re.MULTILINE)
    for name, before, during, course in rows:
        points = [tuple(map(float, point.split(":"))) for point in course.split(",")]
        last = points[-1][0]
        minutes = [float(before) + float(during) * it / last for it, _ in points]
        yield name, minutes, [accuracy for _, accuracy in points]


def draw_minutes():
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for panel, axis in enumerate(figure.subplots(1, 2)):
        for name, minutes, accuracies in courses(panel):
            color = COLORS[name]
            axis.plot(minutes, accuracies, marker="o", markersize=4, label=name, color=color)
        axis.set(xlabel="minutes of one core, experts included", title=PANELS[panel])
        axis.set(ylabel="test accuracy, %", ylim=(0, 70), xlim=(0, None))
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small", loc="lower right")
    figure.savefig(DOCS / "minutes.png", dpi=110)


def draw_images_per_class():
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
    draw_images_per_class()
    draw_minutes()
