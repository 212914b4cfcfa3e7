"""Data: ToySAT, the EuroSAT loader with its cache and its errors, splits, normalisation."""

import os
import shutil
import time
import urllib.error
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import load_data
from PIL import Image

from datasets import by_name, eurosat, pictures, toysat
from datasets.eurosat import CLASS_NAMES, EUROSAT_CACHE, load_eurosat
from datasets.pictures import data_digest
from datasets.preprocessing import Form
from datasets.splits import split_dataset
from system.process import ReportedError

EUROSAT_SIZES = (3000, 3000, 3000, 2500, 2500, 2000, 2500, 3000, 2500, 3000)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the smallest data set, without a cache, that a test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "data", ignore=shutil.ignore_patterns("*.pt"))


@pytest.fixture(scope="module")
def digest(tiny_folder):
    return load_eurosat(tiny_folder)[2]


# --------------------------------------------------------------------------------------------------
# ToySAT


def test_toysat_follows_its_seed():
    first, again, other = (toysat.draw_toysat(2, seed)[0].tobytes() for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_toysat_draws_all_classes_in_order():
    images, labels = toysat.draw_toysat(2)
    assert images.shape == (20, 3, 64, 64) and images.dtype == np.uint8
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert len({image.tobytes() for image in images}) == 20
    assert tuple(toysat.PAINTERS) == CLASS_NAMES


def test_toysat_written_as_jpegs_reads_back_as_what_was_drawn(tiny_folder):
    images, labels, *_ = load_eurosat(tiny_folder)
    drawn, drawn_labels = map(torch.from_numpy, toysat.draw_toysat(6))
    assert torch.equal(labels, drawn_labels)
    difference = (images.float() - drawn.float()).abs().mean()
    assert difference < 6  # of 255; what JPEG loses on fine texture


def test_toysat_loads_by_name_without_a_folder(tmp_path):
    data = load_data("ToySAT", tmp_path / "nothing", False, 0.1, "cpu")
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [2430, 270, 300]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("side", [16, 128])
def test_toysat_is_scaled_to_any_side_and_is_other_data_then(tmp_path, side):
    drawn = toysat.load_toysat(tmp_path, per_class=2)
    scaled = toysat.load_toysat(tmp_path, side, per_class=2)
    assert scaled.images.shape == (20, 3, side, side) and scaled.images.dtype == torch.uint8
    assert torch.equal(scaled.labels, drawn.labels) and scaled.digest != drawn.digest
    means, drawn_means = (x.images.float().mean((2, 3)) for x in (scaled, drawn))
    torch.testing.assert_close(means, drawn_means, rtol=0, atol=0.5)
    assert by_name.Selection("ToySAT", tmp_path, side).form == Form(10, side)


# --------------------------------------------------------------------------------------------------
# Where EuroSAT is found


def test_images_and_labels_come_as_uint8_and_int64_sorted_by_class(folder):
    images, labels, *_ = load_eurosat(folder)
    assert images.shape == (60, 3, 64, 64) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and torch.bincount(labels).tolist() == [6] * 10
    river = np.array(Image.open(folder / "River" / "River_1.jpg"))  # (H, W, 3)
    assert torch.equal(images[8 * 6], torch.from_numpy(river).permute(2, 0, 1))


@pytest.mark.parametrize("inside", ["2750", "EuroSAT_RGB", "EuroSAT/2750", "eurosat/2750"])
def test_class_folders_are_found_in_the_known_subfolders(folder, tmp_path, digest, inside):
    (tmp_path / "other" / inside).parent.mkdir(parents=True)
    folder.rename(tmp_path / "other" / inside)
    assert load_eurosat(tmp_path / "other")[2] == digest


def pack(folder, archive, prefix):
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in folder.rglob("*.jpg"):
            zipped.write(path, f"{prefix}/{path.relative_to(folder)}")
    return archive


@pytest.mark.parametrize(
    "name, prefix",
    [("EuroSAT.zip", "2750"), ("EuroSAT_RGB.zip", "EuroSAT_RGB"), ("eurosat.ZIP", "a/2750")],
)
def test_the_official_archives_are_unpacked(folder, tmp_path, digest, name, prefix):
    archive = pack(folder, tmp_path / "other" / name, prefix)
    assert load_eurosat(archive.parent)[2] == digest
    archive.unlink()
    assert load_eurosat(archive.parent)[2] == digest


def test_class_folders_in_lower_case_are_found(folder, digest):
    for name in CLASS_NAMES:
        (folder / name).rename(folder / f"{name}_")
        (folder / f"{name}_").rename(folder / name.lower())
    images = load_eurosat(folder)
    assert images.digest == digest and images.classes == CLASS_NAMES


def test_class_folders_as_copies_write_them_are_found(folder, digest):
    for name, copy in (("AnnualCrop", "Annual Crop"), ("Industrial", "Industrial_Buildings")):
        (folder / name).rename(folder / copy)
    assert load_eurosat(folder).digest == digest


def test_an_empty_class_folder_does_not_hide_the_complete_data(folder, tmp_path, digest):
    (tmp_path / "other" / "Forest").mkdir(parents=True)
    folder.rename(tmp_path / "other" / "2750")
    assert load_eurosat(tmp_path / "other").digest == digest


def test_an_archive_may_be_named_itself(folder, tmp_path, digest):
    archive = pack(folder, tmp_path / "other" / "eurosat_copy.zip", "2750")
    data = load_data("EuroSAT", archive, False, 0.5, "cpu")
    assert data.settings["digest"] == digest
    assert {path.name for path in archive.parent.iterdir()} == {
        "2750",
        "eurosat_copy.zip",
        "eurosat_cache.pt",
    }


def test_pictures_that_were_not_published_are_named_by_their_class(folder, monkeypatch):
    published = load_eurosat(folder)
    monkeypatch.setattr(eurosat, "EUROSAT_SIZE", len(published.images))
    monkeypatch.setattr(eurosat, "EUROSAT_DIGEST", published.digest)
    monkeypatch.setattr(eurosat, "CLASS_DIGESTS", dict(eurosat.class_digests(published)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_eurosat(folder)
    (folder / "Forest").rename(folder / "x")
    (folder / "River").rename(folder / "Forest")
    (folder / "x").rename(folder / "River")
    with pytest.warns(UserWarning, match="pictures of Forest, River are not those of EuroSAT"):
        load_eurosat(folder)


@pytest.mark.parametrize("change", ["reader", "shape", "pixels"])
def test_a_cache_that_no_longer_fits_is_made_again(folder, digest, monkeypatch, change):
    load_eurosat(folder)
    cache = folder / eurosat.EUROSAT_CACHE
    content = torch.load(cache, weights_only=True)
    if change == "reader":
        monkeypatch.setattr(pictures, "READER", pictures.READER + 1)
    elif change == "shape":
        content["images"] = content["images"][:, :, :32]
    else:
        content["images"][7, 1, 30] ^= 4  # with a checksum that fits
    torch.save(content, cache)
    again = load_eurosat(folder)
    assert again.digest == digest and again.images.shape[2] == 64
    assert data_digest(again.images, again.labels) == digest


def test_an_archive_with_backslashes_and_lower_case_is_unpacked(folder, tmp_path, digest):
    (tmp_path / "other").mkdir()
    with zipfile.ZipFile(tmp_path / "other" / "EuroSAT.zip", "w") as zipped:
        for path in folder.rglob("*.jpg"):
            member = zipfile.ZipInfo("name")
            member.filename = f"2750\\{path.parent.name.lower()}\\{path.name}"
            zipped.writestr(member, path.read_bytes())
    assert load_eurosat(tmp_path / "other").digest == digest


def test_another_number_of_images_than_eurosats_is_named(folder):
    with pytest.warns(UserWarning, match=r"holds 60 images, EuroSAT has 27000"):
        load_eurosat(folder)


@pytest.mark.parametrize(
    "suffix, words",
    [
        (".tif", "holds TIFFs, as EuroSAT-MS with its 13 bands: fetch the RGB archive"),
        (".png", "holds PNGs: read them by --dataset=ImageFolder"),
        (".txt", "holds no JPEG: unpack EuroSAT again"),
    ],
)
def test_other_editions_of_eurosat_are_named(folder, suffix, words):
    for path in list((folder / "River").iterdir()):
        path.rename(path.with_suffix(suffix))
    with pytest.raises(ReportedError, match=f"River {words}"):
        load_eurosat(folder)


def test_members_of_an_archive_cannot_leave_its_folder(folder, tmp_path, digest):
    archive = pack(folder, tmp_path / "deep" / "EuroSAT.zip", "2750")
    with zipfile.ZipFile(archive, "a") as zipped:
        for hostile in (
            "../../evil.jpg",
            "/evil.jpg",
            "2750/../../evil.jpg",
            "evil.jpg",
            "2750/Forest/../evil.jpg",
        ):
            zipped.writestr(hostile, b"evil")
    assert load_eurosat(archive.parent)[2] == digest
    assert not list(tmp_path.rglob("evil*"))


def test_a_link_in_an_archive_is_not_followed(folder, tmp_path):
    archive = pack(folder, tmp_path / "deep" / "EuroSAT.zip", "2750")
    secret = tmp_path / "secret.jpg"
    shutil.copy(folder / "Forest" / "Forest_1.jpg", secret)
    link = zipfile.ZipInfo("2750/Forest/link.jpg")
    link.external_attr = 0o120777 << 16  # the mode of a symbolic link
    with zipfile.ZipFile(archive, "a") as zipped:
        zipped.writestr(link, str(secret))
    # Unpacked, it is a file that holds the path.
    with pytest.raises(ReportedError, match=r"link\.jpg cannot be decoded"):
        load_eurosat(archive.parent)
    assert not (archive.parent / "2750" / "Forest" / "link.jpg").is_symlink()


def test_an_archive_that_unpacks_to_too_much_is_refused(folder, tmp_path, monkeypatch):
    archive = pack(folder, tmp_path / "deep" / "EuroSAT.zip", "2750")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("2750/Forest/bomb.jpg", bytes(10**7))
    assert archive.stat().st_size < 10**6
    monkeypatch.setattr(eurosat, "RGB_EDITION", replace(eurosat.RGB_EDITION, limit=10**7))
    with pytest.raises(ReportedError, match=r"EuroSAT\.zip unpacks to 0 GB"):
        load_eurosat(archive.parent)
    assert os.listdir(archive.parent) == ["EuroSAT.zip"]


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's, beside our error
def test_a_picture_of_enormous_size_is_refused_before_it_is_decoded(folder, monkeypatch):
    Image.new("RGB", (12000, 12000)).save(folder / "Forest" / "Forest_1.jpg")

    def convert(image, mode):
        assert image.width == 64, "it was decoded"
        return image

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(ReportedError, match=r"Forest_1\.jpg is 12000x12000 pixels"):
        load_eurosat(folder)


def test_what_macos_leaves_beside_an_image_is_no_image(folder, tmp_path, digest):
    archive = pack(folder, tmp_path / "deep" / "EuroSAT.zip", "2750")
    with zipfile.ZipFile(archive, "a") as zipped:
        zipped.writestr("__MACOSX/2750/Forest/._Forest_1.jpg", b"attributes")
    assert load_eurosat(archive.parent)[2] == digest
    (archive.parent / "2750" / "Forest" / "._Forest_2.jpg").write_bytes(b"attributes")
    assert load_eurosat(archive.parent)[2] == digest


def test_a_damaged_archive_is_reported_and_leaves_nothing_behind(folder, tmp_path):
    archive = pack(folder, tmp_path / "other" / "EuroSAT.zip", "2750")
    content = bytearray(archive.read_bytes())
    content[100:140] = bytes(255 - byte for byte in content[100:140])  # of the first member
    archive.write_bytes(content)
    with pytest.raises(ReportedError, match=r"EuroSAT\.zip cannot be unpacked .*fetch it again"):
        load_eurosat(archive.parent)
    assert os.listdir(archive.parent) == ["EuroSAT.zip"]


def test_an_archive_without_eurosats_classes_is_reported(tmp_path):
    with zipfile.ZipFile(tmp_path / "EuroSAT.zip", "w") as zipped:
        zipped.writestr("ds/images/AnnualCrop_1.tif", b"")
    fault = r"EuroSAT\.zip lacks JPEGs of 10 of EuroSAT's 10 classes .*Nothing was unpacked"
    with pytest.raises(ReportedError, match=fault):
        load_eurosat(tmp_path)
    assert os.listdir(tmp_path) == ["EuroSAT.zip"]


def test_an_archive_without_one_class_is_not_unpacked_and_hides_none(folder, tmp_path, digest):
    shutil.copytree(folder, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "River")
    archive = pack(tmp_path / "part", tmp_path / "other" / "EuroSAT.zip", "2750")
    with pytest.raises(ReportedError, match=r"lacks JPEGs of 1 of EuroSAT's 10 classes \(River\)"):
        load_eurosat(archive.parent)
    archive.unlink()
    shutil.copytree(folder, archive.parent / "2750")
    assert load_eurosat(archive.parent).digest == digest


def test_where_there_is_no_data_torchvision_downloads_it(folder, tmp_path, digest, monkeypatch):
    def online(root, download):
        shutil.copytree(folder, f"{root}/eurosat/2750")
        Path(root, "eurosat", "EuroSAT.zip").touch()  # torchvision leaves the archive there

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", online)
    data_path = tmp_path / "new"
    assert load_eurosat(data_path)[2] == digest
    assert sorted(os.listdir(data_path)) == ["2750", EUROSAT_CACHE]


def test_without_data_and_network_the_error_names_what_where_and_three_ways(tmp_path, monkeypatch):
    def offline(root, download):
        Path(root, "eurosat", "2750").mkdir(parents=True)  # an interrupted download, half unpacked
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", offline)
    with pytest.raises(ReportedError) as error:
        load_eurosat(tmp_path / "data")
    for part in (
        f"--data_path={tmp_path / 'data'}",
        "2750",
        "EuroSAT_RGB",
        "eurosat/2750",
        "EuroSAT.zip",
        "no network",
        "Either unpack",
        "or put the archive",
        "or run once with access to the network",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------
# The cache


def test_the_second_load_reads_the_cache(folder, monkeypatch):
    first = load_eurosat(folder)
    made = os.stat(folder / EUROSAT_CACHE).st_mtime_ns
    monkeypatch.setattr(pictures, "decode_pictures", lambda *_: pytest.fail("decoded again"))
    second = load_eurosat(folder)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels) and first.digest == second.digest
    assert os.stat(folder / EUROSAT_CACHE).st_mtime_ns == made


def test_of_two_processes_one_decodes_and_the_other_reads_its_cache(folder, monkeypatch):
    """Two threads stand for them: each takes a lock of its own."""
    decode, calls = pictures.decode_pictures, []

    def slow(*args):
        calls.append(args)
        time.sleep(0.2)  # enough for the other to begin
        return decode(*args)

    monkeypatch.setattr(pictures, "decode_pictures", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load_eurosat, [folder, folder])
    assert len(calls) == 1
    assert torch.equal(first.images, second.images) and first.digest == second.digest


def test_a_replaced_an_added_and_a_removed_file_are_noticed(folder):
    digests = [load_eurosat(folder)[2]]
    shutil.copyfile(folder / "Forest" / "Forest_2.jpg", folder / "Forest" / "Forest_1.jpg")
    digests.append(load_eurosat(folder)[2])
    shutil.copyfile(folder / "River" / "River_1.jpg", folder / "River" / "River_7.jpg")
    images, labels, digest, *_ = load_eurosat(folder)
    assert len(images) == len(labels) == 61
    (folder / "Pasture" / "Pasture_1.jpg").unlink()
    digests += [digest, load_eurosat(folder)[2]]
    assert len(set(digests)) == 4


@pytest.mark.parametrize("damage", ["cut short", "another tensor file"])
def test_a_damaged_cache_is_made_again_with_a_warning(folder, digest, damage):
    load_eurosat(folder)
    cache = folder / EUROSAT_CACHE
    if damage == "another tensor file":
        torch.save(torch.zeros(3), cache)
    else:
        cache.write_bytes(cache.read_bytes()[:10_000])
    with pytest.warns(UserWarning, match=f"{EUROSAT_CACHE} cannot be read .*making it again"):
        assert load_eurosat(folder)[2] == digest
    assert load_eurosat(folder)[2] == digest  # and pytest would show a second warning


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_cache_that_cannot_be_written_costs_only_a_warning(folder, digest):
    (folder / EUROSAT_CACHE).mkdir()
    with pytest.warns(UserWarning, match=f"{EUROSAT_CACHE} cannot be written"):
        assert load_eurosat(folder)[2] == digest


# --------------------------------------------------------------------------------------------------
# Faults of the data


def remove_class(folder):
    shutil.rmtree(folder / "River")


def resize_image(folder):
    Image.new("RGB", (48, 32)).save(folder / "River" / "River_2.jpg")


def truncate_image(folder):
    path = folder / "River" / "River_3.jpg"
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    "spoil, parts",
    [
        (remove_class, ["River is missing", "unpack it again"]),
        (resize_image, ["River_2.jpg is 48x32 pixels", "64x64"]),
        (truncate_image, ["River_3.jpg cannot be decoded", "replace it"]),
    ],
)
def test_faults_of_the_data_are_reported_with_the_files_name(folder, spoil, parts):
    spoil(folder)
    with pytest.raises(ReportedError) as error:
        load_eurosat(folder)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)
    assert not list(folder.glob("*.pt"))


def test_a_grey_jpeg_is_read_as_rgb(folder):
    Image.new("L", (64, 64), 77).save(folder / "River" / "River_1.jpg")
    assert (load_eurosat(folder)[0][8 * 6] - 77 == 0).all()


# --------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize("val_fraction, sizes", [(0, (24300, 0, 2700)), (0.1, (21870, 2430, 2700))])
def test_splits_of_eurosat_have_the_known_sizes_and_are_stratified(val_fraction, sizes):
    labels = torch.arange(10).repeat_interleave(torch.tensor(EUROSAT_SIZES))
    split = split_dataset(labels, val_fraction, CLASS_NAMES)
    parts = (split.train, split.val, split.test)
    assert tuple(len(part) for part in parts) == sizes
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(labels)))
    for part, share in zip(parts, (0.9 * (1 - val_fraction), 0.9 * val_fraction, 0.1)):
        of_classes = torch.bincount(labels[part], minlength=10).tolist()
        assert of_classes == [round(share * size) for size in EUROSAT_SIZES]


def test_splits_are_the_same_on_every_call_and_share_the_test_set():
    labels = torch.arange(10).repeat_interleave(50)
    first, again, without = (
        split_dataset(labels, val_fraction, CLASS_NAMES) for val_fraction in (0.1, 0.1, 0)
    )
    assert torch.equal(first.train, again.train) and torch.equal(first.val, again.val)
    assert torch.equal(first.test, again.test) and torch.equal(first.test, without.test)
    in_order = torch.cat([torch.arange(50 * label, 50 * label + 5) for label in range(10)])
    assert not torch.equal(first.test, in_order)


@pytest.mark.parametrize(
    "few, val_fraction, remedy",
    [(1, 0, "folders away$"), (6, 0.1, "val_fraction=0.2$"), (10, 0.96, "val_fraction=0.1$")],
)
def test_all_classes_that_are_too_small_are_named_with_what_helps(few, val_fraction, remedy):
    sizes = torch.tensor([few] + [50] * 8 + [few])
    message = rf"too few images .*: AnnualCrop \({few}\), SeaLake \({few}\): add images.*{remedy}"
    with pytest.raises(ReportedError, match=message):
        split_dataset(torch.arange(10).repeat_interleave(sizes), val_fraction, CLASS_NAMES)


def test_an_official_test_set_stays_apart():
    labels = torch.arange(3).repeat(20)
    split = split_dataset(labels, 0.25, ("a", "b", "c"), num_test=12)
    assert split.test.tolist() == list(range(48, 60))
    assert sorted([*split.train.tolist(), *split.val.tolist()]) == list(range(48))
    assert labels[split.val].bincount().tolist() == [4, 4, 4]


# --------------------------------------------------------------------------------------------------
# Normalisation


@pytest.fixture(scope="module")
def data(tiny_folder):
    return load_data("EuroSAT", tiny_folder, zca=False, val_fraction=0.5, device="cpu")


def test_images_are_normalised_by_channel(data, tiny_folder):
    images, labels, *_ = load_eurosat(tiny_folder)
    split = split_dataset(labels, 0.5, CLASS_NAMES)
    mean = torch.tensor([0.344, 0.380, 0.407]).view(3, 1, 1)
    std = torch.tensor([0.202, 0.136, 0.115]).view(3, 1, 1)
    for part in ("train", "val", "test"):
        indices = getattr(split, part)
        normalised, part_labels = getattr(data, part)
        expected = (images[indices] / 255 - mean) / std
        torch.testing.assert_close(normalised[:], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(part_labels, labels[indices])
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [30, 20, 10]


def test_to_pixels_inverts_the_normalisation(data, tiny_folder):
    images, labels, *_ = load_eurosat(tiny_folder)
    pixels = images[split_dataset(labels, 0.5, CLASS_NAMES).train] / 255
    torch.testing.assert_close(data.to_pixels(data.train[0][:]), pixels, rtol=0, atol=1e-6)
