"""Other people's machines: limits of a job, launchers, signals, outputs, file systems, imports."""

import errno
import io
import os
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluation
from datasets.preprocessing import Form
from run.scores import Evaluations, Scores
from system import compilation, files, process, ranks, resources
from system.process import ReportedError, Stopped
from utils import Augment

CPU = torch.device("cpu")
SCRIPT = "distillation.py"

# --------------------------------------------------------------------------------------------------
# What a job or a container may use


def system_files(root, monkeypatch, **contents):
    """Files by which Linux says what a process may use, below `root` instead of /."""
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(resources, "ROOT", root)


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    64000000 kB\n"}
VERSION_2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/memory.max": "2000000000\n",  # of a parent
    "sys/fs/cgroup/job/memory.current": "700000000\n",
    "sys/fs/cgroup/job/memory.stat": "anon 5\ninactive_file 200000000\n",
    "sys/fs/cgroup/job/cpu.max": "250000 100000\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
    "sys/fs/cgroup/job/step/memory.current": "700000000\n",
    "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
}
VERSION_1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/\n",
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2000000000\n",
    "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "700000000\n",
    "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 200000000\n",
    "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "250000\n",
    "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
}
# Within a container, the path is the host's, and only the container's own group is there.
CONTAINER = {
    "proc/self/cgroup": "4:memory:/docker/0a1b\n5:cpu:/docker/0a1b\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    "group, free, cores",
    [({}, 65.536e9, 8), (VERSION_2, 1.5e9, 3), (VERSION_1, 1.5e9, 3), (CONTAINER, 1.5e9, 8)],
    ids=["none", "version 2", "version 1", "container"],
)
def test_memory_and_cores_are_those_of_the_job(tmp_path, monkeypatch, group, free, cores):
    system_files(tmp_path, monkeypatch, **MEMINFO, **group)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert resources.free_memory(CPU) == free
    assert resources.activation_memory(None, CPU) == free / 8
    assert resources.available_cores() == cores


def test_cores_are_those_of_the_affinity_and_threads_are_no_more(tmp_path, monkeypatch):
    system_files(tmp_path, monkeypatch, **MEMINFO)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert resources.available_cores() == 2
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    resources.limit_threads()
    assert chosen == []  # OMP_NUM_THREADS is the user's choice
    monkeypatch.delenv("OMP_NUM_THREADS")
    resources.limit_threads()
    assert chosen == [2]


def test_a_limit_of_the_process_counts_as_memory(tmp_path, monkeypatch):
    status = {"proc/self/status": "VmSize:    1000000 kB\n"}
    system_files(tmp_path, monkeypatch, **MEMINFO, **status)
    limit = 3_000_000 * 1024, resources.resource.RLIM_INFINITY
    monkeypatch.setattr(resources.resource, "getrlimit", lambda _: limit)
    assert resources.free_memory(CPU) == 2_000_000 * 1024


@pytest.mark.parametrize("free, disabled", [(2**26, "1"), (2**33, None), (None, "1")])
def test_nccl_does_without_a_small_shared_memory(monkeypatch, free, disabled):
    monkeypatch.delenv("NCCL_SHM_DISABLE", raising=False)
    monkeypatch.setattr(resources, "shared_memory", lambda: free)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks.spare_shared_memory()
    assert os.environ.get("NCCL_SHM_DISABLE") == disabled


# --------------------------------------------------------------------------------------------------
# Launchers

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
WHOLE |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"LOCAL_RANK": None}, ["LOCAL_RANK not set", "WORLD_SIZE=2"]),
        ({"MASTER_ADDR": None, "RANK": ""}, ["RANK, MASTER_ADDR not set"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE=two", "no whole number from 2"]),
        ({"RANK": "2"}, ["RANK=2", "from 0 to 1"]),
        ({"LOCAL_RANK": "-1"}, ["LOCAL_RANK=-1"]),
        ({"MASTER_PORT": "0"}, ["MASTER_PORT=0"]),
        ({"WORLD_SIZE": None, "RANK": "1"}, ["RANK=1", "WORLD_SIZE"]),
    ],
)
def test_odd_variables_of_a_launcher_are_named(monkeypatch, capsys, change, words):
    for name, value in (WHOLE | change).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(process, "silence", lambda: None)
    monkeypatch.setattr(process.time, "sleep", lambda _: None)
    with pytest.raises(ReportedError) as error:
        process.check_launcher()
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0"}, {"WORLD_SIZE": ""}])
def test_variables_that_mean_one_process_are_taken(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    process.check_launcher()
    assert not process.is_distributed()


def test_a_host_that_does_not_resolve_is_named_in_one_line(forked, tmp_path):
    flags = ["--dataset=ToySAT", "--objective=loss", "--no-compile"]
    host = WHOLE | {"MASTER_ADDR": "nowhere.invalid"}
    done = forked(SCRIPT, *flags, cwd=tmp_path, **host)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "MASTER_ADDR=nowhere.invalid cannot be found" in done.stderr


def test_ranks_pass_on_tensors_and_numbers_but_no_code():
    item = {"a": [1, None, 2.5, "α"], "b": torch.arange(3)}
    again = ranks.unpack(ranks.pack(item))
    assert again["a"] == item["a"] and torch.equal(again["b"], item["b"])
    for code in (print, io.StringIO()):
        with pytest.raises(Exception, match=r"Weights only|[Cc]an't pickle|cannot pickle"):
            ranks.unpack(ranks.pack(code))


class Others(ranks.Ranks):
    """Two ranks, of which this is one; `other` is what the other one gathers."""

    size = 2

    def __init__(self, other):
        self.other = other
        self.given = []

    def gather(self, item):
        self.given.append(item)
        return [item, self.other]


def evaluator_of(monkeypatch, others, evaluate_some):
    monkeypatch.setattr(evaluation.Evaluator, "fresh", lambda *_: None)
    monkeypatch.setattr(evaluation.Evaluator, "train_and_test", evaluate_some)
    return evaluation.Evaluator(
        data=SimpleNamespace(form=Form(2, 8), device=CPU),
        pool={"MLP": None},
        num_eval=2,
        epochs=1,
        batch_train=1,
        batch_real=1,
        augment=Augment(8),
        compiler=None,
        ranks=others,
    )


def test_a_signal_to_one_rank_in_an_evaluation_stops_all(monkeypatch):
    """A rank that is stopped tells the others where they gather accuracies."""
    tested = [[0.5, 0.5, [0.5, 0.5], True]]
    images, labels = torch.zeros(2, 3, 8, 8), torch.arange(2)

    def whole(*_):
        return tested

    def stopped(*_):
        raise Stopped(signal.SIGTERM, "")

    evaluate = evaluator_of(monkeypatch, Others([int(signal.SIGTERM), []]), whole)
    with pytest.raises(Stopped) as error:
        evaluate(images, labels, 0.1, (0,))
    assert error.value.args[0] == signal.SIGTERM
    evaluate = evaluator_of(monkeypatch, Others([None, tested]), stopped)
    with pytest.raises(Stopped):
        evaluate(images, labels, 0.1, (0,))
    assert evaluate.ranks.given == [[signal.SIGTERM, []]]
    evaluate = evaluator_of(monkeypatch, Others([None, tested]), whole)
    assert evaluate(images, labels, 0.1, (0,))["MLP"].test == [0.5, 0.5]


def test_a_diverged_network_is_selected_only_where_all_have_diverged():
    good, chance = Scores([0.2], [0.2]), Scores([0.5], [0.5], diverged=1)
    rows = Evaluations()
    for number, scores in enumerate((chance, good, chance)):
        rows.add({"MLP": scores}, 0.1, [1.0] * number, 1.0, 5)
    assert rows.best["iteration"] == 1
    rows.rows = [row for row in rows.rows if row["iteration"] != 1]
    assert rows.best["iteration"] == 0


# --------------------------------------------------------------------------------------------------
# Signals and outputs


ENDLESS = ["--Iteration=100000", "--lr_img=0", "--lr_lr=0"]  # nothing can diverge


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_signals_of_schedulers_and_terminals_save_the_run(start, specks_run, tmp_path, name):
    number = getattr(signal, name)
    running = start(SCRIPT, *specks_run, *ENDLESS, cwd=tmp_path, curves=False)
    running.wait_for("0 ConvNetW32")  # the first evaluation
    running.kill(number)
    assert running.wait() == 128 + number
    assert f"stopped by {name}; iteration" in running.output()
    assert (tmp_path / "logged_files/ImageFolder/run/checkpoint.pt").exists()


def shell(command, tmp_path, flags):
    """Run the script as part of a shell's command line, in which SCRIPT stands for it."""
    words = [sys.executable, str(Path(__file__).parents[1] / SCRIPT), *map(str, flags)]
    command = command.replace("SCRIPT", " ".join(map(shlex.quote, words)))
    return subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )


def test_a_pipe_that_nobody_reads_ends_the_run_with_a_checkpoint(specks_run, tmp_path):
    command = "SCRIPT 2>err.txt | head -1; echo ${PIPESTATUS[0]}"
    done = shell(command, tmp_path, [*specks_run, *ENDLESS])
    assert done.stdout.splitlines()[-1] == str(128 + signal.SIGPIPE)
    last = (tmp_path / "err.txt").read_text().splitlines()[-1]
    assert "stopped by SIGPIPE; iteration" in last
    assert (tmp_path / "logged_files/ImageFolder/run/checkpoint.pt").exists()


def test_closed_outputs_do_not_break_a_run(specks_run, tmp_path):
    done = shell("SCRIPT >&- 2>&-", tmp_path, specks_run)
    assert done.returncode == 0 and not done.stdout + done.stderr
    assert (tmp_path / "logged_files/ImageFolder/run/results.json").exists()


def test_control_characters_do_not_cut_a_message(forked, tmp_path):
    done = forked(SCRIPT, "--evaluate=a\nb\x1bc", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and r"a\nb\x1bc" in line


# --------------------------------------------------------------------------------------------------
# Imports


def test_variables_that_libraries_read_when_imported_do_not_break_the_scripts(run, tmp_path):
    environment = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere",
    }
    done = run(SCRIPT, "--version", cwd=tmp_path, **environment)
    assert done.returncode == 0 and done.stdout.strip() == process.VERSION
    assert "TORCHINDUCTOR_CACHE_DIR=/proc/nowhere cannot be made" in done.stderr


# --------------------------------------------------------------------------------------------------
# File systems


def test_a_file_that_cannot_be_mapped_is_read(tmp_path, monkeypatch):
    path = tmp_path / "cache.pt"
    torch.save({"a": torch.arange(5)}, path)

    def without_mmap(*args, load=torch.load, mmap=False, **options):
        if mmap:
            raise RuntimeError("unable to mmap 5 bytes from file <cache.pt>: No such device (19)")
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", without_mmap)
    assert files.read_cache(path, "a")["a"].tolist() == [0, 1, 2, 3, 4]


def test_a_file_system_that_cannot_sync_is_written_to(tmp_path, monkeypatch):
    def no_sync(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", no_sync)
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert files.read_json(tmp_path / "a.json", a=int) == {"a": 1}


def test_a_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "cache.pt"
    torch.save({"a": torch.ones(1000)}, path)
    assert files.damage(path) is None
    content = bytearray(path.read_bytes())
    place = content.index(torch.ones(1000).numpy().tobytes())
    content[place + 2003] ^= 0x40  # an exponent
    path.write_bytes(content)
    assert "data/0 does not have its checksum" in files.damage(path)
    with pytest.warns(UserWarning, match="is damaged .*making it again"):
        assert files.read_cache(path, "a") is None


def test_a_cache_that_cannot_be_written_is_not_taken_for_a_missing_compiler():
    unwritable = RuntimeError("backend='inductor' raised:")
    unwritable.inner_exception = PermissionError(errno.EACCES, "Permission denied", "/cache/x")
    fault, remedy = compilation.compile_fault(unwritable)
    assert "/cache/x" in fault and "TORCHINDUCTOR_CACHE_DIR" in remedy
    fault, remedy = compilation.compile_fault(RuntimeError("no g++"))
    assert fault == "no g++" and "C++ compiler" in remedy
