"""The benchmarks: they run, and the memory that they measure is as constant as the engine claims."""

import json
import subprocess
import sys
from pathlib import Path

import torch

import utils

BENCH = Path(__file__).parent / "benchmarks" / "bench.py"


def bench(*flags, cwd):
    done = subprocess.run([sys.executable, BENCH, *flags], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_short_benchmark_prints_a_table_and_writes_it_as_json(tmp_path):
    out = bench("--model=ConvNetD1", "--steps", "2", "--repeat=2", "--epochs=10", "--no-compile", "--no-amp",
                "--device=cpu", cwd=tmp_path)
    results = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [(row["engine"], row["steps"], len(row["seconds"])) for row in results["iterations"]] == [
        ("adjoint", 2, 2), ("autograd", 2, 2)]
    assert all(row["median"] > 0 and row["peak"] > 1e8 for row in results["iterations"])
    assert all(f"{row['engine']:10} float32" in out for row in results["iterations"])
    assert results["experts float32"]["images per second"] > 0 and results["evaluation float32"]["seconds"] > 0
    # A step of one layer is counted by hand: forward and weights' gradient of the convolution, and the linear layer.
    convolution, linear = 2 * 10 * 64 * 64 * 128 * 27, 2 * 10 * 128 * 32 * 32 * 10
    assert results["counts"]["float32"]["adjoint"]["flop"] >= 5 * convolution + 8 * linear
    assert results["versions"] == utils.versions()


def test_memory_of_the_adjoint_does_not_grow_with_the_steps_but_for_parameters_and_augmented_images(tmp_path):
    flags = {"what": "iteration", "device": "cpu", "model": "ConvNetW32", "ipc": 1, "unroll": "adjoint", "amp": False,
             "compile": False, "repeat": 0}

    def peak(times=3, **more):
        """The least of several processes: by fragmentation of the heap, tens of megabytes come and go with chance."""
        return min(json.loads(bench("--child", json.dumps(flags | more), cwd=tmp_path))["peak"] for _ in range(times))

    short, long = peak(steps=10), peak(steps=80)
    network = utils.initial_network("ConvNetW32", (10, 64), utils.make_generator(0), "cpu")
    parameters = sum(p.numel() for p in network.parameters())
    assert long - short <= 0.05 * short + 70 * 4 * (parameters + 10 * 3 * 64 * 64)
    # That the graph of ten steps takes more shows that this measures something.
    assert peak(times=1, unroll="autograd", steps=10) > long


CHECKOUT = {  # what mtt.py touches of MTT's code
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
from utils import evaluate_synset, get_dataset

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--Iteration", type=int)
    args = parser.parse_args()
    channel, im_size, num_classes, *_, class_map, _ = get_dataset("CIFAR10")
    assert (channel, im_size, num_classes, class_map[9]) == (3, (64, 64), 10, 9)
    wandb.init(project="MTT", config=args)
    assert wandb.config._items["Iteration"] == 2
    assert evaluate_synset() == evaluate_synset() and len(utils.calls) == 1
    for it in range(args.Iteration + 1):
        wandb.log({"Synthetic_LR": 0.01}, step=it)
        time.sleep(0.1)
        wandb.log({"Grand_Loss": 1.0, "Start_Epoch": 0})
    wandb.finish()
""",
}


def test_mtts_own_script_is_run_and_its_iterations_and_one_evaluation_are_timed(tmp_path):
    for name, text in CHECKOUT.items():
        (tmp_path / name).write_text(text)
    torch.save((torch.zeros(10, 3, 64, 64), torch.arange(10)), tmp_path / "images.pt")
    done = subprocess.run([sys.executable, BENCH.with_name("mtt.py"), tmp_path, tmp_path, tmp_path / "images.pt",
                           "--Iteration=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = json.loads(done.stdout)
    assert len(times["iterations"]) == 3 and all(0.1 <= seconds < 0.2 for seconds in times["iterations"])
    assert 0.2 <= times["evaluation"] < 0.4 and times["peak"] > 1e8
