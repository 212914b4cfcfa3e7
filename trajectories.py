"""Trajectory files, and the experts in them."""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace

import torch

import files
from files import ReportedError, first_line

# ---------------------------------------------------------------------------------------------------------------------
# Trajectory files


def expert_folder(buffer_path, dataset, zca, model):
    """Where the trajectory files of these experts lie, as in MTT."""
    return buffer_path / (dataset if zca else f"{dataset}_NO_ZCA") / model


def expert_files(folder):
    """The trajectory files in `folder`, none or more, in the order of their numbers."""
    numbers = (path.stem.removeprefix("replay_buffer_") for path in folder.glob("replay_buffer_*.pt"))
    return [folder / f"replay_buffer_{number}.pt" for number in sorted(int(n) for n in numbers if n.isdecimal())]


def add_expert(path, trajectory, expert, record):
    """Add an expert at the end of a trajectory file, where the record says `expert` of it. To be called `locked`.

    The file is what MTT writes (list of experts, of snapshots, of tensors). Beside it a JSON file has `record`
    (settings and training), one entry per expert, and in "files" the bytes, checksum and number of experts of the file
    as it was and as it will be. So the two agree whenever the process is killed.
    """
    trajectories, old = read_trajectories(path) if path.exists() else ([], {"experts": [], "files": []})
    trajectories, experts = [*trajectories, trajectory], [*old["experts"], expert]

    def write(file):
        torch.save(trajectories, file)
        now = {"bytes": file.tell(), "sha256": files.checksum(file), "experts": len(experts)}
        files.write_json(path.with_suffix(".json"), record | {"files": [*old["files"], now], "experts": experts})

    files.write_whole(path, write)


class DamagedFile(ReportedError):
    """A trajectory file, or its record, that cannot be used."""


REMEDY = "remove it and its .json, run expert_trajectories.py again"


def read_trajectories(path):
    """A trajectory file and its record, None where there is none (MTT's own files); both verified by the checksum.

    The file is mapped into memory: experts' snapshots cost no memory until they are used.
    """
    record = read_record(path)
    if record:
        with open(path, "rb") as file:
            found = files.checksum(file)
        if found != record["files"][0]["sha256"]:
            if read_record(path) != record:  # replaced in between, where this reader cannot hold a lock
                return read_trajectories(path)
            raise DamagedFile(f"{path} is damaged, its checksum is not the recorded one: {REMEDY}")
    try:
        level = [trajectories := torch.load(path, mmap=True, map_location="cpu", weights_only=True)]
        for kind in (list, list, list, torch.Tensor):  # all experts, one, a snapshot, a tensor of it
            if not all(isinstance(part, kind) and len(part) for part in level):
                raise TypeError("not a list of experts, of snapshots, of tensors")
            level = [part for parts in level for part in parts] if kind is list else level
    except Exception as error:  # torch.load raises whatever the file's bytes happen to trigger
        raise DamagedFile(f"{path} is no trajectory file ({first_line(error)}): {REMEDY}") from None
    if record and len(record["experts"]) != len(trajectories):
        raise DamagedFile(f"{path} holds {len(trajectories)} experts, its record {len(record['experts'])}: {REMEDY}")
    return trajectories, record


def read_record(path):
    """The record beside a trajectory file, of the experts that are in the file now; None where there is no record.

    It goes by the file's size, and leaves its content alone.
    """
    known = path.with_suffix(".json")
    try:
        record = files.read_json(known, settings=dict, training=dict, files=list, experts=list)
        for expert in record["experts"]:
            if not (isinstance(expert["seed"], int) and expert["loss"] and expert["test_accuracy"][-1] >= 0):
                raise ValueError("an expert without seed or curves")
        size = path.stat().st_size
        present = [version for version in record["files"] if version["bytes"] == size and version["sha256"]]
        experts = record["experts"][:present[0]["experts"]] if present else []
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError) as error:
        raise DamagedFile(f"{known} is damaged ({type(error).__name__}: {first_line(error)}): {REMEDY}") from None
    if not present:
        raise DamagedFile(f"{path} is damaged, it has {size} bytes, which is not what is recorded: {REMEDY}")
    return record | {"files": present, "experts": experts}


# ---------------------------------------------------------------------------------------------------------------------
# Experts


@dataclass(frozen=True)
class Expert:
    trajectory: list  # of snapshots, of tensors
    name: str  # for messages
    entry: dict | None  # of the record, None for MTT's own


@dataclass(frozen=True)
class Experts:
    members: list  # of Expert
    records: dict  # of each trajectory file, None for MTT's own

    @property
    def epochs(self):
        """That every expert has at least."""
        return min(len(expert.trajectory) for expert in self.members) - 1

    @property
    def test_accuracies(self):
        """Of each expert after its last epoch, as far as it is recorded."""
        return [expert.entry["test_accuracy"][-1] for expert in self.members if expert.entry]

    def check_settings(self, settings):
        """Raise ReportedError where experts were made with other `settings`; warn where nothing is recorded."""
        for path, record in self.records.items():
            if record is None:
                warnings.warn(f"{path} has no record of its settings: whether its preprocessing fits cannot be checked")
            else:
                files.check_record(path, record["settings"], settings)

    def digest(self):
        """What tells one set of experts from another: a hash of settings, losses, and of where the first one ends.

        Of MTT's experts, which have no record, of where each of them ends.
        """
        known = [len(self.members), *(expert.entry and expert.entry["loss"] for expert in self.members)]
        known += [[record["settings"], record["training"]] for record in self.records.values() if record]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
        for expert in [self.members[0], *(expert for expert in self.members if not expert.entry)]:
            digest.update(flat(expert.trajectory[-1]).numpy())
        return digest.hexdigest()[:16]

    def check_epochs(self, max_start_epoch, expert_epochs):
        """Raise ReportedError where the last segment, from T⁺ − 1 to T⁺ − 1 + M, ends after the experts do."""
        if max_start_epoch - 1 + expert_epochs > self.epochs:
            raise ReportedError(
                f"--max_start_epoch={max_start_epoch} and --expert_epochs={expert_epochs} need experts of "
                f"{max_start_epoch - 1 + expert_epochs} epochs; these have {self.epochs}: lower one of them, "
                "or train experts with more --train_epochs")

    def check_segments(self, max_start_epoch, length, skip_damaged):
        """The same without damaged experts: those that have a segment with a value that is not finite, or without
        distance (as MTT's own when trained on a CPU), where nothing is learned and the loss would divide by zero.

        Raises ReportedError for them unless `skip_damaged`.
        """
        whole = []
        for expert in self.members:
            snapshots = [flat(snapshot) for snapshot in expert.trajectory[:max_start_epoch + length]]
            faults = [f"is not finite at epoch {t}" for t, p in enumerate(snapshots) if not p.isfinite().all()]
            faults += [f"is the same at epochs {t} and {t + length}" for t in range(max_start_epoch)
                       if torch.equal(snapshots[t], snapshots[t + length])]
            if faults:
                skip_or_raise(DamagedFile(f"{expert.name} {faults[0]}: {REMEDY}"), skip_damaged)
            else:
                whole.append(expert)
        return replace(self, members=some(whole))

    def on_device(self, snapshots, device):
        """The same with each expert's first `snapshots` on the device."""
        return replace(self, members=[
            replace(expert, trajectory=[[p.to(device) for p in snapshot] for snapshot in expert.trajectory[:snapshots]])
            for expert in self.members])

    def segment(self, expert, epoch, length, device):
        """θ*_t and θ*_{t+M}, flat (P,), of an expert, t = `epoch`, M = `length`."""
        return [flat(self.members[expert].trajectory[t]).to(device) for t in (epoch, epoch + length)]


def flat(snapshot):
    """A snapshot's parameters as one vector (P,)."""
    return torch.cat([p.reshape(-1) for p in snapshot])


def skip_or_raise(error, skip_damaged):
    if not skip_damaged:
        raise ReportedError(f"{error}, or go on without it by --skip_damaged")
    warnings.warn(f"{error}; going on without it")


def some(experts):
    if not experts:
        raise ReportedError("no expert is left: all trajectory files are damaged")
    return experts


def load_experts(folder, shapes, max_files, max_experts, skip_damaged):
    """The experts in a folder's first `max_files` trajectory files (None: all), `max_experts` of each (None: all).

    They are memory-mapped, and come in the order of their seeds, whatever order they were trained in. Raises
    ReportedError where there is none, where one is damaged (unless `skip_damaged`), where tensors do not have the
    network's parameter `shapes`, or a record does not fit.
    """
    if not expert_files(folder):
        raise ReportedError(f"no replay_buffer_0.pt in {folder}: train experts first (expert_trajectories.py with the "
                            "same --dataset, --model, --zca and --buffer_path)")
    members, records = [], {}
    with files.locked(folder, reader=True):  # a file and its record are never seen while one of them is being replaced
        for path in expert_files(folder)[:max_files]:
            try:
                trajectories, record = read_trajectories(path)
            except DamagedFile as error:
                skip_or_raise(error, skip_damaged)
                continue
            entries = record["experts"] if record else [None] * len(trajectories)
            experts = [Expert(trajectory, f"expert {number} of {path}", entry)
                       for number, (trajectory, entry) in enumerate(zip(trajectories, entries))]
            if record:
                experts.sort(key=lambda expert: expert.entry["seed"])
            members += experts[:max_experts]
            records[path] = record
    if any([p.shape for p in snapshot] != shapes for expert in members for snapshot in expert.trajectory):
        raise ReportedError(f"{folder} holds experts of another architecture: use the --model (and --im_size) that "
                            "made them")
    return Experts(some(members), records)
