"""More bands than three: GeoTIFFs read, chosen, refused, and through both scripts."""

import zipfile

import numpy as np
import pytest
import rasterio
import torch

from datasets import bands, eurosat, folders
from datasets.by_name import Selection, form_of, read_dataset
from datasets.preprocessing import band_statistics
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
    return read_dataset("ImageFolder", folder, SIDE, 0.2, False, Selection(text, fill_nodata))


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
    assert form_of("ImageFolder", scenes, SIDE, Selection("4,2")).channels == 2


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
    torch.testing.assert_close(data.train[0].mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-4)
    pixels = raw.images[raw.split.test].float()
    torch.testing.assert_close(data.to_pixels(data.test[0]), pixels, rtol=1e-4, atol=0)


def test_statistics_of_integers_are_exact_and_a_constant_band_stays_zero():
    images = torch.full((3, 2, 4, 4), 65_535).to(torch.uint16)
    images[0, 1] = 65_532
    mean, std = band_statistics(images)
    assert mean == [65_535.0, 65_534.0] and std == [1.0, float(f"{2**0.5:.7g}")]


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
        with pytest.raises(ReportedError, match="field_12.tif cannot be read"):
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
        read_dataset("ImageFolder", folder, 16, 0.2, False, Selection("all"))
    (folder / "lake" / "lake_3.tif").rename(folder / "lake" / "lake_3.png")
    with pytest.raises(ReportedError, match="lake_3.png is no GeoTIFF"):
        read(folder)


@pytest.mark.parametrize("dtype, hole", [("float32", np.nan), ("int16", -999)])
def test_pixels_without_data_are_refused_with_their_count_or_filled(tmp_path, dtype, hole):
    for name in CLASSES:
        for index in range(6):
            pixels = pixels_of(index, 2, dtype)
            pixels[1, 0, :3] = hole if index == 2 else pixels[1, 0, :3]
            options = {} if dtype == "float32" else {"nodata": hole}
            write(tmp_path / name / f"{index}.tif", pixels, **options)
    with pytest.raises(
        ReportedError, match="6 values in 2 of 12 GeoTIFFs are NaN or nodata.*2.tif"
    ):
        read(tmp_path)
    images = read(tmp_path, fill_nodata=7.0).images
    assert (images[2, 1, 0, :3] == 7).all() and images.isfinite().all()
    if dtype == "int16":
        with pytest.raises(ReportedError, match="hold int16, whole numbers from -32768 to 32767"):
            read(tmp_path, fill_nodata=0.5)


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
    with pytest.raises(ReportedError, match="lacks GeoTIFFs of 1 of EuroSAT's 10.*River.*multisp"):
        load_eurosat(part)
    assert not (part.parent / "EuroSAT_MS").exists()


def test_a_file_that_lacks_a_band_is_refused(archive):
    with pytest.warns(UserWarning, match="holds 20 images"):
        load_eurosat(archive.parent)
    for path in (archive.parent / "EuroSAT_MS").rglob("*.tif"):
        write(path, pixels_of(0, 12))  # as Level-2A, which has no B10
    with pytest.raises(ReportedError, match="has 12 bands, not 13"):
        load_eurosat(archive.parent)


def test_jpegs_and_missing_data_are_refused_with_the_archives_name(tiny_folder, tmp_path):
    with pytest.raises(ReportedError, match="holds JPEGs, as EuroSAT-RGB"):
        load_eurosat(tiny_folder)
    with pytest.raises(ReportedError, match="Put EuroSAT_MS.zip there"):
        load_eurosat(tmp_path)


def test_bands_have_the_order_of_eurosats_files():
    assert list(bands.SENTINEL_2)[-2:] == ["B12", "B8A"]
    assert form_of("EuroSAT", None, None, Selection("all")).channels == 13
    known = tuple(bands.SENTINEL_2)
    assert bands.chosen_bands("B8A,B01", known, "EuroSAT") == ("B8A", "B01")
