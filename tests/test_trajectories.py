"""Trajectory files: MTT's nested lists, written whole, refused when they do not fit."""

import itertools
import json
import os

import pytest
import torch

import files
import trajectories
import utils
from files import ReportedError
from networks import get_network


def test_an_expert_file_is_plain_nested_lists_in_parameter_order(buffers):
    path = buffers / "EuroSAT_NO_ZCA" / "ConvNetW32" / "replay_buffer_0.pt"
    experts = torch.load(path, weights_only=True)
    shapes = [p.shape for p in get_network("ConvNetW32", 3, 10, 64).parameters()]
    assert type(experts) is list and len(experts) == 2
    for expert in experts:
        assert type(expert) is list and len(expert) == 3 + 1
        for snapshot in expert:
            assert type(snapshot) is list and [p.shape for p in snapshot] == shapes
            assert all(type(p) is torch.Tensor and p.dtype == torch.float32 and not p.requires_grad for p in snapshot)


def test_snapshots_differ_from_epoch_to_epoch_and_experts_from_each_other(buffers):
    path = buffers / "EuroSAT_NO_ZCA" / "ConvNetW32" / "replay_buffer_0.pt"
    flat = [[torch.cat([p.flatten() for p in snapshot]) for snapshot in expert]
            for expert in torch.load(path, weights_only=True)]
    for expert in flat:
        assert all((later - earlier).norm() > 1e-3 for earlier, later in itertools.pairwise(expert))
    assert (flat[0][0] - flat[1][0]).norm() > 1


def test_the_record_beside_a_file_tells_how_it_was_made(buffers):
    record = json.loads((buffers / "EuroSAT_NO_ZCA" / "ConvNetW32" / "replay_buffer_1.json").read_text())
    assert record["settings"].items() >= {"dataset": "EuroSAT", "val_fraction": 0.1, "zca": False,
                                          "model": "ConvNetW32"}.items()
    assert record["training"].items() >= {"epochs": 3, "batch_size": 32, "lr": 0.01, "mom": 0, "l2": 0, "decay": False,
                                          "dsa": utils.DSA_STRATEGY, "seed": 0}.items()
    assert [expert["seed"] for expert in record["experts"]] == [2]
    assert all(len(record["experts"][0][curve]) == 3 for curve in ("loss", "train_accuracy", "test_accuracy"))


SETTINGS = {"settings": {"zca": False}, "training": {"lr": 0.01}}


def entry(seed):
    """What a record says of an expert."""
    return {"seed": seed, "loss": [1.0], "test_accuracy": [0.5]}


@pytest.fixture
def two_experts(tmp_path):
    """A trajectory file, and the two experts of three snapshots in it."""
    experts = [[[torch.randn(2, 3), torch.randn(4)] for _ in range(3)] for _ in range(2)]
    path = tmp_path / "deep" / "replay_buffer_0.pt"
    for seed, expert in enumerate(experts):
        trajectories.add_expert(path, expert, entry(seed), SETTINGS)
    return path, experts


def test_added_experts_and_their_record_read_back(two_experts):
    path, experts = two_experts
    assert sorted(os.listdir(path.parent)) == ["replay_buffer_0.json", "replay_buffer_0.pt"]
    read, record = trajectories.read_trajectories(path)
    assert record.items() >= SETTINGS.items() and record["experts"] == [entry(0), entry(1)]
    for trajectory in (read, torch.load(path, weights_only=True)):
        torch.testing.assert_close(trajectory, experts, rtol=0, atol=0)


def test_a_file_without_record_has_none(tmp_path):
    torch.save([[[torch.zeros(1)]]], tmp_path / "replay_buffer_0.pt")
    assert trajectories.read_record(tmp_path / "replay_buffer_0.pt") is None


def test_expert_files_are_listed_by_their_numbers(tmp_path):
    (tmp_path / "replay_buffer_0_backup.pt").touch()
    assert trajectories.expert_files(tmp_path) == trajectories.expert_files(tmp_path / "none") == []
    for number in (0, 1, 2, 10, 11):
        (tmp_path / f"replay_buffer_{number}.pt").touch()
    assert trajectories.expert_files(tmp_path) == [tmp_path / f"replay_buffer_{n}.pt" for n in (0, 1, 2, 10, 11)]


@pytest.mark.parametrize("experts_before", [0, 2])
def test_a_writer_killed_between_record_and_file_leaves_both_as_they_were(two_experts, monkeypatch, experts_before):
    path, _ = two_experts
    if not experts_before:
        path.unlink()
    new = [[torch.zeros(2, 3), torch.zeros(4)] for _ in range(3)]
    with monkeypatch.context() as patch:
        rename = os.replace
        patch.setattr(os, "replace", lambda source, target: target == path or rename(source, target))
        trajectories.add_expert(path, new, entry(2), SETTINGS)
    assert len(json.loads(path.with_suffix(".json").read_text())["experts"]) == experts_before + 1
    if experts_before:
        read, record = trajectories.read_trajectories(path)
        assert len(read) == len(record["experts"]) == experts_before
    trajectories.add_expert(path, new, entry(2), SETTINGS)
    read, record = trajectories.read_trajectories(path)
    assert [expert["seed"] for expert in record["experts"]] == [*range(experts_before), 2]
    torch.testing.assert_close(read[-1], new, rtol=0, atol=0)


def test_each_altered_byte_is_noticed(two_experts):
    path, _ = two_experts
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        with pytest.raises(trajectories.DamagedFile, match=r"replay_buffer_0\.pt is damaged, its checksum"):
            trajectories.read_trajectories(path)
    for size in (0, len(whole) - 1, len(whole) + 1):
        path.write_bytes((whole + b" ")[:size])
        with pytest.raises(trajectories.DamagedFile, match=rf"replay_buffer_0\.pt is damaged, it has {size} bytes"):
            trajectories.read_trajectories(path)
    path.write_bytes(whole)
    trajectories.read_trajectories(path)


class Foreign:
    """Anything that only unpickling code could restore."""


@pytest.mark.parametrize("content", [
    b"no tensor file at all", b"", {"images": torch.zeros(2)}, [1, 2], [Foreign()], torch.zeros(2, 2, 2, 2),
    [[torch.zeros(2)]], [], [[]]
], ids=["text", "empty", "dictionary", "numbers", "objects", "one tensor", "one list too few", "no expert",
        "no snapshot"])
def test_a_foreign_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "replay_buffer_0.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ReportedError, match=r"replay_buffer_0\.pt is no trajectory file .*run expert_traj") as error:
        trajectories.read_trajectories(path)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused_by_name(buffers, tmp_path):
    whole = (buffers / "EuroSAT_NO_ZCA" / "ConvNetW32" / "replay_buffer_0.pt").read_bytes()
    (tmp_path / "replay_buffer_0.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ReportedError, match=r"replay_buffer_0\.pt is no trajectory file"):
        trajectories.read_trajectories(tmp_path / "replay_buffer_0.pt")


def damaged(**changes):
    """A record that is as it should be, but for `changes`."""
    return SETTINGS | {"files": [{"bytes": 2, "sha256": "", "experts": 1}], "experts": [entry(0)]} | changes


@pytest.mark.parametrize("text", [
    '{"settings": ', "[]", "{}", *map(json.dumps, [
        damaged(settings=[]), damaged(experts=[1]), damaged(experts=[{"seed": 0}]), damaged(experts=[entry("0")]),
        damaged(experts=[entry(0) | {"loss": []}]), damaged(files=["two"]), damaged(files=[{"bytes": 2}])])])
def test_a_damaged_record_is_refused_by_name(tmp_path, text):
    (tmp_path / "replay_buffer_0.pt").write_text("is")
    (tmp_path / "replay_buffer_0.json").write_text(text)
    with pytest.raises(ReportedError, match=r"replay_buffer_0\.json is damaged"):
        trajectories.read_record(tmp_path / "replay_buffer_0.pt")


def test_each_setting_that_differs_is_named_and_no_other(tmp_path):
    record = {"zca": True, "val_fraction": 0.1, "dataset": "EuroSAT", "digest": "abc"}
    files.check_record(tmp_path, record, {"zca": True, "dataset": "EuroSAT"})
    with pytest.raises(ReportedError) as error:
        files.check_record(tmp_path, record, record | {"zca": False, "val_fraction": 0, "model": "MLP"})
    for part in ("zca=True (here False)", "val_fraction=0.1 (here 0)", "model=None (here 'MLP')", "--buffer_path"):
        assert part in str(error.value)
    assert "digest" not in str(error.value)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    files.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_whole(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
