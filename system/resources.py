"""Cores and memory that this process may use: those of its job or container, not the machine's."""

import math
import os
import resource
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path("/")  # of the files by which Linux says so; a test has its own

# --------------------------------------------------------------------------------------------------
# Control groups, by which SLURM, Docker and Kubernetes set limits


def control_groups(controller):
    """Folders of the control groups that this process is in, by their version, its own first.

    A limit of any of them holds. Version 2 has one hierarchy for all controllers, version 1 one for
    each. Within a container, the path may be the host's: then only the container's own is here.
    """
    groups = []
    with suppress(OSError, ValueError):
        for line in (ROOT / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                places = [("sys/fs/cgroup", 2), ("sys/fs/cgroup/unified", 2)]
            elif controller in controllers.split(","):
                places = [(f"sys/fs/cgroup/{controllers}", 1), (f"sys/fs/cgroup/{controller}", 1)]
            else:
                continue
            for place, version in places:
                own = Path(path.lstrip("/"))
                folders = [ROOT / place / part for part in (own, *own.parents)]
                groups += [(folder, version) for folder in folders if folder.is_dir()]
    return groups


def number_in(path, key=None):
    """The number in a file of a control group, or that on the line of a key; None: no such number.

    "max" is none.
    """
    with suppress(OSError, ValueError, StopIteration):
        text = path.read_text()
        if key:
            text = next(line.split()[1] for line in text.splitlines() if line.split()[0] == key)
        return int(text)
    return None


# --------------------------------------------------------------------------------------------------
# Cores


def available_cores():
    """The number of cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = [len(os.sched_getaffinity(0))]
    else:
        cores = [os.cpu_count() or 1]
    for folder, version in control_groups("cpu"):
        quota, period = cpu_quota(folder, version)
        if quota and period and quota > 0:
            cores.append(math.ceil(quota / period))
    return max(1, min(cores))


def cpu_quota(folder, version):
    """The time of all cores together that a control group may use in a period; None: any."""
    if version == 1:
        return number_in(folder / "cpu.cfs_quota_us"), number_in(folder / "cpu.cfs_period_us")
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota), int(period)
    return None, None


def limit_threads():
    """Let PyTorch use no more threads than there are cores, unless OMP_NUM_THREADS says how many.

    It knows which cores it may use, but not of quotas. Threads beyond a quota wait for each other.
    """
    cores = available_cores()
    if torch.get_num_threads() > cores and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)


# --------------------------------------------------------------------------------------------------
# Memory


def peak_memory(device):
    """The peak memory of this process, in bytes: a GPU's on CUDA, else main memory.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return in_bytes("proc/self/status", "VmHWM:")


def free_memory(device):
    """The memory that is free for this process, in bytes. None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [in_bytes("proc/meminfo", "MemAvailable:")]
    free += [free_in_group(*group) for group in control_groups("memory")]
    free += [free_by_limit(resource.RLIMIT_AS, "VmSize:")]
    return min((max(0, each) for each in free if each is not None), default=None)


def free_in_group(folder, version):
    """Bytes that a control group may still allocate; None: any. Caches of files give way."""
    if version == 2:
        limits = [number_in(folder / name) for name in ("memory.max", "memory.high")]
        used = number_in(folder / "memory.current")
        cached = number_in(folder / "memory.stat", "inactive_file")
    else:
        limits = [number_in(folder / "memory.limit_in_bytes")]
        used = number_in(folder / "memory.usage_in_bytes")
        cached = number_in(folder / "memory.stat", "total_inactive_file")
    limits = [limit for limit in limits if limit is not None]
    if not limits or used is None:
        return None
    return min(limits) - used + (cached or 0)


def free_by_limit(limit, used):
    """Bytes that a limit of this process leaves, as a shell sets by ulimit; None: there is none."""
    soft, _ = resource.getrlimit(limit)
    used = in_bytes("proc/self/status", used)
    return None if soft == resource.RLIM_INFINITY or used is None else soft - used


def activation_memory(gigabytes, device):
    """The bytes of --unroll_memory, by default an eighth of what is free."""
    return (free_memory(device) or 0) / 8 if gigabytes is None else gigabytes * 1e9


def in_bytes(path, key):
    """A memory figure of a file of Linux, in bytes; None on other systems."""
    kilobytes = number_in(ROOT / path, key)
    return None if kilobytes is None else 1024 * kilobytes


def shared_memory():
    """The bytes that are free in /dev/shm; None if there is none."""
    with suppress(OSError):
        stat = os.statvfs(ROOT / "dev/shm")
        return stat.f_bavail * stat.f_frsize
    return None
