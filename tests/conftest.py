"""Fixtures shared by all tests: small data sets on disk, ways to run the scripts, and cheap experts."""

import contextlib
import functools
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wandb.proto import wandb_internal_pb2

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA starts: bit-identical runs are promised for a CPU
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402  (found through the line above)
import utils  # noqa: E402  (found through the line above)


def pytest_collection_modifyitems(items):
    """Skip tests marked `bfloat16` where the processor lacks it."""
    if not utils.has_bfloat16(torch.device("cpu")):
        for item in items:
            if item.get_closest_marker("bfloat16"):
                item.add_marker(pytest.mark.skip(reason="this processor does not compute in bfloat16"))


def history(folder):
    """The rows that an offline run logged, as dictionaries, from its first start to its last."""
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        items = (record.history.item for record in records_of(path.read_bytes())
                 if record.WhichOneof("record_type") == "history")
        rows += [{item.key or "|".join(item.nested_key): json.loads(item.value_json) for item in row} for row in items]
    return rows


def records_of(content):
    """The records in a .wandb file, a LevelDB log of protobuf messages."""
    block, position, part = 32768, 7, b""
    while position + 7 <= len(content):
        if block - position % block < 7:  # no record starts in the last bytes of a block
            position += block - position % block
            continue
        length, kind = int.from_bytes(content[position + 4:position + 6], "little"), content[position + 6]
        part += content[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


@pytest.fixture(scope="session")
def golden():
    """A function that reads one of the reference files: `golden("unroll")`."""
    return lambda name: torch.load(ROOT / "tests" / "golden" / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="session")
def eurosat_folder(tmp_path_factory):
    """ToySAT as class folders of 20 JPEGs: 160 training, 20 validation and 20 test images. Not to be changed."""
    folder = tmp_path_factory.mktemp("eurosat")
    datasets.write_toysat(folder, per_class=20)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Six JPEGs per class, for slow networks: with --val_fraction=0.5, 30 training, 20 validation, 10 test images."""
    folder = tmp_path_factory.mktemp("tiny")
    datasets.write_toysat(folder, per_class=6)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Run a script as a user does, who is not logged in to wandb: `run(script, *flags, cwd=..., **environment)`."""
    home = tmp_path_factory.mktemp("home")

    def run_script(script, *flags, cwd, **environment):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        return subprocess.run([sys.executable, ROOT / script, *flags], cwd=cwd, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True,
                              env=inherited | {"HOME": str(home), "OMP_NUM_THREADS": "1"} | environment)

    return run_script


@pytest.fixture(scope="session")
def run_here():
    """The same in this process, which saves the seconds that it takes to start Python and import torch."""

    def run_script(script, *flags, cwd):
        out, err, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [script, *map(str, flags)])
            torch.set_num_threads(1)  # as in `run`: sums depend on the number of threads in their last bits
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as exit:
                code = exit.code
            finally:
                torch.set_num_threads(threads)
        return subprocess.CompletedProcess([script, *flags], code, out.getvalue(), err.getvalue())

    return run_script


@pytest.fixture(scope="session")
def expert_flags(eurosat_folder):
    """Flags for experts that train within a second: add --buffer_path and --num_experts."""
    return ["--dataset=EuroSAT", f"--data_path={eurosat_folder}", "--model=ConvNetW32", "--no-compile",
            "--train_epochs=3", "--save_interval=2", "--batch_train=32"]


@pytest.fixture(scope="session")
def buffers(run, expert_flags, tmp_path_factory):
    """Folder with three ConvNetW32 experts of three epochs, two to a file. Not to be changed."""
    folder = tmp_path_factory.mktemp("buffers")
    done = run("expert_trajectories.py", *expert_flags, "--num_experts=3", f"--buffer_path={folder}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tiny_flags(tiny_folder):
    """Flags, for both scripts, under which even ResNet18 needs only seconds: add --model and --buffer_path."""
    return ["--dataset=EuroSAT", f"--data_path={tiny_folder}", "--val_fraction=0.5", "--no-compile", "--batch_train=10"]


@pytest.fixture(scope="session")
def tiny_buffers(run_here, tiny_flags, tmp_path_factory):
    """A function: the folder with one expert of one epoch of a model, trained when first asked for."""
    folder = tmp_path_factory.mktemp("tiny_buffers")

    @functools.cache
    def train(model):
        done = run_here("expert_trajectories.py", *tiny_flags, f"--model={model}", f"--buffer_path={folder}",
                        "--num_experts=1", "--train_epochs=1", cwd=folder)
        assert done.returncode == 0, done.stderr
        return folder

    return train


@pytest.fixture(scope="session")
def zca_folder(tmp_path_factory):
    """A data set with its ZCA cache, which takes 1.2 GB: made once, and removed as soon as the tests are done."""
    folder = tmp_path_factory.mktemp("zca")
    datasets.write_toysat(folder, per_class=6)
    datasets.load_data("EuroSAT", folder, zca=True, val_fraction=0.5, device="cpu")
    yield folder
    for cache in folder.glob("zca_*.pt"):
        cache.unlink()
