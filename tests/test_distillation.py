"""`distillation.py` from the command line, and those of its parts that can be wrong unseen."""

import io
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import history, records_of
from PIL import Image, ImageFont

import datasets
import evaluation
import files
import report
import utils
from distillation import check_finite, cut_windows, synthetic_batches
from evaluation import Evaluations, Scores, sgd_step, train_together
from networks import ConvNet
from reparam_module import ReparamModule
from report import draw_grid
from trajectories import Expert, Experts

SCRIPT, EXPERTS_SCRIPT = "distillation.py", "expert_trajectories.py"
MODEL = "ConvNetW32"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def results(cwd):
    """The folder of the only run below a working folder, and its results.json."""
    (path,) = cwd.glob("logged_files/EuroSAT/*/results.json")
    return path.parent, json.loads(path.read_text())


def course(results):
    """Losses and step sizes of a run, in full precision: what tells whether two runs learned the same."""
    return [(row["iteration"], row["loss"], row["syn_lr"]) for row in results["evaluations"]]


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def cheap_flags(eurosat_folder, buffers):
    return ["--dataset=EuroSAT", f"--data_path={eurosat_folder}", f"--buffer_path={buffers}", f"--model={MODEL}",
            "--no-compile", "--Iteration=2", "--eval_it=1", "--num_eval=1", "--epoch_eval_train=2", "--batch_real=20",
            "--syn_steps=2", "--expert_epochs=1", "--max_start_epoch=2", "--lr_lr=1e-6"]


@pytest.fixture(scope="module")
def toysat_flags(run_here, tmp_path_factory):
    """Flags for distilling ToySAT, which has 270 images per class, with one expert of one epoch."""
    folder = tmp_path_factory.mktemp("toysat")
    flags = ["--dataset=ToySAT", f"--data_path={folder}", f"--buffer_path={folder}", "--model=MLP", "--no-compile"]
    done = run_here(EXPERTS_SCRIPT, *flags, "--num_experts=1", "--train_epochs=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    return flags


@pytest.fixture
def distill(run_here, cheap_flags, tmp_path):
    """Distill with further flags, in this process and without wandb: the run's folder and results."""

    def distill(*flags):
        done = run_here(SCRIPT, *cheap_flags, "--wandb_mode=disabled", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return results(tmp_path)

    return distill


# ---------------------------------------------------------------------------------------------------------------------
# One run, in full
#
# The step size starts so small that the first evaluation is by chance; the second is clearly better. So images_best.pt
# holds images that were learned.

LEARNING = ("--ipc=2", "--lr_teacher=1e-5", "--lr_lr=1e-4", "--lr_img=1e6", "--epoch_eval_train=40")


@pytest.fixture(scope="module")
def whole_run(run, cheap_flags, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("run")
    done = run(SCRIPT, *cheap_flags, *LEARNING, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, *results(cwd)


def test_a_run_writes_images_labels_and_step_size_as_bare_tensors(whole_run):
    _, folder, record = whole_run
    best = record["best_iteration"]
    for tag in ("0", str(best), "best"):
        images, labels, syn_lr = (load(folder / f"{name}_{tag}.pt") for name in ("images", "labels", "syn_lr"))
        assert images.shape == (20, 3, 64, 64) and images.dtype == torch.float32 and not images.requires_grad
        assert labels.tolist() == [label for label in range(10) for _ in range(2)] and labels.dtype == torch.int64
        assert syn_lr.shape == () and math.isclose(
            syn_lr, record["evaluations"][best if tag == "best" else int(tag)]["syn_lr"], rel_tol=1e-6)
    assert best > 0 and not torch.equal(load(folder / "images_0.pt"), load(folder / "images_best.pt"))
    assert torch.equal(load(folder / f"images_{best}.pt"), load(folder / "images_best.pt"))
    assert not list(folder.glob("images_zca*"))


def test_a_run_draws_a_grid_per_evaluation_and_an_animation_of_them(whole_run):
    _, folder, _ = whole_run
    grids = sorted(folder.glob("grid_*.png"))
    assert [path.name for path in grids] == [f"grid_00000{it}.png" for it in range(3)]
    sizes = {Image.open(path).size for path in grids}
    with Image.open(folder / "animation.gif") as animation:
        assert animation.n_frames == 3 and {animation.size} == sizes


def test_a_run_leaves_no_other_files(whole_run):
    _, folder, record = whole_run
    expected = {"run.json", "checkpoint.pt", "results.json", "animation.gif", "curves.png",
                "wandb"}
    expected |= {f"grid_00000{it}.png" for it in range(3)}
    improved = {str(it) for it in range(3) if (folder / f"images_{it}.pt").exists()}
    assert {"0", str(record["best_iteration"])} <= improved
    expected |= {f"{name}_{tag}.pt" for name in ("images", "labels", "syn_lr") for tag in improved | {"best"}}
    assert {path.name for path in folder.iterdir()} == expected


def test_flags_without_effect_are_no_part_of_what_a_run_is(cheap_flags, whole_run, run_here):
    _, folder, _ = whole_run
    done = run_here(SCRIPT, *cheap_flags, *LEARNING, "--canvas_size=3", "--canvas_samples=2", cwd=folder.parents[2])
    assert done.returncode == 0 and f"Files: {folder.relative_to(folder.parents[2])}" in done.stdout  # found, finished


def test_results_hold_settings_versions_and_every_evaluation(whole_run):
    _, _, record = whole_run
    assert record["settings"].items() >= {"model": MODEL, "ipc": 2, "lr_img": 1e6, "seed": 0, "batch_syn": 20}.items()
    assert {"torch", "numpy", "kornia"} <= set(record["versions"])
    assert record["data"]["val_fraction"] == 0.1 and record["experts"] == len(record["experts_test_accuracy"]) == 3
    assert [row["iteration"] for row in record["evaluations"]] == [0, 1, 2]
    assert record["evaluations"][0]["loss"] is None
    assert all(row["loss"] > 0 and row["syn_lr"] > 0 for row in record["evaluations"][1:])
    for row in (*record["evaluations"], *record["random_real"]):
        assert all(0 <= value <= 1 for part in ("val", "test") for value in row["scores"][MODEL][part])
    val = [row["scores"][MODEL]["val"][0] for row in record["evaluations"]]
    assert record["best_iteration"] == val.index(max(val))
    best = record["evaluations"][record["best_iteration"]]
    assert [row["syn_lr"] for row in record["random_real"]] == pytest.approx([1e-5, best["syn_lr"]])


def test_a_run_ends_with_a_table_of_real_distilled_and_all_images(whole_run):
    done, folder, record = whole_run
    lines = done.stdout.splitlines()
    learned = f"{record['evaluations'][record['best_iteration']]['syn_lr']:.5f}"
    assert learned != "0.00001"
    for start in ("20 random real images        0.00001", f"20 random real images        {learned}",
                  f"20 distilled images          {learned}", "all 160 training images"):
        assert sum(line.startswith(start) and "%" in line for line in lines) == 1, start
    assert folder.name in lines[-1]


def test_wandb_logs_offline_under_the_documented_keys_without_asking(whole_run):
    done, folder, record = whole_run
    rows = history(folder)
    assert [row["Progress"] for row in rows] == [0, 1, 2]
    keys = {key.split("|")[0] for key in rows[0]}
    assert keys >= {"Progress", f"Accuracy/{MODEL}", f"Max_Accuracy/{MODEL}", f"Std/{MODEL}", f"Max_Std/{MODEL}",
                    "Seconds", "Pixels", "Synthetic_Images", "Synthetic_Pixels", "Clipped_Synthetic_Images/std_2.5",
                    "Synthetic_LR", "Grand_Loss", "Start_Epoch"}
    for row, recorded in zip(rows, record["evaluations"]):
        assert row[f"Accuracy/{MODEL}"] == pytest.approx(recorded["scores"][MODEL]["test"][0])
        assert row["Synthetic_LR"] == pytest.approx(recorded["syn_lr"])
    for row, recorded in zip(rows, record["evaluations"][1:]):
        assert row["Grand_Loss"] == pytest.approx(recorded["loss"]) and row["Start_Epoch"] in (0, 1)
    assert done.stdout.count("wandb sync") == 1 and "wandb: (" not in done.stdout + done.stderr


def test_wandb_knows_axis_settings_and_what_was_reached(whole_run):
    _, folder, record = whole_run
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = list(records_of(path.read_bytes()))
    axes = {part.metric.name or part.metric.glob_name: part.metric.step_metric for part in records
            if part.WhichOneof("record_type") == "metric"}
    assert axes["*"] == "Progress"
    config = {item.key: json.loads(item.value_json) for part in records if part.WhichOneof("record_type") == "run"
              for item in part.run.config.update}
    assert config.items() >= {"model": MODEL, "ipc": 2, "device": "cpu", "torch": torch.__version__}.items()
    summary = {item.key or item.nested_key[0]: json.loads(item.value_json) for part in records
               if part.WhichOneof("record_type") == "summary" for item in part.summary.update}
    best = record["evaluations"][record["best_iteration"]]
    assert summary["Best_Iteration"] == record["best_iteration"]
    assert summary[f"Best_Accuracy/{MODEL}"] == pytest.approx(best["scores"][MODEL]["test"][0])
    assert summary[f"Final_Accuracy/{MODEL}"] == pytest.approx(record["evaluations"][-1]["scores"][MODEL]["test"][0])
    assert summary["Best_Synthetic_LR"] == best["syn_lr"]
    assert summary["Peak_Memory"] > 10**8 and summary["Total_Seconds"] > 0
    assert f"torch {torch.__version__}" in summary["Versions"]


def test_pictures_on_wandb_are_there_and_say_what_they_show(whole_run):
    _, folder, _ = whole_run
    (row, *_) = history(folder)
    for key in ("Synthetic_Images", "Clipped_Synthetic_Images/std_2.5"):
        assert all(part in row[f"{key}|caption"] for part in ("iteration 0", *datasets.CLASS_NAMES))
        (path,) = folder.glob(f"wandb/offline-run-*/files/{row[f'{key}|path']}")
        with Image.open(path) as picture, Image.open(folder / "grid_000000.png") as grid:
            assert picture.size == grid.size


def test_curves_are_drawn(whole_run):
    with Image.open(whole_run[1] / "curves.png") as picture:
        assert picture.size == (1600, 450) and len(picture.getcolors(2**20)) > 100


def test_a_log_file_holds_no_control_characters(whole_run):
    done, *_ = whole_run
    assert not any(c in done.stdout + done.stderr for c in "\r\x1b")
    assert sum(line.startswith("iteration".rjust(9) + " network") for line in done.stdout.splitlines()) == 1


def test_asked_to_go_online_without_a_login_wandb_goes_offline_with_a_warning(run, cheap_flags, tmp_path):
    flags = ("--wandb_mode=online", "--Iteration=0", "--epoch_eval_train=1")
    done = run(SCRIPT, *cheap_flags, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nobody is logged in" in done.stderr and len(history(results(tmp_path)[0])) == 1


@pytest.mark.parametrize("flags, pictures", [([], False), (["--force_save"], True)])
def test_with_50_images_per_class_pictures_are_logged_only_when_forced(run, tmp_path, toysat_flags, flags, pictures):
    done = run(SCRIPT, *toysat_flags, "--ipc=50", "--Iteration=0", "--num_eval=1", "--epoch_eval_train=1",
               "--expert_epochs=1", "--max_start_epoch=1", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = history(next(tmp_path.glob("logged_files/ToySAT/*")))
    assert "Accuracy/MLP" in row and any(key.startswith("Pixels") for key in row)
    assert any(key.startswith("Synthetic_Images") for key in row) == pictures


# ---------------------------------------------------------------------------------------------------------------------
# Determinism


def same_images(folder, other):
    return torch.equal(load(folder / "images_best.pt"), load(other / "images_best.pt"))


def test_the_same_command_gives_bit_identical_images(whole_run, run, cheap_flags, tmp_path):
    _, folder, record = whole_run
    assert run(SCRIPT, *cheap_flags, *LEARNING, cwd=tmp_path).returncode == 0
    again, record_again = results(tmp_path)
    assert same_images(folder, again) and course(record) == course(record_again)
    assert record["random_real"] == record_again["random_real"]
    assert [row["scores"] for row in record["evaluations"]] == [row["scores"] for row in record_again["evaluations"]]
    last = "grid_000002.png"
    assert Image.open(folder / last).tobytes() == Image.open(again / last).tobytes()


def test_load_all_changes_no_bit(whole_run, distill):
    _, folder, record = whole_run
    again, record_again = distill(*LEARNING, "--load_all")
    assert same_images(folder, again) and course(record) == course(record_again)
    assert folder.name == again.name and record["settings"] == record_again["settings"]


@pytest.mark.parametrize("flags", [["--compile"], pytest.param(["--compile", "--amp"], marks=pytest.mark.bfloat16)])
def test_compilation_and_bfloat16_change_a_run_only_a_little(flags, whole_run, run, cheap_flags, tmp_path):
    done = run(SCRIPT, *cheap_flags, *LEARNING, *flags, "--wandb_mode=disabled", cwd=tmp_path)
    if "torch.compile failed" in done.stderr:
        pytest.skip("no C++ compiler, or no header files of Python")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    losses, others = ([row["loss"] for row in record["evaluations"][1:]]
                      for record in (whole_run[2], results(tmp_path)[1]))
    assert losses == pytest.approx(others, rel=0.02)
    assert losses != others and "compiled step in" in done.stdout and "compiled step_back in" in done.stdout


def test_both_engines_learn_nearly_the_same(whole_run, distill):
    _, folder, record = whole_run
    other, record_other = distill(*LEARNING, "--unroll=autograd")
    assert record["settings"]["unroll"] == "adjoint" and record_other["settings"]["unroll"] == "autograd"
    images, others = (load(place / "images_2.pt") for place in (folder, other))
    assert not torch.equal(images, load(folder / "images_0.pt"))
    assert (images - others).norm() <= 1e-3 * images.norm()  # in float32 a ReLU may flip, so not each pixel
    for row, row_other in zip(record["evaluations"][1:], record_other["evaluations"][1:]):
        assert (row["loss"], row["syn_lr"]) == pytest.approx((row_other["loss"], row_other["syn_lr"]), rel=1e-4)


def test_without_bfloat16_a_warning_says_so_and_the_run_is_that_of_float32(whole_run, distill, monkeypatch):
    monkeypatch.setattr(utils, "has_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="--amp: this cpu does not compute in bfloat16; going on in float32"):
        again, record = distill(*LEARNING, "--amp")
    assert same_images(whole_run[1], again) and record["settings"]["amp"] is False


def test_another_seed_gives_other_images(whole_run, distill):
    _, folder, record = whole_run
    other, record_other = distill("--ipc=2", "--seed=1")
    assert not torch.equal(load(folder / "images_0.pt"), load(other / "images_0.pt"))
    assert course(record)[1:] != course(record_other)[1:]


def test_how_often_is_evaluated_does_not_change_what_is_learned(distill, whole_run):
    _, _, record = whole_run
    _, seldom = distill(*LEARNING, "--eval_it=2", "--epoch_eval_train=1", "--num_eval=2")
    assert [row["iteration"] for row in seldom["evaluations"]] == [0, 2]
    assert seldom["evaluations"][-1]["syn_lr"] == record["evaluations"][-1]["syn_lr"]


# ---------------------------------------------------------------------------------------------------------------------
# Models and options


@pytest.mark.parametrize("model", ["ConvNet", "MLP", "ResNet"])
def test_each_model_distills(run_here, tiny_flags, tiny_buffers, tmp_path, model):
    full_name = "ResNet18" if model == "ResNet" else model
    done = run_here(SCRIPT, *tiny_flags, f"--model={model}", f"--buffer_path={tiny_buffers(full_name)}",
                    "--Iteration=1", "--num_eval=1", "--epoch_eval_train=1", "--batch_real=10", "--syn_steps=2",
                    "--batch_syn=3", "--expert_epochs=1", "--max_start_epoch=1", "--lr_lr=1e-6",
                    "--wandb_mode=disabled", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, record = results(tmp_path)
    assert set(record["evaluations"][1]["scores"]) == {full_name}
    assert record["evaluations"][1]["syn_lr"] != record["evaluations"][0]["syn_lr"]
    assert record["evaluations"][1]["loss"] > 0


@pytest.fixture(scope="module")
def train_images(eurosat_folder):
    data = datasets.load_data("EuroSAT", eurosat_folder, zca=False, val_fraction=0.1, device="cpu")
    return [data.train[0][data.train[1] == label] for label in range(10)]


def test_images_start_from_different_real_training_images_of_their_class(whole_run, train_images):
    images = load(whole_run[1] / "images_0.pt")
    for index, image in enumerate(images):
        assert any(torch.equal(image, real) for real in train_images[index // 2])
    assert len(images.unique(dim=0)) == 20


def test_images_start_from_noise(distill):
    folder, _ = distill("--pix_init=noise")
    images = load(folder / "images_0.pt")
    assert images.shape == (10, 3, 64, 64)
    assert abs(images.mean()) < 0.02 and abs(images.std() - 1) < 0.02


def test_texture_distills_canvases_tiled_with_real_images(distill, train_images):
    folder, record = distill("--texture", "--canvas_samples=2")
    canvases = load(folder / "images_0.pt")
    assert canvases.shape == load(folder / "images_best.pt").shape == (10, 3, 128, 128)
    for label, canvas in enumerate(canvases):
        for tile in (canvas[:, :64, :64], canvas[:, :64, 64:], canvas[:, 64:, :64], canvas[:, 64:, 64:]):
            assert any(torch.equal(tile, real) for real in train_images[label])
    assert record["evaluations"][2]["loss"] > 0


def test_texture_starts_from_noise_of_the_canvas_size(distill):
    folder, _ = distill("--texture", "--canvas_size=3", "--pix_init=noise", "--Iteration=1", "--epoch_eval_train=1")
    assert load(folder / "images_0.pt").shape == (10, 3, 192, 192)


def test_without_dsa_or_with_no_aug_the_student_sees_plain_images(run_here, cheap_flags, tmp_path):
    courses = []
    for name, flag in (("no_dsa", "--dsa=False"), ("no_aug", "--no_aug"), ("dsa", "--dsa=True")):
        (tmp_path / name).mkdir()
        done = run_here(SCRIPT, *cheap_flags, "--wandb_mode=disabled", flag, cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
        courses.append(course(results(tmp_path / name)[1]))
    assert courses[0] == courses[1] != courses[2]


def test_mini_batches_may_be_smaller_than_the_synthetic_set(distill):
    _, record = distill("--batch_syn=4", "--syn_steps=4")
    assert record["settings"]["batch_syn"] == 4
    assert record["evaluations"][2]["loss"] > 0


@pytest.mark.parametrize("flags, experts", [(["--max_files=1"], 2), (["--max_experts=1"], 2),
                                            (["--max_files=1", "--max_experts=1"], 1)])
def test_files_and_experts_to_read_can_be_limited(distill, flags, experts):
    _, record = distill(*flags, "--Iteration=0", "--epoch_eval_train=1")
    assert record["experts"] == len(record["experts_test_accuracy"]) == experts


def test_the_best_of_a_single_evaluation_is_the_start(distill):
    folder, record = distill("--Iteration=0", "--epoch_eval_train=1")
    assert record["best_iteration"] == 0 and len(record["evaluations"]) == 1
    with Image.open(folder / "animation.gif") as animation:
        assert animation.n_frames == 1


WIDTHS, DEPTHS = ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"), [f"ConvNetD{depth}" for depth in "1234"]
NORMS, POOLINGS = [f"ConvNet{norm}N" for norm in "NBLIG"], [f"ConvNet{pooling}P" for pooling in "NMA"]


@pytest.mark.parametrize("mode, networks", [
    ("S", ["MLP"]), ("A", ["ConvNet", "MLP", "ResNet18"]), ("R", ["MLP", "ResNet18"]), ("M", ["MLP"]),
    ("C", ["MLP", "ConvNet"]), ("W", WIDTHS), ("D", DEPTHS), ("P", POOLINGS), ("N", NORMS),
])
def test_each_eval_mode_trains_its_networks(run_here, tiny_flags, tiny_buffers, tmp_path, mode, networks):
    done = run_here(SCRIPT, *tiny_flags, "--model=MLP", f"--buffer_path={tiny_buffers('MLP')}", f"--eval_mode={mode}",
                    "--Iteration=0", "--num_eval=1", "--epoch_eval_train=1", "--batch_real=10", "--expert_epochs=1",
                    "--max_start_epoch=1", "--wandb_mode=disabled", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, record = results(tmp_path)
    (random_real,) = record["random_real"]
    assert set(record["evaluations"][0]["scores"]) == set(random_real["scores"]) == set(networks)
    assert all(len(scores["test"]) == 1 for scores in record["evaluations"][0]["scores"].values())


def test_eval_mode_m_adds_an_mlp_to_the_model(distill):
    _, record = distill("--eval_mode=M", "--Iteration=0", "--epoch_eval_train=1")
    assert set(record["evaluations"][0]["scores"]) == {MODEL, "MLP"}


@pytest.mark.parametrize("model", ["MLP", "ConvNet", "ResNet18"])
def test_zca_runs_end_to_end_and_also_saves_and_logs_the_images_as_pixels(run, run_here, tiny_flags, zca_folder,
                                                                         tmp_path, model):
    flags = (*tiny_flags, f"--data_path={zca_folder}", "--zca", f"--model={model}", f"--buffer_path={tmp_path}")
    done = run_here(EXPERTS_SCRIPT, *flags, "--num_experts=1", "--train_epochs=1", cwd=tmp_path)
    assert done.returncode == 0 and "fitting ZCA" not in done.stdout
    assert (tmp_path / "EuroSAT" / model / "replay_buffer_0.pt").is_file()
    done = run(SCRIPT, *flags, "--Iteration=1", "--num_eval=1", "--epoch_eval_train=1", "--batch_real=10",
               "--syn_steps=2", "--expert_epochs=1", "--max_start_epoch=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, _ = results(tmp_path)
    white, pixels = load(folder / "images_0.pt"), load(folder / "images_zca_0.pt")
    images, *_ = datasets.load_eurosat(zca_folder)
    assert all((pixel - images / 255).abs().amax((1, 2, 3)).min() < 1e-3 for pixel in pixels)
    assert not torch.allclose(white, pixels, atol=0.1)
    assert load(folder / "images_zca_best.pt").shape == (10, 3, 64, 64)
    keys = {key.split("|")[0] for key in history(folder)[0]}
    assert keys >= {"Reconstructed_Images", "Reconstructed_Pixels", "Clipped_Reconstructed_Images/std_2.5"}


def test_without_validation_images_the_test_set_chooses(run_here, tiny_flags, tmp_path):
    flags = (*tiny_flags, "--val_fraction=0", "--model=MLP", f"--buffer_path={tmp_path}")
    done = run_here(EXPERTS_SCRIPT, *flags, "--num_experts=1", "--train_epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_here(SCRIPT, *flags, "--Iteration=3", "--eval_it=1", "--num_eval=1", "--epoch_eval_train=5",
                    "--batch_real=10", "--syn_steps=2", "--lr_img=1e5", "--lr_lr=1e-7", "--expert_epochs=1",
                    "--max_start_epoch=2", "--wandb_mode=disabled", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, record = results(tmp_path)
    test = [row["scores"]["MLP"]["test"][0] for row in record["evaluations"]]
    assert record["best_iteration"] == test.index(max(test))


def test_mtts_own_experts_are_taken_with_a_warning(distill, buffers, tmp_path):
    shutil.copytree(buffers, tmp_path / "buffers", ignore=shutil.ignore_patterns("*.json"))
    with pytest.warns(UserWarning, match=r"replay_buffer_0\.pt has no record of its settings"):
        _, record = distill(f"--buffer_path={tmp_path / 'buffers'}", "--Iteration=1", "--epoch_eval_train=1")
    assert record["experts"] == 3 and record["experts_test_accuracy"] == []


def test_a_step_size_that_leaves_the_positive_numbers_ends_the_run_in_one_line(run_here, cheap_flags, tmp_path):
    done = run_here(SCRIPT, *cheap_flags, "--lr_lr=1000", "--wandb_mode=disabled", "--eval_it=2", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("distillation.py: error: diverged at iteration") and "Lower --lr_lr" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("values, syn_lr, fault", [
    ({"loss": torch.tensor(math.nan)}, 0.01, "loss is not finite"),
    ({"loss": torch.tensor(1.0), "gradient": torch.tensor([0, math.inf])}, 0.01, "gradient is not finite"),
    ({}, -0.01, "α is not positive"), ({}, math.nan, "α is not positive"), ({}, math.inf, "α is not positive"),
])
def test_what_is_not_finite_is_named_with_its_place(values, syn_lr, fault):
    with pytest.raises(files.ReportedError, match=rf"diverged at iteration 3: {fault}, α = .*Lower --lr_lr"):
        check_finite("iteration 3", torch.tensor(syn_lr), **values)
    check_finite("iteration 3", torch.tensor(0.01), loss=torch.tensor(1.0))


def test_a_run_name_is_not_reused_with_other_settings(distill, run_here, cheap_flags, tmp_path):
    folder, _ = distill("--run_name=mine", "--Iteration=0", "--epoch_eval_train=1")
    assert folder.name == "mine"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = run_here(SCRIPT, *cheap_flags, "--run_name=mine", "--ipc=2", "--wandb_mode=disabled", cwd=tmp_path)
    assert done.returncode == 2 and "ipc=1 (here 2)" in done.stderr and "--run_name" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_networks_trained_together_end_as_those_trained_one_after_the_other():
    images = torch.randn(3, 7, 3, 64, 64, generator=seeded(0), dtype=torch.float64)
    sets = [(x, torch.arange(7)) for x in images]
    settings = {"syn_lr": 0.02, "epochs": 4, "batch_size": 4, "prepare": utils.make_augment(True, utils.DSA_STRATEGY)}

    def fresh():
        generators = [seeded(k) for k in range(3)]
        networks = [utils.initial_network("ConvNetW32", (10, 64), generator, "cpu") for generator in generators]
        return [network.double() for network in networks], generators

    networks, generators = fresh()
    for network, training_set, generator in zip(networks, sets, generators):
        evaluation.evaluate_synset(network, network, *training_set, generator=generator, name="", **settings)
    together, generators = fresh()
    step = partial(sgd_step, ReparamModule(together[0]))
    train_together(together, step, sets, generators=generators, name="", **settings)
    for one, other, initial in zip(networks, together, fresh()[0]):
        for p, q, r in zip(one.parameters(), other.parameters(), initial.parameters()):
            assert not torch.equal(p, r)
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_networks_trained_together_keep_parameters_aligned_to_16_bytes():
    images, networks = torch.randn(3, 4, 3, 16, 16), [ConvNet(3, 10, 16, width=4, depth=1) for _ in range(3)]
    step = partial(sgd_step, ReparamModule(networks[0]))
    assert sum(p.numel() for p in networks[0].parameters()) % 4  # so that rows of (K, P) are not aligned
    train_together(networks, step, [(x, torch.arange(4)) for x in images], 0.01, epochs=1, batch_size=4,
                   prepare=lambda x, y, generator: (x, y), generators=[seeded(k) for k in range(3)], name="")
    for parameter in (p for network in networks for p in network.parameters()):
        assert parameter.storage_offset() * parameter.element_size() % 16 == 0
        assert parameter.data_ptr() % 16 == 0


def test_batches_pass_over_all_images_before_any_comes_again():
    x, y = torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10)
    batches = list(synthetic_batches(x, y, 6, 4, lambda x, y, generator: (x, y), seeded(0)))
    assert len(batches) == 6 and all(torch.equal(images.flatten().long(), labels) for images, labels in batches)
    for three in (batches[:3], batches[3:]):
        assert sorted(torch.cat([labels for _, labels in three]).tolist()) == list(range(10))
    assert [labels.tolist() for _, labels in batches[:3]] != [labels.tolist() for _, labels in batches[3:]]


def test_windows_of_a_canvas_wrap_around_its_borders():
    canvases, labels = torch.randn(3, 3, 128, 128, generator=seeded(0)), torch.tensor([4, 5, 6])
    windows, window_labels = cut_windows(canvases, labels, 2, 64, seeded(1))
    assert windows.shape == (6, 3, 64, 64) and window_labels.tolist() == [4, 5, 6, 4, 5, 6]
    for window, canvas in zip(windows, canvases.repeat(2, 1, 1, 1)):
        top, left = torch.nonzero(canvas[0] == window[0, 0, 0])[0].tolist()
        assert torch.equal(canvas.roll((-top, -left), dims=(1, 2))[:, :64, :64], window)


def experts_of(*snapshots):
    """Experts of given snapshots, each a list of tensors."""
    return Experts([Expert(list(snapshots), "expert 0 of replay_buffer_0.pt", None)], {})


def test_a_segment_joins_two_snapshots_of_one_expert():
    experts = experts_of(*([torch.full((2, 2), 10.0 + epoch), torch.full((1,), -1.0)] for epoch in range(5)))
    start, target = experts.segment(0, 1, 3, "cpu")
    assert start.tolist() == [11, 11, 11, 11, -1] and target.tolist() == [14, 14, 14, 14, -1]


@pytest.mark.parametrize("values, fault", [
    ((1, 0, 1), "expert 0 of replay_buffer_0.pt is the same at epochs 0 and 2"),
    ((1, math.nan, 2), "expert 0 of replay_buffer_0.pt is not finite at epoch 1"),
    ((1, 0, math.inf), "expert 0 of replay_buffer_0.pt is not finite at epoch 2"),
])
def test_a_damaged_expert_is_named_or_left_out(values, fault):
    damaged = experts_of(*([torch.full((2,), float(value))] for value in values))
    with pytest.raises(files.ReportedError, match=fault + ".*--skip_damaged"):
        damaged.check_segments(1, 2, skip_damaged=False)
    whole = experts_of(*([torch.full((2,), float(value))] for value in range(3)))
    both = Experts(damaged.members + whole.members, {})
    with pytest.warns(UserWarning, match=fault):
        assert both.check_segments(1, 2, skip_damaged=True).members == whole.members
    with pytest.warns(UserWarning, match=fault), pytest.raises(files.ReportedError, match="no expert is left"):
        damaged.check_segments(1, 2, skip_damaged=True)


def test_the_validation_set_chooses_the_best_iteration_and_the_test_set_only_without_one():
    chosen = []
    for val in ([[0.5], [0.6], [0.6]], [[], [], []]):
        evaluations = Evaluations()
        for it, test in enumerate((0.9, 0.3, 0.95)):
            evaluations.add(it, {"net": Scores(val[it], [test])}, 0.01, [], 0.0)
        chosen.append(evaluations.best["iteration"])
        assert evaluations.log()["Max_Accuracy/net"] == (0.3 if val[0] else 0.95)
    assert chosen == [1, 2]


@pytest.mark.parametrize("classes, per_class, columns, order", [
    (10, 1, 5, range(10)),
    (10, 2, 10, [*range(0, 20, 2), *range(1, 20, 2)]),  # a column per class
    (3, 2, 3, [0, 2, 4, 1, 3, 5]),
    (12, 1, 10, range(12)),
    (12, 2, 2, range(24)),  # a row per class
])
def test_a_grid_shows_every_image_at_its_place(classes, per_class, columns, order):
    images = torch.zeros(classes * per_class, 3, 64, 64)
    for index, image in enumerate(images):
        image[:, 30:34, 2 * index + 1:2 * index + 3] = 1  # a white mark whose place tells the image
    labels = torch.arange(classes).repeat_interleave(per_class)
    picture = np.array(draw_grid(images, labels, "title", [f"class {label}" for label in range(classes)])).max(2)
    areas, _ = scipy.ndimage.label(picture == 0)
    places = [place for place in scipy.ndimage.find_objects(areas) if picture[place].size > 1000]  # in reading order
    marks = [np.argmax(picture[place].max(0) == 255) / picture[place].shape[1] * 64 for place in places]
    assert [round((mark - 1) / 2) for mark in marks] == list(order)
    assert len({place[1].start for place in places}) == columns


@pytest.mark.parametrize("classes, per_class, side", [
    (100, 10, 32), (200, 50, 32), (500, 2, 32), (2, 450, 32), (10, 12, 512)])
def test_a_grid_of_very_many_images_can_be_part_of_an_animation(classes, per_class, side):
    images = torch.zeros(1).expand(classes * per_class, 3, side, side)
    labels = torch.arange(classes).repeat_interleave(per_class)
    picture = draw_grid(images, labels, "title", ["a class with a very long name"] * classes)
    assert 3e6 < picture.width * picture.height < 32e6 and max(picture.size) < 32_000
    Image.open(save(picture, "GIF")).load()


def save(picture, kind):
    picture.save(file := io.BytesIO(), format=kind)
    return file


def test_a_name_is_shortened_to_the_width_of_its_image():
    font = ImageFont.load_default(size=12)
    name = "a class with a very long name"
    assert report.shortened(name, font, 1000) == name
    short = report.shortened(name, font, 100)
    assert short.endswith("…") and name.startswith(short[:-1]) and 80 < font.getlength(short) <= 100
