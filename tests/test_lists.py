"""--split: published lists decide which images are for training, validation and testing."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from datasets import lists
from datasets.by_name import Selection, read_dataset
from datasets.eurosat import CLASS_NAMES
from system.process import ReportedError

SIZES = {"train": 3, "val": 2, "test": 1}  # of the six images of each class
PART_ENDS = ((0, 3), (3, 5), (5, 6))


@pytest.fixture
def splits(tmp_path):
    """A folder of lists as torchgeo's: eurosat-train.txt and the others, names without folders."""
    folder = tmp_path / "splits"
    folder.mkdir()
    start = 1
    for part, size in SIZES.items():
        numbers = range(start, start + size)
        lines = [f"{name}_{number}.jpg\n" for name in CLASS_NAMES for number in numbers]
        (folder / f"eurosat-{part}.txt").write_text("".join(lines))
        start += size
    return folder


def read(folder, split):
    return read_dataset(Selection("EuroSAT", folder, val_fraction=0.5, split=split))


def test_lists_decide_the_split_and_its_digest(tiny_folder, splits):
    whole = read(tiny_folder, None)
    for split in (splits, splits / "eurosat-train.txt"):
        raw = read(tiny_folder, split)
        found = [part.tolist() for part in (raw.split.train, raw.split.val, raw.split.test)]
        expected = [[6 * c + i for c in range(10) for i in range(*ends)] for ends in PART_ENDS]
        assert found == expected
        assert raw.settings["digest"] != whole.settings["digest"]
        data = raw.preprocessed(torch.device("cpu"))
        assert data.test_names == tuple(f"{name}/{name}_6.jpg" for name in CLASS_NAMES)


def test_names_may_have_folders_and_another_suffix(tiny_folder, splits):
    digest = read(tiny_folder, splits).settings["digest"]
    path = splits / "eurosat-test.txt"
    path.write_text("\n\n".join(f"tif/{name}/{name}_6.tif" for name in CLASS_NAMES))
    assert read(tiny_folder, splits).settings["digest"] == digest


def add(path, *names):
    path.write_text(path.read_text() + "".join(f"{name}\n" for name in names))


def test_lists_that_do_not_fit_are_refused_with_a_count_and_an_example(tiny_folder, splits):
    test = splits / "eurosat-test.txt"
    whole = test.read_text()

    def refusal():
        with pytest.raises(ReportedError) as error:
            read(tiny_folder, splits)
        test.write_text(whole)
        return str(error.value)

    add(test, "Forest_7.jpg", "Forest_8.jpg")
    assert "2 names are of no image or of several, for example Forest_7" in refusal()
    add(test, "Forest_1.jpg")
    assert "1 names are listed twice, for example Forest/Forest_1.jpg" in refusal()
    test.write_text(whole.replace("River_6.jpg\n", ""))
    assert "1 names are in no list, for example River/River_6.jpg" in refusal()
    test.write_text(whole.replace("River_6.jpg\n", ""))
    add(splits / "eurosat-val.txt", "River_6.jpg")
    assert "1 names have no images in the test list, for example River" in refusal()


def test_missing_lists_and_data_without_files_are_refused(tiny_folder, splits):
    shutil.copy(splits / "eurosat-train.txt", splits / "eurosat-spatial-train.txt")
    with pytest.raises(ReportedError, match=r"holds 2 lists called \*train.txt: name the one"):
        read(tiny_folder, splits)
    with pytest.raises(ReportedError, match=r"eurosat-spatial-val.txt cannot be read"):
        read(tiny_folder, splits / "eurosat-spatial-train.txt")
    with pytest.raises(ReportedError, match="nowhere is not there"):
        read(tiny_folder, splits / "nowhere")
    (splits / "all.txt").touch()
    with pytest.raises(ReportedError, match="is not called after training images"):
        read(tiny_folder, splits / "all.txt")
    raw = replace(read(tiny_folder, None), names=())
    with pytest.raises(ReportedError, match="these images have no files"):
        lists.listed_split(splits, raw)


def test_a_run_on_a_published_split_names_its_test_images(run_here, tiny_folder, splits, tmp_path):
    flags = ["--dataset=EuroSAT", f"--data_path={tiny_folder}", "--model=ConvNetD1"]
    flags += ["--no-compile", "--wandb_mode=disabled", f"--split={splits}"]
    more = ["--objective=dm", "--Iteration=1", "--num_eval=1", "--epoch_eval_train=1"]
    done = run_here("distillation.py", *flags, *more, "--run_name=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "logged_files" / "EuroSAT" / "run"
    names = (folder / "test_images.txt").read_text().splitlines()
    assert names == [f"{name}/{name}_6.jpg" for name in CLASS_NAMES]
    data = json.loads((folder / "results.json").read_text())["data"]
    assert data["digest"] == read(tiny_folder, splits).settings["digest"]
    export = [f"--evaluate={folder}", "--export=exported", f"--data_path={tiny_folder}"]
    done = run_here("distillation.py", *export, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    exported = [*flags[:-1], "--evaluate=exported", "--num_eval=1", "--epoch_eval_train=1"]
    done = run_here("distillation.py", *exported, "--val_fraction=0.2", cwd=tmp_path)
    assert done.returncode == 2 and f"made with the lists --split={splits.name}" in done.stderr
    done = run_here("distillation.py", *exported, flags[-1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_here("distillation.py", *flags, "--val_fraction=0.2", cwd=tmp_path)
    assert done.returncode == 2 and "--split and --val_fraction=0.2" in done.stderr
