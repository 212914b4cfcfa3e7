"""The command line: which flag wins, what a saved run may say, and what a run is."""

import argparse
import sys
from pathlib import Path

import pytest

import distillation
import expert_trajectories
from cli import flags, types
from cli.parser import Parser
from run import folder as runs
from system.process import ReportedError


@pytest.fixture
def parsed(monkeypatch):
    """The flags that a script's module makes of a command line, a dictionary."""

    def parse(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
        return vars(module.parse_args())

    return parse


@pytest.fixture
def parser():
    parser = Parser("A test.")
    add = parser.topic("topic")
    add("--size", type=types.count, default=3, help="a number")
    add("--rate", type=types.positive, default=0.5, help="another")
    add("--fast", type=types.boolean, default=False, help="a switch")
    add("--name", help="no default")
    return parser


# --------------------------------------------------------------------------------------------------
# Layers


def test_a_later_layer_wins_and_the_defaults_are_the_first(parser):
    assert vars(parser.complete()) == {"size": 3, "rate": 0.5, "fast": False, "name": None}
    preset = {"size": 4, "rate": 1.0, "fast": True}
    saved = {"size": 5, "rate": 2.0}
    args = parser.complete(preset, saved, {"size": 6})
    assert args == argparse.Namespace(size=6, rate=2.0, fast=True, name=None)


def test_only_what_was_given_is_given(parser, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--fast", "--size=3"])
    assert parser.given() == {"fast": True, "size": 3}  # though 3 is the default


def test_given_flags_win_over_a_preset_and_that_over_the_defaults(parsed):
    args = parsed(distillation, "--preset=cifar10-10", "--ipc=1", "--zca=False")
    assert args["ipc"] == 1 and args["zca"] is False  # given
    assert args["syn_steps"] == 30 and args["lr_teacher"] == 0.001  # of the preset
    assert args["num_eval"] == 5 and args["batch_train"] == 256  # by default


def test_given_flags_win_over_a_saved_run_and_that_over_the_defaults(parsed, tmp_path):
    runs.start_run(tmp_path, {}, {"ipc": 7, "zca": True, "lr_img": 10.0})
    args = parsed(distillation, f"--resume={tmp_path}", "--lr_img=20")
    assert args["lr_img"] == 20  # given
    assert args["ipc"] == 7 and args["zca"] is True  # saved
    assert args["syn_steps"] == 20  # by default
    args = parsed(distillation, f"--evaluate={tmp_path}", "--ipc=2", "--lr_teacher=0.5")
    assert (args["ipc"], args["lr_img"], args["lr_teacher"]) == (2, 10, 0.5)


def test_the_saved_step_size_is_part_of_a_saved_run(parsed, tmp_path):
    runs.start_run(tmp_path, {}, {"lr_teacher": 0.01})
    assert parsed(distillation, f"--evaluate={tmp_path}")["lr_teacher"] is None  # it has no α
    assert parsed(distillation, f"--resume={tmp_path}")["lr_teacher"] == 0.01


def test_evaluating_all_training_images_takes_fewer_epochs_unless_told(parsed):
    assert parsed(distillation, "--evaluate=random")["epoch_eval_train"] == 1000
    assert parsed(distillation, "--evaluate=full")["epoch_eval_train"] == 50
    assert parsed(distillation, "--evaluate=full", "--epoch_eval_train=9")["epoch_eval_train"] == 9


def test_a_preset_and_a_saved_run_exclude_each_other(parsed, tmp_path, capsys):
    runs.start_run(tmp_path, {}, {"ipc": 1})
    for command in ("resume", "evaluate"):
        with pytest.raises(SystemExit):
            parsed(distillation, f"--{command}={tmp_path}", "--preset=cifar10-1")
        assert "--preset" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Forms of a flag


@pytest.mark.parametrize("module", [distillation, expert_trajectories])
@pytest.mark.parametrize("flags, value", [(["--zca"], True), (["--zca=True"], True), ([], False)])
def test_a_switch_may_be_bare(parsed, module, flags, value):
    assert parsed(module, *flags)["zca"] is value
    assert parsed(module, *flags, "--zca=false")["zca"] is False  # the last one counts


@pytest.mark.parametrize("module", [distillation, expert_trajectories])
def test_compilation_is_turned_off_in_two_ways(parsed, module):
    assert parsed(module)["compile"] is True
    assert parsed(module, "--no-compile") == parsed(module, "--compile=False")


def test_home_is_found_also_after_an_equals_sign(parsed, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parsed(distillation, "--data_path=~/data")["data_path"] == tmp_path / "data"


# --------------------------------------------------------------------------------------------------
# Flags that are kept


def test_kept_flags_read_back_as_they_were(parsed, tmp_path):
    given = ["--zca", "--ipc=3", "--lr_lr=1e-7", "--data_path=here", f"--log_dir={tmp_path}"]
    args = argparse.Namespace(**parsed(distillation, *given))
    runs.start_run(tmp_path, {}, runs.run_flags(args))
    again = parsed(distillation, f"--resume={tmp_path}")
    assert again["data_path"] == Path("here").resolve()  # wherever it is resumed
    different = {name for name in again if again[name] != vars(args)[name]}
    assert different == {"resume", "log_dir", "data_path", "buffer_path"}
    assert all(
        type(again[name]) is type(vars(args)[name]) for name in again if name not in different
    )


@pytest.mark.parametrize(
    "flags, fault",
    [
        ({"export": "elsewhere"}, "export"),
        ({"unknown": 1}, "unknown"),
        ({"ipc": "many"}, "'many' is not a whole number"),
        ({"zca": 1}, "'1' is neither True nor False"),
        ({"unroll": "tesla"}, "adjoint, autograd"),
        ({"lr_img": float("nan")}, "out of range"),
    ],
)
def test_a_foreign_run_cannot_say_more_than_a_run_does(parsed, tmp_path, flags, fault):
    runs.start_run(tmp_path, {}, flags)
    for command in ("resume", "evaluate"):
        with pytest.raises(ReportedError, match=f"run.json is damaged .*{fault}") as error:
            parsed(distillation, f"--{command}={tmp_path}")
        assert "\n" not in str(error.value)


def test_a_run_is_what_differs_from_the_defaults_and_has_an_effect(parsed):
    def settings(*flags):
        return distillation.settings_of(argparse.Namespace(**parsed(distillation, *flags)))

    assert settings() == {}
    without_effect = ["--data_path=x", "--device=cuda", "--load_all", "--wandb_mode=disabled"]
    without_effect += ["--checkpoint_every=7", "--force_save", "--run_name=x", "--syn_steps=20"]
    assert settings(*without_effect) == {}
    assert settings("--syn_steps=3", "--texture") == {"syn_steps": 3, "texture": True}
    assert settings("--dsa=False", "--seed=1") == {"dsa": False, "seed": 1}


def test_a_default_that_follows_from_another_flag_is_no_setting(parsed):
    def settings(*flags):
        return distillation.settings_of(argparse.Namespace(**parsed(distillation, *flags)))

    assert settings("--optimizer_img=adam") == {"optimizer_img": "adam"}
    assert settings("--objective=loss") == {"objective": "loss"}
    assert settings("--lr_img=0.01")["lr_img"] == 0.01  # adam's default, not that of sgd


def test_the_name_of_a_runs_folder_tells_settings_apart(parsed):
    def name(*flags):
        args = argparse.Namespace(**parsed(distillation, *flags))
        return runs.default_name(args, distillation.settings_of(args))

    assert name("--zca", "--ipc=3", "--seed=4").startswith("ConvNet_ipc3_zca_seed4_")
    assert name("--ipc=3") == name("--ipc=3", "--load_all") != name("--ipc=3", "--lr_img=1")


@pytest.mark.parametrize(
    "flag, variable, project",
    [(None, None, "DatasetDistillation"), (None, "theirs", "theirs"), ("mine", "theirs", "mine")],
)
def test_wandbs_variable_names_the_project_where_no_flag_does(monkeypatch, flag, variable, project):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_PROJECT", variable)
    args = argparse.Namespace(wandb_mode=None, wandb_project=flag, wandb_entity=None)
    assert flags.wandb_options(args)["project"] == project


# --------------------------------------------------------------------------------------------------
# Encodings

LOCALES = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("environment", LOCALES.values(), ids=LOCALES)
def test_a_run_prints_and_writes_where_output_is_not_utf_8(run, specks_run, tmp_path, environment):
    given = [*specks_run, "--Iteration=1", "--eval_it=1", "--run_name=run"]
    done = run("distillation.py", *given, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "iteration network" in done.stdout and "?" in done.stdout  # for α
    (folder,) = tmp_path.glob("logged_files/*/run")
    assert {"results.json", "curves.png"} <= {path.name for path in folder.iterdir()}
    done = run("distillation.py", "--help", cwd=tmp_path, **environment)
    assert done.returncode == 0 and "--lr_lr" in done.stdout


@pytest.mark.parametrize("module", [distillation, expert_trajectories])
def test_a_flag_is_explained_in_90_characters(module):
    parser = module.make_parser()
    texts = [action.help for group in parser.topics.values() for action in group._group_actions]
    assert all(text and len(text.partition(" (default")[0]) <= 90 for text in texts)
