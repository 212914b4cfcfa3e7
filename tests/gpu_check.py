"""Check on a machine with a CUDA card what tests on a CPU cannot.

    python tests/gpu_check.py

prints a line for each check, PASS or FAIL with its figures, then a table of times and memory, and
exits with 1 if a check failed. Without a card it exits with 2. Meant to take less than ten minutes.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluation  # found through the line above
import training
import utils
from datasets import by_name
from datasets.preprocessing import Form, Layout, random_real
from evaluation import Evaluator
from networks import get_network
from objectives.trajectory import matching_loss
from reparam_module import AdjointUnroll, AutogradUnroll, ReparamModule
from system import devices, process
from system.compilation import Compiler
from system.machine import Machine
from system.ranks import ALONE
from utils import Augment

ROOT = Path(__file__).resolve().parents[1]
DSA = utils.augment_groups(True, utils.DSA_STRATEGY)
LR = 0.02
WITHOUT_TF32 = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}  # for the processes of scripts


@dataclass(frozen=True)
class Setup:
    """The device, and how much is done on it."""

    device: torch.device
    compile: bool
    student: tuple  # its network, the side of its images, its steps
    model: str  # of an evaluation
    side: int
    epochs: int  # of an evaluation
    iterations: int  # of a run that is interrupted
    bench: tuple  # flags of bench.py


GPU = {
    "compile": True,
    # Of ConvNet's gradients at 64×64, rounding changes 1 to 4%, whatever computes them: on an H200,
    # those of autograd in float32 and in float64 differ by 1.4%. Of these it changes 1e-6.
    "student": ("ConvNetW32", 32, 5),
    "model": "ConvNet",
    "side": 64,
    "epochs": 100,
    "iterations": 40,
    "bench": ("--steps=20", "--no-amp"),
}
TINY = {  # tries this script on a CPU
    "compile": False,
    "student": ("ConvNetW32", 16, 3),
    "model": "ConvNetW32",
    "side": 16,
    "epochs": 3,
    "iterations": 30,
    "bench": ("--steps=2", "--epochs=1", "--no-amp", "--no-compile", "--repeat=1", "--size=64"),
}

# --------------------------------------------------------------------------------------------------
# Reference values


def golden(name):
    return torch.load(ROOT / "tests" / "golden" / f"{name}.pt", weights_only=True)


def check_unroll(setup):
    """Loss and gradients equal MTT's, in float64."""
    reference = golden("unroll")
    student = ReparamModule(get_network("ConvNet", 3, 10, 64).double().to(setup.device))
    index = torch.arange(student.num_params, dtype=torch.float64, device=setup.device)
    start = 0.05 * torch.sin(index)
    target = start + 0.01 * torch.cos(index)
    images = reference["unroll_images"].to(setup.device).requires_grad_(True)
    syn_lr = torch.tensor(LR, dtype=torch.float64, device=setup.device, requires_grad=True)
    batches = [(images, torch.arange(10, device=setup.device))] * 4
    objective = matching_loss(start, target)
    computed = AdjointUnroll(student)(start, objective, (images,), syn_lr, batches)
    errors = {}
    for value, name in zip(computed, ("loss", "grad_images", "grad_lr")):
        expected = reference[f"unroll_{name}"]
        error = (value.cpu() - expected).abs().max() / expected.abs().max()
        errors[name] = error.item()
    figures = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return max(errors.values()) <= 1e-8, f"relative errors in float64: {figures}"


def check_augmentation(setup):
    """DSA equals MTT's, up to the rounding of positions between pixels."""
    reference = golden("augmentation")
    x = reference["dsa_input"].to(setup.device)
    errors = []
    for key, expected in reference.items():
        if key == "dsa_input":
            continue
        name, seed = key.removeprefix("dsa_").split("_seed")
        strategy = utils.DSA_STRATEGY if name == "strategy" else name
        generator = torch.Generator().manual_seed(int(seed))
        if name == "strategy":
            out = utils.diff_augment(x, strategy, generator)[[2]]
        else:
            draw, apply = utils.AUGMENTATIONS[name]
            parameters = draw(len(x), x.shape[2], generator)
            out = apply(x, *(part.to(setup.device) for part in parameters))[[0, 3]]
        errors.append((out.cpu() - expected).abs().max().item())
    return max(errors) <= 5e-4, f"largest error of {len(errors)} batches: {max(errors):.1e}"


# --------------------------------------------------------------------------------------------------
# Gradients, compiled, as CUDA graphs


class Records:
    """Counts the CUDA graphs that are recorded within `with Records() as records:`."""

    def __enter__(self):
        self.count = 0
        self.original = CUDAGraphTreeManager.record_function
        CUDAGraphTreeManager.record_function = self.counting(self.original)
        return self

    def __exit__(self, *_):
        CUDAGraphTreeManager.record_function = self.original

    def counting(self, function):
        def record(*args):
            self.count += 1
            return function(*args)

        return record


@contextmanager
def seconds_of(device, seconds):
    """Append to `seconds` how long the block takes, with all that it starts on the device."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)


def check_gradients(setup):
    """The adjoint's equal autograd's in float32, whatever memory keeps; graphs are reused.

    A result for each size of `memory`.
    """
    compiler = Compiler(setup.compile)
    model, side, steps = setup.student
    network = utils.initial_network(model, Form(10, side), utils.make_generator(0), setup.device)
    student = ReparamModule(network)
    augment = Augment(side, DSA, apply=utils.group_function(compiler, setup.device))
    random = utils.make_generator("images")
    labels = torch.arange(10, device=setup.device)

    def make_batch(synthetic, batch):
        return augment(*synthetic, batch, labels)

    images = torch.randn(10, 3, side, side, generator=random)
    images = images.to(setup.device).requires_grad_(True)
    syn_lr = torch.tensor(LR, device=setup.device, requires_grad=True)
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    target = start + 0.01 * torch.randn(start.shape, generator=random).to(setup.device)
    inputs = start, matching_loss(start, target), (images,), syn_lr

    batches = utils.draw_batches(10, 10, steps, augment, utils.make_generator("batches"))
    batches = utils.to_device(batches, setup.device)
    expected = AutogradUnroll(student, make_batch)(*inputs, batches)
    engine = AdjointUnroll(student, make_batch, compiler.function)
    for name, kept in {"none": 0, "half": steps // 2, "all": steps}.items():
        engine.memory = (kept + 0.5) * engine.bytes_per_step  # 0 until a step was taken
        yield name, *compare_engines(setup, compiler, partial(engine, *inputs, batches), expected)


def compare_engines(setup, compiler, iterate, expected):
    """Ten iterations of an engine, whose last result is compared with the `expected` one."""
    seconds, late, results = [], 0, None
    for iteration in range(10):
        with Records() as records, seconds_of(setup.device, seconds):
            results = iterate()
        late += records.count if iteration >= 2 else 0
    _, images, lr = (result.double() for result in results)
    _, images_ref, lr_ref = (result.double() for result in expected)
    cosine = F.cosine_similarity(images.flatten(), images_ref.flatten(), dim=0).item()
    error = (abs(lr - lr_ref) / abs(lr_ref)).item()
    usual, slowest = statistics.median(seconds[2:]), max(seconds[2:])
    figures = f"cosine {cosine:.6f}, α {error:.1e}, {usual:.4f} s, at most {slowest:.4f} s, "
    figures += f"CUDA graphs recorded late: {late}"
    # On a CPU, and where CUDA graphs have failed, there are none.
    has_graphs = compiler.graphs or setup.device.type == "cpu"
    passed = cosine >= 0.9999 and error <= 1e-3 and not late
    passed = passed and has_graphs and compiler.compiles == setup.compile
    return passed, figures if has_graphs else figures + "; CUDA graphs have failed"


# --------------------------------------------------------------------------------------------------
# Evaluation


def check_evaluation(setup):
    """An evaluation repeats, and networks trained together learn what single ones do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = by_name.read_dataset(by_name.Selection("ToySAT", Path("."), setup.side))
        data = raw.preprocessed(setup.device)
    compiler = Compiler(setup.compile)
    evaluator = Evaluator(
        data=replace(data, val=data.train, test=data.train),  # enough images for two points
        pool=together(setup, data.form, compiler),
        num_eval=3,
        epochs=setup.epochs,
        batch_train=256,
        batch_real=256,
        augment=Augment(setup.side, DSA, apply=utils.group_function(compiler, setup.device)),
        compiler=compiler,
    )
    images, labels = random_real(data, Layout(5), utils.make_generator("real"))

    def accuracy(evaluator):
        (scores,) = evaluator(images, labels, LR, ("check",)).values()
        return statistics.mean(scores.test)

    first, again = accuracy(evaluator), accuracy(evaluator)
    yield "repeated", abs(first - again) <= 0.02, f"{first:.2%} and {again:.2%}"
    alone = accuracy(replace(evaluator, pool={setup.model: None}))
    yield "together or not", abs(first - alone) <= 0.02, f"{first:.2%} and {alone:.2%}"


def together(setup, form, compiler):
    """A pool of networks that are trained together, also on a CPU."""
    pool = evaluation.make_pool("S", setup.model, form, Machine(setup.device, ALONE, compiler))
    if setup.device.type == "cuda":
        return pool
    network = utils.initial_network(setup.model, form, utils.make_generator(0), setup.device)
    return {setup.model: partial(training.sgd_step, ReparamModule(network))}


# --------------------------------------------------------------------------------------------------
# Both scripts


def check_scripts(setup):
    """A run that is stopped and resumed has the losses of an undisturbed one."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        command = partial(script_command, setup)
        small = ["--num_experts=2", "--train_epochs=3", "--batch_train=64"]
        finish(command("expert_trajectories.py", *small), work)
        undisturbed, stopped = (command("distillation.py", *run_flags(setup, n)) for n in "ab")
        finish(undisturbed, work)
        before = interrupt(stopped, work, work / "logged_files/ToySAT/b/checkpoint.pt")
        finish(stopped, work)
        ours, theirs = (
            losses_in(work / f"logged_files/ToySAT/{name}/checkpoint.pt") for name in "ba"
        )
    errors = [abs(a - b) / b for a, b in zip(ours, theirs)]
    passed = max(errors) <= 1e-2 and len(ours) == len(theirs) == setup.iterations
    figures = f"stopped at iteration {before} of {setup.iterations}"
    return passed, f"{figures}, losses differ by at most {max(errors):.1e}"


def script_command(setup, script, *flags):
    shared = ["--dataset=ToySAT", "--im_size=32", "--model=ConvNetW32", "--wandb_mode=disabled"]
    shared += ["--data_path=.", "--buffer_path=buffers", f"--device={setup.device}"]
    return [sys.executable, ROOT / script, *shared, f"--compile={setup.compile}", *flags]


def run_flags(setup, name):
    flags = ["--ipc=1", "--syn_steps=5", "--expert_epochs=1", "--max_start_epoch=2"]
    # So low a rate of the images that rounding, which differs from run to run, stays small.
    flags += ["--lr_img=1", "--lr_lr=1e-6", "--lr_teacher=0.02", f"--run_name={name}"]
    flags += [f"--Iteration={setup.iterations}", f"--eval_it={setup.iterations}", "--num_eval=1"]
    return [*flags, "--epoch_eval_train=20", "--checkpoint_every=5"]


def finish(command, folder):
    """Run a script to its end, which must be a good one."""
    options = {"cwd": folder, "env": WITHOUT_TF32, "timeout": 300}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{Path(command[1]).name} exits with {done.returncode}: {done.stderr}")


def interrupt(command, folder, checkpoint):
    """Start a run, and stop it once five iterations are saved: how many are saved in the end."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, cwd=folder, env=WITHOUT_TF32, **quiet)
    end = time.monotonic() + 300
    while running.poll() is None and time.monotonic() < end:
        if checkpoint.exists() and len(losses_in(checkpoint)) >= 5:
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    if running.returncode != 128 + signal.SIGTERM:
        raise RuntimeError(f"the stopped run exits with {running.returncode}: {errors}")
    return len(losses_in(checkpoint))


def losses_in(checkpoint):
    return torch.load(checkpoint, map_location="cpu", weights_only=True)["losses"]


# --------------------------------------------------------------------------------------------------
# Time and memory


def check_bench(setup):
    """The benchmark runs; its table follows."""
    script = ROOT / "tests" / "benchmarks" / "bench.py"
    flags = [f"--model={setup.model}", f"--device={setup.device}", *setup.bench]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, *flags, f"--out={folder}/benchmarks.json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return not done.returncode, "\n" + (done.stderr if done.returncode else done.stdout)


# --------------------------------------------------------------------------------------------------
# Main

CHECKS = {
    "reference, unroll": check_unroll,
    "reference, augmentation": check_augmentation,
    "gradients, memory": check_gradients,
    "evaluation": check_evaluation,
    "interrupted run": check_scripts,
    "benchmark": check_bench,
}


def results_of(name, check, setup):
    """What a check finds: tuples of a name, whether it passed, and its figures."""
    try:
        found = check(setup)
        if isinstance(found, tuple):
            yield name, *found
            return
        for part, *result in found:
            yield f"{name}, {part}", *result
    except Exception as error:
        traceback.print_exc()
        yield name, False, process.first_line(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_check.py: PyTorch sees no CUDA card on this machine")
        sys.exit(2)
    setup = Setup(device=device, **(GPU if device.type == "cuda" else TINY))
    torch.backends.cudnn.allow_tf32 = False  # exact to three digits only
    print(devices.describe(device, amp=False), flush=True)
    failed = 0
    for name, check in CHECKS.items():
        start = time.perf_counter()
        for label, passed, figures in results_of(name, check, setup):
            seconds = time.perf_counter() - start
            word = "PASS" if passed else "FAIL"
            print(f"{word}  {label:26} {seconds:5.0f} s  {figures}", flush=True)
            failed += not passed
            start = time.perf_counter()
    print(f"{failed} failed" if failed else "all passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
