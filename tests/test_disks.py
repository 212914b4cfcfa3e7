"""Disks that are full or read-only, and files that are damaged or malicious.

See docs/reliability.md for what is promised.
"""

import os
import shutil
import subprocess

import pytest
import torch
from outcomes import (
    assert_readable,
    assert_same,
    assert_same_experts,
    experts_by_seed,
    folder_of,
    folder_with,
    hidden,
)

EXPERTS = "expert_trajectories.py"
DISTILLATION = "distillation.py"


# --------------------------------------------------------------------------------------------------
# Full and read-only disks


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 2 MB.

    And a function: the limits, from the size of a file, that stand for it where none is mounted.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        yield folder, lambda size: {"RLIMIT_FSIZE": size}
        return
    yield folder, lambda size: {}
    subprocess.run(["umount", "--lazy", folder], check=True)


def check_full(process):
    assert process.wait() == 2
    last = process.output().splitlines()[-1]
    assert "error: " in last and "cannot be written" in last
    assert "Traceback" not in process.output()


def test_a_full_disk_leaves_the_earlier_experts(
    start, finish, specks_experts, specks_buffers, small_disk, tmp_path
):
    folder, limits = small_disk
    flags = [*specks_experts, f"--buffer_path={folder}"]
    finish(EXPERTS, *flags, "--num_experts=1", cwd=tmp_path)
    check_full(start(EXPERTS, *flags, cwd=tmp_path, **limits(2**16)))
    ours, theirs = experts_by_seed(folder), experts_by_seed(specks_buffers)
    assert 1 <= len(ours) < 8
    for seed in ours:
        assert all(torch.equal(p, q) for p, q in zip(ours[seed], theirs[seed], strict=True))
    assert not hidden(folder)


def test_a_full_disk_leaves_the_earlier_files_of_a_run(start, specks_run, small_disk, tmp_path):
    folder, limits = small_disk
    flags = [*specks_run, "--ipc=4", "--texture", "--canvas_size=16", f"--log_dir={folder}"]
    check_full(start(DISTILLATION, *flags, cwd=tmp_path, **limits(2**20)))
    assert list(folder.rglob("*.p*")) and not hidden(folder)
    assert_readable(folder)


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a folder read-only, for root, too."""
    mounted = []

    def make(folder):
        mount = ["mount", "--bind", "-o", "ro", folder, folder]
        if os.geteuid():
            folder.chmod(0o500)
        elif subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("nothing is read-only to root, and nothing may be mounted")
        else:
            mounted.append(folder)
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_read_only_folder_is_named_before_any_training(
    start, specks_experts, specks_run, read_only, tmp_path
):
    folder = tmp_path / "closed"
    folder.mkdir()
    read_only(folder)
    commands = [
        (EXPERTS, *specks_experts, "--buffer_path"),
        (DISTILLATION, *specks_run, "--log_dir"),
    ]
    for script, *flags in commands:
        process = start(script, *flags, folder, cwd=tmp_path)
        assert process.wait() == 2
        *_, line = process.output().splitlines()
        assert line.startswith(f"{script}: error: ") and str(folder) in line


def test_data_and_experts_may_be_read_only(
    finish, specks_run, specks_folder, specks_buffers, undisturbed, read_only, tmp_path
):
    data = shutil.copytree(specks_folder, tmp_path / "data")
    buffers = shutil.copytree(specks_buffers, tmp_path / "buffers")
    read_only(data)
    read_only(buffers)
    places = [f"--data_path={data}", f"--buffer_path={buffers}"]
    finish(DISTILLATION, *specks_run, *places, cwd=tmp_path)
    assert_same(tmp_path, undisturbed)


def test_nothing_is_written_outside_the_folders_that_were_named(start, specks_run, tmp_path):
    cwd, home = tmp_path / "cwd", tmp_path / "home"
    cwd.mkdir()
    home.mkdir()
    flags = [*specks_run, "--wandb_mode=offline", f"--log_dir={tmp_path / 'logs'}"]
    process = start(DISTILLATION, *flags, cwd=cwd, HOME=home)
    assert process.wait() == 0, process.output()
    assert not list(cwd.iterdir()) and not list(home.iterdir())


# --------------------------------------------------------------------------------------------------
# Damaged and malicious files


class Malice:
    """Runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def malicious(tmp_path):
    """A function that writes a malicious file, and the file that appears when it has run."""
    witness = tmp_path / "it_ran"

    def write(path, wrap):
        torch.save(wrap(Malice(witness)), path)
        with pytest.raises(Exception, match="weights_only"):  # it is what it is meant to be
            torch.load(path, weights_only=True)
        torch.load(path, weights_only=False)
        assert witness.exists()
        witness.unlink()
        return witness

    return write


DAMAGE = {
    "truncated": (lambda whole: whole[: len(whole) // 2], "bytes, its record says"),
    "a bit flipped": (
        lambda whole: whole[:5000] + bytes([whole[5000] ^ 16]) + whole[5001:],
        "its checksum is not the recorded one",
    ),
}


@pytest.mark.parametrize("damage, part", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_trajectory_file_is_named_or_left_out(
    start, finish, specks_run, specks_buffers, damage, part, tmp_path
):
    copy = shutil.copytree(specks_buffers, tmp_path / "buffers")
    path = folder_with(copy) / "replay_buffer_0.pt"
    path.write_bytes(damage(path.read_bytes()))
    flags = [*specks_run, f"--buffer_path={copy}", "--Iteration=0"]
    process = start(DISTILLATION, *flags, cwd=tmp_path)
    assert process.wait() == 2
    *_, line = process.output().splitlines()
    for words in (str(path), part, "--skip_damaged", "expert_trajectories.py"):
        assert words in line
    out = finish(DISTILLATION, *flags, "--skip_damaged", cwd=tmp_path, curves=False)
    assert f"warning: {path} is damaged" in out
    assert "synthetic images: 2, experts: 7" in out


def test_experts_refuse_a_damaged_file_and_train_again_what_was_in_it(
    start, finish, specks_experts, specks_buffers, tmp_path
):
    buffers = shutil.copytree(specks_buffers, tmp_path / "buffers")
    flags = [*specks_experts, f"--buffer_path={buffers}"]
    path = folder_with(buffers) / "replay_buffer_1.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    process = start(EXPERTS, *flags, cwd=tmp_path)
    assert process.wait() == 2
    assert f"{path} is damaged" in process.output()
    path.unlink()
    path.with_suffix(".json").unlink()
    finish(EXPERTS, *flags, cwd=tmp_path)
    assert_same_experts(buffers, specks_buffers)


def test_a_malicious_trajectory_file_is_refused_and_does_not_run(
    start, specks_run, malicious, tmp_path
):
    folder = folder_with(tmp_path / "buffers")
    folder.mkdir(parents=True)
    witness = malicious(folder / "replay_buffer_0.pt", lambda malice: [[[malice]]])
    process = start(
        DISTILLATION, *specks_run, f"--buffer_path={tmp_path / 'buffers'}", cwd=tmp_path
    )
    assert process.wait() == 2
    assert "replay_buffer_0.pt is no trajectory file" in process.output()
    assert not witness.exists()


def test_a_malicious_checkpoint_is_refused_and_does_not_run(
    start, specks_run, undisturbed, malicious, tmp_path
):
    shutil.copytree(undisturbed / "logged_files", tmp_path / "logged_files")
    path = folder_of(tmp_path) / "checkpoint.pt"
    witness = malicious(path, lambda malice: {"images": malice})
    process = start(DISTILLATION, *specks_run, cwd=tmp_path)
    assert process.wait() == 2
    last = process.output().splitlines()[-1]
    assert "checkpoint.pt cannot be read as a checkpoint of this version" in last
    assert not witness.exists()


def test_a_malicious_cache_is_made_again_and_does_not_run(
    finish, specks_experts, specks_folder, malicious, tmp_path
):
    data = shutil.copytree(specks_folder, tmp_path / "data")
    cache = data / "imagefolder_8_cache.pt"
    witness = malicious(cache, lambda malice: {"images": malice})
    flags = [*specks_experts, "--num_experts=1", f"--data_path={data}"]
    out = finish(EXPERTS, *flags, f"--buffer_path={tmp_path}", cwd=tmp_path)
    assert "imagefolder_8_cache.pt cannot be read" in out and not witness.exists()
    torch.load(cache, weights_only=True)
