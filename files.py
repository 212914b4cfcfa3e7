"""Faults that are reported, and files that are whole: written in one step, locked, cached."""

import hashlib
import json
import os
import shutil
import warnings
from contextlib import contextmanager, suppress

import filelock
import torch

TEMPORARY = ".eurosat-mtt.tmp"  # how the names of unfinished files and folders end: never those of others


class ReportedError(Exception):
    """A fault that the user can mend. `run_script` prints it as one line and exits with 2."""


def is_out_of_memory(error):
    """Whether an exception says that there is not enough memory, of a GPU or of the machine."""
    said = any(part in str(error) for part in ("can't allocate memory", "out of memory"))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and said)


def first_line(error):
    """An exception's message in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def write_whole(path, write):
    """Write a file whole or not at all: `write(file)` to a temporary one, flush it, then rename it.

    Raises OSError with the path. What a killed process leaves of it, `locked` removes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a disk is full
        if is_out_of_memory(error):
            raise
        raise OSError(f"{path} cannot be written ({first_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder, name=".lock", wait=True, reader=False):
    """Hold a lock in `folder`, so that one process at a time is in this block. Yields False where, without `wait`,
    another process has it.

    A process gives its locks back however it dies. What it left half-written in the folder is removed by the next one
    that takes the lock called `.lock`. A `reader` needs none where it cannot write, and so cannot be disturbed.
    """
    is_new = not folder.exists()
    try:
        lock = take_lock(folder / name, wait)
    except OSError as error:
        if not reader:
            raise OSError(f"{folder} cannot be written ({first_line(error)})") from None
        lock = None
    if not lock:
        yield reader
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


def remove_leftovers(folder):
    """Remove what dead processes of this project have left in a folder: temporary files and folders, and locks."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError):
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    for path in folder.glob(".expert_*.lock"):
        with suppress(filelock.Timeout, OSError), filelock.FileLock(path, timeout=0):
            path.unlink()


def take_lock(path, wait):
    """The acquired lock on `path`; None where another process has it and this one shall not `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=5 if wait else 0)
    except filelock.Timeout:
        if not wait:
            return None
        print(f"waiting for another process that is at work in {path.parent}", flush=True)
        lock.acquire()
    return lock


def write_json(path, content):
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path, **kinds):
    """The entries `kinds` (key=type) of a JSON object in a file. Raises ValueError where they are not there."""
    content = json.loads(path.read_text())
    for key, kind in kinds.items():
        if not (isinstance(content, dict) and isinstance(content.get(key), kind)):
            raise ValueError(f"it has no {key!r} of type {kind.__name__}")
    return {key: content[key] for key in kinds}


def check_record(path, record, settings, remedy="--buffer_path"):
    """Raise ReportedError, naming what differs, where a file's record disagrees with `settings` (a dictionary)."""
    different = ", ".join(f"{key}={record.get(key)!r} (here {value!r})"
                          for key, value in settings.items() if record.get(key) != value)
    if different:
        raise ReportedError(f"{path} was made with other settings: {different}. Use the same, or another {remedy}")


def read_cache(path, *keys):
    """The entries `keys` that `write_cache` wrote, tensors mapped into memory; None where there is no such file."""
    try:
        content = dict(torch.load(path, mmap=True, weights_only=True))
        return {key: content[key] for key in keys}
    except FileNotFoundError:
        return None
    except Exception as error:  # a foreign or damaged file raises whatever its bytes happen to trigger
        warnings.warn(f"{path} cannot be read ({first_line(error)}); it is made anew")
        return None


def write_cache(path, content):
    """Write a dictionary of tensors and strings, which takes time to make. Where that fails, warn and go on."""
    try:
        write_whole(path, lambda file: torch.save(content, file))
    except OSError as error:
        warnings.warn(f"{first_line(error)}: it will be made again next time")


def checksum(file):
    """SHA-256, as a hex string, of a file opened for reading."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()
