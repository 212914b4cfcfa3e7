"""torchrun's processes, connected by PyTorch's own collectives: NCCL on GPUs, else gloo."""

import atexit
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from process import RankLost, ReportedError, Stopped, first_line, stop
from ranks import Ranks

# To find each other: a process that ends before it, for a wrong flag, is not waited for any longer.
START = timedelta(seconds=60)
# In an iteration, ranks are apart by what rank 0 writes and draws, and by compilation.
ITERATION = timedelta(minutes=15)
# One may wait while others evaluate their networks or train their experts.
EVALUATION = timedelta(days=2)


class Torchrun(Ranks):
    """One of several processes, each of which runs the whole script on its share of the work."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend, timeout=START)
        except (dist.DistError, RuntimeError) as error:
            raise ReportedError(
                f"the processes do not find each other: {first_line(error)}"
            ) from None
        self.busy = dist.new_group(backend=backend, timeout=ITERATION)
        self.patient = dist.new_group(backend="gloo", timeout=EVALUATION)
        atexit.register(dist.destroy_process_group)

    def mean(self, tensors):
        packed = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one collective for all
        self.attempt(dist.all_reduce, packed, group=self.busy)
        packed /= self.size
        means = packed.split([tensor.numel() for tensor in tensors])
        return [mean.view(tensor.shape) for mean, tensor in zip(means, tensors)]

    def gather(self, item):
        items = [None] * self.size
        self.attempt(dist.all_gather_object, items, item, group=self.patient)
        return items

    def from_first(self, item):
        items = [item]
        self.attempt(dist.broadcast_object_list, items, group=self.patient)
        return items[0]

    def attempt(self, collective, *args, group):
        """Call a collective of PyTorch. Raises RankLost if another rank has gone."""
        try:
            collective(*args, group=group)
        except RuntimeError as error:
            is_lost = isinstance(error, dist.DistError) or "onnection" in str(error)
            if not is_lost or isinstance(error, torch.OutOfMemoryError):
                raise
            cause = f" ({first_line(error)})" if isinstance(error, dist.DistError) else ""
            raise RankLost(f"another process of this run has ended{cause}") from None

    def check(self):
        # A rank that stops alone would leave the others waiting for it.
        flag = torch.tensor(float(stop.signal is not None))
        self.attempt(dist.all_reduce, flag, group=self.busy)
        if flag:
            raise Stopped(stop.signal or signal.SIGTERM, "")

    def print(self, text):
        print(text, file=sys.__stdout__, flush=True)
