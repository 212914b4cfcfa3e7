"""Bad input: one line that names the value and the remedy, exit code 2, nothing written.

The rows run in this process, each in a few milliseconds. Warnings are errors here, since they too are lines that a user
would see.
"""

import json
import shutil
import warnings

import pytest

import utils

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


FLAGS = [  # scripts, flag, what the line must name
    (BOTH, "--model=LeNet", ["--model=LeNet", "choose from", "ConvNet", "MLP", "ResNet18"]),
    (DISTILLATION, "--model=ConvNetBN", ["--model=ConvNetBN", "batch normalisation", "take a network with instance"]),
    (DISTILLATION, "--unroll=tesla", ["--unroll", "tesla", "adjoint", "autograd"]),
    (BOTH, "--model=ConvNetD7", ["--model=ConvNetD7", "ConvNetD6"]),
    (BOTH, "--dataset=CIFAR10", ["--dataset", "CIFAR10", "EuroSAT", "ToySAT"]),
    (BOTH, "--dsa=maybe", ["--dsa", "maybe", "True", "False"]),
    (BOTH, "--zca=yes", ["--zca", "yes", "True", "False"]),
    (BOTH, "--dsa_strategy=foo", ["--dsa_strategy", "foo", "color_crop_cutout_flip_scale_rotate"]),
    (BOTH, "--lr_teacher=0", ["--lr_teacher", "0", "more than 0"]),
    (BOTH, "--lr_teacher=inf", ["--lr_teacher", "inf"]),
    (BOTH, "--lr_teacher=1e300", ["--lr_teacher", "1e300", "less than 1e+30"]),
    (BOTH, "--val_fraction=1.5", ["--val_fraction", "1.5", "less than 1"]),
    (BOTH, "--seed=-1", ["--seed", "-1", "at least 0"]),
    (BOTH, "--device=nonsense", ["--device=nonsense", "--device=cpu"]),
    (BOTH, "--batch_train=0", ["--batch_train", "0", "at least 1"]),
    (BOTH, "--unknown=1", ["--unknown", "--help"]),
    (BOTH, "--batch_tra=8", ["--batch_tra", "--help"]),
    (EXPERTS, "--num_experts=0", ["--num_experts", "0", "at least 1"]),
    (EXPERTS, "--train_epochs=two", ["--train_epochs", "two", "whole number"]),
    (EXPERTS, "--mom=1", ["--mom", "1", "less than 1"]),
    (EXPERTS, "--l2=-1", ["--l2", "-1", "at least 0"]),
    (DISTILLATION, "--buffer_path=~no_such_user/buffers", ["replay_buffer_0.pt", "~no_such_user/buffers"]),
    (DISTILLATION, "--ipc=0", ["--ipc", "0", "at least 1"]),
    (DISTILLATION, "--ipc=x", ["--ipc", "x", "whole number"]),
    (DISTILLATION, "--ipc=17", ["--ipc=17", "16 training images", "AnnualCrop", "lower it"]),
    (DISTILLATION, "--batch_syn=11", ["--batch_syn=11", "10 synthetic images"]),
    (DISTILLATION, "--lr_img=nan", ["--lr_img", "nan"]),
    (DISTILLATION, "--lr_img=-1", ["--lr_img", "-1", "at least 0"]),
    (DISTILLATION, "--eval_mode=Z", ["--eval_mode", "Z", "choose from"]),
    (DISTILLATION, "--pix_init=zeros", ["--pix_init", "zeros", "noise"]),
    (DISTILLATION, "--zca --texture", ["--zca", "--texture", "leave one out"]),
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
        usual = ["--dataset=EuroSAT", f"--data_path={eurosat_folder}", f"--buffer_path={buffers}", "--model=ConvNetW32",
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
def test_a_missing_class_folder_is_named(refuse, incomplete_data, script):
    refuse(script, ["AnnualCrop is missing", "unpack it again"], f"--data_path={incomplete_data}")


@pytest.mark.parametrize("script", BOTH)
def test_a_damaged_image_is_named_on_a_line_of_its_own(run_here, damaged_data, buffers, tmp_path, script):
    flags = [f"--data_path={damaged_data}", "--model=ConvNetW32", f"--buffer_path={buffers}"]
    flags += ["--max_start_epoch=1"] if script == DISTILLATION else []
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
    utils.write_toysat(tmp_path / "other", per_class=20, seed=1)
    utils.load_eurosat(tmp_path / "other")  # decoded before, so that no progress bar comes in between
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
def test_a_damaged_results_file_of_the_same_run_is_named(refuse, tmp_path, text):
    folder = tmp_path / "logs" / "EuroSAT" / "mine"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(text)
    refuse(DISTILLATION, ["results.json is damaged"], f"--log_dir={tmp_path / 'logs'}", "--run_name=mine",
           "--wandb_mode=disabled", "--Iteration=0")


@pytest.mark.parametrize("script", BOTH)
def test_a_shell_sees_one_line_and_exit_code_2(run, tmp_path, script):
    check(run(script, "--model=LeNet", "--dataset=ToySAT", cwd=tmp_path), script, ["LeNet", "choose from"], tmp_path)
