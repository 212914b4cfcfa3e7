"""Presets are what docs/hyperparameters.md says, and what the command line takes."""

import sys

import pytest

import distillation
import expert_trajectories
from cli.presets import PRESETS
from objectives import OBJECTIVES

SCRIPTS = {"experts": expert_trajectories, "distillation": distillation}


def typed(flags):
    """Flags with the types of their values: 100 is not 100.0."""
    return {name: (type(value), value) for name, value in flags.items()}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_preset_is_the_flags_that_it_prints(monkeypatch, capsys, script, name):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        return typed(vars(SCRIPTS[script].parse_args()))

    by_name = parse(f"--preset={name}")
    printed = capsys.readouterr().out.strip()
    assert printed.startswith(f"--preset={name}: --dataset=") and "\n" not in printed
    spelled_out = parse(*printed.removeprefix(f"--preset={name}: ").split())
    assert by_name | {"preset": None} == spelled_out | {"preset": None}
    assert by_name.items() >= typed(PRESETS[name][script]).items()


@pytest.mark.parametrize("name", PRESETS)
def test_the_experts_of_a_preset_are_long_enough_for_its_segments(name):
    experts = PRESETS[name]["experts"]
    flags = PRESETS[name]["distillation"]
    if not OBJECTIVES[flags.get("objective", "trajectory")].needs_experts:
        return
    last = flags["max_start_epoch"] - 1 + flags["expert_epochs"]
    assert last <= experts["train_epochs"]
    if not name.startswith("eurosat"):
        mtt = {"num_experts": 100, "train_epochs": 50, "batch_train": 256, "lr_teacher": 0.01}
        assert experts.items() >= mtt.items()


@pytest.mark.parametrize("name", PRESETS)
def test_the_scripts_of_a_preset_agree_on_the_data(name):
    for flag in ("dataset", "im_size", "model", "zca", "val_fraction"):
        assert PRESETS[name]["experts"].get(flag) == PRESETS[name]["distillation"].get(flag)
