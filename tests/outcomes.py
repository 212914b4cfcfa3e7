"""What runs leave in their folders, and whether it is the same."""

import json

import torch
from PIL import Image

import trajectories


def assert_readable(folder):
    """Every file below `folder` is whole; hidden ones are not read."""
    for path in folder.rglob("[!.]*"):
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".png", ".gif"):
            with Image.open(path) as picture:
                picture.load()


def hidden(folder):
    """Locks and temporary files below a folder."""
    return [path.name for path in folder.rglob(".*")]


# --------------------------------------------------------------------------------------------------
# Distillation, run in the folder `cwd`


def folder_of(cwd):
    return cwd / "logged_files" / "ImageFolder" / "run"


def outcome(cwd):
    """All that a run has learned: evaluations, pictures, and the tensors of every file."""
    folder = folder_of(cwd)
    record = json.loads((folder / "results.json").read_text())
    for row in record["evaluations"]:
        del row["seconds"]
    pictures = [*folder.glob("*.png"), *folder.glob("*.gif")]
    tensors = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*_*.pt")}
    return record, {path.name: path.read_bytes() for path in pictures}, tensors


def assert_same(cwd, undisturbed):
    """Two runs have the same outcome, bit for bit."""
    *ours, tensors = outcome(cwd)
    *theirs, reference = outcome(undisturbed)
    assert ours == theirs
    assert tensors.keys() == reference.keys()
    assert all(torch.equal(tensors[name], reference[name]) for name in reference)


# --------------------------------------------------------------------------------------------------
# Experts, in the folder `buffers`


def folder_with(buffers):
    return buffers / "ImageFolder_NO_ZCA" / "ConvNetW32"


def experts_by_seed(buffers):
    """Every expert in a folder, by its seed: a vector for each snapshot."""
    found = {}
    for path in trajectories.expert_files(folder_with(buffers)):
        (expert,), record = trajectories.read_trajectories(path)
        seed = record["expert"]["seed"]
        assert path.name == f"replay_buffer_{seed}.pt"
        found[seed] = [trajectories.flat(snapshot) for snapshot in expert]
    return found


def assert_same_experts(buffers, reference):
    """Two folders have the same experts, bit for bit."""
    ours, theirs = experts_by_seed(buffers), experts_by_seed(reference)
    assert ours.keys() == theirs.keys()
    for seed, expert in theirs.items():
        assert all(torch.equal(p, q) for p, q in zip(ours[seed], expert, strict=True))
