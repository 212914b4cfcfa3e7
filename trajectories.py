"""Trajectory files: experts as they are saved, each with a record of how it was made."""

import json
import zipfile

import torch

import files
from process import ReportedError, first_line

# Expert n is `replay_buffer_{n}.pt`: a list of one trajectory, a list of snapshots, each a list of
# tensors in `parameters()` order. MTT reads it, and MTT's own files, which hold ten, are read here.
# The record beside it, which MTT's files lack, says how it was made. It is written first, so every
# file has a record, and neither ever changes. Readers therefore need no lock.

REMEDY = "remove it and its .json, run expert_trajectories.py again"
# It may be costly to replace.
FOREIGN_REMEDY = "name a --buffer_path without it, or train experts there"


class DamagedFile(ReportedError):
    """A trajectory file, or its record, that cannot be used."""


def expert_folder(buffer_path, dataset, zca, model):
    """Where the trajectory files of these experts are, as in MTT."""
    return buffer_path / (dataset if zca else f"{dataset}_NO_ZCA") / model


def expert_path(folder, number):
    return folder / f"replay_buffer_{number}.pt"


def expert_files(folder):
    """The trajectory files in `folder`, in the order of their numbers."""
    names = (path.stem.removeprefix("replay_buffer_") for path in folder.glob("replay_buffer_*.pt"))
    return [expert_path(folder, n) for n in sorted(int(name) for name in names if name.isdecimal())]


def save_expert(path, trajectory, record):
    """Write an expert's trajectory, and before it its `record` (settings, training, expert)."""

    def write(file):
        torch.save([trajectory], file)
        proof = {"bytes": file.tell(), "sha256": files.checksum(file)}
        files.write_json(path.with_suffix(".json"), record | proof)

    files.write_whole(path, write)


def read_record(path):
    """The record of a trajectory file; None if it has none, like MTT's own.

    Compares the file's size, not its content. Raises DamagedFile.
    """
    record_path = path.with_suffix(".json")
    kinds = {"settings": dict, "training": dict, "expert": dict, "bytes": int, "sha256": str}
    try:
        content = json.loads(record_path.read_text())
        if isinstance(content, dict) and isinstance(content.get("experts"), list):
            raise ReportedError(
                f"{record_path} was written by an earlier version, which kept several experts in a "
                "file: train into another --buffer_path, or move the .json away to have them read "
                "as MTT's"
            )
        if not (isinstance(content, dict) and kinds.keys() & content.keys()):
            raise ReportedError(
                f"{record_path} is no record of this project: move it away to have {path.name} "
                "read as MTT's"
            )
        record = files.read_json(record_path, **kinds)
        expert = record["expert"]
        if not (isinstance(expert["seed"], int) and expert["loss"]):
            raise ValueError("its expert has no seed or no losses")
        if not expert["test_accuracy"][-1] >= 0:
            raise ValueError("its expert has no test accuracy")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        fault = f"{type(error).__name__}: {first_line(error)}"
        raise DamagedFile(f"{record_path} is damaged ({fault}): {REMEDY}") from None
    size = path.stat().st_size
    if size != record["bytes"]:
        raise DamagedFile(
            f"{path} is damaged: it has {size} bytes, its record says {record['bytes']}: {REMEDY}"
        )
    return record


def read_trajectories(path):
    """The trajectories in a file, memory-mapped, and its record (None: MTT's own).

    Raises DamagedFile, also if the content does not have the recorded checksum.
    """
    record = read_record(path)
    if record:
        with open(path, "rb") as file:
            if files.checksum(file) != record["sha256"]:
                raise DamagedFile(
                    f"{path} is damaged: its checksum is not the recorded one: {REMEDY}"
                )
    try:
        # PyTorch's format until 1.6 cannot be mapped.
        is_mappable = zipfile.is_zipfile(path)
        found = torch.load(path, mmap=is_mappable, map_location="cpu", weights_only=True)
        trajectories = as_trajectories(found)
    except Exception as error:  # torch.load raises whatever the file's bytes trigger
        remedy = REMEDY if record else FOREIGN_REMEDY
        fault = files.load_fault(error)
        raise DamagedFile(f"{path} is no trajectory file ({fault}): {remedy}") from None
    if record and len(trajectories) != 1:
        raise DamagedFile(f"{path} holds {len(trajectories)} experts, its record one: {REMEDY}")
    return trajectories, record


def as_trajectories(found):
    """Lists of experts, snapshots and tensors, from lists or tuples. Snapshots may be dicts.

    A dict is a network's `state_dict()`, in `parameters()` order. Raises TypeError for anything
    else.
    """
    fault = TypeError(f"it holds {outline(found)}; wanted are lists of experts, snapshots, tensors")

    def parts(of, *kinds):
        if not (isinstance(of, kinds) and len(of)):
            raise fault
        return list(of.values()) if isinstance(of, dict) else list(of)

    def tensor(of):
        if not isinstance(of, torch.Tensor):
            raise fault
        is_plain = of.is_floating_point() and of.layout == torch.strided and not of.is_meta
        if not is_plain:
            raise TypeError(f"its parameters are {of.dtype} on {of.device}, {of.layout}")
        return of.detach().float()

    trajectories = []
    for expert in parts(found, list, tuple):
        snapshots = [parts(s, list, tuple, dict) for s in parts(expert, list, tuple)]
        trajectories.append([[tensor(p) for p in snapshot] for snapshot in snapshots])
    return trajectories


def outline(found):
    """How it is nested, judged by the first items: "a list of 2 lists of 3 tensors"."""
    words, level = f"a {type(found).__name__.lower()}", found
    for _ in range(5):  # a list may hold itself
        if not isinstance(level, (list, tuple, dict)):
            break
        first = next(iter(level.values() if isinstance(level, dict) else level), None)
        if first is None:
            return f"{words} of nothing"
        words, level = f"{words} of {len(level)} {type(first).__name__.lower()}s", first
    return words


def flat(snapshot):
    """A snapshot's parameters as one vector (P,)."""
    return torch.cat([p.reshape(-1) for p in snapshot])
