"""Experts: their trajectory files, the segments that a student follows, and their labels."""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace

import torch

import utils
from networks import LastFeatures
from system import files
from system.process import ReportedError, first_line, is_out_of_memory

# --------------------------------------------------------------------------------------------------
# Files
#
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
    """The folder of these experts' trajectory files, as in MTT."""
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
        record = files.read_json(record_path, **kinds)
    except FileNotFoundError:
        return None
    except ValueError as error:  # the file beside it may be somebody else's, and whole
        raise DamagedFile(
            f"{record_path} is damaged, or no record of this version ({first_line(error)}): move "
            f"it away to have {path.name} read as MTT's, or use another --buffer_path"
        ) from None
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
    fault = None if record else files.foreign_damage(path)
    if fault:
        raise DamagedFile(f"{path} is damaged: {fault}: {FOREIGN_REMEDY}")
    try:
        trajectories = as_trajectories(files.load_tensors(path, mmap=True))
    except Exception as error:  # torch.load raises whatever the file's bytes trigger
        if is_out_of_memory(error):
            raise
        fault = files.load_fault(error)
        if record:  # the file is whole
            raise ReportedError(f"{path} is whole, but cannot be read ({fault})") from None
        raise DamagedFile(f"{path} is no trajectory file ({fault}): {FOREIGN_REMEDY}") from None
    return trajectories, record


LEVELS = "floating-point tensor", "list of parameters", "list of snapshots", "list of experts"


def as_trajectories(part, level=3):
    """MTT's list of experts, of snapshots, of parameters: the same in float32.

    Raises TypeError for anything else.
    """
    if level and isinstance(part, list):
        return [as_trajectories(each, level - 1) for each in part]
    if level or not (isinstance(part, torch.Tensor) and part.is_floating_point()):
        kind = getattr(part, "dtype", type(part).__name__)
        raise TypeError(f"a {LEVELS[level]} is wanted, not {kind}")
    return part.detach().float()


def flat(snapshot):
    """A snapshot's parameters as one vector (P,)."""
    return torch.cat([p.reshape(-1) for p in snapshot])


# --------------------------------------------------------------------------------------------------
# The experts of a distillation

FORWARD_BATCH = 256  # images that experts see at once


@dataclass(frozen=True)
class Expert:
    """A trajectory, and what is known about it."""

    trajectory: list  # of snapshots, of tensors
    name: str  # for messages
    record: dict | None  # None: MTT's own

    @property
    def losses(self):
        return self.record and self.record["expert"]["loss"]


@dataclass(frozen=True)
class Experts:
    """The experts that a distillation draws from."""

    members: list  # of Expert

    @classmethod
    def of_snapshot(cls, snapshot):
        """A single expert, of one snapshot."""
        return cls([Expert([snapshot], "a single snapshot", None)])

    @property
    def test_accuracies(self):
        """Each expert's accuracy after its last epoch, if recorded."""
        recorded = (expert.record for expert in self.members if expert.record)
        return [record["expert"]["test_accuracy"][-1] for record in recorded]

    def check_settings(self, settings):
        """Raise ReportedError if experts were made with other `settings`."""
        for expert in self.members:
            if expert.record:
                files.check_record(expert.name, expert.record["settings"], settings)

    def digest(self):
        """A hash that tells this set of experts from another.

        It covers settings, losses, and the last parameters of the first expert and of MTT's own.
        """
        known = [len(self.members), *(expert.losses for expert in self.members)]
        known += [[e.record["settings"], e.record["training"]] for e in self.members if e.record]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
        unrecorded = [expert for expert in self.members if not expert.record]
        for expert in [self.members[0], *unrecorded]:
            digest.update(flat(expert.trajectory[-1]).numpy())
        return digest.hexdigest()[:16]

    def check_epochs(self, max_start_epoch, expert_epochs):
        """Raise ReportedError if the last segment, T⁺ − 1 to T⁺ − 1 + M, ends too late."""
        last = max_start_epoch - 1 + expert_epochs
        short = [expert for expert in self.members if len(expert.trajectory) <= last]
        if short:
            which = "these" if len(short) == len(self.members) else short[0].name
            epochs = len(short[0].trajectory) - 1
            raise ReportedError(
                f"--max_start_epoch={max_start_epoch} and --expert_epochs={expert_epochs} need "
                f"experts of {last} epochs; {which} {'have' if which == 'these' else 'has'} "
                f"{epochs}: lower one of them, or train experts with more --train_epochs"
            )

    def check_label_epoch(self, epoch):
        """Raise ReportedError if an expert ends before this epoch; None: each expert's last."""
        last = min(len(expert.trajectory) for expert in self.members) - 1
        if epoch and epoch > last:
            raise ReportedError(
                f"--label_epoch={epoch} is beyond the experts' {last} epochs: lower it, or train "
                "experts with more --train_epochs"
            )

    def warn_of_few_steps(self, syn_steps, expert_epochs, num_train):
        """Warn if a student takes more steps than the experts that it follows, of `num_train`."""
        recorded = [expert.record["training"] for expert in self.members if expert.record]
        of_epochs = [-(-num_train // training["batch_size"]) for training in recorded]
        if not of_epochs:
            return
        steps = min(of_epochs) * expert_epochs
        if syn_steps > steps:
            warnings.warn(
                f"--syn_steps={syn_steps} takes the student beyond its experts, whose "
                f"--expert_epochs={expert_epochs} have {steps} steps: lower --syn_steps, or train "
                "experts with a smaller --batch_train; else α may become negative"
            )

    def with_whole_segments(self, max_start_epoch, length, skip_damaged):
        """The experts whose segments are whole. Raises ReportedError, unless `skip_damaged`."""
        whole = []
        for expert in self.members:
            fault = segment_fault(expert.trajectory, max_start_epoch, length)
            if fault:
                remedy = REMEDY if expert.record else FOREIGN_REMEDY
                skip_or_raise(DamagedFile(f"{expert.name} {fault}: {remedy}"), skip_damaged)
            else:
                whole.append(expert)
        return Experts(require_experts(whole))

    def on_device(self, snapshots, device):
        """The same with each expert's first `snapshots` on the device."""
        moved = []
        for expert in self.members:
            part = [[p.to(device) for p in snapshot] for snapshot in expert.trajectory[:snapshots]]
            moved.append(replace(expert, trajectory=part))
        return Experts(moved)

    @torch.no_grad()
    def logits(self, student, images, epoch=None):
        """The mean logits (B, classes) of all experts, on images (B, C, H, H).

        student  a `ReparamModule` of their network
        epoch    after which they are asked; None: each after its last. With few images, those of
                 early epochs teach more (Qin et al. 2024, arXiv 2406.10485).
        """
        asked = -1 if epoch is None else epoch
        thetas = [flat(expert.trajectory[asked]).to(images.device) for expert in self.members]
        means = []
        for x in images.split(FORWARD_BATCH):
            means.append(torch.stack([student(x, theta) for theta in thetas]).mean(0))
        logits = torch.cat(means)
        if not logits.isfinite().all():
            raise ReportedError(
                "the experts' labels are not finite: one diverged. Leave it out (--max_files), "
                "lower --label_epoch, or use --labels=hard"
            )
        return logits

    def labels(self, student, images, epoch=None):
        """The probabilities (B, classes) of these mean logits."""
        return self.logits(student, images, epoch).softmax(1)

    @torch.no_grad()
    def features(self, student, images):
        """The inputs (B, D) of the first expert's last layer, after its last epoch."""
        theta = flat(self.members[0].trajectory[-1]).to(images.device)
        last = student.once(LastFeatures)
        parts = [last(x, theta)[0] for x in images.split(FORWARD_BATCH)]
        return torch.cat(parts).float()

    def segment(self, expert, epoch, length, device):
        """θ*_t and θ*_{t+M} of an expert, each (P,), for t = `epoch` and M = `length`."""
        trajectory = self.members[expert].trajectory
        return utils.send([flat(trajectory[t]) for t in (epoch, epoch + length)], device)


def segment_fault(trajectory, max_start_epoch, length):
    """The fault of segments that start before `max_start_epoch`; None: they are whole."""
    snapshots = [flat(snapshot) for snapshot in trajectory[: max_start_epoch + length]]
    for t, theta in enumerate(snapshots):
        if not theta.isfinite().all():
            return f"is not finite at epoch {t}"
    # MTT trained on a CPU keeps views of the live weights: all snapshots are the same, and the
    # matching loss would divide by zero.
    for t in range(max_start_epoch):
        if torch.equal(snapshots[t], snapshots[t + length]):
            return f"is the same at epochs {t} and {t + length}"


def skip_or_raise(error, skip_damaged):
    if not skip_damaged:
        raise ReportedError(f"{error}, or continue without it with --skip_damaged")
    warnings.warn(f"{error}; continuing without it")


def require_experts(experts):
    if not experts:
        raise ReportedError("no expert is left: all trajectory files are damaged")
    return experts


def load_experts(folder, shapes, max_files, max_experts, skip_damaged):
    """The experts in a folder's first `max_files` files, `max_experts` of each (None: all).

    Raises ReportedError if there is none, if one is damaged (unless `skip_damaged`), or if tensors
    do not have the network's parameter `shapes`. Warns if a file has no record.
    """
    paths = expert_files(folder)
    if not paths:
        raise ReportedError(
            f"no replay_buffer_0.pt in {folder}: train experts first (expert_trajectories.py with "
            "the same --dataset, --model, --zca and --buffer_path)"
        )
    members = []
    for path in paths[:max_files]:
        try:
            trajectories, record = read_trajectories(path)
        except DamagedFile as error:
            skip_or_raise(error, skip_damaged)
            continue
        if record is None:
            warnings.warn(
                f"{path} has no record of its settings, so its preprocessing cannot be checked"
            )
        for number, trajectory in enumerate(trajectories[:max_experts]):
            name = str(path) if record else f"expert {number} of {path}"
            members.append(Expert(trajectory, name, record))
    for expert in members:
        if any([p.shape for p in snapshot] != shapes for snapshot in expert.trajectory):
            raise ReportedError(
                f"{folder} holds experts of another architecture, or with parameters in another "
                "order: use the --model, --im_size and --bands that made them, or another "
                "--buffer_path"
            )
    return Experts(require_experts(members))
