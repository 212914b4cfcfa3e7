"""Measure the engine beside MTT's own loop: time and memory of an iteration, training of experts, an evaluation.

    make bench PEER=MTT        # or: python tests/benchmarks/bench.py --peer MTT

takes about 25 minutes on 2 CPU cores. MTT is a checkout of github.com/GeorgeCazenavette/mtt-distillation; without one,
those rows are left out. Every row is measured in a process of its own, on the same random images and segment, one after
the other. Prints a table, and writes it with all single times to a JSON file.

Times are medians of the iterations after the first (of MTT's: after the fourth, since glibc's allocator needs some to
adapt to the sizes). Peak memory is `torch.cuda.max_memory_allocated` on a GPU, on a CPU the largest resident size of
the process, Python and PyTorch included.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from mtt import peak_memory  # noqa: E402  (the modules of the project are found through the line above)

import datasets  # noqa: E402
import files  # noqa: E402
import utils  # noqa: E402
from distillation import make_prepare, synthetic_batches  # noqa: E402
from evaluation import evaluate, make_sgd_step  # noqa: E402
from reparam_module import UNROLLS, ReparamModule  # noqa: E402

FORM, AUGMENT = datasets.DATASETS["EuroSAT"].form, utils.make_augment(True, utils.DSA_STRATEGY)

# ---------------------------------------------------------------------------------------------------------------------
# What a child process measures: each function returns what goes into the table and the JSON file


def clock(device):
    """The time, after all that was begun on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def repeated(function, device, times):
    """Seconds of each of so many calls."""
    seconds = []
    for _ in range(times):
        start = clock(device)
        function()
        seconds.append(clock(device) - start)
    return seconds


def inputs(model, ipc, device):
    """Random synthetic images, labels, and a segment of a made-up expert, the same in every process."""
    random = utils.make_generator("benchmark")
    parameters = [p.detach() for p in utils.initial_network(model, FORM, random, "cpu").parameters()]
    snapshots = [[p + 0.01 * k * torch.randn(p.shape, generator=random) for p in parameters] for k in range(3)]
    images = torch.randn(FORM.num_classes * ipc, 3, FORM.im_size, FORM.im_size, generator=random)
    return images.to(device), torch.arange(FORM.num_classes).repeat_interleave(ipc).to(device), snapshots


def measure_limits(device):
    """Rates of the machine, each the best of ten: products of large matrices, ConvNet's second layer, a copy."""
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(2048, 2048, device=device, dtype=dtype)
        rates[f"matmul {name}, GFLOP/s"] = 2 * 2048**3 / min(repeated(lambda a=a: a @ a, device, 10)) / 1e9
        x = torch.randn(10, 128, 32, 32, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        w = torch.randn(128, 128, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        seconds = min(repeated(lambda x=x, w=w: F.conv2d(x, w, padding=1), device, 10))
        rates[f"convolution {name}, GFLOP/s"] = 2 * x.numel() * w[:, :1].numel() / seconds / 1e9
    source, target = (torch.ones(2**26, device=device) for _ in range(2))
    rates["copy, GB/s"] = 2 * 4 * 2**26 / min(repeated(lambda: target.copy_(source), device, 10)) / 1e9
    return rates


def measure_iteration(device, model, ipc, unroll, steps, amp, compile, repeat):
    """Iterations of distillation: augmentation, N steps, gradients."""
    images, labels, snapshots = inputs(model, ipc, device)
    start, target = (torch.cat([p.reshape(-1) for p in snapshot]).to(device) for snapshot in snapshots[:2])
    images, syn_lr = images.requires_grad_(True), torch.tensor(0.01, device=device, requires_grad=True)
    student = ReparamModule(utils.initial_network(model, FORM, utils.make_generator(0), device), amp)
    engine = UNROLLS[unroll](student, utils.Runner(compile).function)
    random, prepare = utils.make_generator("draws"), make_prepare(AUGMENT)
    gradients = []

    def iterate():
        batches = synthetic_batches(images, labels, steps, len(images), prepare, random)
        gradients[:] = engine(start, target, images, syn_lr, batches)

    seconds = repeated(iterate, device, repeat + 1)
    return {"seconds": seconds[1:], "first": seconds[0], "peak": peak_memory()}


def measure_cosine(device, model, ipc, steps, compile):
    """Cosine between the gradients in bfloat16 and in float32, of one iteration with the same draws."""
    images, labels, snapshots = inputs(model, ipc, device)
    start, target = (torch.cat([p.reshape(-1) for p in snapshot]).to(device) for snapshot in snapshots[:2])
    gradients = []
    for amp in (False, True):
        leaf, syn_lr = images.clone().requires_grad_(True), torch.tensor(0.01, device=device, requires_grad=True)
        student = ReparamModule(utils.initial_network(model, FORM, utils.make_generator(0), device), amp)
        batches = synthetic_batches(leaf, labels, steps, len(leaf), AUGMENT, utils.make_generator("draws"))
        engine = UNROLLS["adjoint"](student, utils.Runner(compile).function)
        gradients.append(engine(start, target, leaf, syn_lr, batches)[1].flatten().double())
    return {"cosine": F.cosine_similarity(*gradients, dim=0).item()}


def measure_experts(device, model, amp, compile, repeat):
    """Training on real images, batches of 128: images per second."""
    random = utils.make_generator("experts")
    x = torch.randn(10 * 128, 3, FORM.im_size, FORM.im_size, generator=random).to(device)
    y = torch.randint(FORM.num_classes, (len(x),), generator=random).to(device)
    network = utils.initial_network(model, FORM, random, device)
    logits, optimizer = utils.Runner(compile, amp)(network), torch.optim.SGD(network.parameters(), lr=0.01)

    def epoch():
        utils.train_epoch(logits, optimizer, x, y, 128, AUGMENT, random)

    return {"images per second": len(x) / statistics.median(repeated(epoch, device, repeat + 1)[1:])}


def measure_evaluation(device, model, ipc, amp, compile, epochs):
    """Five networks trained on the synthetic images: seconds per network and epoch, compiled before."""
    images, labels, _ = inputs(model, ipc, device)
    part = images, labels
    data = datasets.Data(part, part, part, datasets.CLASS_NAMES, {}, None)
    runner = utils.Runner(compile, amp)
    step = make_sgd_step(model, FORM, runner, device)

    def run(epochs):
        evaluate(model, [part] * 5, 0.01, data, runner, AUGMENT, (0,), step=step, epochs=epochs, batch_train=256,
                 batch_real=256)

    run(1)
    short, long = (repeated(lambda epochs=epochs: run(epochs), device, 1)[0] for epochs in (1, epochs + 1))
    return {"seconds": (long - short) / epochs / 5}


class Products(TorchDispatchMode):
    """Counts the operations of convolutions and matrix products, and the bytes that they must at least read and write.
    """

    def __init__(self):
        super().__init__()
        self.flop, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flop += count(*args, **(kwargs or {}), out_val=results)
            tensors = [*args, *(results if isinstance(results, tuple) else [results])]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
        return results


def measure_counts(device, model, ipc, amp):
    """Floating-point operations, and bytes of products, of one step of the student in each engine."""
    images, labels, snapshots = inputs(model, ipc, device)
    start, target = (torch.cat([p.reshape(-1) for p in snapshot]).to(device) for snapshot in snapshots[:2])
    counts = {}
    for unroll in UNROLLS:
        leaf, syn_lr = images.clone().requires_grad_(True), torch.tensor(0.01, device=device, requires_grad=True)
        student = ReparamModule(utils.initial_network(model, FORM, utils.make_generator(0), device), amp)
        with Products() as products:
            UNROLLS[unroll](student)(start, target, leaf, syn_lr, [(leaf, labels)])
        counts[unroll] = {"flop": products.flop, "bytes": products.bytes}
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# The parent


def child(what, **arguments):
    """What `measure_<what>(**arguments)` returns, in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps({"what": what, **arguments})]
    return last_line(command)


def last_line(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def mtt(checkout, model, ipc, steps, repeat, epochs):
    """MTT's own loop (see mtt.py): iterations, and the training of one network for evaluation."""
    images, labels, snapshots = inputs(model, ipc, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as work:
        experts = Path(work) / "buffers" / "CIFAR10_NO_ZCA" / model
        experts.mkdir(parents=True)
        torch.save([snapshots], experts / "replay_buffer_0.pt")
        torch.save((images, labels), Path(work) / "images.pt")
        result = last_line([
            sys.executable, Path(__file__).with_name("mtt.py"), Path(checkout).resolve(), work,
            Path(work) / "images.pt", "--dataset=CIFAR10", f"--model={model}", f"--ipc={ipc}", f"--syn_steps={steps}",
            f"--Iteration={repeat}", "--eval_it=1000000", f"--epoch_eval_train={epochs}", "--num_eval=1",
            "--expert_epochs=1", "--max_start_epoch=1", f"--buffer_path={experts.parent.parent}"])
    return {"seconds": result["iterations"][4:], "first": result["iterations"][0], "peak": result["peak"],
            "evaluation": result["evaluation"] / (epochs + 1)}


def available_memory(device):
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def measure_all(args):
    """All rows, as a dictionary; prints each iteration's row as soon as it is measured."""
    device = torch.device(args.device)
    common = {"device": args.device, "model": args.model, "ipc": args.ipc}
    results = {"limits": child("limits", device=args.device),
               "counts": {amp: child("counts", **common, amp=amp == "bfloat16") for amp in ("float32", "bfloat16")},
               "iterations": []}
    base = None

    def add(engine, precision, steps, row):
        nonlocal base
        row |= {"engine": engine, "precision": precision, "steps": steps}
        if "seconds" in row:
            row["median"] = statistics.median(row["seconds"])
        if engine == "MTT" and base is None:
            base = row
        results["iterations"].append(row)
        print(iteration_line(row, base), flush=True)

    print(f"{'engine':10} {'precision':10} {'N':>3} {'s':>8} {'s per step':>11} {'peak, GB':>9}   "
          f"against MTT: time, memory; first iteration, s", flush=True)
    if args.peer:
        add("MTT", "float32", 20, mtt(args.peer, args.model, args.ipc, 20, args.repeat + 3, args.epochs))
    precisions = ("float32", "bfloat16") if args.amp else ("float32",)
    for precision in precisions:
        for unroll in UNROLLS:
            peaks = []
            for steps in args.steps:
                if len(peaks) > 1 and peaks[-1] + (peaks[-1] - peaks[0]) * 2 > 0.8 * available_memory(device):
                    add(unroll, precision, steps, {"not measured": "would need more memory than there is"})
                    continue
                row = child("iteration", **common, unroll=unroll, steps=steps, amp=precision == "bfloat16",
                            compile=args.compile, repeat=args.repeat)
                peaks.append(row["peak"])
                add(unroll, precision, steps, row)
    if args.peer:
        add("MTT again", "float32", 20, mtt(args.peer, args.model, args.ipc, 20, args.repeat + 3, args.epochs))
    if args.amp:
        results["cosine"] = child("cosine", **common, steps=20, compile=args.compile)["cosine"]
    for precision in precisions:
        more = {"amp": precision == "bfloat16", "compile": args.compile}
        results[f"experts {precision}"] = child("experts", device=args.device, model=args.model, repeat=args.repeat,
                                                **more)
        results[f"evaluation {precision}"] = child("evaluation", **common, **more, epochs=args.epochs)
    return results


def iteration_line(row, base):
    start = f"{row['engine']:10} {row['precision']:10} {row['steps']:3d} "
    if "seconds" not in row:
        return start + f"({row['not measured']})"
    line = f"{row['median']:8.3f} {row['median'] / row['steps']:11.4f} {row['peak'] / 1e9:9.2f}"
    if base and row["steps"] == base["steps"]:
        line += f"   {base['median'] / row['median']:10.2f} x, {base['peak'] / row['peak']:5.2f} x"
    else:
        line += " " * 23
    return start + line + f"   {row['first']:8.1f}"


def report(results, args):
    """The lines below the table: growth of memory, the floor, experts, evaluation."""
    rows = {(row["engine"], row["precision"], row["steps"]): row for row in results["iterations"] if "seconds" in row}
    for (engine, precision, steps), row in rows.items():
        if steps == max(args.steps) and (shorter := rows.get((engine, precision, 10))) and steps > 10:
            growth = (row["peak"] - shorter["peak"]) / (steps - 10)
            yield f"{engine}, {precision}: {growth / 1e6:.2f} MB more for every further step"
    images, _, snapshots = inputs(args.model, args.ipc, "cpu")
    sizes = 4 * sum(p.numel() for p in snapshots[0]), 4 * images.numel()
    yield f"θ_i has {sizes[0] / 1e6:.2f} MB, a batch of augmented images {sizes[1] / 1e6:.2f} MB"
    for name, rate in results["limits"].items():
        yield f"{name}: {rate:.0f}"
    for precision, of_engines in results["counts"].items():
        for engine, count in of_engines.items():
            compute = count["flop"] / results["limits"][f"matmul {precision}, GFLOP/s"] / 1e9
            layer = count["flop"] / results["limits"][f"convolution {precision}, GFLOP/s"] / 1e9
            memory = count["bytes"] / results["limits"]["copy, GB/s"] / 1e9
            yield (f"floor of a step, {engine}, {precision}: {count['flop'] / 1e9:.1f} GFLOP, {compute:.4f} s as "
                   f"matrix products, {layer:.4f} s as convolutions; {count['bytes'] / 1e9:.2f} GB, {memory:.4f} s")
    if "cosine" in results:
        yield f"cosine of the gradients in bfloat16 with those in float32, N = 20: {results['cosine']:.4f}"
    base = next((row for row in results["iterations"] if row["engine"] == "MTT"), None)
    for key in results:
        if key.startswith("experts"):
            yield f"{key}: {results[key]['images per second']:.0f} images/s"
        if key.startswith("evaluation"):
            seconds = results[key]["seconds"]
            ratio = f", MTT {base['evaluation']:.4f} s: {base['evaluation'] / seconds:.2f} x" if base else ""
            yield f"{key}: {seconds:.4f} s per network and epoch{ratio}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--peer", help="checkout of MTT, whose loop runs beside (at 64x64 it knows ConvNet only)")
    parser.add_argument("--model", default="ConvNet", help="network")
    parser.add_argument("--ipc", type=int, default=1, help="synthetic images per class")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 40, 80], help="values of N")
    parser.add_argument("--repeat", type=int, default=3, help="iterations that are timed, after the first")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of an evaluation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="measure bfloat16, too")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"), help="where the table is written")
    args = parser.parse_args()
    if args.child:
        utils.keep_freed_memory()  # as the scripts do
        what = args.child.pop("what")
        args.child["device"] = torch.device(args.child["device"])
        print(json.dumps(globals()[f"measure_{what}"](**args.child)))
        return
    args.amp = utils.check_amp(args.amp, torch.device(args.device))
    results = measure_all(args)
    print("\n".join(report(results, args)))
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "CPU"
    settings = {key: str(value) for key, value in vars(args).items() if key != "child"}
    results |= {"machine": machine, "threads": torch.get_num_threads(), "versions": utils.versions(),
                "settings": settings}
    files.write_json(args.out, results)


if __name__ == "__main__":
    main()
