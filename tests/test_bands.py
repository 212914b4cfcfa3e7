"""More bands than three: GeoTIFFs read, chosen, refused, and through both scripts."""

import json
import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import rasterio
import torch
from conftest import history
from PIL import Image

from datasets import bands, eurosat, folders, toysat
from datasets.by_name import DATASETS, Selection, read_dataset
from datasets.distilled import load_distilled
from datasets.eurosat import CLASS_NAMES
from datasets.normalised import channel_statistics
from datasets.toysat import load_toysat_bands
from run import report
from system.process import ReportedError

CLASSES = ("field", "lake")
SIDE = 8


def pixels_of(seed, count=4, dtype="uint16"):
    """Pixels (C, 8, 8) of noise; of the band with index b between 1000 b and 1000 b + 200."""
    random = np.random.default_rng(seed)
    offset = 1000 * np.arange(count).reshape(-1, 1, 1)
    noise = random.integers(0, 200, (count, SIDE, SIDE))
    return (noise + offset % (256 if dtype == "uint8" else 60_000)).astype(dtype)


def write(path, pixels, **options):
    """Write pixels (C, H, W) as a GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    form = {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    with bands.quiet(), rasterio.open(path, "w", driver="GTiff", **form | options) as file:
        file.write(pixels)


def fill(folder, classes=CLASSES, number=12, **options):
    """Class folders of GeoTIFFs, called as EuroSAT's; returns the folder."""
    for label, name in enumerate(classes):
        for index in range(1, number + 1):
            pixels = pixels_of((label, index), **options)
            pixels[:, :, label * SIDE // 2 :] += 50  # what tells the classes apart
            write(folder / name / f"{name}_{index}.tif", pixels)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Two classes of 12 GeoTIFFs of four bands, uint16, 8×8 pixels. Not to be changed."""
    return fill(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def folder(tmp_path):
    """The same, that a test may change."""
    return fill(tmp_path / "scenes")


def read(folder, text="all", fill_nodata=None):
    chosen = {"bands": text, "fill_nodata": fill_nodata}
    return read_dataset(Selection("ImageFolder", folder, SIDE, 0.2, **chosen))


# --------------------------------------------------------------------------------------------------
# Reading


def test_all_bands_are_read_in_the_type_of_the_files(scenes):
    raw = read(scenes)
    assert raw.images.shape == (24, 4, SIDE, SIDE) and raw.images.dtype == torch.uint16
    with bands.quiet(), rasterio.open(scenes / "lake" / "lake_1.tif") as file:
        expected = file.read()
    assert np.array_equal(raw.images[12].numpy(), expected)
    assert raw.settings["bands"] == ["1", "2", "3", "4"]


def test_bands_are_chosen_by_position_in_any_order(scenes):
    whole, part = read(scenes), read(scenes, "4,2")
    assert np.array_equal(part.images.numpy(), whole.images.numpy()[:, [3, 1]])
    assert part.settings["digest"] != whole.settings["digest"]
    assert part.settings["bands"] == ["4", "2"]
    assert Selection("ImageFolder", scenes, SIDE, bands="4,2").form.channels == 2


@pytest.mark.parametrize("dtype", bands.TYPES)
@pytest.mark.parametrize(
    "options", [{"compress": "deflate"}, {"compress": "lzw", "tiled": True, "blockxsize": 16}]
)
def test_types_compression_and_tiles_are_read(tmp_path, dtype, options):
    options = options | ({"blockysize": 16} if "tiled" in options else {})
    for label, name in enumerate(CLASSES):
        for index in range(4):
            pixels = pixels_of((label, index), 2, dtype)
            write(tmp_path / name / f"{index}.tif", pixels, **options)
    images = folders.load_folder_bands(tmp_path, SIDE, None).images
    assert images.dtype == getattr(torch, dtype)
    assert np.array_equal(images[5].numpy(), pixels_of((1, 1), 2, dtype))


def test_a_cache_serves_every_choice_of_bands_until_a_file_changes(folder, capfd):
    read(folder, "1,2")
    assert "reading 24 pictures" in capfd.readouterr().out
    digest = read(folder).settings["digest"]
    assert "reading" not in capfd.readouterr().out
    write(folder / "lake" / "lake_3.tif", pixels_of(99, 4))
    assert read(folder).settings["digest"] != digest
    assert "reading 24 pictures" in capfd.readouterr().out


def test_statistics_are_those_of_each_band_of_the_training_images(scenes):
    raw = read(scenes, "2,4")
    train = raw.images[raw.split.train].double().transpose(0, 1).flatten(1)
    expected = train.mean(1), train.std(1, correction=0)
    for name, values in zip(("mean", "std"), expected):
        found = torch.tensor(raw.settings[name], dtype=torch.float64)
        torch.testing.assert_close(found, values, rtol=1e-6, atol=0)
    data = raw.preprocessed(torch.device("cpu"))
    assert data.form == (2, SIDE, 2)
    torch.testing.assert_close(data.train[0][:].mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-4)
    pixels = raw.images[raw.split.test].float()
    torch.testing.assert_close(data.to_pixels(data.test[0][:]), pixels, rtol=1e-4, atol=0)


def test_statistics_of_integers_are_exact_and_a_constant_band_stays_zero():
    images = torch.full((3, 2, 4, 4), 65_535).to(torch.uint16)
    images[0, 1] = 65_532
    mean, std = channel_statistics(images, torch.arange(3))
    assert mean == [65_535.0, 65_534.0] and std == [1.0, 2**0.5]


# --------------------------------------------------------------------------------------------------
# What is refused


def test_files_that_differ_are_refused_by_name(folder):
    path = folder / "lake" / "lake_3.tif"
    others = {
        "3 bands of uint16, 8x8 pixels": pixels_of(0, 3),
        "4 bands of float32, 8x8 pixels": pixels_of(0, 4, "float32"),
        "4 bands of uint16, 7x8 pixels": pixels_of(0)[:, :, :7],
    }
    for found, pixels in others.items():
        write(path, pixels)
        with pytest.raises(ReportedError, match=f"lake_3.tif has {found}, but the first file has"):
            read(folder)


def test_damaged_files_palettes_and_other_types_are_refused_by_name(folder):
    path = folder / "field" / "field_12.tif"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"II*\0", b"no TIFF"):
        path.write_bytes(content)
        with pytest.raises(ReportedError, match=r"field_12.tif cannot be read \((?!Read failed)"):
            read(folder)
    path.unlink()
    for path in folder.rglob("*.tif"):
        write(path, pixels_of(1, 1, "uint8"), photometric="palette")
    with pytest.raises(ReportedError, match="tif has a palette"):
        read(folder)
    for path in folder.rglob("*.tif"):
        write(path, pixels_of(1).astype("float64"))
    with pytest.raises(ReportedError, match="holds float64: save it again as one of uint8"):
        read(folder)


def test_files_that_are_no_geotiffs_or_of_another_side_are_refused(folder):
    with pytest.raises(ReportedError, match="GeoTIFFs are not scaled: give --im_size=8"):
        read_dataset(Selection("ImageFolder", folder, 16, bands="all"))
    (folder / "lake" / "lake_3.tif").rename(folder / "lake" / "lake_3.png")
    with pytest.raises(ReportedError, match=r"lake_3.png is no GeoTIFF"):
        read(folder)


@pytest.mark.parametrize("dtype, hole", [("float32", np.nan), ("int16", -999)])
def test_pixels_without_data_are_refused_with_their_count_or_filled(tmp_path, dtype, hole):
    for name in CLASSES:
        for index in range(6):
            pixels = pixels_of(index, 2, dtype)
            pixels[1, 0, :3] = hole if index == 2 else pixels[1, 0, :3]
            options = {} if dtype == "float32" else {"nodata": hole}
            write(tmp_path / name / f"{index}.tif", pixels, **options)
    with pytest.raises(ReportedError, match=r"6 values in 2 of 12 .* NaN, nodata .*2\.tif"):
        read(tmp_path)
    images = read(tmp_path, fill_nodata=7.0).images
    assert (images[2, 1, 0, :3] == 7).all() and images.isfinite().all()
    if dtype == "int16":
        with pytest.raises(ReportedError, match="hold int16, whole numbers from -32768 to 32767"):
            read(tmp_path, fill_nodata=0.5)


def test_pixels_that_a_mask_hides_have_no_data(folder):
    path = folder / "lake" / "lake_3.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), bands.quiet():
        with rasterio.open(path, "r+") as file:
            mask = np.full((SIDE, SIDE), 255, np.uint8)
            mask[2:4] = 0
            file.write_mask(mask)
    with pytest.raises(ReportedError, match=r"64 values in 1 of 24 .* masked.*lake_3\.tif"):
        read(folder)
    raw = read(folder, fill_nodata=7.0)
    image = raw.images[raw.names.index("lake/lake_3.tif")]
    assert (image[:, 2:4] == 7).all() and (image[1:, 4:] != 7).all()


def test_an_alpha_band_is_a_band_and_hides_nothing(folder):
    for path in folder.rglob("*.tif"):
        write(path, pixels_of(1, dtype="uint8") * 0, photometric="rgb", alpha="yes")
    assert read(folder).images.shape == (24, 4, SIDE, SIDE)


# --------------------------------------------------------------------------------------------------
# EuroSAT's multispectral archive


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """EuroSATallBands.zip with its long path: ten classes of two GeoTIFFs, 8×8 pixels."""
    source = fill(tmp_path / "source", eurosat.CLASS_NAMES, 2, count=13)
    path = tmp_path / "data" / "EuroSATallBands.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as zipped:
        for file in source.rglob("*.tif"):
            zipped.write(file, f"{eurosat.LONG_PATH}/{file.parent.name}/{file.name}")
    return path


def load_eurosat(data_path):
    return eurosat.load_eurosat_bands(data_path, SIDE, None)


def test_the_multispectral_archive_is_unpacked_and_counted(archive):
    with pytest.warns(UserWarning, match="EuroSAT_MS holds 20 images, EuroSAT has 27000"):
        packed = load_eurosat(archive.parent)
    assert packed.images.shape == (20, 13, SIDE, SIDE) and packed.images.dtype == torch.uint16
    archive.unlink()
    unpacked = archive.parent / "EuroSATallBands" / eurosat.LONG_PATH
    unpacked.parent.mkdir(parents=True)
    (archive.parent / "EuroSAT_MS").rename(unpacked)
    with pytest.warns(UserWarning, match="holds 20 images"):
        assert load_eurosat(archive.parent).digest == packed.digest


def test_the_multispectral_archive_is_taken_whole_or_not_at_all(archive):
    whole = zipfile.ZipFile(archive)
    part = archive.with_name("EuroSAT_MS.zip")
    with zipfile.ZipFile(part, "w") as zipped:
        for member in whole.infolist():
            if "River" not in member.filename:
                zipped.writestr(member, whole.read(member))
    with pytest.raises(ReportedError, match=r"lacks GeoTIFFs of 1 of EuroSAT's 10.*River.*multisp"):
        load_eurosat(part)
    assert not (part.parent / "EuroSAT_MS").exists()


def test_a_file_that_lacks_a_band_is_refused(archive):
    with pytest.warns(UserWarning, match="holds 20 images"):
        load_eurosat(archive.parent)
    for path in (archive.parent / "EuroSAT_MS").rglob("*.tif"):
        write(path, pixels_of(0, 12))  # as Level-2A, which has no B10
    with pytest.raises(ReportedError, match=r"has 12 bands, not 13: .*--dataset=ImageFolder"):
        load_eurosat(archive.parent)


def test_jpegs_and_missing_data_are_refused_with_the_archives_name(tiny_folder, tmp_path):
    with pytest.raises(ReportedError, match="holds JPEGs, as EuroSAT-RGB"):
        load_eurosat(tiny_folder)
    with pytest.raises(ReportedError, match=r"Put EuroSAT_MS.zip there"):
        load_eurosat(tmp_path)


def test_another_edition_is_named_with_the_flag_that_reads_it(tmp_path, archive, monkeypatch):
    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr(eurosat, "download_eurosat", fail)
    with pytest.raises(ReportedError, match="multispectral edition is there, for --bands=all"):
        eurosat.load_eurosat(archive.parent)
    with pytest.raises(ReportedError, match="complete RGB archive, for --bands=rgb"):
        eurosat.load_eurosat(archive)


def test_pictures_that_are_geotiffs_are_named_with_the_flag_that_reads_them(folder):
    with pytest.raises(ReportedError, match="give --bands=all if it is a GeoTIFF"):
        read(folder, "rgb")


def test_bands_have_the_order_of_eurosats_files():
    assert list(bands.SENTINEL_2)[-2:] == ["B12", "B8A"]
    assert Selection("EuroSAT", None, bands="all").form.channels == 13
    known = tuple(bands.SENTINEL_2)
    assert bands.chosen_bands("B8A,B01", known, "EuroSAT") == ("B8A", "B01")


# --------------------------------------------------------------------------------------------------
# Both scripts

TINY = ["--no-compile", "--model=ConvNetD1", f"--im_size={SIDE}", "--val_fraction=0.2"]


def command(scenes, *flags):
    return [*TINY, "--dataset=ImageFolder", f"--data_path={scenes}", *flags]


@pytest.fixture(scope="module")
def four_bands(run_here, scenes, tmp_path_factory):
    """The working folder of an expert and of a distillation with four bands, called run."""
    cwd = tmp_path_factory.mktemp("four_bands")
    flags = command(scenes, "--bands=1,2,3,4", "--buffer_path=buffers", "--batch_train=8")
    more = ["--num_experts=1", "--train_epochs=2", "--wandb_mode=disabled"]
    done = run_here("expert_trajectories.py", *flags, *more, cwd=cwd)
    assert done.returncode == 0, done.stderr
    more = ["--Iteration=2", "--syn_steps=2", "--expert_epochs=1", "--max_start_epoch=1"]
    more += ["--num_eval=1", "--epoch_eval_train=1", "--run_name=run", "--show_bands=4,3,2"]
    done = run_here("distillation.py", *flags, *more, "--wandb_mode=offline", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd


def test_both_scripts_run_with_four_bands(four_bands):
    folder = four_bands / "logged_files" / "ImageFolder" / "run"
    images = torch.load(folder / "images_best.pt", weights_only=True)
    assert images.shape == (2, 4, SIDE, SIDE)
    data = json.loads((folder / "results.json").read_text())["data"]
    assert data["bands"] == ["1", "2", "3", "4"] and len(data["mean"]) == len(data["std"]) == 4
    found = load_distilled(folder)
    assert (found.mean, found.std) == (data["mean"], data["std"])
    keys = {key.partition("|")[0] for row in history(folder) for key in row}
    assert {"Synthetic_Images", "Synthetic_Pixels"} <= keys


def test_a_set_of_four_bands_is_evaluated_exported_and_taken_up_again(run_here, four_bands, scenes):
    folder = four_bands / "logged_files" / "ImageFolder" / "run"

    def distil(*flags):
        done = run_here("distillation.py", *flags, "--wandb_mode=disabled", cwd=four_bands)
        assert done.returncode == 0, done.stderr

    distil(f"--evaluate={folder}", "--export=exported")
    (path, *_) = sorted((four_bands / "exported" / "bands").rglob("*.tif"))
    with bands.quiet(), rasterio.open(path) as file:
        assert file.descriptions == ("1", "2", "3", "4") and file.dtypes[0] == "float32"
        pixels = torch.from_numpy(file.read())
    images = torch.load(folder / "images_best.pt", weights_only=True)
    data = read(scenes).preprocessed(torch.device("cpu"))
    torch.testing.assert_close(pixels, data.to_pixels(images)[0], rtol=1e-5, atol=0)
    picture = Image.open(four_bands / "exported" / "images" / "field" / "0000.png")
    assert picture.size == (SIDE, SIDE) and picture.mode == "RGB"
    distil("--evaluate=exported/dd_ranking.pt", f"--data_path={scenes}")
    distil(f"--evaluate={folder}", "--task=size")
    more = ["--bands=all", f"--pix_init={folder}", "--objective=dm", "--Iteration=1"]
    distil(*command(scenes), *more, "--num_eval=1", "--epoch_eval_train=1")


def test_experts_and_sets_of_other_bands_are_refused(run_here, four_bands, scenes):
    folder = four_bands / "logged_files" / "ImageFolder" / "run"
    flags = command(scenes, "--bands=4,3,2,1", "--buffer_path=buffers", "--wandb_mode=disabled")
    flags.append("--max_start_epoch=1")
    for more in ((), (f"--evaluate={folder}",)):
        done = run_here("distillation.py", *flags, "--expert_epochs=1", *more, cwd=four_bands)
        assert done.returncode == 2 and "other settings" in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    flags[flags.index("--bands=4,3,2,1")] = "--bands=1,2"
    for more, message in (
        ((), "--bands that made them"),
        ((f"--evaluate={folder}",), "have 4 bands, not 2: use the --bands"),
    ):
        done = run_here("distillation.py", *flags, "--expert_epochs=1", *more, cwd=four_bands)
        assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bands=2,9"], "ImageFolder has no band 9: choose from 1, 2, 3, 4"),
        (["--bands=2,2"], "band 2 is named twice"),
        (["--bands=all,2"], "'all' stands for all of its bands: give it alone"),
        (["--bands=B04,B10,B20", "--dataset=EuroSAT"], "EuroSAT has no band B20"),
        (["--bands=all", "--dataset=CIFAR10"], "CIFAR10 has no other bands than rgb"),
        (["--bands=all", "--zca"], "Two matrices of 256 x 256 numbers"),
        (["--bands=all", "--show_bands=1,2,9"], "name three of the bands in use, 1, 2, 3, 4"),
        (["--fill_nodata=0"], "--fill_nodata=0 is for GeoTIFFs: give --bands=all"),
        (["--show_bands=1,2,3"], "pictures show all three bands of --bands=rgb"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(run_here, scenes, tmp_path, flags, message):
    own = [] if any("--dataset" in flag for flag in flags) else command(scenes)
    done = run_here("distillation.py", *own, "--objective=dm", *flags, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# --------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_are_stretched_between_percentiles_of_the_real_images(scenes):
    data = read(scenes).preprocessed(torch.device("cpu"))
    view = report.view_of(data, "4,1,2")
    pixels = data.to_pixels(data.train[0][:])
    chosen = pixels[:, [3, 0, 1]].transpose(0, 1).flatten(1)
    expected = [np.percentile(chosen.numpy(), end, axis=1) for end in (2, 98)]
    for found, ends in zip((view.low, view.high), expected):
        assert np.allclose(found.flatten().numpy(), ends, rtol=1e-6)
    shown = view.of_pixels(pixels)
    assert shown.shape[1] == 3 and shown.min() == 0 and shown.max() == 1
    assert 0.01 < (shown == 0).float().mean() < 0.04
    with pytest.raises(ReportedError, match="name three of the bands in use, 1, 2, 3, 4"):
        report.view_of(data, "1,2")


def test_pictures_show_true_colours_by_default_and_else_the_first_bands():
    names = list(bands.SENTINEL_2)
    assert report.shown_bands(names, None) == ("B04", "B03", "B02")
    assert report.shown_bands(["B08", "B11"], None) == ("B08", "B11", "B11")
    assert report.shown_bands(["1", "2", "3", "4"], None) == ("1", "2", "3")


# --------------------------------------------------------------------------------------------------
# ToySAT


def test_toysat_draws_the_same_visible_bands_with_and_without_infrared():
    visible, labels = toysat.draw_toysat(2)
    drawn, same = toysat.draw_toysat(2, bands=5)
    assert drawn.shape == (20, 5, 64, 64) and np.array_equal(labels, same)
    assert np.array_equal(drawn[:, :3], visible)
    near, short = drawn[:, 3:].mean((2, 3)).reshape(10, 2, 2).mean(1).T
    forest, water = CLASS_NAMES.index("Forest"), CLASS_NAMES.index("SeaLake")
    assert near[forest] > 3 * near[water] and short.argmin() == water
    short = toysat.BANDS.index("B11")
    assert toysat.SOIL[short].min() > max(toysat.GREEN[short].max(), toysat.WATER[short].max())


def validation_accuracies(run_here, cwd, names):
    """The validation accuracies of five networks that are trained on all training images."""
    flags = [f"--bands={names}", "--dataset=ToySAT", "--im_size=8", "--val_fraction=0.3"]
    flags += ["--model=ConvNetW32", "--evaluate=full", "--epoch_eval_train=10", "--num_eval=5"]
    flags += ["--lr_teacher=0.02", "--batch_train=32", f"--run_name={names}"]
    done = run_here("distillation.py", *flags, "--no-compile", "--wandb_mode=disabled", cwd=cwd)
    assert done.returncode == 0, done.stderr
    path = cwd / "logged_files" / "ToySAT" / names / "evaluation.json"
    (scores,) = json.loads(path.read_text())["scores"].values()
    return np.array(scores["val"])


def test_a_near_infrared_helps_by_more_than_the_spread(run_here, tmp_path, monkeypatch):
    few = replace(DATASETS["ToySAT"], load_bands=partial(load_toysat_bands, per_class=60))
    monkeypatch.setitem(DATASETS, "ToySAT", few)
    three = validation_accuracies(run_here, tmp_path, "B04,B03,B02")  # 32.9 ± 5.0%
    four = validation_accuracies(run_here, tmp_path, "B04,B03,B02,B08")  # 41.3 ± 4.4%
    assert four.mean() - three.mean() > max(three.std(), four.std())
