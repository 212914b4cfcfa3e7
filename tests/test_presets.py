"""Presets: they are what docs/hyperparameters.md says, both scripts take them, and flags win over them."""

import json
import re

import pytest
from conftest import ROOT

from presets import PRESETS

DOCS = (ROOT / "docs" / "hyperparameters.md").read_text()


def flags_of(text):
    """Flags as a dictionary of name and value; "True" where there is no value."""
    return dict(flag.lstrip("-").split("=") if "=" in flag else (flag.lstrip("-"), "True") for flag in text.split())


@pytest.mark.parametrize("name", PRESETS)
def test_the_docs_have_every_preset_as_it_is(name):
    header = re.search(r"^\| preset \|.*$", DOCS, re.MULTILINE)[0]
    row = re.search(rf"^\| `{name}` \|.*$", DOCS, re.MULTILINE)[0]
    columns, cells = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in (header, row))
    preset = flags_of(f"{PRESETS[name].data} {PRESETS[name].distillation}")
    assert preset.keys() <= {*columns}
    documented = {column: cell for column, cell in zip(columns[1:], cells[1:]) if cell != "–"}
    of_table = {key: value for key, value in preset.items() if key in columns}
    assert {key: {"yes": "True"}.get(value, value) for key, value in documented.items()} == of_table
    assert len(of_table) >= 8  # ipc, N, M, T⁺, three rates and α


@pytest.mark.parametrize("name", PRESETS)
def test_the_experts_of_a_preset_are_long_enough_for_its_segments(name):
    experts, distillation = flags_of(PRESETS[name].experts), flags_of(PRESETS[name].distillation)
    last = int(distillation["max_start_epoch"]) - 1 + int(distillation["expert_epochs"])
    assert last <= int(experts["train_epochs"])
    if not name.startswith("eurosat"):
        assert experts == {"num_experts": "100", "train_epochs": "50", "batch_train": "256", "lr_teacher": "0.01"}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("script", ["expert_trajectories.py", "distillation.py"])
def test_both_scripts_take_every_preset(run_here, script, name, tmp_path):
    done = run_here(script, f"--preset={name}", "--device=nonsense", cwd=tmp_path)  # the first thing that is looked at
    assert done.returncode == 2 and "--device=nonsense" in done.stderr, done.stderr
    assert done.stdout.startswith(f"--preset={name}: --dataset=")


def test_a_flag_wins_over_the_preset(run_here, eurosat_folder, buffers, tmp_path):
    done = run_here("distillation.py", "--preset=cifar10-10", "--dataset=EuroSAT", f"--data_path={eurosat_folder}",
                    "--model=ConvNetW32", f"--buffer_path={buffers}", "--no-compile", "--max_start_epoch=2",
                    "--zca=False", "--val_fraction=0.1", "--ipc=1", "--Iteration=1", "--num_eval=1",
                    "--epoch_eval_train=1", "--expert_epochs=1", "--lr_lr=1e-8", "--wandb_mode=disabled",
                    "--run_name=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "logged_files" / "EuroSAT" / "run"
    settings = json.loads((folder / "results.json").read_text())["settings"]
    assert (settings["max_start_epoch"], settings["ipc"], settings["zca"]) == (2, 1, False)  # given
    assert (settings["syn_steps"], settings["lr_img"], settings["lr_teacher"]) == (30, 100, 0.001)  # of the preset
    done = run_here("distillation.py", f"--resume={folder}", cwd=tmp_path)  # which needs no preset
    assert done.returncode == 0 and "Best iteration" in done.stdout, done.stderr
    for flag in (f"--resume={folder}", f"--evaluate={folder}"):
        done = run_here("distillation.py", flag, "--preset=cifar10-1", cwd=tmp_path)
        assert done.returncode == 2 and "--preset" in done.stderr and done.stderr.count("\n") == 1
