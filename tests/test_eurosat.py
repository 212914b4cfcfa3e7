"""Real EuroSAT, where EUROSAT_PATH names a folder that holds it: loading, split, both scripts."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from datasets import by_name, eurosat, splits

EUROSAT_PATH = os.environ.get("EUROSAT_PATH")
pytestmark = pytest.mark.skipif(
    not EUROSAT_PATH, reason="real EuroSAT is not at hand (EUROSAT_PATH names its folder)"
)


def test_all_images_load_and_the_cache_is_much_faster(tmp_path):
    source = eurosat.find_eurosat(Path(EUROSAT_PATH)).resolve()
    (tmp_path / "2750").symlink_to(source)  # beside which no cache is yet
    begin = time.monotonic()
    first = eurosat.load_eurosat(tmp_path)
    seconds = time.monotonic() - begin
    assert first.images.shape == (27000, 3, 64, 64)
    means = torch.stack([channel.float().mean() / 255 for channel in first.images.unbind(1)])
    assert torch.allclose(means, torch.tensor([0.3444, 0.3803, 0.4078]), atol=1e-4)

    begin = time.monotonic()
    again = eurosat.load_eurosat(tmp_path)
    assert time.monotonic() - begin < seconds / 3  # on two idle cores 0.2 s after 8 s
    assert again.digest == first.digest
    assert torch.equal(again.images[::1000], first.images[::1000])

    split = splits.split_dataset(first.labels, 0, first.classes)
    assert (len(split.train), len(split.val), len(split.test)) == (24300, 0, 2700)


def test_both_scripts_run_on_a_part(forked, tmp_path):
    source = eurosat.find_eurosat(Path(EUROSAT_PATH))
    for name in by_name.CLASS_NAMES:
        folder = tmp_path / "data" / "2750" / name
        folder.mkdir(parents=True)
        for number in range(1, 31):
            shutil.copy(source / name / f"{name}_{number}.jpg", folder)
    flags = ["--dataset=EuroSAT", "--model=ConvNetW32", "--data_path=data", "--no-compile"]
    flags += ["--buffer_path=buffers", "--wandb_mode=disabled"]
    experts = ["--num_experts=1", "--train_epochs=1"]
    done = forked("expert_trajectories.py", *flags, *experts, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "240 training, 30 validation, 30 test images" in done.stdout
    flags += ["--Iteration=3", "--syn_steps=2", "--lr_lr=1e-8", "--expert_epochs=1"]
    flags += ["--max_start_epoch=1", "--num_eval=1", "--epoch_eval_train=2", "--run_name=part"]
    done = forked("distillation.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "10 distilled images" in done.stdout
    folder = tmp_path / "logged_files" / "EuroSAT" / "part"
    images = torch.load(folder / "images_3.pt", weights_only=True)
    assert images.shape == (10, 3, 64, 64) and images.isfinite().all()
