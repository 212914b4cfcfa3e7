"""Several processes for one run: the same as one, and what happens when one of them ends."""

import contextlib
import functools
import io
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import arguments, make_state
from outcomes import assert_same_experts, folder_of, hidden
from processes import ROOT, Process, context, start_server

import evaluation
import utils
from datasets.preprocessing import Data, Form
from evaluation import Evaluator
from objectives.real_loss import RealLoss, real_loss
from objectives.segments import Segments, check_shares
from objectives.trajectory import MatchTrajectory
from reparam_module import AdjointUnroll, ReparamModule
from system import process
from system.compilation import Compiler
from system.ranks import join
from trajectories import Expert, Experts
from utils import Augment

DISTILLATION, EXPERTS = "distillation.py", "expert_trajectories.py"
CLASSES, SIDE = 4, 8
FORM = Form(CLASSES, SIDE)
DSA = utils.augment_groups(True, utils.DSA_STRATEGY)


def variables(rank, size, port):
    """What torchrun sets for each process."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --------------------------------------------------------------------------------------------------
# One iteration and one evaluation, in float64


def make_data():
    random = utils.make_generator("data")
    part = torch.randn(16, 3, SIDE, SIDE, generator=random), torch.arange(16) % CLASSES
    return Data(part, part, part, tuple("abcd"), {"mean": [0.0] * 3, "std": [1.0] * 3}, None)


def make_experts(student):
    random = utils.make_generator("experts")
    size = student.num_params

    def snapshots():
        thetas = (0.3 * torch.randn(size, generator=random) for _ in range(4))
        return [[p.view(s) for p, s in zip(t.split(student.sizes), student.shapes)] for t in thetas]

    return Experts([Expert(snapshots(), str(number), None) for number in range(3)])


def computed(ranks, objective, shard_batch, windows):
    """L and its gradients of one iteration with four segments, the same on every rank."""
    data, cpu = make_data(), torch.device("cpu")
    random = utils.make_generator("student")
    student = ReparamModule(utils.initial_network("ConvNetD1", FORM, random, cpu).double())
    kinds = {"objective": objective, "ipc": 2, "pix_init": "noise", "texture": windows > 0}
    kinds["labels"] = "hard" if windows else "learned"
    one_hot = torch.eye(CLASSES).repeat_interleave(2, 0)
    state = make_state(arguments(**kinds), data, one_hot)
    if objective == "trajectory":
        goal = MatchTrajectory(make_experts(student), 2, 2, cpu)
    else:
        goal = RealLoss("ConvNetD1", data, Augment(SIDE, DSA), 8, 5, 3, real_loss(student))
    augment = Augment(SIDE, DSA, windows)
    options = {"mean": lambda tensor: ranks.mean([tensor])[0]} if shard_batch else {}
    options["momentum"] = 0.0 if windows else 0.5
    unroll = AdjointUnroll(student, state.batch_maker(augment), memory=1e9, **options)
    how = {"seed": 0, "shard_batch": shard_batch, "ranks": ranks}
    segments = Segments(goal, unroll, unroll.advance, augment, 4, 3, CLASSES, **how)
    step = segments(state, 3)
    return step.loss, *step.gradients.values()


def evaluated(ranks):
    """The scores of five networks, and what a search of α prints.

    Two ranks have three of the networks and two, four ranks two and one.
    """
    data = make_data()
    how = {"batch_train": 8, "batch_real": 8, "compiler": Compiler(False), "ranks": ranks}
    evaluator = Evaluator(data, {"MLP": None}, 5, 3, augment=Augment(SIDE, DSA), **how)
    scores = vars(evaluator(*data.train, 0.05, (0, "key"))["MLP"])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        evaluation.search_alphas(evaluator, *data.train, (0,))
    return scores, shown.getvalue().splitlines()


KINDS = {
    f"{objective}, {'batches' if shard_batch else 'segments'}, {windows} windows": (
        objective,
        shard_batch,
        windows,
    )
    for objective, shard_batch, windows in [
        ("trajectory", False, 0),
        ("loss", False, 0),
        ("trajectory", True, 0),
        ("trajectory", True, 2),
        ("loss", True, 0),
    ]
}


def compute(path, environment):
    """In a process of its own: all that the tests compare, written by rank 0."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    ranks = join(torch.device("cpu"))
    content = {name: computed(ranks, *kind) for name, kind in KINDS.items()}
    content["scores"], content["search"] = evaluated(ranks)
    seen = ranks.gather([gradient.sum() for gradient in content["loss, batches, 0 windows"]])
    content["alike"] = all(torch.equal(*pair) for s in seen for pair in zip(s, seen[0]))
    if ranks.is_first:
        torch.save(content, path)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What 1, 2 and 4 ranks compute, by their number."""
    start_server({"OMP_NUM_THREADS": "1"})
    folder = tmp_path_factory.mktemp("ranks")
    for size in (1, 2, 4):
        port, path = free_port(), folder / f"{size}.pt"
        todo = [(path, variables(rank, size, port)) for rank in range(size)]
        running = [context.Process(target=compute, args=args, daemon=True) for args in todo]
        for each in running:
            each.start()
        for each in running:
            each.join(120)
            assert each.exitcode == 0
    return {size: torch.load(folder / f"{size}.pt", weights_only=True) for size in (1, 2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_on_any_number_of_ranks(results, kind, size):
    assert len(results[1][kind]) >= 3  # the loss, its gradients by images and α, and labels
    for ours, alone in zip(results[size][kind], results[1][kind], strict=True):
        assert alone.abs().max() > 1e-6
        assert (ours - alone).norm() <= 1e-12 * alone.norm()
    assert results[size]["alike"]


@pytest.mark.parametrize("size", [2, 4])
def test_evaluations_are_the_same_on_any_number_of_ranks_bit_for_bit(results, size):
    assert len(set(results[1]["scores"]["test"])) > 1
    assert results[size]["scores"] == results[1]["scores"]
    assert len(set(results[1]["search"])) == len(evaluation.ALPHAS)
    assert results[size]["search"] == results[1]["search"]


@pytest.mark.parametrize(
    "count, shard_batch, batch_syn, size, parts",
    [
        (3, False, 10, 2, ["--segments=3", "2 processes", "multiple of 2"]),
        (1, False, 10, 4, ["--segments=1", "4 processes", "--shard_batch"]),
        (1, True, 10, 4, ["--shard_batch", "batches of 10", "4 processes"]),
        (1, True, 4, 4, ["--shard_batch", "batches of 2 ", "4 processes"]),
    ],
)
def test_work_that_cannot_be_shared_out_evenly_is_refused(
    count, shard_batch, batch_syn, size, parts
):
    args = arguments(segments=count, shard_batch=shard_batch, batch_syn=batch_syn)
    with pytest.raises(process.ReportedError) as error:
        check_shares(args, Form(10, 64), size)
    assert all(part in str(error.value) for part in parts)


def test_what_can_be_shared_out_is_not_refused():
    for segments, shard_batch, batch_syn, size in (
        (1, False, 10, 1),
        (4, False, 10, 2),
        (1, True, 10, 5),
        (1, True, 4, 2),
    ):
        args = arguments(segments=segments, shard_batch=shard_batch, batch_syn=batch_syn)
        check_shares(args, Form(10, 64), size)


# --------------------------------------------------------------------------------------------------
# Whole runs


class Group:
    """The processes that torchrun would start, without torchrun."""

    def __init__(self, *command, size, cwd, home, last=()):
        """`last` are further flags of the last rank."""
        port = free_port()
        self.processes = []
        for rank in range(size):
            out = cwd / f"rank_{rank}.txt"
            environment = {"HOME": str(home)} | variables(rank, size, port)
            flags = [*command, *(last if rank == size - 1 else [])]
            each = Process([str(part) for part in flags], cwd, out, out, environment)
            self.processes.append(each)

    def wait(self):
        return [each.wait() for each in self.processes]

    def output(self, rank):
        return self.processes[rank].output()


@pytest.fixture
def group(home):
    start_server({"OMP_NUM_THREADS": "1"})
    return functools.partial(Group, home=home)


@pytest.fixture(scope="module")
def shared_run(specks_run):
    """Flags of a run of two segments per iteration, too slow for rounding to grow."""
    return [*specks_run, "--segments=2", "--num_eval=2", "--lr_img=0.01"]


@pytest.fixture(scope="module")
def alone(finish, shared_run, tmp_path_factory):
    """The working folder of that run in one process."""
    cwd = tmp_path_factory.mktemp("alone")
    finish(DISTILLATION, *shared_run, cwd=cwd)
    return cwd


def assert_close(cwd, reference):
    """Two runs have learned the same, but for the order of summation in float32."""
    for name in ("images_9.pt", "syn_lr_9.pt"):
        ours, theirs = (
            torch.load(folder_of(d) / name, weights_only=True) for d in (cwd, reference)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    files = [{path.name for path in folder_of(d).iterdir()} for d in (cwd, reference)]
    assert files[0] == files[1]


@pytest.mark.parametrize("how", [[], ["--shard_batch"]], ids=["segments", "batches"])
def test_a_run_on_two_ranks_ends_as_on_one_and_only_the_first_speaks(
    group, shared_run, alone, tmp_path, how
):
    ranks = group(DISTILLATION, *shared_run, *how, size=2, cwd=tmp_path)
    assert ranks.wait() == [0, 0], ranks.output(0) + ranks.output(1)
    assert_close(tmp_path, alone)
    assert "2 processes" in ranks.output(0) and "Peak memory by rank: " in ranks.output(0)
    assert "distilled images" in ranks.output(0) and "resuming" not in ranks.output(0)
    assert ranks.output(1) == ""


def test_a_rank_that_is_killed_ends_the_others_and_one_process_resumes(
    group, finish, shared_run, alone, tmp_path
):
    flags = [*shared_run, "--Iteration=50", "--eval_it=50"]
    ranks = group(DISTILLATION, *flags, size=2, cwd=tmp_path)
    ranks.processes[0].wait_for("        0 ConvNetW32")
    ranks.processes[1].kill()
    assert ranks.wait() == [2, -signal.SIGKILL]
    last = ranks.output(0).splitlines()[-1]
    assert "error: another process of this run has ended" in last
    assert "is saved: the same command resumes there" in last
    assert "Traceback" not in ranks.output(0)
    assert "resuming at iteration" in finish(DISTILLATION, *flags, cwd=tmp_path)


def test_a_rank_that_cannot_read_its_data_blames_no_checkpoint(group, shared_run, tmp_path):
    """Rank 1 names another --data_path: its flags are not rank 0's."""
    ranks = group(DISTILLATION, *shared_run, size=2, cwd=tmp_path, last=["--data_path=nowhere"])
    assert ranks.wait() == [2, 2]
    assert "rank 1: error: --data_path=nowhere" in ranks.output(1)
    last = ranks.output(0).splitlines()[-1]
    assert "error: another process of this run has ended" in last
    assert "damaged" not in ranks.output(0)


def test_ranks_of_other_settings_are_refused(group, shared_run, tmp_path):
    ranks = group(DISTILLATION, *shared_run, size=2, cwd=tmp_path, last=["--lr_img=3"])
    assert ranks.wait() == [2, 2]
    assert "rank 1: error: lr_img differ from those of rank 0" in ranks.output(1)


def test_more_signals_while_a_checkpoint_is_saved_change_nothing(group, shared_run, tmp_path):
    """As torchrun sends them to all when one process has ended, or passes them on."""
    ranks = group(DISTILLATION, *shared_run, "--Iteration=300", size=2, cwd=tmp_path)
    ranks.processes[0].wait_for("        3 ConvNetW32")
    for _ in range(3):
        for each in ranks.processes:
            each.kill(signal.SIGTERM)
        time.sleep(0.02)
    assert ranks.wait() == [128 + signal.SIGTERM] * 2
    assert "is saved: the same command resumes there" in ranks.output(0).splitlines()[-1]
    assert ranks.output(1) == ""
    assert not hidden(folder_of(tmp_path))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_saves_one_checkpoint_and_ends_all(
    group, shared_run, alone, tmp_path, finish, rank
):
    ranks = group(DISTILLATION, *shared_run, "--Iteration=300", size=2, cwd=tmp_path)
    ranks.processes[0].wait_for("        3 ConvNetW32")
    ranks.processes[rank].kill(signal.SIGTERM)
    codes = ranks.wait()
    last = ranks.output(0).splitlines()[-1]
    assert "is saved: the same command resumes there" in last
    assert codes[rank] == 128 + signal.SIGTERM and codes[1 - rank] != 0
    checkpoint = torch.load(folder_of(tmp_path) / "checkpoint.pt", weights_only=True)
    assert f"iteration {len(checkpoint['losses'])} is saved" in last
    reference = torch.load(folder_of(alone) / "checkpoint.pt", weights_only=True)["losses"]
    some = min(len(reference), len(checkpoint["losses"]))
    assert checkpoint["losses"][:some] == pytest.approx(reference[:some], rel=1e-4)


def test_experts_are_the_same_from_any_number_of_ranks(
    group, specks_experts, specks_buffers, tmp_path
):
    flags = [*specks_experts, f"--buffer_path={tmp_path}"]
    ranks = group(EXPERTS, *flags, size=2, cwd=tmp_path)
    assert ranks.wait() == [0, 0], ranks.output(0) + ranks.output(1)
    assert_same_experts(tmp_path, specks_buffers)
    lines = (ranks.output(0) + ranks.output(1)).splitlines()
    assert len([line for line in lines if line.startswith("expert ")]) == 8
    assert "\n8 of 8 experts are in" in ranks.output(0)
    assert all(line.startswith("expert ") for line in ranks.output(1).splitlines())


def test_torchrun_ends_all_within_a_minute_where_a_rank_cannot_read_its_data(
    specks_run, tmp_path, home
):
    """With the real torchrun: what all ranks find is said once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--standalone", ROOT / DISTILLATION, *specks_run, f"--data_path={tmp_path}"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"HOME": str(home)},
    )
    assert done.returncode == 1
    assert done.stderr.count("distillation.py: error: --data_path=") == 1


def test_one_process_starts_nothing_of_it(run, specks_run, tmp_path):
    code = (
        "import runpy, sys, torch.distributed as dist; sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(dist.is_initialized())"
    )
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    done = run(script, str(ROOT / DISTILLATION), *specks_run, "--Iteration=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
