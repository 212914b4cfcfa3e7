"""The processes that share a run: one, or those that torchrun has started (distributed.py)."""

import os

from process import is_distributed, stop


class Ranks:
    """A run in one process.

    rank  this process's number; rank 0 writes all files, and the others are silent
    size  how many processes there are
    """

    rank = 0
    size = 1

    @property
    def is_first(self):
        return self.rank == 0

    def mine(self, items):
        """This rank's share of `items`, which are divided among all ranks."""
        return items[self.rank :: self.size]

    def mean(self, tensors):
        """The mean over all ranks of each of these tensors, which have one dtype."""
        return tensors

    def gather(self, item):
        """The `item` of every rank, a list in their order."""
        return [item]

    def from_first(self, item):
        """Rank 0's `item`."""
        return item

    def check(self):
        """Raise `process.Stopped` if a signal has arrived, in all ranks at the same call."""
        stop.check()

    def print(self, text):
        """Print a line of this rank's own."""
        print(text, flush=True)


ALONE = Ranks()


def local_device(name):
    """The device that --device names for this process. With several GPUs, each rank has its own."""
    if name == "cuda" and is_distributed():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def join(device):
    """The `Ranks` that this process belongs to, which compute on devices of this kind."""
    if not is_distributed():
        return ALONE
    from distributed import Torchrun  # not loaded, and nothing of it started, without torchrun

    return Torchrun(device)
