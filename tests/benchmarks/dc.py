"""The loop of DC, DSA and DM by their authors, unchanged, run and timed.

    python dc.py CHECKOUT WORK IMAGES.pt TURNS OBJECTIVE flags of the script

CHECKOUT is a copy of github.com/VICO-UoE/DatasetCondensation. Its `main.py` (DC, DSA) or
`main_DM.py` runs as it stands; replaced is only the data set, by the images and labels in
IMAGES.pt, (N, 3, H, W) and (N,), a default size of images, and what newer versions of PyTorch and
SciPy lack. It ends after TURNS iterations, for each of which it takes a turn, as bench.py says.
WORK is the folder that it runs in. Prints a JSON object: seconds of every iteration, and the peak
memory in bytes.
"""

import contextlib
import copy
import json
import os
import runpy
import sys
import time
from pathlib import Path

import mtt
import scipy.ndimage
import torch

DSA = "--dsa_strategy=color_crop_cutout_flip_scale_rotate"
SCRIPTS = {  # of an objective, and the flags that name it there
    "dc": ("main.py", ["--method=DC"]),
    "dsa": ("main.py", ["--method=DSA", DSA]),
    "dm": ("main_DM.py", [DSA]),
}


class AllTimed(Exception):
    """All iterations have been timed."""


class Clock:
    """Stands in for `get_network`, which begins an iteration, and takes the time of each."""

    def __init__(self, get_network, turns):
        self.get_network = get_network
        self.turns = turns
        self.seconds = []
        self.started = None

    def __call__(self, *args):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.started:
            self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) == self.turns:
            raise AllTimed
        mtt.take_turn()
        self.started = time.perf_counter()
        return self.get_network(*args)


def shares_if_several(augment):
    """The same augmentation, which does not copy a single image's parameters to that image.

    Their copy from the first image of a batch to all of them has become an error for one.
    """

    def apply(x, how):
        if len(x) == 1:
            how = copy.copy(how)
            how.Siamese = False
        return augment(x, how)

    return apply


def main():
    checkout, work, images_file, turns, objective, *flags = sys.argv[1:]
    sys.path[0] = checkout  # instead of this file's folder: its modules are called like ours
    sys.modules["scipy.ndimage.interpolation"] = scipy.ndimage
    os.chdir(work)

    import networks
    import utils as theirs

    channels, size, classes, names, _, _, *data = mtt.dataset(images_file)[:9]
    normalised = [0.0] * channels, [1.0] * channels
    theirs.get_dataset = lambda *_: (channels, size, classes, names, *normalised, *data)
    # Networks other than ConvNet are not told the size of images.
    networks.ConvNet.__init__.__defaults__ = (size,)
    theirs.get_network = clock = Clock(theirs.get_network, int(turns))
    for name, augments in theirs.AUGMENT_FNS.items():
        theirs.AUGMENT_FNS[name] = [shares_if_several(each) for each in augments]
    script, own_flags = SCRIPTS[objective]
    # Of its evaluations, only that of the last iteration is left, which is never reached.
    own_flags = [*own_flags, "--init=real", "--eval_mode=M", f"--Iteration={10 * int(turns)}"]
    sys.argv = [script, *own_flags, *flags]
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(AllTimed):
        runpy.run_path(str(Path(checkout) / script), run_name="__main__")
    print(json.dumps({"seconds": clock.seconds, "peak": mtt.peak_memory()}))


if __name__ == "__main__":
    main()
