"""`expert_trajectories.py` from the command line."""

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
from conftest import pages, records_of, rows_of
from outcomes import assert_same_experts, experts_by_seed, folder_with

import trajectories
from system import devices, process

SCRIPT = "expert_trajectories.py"


def load(buffers, model="ConvNetW32"):
    """The first expert of a model in a folder, as a tensor (epochs + 1, P)."""
    (path,) = buffers.glob(f"*/{model}/replay_buffer_0.pt")
    (trajectory,) = torch.load(path, weights_only=True)
    return torch.stack([trajectories.flat(snapshot) for snapshot in trajectory])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------
# Files, and running again


def test_each_expert_has_a_file_and_a_record_numbered_by_its_seed(specks_buffers):
    names = sorted(path.name for path in folder_with(specks_buffers).iterdir())
    assert names == [f"replay_buffer_{n}.{kind}" for n in range(8) for kind in ("json", "pt")]
    assert list(experts_by_seed(specks_buffers)) == list(range(8))


def test_a_line_tells_what_each_expert_has_reached(run_here, specks_experts, tmp_path):
    flags = [*specks_experts, f"--buffer_path={tmp_path}", "--num_experts=2"]
    done = run_here(SCRIPT, *flags, cwd=tmp_path)
    device, data, *_ = done.stdout.splitlines()
    assert device == "CPU, threads: 1, float32"
    assert data.startswith("28 training, 8 validation, 4 test images of 2 classes; 0 of 2 ")
    lines = [line for line in done.stdout.splitlines() if line.startswith("expert ")]
    assert len(lines) == 2
    for number, line in enumerate(lines):
        name = f"replay_buffer_{number}.pt"
        expert = trajectories.read_record(folder_with(tmp_path) / name)["expert"]
        assert line.startswith(f"expert {number}   loss {expert['loss'][-1]:.4f}, ")
        assert f"train {expert['train_accuracy'][-1]:7.2%}" in line
        assert f"test {expert['test_accuracy'][-1]:7.2%}" in line
        assert line.endswith(f"in {name}")


def test_each_expert_is_a_run_on_wandb_in_the_group_of_its_folder(
    run_here, specks_experts, tmp_path
):
    flags = [*specks_experts, f"--buffer_path={tmp_path}", "--num_experts=2"]
    done = run_here(SCRIPT, *flags, "--wandb_mode=offline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = folder_with(tmp_path)
    rows = {}  # of each page; experts of the same second have files in any order
    for path in pages(folder):
        parts = records_of(path.read_bytes())
        (page, *_) = (part.run for part in parts if part.WhichOneof("record_type") == "run")
        assert page.run_group == "experts ImageFolder_NO_ZCA/ConvNetW32"
        rows[page.display_name] = rows_of(path)
    assert rows.keys() == {"expert 0", "expert 1"}
    for number, path in enumerate(trajectories.expert_files(folder)):
        expert, logged = trajectories.read_record(path)["expert"], rows[f"expert {number}"]
        assert [row["Epoch"] for row in logged] == [1, 2, 3]
        for key in ("loss", "train_accuracy", "test_accuracy"):
            assert [row[key.title()] for row in logged] == pytest.approx(expert[key])


def test_more_experts_are_added_and_equal_those_of_one_run(
    run_here, specks_experts, specks_buffers, tmp_path
):
    flags = [*specks_experts, f"--buffer_path={tmp_path}"]
    assert run_here(SCRIPT, *flags, "--num_experts=2", cwd=tmp_path).returncode == 0
    before = contents(tmp_path)
    done = run_here(SCRIPT, *flags, cwd=tmp_path)
    assert done.returncode == 0 and "2 of 8 experts are in" in done.stdout
    assert contents(tmp_path).items() >= before.items()
    assert_same_experts(tmp_path, specks_buffers)


def test_an_expert_depends_on_seed_plus_number_alone(
    run_here, specks_experts, specks_buffers, tmp_path
):
    flags = [*specks_experts, "--num_experts=1", "--seed=5", f"--buffer_path={tmp_path}"]
    assert run_here(SCRIPT, *flags, cwd=tmp_path).returncode == 0
    (path,) = trajectories.expert_files(folder_with(tmp_path))
    assert path.name == "replay_buffer_0.pt"
    assert trajectories.read_record(path)["expert"]["seed"] == 5
    assert torch.equal(load(tmp_path), torch.stack(experts_by_seed(specks_buffers)[5]))


@pytest.mark.parametrize(
    "flag, part",
    [
        ("--lr_teacher=0.02", "lr=0.1 (here 0.02)"),
        ("--seed=1", "seed=0 (here 1)"),
        ("--val_fraction=0.3", "val_fraction=0.2 (here 0.3)"),
        ("--im_size=16", "im_size=8 (here 16)"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    run_here, specks_experts, specks_buffers, tmp_path, flag, part
):
    before = contents(specks_buffers)
    flags = [*specks_experts, "--num_experts=9", f"--buffer_path={specks_buffers}", flag]
    done = run_here(SCRIPT, *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert part in done.stderr and "--buffer_path" in done.stderr
    assert contents(specks_buffers) == before


def test_experts_without_a_record_are_not_continued(
    run_here, specks_experts, specks_buffers, tmp_path
):
    copy = tmp_path / "buffers"
    shutil.copytree(specks_buffers, copy, ignore=shutil.ignore_patterns("*.json"))
    before = contents(copy)
    done = run_here(SCRIPT, *specks_experts, f"--buffer_path={copy}", cwd=tmp_path)
    assert done.returncode == 2 and "replay_buffer_0.pt has no record" in done.stderr
    assert contents(copy) == before


def test_an_expert_that_diverges_is_reported_and_not_saved(run_here, specks_experts, tmp_path):
    flags = [*specks_experts, "--num_experts=1", "--lr_teacher=1e20", f"--buffer_path={tmp_path}"]
    done = run_here(SCRIPT, *flags, cwd=tmp_path)
    assert done.returncode == 2 and "diverged in epoch 1: lower --lr_teacher" in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


# --------------------------------------------------------------------------------------------------
# How they are trained


@pytest.fixture(scope="module")
def train(run_here, specks_flags, tmp_path_factory):
    """A function: the trajectory (6, P) of an MLP trained for five epochs with further flags."""

    def train(*flags):
        folder = tmp_path_factory.mktemp("trained")
        flags = ["--model=MLP", "--num_experts=1", "--train_epochs=5", *flags]
        done = run_here(SCRIPT, *specks_flags, *flags, f"--buffer_path={folder}", cwd=folder)
        assert done.returncode == 0, done.stderr
        return load(folder, "MLP")

    return train


@pytest.fixture(scope="module")
def usual(train):
    return train()


def test_decay_divides_the_rate_by_ten_after_the_middle(train, usual):
    decayed = train("--decay")
    # The epoch after epoch 5 // 2 + 1 = 3, counted from 0, is the last.
    assert torch.equal(decayed[:5], usual[:5])
    assert 0.05 < (decayed[5] - decayed[4]).norm() / (usual[5] - usual[4]).norm() < 0.2


def test_momentum_takes_longer_steps(train, usual):
    assert (train("--mom=0.9")[5] - usual[0]).norm() > 1.5 * (usual[5] - usual[0]).norm()


def test_weight_decay_shrinks_the_weights(train, usual):
    assert train("--l2=0.5")[5].norm() < 0.95 * usual[5].norm()


def test_without_dsa_experts_train_on_plain_augmentation(train, usual):
    plain = train("--dsa=False")
    assert torch.equal(plain[0], usual[0])
    assert plain.isfinite().all() and not torch.equal(plain[1], usual[1])


def test_training_follows_the_learning_rate(train, usual):
    assert torch.equal(train("--lr_teacher=1e-20")[5], usual[0])
    assert not torch.equal(usual[5], usual[0])


@pytest.mark.bfloat16
def test_bfloat16_gives_nearly_the_same_experts(train, usual):
    change = train("--amp") - usual[0]
    assert not torch.equal(change[5], usual[5] - usual[0])
    assert torch.nn.functional.cosine_similarity(change[1], usual[1] - usual[0], dim=0) > 0.98


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64",
    reason="asks Linux on x86",
)
def test_a_processor_has_bfloat16_only_if_it_has_the_instructions():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    has = bool(flags & {"avx512_bf16", "amx_bf16"})
    assert devices.has_bfloat16(torch.device("cpu")) == has


# --------------------------------------------------------------------------------------------------
# Progress


def test_where_there_is_no_terminal_progress_is_a_plain_line_when_due(
    run_here, specks_experts, monkeypatch, tmp_path
):
    flags = [*specks_experts, "--num_experts=1"]
    done = run_here(SCRIPT, *flags, f"--buffer_path={tmp_path / 'quiet'}", cwd=tmp_path)
    assert done.stderr == ""  # within a minute
    monkeypatch.setattr(process.Interval, "due", lambda interval: True)
    done = run_here(SCRIPT, *flags, f"--buffer_path={tmp_path / 'due'}", cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert lines[0].startswith("expert 0, epoch 1 of 3: batch 0 of ")
    assert lines[-1].startswith("expert 0, epoch 3 of 3: batch ")
    assert len(lines) > 3 and "\r" not in done.stderr


def test_an_interval_is_due_once_in_so_many_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    interval = process.Interval(60)
    due = []
    for seconds in (0, 30, 29, 1, 0, 59, 1, 150, 1):
        now[0] += seconds
        due.append(interval.due())
    assert due == [False, False, False, True, False, False, True, True, False]


# --------------------------------------------------------------------------------------------------
# Networks


@pytest.fixture(scope="module")
def one_expert(run_here, specks_flags, tmp_path_factory):
    """A function: trains an expert of one epoch of a model, unless there is one: the folder."""
    folder = tmp_path_factory.mktemp("one_expert")
    more = ["--im_size=32", "--num_experts=1", "--train_epochs=1", f"--buffer_path={folder}"]

    def train(model):
        done = run_here(SCRIPT, *specks_flags, *more, f"--model={model}", cwd=folder)
        assert done.returncode == 0, done.stderr
        return done, folder / "ImageFolder_NO_ZCA"

    return train


@pytest.mark.parametrize("model", ["ConvNet", "MLP", "VGG16"])
def test_each_model_trains_and_records_its_name(one_expert, model):
    _, folder = one_expert(model)
    record = json.loads((folder / model / "replay_buffer_0.json").read_text())
    assert record["settings"]["model"] == model
    start, end = load(folder.parent, model)
    assert end.isfinite().all() and not torch.equal(start, end)


def test_resnet_and_resnet18_share_their_experts(one_expert):
    _, folder = one_expert("ResNet18")
    start, end = load(folder.parent, "ResNet18")
    assert end.isfinite().all() and not torch.equal(start, end)
    done, _ = one_expert("ResNet")
    assert "; 1 of 1 experts are in" in done.stdout  # before any training
    assert not (folder / "ResNet").exists()


# --------------------------------------------------------------------------------------------------
# Compilation


@pytest.fixture(scope="module")
def compiled(forked, specks_flags, tmp_path_factory):
    """A function: what a run prints as warnings, its expert, and the kernels that it compiled."""

    def train(*flags, **environment):
        folder = tmp_path_factory.mktemp("compiled")
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
        flags = [*specks_flags, "--model=ConvNetD1", "--num_experts=1", "--train_epochs=1", *flags]
        done = forked(SCRIPT, *flags, f"--buffer_path={folder}", cwd=folder, **environment)
        assert done.returncode == 0, done.stderr
        return done.stderr, load(folder, "ConvNetD1"), list(folder.rglob("cache/**/*.so"))

    return train


@pytest.fixture(scope="module")
def plain(compiled):
    return compiled("--no-compile")[1]


def assert_same_up_to_rounding(expert, plain):
    assert torch.equal(expert[0], plain[0])
    assert (expert[1] - plain[1]).norm() < 0.01 * (plain[1] - plain[0]).norm()


def test_compiled_training_gives_the_same_experts_up_to_rounding(compiled, plain):
    warning, expert, kernels = compiled("--compile")
    if "torch.compile failed" in warning:
        pytest.skip("no C++ compiler, or no header files of Python")
    assert kernels and "warning" not in warning
    assert_same_up_to_rounding(expert, plain)


def test_without_a_compiler_it_warns_once_and_trains_without_compilation(compiled, plain, tmp_path):
    warning, expert, kernels = compiled("--compile", PATH=str(tmp_path))
    assert "warning: torch.compile failed, continuing without it: " in warning
    assert warning.count("warning: ") == 1 and not kernels
    assert_same_up_to_rounding(expert, plain)


def test_experts_that_cannot_be_followed_are_warned_of_before_the_first(
    run_here, specks_experts, tmp_path
):
    flags = [*specks_experts, f"--buffer_path={tmp_path}", "--model=ConvNetBN", "--num_experts=1"]
    with pytest.warns(UserWarning, match=r"will refuse .* --model=ConvNetBN: .*normalisation"):
        done = run_here(SCRIPT, *flags, "--train_epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
