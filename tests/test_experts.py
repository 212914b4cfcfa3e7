"""`expert_trajectories.py` from the command line."""

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
from conftest import history, records_of
from tqdm import tqdm

import trajectories
import utils

SCRIPT = "expert_trajectories.py"


def load(buffers, file=0, model="ConvNetW32"):
    """The experts of a file, each as one tensor (epochs + 1, P)."""
    path = buffers / "EuroSAT_NO_ZCA" / model / f"replay_buffer_{file}.pt"
    return [torch.stack([torch.cat([p.flatten() for p in snapshot]) for snapshot in expert])
            for expert in torch.load(path, weights_only=True)]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Groups of experts, and running again


def test_the_last_partial_group_is_saved(buffers):
    assert [len(load(buffers, file)) for file in (0, 1)] == [2, 1]
    names = sorted(path.name for path in (buffers / "EuroSAT_NO_ZCA" / "ConvNetW32").iterdir())
    assert names == [f"replay_buffer_{file}.{suffix}" for file in (0, 1) for suffix in ("json", "pt")] + ["wandb"]


def test_each_expert_is_a_run_on_wandb_in_the_group_of_its_folder(buffers):
    folder = buffers / "EuroSAT_NO_ZCA" / "ConvNetW32"
    rows = history(folder)
    assert [row["Epoch"] for row in rows] == [1, 2, 3] * 3
    known = [trajectories.read_record(path)["experts"] for path in trajectories.expert_files(folder)]
    for key in ("loss", "train_accuracy", "test_accuracy"):
        curves = [value for experts in known for expert in experts for value in expert[key]]
        assert [row[key.title()] for row in rows] == pytest.approx(curves)
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        (run, *_) = (part.run for part in records_of(path.read_bytes()) if part.WhichOneof("record_type") == "run")
        assert run.run_group == "experts EuroSAT_NO_ZCA/ConvNetW32"
        assert run.display_name in ("expert 0", "expert 1", "expert 2")


def test_a_line_tells_what_each_expert_has_reached(run_here, tiny_flags, tmp_path):
    done = run_here(SCRIPT, *tiny_flags, "--model=MLP", "--num_experts=2", "--train_epochs=1", "--wandb_mode=disabled",
                    f"--buffer_path={tmp_path}", cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith("expert ")]
    assert [line.split(" loss")[0].strip() for line in lines] == ["expert 0", "expert 1"]
    record = trajectories.read_record(tmp_path / "EuroSAT_NO_ZCA" / "MLP" / "replay_buffer_0.pt")
    for line, expert in zip(lines, record["experts"]):
        assert f"loss {expert['loss'][0]:.4f}" in line and f"test {expert['test_accuracy'][0]:7.2%}" in line
        assert line.endswith("in replay_buffer_0.pt")


def test_more_experts_complete_a_partial_group_and_equal_one_run(run_here, expert_flags, buffers, tmp_path):
    flags = (*expert_flags, f"--buffer_path={tmp_path}")
    assert run_here(SCRIPT, *flags, "--num_experts=1", cwd=tmp_path).returncode == 0
    (first,) = load(tmp_path)
    done = run_here(SCRIPT, *flags, "--num_experts=3", cwd=tmp_path)
    assert done.returncode == 0 and "1 of 3 experts are in" in done.stdout
    assert torch.equal(load(tmp_path)[0], first)
    for file in (0, 1):
        both = zip(load(tmp_path, file), load(buffers, file), strict=True)
        assert all(torch.equal(in_two_runs, in_one) for in_two_runs, in_one in both)


def test_an_expert_depends_on_seed_plus_number_alone(run_here, expert_flags, buffers, tmp_path):
    done = run_here(SCRIPT, *expert_flags, "--num_experts=1", "--seed=2", f"--buffer_path={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0
    assert torch.equal(load(tmp_path)[0], load(buffers, file=1)[0])


def test_the_same_command_again_trains_nothing(run_here, expert_flags, buffers, tmp_path):
    copy = shutil.copytree(buffers, tmp_path / "buffers")
    before = contents(copy)
    done = run_here(SCRIPT, *expert_flags, "--num_experts=3", f"--buffer_path={copy}", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("3 of 3 experts are in") == 2
    assert contents(copy) == before


@pytest.mark.parametrize("flag, part", [
    ("--lr_teacher=0.02", "lr=0.01 (here 0.02)"),
    ("--train_epochs=4", "epochs=3 (here 4)"),
    ("--seed=1", "seed=0 (here 1)"),
    ("--dsa=False", "dsa="),
    ("--val_fraction=0.2", "val_fraction=0.1 (here 0.2)"),
])
def test_other_settings_in_the_same_folder_are_refused(run_here, expert_flags, buffers, tmp_path, flag, part):
    before = contents(buffers)
    done = run_here(SCRIPT, *expert_flags, "--num_experts=5", f"--buffer_path={buffers}", flag, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert part in done.stderr and "--buffer_path" in done.stderr
    assert contents(buffers) == before


def test_experts_without_a_record_are_not_continued(run_here, expert_flags, buffers, tmp_path):
    copy = shutil.copytree(buffers, tmp_path / "buffers", ignore=shutil.ignore_patterns("*.json"))
    before = contents(copy)
    done = run_here(SCRIPT, *expert_flags, "--num_experts=5", f"--buffer_path={copy}", cwd=tmp_path)
    assert done.returncode == 2 and "replay_buffer_0.pt has no record" in done.stderr
    assert contents(copy) == before


# ---------------------------------------------------------------------------------------------------------------------
# How they are trained


@pytest.fixture(scope="module")
def train(run_here, tiny_flags, tmp_path_factory):
    """A function: the trajectory (6, P) of an MLP trained for five epochs with further flags."""

    def train(*flags):
        folder = tmp_path_factory.mktemp("trained")
        done = run_here(SCRIPT, *tiny_flags, "--model=MLP", "--train_epochs=5", "--num_experts=1",
                        f"--buffer_path={folder}", *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
        return load(folder, model="MLP")[0]

    return train


@pytest.fixture(scope="module")
def usual(train):
    return train()


def test_decay_divides_the_rate_by_ten_after_the_middle(train, usual):
    decayed = train("--decay")
    assert torch.equal(decayed[:5], usual[:5])  # the epoch after epoch 5 // 2 + 1 = 3, counted from 0, is the last
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


@pytest.mark.bfloat16
def test_bfloat16_gives_nearly_the_same_experts(train, usual):
    change = train("--amp") - usual[0]
    assert not torch.equal(change[5], usual[5] - usual[0])
    assert torch.nn.functional.cosine_similarity(change[1], usual[1] - usual[0], dim=0) > 0.98


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="asks Linux on x86")
def test_a_processor_has_bfloat16_only_if_it_has_the_instructions():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert utils.has_bfloat16(torch.device("cpu")) == bool(flags & {"avx512_bf16", "amx_bf16"})


def test_without_bfloat16_a_warning_says_so_and_experts_are_those_of_float32(train, usual, monkeypatch):
    monkeypatch.setattr(utils, "has_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="--amp: this cpu does not compute in bfloat16; going on in float32"):
        assert torch.equal(train("--amp"), usual)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("model", ["ConvNet", "MLP", "ResNet18"])
def test_each_model_trains_and_records_its_name(tiny_buffers, model):
    folder = tiny_buffers(model) / "EuroSAT_NO_ZCA" / model
    assert json.loads((folder / "replay_buffer_0.json").read_text())["settings"]["model"] == model
    start, end = load(tiny_buffers(model), model=model)[0]
    assert end.isfinite().all() and not torch.equal(start, end)


def test_resnet_and_resnet18_share_their_experts(run_here, tiny_flags, tiny_buffers, tmp_path):
    done = run_here(SCRIPT, *tiny_flags, "--model=ResNet", f"--buffer_path={tiny_buffers('ResNet18')}",
                    "--num_experts=1", "--train_epochs=1", cwd=tmp_path)
    assert done.returncode == 0 and "1 of 1 experts are in" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Compilation


@pytest.fixture(scope="module")
def compiled(run, tiny_flags, tmp_path_factory):
    """A function: the process and the experts of a run, given compilation flags and environment."""

    def train(*flags, **environment):
        folder = tmp_path_factory.mktemp("compiled")
        done = run(SCRIPT, *tiny_flags, "--model=ConvNetW32", "--train_epochs=1", "--num_experts=1",
                   f"--buffer_path={folder}", *flags, cwd=folder, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"),
                   **environment)
        assert done.returncode == 0, done.stderr
        return done, load(folder)[0]

    return train


@pytest.fixture(scope="module")
def plain(compiled):
    return compiled("--no-compile")[1]


def test_compiled_training_gives_the_same_experts_up_to_rounding(compiled, plain):
    done, experts = compiled("--compile")
    if "torch.compile failed" in done.stderr:
        pytest.skip("no C++ compiler, or no header files of Python")
    assert torch.equal(experts[0], plain[0])
    assert (experts[1] - plain[1]).norm() < 0.02 * (plain[1] - plain[0]).norm()


def test_without_a_compiler_it_warns_and_trains_as_without_compilation(compiled, plain, tmp_path):
    done, experts = compiled("--compile", PATH=str(tmp_path), CXX="no-such-compiler")
    assert done.stderr.count("warning: torch.compile failed, going on without it") == 1
    assert torch.equal(experts, plain)


def test_only_the_last_file_is_completed_when_more_experts_go_into_a_file(run_here, buffers, expert_flags, tmp_path):
    shutil.copytree(buffers, tmp_path / "buffers")
    flags = [*expert_flags, "--save_interval=3", "--num_experts=5", f"--buffer_path={tmp_path / 'buffers'}"]
    assert run_here(SCRIPT, *flags, cwd=tmp_path).returncode == 0
    paths = trajectories.expert_files(tmp_path / "buffers" / "EuroSAT_NO_ZCA" / "ConvNetW32")
    records = [trajectories.read_record(path) for path in paths]
    assert [[expert["seed"] for expert in record["experts"]] for record in records] == [[0, 1], [2, 3, 4]]


def test_an_expert_that_diverges_is_reported_and_not_saved(run_here, expert_flags, tmp_path):
    flags = [*expert_flags, "--num_experts=1", "--lr_teacher=1e20", f"--buffer_path={tmp_path}"]
    done = run_here(SCRIPT, *flags, cwd=tmp_path)
    assert done.returncode == 2 and "diverged in epoch 1: lower --lr_teacher" in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


def test_where_there_is_no_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    for _ in utils.progress(range(3), desc="first", unit="epochs"):
        tqdm.write("a result")
    assert capsys.readouterr() == ("a result\n" * 3, "")  # within a minute
    monkeypatch.setattr(utils.LogLines, "seconds", 0)
    with utils.progress(total=2, desc="second", unit="epochs") as bar:
        for loss in ("0.5", "0.4"):
            bar.set_postfix(loss=loss, refresh=False)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("second: 2 of 2 epochs, 00:00") and lines[-1].endswith("left, loss=0.4")
    assert "\r" not in "".join(lines)
