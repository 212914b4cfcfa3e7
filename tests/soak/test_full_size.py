"""Both scripts at full size: whitening of 64×64 pixels, slow networks, compilation; and ToySAT."""

import copy
import json

import pytest
import torch
from conftest import history

import training
import utils
from datasets import by_name, eurosat
from datasets.preprocessing import Form
from evaluation import EVAL_POOLS
from utils import Augment

EXPERTS, DISTILLATION = "expert_trajectories.py", "distillation.py"
SHORT = ["--num_eval=1", "--epoch_eval_train=1", "--batch_real=10", "--syn_steps=2"]
SHORT += ["--expert_epochs=1", "--max_start_epoch=1"]


def results(cwd):
    """The folder of the only run below a working folder, and its results.json."""
    (path,) = cwd.glob("logged_files/EuroSAT/*/results.json")
    return path.parent, json.loads(path.read_text())


@pytest.mark.parametrize("model", ["MLP", "ConvNet", "ResNet18"])
def test_zca_runs_end_to_end(run, tiny_flags, zca_folder, tmp_path, model):
    flags = [*tiny_flags, f"--data_path={zca_folder}", "--zca", f"--model={model}"]
    flags += [f"--buffer_path={tmp_path}"]
    done = run(EXPERTS, *flags, "--num_experts=1", "--train_epochs=1", cwd=tmp_path)
    assert done.returncode == 0 and "fitting ZCA" not in done.stdout, done.stderr
    assert (tmp_path / "EuroSAT" / model / "replay_buffer_0.pt").is_file()
    done = run(DISTILLATION, *flags, "--Iteration=1", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, _ = results(tmp_path)
    white, pixels = (
        torch.load(folder / f"{name}_0.pt", weights_only=True) for name in ("images", "images_zca")
    )
    images = eurosat.load_eurosat(zca_folder).images / 255
    assert all((pixel - images).abs().amax((1, 2, 3)).min() < 1e-3 for pixel in pixels)
    assert not torch.allclose(white, pixels, atol=0.1)
    keys = {key.split("|")[0] for key in history(folder)[0]}
    documented = "Reconstructed_Images Reconstructed_Pixels Clipped_Reconstructed_Images/std_2.5"
    assert keys >= set(documented.split())


@pytest.mark.parametrize("model", ["ConvNet", "MLP", "ResNet18", "VGG16"])
def test_each_network_distills(run, tiny_flags, tmp_path, model):
    flags = [*tiny_flags, f"--model={model}", f"--buffer_path={tmp_path}"]
    flags += ["--wandb_mode=disabled"]
    done = run(EXPERTS, *flags, "--num_experts=1", "--train_epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    more = ["--Iteration=1", *SHORT, "--batch_syn=3", "--lr_lr=1e-6"]
    done = run(DISTILLATION, *flags, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = results(tmp_path)[1]["evaluations"]
    assert set(last["scores"]) == {model} and last["loss"] > 0
    assert last["syn_lr"] != first["syn_lr"]


@pytest.mark.parametrize("mode", EVAL_POOLS)
def test_each_eval_mode_trains_and_tests_its_networks(run, tiny_flags, tmp_path, mode):
    flags = [*tiny_flags, "--model=MLP", "--evaluate=random", f"--eval_mode={mode}"]
    done = run(DISTILLATION, *flags, "--num_eval=1", "--epoch_eval_train=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("logged_files/EuroSAT/*/evaluation.json")
    scores = json.loads(path.read_text())["scores"]
    names = {"MLP" if name == "model" else name for name in EVAL_POOLS[mode]}
    assert set(scores) == names
    assert all(len(of_network["test"]) == 1 for of_network in scores.values())


@pytest.mark.parametrize("amp", [False, pytest.param(True, marks=pytest.mark.bfloat16)])
def test_compilation_and_bfloat16_change_a_run_only_a_little(
    run, expert_flags, buffers, tmp_path, amp
):
    flags = [flag for flag in expert_flags if not flag.startswith("--train_epochs")]
    flags += [f"--buffer_path={buffers}", "--wandb_mode=disabled", "--Iteration=2", "--eval_it=1"]
    flags += ["--num_eval=1", "--epoch_eval_train=2", "--syn_steps=2", "--expert_epochs=1"]
    flags += ["--max_start_epoch=2", "--ipc=2", "--lr_img=1e4", f"--log_dir={tmp_path}/logs"]
    losses = {}
    for compile in (False, True):
        more = [f"--compile={compile}", f"--amp={compile and amp}", f"--run_name={compile}"]
        done = run(DISTILLATION, *flags, *more, cwd=tmp_path)
        if "torch.compile failed" in done.stderr:
            pytest.skip("no C++ compiler, or no header files of Python")
        others = [line for line in done.stderr.splitlines() if "EuroSAT has 27000" not in line]
        assert done.returncode == 0 and not any("warning" in line for line in others), others
        record = json.loads((tmp_path / f"logs/EuroSAT/{compile}/results.json").read_text())
        losses[compile] = [row["loss"] for row in record["evaluations"][1:]]
    assert "compiled step in" in done.stdout
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True] != losses[False]


def test_on_toysat_a_linear_classifier_does_clearly_worse_than_the_convnet(tmp_path):
    raw = by_name.read_dataset(by_name.Selection("ToySAT", tmp_path))
    data = raw.preprocessed(torch.device("cpu"))
    augment = Augment(64)

    def best_accuracy(network, lr, epochs):
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9)
        generator = utils.make_generator(0)
        accuracies = []
        for _ in range(epochs):
            batches = utils.draw_batches(len(data.train[1]), 32, None, augment, generator)
            training.train_epoch(network, optimizer, data.train, augment, batches)
            accuracies.append(training.accuracy(network, network, *data.test, 300).mean)
        return max(accuracies)

    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 10))
    torch.nn.init.zeros_(linear[1].weight)
    rates = (1e-4, 3e-4, 1e-3)
    at_best = max(best_accuracy(copy.deepcopy(linear), lr, epochs=10) for lr in rates)
    convnet = utils.initial_network("ConvNetW32", Form(10, 64), utils.make_generator(0), "cpu")
    assert 0.2 < at_best < best_accuracy(convnet, lr=0.01, epochs=1) - 0.2
