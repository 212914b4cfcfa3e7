"""The machine that a script runs on: its device, its ranks and its compiler."""

from dataclasses import dataclass

import torch

from system import devices
from system.compilation import Compiler
from system.ranks import Ranks, join, local_device
from system.resources import limit_threads


@dataclass(frozen=True)
class Machine:
    """Device, ranks and compiler of a script."""

    device: torch.device
    ranks: Ranks
    compiler: Compiler

    @property
    def amp(self):
        """True if networks compute in bfloat16."""
        return self.compiler.amp

    def __str__(self):
        return devices.describe(self.device, self.amp, self.ranks.size)


def set_up(device, compile, amp):
    """The `Machine` of flags --device, --compile and --amp.

    Raises ReportedError for a device that is not there.
    """
    limit_threads()
    device = devices.check_device(local_device(device))
    ranks = join(device)
    return Machine(device, ranks, Compiler(compile, devices.check_amp(amp, device)))
