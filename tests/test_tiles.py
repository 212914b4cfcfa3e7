"""--factor: several small images in the place of one, from the first images to the export."""

import json
import re

import pytest
import torch
from torch.nn import functional as F

import utils
from datasets.preprocessing import Data, Layout, random_real
from datasets.toysat import write_toysat
from utils import Augment

FLAGS = ["--dataset=ImageFolder", "--im_size=16", "--val_fraction=0.2", "--model=MLP"]
FLAGS += ["--no-compile", "--wandb_mode=disabled"]


def make_data():
    random = torch.Generator().manual_seed(0)
    part = torch.randn(40, 3, 16, 16, generator=random), torch.arange(40) % 4
    return Data(part, part, part, tuple("abcd"), {}, None)


# --------------------------------------------------------------------------------------------------
# Decoding


def test_tiles_come_image_by_image_row_by_row_and_are_enlarged_bilinearly():
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tiles = utils.decode(images, 2)
    assert tiles.shape == (12, 3, 16, 16)
    for number, tile in enumerate(tiles):
        image, row, column = number // 4, number % 4 // 2, number % 2
        small = images[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        torch.testing.assert_close(tile, F.interpolate(small[None], 16, mode="bilinear")[0])


def test_an_image_of_one_tile_is_taken_as_it_is():
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(utils.decode(images, 1), images)
    assert torch.equal(utils.decode(images, 1, torch.tensor([2, 0])), images[[2, 0]])


def test_a_batch_is_of_tiles_with_their_labels_and_leads_back_to_their_image():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    augment, labels = Augment(16, factor=2), torch.arange(8)
    x, y = augment(images, augment.draw(torch.tensor([5, 2]), None), labels)
    assert y.tolist() == [5, 2]
    torch.testing.assert_close(x, utils.decode(images, 2)[[5, 2]])
    (gradient,) = torch.autograd.grad(x[0].sum(), images)
    touched = gradient.abs().sum(1) > 0
    assert touched[1, :8, 8:].all() and touched.sum() == 64  # tile 5: image 1, above right


# --------------------------------------------------------------------------------------------------
# Real images in tiles


def test_real_images_are_shrunk_into_tiles_of_their_class():
    data = make_data()
    images, classes = random_real(data, Layout(ipc=2, factor=2), torch.Generator().manual_seed(0))
    assert images.shape == (8, 3, 16, 16)
    assert classes.tolist() == [label for label in range(4) for _ in range(8)]
    shrunk = F.interpolate(data.train[0][:], 8, mode="area")
    cells = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    found = []
    for cell, label in zip(cells, classes):
        (number,) = [n for n, small in enumerate(shrunk) if torch.allclose(cell, small)]
        assert number % 4 == label
        found.append(number)
    assert len(set(found)) > 20  # of 40, drawn independently for each place


# --------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def distilled(run_here, tmp_path_factory):
    """The folder in which a set of tiles was distilled, and what was printed."""
    cwd = tmp_path_factory.mktemp("tiles")
    write_toysat(cwd / "pictures", per_class=16)
    places = ["--data_path=pictures", "--buffer_path=buffers"]
    few = ["--num_experts=2", "--train_epochs=3", "--batch_train=16"]
    assert run_here("expert_trajectories.py", *FLAGS, *places, *few, cwd=cwd).returncode == 0
    flags = ["--factor=2", "--labels=learned", "--expert_epochs=1", "--max_start_epoch=2"]
    flags += ["--syn_steps=2", "--batch_syn=15", "--Iteration=4", "--eval_it=2", "--num_eval=1"]
    flags += ["--epoch_eval_train=3", "--optimizer_lr=log_adam", "--ema=0.5", "--run_name=run"]
    done = run_here("distillation.py", *FLAGS, *places, *flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd, done.stdout


def test_a_set_of_tiles_has_as_many_numbers_as_one_of_images_and_a_label_for_each_tile(distilled):
    cwd, out = distilled
    folder = cwd / "logged_files" / "ImageFolder" / "run"
    images, labels, start = (
        torch.load(folder / name, weights_only=True)
        for name in ("images_4.pt", "labels_4.pt", "images_0.pt")
    )
    assert images.shape == (10, 3, 16, 16) and not torch.equal(images, start)
    assert labels.shape == (40, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(40))
    assert "10 distilled images of 4 tiles" in out and "10 random real images of 4 tiles" in out
    assert json.loads((folder / "run.json").read_text())["settings"]["factor"] == 2


def test_a_saved_set_of_tiles_is_evaluated_by_its_folder_alone(run_here, distilled):
    cwd, _ = distilled
    run = "logged_files/ImageFolder/run"
    short = ["--num_eval=1", "--epoch_eval_train=1"]
    done = run_here("distillation.py", f"--evaluate={run}", *short, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "10 images of" in done.stdout
    bare = ["--data_path=pictures", f"--evaluate={run}/images_best.pt", *FLAGS, *short]
    (cwd / run / "run.json").rename(cwd / "away")
    done = run_here("distillation.py", *bare, cwd=cwd)
    assert done.returncode == 2 and "4 labels for each image" in done.stderr
    assert "--factor=2" in done.stderr
    done = run_here("distillation.py", *bare, "--factor=2", cwd=cwd)
    (cwd / "away").rename(cwd / run / "run.json")
    assert done.returncode == 0, done.stderr


def test_a_set_without_tiles_is_not_cut(run_here, distilled, tmp_path):
    cwd, _ = distilled
    torch.save(torch.zeros(10, 3, 16, 16), tmp_path / "images_best.pt")
    torch.save(torch.arange(10), tmp_path / "labels_best.pt")
    what = ["--data_path=pictures", f"--evaluate={tmp_path}", "--lr_teacher=0.01"]
    done = run_here("distillation.py", *FLAGS, *what, "--factor=2", cwd=cwd)
    assert done.returncode == 2 and "leave out --factor=2" in done.stderr


def test_tiles_are_exported_as_images_of_their_own(run_here, distilled):
    cwd, _ = distilled
    run = "logged_files/ImageFolder/run"
    done = run_here("distillation.py", f"--evaluate={run}", "--export=out", cwd=cwd)
    assert done.returncode == 0, done.stderr
    content = torch.load(cwd / "out" / "dd_ranking.pt", weights_only=True)
    images = torch.load(cwd / run / "images_best.pt", weights_only=True)
    assert torch.equal(content["image_tensor"], utils.decode(images, 2))
    assert len(content["soft_labels"]) == len(content["hard_labels"]) == 40
    assert len(list((cwd / "out" / "images").glob("*/*.png"))) == 40

    # For this project, it is the set that it was made of: ten images, of four tiles each.
    rows = []
    for what in (run, "out"):
        task = ["--task=size", "--num_eval=1", "--epoch_eval_train=1", f"--log_dir=of_{what[:3]}"]
        given = [f"--evaluate={what}", "--data_path=pictures", *task]
        done = run_here("distillation.py", *given, cwd=cwd)
        assert done.returncode == 0, done.stderr
        (path,) = cwd.glob(f"of_{what[:3]}/*/*/size.json")
        rows.append(json.loads(path.read_text())["rows"])
    assert rows[0] == rows[1]


def test_random_real_tiles_with_the_experts_labels_are_evaluated(run_here, distilled):
    cwd, _ = distilled
    flags = ["--evaluate=random", "--factor=2", "--labels=soft", "--num_eval=1"]
    places = ["--data_path=pictures", "--buffer_path=buffers", "--epoch_eval_train=1"]
    done = run_here("distillation.py", *FLAGS, *places, *flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert re.search("10 real images .*labelled by the experts", done.stdout)
