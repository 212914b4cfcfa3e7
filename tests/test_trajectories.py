"""Trajectory files: MTT's nested lists, written whole, refused when they do not fit."""

import errno
import itertools
import json
import os
import warnings

import filelock
import pytest
import torch
from outcomes import folder_with

import trajectories
import utils
from networks import get_network
from system import files
from system.process import ReportedError
from trajectories import load_experts


@pytest.fixture(scope="module")
def folder(specks_buffers):
    """The trajectory files of eight experts of three epochs. Not to be changed."""
    return folder_with(specks_buffers)


def test_an_expert_file_is_plain_nested_lists_in_parameter_order(folder):
    shapes = [p.shape for p in get_network("ConvNetW32", 3, 2, 8).parameters()]
    for number in range(8):
        experts = torch.load(folder / f"replay_buffer_{number}.pt", weights_only=True)
        assert type(experts) is list and len(experts) == 1
        assert type(experts[0]) is list and len(experts[0]) == 3 + 1
        for snapshot in experts[0]:
            assert type(snapshot) is list and [p.shape for p in snapshot] == shapes
            for p in snapshot:
                assert type(p) is torch.Tensor and p.dtype == torch.float32
                assert not p.requires_grad


def test_snapshots_differ_from_epoch_to_epoch_and_experts_from_each_other(folder):
    flat = []
    for path in trajectories.expert_files(folder):
        (expert,) = torch.load(path, weights_only=True)
        flat.append([trajectories.flat(snapshot) for snapshot in expert])
    for expert in flat:
        assert all((later - earlier).norm() > 1e-3 for earlier, later in itertools.pairwise(expert))
    for one, other in itertools.combinations(flat, 2):
        assert (one[0] - other[0]).norm() > 1


def test_the_record_beside_a_file_tells_how_it_was_made(folder):
    record = json.loads((folder / "replay_buffer_1.json").read_text())
    settings = {"dataset": "ImageFolder", "im_size": 8, "val_fraction": 0.2, "zca": False}
    assert record["settings"].items() >= (settings | {"model": "ConvNetW32"}).items()
    assert record["training"] == {
        "epochs": 3,
        "batch_size": 7,
        "lr": 0.1,
        "mom": 0,
        "l2": 0,
        "decay": False,
        "dsa": utils.DSA_STRATEGY,
        "amp": False,
        "seed": 0,
    }
    assert record["versions"]["torch"] == torch.__version__
    assert record["expert"]["seed"] == 1 and record["expert"]["seconds"] >= 0
    for curve in ("loss", "train_accuracy", "test_accuracy"):
        assert len(record["expert"][curve]) == 3


# --------------------------------------------------------------------------------------------------
# Written and read


RECORD = {
    "settings": {"zca": False},
    "training": {"lr": 0.01},
    "expert": {"seed": 7, "loss": [1.0], "test_accuracy": [0.5]},
}


@pytest.fixture
def saved(tmp_path):
    """A trajectory file, and the expert of three snapshots in it."""
    expert = [[torch.randn(2, 3), torch.randn(4)] for _ in range(3)]
    path = tmp_path / "deep" / "replay_buffer_7.pt"
    trajectories.save_expert(path, expert, RECORD)
    return path, expert


def test_a_saved_expert_and_its_record_read_back(saved):
    path, expert = saved
    assert sorted(os.listdir(path.parent)) == ["replay_buffer_7.json", "replay_buffer_7.pt"]
    read, record = trajectories.read_trajectories(path)
    assert record.items() >= RECORD.items()
    assert record["bytes"] == path.stat().st_size
    for content in (read, torch.load(path, weights_only=True)):
        torch.testing.assert_close(content, [expert], rtol=0, atol=0)


def load(folder, **options):
    shapes = [torch.Size([2, 3]), torch.Size([4])]
    options = {"max_files": None, "max_experts": None, "skip_damaged": False} | options
    return load_experts(folder, shapes, **options)


def test_files_of_mtt_which_have_several_experts_and_no_record_are_read_with_a_warning(tmp_path):
    experts = [[[torch.randn(2, 3), torch.randn(4)] for _ in range(3)] for _ in range(5)]
    torch.save(experts[:3], tmp_path / "replay_buffer_0.pt")
    torch.save(experts[3:], tmp_path / "replay_buffer_1.pt")
    with pytest.warns(UserWarning, match=r"replay_buffer_\d\.pt has no record of its settings"):
        found = load(tmp_path)
    assert [expert.record for expert in found.members] == [None] * 5
    names = [expert.name for expert in found.members]
    assert names[3] == f"expert 0 of {tmp_path / 'replay_buffer_1.pt'}"
    torch.testing.assert_close([expert.trajectory for expert in found.members], experts)
    with pytest.warns(UserWarning):
        few = load(tmp_path, max_files=1, max_experts=2)
    torch.testing.assert_close([expert.trajectory for expert in few.members], experts[:2])
    assert len({found.digest(), few.digest()}) == 2


def test_an_expert_with_a_record_is_read_without_a_warning_and_named_by_its_file(saved):
    path, expert = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (member,) = load(path.parent).members
    assert member.name == str(path) and member.losses == [1.0]
    torch.testing.assert_close(member.trajectory, expert, rtol=0, atol=0)


def test_expert_files_are_listed_by_their_numbers(tmp_path):
    (tmp_path / "replay_buffer_0_backup.pt").touch()
    assert trajectories.expert_files(tmp_path) == []
    assert trajectories.expert_files(tmp_path / "none") == []
    numbers = (0, 1, 2, 10, 11)
    for number in numbers:
        (tmp_path / f"replay_buffer_{number}.pt").touch()
    paths = [tmp_path / f"replay_buffer_{number}.pt" for number in numbers]
    assert trajectories.expert_files(tmp_path) == paths


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    files.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match=r"file\.txt cannot be written \(disk full\)"):
        files.write_whole(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_full_disk_is_called_so(tmp_path):
    def fail(file):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 40 vs 30")

    with pytest.raises(OSError, match=r"t\.pt cannot be written \(the disk or a quota is full: "):
        files.write_whole(tmp_path / "t.pt", fail)


def test_where_the_file_system_has_no_locks_work_goes_on_with_a_warning(tmp_path, monkeypatch):
    def acquire(lock, timeout=None):
        (tmp_path / "run" / ".lock").touch()  # as filelock leaves it
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.warns(UserWarning, match="has no locks .*let no other process work there"):
        with files.locked(tmp_path / "run", wait=False) as mine:
            assert mine
            assert not (tmp_path / "run" / ".lock").exists()


def test_other_faults_of_a_lock_are_raised_in_words_without_numbers(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written \((Not a directory|File exists): ") as e:
        with files.locked(tmp_path / "file"):
            pass
    assert "Errno" not in str(e.value)


# --------------------------------------------------------------------------------------------------
# Damaged and foreign files


def test_each_altered_byte_is_noticed(saved):
    path, _ = saved
    whole = path.read_bytes()
    altered = r"replay_buffer_7\.pt is damaged: its checksum is not the recorded one"
    for place in range(0, len(whole), len(whole) // 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(trajectories.DamagedFile, match=altered):
            trajectories.read_trajectories(path)
    for size in (0, len(whole) - 1, len(whole) + 1):
        path.write_bytes((whole + b" ")[:size])
        fault = rf"_7\.pt is damaged: it has {size} bytes, its record says {len(whole)}"
        with pytest.raises(trajectories.DamagedFile, match=fault):
            trajectories.read_trajectories(path)
    path.write_bytes(whole)
    trajectories.read_trajectories(path)


class Foreign:
    """Anything that only unpickling code could restore."""


FOREIGN = {
    "empty": (b"", "it was not written by torch.save"),
    "objects": ([Foreign()], "could run code"),
    "a dictionary": ({"images": torch.zeros(2)}, "a list of experts is wanted, not dict"),
    "one tensor": (torch.zeros(2, 2, 2, 2), "a list of experts is wanted, not torch.float32"),
    "one list too few": ([[torch.zeros(2)]], "a list of parameters is wanted, not torch.float32"),
    "numbers": ([[[1, 2]]], "a floating-point tensor is wanted, not int"),
    "whole numbers": ([[[torch.arange(2)]]], "a floating-point tensor is wanted, not torch.int64"),
}


@pytest.mark.parametrize("content, words", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_by_name_and_said_to_hold_what_it_holds(tmp_path, content, words):
    path = tmp_path / "replay_buffer_0.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    fault = rf"replay_buffer_0\.pt is no trajectory file .*{words}.*name a --buffer_path without it"
    with pytest.raises(ReportedError, match=fault) as error:
        trajectories.read_trajectories(path)
    assert "\n" not in str(error.value) and "remove" not in str(error.value)


def test_parameters_are_read_as_tensors(tmp_path):
    network = torch.nn.Linear(3, 4)
    torch.save([[list(network.parameters())] * 3], tmp_path / "replay_buffer_0.pt")
    read, record = trajectories.read_trajectories(tmp_path / "replay_buffer_0.pt")
    assert record is None
    expert = [[p.detach() for p in network.parameters()]] * 3
    torch.testing.assert_close(read, [expert], rtol=0, atol=0)
    assert not any(p.requires_grad for snapshot in read[0] for p in snapshot)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_parameters_of_other_precision_are_taken_in_float32(tmp_path, dtype):
    expert = [[torch.ones(2, 3, dtype=dtype) * k, torch.ones(4)] for k in range(3)]
    torch.save([expert], tmp_path / "replay_buffer_0.pt")
    with pytest.warns(UserWarning, match="no record"):
        experts = load(tmp_path)
    assert {p.dtype for p in experts.members[0].trajectory[2]} == {torch.float32}
    experts.digest()


def test_the_serialisation_of_pytorch_before_1_6_is_read(saved):
    path, expert = saved
    torch.save([expert], path, _use_new_zipfile_serialization=False)
    path.with_suffix(".json").unlink()
    read, _ = trajectories.read_trajectories(path)
    torch.testing.assert_close(read, [expert], rtol=0, atol=0)


def test_a_truncated_file_without_a_record_is_refused_by_name(saved):
    path, _ = saved
    path.with_suffix(".json").unlink()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReportedError, match=r"replay_buffer_7\.pt is no trajectory file"):
        trajectories.read_trajectories(path)


FOREIGN_RECORDS = ['{"settings": ', "[]", '{"lr": 0.1}', json.dumps(RECORD | {"bytes": "two"})]


@pytest.mark.parametrize("text", FOREIGN_RECORDS)
def test_a_damaged_or_foreign_record_is_named_and_does_not_cost_the_trajectories(tmp_path, text):
    (tmp_path / "replay_buffer_0.pt").write_text("is")
    (tmp_path / "replay_buffer_0.json").write_text(text)
    fault = r"replay_buffer_0\.json is damaged, or no record .*move it away"
    with pytest.raises(ReportedError, match=fault) as error:
        trajectories.read_record(tmp_path / "replay_buffer_0.pt")
    assert "remove" not in str(error.value)


def test_each_setting_that_differs_is_named_and_no_other(tmp_path):
    record = {"zca": True, "val_fraction": 0.1, "dataset": "EuroSAT", "digest": "abc"}
    files.check_record(tmp_path, record, {"zca": True, "dataset": "EuroSAT"})
    now = record | {"zca": False, "val_fraction": 0, "model": "MLP"}
    with pytest.raises(ReportedError) as error:
        files.check_record(tmp_path, record, now)
    parts = ["zca=True (here False)", "val_fraction=0.1 (here 0)", "model=None (here 'MLP')"]
    for part in [*parts, "--buffer_path"]:
        assert part in str(error.value)
    assert "digest" not in str(error.value)
