"""Tasks of `--task`, from the command line on small data; and their mathematics."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import load_data
from processes import ROOT
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

import evaluation
import utils
from datasets.distilled import load_distilled
from datasets.eurosat import CLASS_NAMES
from run import report
from run.scores import spread
from system.process import ReportedError
from uses import membership, size, study

SCRIPT = "distillation.py"
MODEL = "ConvNetD1"


@pytest.fixture(scope="module")
def data_flags(eurosat_folder):
    """ToySAT at 16 pixels a side: 160 training, 20 validation and 20 test images."""
    flags = ["--dataset=ImageFolder", f"--data_path={eurosat_folder}", "--im_size=16"]
    return [*flags, f"--model={MODEL}", "--no-compile", "--wandb_mode=disabled"]


@pytest.fixture(scope="module")
def buffers(run_here, data_flags, tmp_path_factory):
    """The folder with an expert of two epochs."""
    folder = tmp_path_factory.mktemp("buffers")
    flags = ["--num_experts=1", "--train_epochs=2", "--batch_train=32", f"--buffer_path={folder}"]
    done = run_here("expert_trajectories.py", *data_flags, *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def real_run(run_here, data_flags, tmp_path_factory):
    """The folder of a run of no iterations, whose images are the real ones of its start."""
    cwd = tmp_path_factory.mktemp("real")
    flags = ["--objective=loss", "--Iteration=0", "--num_eval=2", "--epoch_eval_train=3"]
    done = run_here(SCRIPT, *data_flags, *flags, "--run_name=run", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "logged_files" / "ImageFolder" / "run"


@pytest.fixture(scope="module")
def soft_set(real_run, tmp_path_factory):
    """Another tool's file, with two images of each class and probabilities."""
    path = tmp_path_factory.mktemp("soft") / "set.pt"
    images = torch.load(real_run / "images_best.pt").repeat_interleave(2, 0)
    labels = torch.eye(10).repeat_interleave(2, 0) * 0.9 + 0.01
    torch.save({"image_tensor": images, "soft_labels": labels, "syn_lr": 0.02}, path)
    return path


@pytest.fixture
def use(run_here, data_flags, tmp_path, monkeypatch):
    """Run a task: what is printed, and its JSON file, beside which there is a picture."""
    monkeypatch.setattr(evaluation, "ALPHAS", (0.001, 0.02))

    def use(task, what, *flags):
        short = ["--num_eval=2", "--epoch_eval_train=3", "--batch_real=20"]
        logs = f"--log_dir={tmp_path / 'logs'}"
        given = [f"--evaluate={what}", f"--task={task}", *short, logs, *flags]
        done = run_here(SCRIPT, *data_flags, *given, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (path,) = tmp_path.glob(f"logs/ImageFolder/*/{task}.json")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        content = json.loads(path.read_text())
        assert content["task"] == task and content["versions"] and content["settings"]
        shutil.rmtree(tmp_path / "logs")
        return done.stdout, content

    return use


# --------------------------------------------------------------------------------------------------
# transfer


def test_transfer_compares_sets_by_network_each_at_an_alpha_of_its_own(use, real_run, buffers):
    flags = ["--eval_mode=M", f"--buffer_path={buffers}"]
    out, content = use("transfer", real_run, *flags)
    sets = ["the set", "random real images", "the same, experts' labels"]
    rows = content["rows"]
    found = [(row["trained_on"], row["network"]) for row in rows]
    assert found == [(each, name) for each in sets for name in (MODEL, "MLP")]
    for row in rows:
        assert row["syn_lr"] in (0.001, 0.02) and len(row["scores"]["test"]) == 2
        (line,) = [line for line in out.splitlines()[-6:] if line.startswith(f"{row['network']} ")]
        assert f"{spread(row['scores']['test'])}  α {row['syn_lr']:g}" in line


def test_without_experts_their_column_is_left_out_and_the_table_says_so(use, soft_set, tmp_path):
    flags = ["--eval_mode=S", f"--buffer_path={tmp_path}"]
    out, content = use("transfer", soft_set, *flags)
    titles = [row["trained_on"] for row in content["rows"]]
    assert titles == ["the set", "random real images"]
    assert "experts' labels are left out: --buffer_path has no experts" in out


# --------------------------------------------------------------------------------------------------
# incremental


def test_incremental_adds_two_classes_a_step_in_the_order_of_the_seed(use, real_run, buffers):
    out, content = use("incremental", real_run, f"--buffer_path={buffers}")
    order = torch.randperm(10, generator=utils.make_generator("classes", 0)).tolist()
    assert content["order"] == [CLASS_NAMES[label] for label in order]
    assert content["classes"] == [2, 4, 6, 8, 10]
    titles = ["the set", "random real images", "herding"]
    assert [row["trained_on"] for row in content["rows"]] == titles
    for row in content["rows"]:
        assert [len(scores["classes"][0]) for scores in row["steps"]] == content["classes"]
        means = np.mean([scores["test"] for scores in row["steps"]], axis=0)
        assert row["means"] == pytest.approx(means)
        (line,) = [line for line in out.splitlines() if line.startswith("mean ")]
        assert spread(row["means"]) in line


def test_incremental_takes_probabilities_and_does_without_experts(use, soft_set, tmp_path):
    _, content = use("incremental", soft_set, f"--buffer_path={tmp_path}", "--seed=1")
    assert content["rows"][2]["trained_on"] == "herding, untrained features"
    assert content["order"] != sorted(content["order"])


# --------------------------------------------------------------------------------------------------
# membership


def test_membership_attacks_networks_and_finds_the_images_that_a_run_started_from(use, real_run):
    out, content = use("membership", real_run)
    members = ["training images", "training images", "those images", "training images"]
    assert [row["members"] for row in content["rows"]] == members
    numbers = [(row["num_members"], row["num_others"]) for row in content["rows"]]
    assert numbers == [(20, 20), (20, 20), (10, 20), (20, 20)]
    for row in content["rows"]:
        assert all(0 <= value <= 1 for value in row["auc"] + row["hits"])
        assert spread(row["auc"]) in out
    nearest = content["nearest"]
    assert nearest["is_start"] == [True] * 10 and max(nearest["distance"]) < 1e-4
    assert nearest["class"] == list(range(10)) and min(nearest["test_distance"]) > 0.1
    assert "started from for 10 of 10; chance: 0.062" in out


def test_an_exported_set_knows_what_it_started_from(use, run_here, data_flags, real_run, tmp_path):
    out = tmp_path / "out"
    done = run_here(SCRIPT, *data_flags, f"--evaluate={real_run}", f"--export={out}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, content = use("membership", out)
    assert content["nearest"]["is_start"] == [True] * 10


def test_membership_says_that_the_start_of_another_tools_set_is_unknown(use, soft_set):
    out, content = use("membership", soft_set)
    assert "is not recorded" in out and "is_start" not in content["nearest"]


def test_the_roc_curve_its_area_and_its_hits_are_those_of_their_definitions():
    random = np.random.default_rng(0)
    # Rounded, so that members and others have losses in common.
    members, others = random.normal(0, 1, 300).round(1), random.normal(0.4, 1, 200).round(1)
    curve = membership.roc(members, others)
    attack = membership.Attack("", "", (300, 200), [curve])
    wins = (members[:, None] < others).mean() + (members[:, None] == others).mean() / 2
    assert attack.aucs == [pytest.approx(wins, abs=1e-12)]
    allowed = [t for t in [-9, *members, *others] if (others <= t).mean() <= 0.01]
    assert attack.hits == [max((members <= t).mean() for t in allowed)]
    draws = [random.permutation(500)[:300] for _ in range(2000)]
    ranks = [(each.sum() - 300 * 299 / 2) / (300 * 200) for each in draws]
    assert np.std(ranks) == pytest.approx(attack.chance, rel=0.1)


def test_losses_that_are_no_numbers_are_a_guess():
    curve = membership.roc(np.full(5, np.inf), np.full(7, np.inf))
    attack = membership.Attack("", "", (5, 7), [curve])
    assert attack.aucs == [0.5] and attack.hits == [0]


def test_nearest_training_images_are_those_of_all_pairs(data_flags, eurosat_folder):
    data = load_data("ImageFolder", eurosat_folder, False, 0.1, "cpu", im_size=16)
    images = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    distances, index = membership.nearest(images, data)
    ours, theirs = data.to_pixels(images).double(), data.to_pixels(data.train[0][:]).double()
    of_all = (ours[:, None] - theirs).flatten(2).norm(dim=2)
    torch.testing.assert_close(distances.double(), of_all.min(1).values, rtol=1e-4, atol=1e-4)
    assert torch.equal(index, of_all.argmin(1))


# --------------------------------------------------------------------------------------------------
# size


def test_size_counts_the_bytes_of_what_is_encoded_and_trains_on_what_is_decoded(use, real_run):
    out, content = use("size", real_run)
    rows = {row["title"]: row for row in content["rows"]}
    numbers = 10 * 3 * 16 * 16
    assert rows["float32"]["size"] == 4 * numbers + 10  # a byte for each class
    assert rows["float16"]["size"] == 2 * numbers + 10
    assert rows["JPEG, quality 75"]["size"] < rows["JPEG, quality 95"]["size"]
    for row in list(rows.values())[:5]:
        assert row["percent_per_kB"] == pytest.approx(1e5 * np.mean(row["test"]) / row["size"])
        assert f"{row['kB']:.1f}   {spread(row['test'])}" in out
    assert rows["weights, ConvNetW32"]["test"] == []
    assert "weights, ResNet18" not in rows  # which takes no images of 16 pixels


@pytest.mark.parametrize("title, error", [("float32", 0), ("float16", 2e-3), ("PNG, 8 bit", 0.5)])
def test_formats_return_what_they_were_given_but_for_rounding(title, error):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    form = size.FORMATS[title].images
    decoded = form.decode(form.encode(images))
    level = (images.max() - images.min()) / 255 if title.startswith("PNG") else 1
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert (decoded - images).abs().max() <= error * level + 1e-6


def test_exported_pictures_are_the_clipped_pixels_to_a_level(
    run_here, real_run, data_flags, eurosat_folder, tmp_path
):
    out = tmp_path / "out"
    done = run_here(SCRIPT, *data_flags, f"--evaluate={real_run}", f"--export={out}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pictures = torch.stack([to_tensor(image) for image, _ in ImageFolder(out / "images")])
    data = load_data("ImageFolder", eurosat_folder, False, 0.1, "cpu", im_size=16)
    pixels = data.to_pixels(torch.load(real_run / "images_best.pt"))
    assert (pictures - report.clip(pixels)).abs().max() <= 1.01 / 255


# --------------------------------------------------------------------------------------------------
# From Python


def test_a_set_is_loaded_with_all_that_training_takes_from_its_path_alone(real_run):
    found = load_distilled(real_run)
    assert found.images.shape == (10, 3, 16, 16) and found.labels.tolist() == list(range(10))
    assert found.alpha == pytest.approx(0.01) and list(found.classes) == sorted(CLASS_NAMES)
    data = json.loads((real_run / "results.json").read_text())["data"]
    assert [found.mean, found.std] == [data["mean"], data["std"]]


def test_a_set_is_loaded_without_the_pictures_that_it_was_made_of(real_run, tmp_path):
    alone = shutil.copytree(real_run, tmp_path / "alone")
    record = json.loads((alone / "run.json").read_text())
    record["flags"]["data_path"] = str(tmp_path / "gone")
    (alone / "run.json").write_text(json.dumps(record))
    found = load_distilled(alone)
    assert list(found.classes) == sorted(CLASS_NAMES) and len(found.mean) == 3
    record["settings"]["bands"] = record["flags"]["zca"] = "yes"
    (alone / "run.json").write_text(json.dumps(record))
    with pytest.raises(ReportedError, match=r"damaged \(zca='yes'\)"):
        load_distilled(alone)
    (alone / "results.json").write_text("{")
    record["flags"] |= {"zca": False}
    (alone / "run.json").write_text(json.dumps(record))
    with pytest.raises(ReportedError, match=r"results\.json is damaged"):
        load_distilled(alone)


def test_a_whitened_export_has_the_names_of_its_classes(
    run_here, data_flags, tmp_path, monkeypatch
):
    flags = ["--objective=loss", "--Iteration=0", "--num_eval=1", "--epoch_eval_train=1", "--zca"]
    done = run_here(SCRIPT, *data_flags, *flags, "--run_name=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "logged_files" / "ImageFolder" / "run"
    done = run_here(SCRIPT, f"--evaluate={run}", f"--export={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)  # which has no data/
    found = load_distilled(tmp_path / "out")
    assert list(found.classes) == sorted(CLASS_NAMES) and found.mean is None


def test_canvases_are_refused_in_python(real_run, tmp_path):
    canvases = shutil.copytree(real_run, tmp_path / "canvases")
    record = json.loads((canvases / "run.json").read_text())
    record["flags"]["texture"] = True
    (canvases / "run.json").write_text(json.dumps(record))
    with pytest.raises(ReportedError, match="holds canvases"):
        load_distilled(canvases)


def test_tiles_are_loaded_as_images_with_a_label_each():
    found = load_distilled(ROOT / "results" / "eurosat-1-tiles")
    assert found.images.shape == (40, 3, 64, 64) and found.labels.shape == (40, 10)
    whole = torch.load(ROOT / "results" / "eurosat-1-tiles" / "images_best.pt")
    corner = whole[3, :, 32:, 32:].float()  # the last of an image's four
    small = F.interpolate(found.images[15:16], size=(32, 32), mode="area")[0]
    assert (small - corner).abs().mean() < 0.5 * (small - whole[3, :, :32, :32]).abs().mean()


def test_a_set_without_a_run_is_refused_in_python(soft_set):
    with pytest.raises(evaluation.ReportedError, match=r"no run\.json.*torch\.load"):
        load_distilled(soft_set)


def test_real_images_have_the_classes_of_the_set_in_its_order():
    assert study.alike(torch.tensor([0, 0, 1, 2, 2])).tolist() == [0, 1, 2, 4, 5]
    classes = torch.tensor([2, 0, 1, 2, 0, 2])
    chosen = study.alike(classes)
    assert torch.arange(3).repeat_interleave(3)[chosen].tolist() == classes.tolist()
    assert len(set(chosen.tolist())) == len(classes)


@pytest.fixture
def shuffled_set(real_run, tmp_path):
    """Another tool's file, with an image of each class, the last class first."""
    path = tmp_path / "shuffled.pt"
    images = torch.load(real_run / "images_best.pt").flip(0)
    torch.save({"image_tensor": images, "hard_labels": torch.arange(10).flip(0)}, path)
    return path


def test_incremental_takes_a_set_in_any_order(shuffled_set, use):
    _, content = use("incremental", shuffled_set, "--lr_teacher=0.02")
    assert [len(row["steps"]) for row in content["rows"]] == [5, 5, 5]


def test_incremental_names_the_first_classes_if_a_set_lacks_them(
    run_here, data_flags, shuffled_set, tmp_path
):
    content = torch.load(shuffled_set)
    few = tmp_path / "few.pt"
    order = torch.randperm(10, generator=utils.make_generator("classes", 0)).tolist()
    kept = [n for n, label in enumerate(content["hard_labels"].tolist()) if label not in order[:2]]
    torch.save({name: part[kept] for name, part in content.items()}, few)
    flags = [f"--evaluate={few}", "--task=incremental", "--lr_teacher=0.02"]
    done = run_here(SCRIPT, *data_flags, *flags, cwd=tmp_path)
    assert done.returncode == 2
    first, second = (CLASS_NAMES[label] for label in order[:2])
    assert f"no image of {first} or {second}" in done.stderr


def test_transfer_has_kernel_machines_without_a_step_size(real_run, use):
    table, content = use("transfer", real_run, "--eval_mode=NTK")
    assert [row["syn_lr"] for row in content["rows"]] == [None, None]
    assert "α –" in table
    _, content = use("transfer", real_run, "--eval_mode=K")
    assert {row["network"] for row in content["rows"]} == {MODEL, "NTK"}


def test_a_guess_has_the_true_positives_that_the_attack_states():
    random = np.random.default_rng(0)
    for others in (20, 300):
        curves = [membership.roc(random.random(50), random.random(others)) for _ in range(2000)]
        attack = membership.Attack("", "", (50, others), curves)
        error = np.std(attack.hits) / len(curves) ** 0.5
        assert abs(np.mean(attack.hits) - attack.hits_chance) < 4 * error


def test_a_set_with_more_images_than_the_data_is_named(run_here, data_flags, tmp_path):
    content = {"image_tensor": torch.zeros(17, 3, 16, 16), "hard_labels": torch.zeros(17)}
    torch.save(content, tmp_path / "set.pt")
    flags = [f"--evaluate={tmp_path / 'set.pt'}", "--task=membership", "--lr_teacher=0.01"]
    flags += ["--num_eval=1", "--epoch_eval_train=1"]
    done = run_here(SCRIPT, *data_flags, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert "set.pt has 17 images of a class, and the data 16 training images" in done.stderr


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ReportedError, match="nowhere does not exist"):
        load_distilled(tmp_path / "nowhere")


def test_membership_says_when_networks_diverged(run_here, data_flags, real_run, tmp_path):
    flags = [f"--evaluate={real_run}", "--task=membership", "--lr_teacher=1e25", "--num_eval=2"]
    with pytest.warns(UserWarning, match=rf"2 of 2 networks \({MODEL}\) diverged"):
        done = run_here(SCRIPT, *data_flags, *flags, "--epoch_eval_train=3", cwd=tmp_path)
    assert done.returncode == 0
