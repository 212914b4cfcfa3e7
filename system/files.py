"""Files that are written atomically, locked, cached, and checked against their records."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import filelock
import torch

from system.process import ReportedError, first_line, is_out_of_memory

TEMPORARY = ".eurosat-mtt.tmp"  # how the name of every unfinished file ends, and no other

# Errors of file systems that cannot sync, as some that run in user space.
WITHOUT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

# --------------------------------------------------------------------------------------------------
# Writing and reading


def expanded(path):
    """A path with `~` expanded, which shells leave alone after `--flag=`."""
    return Path(os.path.expanduser(path))  # pathlib's version raises an error for an unknown user


def write_whole(path, write):
    """Write a file atomically: `write(file)` to a temporary one, sync it, rename it.

    Raises OSError with the path. `locked` removes what a killed process leaves behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            sync(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        if is_out_of_memory(error):
            raise
        cause = first_line(error)
        if "unexpected pos" in cause:  # how torch.save says that fewer bytes were written
            free = shutil.disk_usage(path.parent).free
            cause = f"the disk or a quota is full: {free / 1e6:.1f} MB are free"
        raise OSError(f"{path} cannot be written ({cause})") from None
    finally:
        temporary.unlink(missing_ok=True)


def sync(file):
    """Have a file's content written to disk, where its file system can."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in WITHOUT_SYNC:
            raise


def check_writable(folder):
    """Raise OSError if no file can be written in a folder, which need not be there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({first_line(error)})") from None


def write_tensors(path, content):
    """`torch.save`, atomically."""
    write_whole(path, lambda file: torch.save(content, file))


def write_json(path, content):
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path, **kinds):
    """The entries `kinds` (key=type) of a JSON object. Raises ValueError if one is missing."""
    return entries(json.loads(path.read_text()), **kinds)


def entries(content, **kinds):
    """The entries `kinds` (key=type) of a dictionary. Raises ValueError if one is missing."""
    for key, kind in kinds.items():
        if not (isinstance(content, dict) and isinstance(content.get(key), kind)):
            raise ValueError(f"it has no valid {key!r}")
    return {key: content[key] for key in kinds}


def checksum(file):
    """SHA-256, as a hex string, of a file opened for reading."""
    file.seek(0)
    digest = hashlib.sha256()
    for chunk in iter(partial(file.read, 2**20), b""):
        digest.update(chunk)
    return digest.hexdigest()


def load_tensors(path, mmap=False):
    """Read what `torch.save` wrote: tensors on the CPU, lists and numbers, nothing that runs code.

    With `mmap`, tensors are mapped, where the file's format and its file system allow it.
    """
    options = {"map_location": "cpu", "weights_only": True}
    if mmap:
        with suppress(OSError, RuntimeError):
            return torch.load(path, mmap=True, **options)
    return torch.load(path, **options)


def damage(path):
    """Say how a file of `torch.save` has changed since it was written; None: it has not.

    Compares its checksums (CRC-32), which `torch.load` does not, so that a changed byte becomes a
    changed number. A gigabyte takes a second.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, EOFError):
        return "it is incomplete, or was not written by torch.save"
    return part and f"{part} does not have its checksum"


def foreign_damage(path):
    """The same of a file that may be in PyTorch's format until 1.6, which has no checksums."""
    return damage(path) if zipfile.is_zipfile(path) else None


def load_fault(error):
    """Say why `load_tensors` failed."""
    if isinstance(error, (OSError, TypeError)):
        return first_line(error)
    if "Weights only" in str(error):
        return "it holds more than tensors, lists and numbers, and that could run code"
    return "it was not written by torch.save, or is incomplete"


def read_cache(path, *keys):
    """The entries `keys` of a cache, with tensors memory-mapped; None if there is none, or no more.

    A cache that is not whole is made again.
    """
    try:
        content = dict(load_tensors(path, mmap=True))
        content = {key: content[key] for key in keys}
    except FileNotFoundError:
        return None
    except Exception as error:  # a foreign or damaged file raises whatever its bytes trigger
        warnings.warn(f"{path} cannot be read ({first_line(error)}): making it again")
        return None
    fault = damage(path)
    if fault:
        warnings.warn(f"{path} is damaged ({fault}): making it again")
        return None
    return content


def write_cache(path, content):
    """Cache tensors and strings that took time to make. If that fails, warn and continue."""
    try:
        write_tensors(path, content)
    except OSError as error:
        warnings.warn(f"{first_line(error)}: the next run has to make it again")


# --------------------------------------------------------------------------------------------------
# Locks

# Errors of file systems without locks, as NFS without its daemon, or Lustre without its option.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)


@contextmanager
def locked(folder, name=".lock", wait=True, reader=False):
    """Hold a lock in `folder`, so that one process at a time runs this block.

    Without `wait`, yields False if another process holds it. A process releases its locks however
    it dies. A `reader` needs none where it cannot write, and so cannot be disturbed. If the file
    system has no locks, warns and continues without one.
    """
    is_new = not folder.exists()
    goes_on = reader
    try:
        lock = take_lock(folder / name, wait)
    except OSError as error:
        lock = None
        if error.errno in WITHOUT_LOCKS:
            goes_on = True
            warnings.warn(
                f"the file system of {folder} has no locks ({first_line(error)}): let no other "
                "process work there until this one has ended"
            )
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        elif not reader:
            raise OSError(f"{folder} cannot be written ({first_line(error)})") from None
    if not lock:
        yield goes_on
        return
    try:
        if name == ".lock":
            remove_leftovers(folder)
        yield True
    finally:
        (folder / name).unlink(missing_ok=True)
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()  # as it was


def take_lock(path, wait):
    """The acquired lock on `path`; None if another process holds it and `wait` is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its replacement for missing locks is a file that outlives a killed process.
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=5 if wait else 0)
    except filelock.Timeout:
        if not wait:
            return None
        print(f"waiting for another process that is working in {path.parent}", flush=True)
        lock.acquire()
    return lock


def remove_leftovers(folder):
    """Remove the temporary files and the locks of this project's dead processes."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError):
            remove = shutil.rmtree if leftover.is_dir() else os.remove
            remove(leftover)
    for path in folder.glob(".expert_*.lock"):
        with (
            suppress(filelock.Timeout, OSError),
            filelock.FileLock(path, timeout=0, fallback_to_soft=False),
        ):
            path.unlink()


# --------------------------------------------------------------------------------------------------
# Records


def check_record(path, record, settings, remedy="--buffer_path"):
    """Raise ReportedError, naming each difference, if `record` disagrees with `settings`."""
    different = ", ".join(
        f"{key}={record.get(key)!r} (here {value!r})"
        for key, value in settings.items()
        if record.get(key) != value
    )
    if different:
        raise ReportedError(
            f"{path} was made with other settings: {different}. Use the same, or another {remedy}"
        )


RUN_RECORD = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder records it."""

    settings: dict  # what its result depends on
    flags: dict  # what `--resume` restores
    wandb_id: str


RECORD_KINDS = {"settings": dict, "flags": dict, "wandb_id": str}


def read_run(folder, remedy="restore it from a copy, or use another --run_name"):
    """The record of the run in `folder`; None if no run was started.

    Raises ReportedError, with the remedy, for a damaged record.
    """
    path = folder / RUN_RECORD
    try:
        return RunRecord(**read_json(path, **RECORD_KINDS))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ReportedError(f"{path} is damaged ({error}): {remedy}") from None
