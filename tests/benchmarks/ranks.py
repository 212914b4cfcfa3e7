"""Measure what several processes gain: iterations of one process beside those of torchrun's ranks.

    python tests/benchmarks/ranks.py --ranks 2 --data_path DATA --buffer_path BUF [FLAGS]

runs distillation.py with FLAGS in one process with all cores, then in as many ranks with an equal
share of them, first sharing out segments (--segments), then batches (--shard_batch); --repeat
times, in turns. On a GPU machine, one process has one GPU, and each rank its own. Prints the median
seconds of an iteration, the peak memory of each rank, and the efficiency: the speed of the ranks
over that of one process, per core on a CPU, and per GPU on GPUs.
"""

import argparse
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 4  # iterations that do not count
ITERATIONS = 16


def work(path, *flags):
    """In a process of its own: distill, and write rank 0's seconds of each iteration to `path`."""
    sys.path.insert(0, str(ROOT))
    from run import wandb_page  # found through the line above

    logged = []
    wandb_page.Dashboard.log = lambda self, values, step: logged.append(values)
    sys.argv = ["distillation.py", *flags]
    runpy.run_path(str(ROOT / "distillation.py"), run_name="__main__")
    if os.environ.get("RANK", "0") == "0":
        seconds = [values["Seconds"] for values in logged if "Seconds" in values]
        Path(path).write_text(json.dumps(seconds))


def measure(ranks, cores, flags):
    """Median seconds of an iteration, and the peak memory of each rank ("" for one process)."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/seconds.json"
        flags = [*flags, f"--Iteration={ITERATIONS}", "--num_eval=1", "--epoch_eval_train=1"]
        flags += [f"--log_dir={folder}", "--wandb_mode=disabled"]
        environment = os.environ | {"OMP_NUM_THREADS": str(cores // ranks)}
        command = [*launch, __file__, "--work", path, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        seconds = json.loads(Path(path).read_text())
    memory = re.search("Peak memory by rank: (.*)", done.stdout)
    return statistics.median(seconds[WARM_UP:]), memory[1] if memory else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    args, flags = parser.parse_known_args()
    cores = os.cpu_count()
    share = 1 if torch.cuda.is_available() else args.ranks  # of the one process's hardware
    kinds = {
        "1 process": (1, [f"--segments={args.ranks}"]),
        "segments": (args.ranks, [f"--segments={args.ranks}"]),
        "1 process, one segment": (1, []),
        "batches": (args.ranks, ["--shard_batch"]),
    }
    times = {name: [] for name in kinds}
    memory = {}
    for _ in range(args.repeat):
        for name, (ranks, more) in kinds.items():
            seconds, memory[name] = measure(ranks, cores, [*flags, *more])
            times[name].append(seconds)
            print(f"{name:24} {seconds:8.4f} s   {memory[name]}", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for alone, shared in (("1 process", "segments"), ("1 process, one segment", "batches")):
        speedup = medians[alone] / medians[shared]
        print(
            f"{shared}: {speedup:.2f} times as fast, efficiency {speedup * share / args.ranks:.0%}"
        )
    print(json.dumps(times))


if __name__ == "__main__":
    work(*sys.argv[2:]) if sys.argv[1:2] == ["--work"] else main()
