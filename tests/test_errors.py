"""Bad input: one line that names the value and the remedy, exit code 2, nothing written.

The rows run in this process, each in a few milliseconds. Warnings are errors here, since they too are lines that a user
would see.
"""

import json
import os
import re
import shutil
import time
import urllib.error
import warnings

import pytest
import torch
import torchvision

import datasets

EXPERTS, DISTILLATION = "expert_trajectories.py", "distillation.py"
BOTH = (EXPERTS, DISTILLATION)


@pytest.fixture(scope="module")
def no_experts(tmp_path_factory):
    return tmp_path_factory.mktemp("no_experts")


@pytest.fixture(scope="module")
def whitened_experts(buffers, tmp_path_factory):
    """Experts that say to be made with ZCA, in the folder of those without."""
    folder = shutil.copytree(buffers, tmp_path_factory.mktemp("whitened") / "buffers")
    for path in folder.rglob("*.json"):
        record = json.loads(path.read_text())
        record["settings"]["zca"] = True
        path.write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def incomplete_data(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("incomplete")
    for name in ("Forest", "River"):
        shutil.copytree(tiny_folder / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def damaged_data(tiny_folder, tmp_path_factory):
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("damaged") / "data",
                             ignore=shutil.ignore_patterns("*.pt"))
    (folder / "River" / "River_3.jpg").write_text("This is no image.")
    return folder


COUNTS = {  # flags that count something, and their scripts
    BOTH: ["--batch_train"],
    (EXPERTS,): ["--num_experts", "--train_epochs", "--save_interval"],
    (DISTILLATION,): ["--ipc", "--expert_epochs", "--syn_steps", "--max_start_epoch", "--batch_syn", "--canvas_size",
                      "--canvas_samples", "--num_eval", "--eval_it", "--epoch_eval_train", "--batch_real",
                      "--max_files", "--max_experts", "--checkpoint_every"],
}
NUMBERS = {BOTH: ["--lr_teacher"], (EXPERTS,): ["--l2", "--mom"], (DISTILLATION,): ["--lr_img", "--lr_lr"]}
SWITCHES = {BOTH: ["--dsa", "--zca", "--amp"], (EXPERTS,): ["--decay"],
            (DISTILLATION,): ["--no_aug", "--texture", "--load_all", "--skip_damaged", "--force_save"]}

FLAGS = [  # scripts, flags, what the line must name
    *((scripts, f"{flag}={value}", [flag, value, part]) for scripts, flags in COUNTS.items() for flag in flags
      for value, part in (("0", "at least 1"), ("-3", "at least 1"), ("two", "whole number"), ("2.5", "whole number"),
                          ("nan", "whole number"), ("3000000000", "less than 2147483648"))),
    *((scripts, f"{flag}={value}", [flag, value, part]) for scripts, flags in NUMBERS.items() for flag in flags
      for value, part in (("-1", "must be"), ("two", "a number"), ("nan", "must be"), ("inf", "less than"),
                          ("1e300", "less than"))),
    *((scripts, f"{flag}=maybe", [flag, "maybe", "True", "False"])
      for scripts, flags in SWITCHES.items() for flag in flags),
    (BOTH, "--model=LeNet", ["--model=LeNet", "choose from", "ConvNet", "MLP", "ResNet18"]),
    (BOTH, "--model=", ["--model=", "choose from"]),
    (BOTH, "--model=ConvNetD7", ["--model=ConvNetD7", "ConvNetD6"]),
    (DISTILLATION, "--model=ConvNetBN", ["--model=ConvNetBN", "batch normalisation", "take a network with instance"]),
    (DISTILLATION, "--unroll=tesla", ["--unroll", "tesla", "adjoint", "autograd"]),
    (BOTH, "--dataset=MNIST", ["--dataset", "MNIST", "EuroSAT", "ToySAT", "CIFAR10", "CIFAR100", "ImageFolder"]),
    *((BOTH, f"--im_size={value}", ["--im_size", value, part])
      for value, part in (("1", "at least 2"), ("5000", "less than 4097"), ("two", "whole number"))),
    (BOTH, "--im_size=32", ["--im_size=32", "EuroSAT", "64 pixels", "--dataset=ImageFolder"]),
    (BOTH, "--dataset=ImageFolder --im_size=4", ["--model=ConvNetW32", "4x4"]),
    (BOTH, "--dataset=ImageFolder --data_path=nowhere", ["--data_path=nowhere", "No such file"]),
    (BOTH, "--preset=mnist-1", ["--preset", "mnist-1", "cifar10-1", "eurosat-10"]),
    (BOTH, "--compile=maybe", ["--compile", "maybe"]),
    (BOTH, "--dsa_strategy=foo", ["--dsa_strategy", "foo", "color_crop_cutout_flip_scale_rotate"]),
    (BOTH, "--dsa_strategy=", ["--dsa_strategy", "''", "color_crop_cutout_flip_scale_rotate"]),
    (BOTH, "--lr_teacher=0", ["--lr_teacher", "0", "more than 0"]),
    (EXPERTS, "--mom=1", ["--mom", "1", "less than 1"]),
    (BOTH, "--val_fraction=1.5", ["--val_fraction", "1.5", "less than 1"]),
    (BOTH, "--val_fraction=-0.1", ["--val_fraction", "-0.1", "at least 0"]),
    (BOTH, "--val_fraction=nan", ["--val_fraction", "nan", "at least 0"]),
    (BOTH, "--seed=-1", ["--seed", "-1", "at least 0"]),
    (BOTH, "--seed=2147483648", ["--seed", "2147483648", "less than 2147483648"]),
    (BOTH, "--seed=one", ["--seed", "one", "whole number"]),
    (BOTH, "--device=nonsense", ["--device=nonsense", "--device=cpu"]),
    (BOTH, "--device=meta", ["--device=meta", "--device=cpu"]),
    (BOTH, "--device=cuda:7", ["--device=cuda:7", "--device=cpu"]),
    (BOTH, "--unknown=1", ["--unknown", "--help"]),
    (BOTH, "--batch_tra=8", ["--batch_tra", "--help"]),
    (BOTH, "positional", ["positional", "--help"]),
    (DISTILLATION, "--Iteration=-1", ["--Iteration", "-1", "at least 0"]),
    (DISTILLATION, "--Iteration=x", ["--Iteration", "x", "whole number"]),
    (DISTILLATION, "--buffer_path=~no_such_user/buffers", ["replay_buffer_0.pt", "~no_such_user/buffers"]),
    (DISTILLATION, "--ipc=17", ["--ipc=17", "16 training images", "AnnualCrop", "lower it"]),
    (DISTILLATION, "--dataset=ImageFolder --im_size=48 --eval_mode=A", ["--eval_mode=A", "ResNet18", "32, not 48"]),
    (DISTILLATION, "--eval_mode=Z", ["--eval_mode", "Z", "choose from"]),
    (DISTILLATION, "--pix_init=zeros", ["--pix_init", "zeros", "noise"]),
    (DISTILLATION, "--evaluate=nowhere", ["--evaluate=nowhere", "images_*.pt", "random", "full"]),
    (DISTILLATION, "--export=out", ["--export", "--evaluate"]),
    (DISTILLATION, "--resume=nowhere --evaluate=random", ["--resume", "--evaluate", "leave one out"]),
    (BOTH, "--wandb_mode=never", ["--wandb_mode", "never", "offline"]),
    (BOTH, "--wandb_project=a/b", ["--wandb_project", "a/b"]),
    (BOTH, "--wandb_entity=", ["--wandb_entity", "''"]),
    (DISTILLATION, "--run_name=../elsewhere", ["--run_name", "../elsewhere", "--log_dir"]),
    (DISTILLATION, "--run_name=", ["--run_name", "''", "--log_dir"]),
    (DISTILLATION, "--run_name=..", ["--run_name", "'..'", "--log_dir"]),
    (DISTILLATION, "--resume=nowhere", ["--resume=nowhere", "run.json"]),
    # pairs that contradict each other
    (DISTILLATION, "--resume=nowhere --run_name=mine", ["--resume", "--run_name", "leave one out"]),
    (DISTILLATION, "--resume=nowhere --preset=cifar10-1", ["--resume", "--preset", "leave one out"]),
    (DISTILLATION, "--resume=nowhere --log_dir=logs", ["--resume", "--log_dir", "leave one out"]),
    (DISTILLATION, "--zca --texture", ["--zca", "--texture", "leave one out"]),
    (DISTILLATION, "--batch_syn=11", ["--batch_syn=11", "10 synthetic images"]),
    (DISTILLATION, "--max_start_epoch=3 --expert_epochs=2",
     ["--max_start_epoch=3", "--expert_epochs=2", "4 epochs", "have 3", "--train_epochs"]),
    (DISTILLATION, "--val_fraction=0.2", ["val_fraction=0.1 (here 0.2)", "--buffer_path"]),
]


def check(done, script, parts, cwd):
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: error: ") and done.stderr.count("\n") == 1 and done.stderr[-1] == "\n"
    assert all(part in done.stderr for part in parts), done.stderr
    assert not list(cwd.iterdir())


@pytest.fixture
def refuse(run_here, eurosat_folder, buffers, tmp_path):
    """Run with flags, which shall be refused with a line that has all of `parts`."""

    def refuse(script, parts, *flags):
        cwd = tmp_path / "cwd"
        cwd.mkdir()
        experts = buffers if script == DISTILLATION else tmp_path / "none"
        usual = ["--dataset=EuroSAT", f"--data_path={eurosat_folder}", f"--buffer_path={experts}", "--model=ConvNetW32",
                 "--no-compile"] + ["--max_start_epoch=1", "--expert_epochs=1"] * (script == DISTILLATION)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            check(run_here(script, *usual, *flags, cwd=cwd), script, parts, cwd)

    return refuse


ROWS = [(script, flags, parts) for scripts, flags, parts in FLAGS for script in BOTH if script in scripts]


@pytest.mark.parametrize("script, flags, parts", ROWS)
def test_a_bad_flag_is_refused_in_one_line(refuse, script, flags, parts):
    refuse(script, parts, *flags.split())


@pytest.mark.parametrize("script", BOTH)
def test_every_flag_is_in_the_table(run_here, script, tmp_path):
    known = set(re.findall(r"^  (--\w+)", run_here(script, "--help", cwd=tmp_path).stdout, re.MULTILINE))
    elsewhere = {"--data_path", "--buffer_path", "--log_dir"}  # in the tests below
    table = {flag.split("=")[0] for row, flags, _ in ROWS if row == script for flag in flags.split()}
    assert len(ROWS) > 200 and len(known) > 15 and known - elsewhere <= table


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize("content", ["file", "empty folder"])
def test_data_that_is_not_there_is_asked_for(refuse, monkeypatch, tmp_path, script, content):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", no_network)
    place = tmp_path / "data"
    place.touch() if content == "file" else place.mkdir()
    refuse(script, [str(place), "EuroSAT_RGB.zip"] if place.is_dir() else [str(place)], f"--data_path={place}")
    assert place.is_file() or not list(place.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
@pytest.mark.parametrize("script", BOTH)
def test_an_unreadable_folder_is_named(refuse, tmp_path, script):
    (tmp_path / "closed" / "EuroSAT_NO_ZCA" / "ConvNetW32").mkdir(parents=True)
    (tmp_path / "closed" / "EuroSAT_NO_ZCA").chmod(0)
    refuse(script, [str(tmp_path / "closed")], f"--buffer_path={tmp_path / 'closed'}")
    (tmp_path / "closed" / "EuroSAT_NO_ZCA").chmod(0o700)


@pytest.mark.filterwarnings("ignore:.*has no record")
@pytest.mark.parametrize("script, part", [(EXPERTS, "no record"), (DISTILLATION, "no trajectory file")])
def test_a_foreign_file_among_the_experts_is_named(refuse, tmp_path, script, part):
    folder = tmp_path / "buffers" / "EuroSAT_NO_ZCA" / "ConvNetW32"
    folder.mkdir(parents=True)
    (folder / "replay_buffer_0.pt").write_text("hello")
    refuse(script, ["replay_buffer_0.pt", part], f"--buffer_path={tmp_path / 'buffers'}")


@pytest.mark.parametrize("script", BOTH)
def test_a_missing_class_folder_is_named(refuse, incomplete_data, script):
    refuse(script, ["AnnualCrop is missing", "unpack it again"], f"--data_path={incomplete_data}")


@pytest.mark.parametrize("script", BOTH)
def test_a_damaged_image_is_named_on_a_line_of_its_own(run_here, damaged_data, buffers, tmp_path, script):
    flags = [f"--data_path={damaged_data}", "--model=ConvNetW32"]
    flags += [f"--buffer_path={buffers}", "--max_start_epoch=1"] if script == DISTILLATION else []
    done = run_here(script, *flags, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]  # after the bar of the files before it
    assert line.startswith(f"{script}: error: ") and "River_3.jpg" in line and "replace it" in line


def test_missing_experts_are_named_with_the_command_that_makes_them(refuse, no_experts):
    refuse(DISTILLATION, ["replay_buffer_0.pt", str(no_experts / "EuroSAT_NO_ZCA" / "ConvNetW32"),
                          "expert_trajectories.py"], f"--buffer_path={no_experts}")
    assert not list(no_experts.iterdir())


def test_experts_made_with_zca_are_refused_without(refuse, whitened_experts):
    refuse(DISTILLATION, ["replay_buffer_0.pt", "zca=True (here False)"], f"--buffer_path={whitened_experts}")


def test_experts_made_on_other_data_are_refused(refuse, tmp_path):
    datasets.write_toysat(tmp_path / "other", per_class=20, seed=1)
    datasets.load_eurosat(tmp_path / "other")  # decoded before, so that no progress bar comes in between
    refuse(DISTILLATION, ["digest=", "--buffer_path"], f"--data_path={tmp_path / 'other'}")


def test_experts_of_another_architecture_are_refused(refuse, tiny_buffers, tiny_folder, tmp_path):
    wrong = tmp_path / "buffers" / "EuroSAT_NO_ZCA"
    shutil.copytree(tiny_buffers("MLP") / "EuroSAT_NO_ZCA" / "MLP", wrong / "ConvNetW32")
    flags = (f"--buffer_path={tmp_path / 'buffers'}", f"--data_path={tiny_folder}", "--val_fraction=0.5")
    refuse(DISTILLATION, ["another architecture", "use the --model"], *flags)


@pytest.mark.filterwarnings("ignore:.*has no record")
def test_experts_without_record_of_another_architecture_are_refused(run_here, eurosat_folder, tiny_buffers, tmp_path):
    wrong = tmp_path / "buffers" / "EuroSAT_NO_ZCA"
    shutil.copytree(tiny_buffers("MLP") / "EuroSAT_NO_ZCA" / "MLP", wrong / "ConvNetW32",
                    ignore=shutil.ignore_patterns("*.json"))
    done = run_here(DISTILLATION, f"--data_path={eurosat_folder}", f"--buffer_path={tmp_path / 'buffers'}",
                    "--model=ConvNetW32", "--max_start_epoch=1", "--expert_epochs=1", cwd=tmp_path)
    assert done.returncode == 2 and "another architecture" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", BOTH)
def test_a_folder_for_results_that_is_a_file_is_refused_before_any_work(refuse, tmp_path, script):
    (tmp_path / "file").write_text("in the way")
    flags = {EXPERTS: ["--buffer_path", "--num_experts=1", "--train_epochs=1"],
             DISTILLATION: ["--log_dir", "--Iteration=0", "--wandb_mode=disabled"]}
    folder, *others = flags[script]
    refuse(script, [str(tmp_path / "file")], f"{folder}={tmp_path / 'file'}", *others)


@pytest.mark.parametrize("text", ['{"settings": ', '{"settings": []}', "[]"])
@pytest.mark.parametrize("how", ["--run_name=mine --log_dir={}", "--resume={}/EuroSAT/mine"])
def test_a_damaged_file_of_the_same_run_is_named(refuse, tmp_path, text, how):
    folder = tmp_path / "logs" / "EuroSAT" / "mine"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(text)
    flags = how.format(tmp_path / "logs").split()
    refuse(DISTILLATION, ["run.json is damaged", "--run_name"], *flags, "--wandb_mode=disabled", "--Iteration=0")


@pytest.mark.parametrize("content", [{}, {"images": [1]}, [1], {"images": torch.zeros(1)}])
def test_a_foreign_checkpoint_is_named(run_here, buffers, eurosat_folder, tmp_path, content):
    flags = ["--dataset=EuroSAT", f"--data_path={eurosat_folder}", f"--buffer_path={buffers}", "--model=ConvNetW32",
             "--no-compile", "--max_start_epoch=1", "--expert_epochs=1", "--Iteration=0", "--num_eval=1",
             "--epoch_eval_train=1", "--run_name=mine", "--wandb_mode=disabled"]
    assert run_here(DISTILLATION, *flags, cwd=tmp_path).returncode == 0
    torch.save(content, tmp_path / "logged_files" / "EuroSAT" / "mine" / "checkpoint.pt")
    done = run_here(DISTILLATION, *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "checkpoint.pt is damaged" in done.stderr and "remove it" in done.stderr


@pytest.mark.parametrize("script", BOTH)
def test_a_shell_sees_one_line_and_exit_code_2_within_seconds(run, tmp_path, script):
    begin = time.time()
    check(run(script, "--model=LeNet", "--dataset=ToySAT", cwd=tmp_path), script, ["LeNet", "choose from"], tmp_path)
    assert time.time() - begin < 10
