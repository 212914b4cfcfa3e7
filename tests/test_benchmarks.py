"""The benchmarks run, count what can be counted by hand, and time MTT's own loop."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from datasets.preprocessing import Form
from system import process
from utils import Augment

FOLDER = ROOT / "tests" / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The module, with smaller images and less to train on, and all in this process."""
    monkeypatch.syspath_prepend(FOLDER)
    import bench

    monkeypatch.setattr(bench, "FORM", Form(10, 16))
    monkeypatch.setattr(bench, "AUGMENT", Augment(16, bench.AUGMENT.groups))
    monkeypatch.setattr(bench, "EXPERT_BATCHES", 1)
    monkeypatch.setattr(bench, "child", bench.measure)
    return bench


FEW = ["--model=ConvNetD1", "--repeat=2", "--epochs=2", "--size=64", "--no-compile"]
FEW += ["--device=cpu"]


def test_a_benchmark_prints_a_table_and_writes_it_as_json(bench, tmp_path, capsys):
    path = tmp_path / "benchmarks.json"
    bench.main([*FEW, "--steps", "10", "12", "--no-amp", f"--out={path}"])
    results = json.loads(path.read_text())
    measured = [(row["engine"], row["steps"]) for row in results["iterations"]]
    assert measured == [(engine, steps) for engine in bench.ENGINES for steps in (10, 12)]
    for row in results["iterations"]:
        assert len(row["seconds"]) == 2 and row["median"] > 0 and row["peak"] > 1e8
    assert results["experts float32"]["images per second"] > 0
    assert math.isfinite(results["evaluation float32"]["seconds"])
    assert all(rate > 0 for rate in results["limits"].values())
    assert not any("bfloat16" in name for name in results["limits"])
    assert results["versions"] == process.versions()

    out = capsys.readouterr().out
    for part in (
        "adjoint    float32     12 ",
        "autograd, float32: ",
        "MB more for every further step",
        "floor of a step, adjoint, float32: ",
        "images/s",
        "s per network and epoch",
    ):
        assert part in out


def test_a_benchmark_counts_the_operations_of_a_step(bench):
    counts = bench.measure("counts", "cpu", model="ConvNetD1", ipc=1, precision="float32")
    # At least, by hand: forward passes and the gradients of weights on both ways.
    convolution, linear = 2 * 10 * 16 * 16 * 128 * 27, 2 * 10 * 128 * 8 * 8 * 10
    assert counts["adjoint"]["flop"] >= 5 * convolution + 8 * linear
    assert counts["adjoint"]["flop"] > counts["autograd"]["flop"] > 2 * convolution
    assert all(count["bytes"] > 4 * 10 * 3 * 16 * 16 for count in counts.values())


def test_a_row_is_measured_in_a_process_of_its_own():
    arguments = {"what": "limits", "device": "cpu", "precisions": ["float32"], "size": 32}
    command = [sys.executable, FOLDER / "bench.py", "--child", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout).keys() == {
        "matmul float32, GFLOP/s",
        "convolution float32, GFLOP/s",
        "copy, GB/s",
    }


@pytest.mark.bfloat16
def test_gradients_in_bfloat16_are_close_to_those_in_float32(bench):
    options = {"model": "ConvNetW32", "ipc": 1, "steps": 2, "compile": False}
    assert 0.9 < bench.measure("cosine", "cpu", **options)["cosine"] < 1


CHECKOUT = {
    "networks.py": """
class ConvNet:
    def __init__(self, im_size=(32, 32)):
        self.im_size = im_size
""",  # what mtt.py touches of MTT's code
    "utils.py": """
import time

calls = []

def get_dataset(*_, **__):
    raise AssertionError("the data set is to be replaced")

def evaluate_synset(*_, **__):
    calls.append(1)
    time.sleep(0.2)
    return None, [0.5], 0.5
""",
    "distill.py": """
import argparse, time
import wandb
import torch

import utils
from scipy.ndimage.interpolation import rotate
from networks import ConvNet
from utils import evaluate_synset, get_dataset

if __name__ == "__main__":
    print("what MTT prints is not in the way")
    parser = argparse.ArgumentParser()
    parser.add_argument("--Iteration", type=int)
    args, _ = parser.parse_known_args()
    channel, im_size, num_classes, *_, class_map, _ = get_dataset("CIFAR10")
    assert (channel, im_size, num_classes, class_map[9]) == (3, (16, 16), 10, 9)
    wandb.init(project="MTT", config=args)
    assert wandb.config._items["Iteration"] == args.Iteration
    assert ConvNet().im_size == (16, 16)
    assert evaluate_synset() == evaluate_synset() and len(utils.calls) == 1
    for it in range(args.Iteration + 1):
        wandb.log({"Synthetic_LR": 0.01}, step=it)
        time.sleep(0.1)
        wandb.log({"Grand_Loss": 1.0, "Start_Epoch": 0})
    wandb.finish()
""",
}


def test_mtts_own_script_is_run_and_its_iterations_and_one_evaluation_are_timed(bench, tmp_path):
    for name, text in CHECKOUT.items():
        (tmp_path / name).write_text(text)
    args = bench.parse_args([*FEW, f"--peer={tmp_path}"])
    arguments = {"model": args.model, "ipc": 1, "unroll": "adjoint", "memory": None}
    arguments |= {"device": "cpu", "precision": "float32", "compile": False}
    row, ours = bench.measure_beside_mtt(args, 2, **arguments)
    assert len(row["seconds"]) == len(ours["seconds"]) == 2
    assert row["peak"] > 1e8 and ours["peak"] > 1e8
    assert all(0.1 <= seconds < 5 for seconds in (row["first"], *row["seconds"]))
    assert 0.2 <= 3 * row["evaluation"] < 5  # epochs, and one that MTT adds


DC_CHECKOUT = {
    "networks.py": CHECKOUT["networks.py"],
    "utils.py": """
import time
from networks import ConvNet

def get_dataset(*_):
    raise AssertionError("the data set is to be replaced")

def get_network(model, channel, classes, size):
    return ConvNet()

def rand_crop(x, param):
    assert len(x) > 1 or not param.Siamese
    return x

AUGMENT_FNS = {"crop": [rand_crop]}
""",  # what dc.py touches of the code of DC
    "main_DM.py": """
import argparse, time, types
import torch
from utils import AUGMENT_FNS, get_dataset, get_network

if __name__ == "__main__":
    print("what DC prints is not in the way")
    parser = argparse.ArgumentParser()
    parser.add_argument("--Iteration", type=int)
    parser.add_argument("--dsa_strategy")
    args, _ = parser.parse_known_args()
    assert args.dsa_strategy.startswith("color_crop")
    channel, im_size, classes, *_, mean, std, train, test, loader = get_dataset("CIFAR10", "data")
    assert (channel, im_size, classes, len(mean), len(std)) == (3, (16, 16), 10, 3, 3)
    param = types.SimpleNamespace(Siamese=True)
    for it in range(args.Iteration + 1):
        assert get_network("ConvNet", channel, classes, im_size).im_size == (16, 16)
        for count in (1, 2):
            AUGMENT_FNS["crop"][0](torch.ones(count, 3), param)
        assert param.Siamese
        time.sleep(0.1)
    raise AssertionError("there is no end to it")
""",
}


def test_dcs_own_script_is_run_and_its_iterations_are_timed(tmp_path):
    for name, text in DC_CHECKOUT.items():
        (tmp_path / name).write_text(text)
    images = tmp_path / "images.pt"
    torch.save((torch.randn(20, 3, 16, 16), torch.arange(20) % 10), images)
    command = [sys.executable, FOLDER / "dc.py", tmp_path, tmp_path, images, "3", "dm"]
    done = subprocess.run(command, input="\n" * 3, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *turns, last = done.stdout.splitlines()
    assert turns == ["", "", ""]
    row = json.loads(last)
    assert len(row["seconds"]) == 3 and all(0.1 <= seconds < 5 for seconds in row["seconds"])
    assert row["peak"] > 1e8


def test_commands_take_turns_and_one_that_fails_ends_all(bench):
    script = """
import json, sys, time
log = []
for _ in range(3):
    print(flush=True)
    sys.stdin.readline()
    log.append(time.time())
    time.sleep(0.05)
    log.append(time.time())
    print("more to say")
print(json.dumps(log))
"""
    logs = bench.last_lines([[sys.executable, "-c", script]] * 2, turns=3)
    first, second = (zip(log[::2], log[1::2]) for log in logs)
    times = [time for both in zip(first, second) for turn in both for time in turn]
    assert times == sorted(times)
    with pytest.raises(SystemExit, match="no such luck"):
        bench.last_lines([[sys.executable, "-c", "raise ValueError('no such luck')"]], turns=2)


def test_rows_are_compared_with_those_of_mtt_with_as_many_steps(bench, capsys):
    table = bench.Table()
    table.add("MTT", "float32", 20, {"seconds": [4.0, 8.0, 6.0], "peak": 4e9, "first": 9.0})
    for steps in (10, 20):
        row = {"seconds": [3.0], "peak": 1e9, "first": 3.0}
        table.add("adjoint", "float32", steps, row)
    table.add("autograd", "float32", 80, {"not measured": "would need more memory"})
    *_, ten, twenty, eighty = capsys.readouterr().out.splitlines()
    assert "x" not in ten and "2.00 x,  4.00 x" in twenty
    assert "(would need more memory)" in eighty


def test_the_check_of_a_gpu_says_that_there_is_none(run, tmp_path):
    done = run("tests/gpu_check.py", cwd=tmp_path)
    assert done.returncode == 2 and "no CUDA card" in done.stdout + done.stderr


@pytest.mark.parametrize("objective", ["dc", "dm", "cafe"])
def test_a_match_and_the_plain_loop_beside_it_have_the_same_loss(bench, monkeypatch, objective):
    monkeypatch.setattr(bench, "take_turn", lambda: None)
    monkeypatch.setattr(bench, "WARM_UP", 0)
    monkeypatch.setattr(bench, "FORM", Form(2, 8))
    options = {"model": "ConvNetW32", "ipc": 1, "precision": "float32", "compile": False}
    plain, here = (
        bench.measure("objective", "cpu", objective=objective, plain=plain, **options, repeat=2)
        for plain in (True, False)
    )
    assert plain["losses"] == pytest.approx(here["losses"], rel=1e-4)
    assert len(here["seconds"]) == 2 and here["peak"] > 1e8


def test_iterations_with_more_bands_are_timed_beside_those_with_three(
    bench, monkeypatch, tmp_path, capsys
):
    def in_this_process(commands, turns):
        assert turns == bench.WARM_UP + 2 + 1
        return [bench.measure(**json.loads(command[-1])) for command in commands]

    monkeypatch.setattr(bench, "take_turn", lambda: None)
    monkeypatch.setattr(bench, "last_lines", in_this_process)
    path = tmp_path / "bands.json"
    bench.main([*FEW, "--bands", "3", "13", "--steps", "2", "--no-amp", f"--out={path}"])
    three, thirteen = json.loads(path.read_text())["bands"]
    assert three["bands"] == 3 and thirteen["bands"] == 13
    assert len(three["seconds"]) == len(thirteen["seconds"]) == 2
    assert bench.make_inputs("ConvNetD1", 1, "cpu", 13).images.shape == (10, 13, 16, 16)
    assert "1.00 x" in capsys.readouterr().out
