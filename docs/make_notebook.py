"""The notebook docs/ten_images.ipynb, made and executed.

    python docs/make_notebook.py DATA

evaluates on EuroSAT in DATA, which takes five minutes on a CPU. It needs no Jupyter: cells are
executed here, and what they print and show becomes their output. A test runs them in short.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "ten_images.ipynb"

CELLS = [  # Markdown and code, in turn
    """# Ten distilled images

One image for each class of EuroSAT, learned so that a network trained on these ten alone tells real
satellite images apart. Start Jupyter in the folder of the project, and execute the cells in order:
five minutes on a CPU.""",
    """import os
import sys

if not os.path.exists("distillation.py"):  # Jupyter starts in the notebook's own folder
    os.chdir("..")
sys.path.insert(0, os.getcwd())

SET = "results/eurosat-1"
DATA = "data"  # with EuroSAT, which is downloaded if it is not there (90 MB)
EPOCHS = 1000  # fewer for a trial""",
    """## The set

A run's folder is enough: images as networks see them, labels, the learned step size, and how real
images are normalised.""",
    """from datasets.distilled import load_distilled

images, labels, alpha, classes, mean, std = load_distilled(SET)
print("images", tuple(images.shape), "labels", tuple(labels.shape), f"α {alpha:.4f}")
print("mean", mean, "standard deviation", std)""",
    """## A look

Pixels are the images with the normalisation undone. They leave [0, 1], where real ones are, so the
picture is scaled to its own range.""",
    """import torch

from run.report import draw_grid

shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
draw_grid(images * scale + shift, classes, "results/eurosat-1", pixels=True)""",
    "Labels were learned, too. Each row is an image, and each number a percentage of its label.",
    """for name, row in zip(classes, labels):
    print(f"{name:22}", " ".join(f"{100 * share:3.0f}" for share in row.tolist()))""",
    """## A network of your own

Any module of PyTorch will do. This is a small one that is not part of the project. It trains on
nothing but the ten images, augmented anew in every step.""",
    """from torch import nn

from utils import DSA_STRATEGY, diff_augment, make_generator

torch.manual_seed(0)
layers, channels = [], images.shape[1]
for width in (32, 64, 64):
    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width)]
    layers += [nn.ReLU(), nn.AvgPool2d(2)]
    channels = width
size = images.shape[2] // 8
network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, len(classes)))

random = make_generator(0)
for rate, epochs in ((alpha, EPOCHS // 2), (alpha / 10, EPOCHS // 2)):
    sgd = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        loss = nn.functional.cross_entropy(
            network(diff_augment(images, DSA_STRATEGY, random)), labels
        )
        sgd.zero_grad()
        loss.backward()
        sgd.step()
print(f"loss on the ten images: {loss.item():.3f}")""",
    """## Real images

The test images are real, and the network has seen none.""",
    """from pathlib import Path

from datasets.by_name import Selection, read_dataset

raw = read_dataset(Selection("EuroSAT", Path(DATA), val_fraction=0.1))
x = raw.images[raw.split.test].float() / 255
y = raw.labels[raw.split.test]
with torch.no_grad():
    parts = [network((part - shift) / scale).argmax(1) for part in x.split(256)]
right = torch.cat(parts) == y
print(f"{right.float().mean():.1%} of {len(y)} test images; guessing has {1 / len(classes):.0%}")
for label, name in enumerate(classes):
    print(f"{name:22} {right[y == label].float().mean():6.1%}")""",
    """## The evaluation

The same is measured by a command, for fresh networks of the kind that the images were learned for:

    python distillation.py --evaluate results/eurosat-1 --data_path=DATA

A network of another kind is likely to want another α: `--task=transfer` searches it.""",
]


def executed(code, names):
    """The outputs of a cell: what it prints, and the picture that its last line shows."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if last:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    outputs = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        file = io.BytesIO()
        value.save(file, "png")
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    return outputs


def notebook(data):
    """The notebook, executed with the data in this folder: nbformat 4.5."""
    names, cells = {}, []
    for number, source in enumerate(CELLS):
        kind = "code" if number % 2 else "markdown"
        lines = source.splitlines(keepends=True)
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}
        if kind == "code":
            run = source.replace('DATA = "data"', f"DATA = {str(data)!r}")
            count = number // 2 + 1
            cell |= {"execution_count": count, "outputs": executed(run, names)}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}


if __name__ == "__main__":
    data = Path(sys.argv[1]).resolve()
    os.chdir(ROOT)
    start = time.monotonic()
    text = json.dumps(notebook(data), indent=1, ensure_ascii=False, sort_keys=True)
    PAGE.write_text(text + "\n")
    print(f"{PAGE}: {time.monotonic() - start:.0f} s")
