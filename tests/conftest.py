"""Fixtures of all tests: small data sets on disk, ways to run the scripts, and cheap experts."""

import contextlib
import functools
import io
import itertools
import json
import os
import runpy
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, Process, start_server
from wandb.proto import wandb_internal_pb2

sys.path.insert(0, str(ROOT))

import distillation  # found through the line above
from cli import distillation_flags
from datasets import by_name
from datasets.toysat import write_toysat
from system import devices

# Those of the user, so that not every new home has matplotlib list the machine's fonts.
os.environ.setdefault("MPLCONFIGDIR", matplotlib.get_cachedir())
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-identical runs are promised for a CPU
os.environ["OMP_NUM_THREADS"] = "1"  # of processes; sums depend on it in their last bits
torch.set_num_threads(1)  # the same for this one
pytest.register_assert_rewrite("outcomes")
for variable in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[variable]


def arguments(**changes):
    """The defaults of distillation.py's flags as a namespace, with changes."""
    return distillation_flags.completed(distillation.make_parser(), changes)


def make_state(args, data, logits=None):
    """The state of a run that begins; `logits` are those of the experts' labels."""
    experts = SimpleNamespace(logits=lambda *_: logits)
    return distillation.initial_state(
        args, SimpleNamespace(data=data, experts=experts, student=None)
    )


def load_data(dataset, data_path, zca, val_fraction, device, im_size=None):
    """A data set, read and preprocessed."""
    selection = by_name.Selection(dataset, data_path, im_size, val_fraction, zca)
    raw = by_name.read_dataset(selection)
    return raw.preprocessed(torch.device(device))


def pytest_collection_modifyitems(items):
    """Skip tests marked `bfloat16` where the processor lacks it."""
    if not devices.has_bfloat16(torch.device("cpu")):
        for item in items:
            if item.get_closest_marker("bfloat16"):
                item.add_marker(pytest.mark.skip(reason="this processor has no bfloat16"))


def history(folder):
    """The rows that an offline run logged, as dictionaries, from its first start to its last."""
    return [row for path in pages(folder) for row in rows_of(path)]


def pages(folder):
    """The files of the offline runs in a folder, once all have rows.

    On a busy machine, wandb's own process may write them after the script's end.
    """
    for _ in range(40):
        found = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        if found and all(rows_of(path) for path in found):
            break
        time.sleep(0.25)
    return found


def rows_of(path):
    """The rows in a .wandb file."""
    rows = []
    for record in records_of(path.read_bytes()):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            names = (item.key or "|".join(item.nested_key) for item in items)
            rows.append(dict(zip(names, (json.loads(item.value_json) for item in items))))
    return rows


def records_of(content):
    """The records in a .wandb file, a LevelDB log of protobuf messages."""
    block = 32768
    head = 7  # of each record, and the file's own
    position = head
    part = b""
    while position + head <= len(content):
        if block - position % block < head:  # no record starts in the last bytes of a block
            position += block - position % block
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        position += head
        part += content[position : position + length]
        position += length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


@pytest.fixture(scope="session")
def golden():
    """A function that reads one of the reference files: `golden("unroll")`."""
    folder = ROOT / "tests" / "golden"
    return lambda name: torch.load(folder / f"{name}.pt", weights_only=True)


# --------------------------------------------------------------------------------------------------
# Data


@pytest.fixture(scope="session")
def eurosat_folder(tmp_path_factory):
    """ToySAT as class folders of 20 JPEGs. Not to be changed.

    160 training, 20 validation and 20 test images.
    """
    folder = tmp_path_factory.mktemp("eurosat")
    write_toysat(folder, per_class=20)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Six JPEGs per class. Not to be changed.

    With --val_fraction=0.5, 30 training, 20 validation and 10 test images.
    """
    folder = tmp_path_factory.mktemp("tiny")
    write_toysat(folder, per_class=6)
    return folder


@pytest.fixture(scope="session")
def specks_folder(tmp_path_factory):
    """The smallest data set: two classes of 20 pictures of 8×8 pixels. Not to be changed.

    With --val_fraction=0.2, 28 training, 8 validation and 4 test images.
    """
    folder = tmp_path_factory.mktemp("specks")
    random = np.random.default_rng(0)
    for axis, name in enumerate(("rows", "columns")):
        (folder / name).mkdir()
        stripes = np.where(np.indices((8, 8))[axis] % 2, 40, 0)[:, :, None]
        for number in range(20):
            pixels = stripes + random.integers(0, 200, (8, 8, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def zca_folder(tmp_path_factory):
    """A data set with its ZCA cache of 1.2 GB, which is removed as soon as the tests are done."""
    folder = tmp_path_factory.mktemp("zca")
    write_toysat(folder, per_class=6)
    load_data("EuroSAT", folder, zca=True, val_fraction=0.5, device="cpu")
    yield folder
    for cache in folder.glob("zca_*.pt"):
        cache.unlink()


# --------------------------------------------------------------------------------------------------
# Ways to run a script


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """The home of all scripts: an empty folder, so that nobody is logged in to wandb."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def run():
    """Run a script as a user does: `run(script, *flags, cwd=..., **environment)`.

    Only this pays the seconds to start Python and import torch.
    """

    def run_script(script, *flags, cwd, **environment):
        return subprocess.run(
            [sys.executable, ROOT / script, *flags],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",  # a test may choose another encoding than ours
            env=os.environ | environment,
        )

    return run_script


@pytest.fixture(scope="session")
def run_here(home):
    """The same in this process; warnings are pytest's to catch, and not on standard error."""

    def run_script(script, *flags, cwd):
        code = 0
        out, err = io.StringIO(), io.StringIO()
        environment = dict(os.environ)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [script, *map(str, flags)])
            patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which it changes
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as exit:
                code = exit.code
            finally:
                os.environ.clear()
                os.environ.update(environment)
        return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())

    return run_script


@pytest.fixture(scope="session")
def forked(tmp_path_factory, home):
    """Run a script in a fork of a process that has imported all: as `run`, but a start takes 0.1 s.

    Variables that PyTorch reads when it is imported have no effect.
    """
    folder = tmp_path_factory.mktemp("forked")
    numbers = itertools.count()
    start_server({"OMP_NUM_THREADS": "1"})

    def run_script(script, *flags, cwd, **environment):
        command = [script, *map(str, flags)]
        number = next(numbers)
        out, err = (folder / f"{number}.{kind}" for kind in ("out", "err"))
        code = Process(command, cwd, out, err, {"HOME": str(home)} | environment).wait()
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())

    return run_script


@pytest.fixture(scope="session")
def start(tmp_path_factory, home):
    """Start a script in a fork, as `forked` does, and go on: gives a `processes.Process`.

    `start(script, *flags, cwd=..., HOME=..., **options)`, options of `processes.Process`, and
    resource limits
    """
    folder = tmp_path_factory.mktemp("started")
    numbers = itertools.count()
    start_server({"OMP_NUM_THREADS": "1"})

    def start_script(
        script, *flags, cwd, HOME=home, kill_at=None, copies=None, curves=True, **limits
    ):
        command = [script, *map(str, flags)]
        out = folder / f"{next(numbers)}.txt"
        return Process(command, cwd, out, out, {"HOME": str(HOME)}, limits, kill_at, copies, curves)

    return start_script


@pytest.fixture(scope="session")
def finish(start):
    """Run a script in a fork to its end, which must be a good one: both its outputs."""

    def finish_script(script, *flags, cwd, curves=True):
        running = start(script, *flags, cwd=cwd, curves=curves)
        assert running.wait() == 0, running.output()
        return running.output()

    return finish_script


# --------------------------------------------------------------------------------------------------
# Experts


@pytest.fixture(scope="session")
def expert_flags(eurosat_folder):
    """Flags for experts that train within a second: add --buffer_path and --num_experts."""
    flags = ["--dataset=EuroSAT", f"--data_path={eurosat_folder}", "--model=ConvNetW32"]
    return [*flags, "--no-compile", "--train_epochs=3", "--batch_train=32"]


@pytest.fixture(scope="session")
def buffers(run_here, expert_flags, tmp_path_factory):
    """Folder with three ConvNetW32 experts of three epochs. Not to be changed."""
    folder = tmp_path_factory.mktemp("buffers")
    flags = [*expert_flags, "--num_experts=3", f"--buffer_path={folder}", "--wandb_mode=disabled"]
    done = run_here("expert_trajectories.py", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tiny_flags(tiny_folder):
    """Flags, for both scripts, under which even ResNet18 needs only seconds.

    Add --model and --buffer_path.
    """
    flags = ["--dataset=EuroSAT", f"--data_path={tiny_folder}", "--val_fraction=0.5"]
    return [*flags, "--no-compile", "--batch_train=10"]


@pytest.fixture(scope="session")
def tiny_buffers(run_here, tiny_flags, tmp_path_factory):
    """A function: the folder with one expert of one epoch of a model, trained when asked for."""
    folder = tmp_path_factory.mktemp("tiny_buffers")

    @functools.cache
    def train(model):
        flags = [*tiny_flags, f"--model={model}", f"--buffer_path={folder}", "--num_experts=1"]
        flags += ["--train_epochs=1", "--wandb_mode=disabled"]
        done = run_here("expert_trajectories.py", *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
        return folder

    return train


# --------------------------------------------------------------------------------------------------
# Runs of a second on the smallest data set, for tests that need many


@pytest.fixture(scope="session")
def specks_flags(specks_folder):
    """Flags for both scripts."""
    flags = ["--dataset=ImageFolder", f"--data_path={specks_folder}", "--im_size=8"]
    flags += ["--val_fraction=0.2", "--model=ConvNetW32", "--no-compile", "--wandb_mode=disabled"]
    return [*flags, "--batch_train=7"]


@pytest.fixture(scope="session")
def specks_experts(specks_flags):
    """Flags for eight experts of a fifth of a second each: add --buffer_path."""
    return [*specks_flags, "--num_experts=8", "--train_epochs=3", "--lr_teacher=0.1"]


@pytest.fixture(scope="session")
def specks_buffers(run_here, specks_experts, tmp_path_factory):
    """Folder with those eight experts. Not to be changed."""
    folder = tmp_path_factory.mktemp("specks_buffers")
    flags = [*specks_experts, f"--buffer_path={folder}"]
    done = run_here("expert_trajectories.py", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def specks_run(specks_flags, specks_buffers):
    """Flags for a distillation, evaluated and saved often, in logged_files/ImageFolder/run."""
    flags = [*specks_flags, f"--buffer_path={specks_buffers}", "--run_name=run"]
    flags += ["--expert_epochs=1", "--max_start_epoch=2", "--syn_steps=2", "--lr_teacher=0.1"]
    flags += ["--lr_lr=1e-4", "--Iteration=9", "--checkpoint_every=2", "--eval_it=3"]
    return [*flags, "--num_eval=1", "--epoch_eval_train=5", "--batch_real=8"]


@pytest.fixture(scope="session")
def undisturbed(finish, specks_run, tmp_path_factory):
    """The working folder of a run that nothing disturbed. Not to be changed."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    finish("distillation.py", *specks_run, cwd=cwd)
    return cwd
