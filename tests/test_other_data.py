"""Other people's data: folders of pictures, CIFAR-10 and CIFAR-100, through both scripts."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import urllib.error
import zlib

import numpy as np
import pytest
import torch
import torchvision
from conftest import load_data
from PIL import Image, TiffImagePlugin

from datasets import folders
from datasets import pictures as picture_files
from datasets.preprocessing import Form
from datasets.splits import split_dataset
from system.process import ReportedError

CLASSES = ("beach", "forest", "town")


def picture(seed, width, height, mode="RGB"):
    """A picture of noise in this size and mode."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def fill(folder, classes, count):
    """Class folders of pictures in several sizes and modes; returns the folder."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            mode = ("RGB", "L", "RGBA", "P")[index % 4]
            path = folder / name / f"{index}.png"
            picture((label, index), 20 + index, 30, mode).save(path)
    return folder


@pytest.fixture
def pictures(tmp_path):
    return fill(tmp_path / "pictures", CLASSES, 12)


def load(pictures, im_size=16, zca=False, val_fraction=0.1):
    return load_data("ImageFolder", pictures, zca, val_fraction, "cpu", im_size)


SMALL = ["--no-compile", "--wandb_mode=disabled", "--model=ConvNetD1"]


def run_both(run_here, cwd, *flags):
    """Two experts, and two iterations: the run's folder, and what was printed."""
    flags = [*SMALL, "--buffer_path=buffers", *flags]
    more = ["--num_experts=2", "--train_epochs=2", "--batch_train=16"]
    experts = run_here("expert_trajectories.py", *flags, *more, cwd=cwd)
    assert experts.returncode == 0, experts.stderr
    more = ["--Iteration=2", "--syn_steps=2", "--expert_epochs=1", "--max_start_epoch=2"]
    more += ["--lr_lr=1e-8", "--num_eval=1", "--epoch_eval_train=1", "--run_name=run"]
    distilled = run_here("distillation.py", *flags, *more, cwd=cwd)
    assert distilled.returncode == 0, distilled.stderr
    (folder,) = cwd.glob("logged_files/*/run")
    return folder, experts.stdout + distilled.stdout


# --------------------------------------------------------------------------------------------------
# ImageFolder


def test_both_scripts_run_on_a_folder_of_pictures(run_here, pictures, tmp_path):
    flags = ["--dataset=ImageFolder", f"--data_path={pictures}", "--im_size=16"]
    folder, out = run_both(run_here, tmp_path, *flags)
    assert "30 training, 3 validation, 3 test images of 3 classes" in out
    assert "all 30 images" in out
    images = torch.load(folder / "images_best.pt", weights_only=True)
    labels = torch.load(folder / "labels_best.pt", weights_only=True)
    assert images.shape == (3, 3, 16, 16) and labels.tolist() == [0, 1, 2]
    experts = tmp_path / "buffers" / "ImageFolder_NO_ZCA" / "ConvNetD1"
    assert (experts / "replay_buffer_0.pt").exists()

    def command(*flags):
        done = run_here("distillation.py", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = command(f"--evaluate={folder}")
    assert all(name in out for name in CLASSES)
    command(f"--evaluate={folder}", "--export=exported")
    exported = torchvision.datasets.ImageFolder(tmp_path / "exported" / "images")
    assert exported.classes == list(CLASSES) and exported[0][0].size == (16, 16)
    assert "Best iteration" in command(f"--resume={folder}")


def test_evaluations_of_other_sizes_do_not_overwrite_each_other(run_here, pictures, tmp_path):
    flags = [*SMALL, "--evaluate=random", "--dataset=ImageFolder", f"--data_path={pictures}"]
    for size in (8, 16):
        more = [f"--im_size={size}", "--num_eval=1", "--epoch_eval_train=1"]
        done = run_here("distillation.py", *flags, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("logged_files/ImageFolder/*/evaluation.json"))) == 2


def test_pictures_are_scaled_to_cover_the_square_and_their_centre_is_taken(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(4):
            wide = np.zeros((20, 60, 3), np.uint8)
            wide[:, 20:40] = (10, 20, 30)  # the centre, the only part that is not black
            Image.fromarray(wide).save(tmp_path / name / f"{index}.png")
    images = folders.load_image_folder(tmp_path, 10).images
    assert images.shape == (8, 3, 10, 10)
    assert (images[:, :, :, 1:9] == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()


def test_pictures_are_normalised_by_the_statistics_of_the_training_images(pictures):
    data = load(pictures)
    x = data.train[0][:]
    std = x.transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.ones(3), rtol=0, atol=1e-4)
    raw = folders.load_image_folder(pictures, 16)
    split = split_dataset(raw.labels, 0.1, raw.classes)
    torch.testing.assert_close(data.to_pixels(x), raw.images[split.train] / 255, rtol=0, atol=1e-5)


def test_a_channel_that_is_the_same_everywhere_stays_zero(pictures):
    for path in pictures.rglob("*.png"):
        red, green, blue = Image.open(path).convert("RGB").split()
        Image.merge("RGB", [red, green, Image.new("L", blue.size)]).save(path)
    data = load(pictures)
    assert data.settings["std"][2] == 1
    assert not data.train[0][:][:, 2].any() and data.train[0][:][:, 0].any()


def test_whitening_takes_any_size(pictures):
    data = load(pictures, im_size=8, zca=True)
    assert data.form == Form(3, 8)
    raw = folders.load_image_folder(pictures, 8)
    split = split_dataset(raw.labels, 0.1, raw.classes)
    pixels = raw.images[split.test] / 255
    torch.testing.assert_close(data.to_pixels(data.test[0][:]), pixels, rtol=0, atol=1e-4)


@pytest.mark.parametrize("test", ["test", "val", "val/images"])
def test_the_folders_train_and_test_are_kept_apart(tmp_path, test):
    fill(tmp_path / "train", ("a", "b"), 10)
    fill(tmp_path / test, ("a", "b"), 3)
    data = load(tmp_path, im_size=20, val_fraction=0.2)
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [16, 4, 6]
    alone = folders.load_image_folder(tmp_path / test, 20).images
    torch.testing.assert_close(data.to_pixels(data.test[0][:]), alone / 255, rtol=0, atol=1e-5)
    whole = load(tmp_path, im_size=20, val_fraction=0)
    assert [len(part[1]) for part in (whole.train, whole.val, whole.test)] == [20, 0, 6]


def test_the_same_pictures_with_a_test_set_of_their_own_are_other_data(tmp_path):
    for name in ("a", "b"):
        fill(tmp_path / "whole", (name,), 6)
        for index in range(6):
            to = tmp_path / "parts" / ("train" if index < 4 else "test") / name
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "whole" / name / f"{index}.png", to)
    whole, parts = (folders.load_image_folder(tmp_path / name, 8) for name in ("whole", "parts"))
    assert whole.num_test is None and parts.num_test == 4
    assert parts.digest == picture_files.data_digest(parts.images, parts.labels, 4)
    assert parts.digest != picture_files.data_digest(parts.images, parts.labels) != whole.digest


def test_what_is_hidden_or_no_picture_is_left_alone(pictures):
    digest = folders.load_image_folder(pictures, 16).digest
    (pictures / ".cache").mkdir()
    (pictures / "notes.txt").write_text("about these pictures")
    (pictures / "town" / "._0.png").write_bytes(b"attributes")
    (pictures / "town" / "boxes.txt").write_text("0 0 1 1")
    (pictures / "town" / ".ipynb_checkpoints").mkdir()
    shutil.copy(pictures / "town" / "1.png", pictures / "town" / ".ipynb_checkpoints")
    again = folders.load_image_folder(pictures, 16)
    assert again.classes == CLASSES and again.digest == digest


def test_what_is_left_out_of_pictures_is_counted(pictures):
    first, *more = (picture(k, 20, 20) for k in range(3))
    first.save(pictures / "town" / "5.tif", save_all=True, append_images=more)
    for name in ("a.gif", "b.GIF", "c.jfif"):
        (pictures / "town" / name).write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        folders.load_image_folder(pictures, 16)
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 3
    assert messages[0].startswith("1 of 37 pictures hold several frames, of which the first is")
    assert messages[1].startswith(f"3 pictures below {pictures} are left out (.gif, .jfif)")
    assert messages[2].startswith("9 of 37 pictures have an alpha channel, which is left out, ")


def test_pictures_are_turned_as_exif_says(tmp_path):
    upright = picture(0, 16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise when shown
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    (image,) = picture_files.decode_pictures([tmp_path / "turned.png"], 16, crop=False)
    assert torch.equal(image, torch.from_numpy(np.array(upright)).permute(2, 0, 1))


# --------------------------------------------------------------------------------------------------
# Every real file counts once


def link_to_itself(folder):
    (folder / "pictures").symlink_to(folder)


def link_of_a_class(folder):
    (folder / "woods").symlink_to(folder / "forest")


def link_within_a_class(folder):
    (folder / "town" / "all").symlink_to(folder)


def links_of_pictures(folder):
    for path in (folder / "town").iterdir():
        (folder / "forest" / f"town_{path.name}").symlink_to(path)


def hard_links(folder):
    (folder / "zoo").mkdir()
    for path in (folder / "town").iterdir():
        (folder / "zoo" / path.name).hardlink_to(path)


LINKS = [link_to_itself, link_of_a_class, link_within_a_class, links_of_pictures, hard_links]


@pytest.mark.parametrize("link", LINKS)
def test_every_real_file_counts_once(pictures, link):
    digest = folders.load_image_folder(pictures, 16).digest
    link(pictures)
    with pytest.warns(UserWarning, match="links below .* are left out, as what they lead to"):
        again = folders.load_image_folder(pictures, 16)
    assert again.classes == CLASSES and again.digest == digest


def test_all_pictures_that_cannot_be_used_are_counted(pictures):
    for number in range(3):
        (pictures / "town" / f"{number}.png").write_bytes(b"")
    message = r"town/0\.png cannot be decoded .*: replace it; 2 more cannot be used$"
    with pytest.raises(ReportedError, match=message):
        folders.load_image_folder(pictures, 16)


def test_copies_of_a_picture_are_named(pictures):
    shutil.copy(pictures / "town" / "3.png", pictures / "town" / "3 (1).png")
    with pytest.warns(UserWarning, match=r"1 of 37 pictures have the same pixels .*3 \(1\)\.png"):
        assert len(folders.load_image_folder(pictures, 16).images) == 37


def test_what_is_no_file_is_no_picture(pictures):
    digest = folders.load_image_folder(pictures, 16).digest
    os.mkfifo(pictures / "town" / "pipe.png")  # reading it would never end
    (pictures / "town" / "nothing.png").symlink_to("nowhere")
    assert folders.load_image_folder(pictures, 16).digest == digest


def test_pictures_that_are_only_linked_count(pictures, tmp_path):
    whole = folders.load_image_folder(pictures, 16)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "town").symlink_to(pictures / "town")
    for name in ("beach", "forest"):
        (linked / name).mkdir()
        for path in (pictures / name).iterdir():
            (linked / name / path.name).symlink_to(path)
    assert folders.load_image_folder(linked, 16).digest == whole.digest


@pytest.mark.parametrize("name", ["@eaDir", "lost+found", "__MACOSX", "$RECYCLE.BIN", "#recycle"])
def test_folders_of_systems_are_left_out_and_named(pictures, name):
    digest = folders.load_image_folder(pictures, 16).digest
    for place in (pictures / name, pictures / "town" / name):
        place.mkdir()
        shutil.copy(pictures / "town" / "1.png", place)
    with pytest.warns(UserWarning, match="2 folders of the system below .* are left out: "):
        again = folders.load_image_folder(pictures, 16)
    assert again.classes == CLASSES and again.digest == digest


def test_a_class_of_trains_is_a_class(pictures):
    (pictures / "town").rename(pictures / "train")
    assert folders.load_image_folder(pictures, 16).classes == ("beach", "forest", "train")


# --------------------------------------------------------------------------------------------------
# Folders that cannot be used


def only_one_class(folder):
    shutil.rmtree(folder / "town")
    shutil.rmtree(folder / "forest")


def an_empty_class(folder):
    (folder / "desert").mkdir()


def other_classes_to_test(folder):
    for part in ("train", "val"):
        (folder / part).mkdir()
    (folder / "beach").rename(folder / "train" / "beach")
    (folder / "forest").rename(folder / "train" / "forest")
    (folder / "town").rename(folder / "val" / "town")


def sixteen_bits(folder):
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(folder / "town" / "0.png")


def png_of_16_bits(pixels):
    """An RGB PNG of uint16 pixels (H, W, 3), which Pillow cannot write."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width, _ = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


REFLECTANCE = np.random.default_rng(0).integers(0, 3000, (20, 20, 3)).astype(np.uint16)


def sixteen_bits_in_colour(folder):
    (folder / "town" / "0.png").write_bytes(png_of_16_bits(REFLECTANCE))


def sixteen_bits_as_tiff(folder):
    """A minimal TIFF: one strip of RGB pixels of 16 bits."""
    pixels = REFLECTANCE.astype("<u2").tobytes()
    bits = struct.pack("<HHH", 16, 16, 16)
    tags = [(256, 3, 1, 20), (257, 3, 1, 20), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 14), (277, 3, 1, 3), (278, 3, 1, 20), (279, 4, 1, len(pixels))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    head = struct.pack("<2sHI", b"II", 42, 14 + len(pixels)) + bits
    (folder / "town" / "0.tif").write_bytes(head + pixels + directory)


def floats(folder):
    Image.fromarray(np.ones((20, 20), np.float32)).save(folder / "town" / "0.tif")


def damaged(folder):
    path = folder / "town" / "0.png"
    path.write_bytes(path.read_bytes()[:100])


def too_large(folder):
    Image.new("1", (10000, 9000)).save(folder / "town" / "0.png")


def parts_by_other_names(folder):
    (folder / "beach").rename(folder / "Train")
    (folder / "forest").rename(folder / "valid")
    shutil.rmtree(folder / "town")


def parts_beside_classes(folder):
    (folder / "town").rename(folder / "Test")


def parts_and_more(folder):
    shutil.copytree(folder, folder / "Train", ignore=lambda *_: ["Train"])
    for name, part in zip(CLASSES, ("Test", "Meta")):
        (folder / name).rename(folder / part)
    shutil.rmtree(folder / CLASSES[2])


def one_level_too_high(folder):
    for name in CLASSES:
        for place in ("near", "far"):
            shutil.copytree(folder / name, folder / place / name)
        shutil.rmtree(folder / name)


def signed(folder):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[339] = 2  # sample format: signed integers
    pixels = Image.fromarray(np.full((20, 20), 200, np.uint8))
    pixels.save(folder / "town" / "0.tif", tiffinfo=tags)


def sixteen_bits_as_ppm(folder):
    (folder / "town" / "0.ppm").write_bytes(b"P6 20 20 3000 " + REFLECTANCE.astype(">u2").tobytes())


def another_format(folder):
    picture(0, 20, 20).save(folder / "town" / "0.png", format="sgi")


def too_few(folder):
    for path in list((folder / "town").iterdir())[2:]:
        path.unlink()


FAULTS = [
    (shutil.rmtree, "pictures cannot be read .*No such file"),
    (only_one_class, r"holds 1 class folders \(beach\): name the folder in which every class has"),
    (an_empty_class, "desert holds no pictures .* add some, or move the folder away"),
    (other_classes_to_test, "val do not have the 2 class folders of train"),
    (sixteen_bits, r"town/0\.png has more than 8 bits per channel: scale its values to 8 bits"),
    (sixteen_bits_in_colour, r"town/0\.png has 16 bits per channel: scale its values to 8 bits"),
    (sixteen_bits_as_tiff, r"town/0\.tif cannot be decoded|town/0\.tif has 16 bits per channel"),
    (floats, r"town/0\.tif has floating-point values per channel: scale its values to 8 bits"),
    (damaged, r"town/0\.png cannot be decoded"),
    (too_large, r"town/0\.png is 10000x9000 pixels, more than is safe"),
    (parts_by_other_names, "holds Train, valid, which are no classes: call them train and test"),
    (parts_beside_classes, "holds Test, which are parts of a data set, beside beach, forest"),
    (parts_and_more, "holds Train, Test, which are parts .* beside Meta: .*, such as .*Train$"),
    (one_level_too_high, "the pictures of far, near lie deeper, in beach, .* such as .*far$"),
    (signed, r"town/0\.tif has signed values per channel: scale its values to 8 bits"),
    (sixteen_bits_as_ppm, r"town/0\.ppm has 16 bits per channel"),
    (another_format, r"town/0\.png is a SGI, whatever its name says: convert it to PNG"),
    (too_few, r"too few images to split .*: town \(2\): add images, or move their folders away"),
]


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's, beside our error
@pytest.mark.parametrize("change, message", FAULTS)
def test_a_folder_that_cannot_be_used_is_refused(pictures, change, message):
    change(pictures)
    with pytest.raises(ReportedError, match=message) as error:
        load(pictures)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# CIFAR


def imitate(monkeypatch, folder, name):
    """Write files like those of a CIFAR data set, and have torchvision take them for the real ones.

    Returns the number of classes, and the test images, two of each class.
    """
    dataset = getattr(torchvision.datasets, name)
    classes = int(name.removeprefix("CIFAR"))
    label_key = "labels" if name == "CIFAR10" else "fine_labels"
    folder = folder / dataset.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute, per_class in (("train_list", 4), ("test_list", 2)):
        parts = []
        for name, _ in getattr(dataset, attribute):
            labels = [*range(classes)] * per_class
            pixels = random.integers(0, 256, (len(labels), 3072), np.uint8)
            parts.append([name, write(name, {"data": pixels, label_key: labels})])
        monkeypatch.setattr(dataset, attribute, parts)
    names = [f"class {i}" for i in range(classes)]
    meta = write(dataset.meta["filename"], {dataset.meta["key"]: names})
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": meta})

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    return classes, pixels.reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("name, count", [("CIFAR10", 5 * 40), ("CIFAR100", 400)])
def test_cifar_keeps_its_own_test_set(monkeypatch, tmp_path, name, count):
    classes, test_images = imitate(monkeypatch, tmp_path, name)
    data = load_data(name, tmp_path, False, 0.25, "cpu")
    sizes = [len(part[1]) for part in (data.train, data.val, data.test)]
    assert sizes == [0.75 * count, 0.25 * count, 2 * classes]
    assert data.form == Form(classes, 32)
    pixels = torch.from_numpy(test_images) / 255
    torch.testing.assert_close(data.to_pixels(data.test[0][:]), pixels, rtol=0, atol=1e-5)
    assert data.test[1].tolist() == [*range(classes)] * 2 and data.classes[3] == "class 3"
    assert data.settings["mean"] == [0.4914, 0.4822, 0.4465]
    assert data.settings["std"] == [0.2023, 0.1994, 0.2010]


def test_both_scripts_run_on_cifar(run_here, monkeypatch, tmp_path):
    imitate(monkeypatch, tmp_path / "data", "CIFAR100")
    flags = ["--dataset=CIFAR100", "--data_path=data", "--zca", "--val_fraction=0.25"]
    folder, _ = run_both(run_here, tmp_path, *flags, "--model=MLP")
    pixels = torch.load(folder / "images_zca_best.pt", weights_only=True)
    assert pixels.shape == (100, 3, 32, 32)
    results = json.loads((folder / "results.json").read_text())
    assert results["data"]["dataset"] == "CIFAR100"


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_that_is_damaged_and_cannot_be_fetched_is_reported(monkeypatch, tmp_path, name):
    imitate(monkeypatch, tmp_path, name)
    path = next(tmp_path.glob("*/test*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    message = rf"{name} is not in --data_path=.*or is damaged.*no network.*tar\.gz"
    with pytest.raises(ReportedError, match=message):
        load_data(name, tmp_path, False, 0.1, "cpu")
