"""`distillation.py` from the command line, on small pictures of four patterns."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import arguments, history, load_data, records_of
from PIL import Image

import utils
from datasets import folders
from datasets.preprocessing import Form, Layout, noise
from objectives.real_loss import real_augment
from objectives.segments import student_augment
from run.state import first_fault
from system import compilation, devices

SCRIPT, EXPERTS_SCRIPT = "distillation.py", "expert_trajectories.py"
MODEL = "ConvNetD1"
PATTERNS = ("checks", "columns", "halves", "rows")


def results(cwd):
    """The folder of the only run below a working folder, and its results.json."""
    (path,) = cwd.glob("logged_files/ImageFolder/*/results.json")
    return path.parent, json.loads(path.read_text())


def course(record):
    """Losses and step sizes in full precision: they tell whether two runs learned the same."""
    return [(row["iteration"], row["loss"], row["syn_lr"]) for row in record["evaluations"]]


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    """Twenty noisy pictures of 8×8 pixels of each pattern; see PATTERNS."""
    folder = tmp_path_factory.mktemp("patterns")
    random = np.random.default_rng(0)
    row, column = np.indices((8, 8))
    drawn = ((row + column) % 2, column % 2, row // 4, row % 2)
    for name, pattern in zip(PATTERNS, drawn):
        (folder / name).mkdir()
        for number in range(20):
            pixels = 120 * pattern[:, :, None] + random.integers(0, 100, (8, 8, 3))
            picture = Image.fromarray(pixels.astype(np.uint8))
            picture.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data_flags(patterns):
    """Flags of both scripts; without wandb unless another --wandb_mode follows."""
    flags = ["--dataset=ImageFolder", f"--data_path={patterns}", "--im_size=8", "--no-compile"]
    return [*flags, f"--model={MODEL}", "--val_fraction=0.2", "--wandb_mode=disabled"]


@pytest.fixture(scope="module")
def train(run_here, data_flags):
    """Train experts of three epochs in a folder."""

    def train(folder, *flags):
        usual = [*data_flags, "--train_epochs=3", "--batch_train=8", f"--buffer_path={folder}"]
        done = run_here(EXPERTS_SCRIPT, *usual, *flags, cwd=folder)
        assert done.returncode == 0, done.stderr

    return train


@pytest.fixture(scope="module")
def cheap_flags(train, data_flags, tmp_path_factory):
    """Flags for a run of a second with three experts."""
    experts = tmp_path_factory.mktemp("experts")
    train(experts, "--num_experts=3")
    flags = [*data_flags, f"--buffer_path={experts}", "--Iteration=2", "--eval_it=1"]
    flags += ["--num_eval=1", "--epoch_eval_train=2", "--batch_real=8", "--syn_steps=2"]
    return [*flags, "--expert_epochs=1", "--max_start_epoch=2", "--lr_lr=1e-6"]


@pytest.fixture
def distill(run_here, cheap_flags, tmp_path):
    """Distill with further flags, in this process and without wandb: the run's folder, results."""

    def distill(*flags):
        done = run_here(SCRIPT, *cheap_flags, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return results(tmp_path)

    return distill


# --------------------------------------------------------------------------------------------------
# One run, in full
#
# The step size starts so small that the first evaluation is by chance; the second is clearly
# better. So images_best.pt holds images that were learned.

LEARNING = ["--ipc=2", "--lr_teacher=1e-5", "--lr_lr=1e-4", "--lr_img=1e4", "--epoch_eval_train=40"]


@pytest.fixture(scope="module")
def whole_run(forked, cheap_flags, tmp_path_factory):
    """A run of which nothing is said about wandb: what was printed, its folder and results."""
    cwd = tmp_path_factory.mktemp("run")
    flags = [flag for flag in cheap_flags if not flag.startswith("--wandb_mode")]
    done = forked(SCRIPT, *flags, *LEARNING, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, *results(cwd)


def test_a_run_writes_images_labels_and_step_size_as_bare_tensors(whole_run):
    _, folder, record = whole_run
    best = record["best_iteration"]
    for tag, row in (("0", 0), (str(best), best), ("best", best)):
        images, labels = load(folder / f"images_{tag}.pt"), load(folder / f"labels_{tag}.pt")
        assert images.shape == (8, 3, 8, 8) and images.dtype == torch.float32
        assert not images.requires_grad
        assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and labels.dtype == torch.int64
        syn_lr = load(folder / f"syn_lr_{tag}.pt")
        assert syn_lr.shape == ()
        assert math.isclose(syn_lr, record["evaluations"][row]["syn_lr"], rel_tol=1e-6)
    learned = load(folder / "images_best.pt")
    assert best > 0 and not torch.equal(load(folder / "images_0.pt"), learned)
    assert torch.equal(load(folder / f"images_{best}.pt"), learned)
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
    expected = {"run.json", "checkpoint.pt", "results.json", "animation.gif", "curves.png", "wandb"}
    expected.add("test_images.txt")
    expected |= {f"grid_00000{it}.png" for it in range(3)}
    kept = {str(it) for it in range(3) if (folder / f"images_{it}.pt").exists()}
    assert {"0", str(record["best_iteration"]), "2"} <= kept
    for tag in kept | {"best"}:
        expected |= {f"{name}_{tag}.pt" for name in ("images", "labels", "syn_lr")}
    assert {path.name for path in folder.iterdir()} == expected


def test_results_hold_settings_versions_and_every_evaluation(whole_run):
    _, _, record = whole_run
    settings = {"model": MODEL, "ipc": 2, "lr_img": 1e4, "batch_syn": 8}
    assert record["settings"].items() >= settings.items()
    assert "seed" not in record["settings"]  # 0, by default
    assert {"eurosat-mtt", "torch", "numpy", "kornia"} <= set(record["versions"])
    assert record["data"]["val_fraction"] == 0.2
    assert record["experts"] == len(record["experts_test_accuracy"]) == 3
    assert [row["iteration"] for row in record["evaluations"]] == [0, 1, 2]
    assert record["evaluations"][0]["loss"] is None
    assert all(row["loss"] > 0 and row["syn_lr"] > 0 for row in record["evaluations"][1:])
    for row in (*record["evaluations"], *record["random_real"]):
        scores = row["scores"][MODEL]
        assert all(0 <= value <= 1 for part in ("val", "test") for value in scores[part])
    val = [row["scores"][MODEL]["val"][0] for row in record["evaluations"]]
    assert record["best_iteration"] == val.index(max(val))
    best = record["evaluations"][record["best_iteration"]]
    assert [row["syn_lr"] for row in record["random_real"]] == pytest.approx([1e-5, best["syn_lr"]])


def test_a_run_ends_with_a_table_of_real_distilled_and_all_images(whole_run):
    done, folder, record = whole_run
    lines = done.stdout.splitlines()
    learned = f"{record['evaluations'][record['best_iteration']]['syn_lr']:.5f}"
    assert learned != "0.00001"
    for start in (
        "8 random real images         0.00001",
        f"the same, at the learned α   {learned}",
        f"8 distilled images           {learned}",
        "all 56 images",
    ):
        assert sum(line.startswith(start) and "%" in line for line in lines) == 1, start
    assert folder.name in lines[-1]


def test_a_log_file_holds_no_control_characters(whole_run):
    done, *_ = whole_run
    assert not any(c in done.stdout + done.stderr for c in "\r\x1b")
    header = "iteration network"
    assert sum(line.strip().startswith(header) for line in done.stdout.splitlines()) == 1


def test_a_run_that_is_found_again_is_finished_also_under_flags_without_effect(
    run_here, cheap_flags, whole_run
):
    _, folder, _ = whole_run
    cwd = folder.parents[2]
    flags = ["--load_all", "--checkpoint_every=1", "--unroll_memory=0.1", "--force_save"]
    done = run_here(SCRIPT, *cheap_flags, *LEARNING, *flags, cwd=cwd)
    assert done.returncode == 0 and "finished before, at iteration 2" in done.stdout
    assert f"Files: {folder.relative_to(cwd)}" in done.stdout
    assert "Best iteration: 1" in done.stdout


# --------------------------------------------------------------------------------------------------
# Its page on Weights & Biases


def test_wandb_logs_offline_under_the_documented_keys_without_asking(whole_run):
    done, folder, record = whole_run
    rows = history(folder)
    assert [row["Progress"] for row in rows] == [0, 1, 2]
    keys = {key.split("|")[0] for key in rows[0]}
    documented = "Progress Seconds Grand_Loss Start_Epoch Synthetic_LR Pixels Synthetic_Pixels "
    documented += "Synthetic_Images Clipped_Synthetic_Images/std_2.5"
    for kind in ("Accuracy", "Std", "Val_Accuracy", "Val_Std", "Max_Accuracy", "Max_Std"):
        documented += f" {kind}/{MODEL}"
    assert keys >= set(documented.split())
    for row, recorded in zip(rows, record["evaluations"]):
        test = recorded["scores"][MODEL]["test"][0]
        assert row[f"Accuracy/{MODEL}"] == pytest.approx(test)
        assert row["Synthetic_LR"] == pytest.approx(recorded["syn_lr"])
    for row, recorded in zip(rows, record["evaluations"][1:]):
        assert row["Grand_Loss"] == pytest.approx(recorded["loss"])
        assert row["Start_Epoch"] in (0, 1)
    assert done.stdout.count("wandb sync") == 1
    assert "wandb: (" not in done.stdout + done.stderr


def test_wandb_knows_axis_settings_and_what_was_reached(whole_run):
    _, folder, record = whole_run
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    axes = {}
    config = {}
    summary = {}
    for part in records_of(path.read_bytes()):
        kind = part.WhichOneof("record_type")
        if kind == "metric":
            axes[part.metric.name or part.metric.glob_name] = part.metric.step_metric
        elif kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in part.run.config.update}
        elif kind == "summary":
            for item in part.summary.update:
                summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    assert axes["*"] == "Progress"
    expected = {"model": MODEL, "ipc": 2, "device": "cpu", "torch": torch.__version__}
    assert config.items() >= expected.items()
    best, final = record["evaluations"][record["best_iteration"]], record["evaluations"][-1]
    assert summary["Best_Iteration"] == record["best_iteration"]
    for name, row in (("Best", best), ("Final", final)):
        test = row["scores"][MODEL]["test"][0]
        assert summary[f"{name}_Accuracy/{MODEL}"] == pytest.approx(test)
        assert summary[f"{name}_Synthetic_LR"] == row["syn_lr"]
    assert summary["Peak_Memory"] > 10**8 and summary["Total_Seconds"] > 0
    assert f"torch {torch.__version__}" in summary["Versions"]


def test_pictures_on_wandb_are_there_and_say_what_they_show(whole_run):
    _, folder, _ = whole_run
    (row, *_) = history(folder)
    for key in ("Synthetic_Images", "Clipped_Synthetic_Images/std_2.5"):
        assert all(part in row[f"{key}|caption"] for part in ("iteration 0", *PATTERNS))
        (path,) = folder.glob(f"wandb/offline-run-*/files/{row[f'{key}|path']}")
        with Image.open(path) as picture, Image.open(folder / "grid_000000.png") as grid:
            assert picture.size == grid.size


# --------------------------------------------------------------------------------------------------
# Determinism


def assert_same_run(one, other):
    """Two runs, folder and results of each, have learned the same, bit for bit."""
    (folder, record), (other_folder, other_record) = one, other
    assert torch.equal(load(folder / "images_best.pt"), load(other_folder / "images_best.pt"))
    assert course(record) == course(other_record)
    assert record["random_real"] == other_record["random_real"]
    scores, other_scores = ([row["scores"] for row in r["evaluations"]] for _, r in (one, other))
    assert scores == other_scores
    last = "grid_000002.png"
    assert Image.open(folder / last).tobytes() == Image.open(other_folder / last).tobytes()


def test_the_same_command_gives_bit_identical_images(whole_run, distill):
    assert_same_run(whole_run[1:], distill(*LEARNING))


def test_load_all_changes_no_bit(whole_run, distill):
    folder, record = distill(*LEARNING, "--load_all")
    assert_same_run(whole_run[1:], (folder, record))
    assert folder.name == whole_run[1].name and record["settings"] == whole_run[2]["settings"]


def test_without_bfloat16_a_warning_says_so_and_the_run_is_that_of_float32(
    whole_run, distill, monkeypatch
):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    message = "--amp: this cpu has no bfloat16; continuing in float32"
    with pytest.warns(UserWarning, match=message):
        folder, record = distill(*LEARNING, "--amp")
    assert_same_run(whole_run[1:], (folder, record))
    assert record["settings"]["amp"] is False


def test_both_engines_learn_nearly_the_same(whole_run, distill):
    _, folder, record = whole_run
    other, record_other = distill(*LEARNING, "--unroll=autograd")
    assert "unroll" not in record["settings"]  # the adjoint, by default
    assert record_other["settings"]["unroll"] == "autograd"
    images, others = (load(place / "images_2.pt") for place in (folder, other))
    assert not torch.equal(images, load(folder / "images_0.pt"))
    # In float32 a ReLU may flip, so not each pixel.
    assert (images - others).norm() <= 1e-3 * images.norm()
    for row, row_other in zip(course(record)[1:], course(record_other)[1:]):
        assert row == pytest.approx(row_other, rel=1e-4)


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


# --------------------------------------------------------------------------------------------------
# What a run starts from


@pytest.fixture(scope="module")
def data(patterns):
    return load_data("ImageFolder", patterns, False, 0.2, torch.device("cpu"), im_size=8)


def is_one_of(image, label, data):
    """Whether an image is one of the training images with this label."""
    images, labels = data.train
    return any(torch.equal(image, real) for real in images[labels == label])


def test_images_start_from_different_real_training_images_of_their_class(whole_run, data):
    images = load(whole_run[1] / "images_0.pt")
    assert all(is_one_of(image, index // 2, data) for index, image in enumerate(images))
    assert len(images.unique(dim=0)) == 8


def test_noise_needs_no_real_images_of_a_class(start, specks_run, tmp_path):
    """Only random real images to compare with are more than there are."""
    flags = [*specks_run, "--pix_init=noise", "--ipc=15", "--Iteration=1"]
    running = start("distillation.py", *flags, cwd=tmp_path)
    assert running.wait() == 0, running.output()
    assert "warning: a class has fewer than 15 real images to compare with" in running.output()
    assert "random real" not in running.output() and "30 distilled images" in running.output()


@pytest.mark.parametrize("canvas_size, side", [(1, 8), (3, 24)])
def test_images_start_from_noise_also_of_the_canvas_size(data, canvas_size, side):
    random = torch.Generator().manual_seed(0)
    images, labels = noise(data, Layout(5, canvas_size=canvas_size), random)
    assert images.shape == (20, 3, side, side) and labels.bincount().tolist() == [5] * 4
    assert abs(images.mean()) < 0.1 and abs(images.std() - 1) < 0.1


def test_texture_distills_canvases_tiled_with_real_images(distill, data):
    folder, record = distill("--texture", "--canvas_samples=2")
    canvases = load(folder / "images_0.pt")
    assert canvases.shape == load(folder / "images_best.pt").shape == (4, 3, 16, 16)
    for label, canvas in enumerate(canvases):
        tiles = [canvas[:, r : r + 8, c : c + 8] for r in (0, 8) for c in (0, 8)]
        assert all(is_one_of(tile, label, data) for tile in tiles)
        assert len(torch.stack(tiles).unique(dim=0)) > 1
    assert record["evaluations"][2]["loss"] > 0


def test_texture_continues_canvases_as_small_as_images(distill, tmp_path):
    flags = ["--texture", "--canvas_size=1", "--Iteration=0"]
    start, _ = distill(*flags, "--run_name=start")
    start = start.rename(tmp_path / "start")
    folder, _ = distill(*flags, f"--pix_init={start}", "--run_name=on")
    assert torch.equal(load(folder / "images_0.pt"), load(start / "images_0.pt"))


@pytest.mark.parametrize(
    "changes, groups, real_groups",
    [
        ({}, ("color", "flip"), ("color", "flip")),
        ({"no_aug": True}, (), ()),
        ({"dsa": False}, (), ("plain",)),  # which cannot be differentiated
    ],
)
def test_the_student_sees_augmented_images_unless_told_otherwise(changes, groups, real_groups):
    args = arguments(dsa_strategy="color_flip", canvas_samples=3, **changes)
    augment = student_augment(args, Form(4, 8))
    assert (augment.side, augment.groups, augment.windows) == (8, groups, 0)
    args.texture = True
    assert student_augment(args, Form(4, 8)).windows == 3
    real = real_augment(args, Form(4, 8))
    assert (real.side, real.groups, real.windows) == (8, real_groups, 0)


# --------------------------------------------------------------------------------------------------
# Options


@pytest.mark.filterwarnings("ignore:.*no record")
def test_a_resnet_distills_under_either_name_beside_an_mlp(distill, tmp_path):
    folder = tmp_path / "buffers" / "ImageFolder_NO_ZCA" / "ResNet18"
    folder.mkdir(parents=True)
    generators = (utils.make_generator(k) for k in range(2))
    networks = [utils.initial_network("ResNet18", Form(4, 32), g, "cpu") for g in generators]
    expert = [[p.detach() for p in network.parameters()] for network in networks]
    torch.save([expert], folder / "replay_buffer_0.pt")
    flags = ["--model=ResNet", "--im_size=32", f"--buffer_path={tmp_path / 'buffers'}"]
    flags += ["--Iteration=1", "--max_start_epoch=1", "--batch_syn=2", "--epoch_eval_train=1"]
    _, record = distill(*flags, "--eval_mode=M")
    first, last = record["evaluations"]
    assert list(first["scores"]) == list(last["scores"]) == ["ResNet18", "MLP"]
    assert last["syn_lr"] != first["syn_lr"] and last["loss"] > 0


def test_compilation_is_of_the_steps_and_of_the_networks_of_an_evaluation(distill, monkeypatch):
    compiled = []
    monkeypatch.setattr(compilation.FAILURES, "seen", False)

    def compile(function, **options):
        compiled.append(getattr(function, "__name__", type(function).__name__))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    _, record = distill("--compile", "--Iteration=1")
    assert "compile" not in record["settings"]
    assert compiled == ["step"] * 4 + ["ConvNet"] * len(compiled[4:])  # with a gradient, without
    assert len(compiled) == 4 + 2 + len(record["random_real"])


def test_mini_batches_may_be_smaller_than_the_synthetic_set(distill):
    _, record = distill("--batch_syn=3", "--syn_steps=4")
    assert record["settings"]["batch_syn"] == 3
    assert record["evaluations"][2]["loss"] > 0


def test_mtts_own_experts_are_taken_with_a_warning(distill, cheap_flags, tmp_path):
    (place,) = (flag.partition("=")[2] for flag in cheap_flags if "buffer_path" in flag)
    experts = [load(f"{place}/ImageFolder_NO_ZCA/{MODEL}/replay_buffer_{k}.pt") for k in range(3)]
    folder = tmp_path / "buffers" / "ImageFolder_NO_ZCA" / MODEL
    folder.mkdir(parents=True)
    torch.save([expert for (expert,) in experts], folder / "replay_buffer_0.pt")
    flags = [f"--buffer_path={tmp_path / 'buffers'}", "--Iteration=1", "--epoch_eval_train=1"]
    with pytest.warns(UserWarning, match=r"replay_buffer_0\.pt has no record of its settings"):
        _, record = distill(*flags, "--max_experts=2")
    assert record["experts"] == 2 and record["experts_test_accuracy"] == []


def test_the_best_of_a_single_evaluation_is_the_start(distill):
    folder, record = distill("--Iteration=0", "--epoch_eval_train=1")
    assert record["best_iteration"] == 0 and len(record["evaluations"]) == 1
    with Image.open(folder / "animation.gif") as animation:
        assert animation.n_frames == 1


def test_zca_runs_end_to_end_and_also_saves_and_logs_the_images_as_pixels(
    train, forked, cheap_flags, patterns, tmp_path
):
    experts = tmp_path / "experts"
    experts.mkdir()
    train(experts, "--zca", "--num_experts=1")
    assert (experts / "ImageFolder" / MODEL / "replay_buffer_0.pt").is_file()
    flags = [*cheap_flags, "--zca", f"--buffer_path={experts}", "--wandb_mode=offline"]
    done = forked(SCRIPT, *flags, cwd=tmp_path)  # other tests' pages disturb one in this process
    assert done.returncode == 0, done.stderr
    folder, _ = results(tmp_path)
    white, pixels = load(folder / "images_0.pt"), load(folder / "images_zca_0.pt")
    images = folders.load_image_folder(patterns, 8).images / 255
    assert all((pixel - images).abs().amax((1, 2, 3)).min() < 1e-3 for pixel in pixels)
    assert not torch.allclose(white, pixels, atol=0.1)
    assert load(folder / "images_zca_best.pt").shape == (4, 3, 8, 8)
    keys = {key.split("|")[0] for key in history(folder)[0]}
    documented = "Reconstructed_Images Reconstructed_Pixels Clipped_Reconstructed_Images/std_2.5"
    assert keys >= set(documented.split())


def test_without_validation_images_the_test_set_chooses(train, distill, tmp_path):
    experts = tmp_path / "experts"
    experts.mkdir()
    train(experts, "--val_fraction=0", "--num_experts=1")
    flags = ["--val_fraction=0", f"--buffer_path={experts}", *LEARNING]
    folder, record = distill(*flags)
    scores = [row["scores"][MODEL] for row in record["evaluations"]]
    test = [row["test"][0] for row in scores]
    assert not any(row["val"] for row in scores)
    assert record["best_iteration"] == test.index(max(test)) > 0
    assert (folder / "curves.png").exists()


# --------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize(
    "loss, alpha, finite, fault",
    [
        (math.nan, 0.01, {"images": True}, "loss is not finite"),
        (1.0, 0.01, {"images": True, "gradient": False}, "gradient is not finite"),
        (1.0, -0.01, {}, "α is not positive"),
        (1.0, math.nan, {}, "α is not positive"),
        (1.0, math.inf, {}, "α is not positive"),
    ],
)
def test_what_is_not_finite_is_named(loss, alpha, finite, fault):
    assert re.match(f"{fault}, α = .*Lower --lr_lr", first_fault(loss, alpha, finite))
    assert first_fault(1.0, 0.01, {"images": True}) is None
