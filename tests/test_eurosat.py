"""Real EuroSAT, where EUROSAT_PATH names a folder that holds it: loading, split, and both scripts on a part of it."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

import datasets

EUROSAT_PATH = os.environ.get("EUROSAT_PATH")
pytestmark = pytest.mark.skipif(not EUROSAT_PATH, reason="real EuroSAT is not at hand (EUROSAT_PATH names its folder)")


def test_all_images_load_and_the_cache_is_much_faster(tmp_path):
    (tmp_path / "2750").symlink_to(datasets.find_eurosat(Path(EUROSAT_PATH)).resolve())  # beside which no cache is yet
    start = time.time()
    images, labels, digest, *_ = datasets.load_eurosat(tmp_path)
    first = time.time() - start
    assert images.shape == (27000, 3, 64, 64)
    means = images.float().mean((0, 2, 3)) / 255
    assert torch.allclose(means, torch.tensor([0.3444, 0.3803, 0.4078]), atol=1e-4)

    start = time.time()
    again = datasets.load_eurosat(tmp_path)
    assert time.time() - start < first / 3  # on two idle cores 0.2 s after 8 s
    assert again[2] == digest and torch.equal(again[0][::1000], images[::1000])

    parts = datasets.split_dataset(labels, val_fraction=0)
    assert (len(parts.train), len(parts.test)) == (24300, 2700)


def test_both_scripts_run_on_a_part(run, tmp_path):
    for name in datasets.CLASS_NAMES:
        folder = tmp_path / "data" / "2750" / name
        folder.mkdir(parents=True)
        for number in range(1, 31):
            shutil.copy(datasets.find_eurosat(Path(EUROSAT_PATH)) / name / f"{name}_{number}.jpg", folder)
    flags = ["--dataset=EuroSAT", "--model=ConvNet", "--data_path=data", "--buffer_path=buffers", "--no-compile"]
    done = run("expert_trajectories.py", *flags, "--num_experts=1", "--train_epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "240 training, 30 validation, 30 test images" in done.stdout
    done = run("distillation.py", *flags, "--Iteration=3", "--syn_steps=2", "--lr_lr=1e-8", "--expert_epochs=1",
               "--max_start_epoch=1", "--num_eval=1", "--epoch_eval_train=2", "--run_name=part", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "10 distilled images" in done.stdout
    images = torch.load(tmp_path / "logged_files" / "EuroSAT" / "part" / "images_3.pt", weights_only=True)
    assert images.shape == (10, 3, 64, 64) and images.isfinite().all()
