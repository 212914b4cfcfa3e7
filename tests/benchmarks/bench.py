"""Measure the engine beside MTT's own loop: time and memory of an iteration, experts, evaluation.

    make bench PEER=MTT        # or: python tests/benchmarks/bench.py --peer MTT

takes about 25 minutes on 2 CPU cores. MTT is a checkout of
github.com/GeorgeCazenavette/mtt-distillation; without one, its row is left out. Each row is
measured in a process of its own, on the same random images and segment. MTT and the first engine
take their iterations in turns, since a machine's speed may change within minutes. Prints a table,
and writes it with all single times to a JSON file.

    python tests/benchmarks/bench.py --objective dc dm cafe --model=ConvNetW32

times other objectives instead, each beside a plain loop over the classes, in turns as well. With
`--peer DC`, a checkout of github.com/VICO-UoE/DatasetCondensation, their authors' own loop takes
its place (but for CAFE's).

    python tests/benchmarks/bench.py --bands 3 13 --steps 20

times iterations with so many bands.

Times are medians of the iterations after the fourth: glibc's allocator needs some to adapt to the
sizes, and the first one compiles. Peak memory is `torch.cuda.max_memory_allocated` on a
GPU, on a CPU the largest resident size of the process, Python and PyTorch included.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dc
import plain_loops

import distillation
import evaluation
import training
import trajectories
import utils
from cli import distillation_flags
from datasets import by_name  # found through the line above
from datasets.preprocessing import Data, Form
from evaluation import Evaluator
from objectives import OBJECTIVES
from objectives.trajectory import matching_loss
from reparam_module import UNROLLS, ReparamModule
from system import devices, files, process, resources
from system.compilation import Compiler
from system.machine import Machine
from system.ranks import ALONE
from utils import Augment

FORM = Form(10, 64)
AUGMENT = Augment(FORM.im_size, utils.augment_groups(True, utils.DSA_STRATEGY))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPERT_BATCHES = 10  # of 128 images, in an epoch of an expert's training
WARM_UP = 4  # iterations that do not count
LR = 0.01

# --------------------------------------------------------------------------------------------------
# What all rows are measured on


class Inputs(NamedTuple):
    """Random synthetic images and a made-up expert of two epochs, the same in every process."""

    images: torch.Tensor  # (10 * ipc, bands, 64, 64)
    labels: torch.Tensor
    snapshots: list  # of parameters, in `parameters()` order, on the CPU

    def of_engine(self):
        """What an engine takes but batches: θ_0 and the objective, images and α as leaves."""
        device = self.images.device
        segment = [trajectories.flat(snapshot).to(device) for snapshot in self.snapshots[:2]]
        syn_lr = torch.tensor(LR, device=device, requires_grad=True)
        images = self.images.clone().requires_grad_(True)
        return segment[0], matching_loss(*segment), (images,), syn_lr

    def make_batch(self, synthetic, batch):
        """An `augment` of engines."""
        return AUGMENT(*synthetic, batch, self.labels)


def make_inputs(model, ipc, device, bands=3):
    random = utils.make_generator("benchmark")
    network = utils.initial_network(model, FORM._replace(channels=bands), random, "cpu")
    parameters = [p.detach() for p in network.parameters()]
    snapshots = [
        [p + 0.01 * k * torch.randn(p.shape, generator=random) for p in parameters]
        for k in range(3)
    ]
    side = FORM.im_size
    images = torch.randn(FORM.num_classes * ipc, bands, side, side, generator=random)
    labels = torch.arange(FORM.num_classes).repeat_interleave(ipc)
    return Inputs(images.to(device), labels.to(device), snapshots)


def make_student(model, precision, device, bands=3):
    form = FORM._replace(channels=bands)
    network = utils.initial_network(model, form, utils.make_generator(0), device)
    return ReparamModule(network, amp=precision == "bfloat16")


def seconds_of(function, device, times):
    """Seconds of each of so many calls, until all that was started on the device has ended."""
    seconds = []
    for _ in range(times):
        start = clock(device)
        function()
        seconds.append(clock(device) - start)
    return seconds


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --------------------------------------------------------------------------------------------------
# What a process measures, as it goes into the JSON file


def measure_limits(device, precisions, size):
    """Rates of the machine, each the best of ten.

    Products of matrices of size × size, ConvNet's second convolution, and a copy.
    """
    rates = {}
    for precision in precisions:
        options = {"device": device, "dtype": DTYPES[precision]}
        a = torch.randn(size, size, **options)
        seconds = min(seconds_of(lambda a=a: a @ a, device, 10))
        rates[f"matmul {precision}, GFLOP/s"] = 2 * size**3 / seconds / 1e9

        channels_last = {"memory_format": torch.channels_last}
        x = torch.randn(10, 128, 32, 32, **options).contiguous(**channels_last)
        w = torch.randn(128, 128, 3, 3, **options).contiguous(**channels_last)
        seconds = min(seconds_of(lambda x=x, w=w: F.conv2d(x, w, padding=1), device, 10))
        flop = 2 * x.numel() * w[0].numel()
        rates[f"convolution {precision}, GFLOP/s"] = flop / seconds / 1e9

    source, target = (torch.ones(16 * size**2, device=device) for _ in range(2))
    seconds = min(seconds_of(lambda: target.copy_(source), device, 10))
    rates["copy, GB/s"] = 2 * source.nbytes / seconds / 1e9
    return rates


def measure_iteration(
    device, model, ipc, unroll, memory, steps, precision, compile, repeat, turns=False, bands=3
):
    """Iterations of distillation: batches drawn and augmented, N steps, gradients.

    With `turns`, it takes one for each, and one before all, as MTT does for its evaluation.
    """
    inputs = make_inputs(model, ipc, device, bands)
    of_engine, count = inputs.of_engine(), len(inputs.images)
    student = make_student(model, precision, device, bands)
    memory = resources.activation_memory(memory, device)
    engine = UNROLLS[unroll](student, inputs.make_batch, Compiler(compile).function, memory)
    random = utils.make_generator("draws")

    def iterate():
        batches = utils.draw_batches(count, count, steps, AUGMENT, random)
        engine(*of_engine, utils.to_device(batches, device))

    seconds = []
    if turns:
        take_turn()
    for _ in range(WARM_UP + repeat):
        if turns:
            take_turn()
        seconds += seconds_of(iterate, device, 1)
    return iteration_row(seconds, resources.peak_memory(device))


def take_turn():
    """Wait, in a process that `last_lines` started, until the others have had their turns."""
    print(flush=True)
    sys.stdin.readline()


def iteration_row(seconds, peak):
    return {"seconds": seconds[WARM_UP:], "first": seconds[0], "peak": peak}


def measure_cosine(device, model, ipc, steps, compile):
    """Cosine of the gradients in bfloat16 and in float32, of an iteration with the same draws."""
    inputs = make_inputs(model, ipc, device)
    count = len(inputs.images)
    random = utils.make_generator("draws")
    batches = utils.draw_batches(count, count, steps, AUGMENT, random)
    batches = utils.to_device(batches, device)
    gradients = []
    for precision in DTYPES:
        student = make_student(model, precision, device)
        engine = UNROLLS["adjoint"](student, inputs.make_batch, Compiler(compile).function)
        _, gradient, _ = engine(*inputs.of_engine(), batches)
        gradients.append(gradient.flatten().double())
    return {"cosine": F.cosine_similarity(*gradients, dim=0).item()}


class Products(TorchDispatchMode):
    """Counts operations of convolutions and matrix products, and bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.flop = 0
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if count := flop_registry.get(func.overloadpacket):
            self.flop += count(*args, **kwargs, out_val=results)
            tensors = [*args, *(results if isinstance(results, tuple) else [results])]
            self.bytes += sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))
        return results


def measure_counts(device, model, ipc, precision):
    """Floating-point operations and bytes of products in a step of the student, by engine."""
    inputs = make_inputs(model, ipc, device)
    counts = {}
    for name, (unroll, memory) in ENGINES.items():
        of_engine = inputs.of_engine()
        student = make_student(model, precision, device)
        engine = UNROLLS[unroll](student, memory=resources.activation_memory(memory, device))
        with Products() as products:
            _, _, (images,), _ = of_engine
            engine(*of_engine, [(images, inputs.labels)])
        counts[name] = {"flop": products.flop, "bytes": products.bytes}
    return counts


def measure_experts(device, model, precision, compile, repeat):
    """Training on real images, in batches of 128: images per second."""
    random = utils.make_generator("experts")
    count = EXPERT_BATCHES * 128
    images = torch.randn(count, 3, FORM.im_size, FORM.im_size, generator=random).to(device)
    labels = torch.randint(FORM.num_classes, (count,), generator=random).to(device)
    network = utils.initial_network(model, FORM, random, device)
    forward = Compiler(compile, amp=precision == "bfloat16")(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)

    def epoch():
        batches = utils.draw_batches(count, 128, None, AUGMENT, random)
        batches = utils.to_device(batches, device)
        training.train_epoch(forward, optimizer, (images, labels), AUGMENT, batches)

    _, *others = seconds_of(epoch, device, repeat + 1)
    return {"images per second": count / statistics.median(others)}


def measure_evaluation(device, model, ipc, precision, compile, epochs):
    """Five networks trained on the synthetic images: seconds per network and epoch.

    Compiling is left out, and so is testing.
    """
    inputs = make_inputs(model, ipc, device)
    part = (inputs.images, inputs.labels)
    compiler = Compiler(compile, amp=precision == "bfloat16")
    evaluator = Evaluator(
        data=Data(part, part, part, by_name.CLASS_NAMES, {}, None),
        pool=evaluation.make_pool("S", model, FORM, Machine(device, ALONE, compiler)),
        num_eval=5,
        epochs=1,
        batch_train=256,
        batch_real=256,
        augment=AUGMENT,
        compiler=compiler,
    )

    def seconds(epochs):
        run = partial(replace(evaluator, epochs=epochs), *part, LR, (0,))
        return seconds_of(run, device, 1)[0]

    seconds(1)
    return {"seconds": (seconds(epochs + 1) - seconds(1)) / epochs / evaluator.num_eval}


def real_images(of_class):
    """Random images (N, 3, 64, 64), so many of each class, and their classes (N,)."""
    count = of_class * FORM.num_classes
    random = utils.make_generator("objective")
    images = torch.randn(count, 3, FORM.im_size, FORM.im_size, generator=random)
    return images, torch.arange(count) % FORM.num_classes


def measure_objective(device, objective, plain, model, ipc, precision, compile, repeat):
    """Matches of an objective on random images, or the plain loop on the same ones.

    Networks are fresh, as none is trained between the matches. Takes a turn for each.
    """
    given = {"objective": objective, "model": model, "ipc": ipc, "device": str(device)}
    args = distillation_flags.completed(distillation.make_parser(), given)
    part = tuple(tensor.to(device) for tensor in real_images(args.batch_objective))
    names = by_name.CLASS_NAMES[: FORM.num_classes]
    data = Data(part, part, part, names, {}, None)
    machine = Machine(device, ALONE, Compiler(compile))
    student = make_student(model, precision, device)
    inputs = distillation.Inputs(machine, data, None, student, None, None)
    state = distillation.initial_state(args, inputs)
    goal = OBJECTIVES[objective].make(args, inputs, state)

    def plain_match(number):
        network = utils.initial_network(
            model, FORM, utils.make_generator("network", 0, number, 0), device
        )
        views = goal.pairs.draw(state, utils.make_generator("match", 0, number, 0))
        return plain_loops.LOOPS[objective](network, views)[0]

    def match(number):
        return goal(state, number).loss

    seconds, losses = [], []
    for turn in range(WARM_UP + repeat):
        take_turn()
        number = turn * goal.networks.loops.outer  # a fresh network
        run = plain_match if plain else match
        seconds += seconds_of(lambda run=run, n=number: losses.append(float(run(n))), device, 1)
    return iteration_row(seconds, resources.peak_memory(device)) | {"losses": losses}


MEASURES = {
    "objective": measure_objective,
    "limits": measure_limits,
    "iteration": measure_iteration,
    "cosine": measure_cosine,
    "counts": measure_counts,
    "experts": measure_experts,
    "evaluation": measure_evaluation,
}


def measure(what, device, **arguments):
    """One of MEASURES, in this process."""
    return MEASURES[what](torch.device(device), **arguments)


# --------------------------------------------------------------------------------------------------
# Processes, of this script and of MTT's


def child(what, **arguments):
    """The same in a process of its own."""
    return last_lines([child_command(what, **arguments)])[0]


def child_command(what, **arguments):
    return [sys.executable, __file__, "--child", json.dumps({"what": what, **arguments})]


def last_lines(commands, turns=0):
    """What each of some commands prints last, which is JSON.

    They run side by side, and work in turns, so many each: a command prints an empty line and waits
    for one before each.
    """
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        processes = [
            stack.enter_context(
                subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
            )
            for command, log in zip(commands, logs)
        ]
        lines = [lines_until_turn(process) if turns else [] for process in processes]
        for _ in range(turns):
            for process, said in zip(processes, lines):
                with contextlib.suppress(BrokenPipeError):  # it failed: see below
                    print(file=process.stdin, flush=True)
                said += lines_until_turn(process)
        for command, process, log, said in zip(commands, processes, logs, lines):
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            said += process.stdout.readlines()
            if process.wait():
                log.seek(0)
                sys.exit(f"{' '.join(map(str, command))}\n{log.read()}")
    return [json.loads(said[-1]) for said in lines]


def lines_until_turn(process):
    """What a process prints until it waits for its next turn, or ends."""
    lines = []
    for line in process.stdout:
        if not line.strip():
            break
        lines.append(line)
    return lines


def measure_beside_mtt(args, steps, **arguments):
    """MTT's own loop (see mtt.py) and an engine, which take iterations in turns: a row of each.

    MTT's row tells of the training of a network for evaluation, too.
    """
    inputs = make_inputs(args.model, args.ipc, "cpu")
    with tempfile.TemporaryDirectory() as work:
        buffers = Path(work) / "buffers"
        experts = buffers / "CIFAR10_NO_ZCA" / args.model
        experts.mkdir(parents=True)
        torch.save([inputs.snapshots], experts / "replay_buffer_0.pt")
        images = Path(work) / "images.pt"
        torch.save((inputs.images, inputs.labels), images)
        script = Path(__file__).with_name("mtt.py")
        turns = WARM_UP + args.repeat
        command = [sys.executable, script, Path(args.peer).resolve(), work, images]
        command += ["--dataset=CIFAR10", f"--model={args.model}", f"--ipc={args.ipc}"]
        command += [f"--syn_steps={steps}", f"--Iteration={turns - 1}"]
        command += ["--eval_it=1000000", "--num_eval=1", f"--epoch_eval_train={args.epochs}"]
        command += ["--expert_epochs=1", "--max_start_epoch=1", f"--buffer_path={buffers}"]
        ours = child_command("iteration", **arguments, steps=steps, repeat=args.repeat, turns=True)
        theirs, row = last_lines([command, ours], turns + 1)
    per_epoch = theirs["evaluation"] / (args.epochs + 1)
    mtt = iteration_row(theirs["iterations"], theirs["peak"]) | {"evaluation": per_epoch}
    return mtt, row


def compare_objectives(args):
    """Print and return times and memory of --objective, each beside another loop, in turns."""
    rows = []
    print(f"{'objective':10} {'precision':10} {'beside':>8} {'its, s':>9} {'here, s':>9}", end="")
    print("     time    memory")
    for objective in args.objective:
        for precision in ["float32", "bfloat16"] if args.amp else ["float32"]:
            row = {"objective": objective, "precision": precision}
            row |= compare_objective(args, objective, precision)
            rows.append(row)
            its, here = (statistics.median(row[each]["seconds"]) for each in ("other", "here"))
            memory = row["other"]["peak"] / row["here"]["peak"]
            start = f"{objective:10} {precision:10} {row['beside']:>8} {its:9.3f} {here:9.3f} "
            print(f"{start}{its / here:7.2f} x {memory:7.2f} x", flush=True)
    return rows


def compare_objective(args, objective, precision):
    """A row: matches of an objective beside those of its authors, or of the plain loop."""
    options = {"device": args.device, "objective": objective, "model": args.model, "ipc": args.ipc}
    options |= {"repeat": args.repeat, "compile": args.compile, "precision": precision}
    here = child_command("objective", **options, plain=False)
    turns = WARM_UP + args.repeat
    if not (args.peer and objective in dc.SCRIPTS):
        other, here = last_lines([child_command("objective", **options, plain=True), here], turns)
        return {"beside": "plain", "other": other, "here": here}
    with tempfile.TemporaryDirectory() as work:
        images = Path(work) / "images.pt"
        torch.save(real_images(OBJECTIVES[objective].defaults["batch_objective"]), images)
        script = Path(__file__).with_name("dc.py")
        command = [sys.executable, script, Path(args.peer).resolve(), work, images, str(turns)]
        command += [objective, "--dataset=CIFAR10", f"--model={args.model}", f"--ipc={args.ipc}"]
        theirs, here = last_lines([command, here], turns)
    other = iteration_row(theirs["seconds"], theirs["peak"])
    return {"beside": "authors'", "other": other, "here": here}


def compare_bands(args):
    """Print and return times of iterations with each number of --bands, in turns."""
    options = {"device": args.device, "model": args.model, "ipc": args.ipc, "unroll": "adjoint"}
    options |= {"memory": None, "steps": args.steps[-1], "repeat": args.repeat}
    rows = []
    print(f"{'precision':10} {'bands':>5} {'s':>8} {'against the first':>18}")
    for precision in ["float32", "bfloat16"] if args.amp else ["float32"]:
        how = {"precision": precision, "compile": args.compile, "turns": True}
        commands = [child_command("iteration", **options, **how, bands=n) for n in args.bands]
        measured = last_lines(commands, WARM_UP + args.repeat + 1)
        medians = [statistics.median(row["seconds"]) for row in measured]
        for bands, row, median in zip(args.bands, measured, medians):
            rows.append({"precision": precision, "bands": bands} | row)
            print(f"{precision:10} {bands:5} {median:8.3f} {median / medians[0]:16.2f} x")
    return rows


# --------------------------------------------------------------------------------------------------
# The table


class Table:
    """Rows of iterations, each printed as soon as it is measured."""

    def __init__(self):
        self.rows = []
        print(
            f"{'engine':10} {'precision':10} {'N':>3} {'s':>8} {'s per step':>11} {'peak, GB':>9}"
            "   against MTT: time, memory; first iteration, s",
            flush=True,
        )

    @property
    def mtt(self):
        """MTT's first row; None where it is not measured."""
        return next((row for row in self.rows if row["engine"] == "MTT"), None)

    def add(self, engine, precision, steps, row):
        if "seconds" in row:
            row["median"] = statistics.median(row["seconds"])
        row |= {"engine": engine, "precision": precision, "steps": steps}
        self.rows.append(row)
        print(self.line(row), flush=True)

    def line(self, row):
        start = f"{row['engine']:10} {row['precision']:10} {row['steps']:3d} "
        if "median" not in row:
            return f"{start}({row['not measured']})"
        peak = row["peak"] / 1e9
        line = f"{row['median']:8.3f} {row['median'] / row['steps']:11.4f} {peak:9.2f}"
        against = ""
        if self.mtt and self.mtt["steps"] == row["steps"]:
            time, memory = (self.mtt[key] / row[key] for key in ("median", "peak"))
            against = f"   {time:10.2f} x, {memory:5.2f} x"
        return f"{start}{line}{against:23}   {row['first']:8.1f}"


# How rows are called, which engine they measure, and what its kept activations may take; the first
# takes what distillation.py does.
ENGINES = {
    "adjoint": ("adjoint", None),
    "adjoint, 0": ("adjoint", 0.0),
    "autograd": ("autograd", 0.0),
}


def measure_iterations(args, table, common, precisions):
    """Add a row for each precision, engine and N, as far as memory suffices, and MTT's."""
    beside = {}  # what was measured beside MTT
    if args.peer:
        steps = 20 if 20 in args.steps else args.steps[-1]
        options = {"unroll": "adjoint", "memory": None, "precision": "float32"}
        mtt, row = measure_beside_mtt(args, steps, **common, **options, compile=args.compile)
        table.add("MTT", "float32", steps, mtt)
        beside["adjoint", "float32", steps] = row
    available = resources.free_memory(torch.device(args.device))
    for precision in precisions:
        for name, (unroll, memory) in ENGINES.items():
            peaks = []
            for steps in args.steps:
                options = {"unroll": unroll, "memory": memory, "steps": steps}
                options |= {"precision": precision, "compile": args.compile}
                if (name, precision, steps) in beside:
                    row = beside[name, precision, steps]
                elif len(peaks) > 1 and 3 * peaks[-1] - 2 * peaks[0] > 0.8 * available:
                    row = {"not measured": "would need more memory than there is"}
                else:
                    row = child("iteration", **common, **options, repeat=args.repeat)
                if "peak" in row:
                    peaks.append(row["peak"])
                table.add(name, precision, steps, row)


def measure_all(args):
    """All that is measured, a dictionary."""
    precisions = ["float32", "bfloat16"] if args.amp else ["float32"]
    machine = {"device": args.device}
    common = machine | {"model": args.model, "ipc": args.ipc}
    limits = child("limits", **machine, precisions=precisions, size=args.size)
    counts = {each: child("counts", **common, precision=each) for each in precisions}

    table = Table()
    measure_iterations(args, table, common, precisions)
    results = {"limits": limits, "counts": counts, "iterations": table.rows}

    if args.amp:
        results |= child("cosine", **common, steps=20, compile=args.compile)
    for precision in precisions:
        options = {"precision": precision, "compile": args.compile}
        experts = machine | options | {"model": args.model, "repeat": args.repeat}
        results[f"experts {precision}"] = child("experts", **experts)
        evaluation = common | options | {"epochs": args.epochs}
        results[f"evaluation {precision}"] = child("evaluation", **evaluation)
    return results


# --------------------------------------------------------------------------------------------------
# The lines below the table


def summary(results, args):
    """Growth of memory, the machine's limits, experts, evaluation."""
    yield from growth_lines(results["iterations"])
    inputs = make_inputs(args.model, args.ipc, "cpu")
    theta = sum(parameter.nbytes for parameter in inputs.snapshots[0])
    yield f"θ_i has {theta / 1e6:.2f} MB, a batch of images {inputs.images.nbytes / 1e6:.2f} MB"
    yield from (f"{name}: {rate:.0f}" for name, rate in results["limits"].items())
    yield from floor_lines(results["counts"], results["limits"])
    if "cosine" in results:
        cosine = results["cosine"]
        yield f"cosine of the gradients in bfloat16 and in float32, N = 20: {cosine:.4f}"
    mtt = next((row for row in results["iterations"] if row["engine"] == "MTT"), None)
    for key, result in results.items():
        if key.startswith("experts "):
            yield f"{key}: {result['images per second']:.0f} images/s"
        if key.startswith("evaluation "):
            line = f"{key}: {result['seconds']:.4f} s per network and epoch"
            if mtt:
                ratio = mtt["evaluation"] / result["seconds"]
                line += f", MTT {mtt['evaluation']:.4f} s: {ratio:.2f} x"
            yield line


def growth_lines(rows):
    """What each further step needs from N = 10 to the largest N."""
    measured = {}
    for row in (row for row in rows if "median" in row and row["steps"] >= 10):
        measured.setdefault((row["engine"], row["precision"]), []).append(row)
    for (engine, precision), (first, *others) in measured.items():
        if others:
            growth = (others[-1]["peak"] - first["peak"]) / (others[-1]["steps"] - first["steps"])
            yield f"{engine}, {precision}: {growth / 1e6:.2f} MB more for every further step"


def floor_lines(counts, limits):
    """The time that a step's products need at the highest rates that were seen."""
    for precision, of_engines in counts.items():
        for engine, count in of_engines.items():
            gflop, gbytes = count["flop"] / 1e9, count["bytes"] / 1e9
            products, convolutions = (
                gflop / limits[f"{kind} {precision}, GFLOP/s"] for kind in ("matmul", "convolution")
            )
            yield (
                f"floor of a step, {engine}, {precision}: {gflop:.1f} GFLOP, {products:.4f} s as "
                f"matrix products, {convolutions:.4f} s as convolutions; {gbytes:.2f} GB, "
                f"{gbytes / limits['copy, GB/s']:.4f} s"
            )


# --------------------------------------------------------------------------------------------------
# Main


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    add("--peer", help="checkout of MTT, or for --objective of DC, whose loop runs beside")
    add("--model", default="ConvNet", help="network")
    add("--ipc", type=int, default=1, help="synthetic images per class")
    add("--objective", nargs="+", choices=plain_loops.LOOPS, help="time these instead, in turns")
    add("--bands", type=int, nargs="+", help="time iterations with so many bands, in turns")
    add("--steps", type=int, nargs="+", default=[5, 10, 20, 40, 80], help="values of N, rising")
    add("--repeat", type=int, default=3, help="iterations that are timed, after the first")
    add("--epochs", type=int, default=40, help="epochs of an evaluation")
    add("--size", type=int, default=2048, help="side of the matrices that are multiplied")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    switch = argparse.BooleanOptionalAction
    add("--amp", action=switch, default=True, help="bfloat16, too, where the device has it")
    add("--compile", action=switch, default=True, help="torch.compile")
    add("--out", type=Path, default=Path("benchmarks.json"), help="where the table is written")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.child:
        print(json.dumps(measure(**args.child)))
        return
    device = torch.device(args.device)
    args.amp = devices.check_amp(args.amp, device)
    if args.objective:
        results = {"objectives": compare_objectives(args)}
    elif args.bands:
        results = {"bands": compare_bands(args)}
    else:
        results = measure_all(args)
        print("\n".join(summary(results, args)))
    is_cuda = device.type == "cuda"
    results |= {
        "machine": torch.cuda.get_device_name() if is_cuda else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "versions": process.versions(),
        "settings": {key: str(value) for key, value in vars(args).items() if key != "child"},
    }
    files.write_json(args.out, results)


if __name__ == "__main__":
    process.run_script(main, less_memory="lower --steps or --ipc")
