"""The processes that share a run: one, or those that torchrun has started.

torchrun's are connected by PyTorch's own collectives: NCCL on GPUs, else gloo.
"""

import atexit
import io
import os
import signal
import socket
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from system import resources
from system.process import RankLost, ReportedError, Stopped, first_line, is_distributed, stop

# To find each other: a process that ends before it, for a wrong flag, is not waited for any longer.
START = timedelta(seconds=60)
# In an iteration, ranks are apart by what rank 0 writes and draws, and by compilation.
ITERATION = timedelta(minutes=15)
# One may wait while others evaluate their networks or train their experts.
EVALUATION = timedelta(days=2)


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
        """The `item` of every rank, a list in their order: what `pack` takes."""
        return [item]

    def from_first(self, item):
        """Rank 0's `item`: what `pack` takes."""
        return item

    def check(self):
        """Raise `process.Stopped` if a signal has arrived, in all ranks at the same call."""
        stop.check()

    def print(self, text):
        """Print a line of this rank's own."""
        print(text, flush=True)


ALONE = Ranks()


class Torchrun(Ranks):
    """One of several processes, each of which runs the whole script on its share of the work."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
            spare_shared_memory()
        check_host(os.environ["MASTER_ADDR"])
        try:
            with quiet_stderr():
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
        packed = pack(item)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self.attempt(dist.all_gather, sizes, torch.tensor([len(packed)]), group=self.patient)
        longest = int(max(sizes))  # all parts of a collective have one size
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        mine = torch.nn.functional.pad(packed, (0, longest - len(packed)))
        self.attempt(dist.all_gather, parts, mine, group=self.patient)
        return [unpack(part[:size]) for part, size in zip(parts, sizes)]

    def from_first(self, item):
        packed = pack(item if self.is_first else None)
        size = torch.tensor([len(packed)])
        self.attempt(dist.broadcast, size, group=self.patient, src=0)
        if not self.is_first:
            packed = torch.zeros(int(size), dtype=torch.uint8)
        self.attempt(dist.broadcast, packed, group=self.patient, src=0)
        return unpack(packed)

    def attempt(self, collective, *args, **options):
        """Call a collective of PyTorch. Raises RankLost if another rank has gone."""
        try:
            collective(*args, **options)
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


def check_host(name):
    """Raise ReportedError if the machine of rank 0 has no address. PyTorch tries for a minute."""
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise ReportedError(
            f"MASTER_ADDR={name} cannot be found ({first_line(error)}): name the machine of rank 0"
        ) from None


@contextmanager
def quiet_stderr():
    """Drop what C++ writes to standard error: fifty lines of stack, beside the error it raises."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


SHARED_MEMORY = 2**29  # bytes; NCCL takes tens of megabytes for each pair of processes


def spare_shared_memory():
    """Have NCCL do without /dev/shm where it is small: 64 MB in a container of Docker's defaults.

    NCCL would fail in its first collective, with "unhandled system error".
    """
    if (resources.shared_memory() or 0) < SHARED_MEMORY and "NCCL_SHM_DISABLE" not in os.environ:
        os.environ["NCCL_SHM_DISABLE"] = "1"
        warnings.warn(
            "/dev/shm is small: GPUs may exchange gradients more slowly (docker --shm-size)"
        )


def pack(item):
    """Tensors, lists, dictionaries, text and numbers as bytes, a tensor.

    PyTorch's own collectives for objects unpickle whatever comes in on their port, which can run
    code. `unpack` cannot.
    """
    buffer = io.BytesIO()
    torch.save(item, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack(packed):
    """The item that `pack` was given, with tensors on the CPU."""
    buffer = io.BytesIO(packed.numpy().tobytes())
    return torch.load(buffer, map_location="cpu", weights_only=True)


def local_device(name):
    """The device that --device names for this process. With several GPUs, each rank has its own."""
    if name == "cuda" and is_distributed():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def join(device):
    """The `Ranks` that this process belongs to, which compute on devices of this kind."""
    if not is_distributed():
        return ALONE
    return Torchrun(device)
