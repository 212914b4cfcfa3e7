"""Faults, for real: processes killed, disks full, files damaged or malicious, several writers in one folder.

See docs/reliability.md for what is promised. Networks are the smallest ones, and processes are forked from one that has
imported torch already, so that hundreds of starts fit into minutes.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import history
from PIL import Image

import datasets
import files
import trajectories
import utils
from evaluation import train_together

EXPERTS, DISTILLATION = "expert_trajectories.py", "distillation.py"
KILLS = 20


class Process:
    """A script that runs in a process of its own; `wait()` gives its exit code, `output()` what it has written."""

    def __init__(self, ask, pid, out):
        self.ask, self.pid, self.out = ask, pid, out

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait(self):
        return self.ask({"wait": self.pid})

    def output(self):
        return self.out.read_text().replace("\r", "\n")

    def wait_for(self, text, seconds=60):
        """Until the output has `text`."""
        end = time.time() + seconds
        while text not in self.output():
            assert time.time() < end, self.output()
            time.sleep(0.005)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start a script: `start(script, *flags, cwd=..., **resource limits)` gives a `Process`."""
    home, outputs = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("outputs")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    zygote = subprocess.Popen([sys.executable, Path(__file__).with_name("zygote.py")], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True,
                              env=environment | {"HOME": str(home), "OMP_NUM_THREADS": "1"})

    def ask(request):
        print(json.dumps(request), file=zygote.stdin, flush=True)
        return int(zygote.stdout.readline())

    count = iter(range(10**9))

    def start(script, *flags, cwd, HOME=str(home), **limits):
        out = outputs / f"{next(count)}.txt"
        out.touch()
        return Process(ask, ask({"flags": [script, *map(str, flags)], "cwd": str(cwd), "out": str(out), "home": HOME,
                                 "limits": limits}), out)

    yield start
    zygote.stdin.close()
    assert zygote.wait() == 0


@pytest.fixture(scope="module")
def finish(start):
    """Run a script to its end, which must be a good one: its output."""

    def finish(script, *flags, cwd):
        process = start(script, *flags, cwd=cwd)
        assert process.wait() == 0, process.output()
        return process.output()

    return finish


def assert_readable(folder):
    """Every file in `folder` is whole."""
    for path in folder.rglob("*"):
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".png", ".gif") and path.is_file():
            with Image.open(path) as picture:
                picture.load()


def hidden(folder):
    """Locks and temporary files that are left in a folder."""
    return [path.name for path in folder.rglob(".*")]


# ---------------------------------------------------------------------------------------------------------------------
# Distillation


@pytest.fixture(scope="module")
def flags(eurosat_folder, buffers):
    """A distillation of a second or two, evaluated and saved often."""
    return ["--dataset=EuroSAT", f"--data_path={eurosat_folder}", f"--buffer_path={buffers}", "--model=ConvNetW32",
            "--no-compile", "--Iteration=9", "--eval_it=3", "--num_eval=1", "--epoch_eval_train=2", "--batch_real=20",
            "--syn_steps=2", "--expert_epochs=1", "--max_start_epoch=2", "--lr_lr=1e-6", "--checkpoint_every=2",
            "--eval_mode=S", "--run_name=run", "--wandb_mode=disabled"]


def folder_of(cwd):
    return cwd / "logged_files" / "EuroSAT" / "run"


def outcome(cwd):
    """All that a run has learned: tensors of every file, bit for bit, and every evaluation."""
    folder = folder_of(cwd)
    tensors = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*_*.pt"))}
    record = json.loads((folder / "results.json").read_text())
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in record["evaluations"]]
    pictures = {path.name: path.read_bytes() for path in sorted(folder.glob("*.[pg][ni][gf]"))}
    return tensors, (rows, record["random_real"], record["best_iteration"], record["settings"]), pictures


def assert_same(cwd, undisturbed):
    (tensors, record, pictures), (tensors_ref, record_ref, pictures_ref) = outcome(cwd), outcome(undisturbed)
    assert tensors.keys() == tensors_ref.keys() and record == record_ref and pictures == pictures_ref
    assert all(torch.equal(tensors[name], tensors_ref[name]) for name in tensors)


@pytest.fixture(scope="module")
def undisturbed(finish, flags, tmp_path_factory):
    """The working folder of a run that nothing disturbed, and the seconds that another one takes."""
    cwd, other = (tmp_path_factory.mktemp(name) for name in ("undisturbed", "other"))
    finish(DISTILLATION, *flags, cwd=cwd)
    begin = time.time()
    finish(DISTILLATION, *flags, cwd=other)
    assert_same(other, cwd)
    return cwd, time.time() - begin


def test_a_distillation_killed_at_random_moments_ends_as_if_undisturbed(start, finish, flags, undisturbed, tmp_path):
    reference, seconds = undisturbed
    moments, resumed = random.Random(0), 0
    for number in range(KILLS):
        cwd = tmp_path / str(number)
        cwd.mkdir()
        process = start(DISTILLATION, *flags, cwd=cwd)
        time.sleep(moments.uniform(0.1, 1) * seconds)
        process.kill()
        process.wait()
        assert_readable(cwd)
        resumed += "going on at iteration" in finish(DISTILLATION, *flags, cwd=cwd)
        assert_same(cwd, reference)
        assert not hidden(folder_of(cwd))
        shutil.rmtree(cwd)
    assert resumed >= KILLS / 4  # else the moments were none that tell anything


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_of_that_very_iteration(start, finish, flags, undisturbed, tmp_path,
                                                                       number):
    long = [*flags, "--checkpoint_every=1000", "--eval_it=1000"]
    process = start(DISTILLATION, *long, cwd=tmp_path)
    process.wait_for("        0 ConvNetW32")
    process.kill(number)
    assert process.wait() == 128 + number
    last = process.output().splitlines()[-1]
    assert f"distillation.py: stopped by {number.name}" in last and "is saved: the same command goes on" in last
    assert "Traceback" not in process.output()
    losses = torch.load(folder_of(tmp_path) / "checkpoint.pt", weights_only=True)["losses"]
    out = finish(DISTILLATION, *long, cwd=tmp_path)
    assert f"going on at iteration {len(losses)};" in out or not losses
    (tensors, *_), (reference, *_) = outcome(tmp_path), outcome(undisturbed[0])
    assert torch.equal(tensors["images_9.pt"], reference["images_9.pt"])


def test_a_signal_within_an_evaluation_does_not_wait_for_its_end(start, flags, tmp_path):
    process = start(DISTILLATION, *flags, "--epoch_eval_train=100000", cwd=tmp_path)
    process.wait_for("iteration network")  # what comes next is the evaluation of real images
    time.sleep(0.5)
    process.kill(signal.SIGTERM)
    begin = time.time()
    assert process.wait() == 128 + signal.SIGTERM and time.time() - begin < 5
    assert (folder_of(tmp_path) / "checkpoint.pt").exists()


def test_resume_needs_no_other_flags_from_any_folder(start, finish, flags, undisturbed, tmp_path):
    process = start(DISTILLATION, *flags, cwd=tmp_path)
    process.wait_for("        3 ConvNetW32")
    process.kill()
    process.wait()
    moved = (tmp_path / "elsewhere").resolve()
    shutil.move(folder_of(tmp_path), moved)
    out = finish(DISTILLATION, f"--resume={moved}", "--wandb_mode=disabled", cwd=tmp_path)
    assert "going on at iteration" in out and str(moved) in out.splitlines()[-1]
    images, reference = (torch.load(folder / "images_9.pt", weights_only=True)
                         for folder in (moved, folder_of(undisturbed[0])))
    assert torch.equal(images, reference)


def test_a_finished_run_is_only_reported_again(finish, flags, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in folder_of(undisturbed[0]).iterdir()}
    out = finish(DISTILLATION, *flags, cwd=undisturbed[0])
    assert "finished before, at iteration 9" in out
    assert "Best iteration" in out and "it/s" not in out
    assert {path: path.stat().st_mtime_ns for path in folder_of(undisturbed[0]).iterdir()} == before


@pytest.mark.parametrize("how", ["--run_name=run", "--resume=logged_files/EuroSAT/run"])
def test_other_settings_are_not_resumed_and_each_is_named(start, flags, undisturbed, how):
    cwd = undisturbed[0]
    process = start(DISTILLATION, *flags[:-2], how, "--lr_img=3", "--syn_steps=1", "--wandb_mode=disabled", cwd=cwd)
    assert process.wait() == 2
    (line,) = process.output().splitlines()
    assert "lr_img=1000.0 (here 3.0), syn_steps=2 (here 1). Use the same, or another --run_name" in line


def test_a_run_does_not_go_on_with_other_experts(start, flags, buffers, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0] / "logged_files", tmp_path / "logged_files")
    process = start(DISTILLATION, *flags, "--max_files=1", cwd=tmp_path)
    assert process.wait() == 2 and "max_files=None (here 1)" in process.output()
    copy = shutil.copytree(buffers, tmp_path / "buffers")
    (copy / "EuroSAT_NO_ZCA" / "ConvNetW32" / "replay_buffer_1.pt").unlink()
    process = start(DISTILLATION, *flags, f"--buffer_path={copy}", cwd=tmp_path)
    assert process.wait() == 2
    (line,) = process.output().splitlines()
    assert "was begun with other experts" in line and "--buffer_path" in line


def test_only_leftovers_of_this_project_are_removed(tmp_path):
    ours = tmp_path / f".images_best.pt.123{files.TEMPORARY}", tmp_path / ".expert_7.lock"
    theirs = tmp_path / ".other.tmp", tmp_path / "notes.tmp"
    for path in (*ours, *theirs):
        path.touch()
    (tmp_path / f".unpack{files.TEMPORARY}").mkdir()
    (tmp_path / f".link{files.TEMPORARY}").symlink_to(tmp_path)
    with files.locked(tmp_path), files.locked(tmp_path, ".expert_8.lock"), files.locked(tmp_path / "x"):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".expert_8.lock", ".lock", ".other.tmp", "notes.tmp", "x"]


def test_networks_that_are_trained_together_stop_within_an_epoch():
    network = utils.initial_network("ConvNetD1", (10, 64), utils.make_generator(0), "cpu")
    with utils.stop, pytest.raises(utils.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        train_together([network], None, [(torch.zeros(10, 3, 64, 64), torch.arange(10))], 0.01, epochs=10**9,
                       batch_size=10, prepare=None, generators=[utils.make_generator(0)], name="")


def test_two_processes_do_not_share_a_run(start, flags, tmp_path):
    first = start(DISTILLATION, *flags, "--epoch_eval_train=100000", cwd=tmp_path)
    first.wait_for("iteration network")
    second = start(DISTILLATION, *flags, "--epoch_eval_train=100000", cwd=tmp_path)
    assert second.wait() == 2
    assert "another process is at work on the run in" in second.output() and "--run_name" in second.output()
    first.kill()
    first.wait()


def test_wandb_goes_on_with_the_same_run(start, finish, flags, tmp_path):
    online = [*flags[:-1], "--wandb_mode=offline"]
    process = start(DISTILLATION, *online, cwd=tmp_path)
    process.wait_for("        3 ConvNetW32")
    process.kill(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    finish(DISTILLATION, *online, cwd=tmp_path)
    logs = sorted((folder_of(tmp_path) / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2 and len({path.stem for path in logs}) == 1  # named after the run's id
    assert [row["Progress"] for row in history(folder_of(tmp_path))] == list(range(10))


def test_a_run_that_diverges_names_where_and_keeps_its_last_checkpoint(start, flags, tmp_path):
    process = start(DISTILLATION, *flags, "--lr_lr=5e-3", "--lr_teacher=1e-3", "--checkpoint_every=1", cwd=tmp_path)
    assert process.wait() == 2
    last = process.output().splitlines()[-1]
    for part in ("error: diverged at iteration", "replay_buffer_", "start epoch", "α is not positive, α = -",
                 "Lower --lr_lr", "--lr_img", "--syn_steps"):
        assert part in last
    checkpoint = torch.load(folder_of(tmp_path) / "checkpoint.pt", weights_only=True)
    assert checkpoint["syn_lr"] > 0 and f"iteration {len(checkpoint['losses'])} " in last


def test_out_of_memory_names_the_flags_that_need_less(start, flags, tmp_path):
    process = start(DISTILLATION, *flags, "--ipc=16", "--syn_steps=100", "--unroll=autograd", "--epoch_eval_train=1",
                    cwd=tmp_path, RLIMIT_AS=6 * 2**30)
    assert process.wait() == 2
    last = process.output().splitlines()[-1]
    assert "distillation.py: error: out of memory" in last and "--batch_syn" in last and "--unroll=adjoint" in last


# ---------------------------------------------------------------------------------------------------------------------
# Experts


@pytest.fixture(scope="module")
def train_flags(tiny_folder):
    """Experts that take a fifth of a second each."""
    return ["--dataset=EuroSAT", f"--data_path={tiny_folder}", "--model=ConvNetW32", "--no-compile", "--train_epochs=2",
            "--save_interval=3", "--batch_train=10", "--num_experts=8", "--val_fraction=0.5", "--wandb_mode=disabled"]


def folder_with(buffers):
    return buffers / "EuroSAT_NO_ZCA" / "ConvNetW32"


def experts_by_seed(buffers):
    """Every expert in a folder, by its seed, and once only."""
    found = []
    for path in trajectories.expert_files(folder_with(buffers)):
        experts, record = trajectories.read_trajectories(path)
        seeds = [entry["seed"] for entry in record["experts"]]
        assert all(f"replay_buffer_{seed // 3}" == path.stem for seed in seeds)
        found += zip(seeds, experts)
    assert len({seed for seed, _ in found}) == len(found)
    return {seed: [torch.cat([p.flatten() for p in snapshot]) for snapshot in expert] for seed, expert in found}


def assert_same_experts(buffers, reference):
    experts, others = experts_by_seed(buffers), experts_by_seed(reference)
    assert experts.keys() == others.keys() == set(range(8))
    assert all(torch.equal(p, q) for seed in others for p, q in zip(experts[seed], others[seed], strict=True))


@pytest.fixture(scope="module")
def eight(finish, train_flags, tmp_path_factory):
    """Eight experts that nothing disturbed, and the seconds that they took."""
    folder = tmp_path_factory.mktemp("eight")
    begin = time.time()
    finish(EXPERTS, *train_flags, f"--buffer_path={folder}", cwd=folder)
    return folder, time.time() - begin


def test_experts_killed_at_random_moments_end_as_if_undisturbed(start, finish, train_flags, eight, tmp_path):
    moments, kept = random.Random(1), 0
    for number in range(KILLS):
        buffers = tmp_path / str(number)
        buffers.mkdir()
        process = start(EXPERTS, *train_flags, f"--buffer_path={buffers}", cwd=tmp_path)
        time.sleep(moments.uniform(0.1, 1) * eight[1])
        process.kill()
        process.wait()
        assert_readable(buffers)
        before = experts_by_seed(buffers)
        kept += 0 < len(before) < 8
        assert f"{len(before)} of 8 experts are in" in finish(EXPERTS, *train_flags, f"--buffer_path={buffers}",
                                                              cwd=tmp_path)
        assert_same_experts(buffers, eight[0])
        assert not hidden(buffers)
    assert kept >= KILLS / 4


def test_four_writers_share_a_folder_and_one_that_dies_gives_its_expert_back(start, finish, train_flags, eight,
                                                                              tmp_path):
    writers = [start(EXPERTS, *train_flags, f"--buffer_path={tmp_path}", cwd=tmp_path) for _ in range(4)]
    writers[2].wait_for("experts are in")
    time.sleep(0.1)
    writers[2].kill()
    assert [writer.wait() for writer in writers] == [0, 0, -signal.SIGKILL, 0]
    finish(EXPERTS, *train_flags, f"--buffer_path={tmp_path}", cwd=tmp_path)  # where the dead one's came free too late
    assert_same_experts(tmp_path, eight[0])
    assert not hidden(tmp_path)


def test_a_removed_file_is_trained_again(finish, train_flags, eight, tmp_path):
    buffers = shutil.copytree(eight[0], tmp_path / "buffers")
    trajectories.expert_files(folder_with(buffers))[1].unlink()
    finish(EXPERTS, *train_flags, f"--buffer_path={buffers}", cwd=tmp_path)
    assert_same_experts(buffers, eight[0])


def test_distillation_draws_the_same_experts_in_whatever_order_they_were_trained(finish, train_flags, eight, tmp_path):
    buffers, flags = tmp_path / "buffers", [*train_flags, f"--buffer_path={tmp_path / 'buffers'}"]
    for seed in (2, 1, 0):  # trained alone, then taken into one file, in the wrong order
        alone = tmp_path / str(seed)
        finish(EXPERTS, *train_flags, "--num_experts=1", f"--seed={seed}", f"--buffer_path={alone}", cwd=tmp_path)
        (path,) = trajectories.expert_files(folder_with(alone))
        experts, record = trajectories.read_trajectories(path)
        record["training"]["seed"] = 0
        trajectories.add_expert(folder_with(buffers) / "replay_buffer_0.pt", experts[0], record["experts"][0],
                                {key: record[key] for key in ("settings", "training")})
    network = utils.initial_network("ConvNetW32", (10, 64), utils.make_generator(0), "cpu")
    shapes = [p.shape for p in network.parameters()]
    ours, theirs = (trajectories.load_experts(folder_with(place), shapes, 1, None, False)
                    for place in (buffers, eight[0]))
    assert ours.digest() == theirs.digest()
    assert all(torch.equal(a, b) for k in range(3) for a, b in zip(ours.segment(k, 0, 2, "cpu"),
                                                                  theirs.segment(k, 0, 2, "cpu")))
    finish(EXPERTS, *flags, cwd=tmp_path)
    assert_same_experts(buffers, eight[0])


# ---------------------------------------------------------------------------------------------------------------------
# Full and read-only disks


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 2 MB, and resource limits that make it so where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        yield folder, {"RLIMIT_FSIZE": 2**20}
        return
    yield folder, {}
    subprocess.run(["umount", "--lazy", folder], check=True)


def check_full(process):
    assert process.wait() == 2
    last = process.output().splitlines()[-1]
    assert "error: " in last and "cannot be written" in last and "Traceback" not in process.output()


def test_a_full_disk_leaves_the_earlier_experts(start, train_flags, eight, small_disk, tmp_path):
    folder, limits = small_disk
    flags = [*train_flags, "--save_interval=8", f"--buffer_path={folder}"]
    check_full(start(EXPERTS, *flags, cwd=tmp_path, **limits))
    (path,) = trajectories.expert_files(folder_with(folder))
    experts, _ = trajectories.read_trajectories(path)
    reference, _ = trajectories.read_trajectories(trajectories.expert_files(folder_with(eight[0]))[0])
    assert 1 <= len(experts) < 8
    for ours, theirs in zip(experts, reference):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not hidden(folder)


def test_a_full_disk_leaves_the_earlier_files_of_a_run(start, flags, small_disk, tmp_path):
    folder, limits = small_disk
    check_full(start(DISTILLATION, *flags, "--ipc=2", f"--log_dir={folder}", cwd=tmp_path, **limits))
    assert list(folder.rglob("*.p*")) and not hidden(folder)
    assert_readable(folder)


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a folder read-only, for root, too."""
    mounted = []

    def make(folder):
        if os.geteuid():
            folder.chmod(0o500)
        elif subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True).returncode:
            pytest.skip("nothing is read-only to root, and nothing may be mounted")
        else:
            mounted.append(folder)
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_read_only_folder_is_named_before_any_training(start, train_flags, flags, read_only, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    read_only(folder)
    for script, these in ((EXPERTS, [*train_flags, "--buffer_path"]), (DISTILLATION, [*flags, "--log_dir"])):
        process = start(script, *these, folder, cwd=tmp_path)
        assert process.wait() == 2
        (line,) = process.output().splitlines()
        assert line.startswith(f"{script}: error: ") and str(folder) in line


def test_data_and_experts_may_be_read_only(finish, flags, eurosat_folder, buffers, undisturbed, read_only, tmp_path):
    for name, source in (("data", eurosat_folder), ("buffers", buffers)):
        read_only(shutil.copytree(source, tmp_path / name))
    finish(DISTILLATION, *flags, f"--data_path={tmp_path / 'data'}", f"--buffer_path={tmp_path / 'buffers'}",
           cwd=tmp_path)
    assert_same(tmp_path, undisturbed[0])


def test_nothing_is_written_outside_the_folders_that_were_named(start, flags, tmp_path):
    cwd, home = tmp_path / "cwd", tmp_path / "home"
    cwd.mkdir()
    home.mkdir()
    process = start(DISTILLATION, *flags[:-1], "--wandb_mode=offline", f"--log_dir={tmp_path / 'logs'}", cwd=cwd,
                    HOME=str(home))
    assert process.wait() == 0, process.output()
    assert not list(cwd.iterdir()) and not list(home.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
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
    witness = tmp_path / "it ran".replace(" ", "_")

    def write(path, wrap=lambda malice: malice):
        torch.save(wrap(Malice(witness)), path)
        with pytest.raises(Exception, match=r"."):  # it is what it is meant to be
            torch.load(path, weights_only=True)
        torch.load(path, weights_only=False)
        assert witness.exists()
        witness.unlink()
        return witness

    return write


@pytest.mark.parametrize("damage, part", [
    (lambda whole: whole[:len(whole) // 2], "bytes, which is not what is recorded"),
    (lambda whole: whole[:5000] + bytes([whole[5000] ^ 16]) + whole[5001:], "its checksum is not the recorded one"),
], ids=["truncated", "a bit flipped"])
def test_a_damaged_trajectory_file_is_named_or_left_out(start, finish, flags, buffers, damage, part, tmp_path):
    copy = shutil.copytree(buffers, tmp_path / "buffers")
    path = folder_with(copy) / "replay_buffer_0.pt"
    path.write_bytes(damage(path.read_bytes()))
    these = [*flags, f"--buffer_path={copy}"]
    process = start(DISTILLATION, *these, cwd=tmp_path)
    assert process.wait() == 2
    (line,) = process.output().splitlines()
    assert str(path) in line and part in line and "--skip_damaged" in line and "expert_trajectories.py" in line
    out = finish(DISTILLATION, *these, "--skip_damaged", cwd=tmp_path)
    assert f"warning: {path} is damaged" in out and "synthetic images: 10, experts: 1" in out


def test_experts_refuse_a_damaged_file_and_train_again_what_was_in_it(start, finish, train_flags, eight, tmp_path):
    buffers = shutil.copytree(eight[0], tmp_path / "buffers")
    path = folder_with(buffers) / "replay_buffer_1.pt"
    path.write_bytes(path.read_bytes()[:-1])
    process = start(EXPERTS, *train_flags, f"--buffer_path={buffers}", cwd=tmp_path)
    assert process.wait() == 2 and "replay_buffer_1.pt is damaged" in process.output()
    path.unlink()
    path.with_suffix(".json").unlink()
    finish(EXPERTS, *train_flags, f"--buffer_path={buffers}", cwd=tmp_path)
    assert_same_experts(buffers, eight[0])


def test_a_malicious_trajectory_file_is_refused_and_does_not_run(start, flags, malicious, tmp_path):
    folder = folder_with(tmp_path / "buffers")
    folder.mkdir(parents=True)
    witness = malicious(folder / "replay_buffer_0.pt", lambda malice: [[[malice]]])
    process = start(DISTILLATION, *flags, f"--buffer_path={tmp_path / 'buffers'}", cwd=tmp_path)
    assert process.wait() == 2 and "replay_buffer_0.pt is no trajectory file" in process.output()
    assert not witness.exists()


def test_a_malicious_checkpoint_is_refused_and_does_not_run(start, flags, undisturbed, malicious, tmp_path):
    shutil.copytree(undisturbed[0] / "logged_files", tmp_path / "logged_files")
    witness = malicious(folder_of(tmp_path) / "checkpoint.pt", lambda malice: {"images": malice})
    process = start(DISTILLATION, *flags, cwd=tmp_path)
    assert process.wait() == 2 and "checkpoint.pt is damaged" in process.output().splitlines()[-1]
    assert not witness.exists()


def test_a_malicious_cache_is_made_anew_and_does_not_run(finish, train_flags, tiny_folder, malicious, tmp_path):
    data = shutil.copytree(tiny_folder, tmp_path / "data")
    witness = malicious(data / datasets.EUROSAT_CACHE, lambda malice: {"images": malice})
    out = finish(EXPERTS, *train_flags, f"--data_path={data}", "--num_experts=1", cwd=tmp_path)
    assert "eurosat_cache.pt cannot be read" in out and not witness.exists()
    torch.load(data / datasets.EUROSAT_CACHE, weights_only=True)
