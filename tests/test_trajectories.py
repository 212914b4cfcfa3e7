"""Trajectory files: MTT's nested lists, written whole, refused when they do not fit."""

import itertools
import json
import os

import pytest
import torch

import utils
from networks import get_network
from utils import ReportedError


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


def test_written_trajectories_and_record_read_back(tmp_path):
    trajectories = [[[torch.randn(2, 3), torch.randn(4)] for _ in range(3)] for _ in range(2)]
    path = tmp_path / "deep" / "replay_buffer_0.pt"
    record = {"settings": {"zca": False}, "training": {"lr": 0.01}, "experts": []}
    utils.write_trajectories(path, trajectories, record)
    assert sorted(os.listdir(path.parent)) == ["replay_buffer_0.json", "replay_buffer_0.pt"]
    assert utils.read_record(path) == record
    for reader in (utils.read_trajectories, lambda path: torch.load(path, weights_only=True)):
        torch.testing.assert_close(reader(path), trajectories, rtol=0, atol=0)


def test_a_file_without_record_has_none(tmp_path):
    torch.save([[[torch.zeros(1)]]], tmp_path / "replay_buffer_0.pt")
    assert utils.read_record(tmp_path / "replay_buffer_0.pt") is None


def test_expert_files_are_listed_in_order_and_a_gap_is_reported(tmp_path):
    (tmp_path / "replay_buffer_0_backup.pt").touch()
    assert utils.expert_files(tmp_path) == utils.expert_files(tmp_path / "none") == []
    for number in range(12):
        (tmp_path / f"replay_buffer_{number}.pt").touch()
    assert utils.expert_files(tmp_path) == [tmp_path / f"replay_buffer_{number}.pt" for number in range(12)]
    (tmp_path / "replay_buffer_3.pt").unlink()
    with pytest.raises(ReportedError, match=r"replay_buffer_3\.pt is missing"):
        utils.expert_files(tmp_path)


def test_a_writer_killed_in_between_leaves_no_expert_without_a_record(tmp_path, monkeypatch):
    path, experts = tmp_path / "replay_buffer_0.pt", [[[torch.zeros(1)], [torch.ones(1)]]]
    record = {"settings": {}, "training": {}, "experts": [{"seed": 0}]}
    write_json = utils.write_json

    def killed_before_the_end(path, content):
        if not content["experts"]:
            write_json(path, content)

    for experts_recorded in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(utils, "write_json", killed_before_the_end)
            utils.write_trajectories(path, experts, record)
        assert len(utils.read_record(path)["experts"]) == experts_recorded
        utils.write_trajectories(path, experts, record)
        assert utils.read_record(path)["experts"] == record["experts"]


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
    with pytest.raises(ReportedError, match=r"replay_buffer_0\.pt is no trajectory file .*train again") as error:
        utils.read_trajectories(path)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused_by_name(buffers, tmp_path):
    whole = (buffers / "EuroSAT_NO_ZCA" / "ConvNetW32" / "replay_buffer_0.pt").read_bytes()
    (tmp_path / "replay_buffer_0.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ReportedError, match=r"replay_buffer_0\.pt is no trajectory file"):
        utils.read_trajectories(tmp_path / "replay_buffer_0.pt")


@pytest.mark.parametrize("text", ['{"settings": ', "[]", "{}", '{"settings": [], "training": {}, "experts": []}'])
def test_a_damaged_record_is_refused_by_name(tmp_path, text):
    (tmp_path / "replay_buffer_0.json").write_text(text)
    with pytest.raises(ReportedError, match=r"replay_buffer_0\.json is damaged"):
        utils.read_record(tmp_path / "replay_buffer_0.pt")


def test_each_setting_that_differs_is_named_and_no_other(tmp_path):
    record = {"zca": True, "val_fraction": 0.1, "dataset": "EuroSAT", "digest": "abc"}
    utils.check_record(tmp_path, record, {"zca": True, "dataset": "EuroSAT"})
    with pytest.raises(ReportedError) as error:
        utils.check_record(tmp_path, record, record | {"zca": False, "val_fraction": 0, "model": "MLP"})
    for part in ("zca=True (here False)", "val_fraction=0.1 (here 0)", "model=None (here 'MLP')", "--buffer_path"):
        assert part in str(error.value)
    assert "digest" not in str(error.value)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    utils.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.write_whole(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
