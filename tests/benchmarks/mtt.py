"""MTT's own loop, unchanged, run and timed: `python mtt.py CHECKOUT WORK IMAGES.pt flags of distill.py`.

CHECKOUT is a copy of github.com/GeorgeCazenavette/mtt-distillation. Its `distill.py` runs as it stands; replaced is
only what it reaches outside for: the data set (by the images and labels in IMAGES.pt, (N, 3, H, W) and (N,)), wandb (by
a clock), and what newer versions of SciPy and machines without CUDA lack. Of an evaluation's networks only the first
one is trained. WORK is the folder that it runs in. Prints one JSON object: seconds of every iteration and of the
evaluation, and the peak memory in bytes.
"""

import json
import os
import runpy
import sys
import time
import types
from pathlib import Path

import scipy.ndimage
import torch
from torch.utils.data import DataLoader, TensorDataset


class Clock(types.ModuleType):
    """Stands in for wandb, and takes the time at the start and at the end of each of MTT's iterations."""

    def __init__(self):
        super().__init__("wandb")
        self.run, self.config = types.SimpleNamespace(name="run"), types.SimpleNamespace()
        self.Histogram = self.Image = lambda *_: None
        self.seconds, self.started = [], 0.0

    def init(self, config, **_):
        self.config._items = vars(config)

    def log(self, values, step=None):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if "Synthetic_LR" in values:  # logged behind the evaluation, ahead of the student
            self.started = time.perf_counter()
        if "Grand_Loss" in values:
            self.seconds.append(time.perf_counter() - self.started)

    def finish(self):
        pass


def dataset(images_file):
    """What MTT's `get_dataset` returns, for images and labels from a file."""
    images, labels = torch.load(images_file, weights_only=True)
    data, classes = TensorDataset(images, labels), range(int(labels.max()) + 1)
    identity = {label: label for label in classes}
    size = tuple(images.shape[2:])
    return (
        3,
        size,
        len(classes),
        classes,
        None,
        None,
        data,
        data,
        DataLoader(data, 256),
        None,
        identity,
        identity,
    )


def peak_memory():
    """The most that this process has held at once, in bytes: of the GPU where there is one, else of main memory.

    `getrusage` would count what the parent held when it started this process, too.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def main():
    checkout, work, images_file, *flags = sys.argv[1:]
    sys.path[0] = checkout  # instead of this file's folder: MTT's modules are called like ours
    sys.modules["wandb"] = clock = Clock()
    sys.modules["scipy.ndimage.interpolation"] = scipy.ndimage
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda tensor, *_: tensor
    os.chdir(work)

    import utils as theirs  # of MTT

    theirs.get_dataset = lambda *_, **__: dataset(images_file)
    train, evaluations = theirs.evaluate_synset, []

    def evaluate_once(*args, **more):
        if not evaluations:
            start = time.perf_counter()
            evaluations.append((train(*args, **more), time.perf_counter() - start))
        return evaluations[0][0]

    theirs.evaluate_synset = evaluate_once
    sys.argv = ["distill.py", *flags]
    stdout, sys.stdout = sys.stdout, sys.stderr
    runpy.run_path(str(Path(checkout) / "distill.py"), run_name="__main__")
    sys.stdout = stdout
    print(
        json.dumps(
            {"iterations": clock.seconds, "evaluation": evaluations[0][1], "peak": peak_memory()}
        )
    )


if __name__ == "__main__":
    main()
