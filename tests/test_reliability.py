"""Faults, for real: processes killed, signalled and resumed, and several writers.

See docs/reliability.md for what is promised. Runs are the smallest that have every part, and
processes are forked from one that has imported torch. `make soak` kills them at random moments.
"""

import itertools
import json
import os
import shutil
import signal
import time

import pytest
import torch
from conftest import history
from outcomes import (
    assert_readable,
    assert_same,
    assert_same_experts,
    experts_by_seed,
    folder_of,
    folder_with,
    hidden,
    outcome,
)

import utils
from datasets.preprocessing import Form
from evaluation import Evaluator, Plan, Trainee
from system import compilation, files
from system.process import Stopped, stop
from trajectories import load_experts

EXPERTS = "expert_trajectories.py"
DISTILLATION = "distillation.py"


# --------------------------------------------------------------------------------------------------
# Distillation


def visible(folder):
    return {path for path in folder.rglob("[!.]*") if path.is_file()}


def test_a_distillation_killed_before_any_of_its_renames_ends_as_if_undisturbed(
    start, finish, specks_run, tmp_path
):
    """Files appear by being renamed alone, so these are all the states that a kill leaves."""
    flags = [*specks_run, "--Iteration=2", "--eval_it=2", "--checkpoint_every=1", "--max_files=2"]
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    reference.mkdir()
    whole = start(DISTILLATION, *flags, cwd=reference, copies=killed, curves=False)
    assert whole.wait() == 0, whole.output()
    resumed, before = [], set()
    for cwd in sorted(killed.iterdir(), key=lambda path: int(path.name)):
        assert_readable(cwd)
        now = {path.relative_to(cwd) for path in visible(cwd)}
        assert len(now - before) <= 1
        before = now
        out = finish(DISTILLATION, *flags, cwd=cwd, curves=False)
        resumed += [line.split(";")[0] for line in out.splitlines() if "resuming at" in line]
        assert_same(cwd, reference)
        assert not hidden(folder_of(cwd))
    assert len(before) == len(visible(reference))
    assert set(resumed) == {f"resuming at iteration {it}" for it in (0, 1, 2)}


@pytest.mark.parametrize("moment", ["iteration network", "        3 ConvNet", "        6 ConvNet"])
def test_a_distillation_killed_at_any_moment_ends_as_if_undisturbed(
    start, finish, specks_run, undisturbed, tmp_path, moment
):
    process = start(DISTILLATION, *specks_run, cwd=tmp_path)
    process.wait_for(moment)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert_readable(tmp_path)
    out = finish(DISTILLATION, *specks_run, cwd=tmp_path)
    assert "resuming at iteration" in out or "ConvNet" not in moment
    assert_same(tmp_path, undisturbed)
    assert not hidden(folder_of(tmp_path))


def test_the_same_command_ends_bit_for_bit_the_same(finish, specks_run, undisturbed, tmp_path):
    finish(DISTILLATION, *specks_run, cwd=tmp_path)
    assert_same(tmp_path, undisturbed)
    finish(DISTILLATION, *specks_run, "--seed=1", "--run_name=other", cwd=tmp_path)
    shutil.rmtree(folder_of(tmp_path))
    folder_of(tmp_path).with_name("other").rename(folder_of(tmp_path))
    ours, theirs = outcome(tmp_path), outcome(undisturbed)
    assert all(ours[part] != theirs[part] for part in (0, 1))  # so that equality tells something


KINDS = {
    "trajectory": [],
    "loss": ["--objective=loss", "--optimizer_img=adam", "--total_steps=5", "--labels=learned"],
    "tiles": ["--factor=2", "--labels=learned", "--optimizer_lr=log_adam", "--ema=0.5"],
}
KINDS["loss"] += ["--expert_epochs=3", "--max_start_epoch=25"]  # the defaults: it has no experts


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def long_run(finish, specks_run, tmp_path_factory, request):
    """Flags of a run with few checkpoints, and the images that it ends with."""
    flags = [*specks_run, "--Iteration=40", "--checkpoint_every=1000", "--eval_it=1000"]
    flags += request.param
    cwd = tmp_path_factory.mktemp("long_run")
    finish(DISTILLATION, *flags, cwd=cwd, curves=False)
    return flags, torch.load(folder_of(cwd) / "images_40.pt", weights_only=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_of_that_very_iteration(
    start, finish, long_run, tmp_path, number
):
    flags, reference = long_run
    process = start(DISTILLATION, *flags, cwd=tmp_path)
    process.wait_for("        0 ConvNetW32")
    time.sleep(0.05)
    process.kill(number)
    assert process.wait() == 128 + number
    last = process.output().splitlines()[-1]
    losses = torch.load(folder_of(tmp_path) / "checkpoint.pt", weights_only=True)["losses"]
    assert f"distillation.py: stopped by {number.name}; iteration {len(losses)} is saved" in last
    assert "Traceback" not in process.output()
    out = finish(DISTILLATION, *flags, cwd=tmp_path, curves=False)
    assert f"resuming at iteration {len(losses)};" in out
    images = torch.load(folder_of(tmp_path) / "images_40.pt", weights_only=True)
    assert torch.equal(images, reference)


def test_a_signal_within_an_evaluation_does_not_wait_for_its_end(start, specks_run, tmp_path):
    process = start(DISTILLATION, *specks_run, "--epoch_eval_train=100000", cwd=tmp_path)
    process.wait_for("iteration network")  # what comes next is the evaluation of real images
    time.sleep(0.5)
    process.kill(signal.SIGTERM)
    assert process.wait(seconds=5) == 128 + signal.SIGTERM
    assert (folder_of(tmp_path) / "checkpoint.pt").exists()


def test_a_second_signal_ends_a_run_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_networks_that_are_trained_together_stop_within_an_epoch():
    random = utils.make_generator(0)
    network = utils.initial_network("ConvNetD1", Form(2, 8), random, "cpu")
    evaluator = Evaluator(
        data=None,
        pool={},
        num_eval=1,
        epochs=10**9,
        batch_train=10,
        batch_real=10,
        augment=utils.Augment(8),
        compiler=compilation.Compiler(compile=False),
    )
    steps = []

    def step(thetas, momenta, x, y, rates):
        if not steps:
            os.kill(os.getpid(), signal.SIGTERM)
        steps.append(rates)
        return thetas, momenta

    plan = Plan(torch.zeros(20, 3, 8, 8), torch.zeros(20, dtype=torch.int64), 0.01, ())
    trainee = Trainee(plan, network, None, random)
    with stop, pytest.raises(Stopped):
        evaluator.train_together(step, [trainee])
    assert len(steps) == 2  # the batches of an epoch


def test_resume_needs_no_other_flags_from_any_folder(
    start, finish, specks_run, undisturbed, tmp_path
):
    process = start(DISTILLATION, *specks_run, cwd=tmp_path)
    process.wait_for("        3 ConvNetW32")
    process.kill()
    process.wait()
    moved = (tmp_path / "elsewhere").resolve()
    shutil.move(folder_of(tmp_path), moved)
    out = finish(DISTILLATION, f"--resume={moved}", "--wandb_mode=disabled", cwd=tmp_path)
    assert "resuming at iteration" in out and str(moved) in out.splitlines()[-1]
    images, reference = (
        torch.load(folder / "images_9.pt", weights_only=True)
        for folder in (moved, folder_of(undisturbed))
    )
    assert torch.equal(images, reference)


def test_a_finished_run_is_only_reported_again(finish, specks_run, undisturbed):
    folder = folder_of(undisturbed)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    out = finish(DISTILLATION, *specks_run, cwd=undisturbed)
    assert "finished before, at iteration 9" in out
    assert "Best iteration" in out and "iteration network" not in out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("how", ["by name", "by folder"])
def test_a_finished_run_goes_on_with_more_iterations(
    finish, start, specks_run, undisturbed, tmp_path, how
):
    finish(DISTILLATION, *specks_run, "--Iteration=6", cwd=tmp_path)
    names = [*specks_run, "--Iteration=9"]
    folder = [f"--resume={folder_of(tmp_path)}", "--Iteration=9", "--wandb_mode=disabled"]
    finish(DISTILLATION, *(names if how == "by name" else folder), cwd=tmp_path)
    for path in folder_of(tmp_path).glob("*_6.pt"):  # kept, since they were the last
        path.unlink()
    assert_same(tmp_path, undisturbed)
    process = start(DISTILLATION, *specks_run, "--Iteration=5", cwd=tmp_path)
    assert process.wait() == 2
    *_, line = process.output().splitlines()
    assert "--Iteration=5: the run in" in line and "is at iteration 9 already: give more" in line


def test_a_resumed_run_may_be_evaluated_in_another_way(finish, specks_run, tmp_path):
    finish(DISTILLATION, *specks_run, "--Iteration=2", "--eval_it=2", cwd=tmp_path)
    more = ["--Iteration=4", "--eval_it=1", "--num_eval=3", "--epoch_eval_train=2"]
    out = finish(DISTILLATION, *specks_run, *more, "--eval_mode=M", cwd=tmp_path)
    results = json.loads((folder_of(tmp_path) / "results.json").read_text())
    seen = [(row["iteration"], row["epochs"], len(row["scores"])) for row in results["evaluations"]]
    assert [row[2] for row in seen] == [1, 1, 2, 2, 2]
    assert [row[0] for row in seen] == [0, 2, 2, 3, 4] and seen[-1][1] == 2 != seen[0][1]
    assert all(len(s["test"]) == 3 for s in results["evaluations"][-1]["scores"].values())
    assert results["settings"]["eval_it"] == 1 and results["best_iteration"] >= 2
    record = json.loads((folder_of(tmp_path) / "run.json").read_text())
    assert record["settings"]["num_eval"] == record["flags"]["num_eval"] == 3
    assert "MLP" in out


def test_a_finished_run_stays_as_it_is_and_its_baselines_follow_its_evaluations(
    finish, specks_run, tmp_path
):
    finish(DISTILLATION, *specks_run, "--Iteration=2", "--eval_it=2", cwd=tmp_path)
    record = (folder_of(tmp_path) / "run.json").read_bytes()
    other = ["--eval_it=1", "--epoch_eval_train=3"]
    out = finish(DISTILLATION, *specks_run, *other, "--Iteration=2", cwd=tmp_path)
    assert "finished before" in out
    assert (folder_of(tmp_path) / "run.json").read_bytes() == record
    finish(DISTILLATION, *specks_run, *other, "--Iteration=3", cwd=tmp_path)
    results = json.loads((folder_of(tmp_path) / "results.json").read_text())
    assert {row["epochs"] for row in results["random_real"]} == {3}
    assert results["best_iteration"] == 3  # the only one of so many epochs


def test_a_run_starts_from_another_ones_images_labels_and_step_size(
    finish, start, specks_run, undisturbed, tmp_path
):
    source = folder_of(undisturbed)
    best, alpha = (
        torch.load(source / f"{name}_best.pt", weights_only=True) for name in ("images", "syn_lr")
    )
    flags = [*specks_run, "--lr_img=3", f"--pix_init={source}"]
    flags = [flag for flag in flags if not flag.startswith("--lr_teacher")]
    finish(DISTILLATION, *flags, "--Iteration=0", cwd=tmp_path)
    first = torch.load(folder_of(tmp_path) / "images_0.pt", weights_only=True)
    assert torch.equal(first, best)
    assert torch.load(folder_of(tmp_path) / "syn_lr_0.pt", weights_only=True) == alpha
    settings = json.loads((folder_of(tmp_path) / "run.json").read_text())["settings"]
    assert settings["pix_init"].startswith("set ")

    process = start(DISTILLATION, *flags, "--ipc=2", "--run_name=other", cwd=tmp_path)
    assert process.wait() == 2
    assert "change --ipc" in process.output().splitlines()[-1]
    torch.save(torch.tensor([[0.5, 0.5], [0.1, 0.9]]), tmp_path / "labels_soft.pt")
    shutil.copy(source / "images_best.pt", tmp_path / "images_soft.pt")
    soft = [*specks_run, f"--pix_init={tmp_path / 'images_soft.pt'}", "--run_name=soft"]
    process = start(DISTILLATION, *soft, cwd=tmp_path)
    assert process.wait() == 2
    assert "are probabilities: add --labels=soft" in process.output().splitlines()[-1]
    finish(DISTILLATION, *soft, "--labels=learned", "--Iteration=0", cwd=tmp_path)
    (labels,) = tmp_path.glob("logged_files/*/soft/labels_0.pt")
    expected = torch.load(tmp_path / "labels_soft.pt", weights_only=True)
    torch.testing.assert_close(torch.load(labels, weights_only=True), expected)


@pytest.mark.parametrize("how", ["--run_name=run", "--resume=logged_files/ImageFolder/run"])
def test_other_settings_are_not_resumed_and_each_is_named(start, specks_run, undisturbed, how):
    flags = [flag for flag in specks_run if not flag.startswith("--run_name")]
    process = start(DISTILLATION, *flags, how, "--lr_img=3", "--syn_steps=1", cwd=undisturbed)
    assert process.wait() == 2
    *_, line = process.output().splitlines()
    assert ": lr_img=1000.0 (here 3.0), syn_steps=2 (here 1). Use the same, or another" in line
    assert "--run_name" in line


def test_a_run_does_not_continue_with_other_experts(
    start, specks_run, specks_buffers, undisturbed, tmp_path
):
    shutil.copytree(undisturbed / "logged_files", tmp_path / "logged_files")
    copy = shutil.copytree(specks_buffers, tmp_path / "buffers")
    (folder_with(copy) / "replay_buffer_1.pt").unlink()
    process = start(DISTILLATION, *specks_run, f"--buffer_path={copy}", cwd=tmp_path)
    assert process.wait() == 2
    *_, line = process.output().splitlines()
    assert "was started with other experts" in line and "--buffer_path" in line


def test_only_leftovers_of_this_project_are_removed(tmp_path):
    ours = tmp_path / f".images_best.pt.123{files.TEMPORARY}", tmp_path / ".expert_7.lock"
    theirs = tmp_path / ".other.tmp", tmp_path / "notes.tmp"
    for path in (*ours, *theirs):
        path.touch()
    (tmp_path / f".unpack{files.TEMPORARY}").mkdir()
    with files.locked(tmp_path, ".expert_8.lock"), files.locked(tmp_path):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".expert_8.lock", ".lock", ".other.tmp", "notes.tmp"]


def test_two_processes_do_not_share_a_run(start, specks_run, tmp_path):
    first = start(DISTILLATION, *specks_run, "--epoch_eval_train=100000", cwd=tmp_path)
    first.wait_for("iteration network")
    second = start(DISTILLATION, *specks_run, "--epoch_eval_train=100000", cwd=tmp_path)
    assert second.wait() == 2
    assert "another process is working on the run in" in second.output()
    assert "--run_name" in second.output()
    first.kill()
    first.wait()


def test_wandb_continues_the_same_run(start, finish, specks_run, tmp_path):
    flags = [*specks_run, "--Iteration=15", "--wandb_mode=offline"]
    process = start(DISTILLATION, *flags, cwd=tmp_path)
    process.wait_for("        3 ConvNetW32")
    process.kill(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    out = finish(DISTILLATION, *flags, cwd=tmp_path)
    logs = sorted((folder_of(tmp_path) / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2, process.output() + out
    assert len({path.stem for path in logs}) == 1  # named after the run's id
    assert [row["Progress"] for row in history(folder_of(tmp_path))] == list(range(16))


def test_a_run_that_diverges_names_where_and_keeps_its_last_checkpoint(start, specks_run, tmp_path):
    flags = [*specks_run, "--lr_lr=10", "--checkpoint_every=1", "--epoch_eval_train=1"]
    process = start(DISTILLATION, *flags, cwd=tmp_path)
    assert process.wait() == 2
    last = process.output().splitlines()[-1]
    parts = ["error: diverged at iteration", "replay_buffer_", "start epoch", "α is not positive"]
    parts += ["α = -", "Lower --lr_lr", "--lr_img", "--syn_steps"]
    for part in parts:
        assert part in last
    checkpoint = torch.load(folder_of(tmp_path) / "checkpoint.pt", weights_only=True)
    assert checkpoint["current_alpha"] > 0
    assert f"iteration {len(checkpoint['losses'])} " in last


def test_out_of_memory_names_the_flags_that_need_less(start, specks_run, tmp_path):
    flags = [*specks_run, "--texture", "--canvas_samples=5000000"]
    process = start(DISTILLATION, *flags, cwd=tmp_path, RLIMIT_AS=8 * 2**30)
    assert process.wait() == 2
    last = process.output().splitlines()[-1]
    assert "distillation.py: error: out of memory" in last
    assert "--batch_syn" in last and "--unroll=adjoint" in last


# --------------------------------------------------------------------------------------------------
# Experts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_training_of_experts_with_a_line(start, specks_experts, tmp_path, number):
    flags = [*specks_experts, "--num_experts=1", "--train_epochs=5000"]
    process = start(EXPERTS, *flags, f"--buffer_path={tmp_path / 'buffers'}", cwd=tmp_path)
    process.wait_for("0 of 1 experts are in")
    time.sleep(0.3)
    process.kill(number)
    assert process.wait() == 128 + number
    last = process.output().splitlines()[-1]
    assert f"{EXPERTS}: stopped by {number.name}; the same command starts again" in last
    assert not hidden(folder_with(tmp_path / "buffers"))


def test_experts_killed_before_any_of_their_renames_end_as_if_undisturbed(
    start, finish, specks_experts, specks_folder, specks_buffers, tmp_path
):
    """These are all the states that a kill leaves, that of the data's cache among them."""
    kept = set()
    for number in itertools.count(1):
        data, buffers = tmp_path / "data", tmp_path / "buffers"
        shutil.copytree(specks_folder, data, ignore=shutil.ignore_patterns("*.pt"))
        buffers.mkdir()
        flags = [*specks_experts, f"--data_path={data}", f"--buffer_path={buffers}"]
        flags += ["--num_experts=2"]
        process = start(EXPERTS, *flags, cwd=tmp_path, kill_at=number)
        if process.wait() == 0:
            break
        assert process.wait() == -signal.SIGKILL, process.output()
        assert_readable(tmp_path)
        before = experts_by_seed(buffers)
        kept.add(len(before))
        assert f"{len(before)} of 2 experts are in" in finish(EXPERTS, *flags, cwd=tmp_path)
        ours, theirs = experts_by_seed(buffers), experts_by_seed(specks_buffers)
        assert set(ours) == {0, 1}
        for seed in ours:
            assert all(torch.equal(p, q) for p, q in zip(ours[seed], theirs[seed], strict=True))
        assert not hidden(tmp_path)
        shutil.rmtree(data)
        shutil.rmtree(buffers)
    assert number == 6  # of the data's cache, and of a record and a file for each expert
    assert kept == {0, 1}


@pytest.mark.parametrize("moment", ["experts are in", "expert 0", "expert 2"])
def test_experts_killed_at_any_moment_end_as_if_undisturbed(
    start, finish, specks_experts, specks_buffers, tmp_path, moment
):
    flags = [*specks_experts, f"--buffer_path={tmp_path}"]
    process = start(EXPERTS, *flags, cwd=tmp_path)
    process.wait_for(moment)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert_readable(tmp_path)
    before = experts_by_seed(tmp_path)
    assert len(before) < 8
    assert f"{len(before)} of 8 experts are in" in finish(EXPERTS, *flags, cwd=tmp_path)
    assert_same_experts(tmp_path, specks_buffers)
    assert not hidden(tmp_path)


def test_four_writers_share_a_folder_and_one_that_dies_gives_its_expert_back(
    start, finish, specks_experts, specks_buffers, tmp_path
):
    flags = [*specks_experts, f"--buffer_path={tmp_path}"]
    dying = start(EXPERTS, *flags, cwd=tmp_path, kill_at=1)  # with an expert trained, not saved
    writers = [start(EXPERTS, *flags, cwd=tmp_path) for _ in range(3)]
    assert dying.wait() == -signal.SIGKILL
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    last = finish(EXPERTS, *flags, cwd=tmp_path)  # where the dead one's came free too late
    outputs = [writer.output() for writer in writers]
    trained = [
        line.split()[1]
        for out in (*outputs, last)
        for line in out.splitlines()
        if line.startswith("expert ")
    ]
    assert sorted(trained) == [str(number) for number in range(8)]  # each of them once
    assert_same_experts(tmp_path, specks_buffers)
    assert not hidden(tmp_path)


def load(buffers):
    """The experts as a distillation draws them."""
    network = utils.initial_network("ConvNetW32", Form(2, 8), utils.make_generator(0), "cpu")
    shapes = [p.shape for p in network.parameters()]
    return load_experts(folder_with(buffers), shapes, None, None, False)


def test_an_expert_that_is_missing_is_trained_again_and_nothing_depends_on_the_order(
    finish, specks_experts, specks_buffers, tmp_path
):
    buffers = shutil.copytree(specks_buffers, tmp_path / "buffers")
    folder = folder_with(buffers)
    for number in (0, 5):
        (folder / f"replay_buffer_{number}.pt").unlink()
    out = finish(EXPERTS, *specks_experts, f"--buffer_path={buffers}", cwd=tmp_path)
    assert "6 of 8 experts are in" in out
    assert_same_experts(buffers, specks_buffers)
    ours, theirs = load(buffers), load(specks_buffers)
    assert ours.digest() == theirs.digest()
    for expert in range(8):
        pairs = zip(ours.segment(expert, 0, 2, "cpu"), theirs.segment(expert, 0, 2, "cpu"))
        assert all(torch.equal(p, q) for p, q in pairs)
