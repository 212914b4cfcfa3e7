"""MTT's own loop, unchanged, run and timed.

    python mtt.py CHECKOUT WORK IMAGES.pt flags of distill.py

CHECKOUT is a copy of github.com/GeorgeCazenavette/mtt-distillation. Its `distill.py` runs as it
stands; replaced is only what it reaches outside for: the data set (by the images and labels in
IMAGES.pt, (N, 3, H, W) and (N,)), wandb (by a clock), a default size of images, and what newer
versions of SciPy and machines without CUDA lack. Of an evaluation's networks only the first one is
trained. WORK is the folder that it runs in. Takes a turn, as bench.py says, for the evaluation and
for each iteration. Prints a JSON object: seconds of every iteration and of the evaluation, and the
peak memory in bytes.
"""

import contextlib
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
    """Stands in for wandb, and takes the time of each of MTT's iterations."""

    def __init__(self):
        super().__init__("wandb")
        self.run = types.SimpleNamespace(name="run")
        self.config = types.SimpleNamespace()
        self.Histogram = self.Image = lambda *_: None
        self.seconds = []
        self.started = 0.0

    def init(self, config, **_):
        self.config._items = vars(config)

    def log(self, values, step=None):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if "Synthetic_LR" in values:  # logged behind the evaluation, ahead of the student
            take_turn()
            self.started = time.perf_counter()
        if "Grand_Loss" in values:
            self.seconds.append(time.perf_counter() - self.started)

    def finish(self):
        pass


def take_turn():
    print(file=sys.__stdout__, flush=True)
    sys.stdin.readline()


def dataset(images_file):
    """What MTT's `get_dataset` returns, for images and labels from a file."""
    images, labels = torch.load(images_file, weights_only=True)
    data = TensorDataset(images, labels)
    size = tuple(images.shape[2:])
    classes = range(int(labels.max()) + 1)
    same = {label: label for label in classes}
    # Channels, size, classes and their names, mean and deviation; training set, test set and its
    # loader; what serves ImageNet only.
    form = (3, size, len(classes), classes, None, None)
    return (*form, data, data, DataLoader(data, 256), None, same, same)


def peak_memory():
    """The most memory that this process has held, in bytes: a GPU's where there is one.

    `getrusage` would count what the parent held when it started this process, too.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main():
    checkout, work, images_file, *flags = sys.argv[1:]
    sys.path[0] = checkout  # instead of this file's folder: MTT's modules are called like ours
    sys.modules["wandb"] = clock = Clock()
    sys.modules["scipy.ndimage.interpolation"] = scipy.ndimage
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda tensor, *_: tensor
    os.chdir(work)

    import networks
    import utils as theirs  # of MTT

    data = dataset(images_file)
    theirs.get_dataset = lambda *_, **__: data
    # MTT passes the images' size to ConvNet alone; ConvNetW32 and the others take its default.
    networks.ConvNet.__init__.__defaults__ = (data[1],)
    train = theirs.evaluate_synset
    results = []
    seconds = []

    def evaluate_once(*args, **more):
        if not results:
            take_turn()
            start = time.perf_counter()
            results.append(train(*args, **more))
            seconds.append(time.perf_counter() - start)
        return results[0]

    theirs.evaluate_synset = evaluate_once
    sys.argv = ["distill.py", *flags]
    with contextlib.redirect_stdout(sys.stderr):
        runpy.run_path(str(Path(checkout) / "distill.py"), run_name="__main__")
    times = {"iterations": clock.seconds, "evaluation": seconds[0]}
    print(json.dumps(times | {"peak": peak_memory()}))


if __name__ == "__main__":
    main()
