"""Bad input: one line that names the value and the remedy, exit code 2, nothing written.

The rows run in this process, each in a few milliseconds. Warnings are errors here, since they too
are lines that a user would see.
"""

import os
import re
import shutil
import urllib.error
import warnings

import pytest
import torch
import torchvision

from datasets.toysat import write_toysat

EXPERTS, DISTILLATION = "expert_trajectories.py", "distillation.py"
BOTH = (EXPERTS, DISTILLATION)


@pytest.fixture(scope="module")
def experts(run_here, tiny_flags, tmp_path_factory):
    """The folder of a ConvNetW32 expert of three epochs. Not to be changed."""
    folder = tmp_path_factory.mktemp("experts")
    flags = [*tiny_flags, "--model=ConvNetW32", f"--buffer_path={folder}", "--num_experts=1"]
    flags += ["--train_epochs=3", "--wandb_mode=disabled"]
    done = run_here(EXPERTS, *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def refuse(run_here, tiny_flags, experts, tmp_path):
    """Run with flags, which shall be refused with a line that has all of `parts`."""

    def refuse(script, parts, *flags):
        cwd = tmp_path / "cwd"
        cwd.mkdir()
        usual = [*tiny_flags, "--model=ConvNetW32", f"--buffer_path={tmp_path / 'none'}"]
        if script == DISTILLATION:
            usual += [
                f"--buffer_path={experts}",
                "--max_start_epoch=1",
                "--expert_epochs=1",
                "--syn_steps=2",
            ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", ".*images, EuroSAT has 27000")
            check(run_here(script, *usual, *flags, cwd=cwd), script, parts, cwd)

    return refuse


def check(done, script, parts, cwd):
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: error: ")
    assert done.stderr.count("\n") == 1 and done.stderr[-1] == "\n"
    assert all(part in done.stderr for part in parts), done.stderr
    assert not list(cwd.iterdir())


# --------------------------------------------------------------------------------------------------
# Flags

# Flags that count something, that are numbers, and that are switches, by their scripts.
COUNTS = {
    BOTH: "--batch_train",
    (EXPERTS,): "--num_experts --train_epochs",
    (DISTILLATION,): "--ipc --expert_epochs --syn_steps --max_start_epoch --batch_syn "
    "--canvas_size --canvas_samples --num_eval --eval_it --epoch_eval_train --batch_real "
    "--max_files --max_experts --checkpoint_every --total_steps --batch_objective --segments "
    "--label_epoch",
}
NUMBERS = {
    BOTH: "--lr_teacher",
    (EXPERTS,): "--l2 --mom",
    (DISTILLATION,): "--lr_img --lr_lr --lr_labels --unroll_memory --mom_syn",
}
SWITCHES = {
    BOTH: "--dsa --zca --amp --compile",
    (EXPERTS,): "--decay",
    (DISTILLATION,): "--no_aug --texture --load_all --skip_damaged --force_save --shard_batch "
    "--search_alpha",
}
NO_COUNTS = {
    "0": "at least 1",
    "-3": "at least 1",
    "two": "whole number",
    "2.5": "whole number",
    "nan": "whole number",
    "3000000000": "less than 2147483648",
}
NO_RATES = {
    "-1": "must be",
    "two": "a number",
    "nan": "must be",
    "inf": "less than",
    "1e300": "less than",
}
NO_SWITCHES = {"maybe": "neither True nor False"}


def rows_of(table, values):
    """Rows for each flag of a table with each of the values that it does not take."""
    return [
        (scripts, f"{flag}={value}", [flag, value, part])
        for scripts, flags in table.items()
        for flag in flags.split()
        for value, part in values.items()
    ]


STRATEGY = "color_crop_cutout_flip_scale_rotate"
FLAGS = [  # scripts, flags, what the line must name
    *rows_of(COUNTS, NO_COUNTS),
    *rows_of(NUMBERS, NO_RATES),
    *rows_of(SWITCHES, NO_SWITCHES),
    # networks
    (BOTH, "--model=LeNet", ["--model=LeNet", "choose from", "ConvNet", "MLP", "ResNet18"]),
    (BOTH, "--model=ConvNetD7", ["--model=ConvNetD7", "ConvNetD6"]),
    (DISTILLATION, "--model=ConvNetBN", ["--model=ConvNetBN", "batch normalisation", "instance"]),
    (DISTILLATION, "--objective=labels", ["--objective", "labels", "trajectory", "loss"]),
    (DISTILLATION, "--optimizer_img=lion", ["--optimizer_img", "lion", "sgd", "adam"]),
    (DISTILLATION, "--labels=easy", ["--labels", "easy", "hard", "soft", "learned"]),
    (
        DISTILLATION,
        "--objective=loss --expert_epochs=3 --max_start_epoch=25 --total_steps=3 --syn_steps=4",
        ["--total_steps=3", "--syn_steps=4"],
    ),
    (DISTILLATION, "--total_steps=99", ["--total_steps=99", "no meaning", "trajectory"]),
    (DISTILLATION, "--objective=loss --expert_epochs=9", ["--expert_epochs=9", "no meaning"]),
    (DISTILLATION, "--shard_batch --unroll=autograd", ["--shard_batch", "--unroll=autograd"]),
    (DISTILLATION, "--unroll=tesla", ["--unroll", "tesla", "adjoint", "autograd"]),
    # data
    (BOTH, "--dataset=MNIST", ["--dataset", "MNIST", "EuroSAT", "ToySAT", "CIFAR100"]),
    (BOTH, "--im_size=1", ["--im_size", "1", "at least 2"]),
    (BOTH, "--im_size=5000", ["--im_size", "5000", "less than 4097"]),
    (BOTH, "--im_size=32", ["--im_size=32", "EuroSAT", "64 pixels", "--dataset=ImageFolder"]),
    (BOTH, "--dataset=ImageFolder --im_size=4", ["--model=ConvNetW32", "4x4"]),
    (BOTH, "--dataset=ImageFolder --data_path=nowhere", ["--data_path=nowhere", "No such file"]),
    (BOTH, "--val_fraction=1.5", ["--val_fraction", "1.5", "less than 1"]),
    (BOTH, "--val_fraction=-0.1", ["--val_fraction", "-0.1", "at least 0"]),
    (BOTH, "--bands=B99", ["--bands=B99", "no band B99", "choose from"]),
    (BOTH, "--bands=B04,B04", ["--bands", "B04 is named twice"]),
    (BOTH, "--fill_nodata=5", ["--fill_nodata=5", "--bands=all"]),
    (BOTH, "--fill_nodata=many", ["--fill_nodata", "'many' is not a number"]),
    (BOTH, "--split=nowhere", ["--split and --val_fraction=0.5", "leave it out"]),
    (DISTILLATION, "--show_bands=B08", ["--show_bands=B08", "--bands=rgb"]),
    (BOTH, "--preset=mnist-1", ["--preset", "mnist-1", "cifar10-1", "eurosat-10"]),
    # training
    (BOTH, "--dsa_strategy=foo", ["--dsa_strategy", "foo", STRATEGY]),
    (BOTH, "--lr_teacher=0", ["--lr_teacher", "0", "more than 0"]),
    (EXPERTS, "--mom=1", ["--mom", "1", "less than 1"]),
    (BOTH, "--seed=-1", ["--seed", "-1", "at least 0"]),
    (BOTH, "--seed=2147483648", ["--seed", "2147483648", "less than 2147483648"]),
    # machine
    (BOTH, "--device=nonsense", ["--device=nonsense", "--device=cpu"]),
    (BOTH, "--device=cuda:7", ["--device=cuda:7", "--device=cpu"]),
    (BOTH, "--no-compile=True", ["--no-compile", "True"]),
    # what the parser does not know
    (BOTH, "--unknown=1", ["--unknown", "--help"]),
    (BOTH, "--batch_tra=8", ["--batch_tra", "--help"]),
    (BOTH, "positional", ["positional", "--help"]),
    # distillation
    (DISTILLATION, "--Iteration=-1", ["--Iteration", "-1", "at least 0"]),
    (DISTILLATION, "--ipc=4", ["--ipc=4", "3 training images", "AnnualCrop", "lower it"]),
    (DISTILLATION, "--pix_init=zeros", ["--pix_init", "zeros", "there are no images"]),
    (DISTILLATION, "--batch_syn=11", ["--batch_syn=11", "10 synthetic images"]),
    (DISTILLATION, "--val_fraction=0.2", ["val_fraction=0.5 (here 0.2)", "--buffer_path"]),
    (
        DISTILLATION,
        "--buffer_path=~no_such_user/buffers",
        ["replay_buffer_0.pt", "~no_such_user/buffers"],
    ),
    (
        DISTILLATION,
        "--max_start_epoch=3 --expert_epochs=2",
        ["--max_start_epoch=3", "--expert_epochs=2", "4 epochs", "have 3", "--train_epochs"],
    ),
    (
        DISTILLATION,
        "--labels=soft --label_epoch=4",
        ["--label_epoch=4", "experts' 3 epochs", "--train_epochs"],
    ),
    # evaluation
    (DISTILLATION, "--eval_mode=Z", ["--eval_mode", "Z", "choose from"]),
    (DISTILLATION, "--eval_mode=ConvNet,VGG", ["'VGG' is unknown", "ConvNet,VGG11"]),
    (DISTILLATION, "--eval_mode=S,MLP", ["'S' is unknown", "choose from S, A"]),
    (
        DISTILLATION,
        "--dataset=ImageFolder --im_size=48 --eval_mode=A",
        ["--eval_mode=A", "ResNet18", "32, not 48", "--eval_mode=ConvNet,MLP"],
    ),
    (DISTILLATION, "--evaluate=nowhere", ["--evaluate=nowhere", "images_*.pt", "random", "full"]),
    (DISTILLATION, "--evaluate=", ["--evaluate=''", "names nothing"]),
    (DISTILLATION, "--export=out --evaluate=random", ["--export", "--evaluate"]),
    (DISTILLATION, "--evaluate=nowhere --task=rank", ["--task", "rank", "transfer", "size"]),
    (DISTILLATION, "--task=size", ["--task=size", "--evaluate with a saved set"]),
    (DISTILLATION, "--task=size --evaluate=random", ["--task=size", "a saved set"]),
    (DISTILLATION, "--task=size --evaluate=nowhere --export=out", ["--export", "leave one out"]),
    (
        DISTILLATION,
        "--task=membership --evaluate=nowhere --eval_mode=A",
        ["--task=membership", "--eval_mode", "--model", "leave it out"],
    ),
    (
        DISTILLATION,
        "--task=transfer --evaluate=nowhere --lr_teacher=0.1",
        ["--task=transfer", "--lr_teacher", "each network", "leave it out"],
    ),
    (
        DISTILLATION,
        "--task=transfer --evaluate=nowhere --search_alpha",
        ["--task=transfer", "--search_alpha", "leave it out"],
    ),
    (
        DISTILLATION,
        "--search_alpha --export=there --evaluate=nowhere",
        ["--search_alpha and --export", "no network is trained"],
    ),
    (
        DISTILLATION,
        "--task=incremental --evaluate=nowhere --val_fraction=0",
        ["--task=incremental", "--val_fraction=0.1"],
    ),
    # results
    (BOTH, "--wandb_mode=never", ["--wandb_mode", "never", "offline"]),
    (BOTH, "--wandb_project=a/b", ["--wandb_project", "a/b"]),
    (BOTH, "--wandb_entity=", ["--wandb_entity", "''"]),
    (DISTILLATION, "--run_name=../elsewhere", ["--run_name", "../elsewhere", "--log_dir"]),
    (DISTILLATION, "--run_name=..", ["--run_name", "'..'", "--log_dir"]),
    (DISTILLATION, "--resume=nowhere", ["--resume=nowhere", "run.json"]),
    (DISTILLATION, f"--resume={__file__}", [f"--resume={__file__}", "is a file: name the run's"]),
    (BOTH, "--dataset=Tiny", ["'Tiny'", "ImageFolder", "--preset=tiny-1"]),
    (DISTILLATION, f"--pix_init={__file__}", ["--pix_init", "cannot be read"]),
    (DISTILLATION, f"--evaluate={__file__}", ["--evaluate", "cannot be read"]),
    (DISTILLATION, "--evaluate=random --labels=learned", ["--labels=learned", "hard or soft"]),
    (DISTILLATION, "--evaluate=nowhere --labels=hard", ["--labels=hard", "leave it out"]),
    (DISTILLATION, "--label_epoch=2", ["--label_epoch=2", "--labels=soft"]),
    (DISTILLATION, "--evaluate=random --ipc=100", ["--ipc=100", "training images", "lower it"]),
    # pairs that contradict each other
    (DISTILLATION, "--resume=nowhere --evaluate=random", ["--resume", "--evaluate", "leave one"]),
    (DISTILLATION, "--resume=nowhere --run_name=mine", ["--resume", "--run_name", "leave one"]),
    (DISTILLATION, "--resume=nowhere --preset=cifar10-1", ["--resume", "--preset", "leave one"]),
    (DISTILLATION, "--resume=nowhere --log_dir=logs", ["--resume", "--log_dir", "leave one out"]),
    (DISTILLATION, "--labels=soft --texture", ["--labels=soft", "--texture", "leave one out"]),
    (DISTILLATION, "--zca --texture", ["--zca", "--texture", "leave one out"]),
    (DISTILLATION, "--factor=2 --zca", ["--factor=2", "--zca", "leave one out"]),
    (DISTILLATION, "--factor=2 --texture", ["--factor=2", "--texture", "leave one out"]),
    (DISTILLATION, "--factor=2 --evaluate=full", ["--factor=2", "--evaluate=full", "leave one"]),
    (DISTILLATION, "--search_alpha", ["--search_alpha", "--evaluate"]),
    (DISTILLATION, "--evaluate=random --factor=7", ["--factor=7", "pixels a side", "divisor"]),
    (DISTILLATION, "--evaluate=random --search_alpha --val_fraction=0", ["--val_fraction=0.1"]),
    (DISTILLATION, "--factor=0", ["--factor", "0", "at least 1"]),
    (DISTILLATION, "--factor=7", ["--factor=7", "pixels a side", "divisor"]),
    (DISTILLATION, "--ema=1", ["--ema", "1", "less than 1"]),
    (DISTILLATION, "--optimizer_lr=adam", ["--optimizer_lr", "adam", "sgd, log_adam"]),
]
ROWS = [(script, *row) for scripts, *row in FLAGS for script in BOTH if script in scripts]


@pytest.mark.parametrize("script, flags, parts", ROWS)
def test_a_bad_flag_is_refused_in_one_line(refuse, script, flags, parts):
    refuse(script, parts, *flags.split())


@pytest.mark.parametrize("script", BOTH)
def test_every_flag_is_in_the_table(run_here, script, tmp_path):
    help = run_here(script, "--help", cwd=tmp_path).stdout
    known = set(re.findall(r"^  (--[\w-]+)", help, re.MULTILINE))
    elsewhere = {"--data_path", "--buffer_path", "--log_dir"}  # in the tests below
    elsewhere |= {"--version"}  # takes no value
    table = {
        flag.split("=")[0] for row, flags, _ in ROWS if row == script for flag in flags.split()
    }
    assert len(ROWS) > 200 and len(known) > 15
    assert known - elsewhere <= table


def test_a_shell_sees_one_line_and_exit_code_2(run, tmp_path):
    done = run(DISTILLATION, "--model=LeNet", "--dataset=ToySAT", cwd=tmp_path)
    check(done, DISTILLATION, ["LeNet", "choose from"], tmp_path)


# --------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("script", BOTH)
def test_data_that_is_not_there_is_asked_for(refuse, monkeypatch, tmp_path, script):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", no_network)
    place = tmp_path / "data"
    place.mkdir()
    refuse(script, [str(place), "EuroSAT_RGB.zip"], f"--data_path={place}")
    assert not list(place.iterdir())


# --------------------------------------------------------------------------------------------------
# Experts


def test_missing_experts_are_named_with_the_command_that_makes_them(refuse, tmp_path):
    folder = tmp_path / "no experts"
    folder.mkdir()
    place = str(folder / "EuroSAT_NO_ZCA" / "ConvNetW32")
    parts = ["replay_buffer_0.pt", place, "expert_trajectories.py"]
    refuse(DISTILLATION, parts, f"--buffer_path={folder}")
    assert not list(folder.iterdir())


def test_experts_made_on_other_data_are_refused(refuse, tmp_path):
    write_toysat(tmp_path / "other", per_class=6, seed=1)
    refuse(DISTILLATION, ["digest=", "--buffer_path"], f"--data_path={tmp_path / 'other'}")


@pytest.mark.filterwarnings("ignore:.*has no record")
@pytest.mark.parametrize("left_out", ["nothing", "*.json"])
def test_experts_of_another_architecture_are_refused(
    run_here, tiny_flags, tiny_buffers, tmp_path, left_out
):
    wrong = tmp_path / "buffers" / "EuroSAT_NO_ZCA"
    mlps = tiny_buffers("MLP") / "EuroSAT_NO_ZCA" / "MLP"
    shutil.copytree(mlps, wrong / "ConvNetW32", ignore=shutil.ignore_patterns(left_out))
    flags = [f"--buffer_path={wrong.parent}", "--max_start_epoch=1", "--expert_epochs=1"]
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    done = run_here(DISTILLATION, *tiny_flags, "--model=ConvNetW32", *flags, cwd=cwd)
    check(done, DISTILLATION, ["another architecture", "use the --model"], cwd)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
@pytest.mark.parametrize("script", BOTH)
def test_an_unreadable_folder_is_named(refuse, tmp_path, script):
    closed = tmp_path / "closed"
    (closed / "EuroSAT_NO_ZCA" / "ConvNetW32").mkdir(parents=True)
    (closed / "EuroSAT_NO_ZCA").chmod(0)
    refuse(script, [str(closed)], f"--buffer_path={closed}")
    (closed / "EuroSAT_NO_ZCA").chmod(0o700)


# --------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("script", BOTH)
def test_a_folder_for_results_that_is_a_file_is_refused_before_any_work(refuse, tmp_path, script):
    place = tmp_path / "file"
    place.write_text("in the way")
    flags = {
        EXPERTS: [f"--buffer_path={place}", "--num_experts=1", "--train_epochs=1"],
        DISTILLATION: [f"--log_dir={place}", "--Iteration=0", "--wandb_mode=disabled"],
    }
    refuse(script, [str(place)], *flags[script])


@pytest.mark.parametrize("text", ['{"settings": ', '{"settings": []}', "[]"])
@pytest.mark.parametrize("how", ["--run_name=mine --log_dir={}", "--resume={}/EuroSAT/mine"])
def test_a_damaged_record_of_the_same_run_is_named(refuse, tmp_path, text, how):
    folder = tmp_path / "logs" / "EuroSAT" / "mine"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(text)
    flags = [*how.format(tmp_path / "logs").split(), "--wandb_mode=disabled", "--Iteration=0"]
    refuse(DISTILLATION, ["run.json is damaged", "--run_name"], *flags)


@pytest.mark.parametrize("content", [{}, {"images": [1]}, [1], {"images": torch.zeros(1)}])
def test_a_foreign_checkpoint_is_named(refuse, tmp_path, content):
    folder = tmp_path / "logs" / "EuroSAT" / "mine"
    folder.mkdir(parents=True)
    torch.save(content, folder / "checkpoint.pt")
    flags = ["--run_name=mine", f"--log_dir={tmp_path / 'logs'}", "--wandb_mode=disabled"]
    parts = ["checkpoint.pt cannot be read as a checkpoint of this version", "--run_name"]
    refuse(DISTILLATION, parts, *flags)
