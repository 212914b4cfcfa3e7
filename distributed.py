"""torchrun's processes, connected by PyTorch's own collectives: NCCL on GPUs, else gloo."""

import atexit
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from process import Stopped, first_line, stop
from ranks import RankLost, Ranks

# A rank may wait while others evaluate their networks or train their experts. Nobody waits for one
# that has died: its connections close, and torchrun ends the others.
TIMEOUT = timedelta(days=2)


class Torchrun(Ranks):
    """One of several processes, each of which runs the whole script on its share of the work."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=TIMEOUT)
        atexit.register(dist.destroy_process_group)

    def mean(self, tensors):
        packed = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one collective for all
        self.attempt(dist.all_reduce, packed)
        packed /= self.size
        means = packed.split([tensor.numel() for tensor in tensors])
        return [mean.view(tensor.shape) for mean, tensor in zip(means, tensors)]

    def gather(self, item):
        items = [None] * self.size
        self.attempt(dist.all_gather_object, items, item)
        return items

    def from_first(self, item):
        items = [item]
        self.attempt(dist.broadcast_object_list, items)
        return items[0]

    def attempt(self, collective, *args):
        """Call a collective of PyTorch. Raises RankLost if another rank has gone."""
        try:
            collective(*args)
        except RuntimeError as error:
            raise RankLost(f"another process of this run has ended ({first_line(error)})") from None

    def check(self):
        # A rank that stops alone would leave the others waiting for it.
        flag = torch.tensor(float(stop.signal is not None))
        self.attempt(dist.all_reduce, flag)
        if flag:
            raise Stopped(stop.signal or signal.SIGTERM, "")

    def print(self, text):
        print(text, file=sys.__stdout__, flush=True)
