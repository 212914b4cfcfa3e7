"""The process of a script: errors, signals, progress, devices, memory, versions."""

import ctypes
import logging
import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Errors and exit codes


class ReportedError(Exception):
    """An error that the user can fix. `run_script` prints it as one line and exits with code 2."""


class Stopped(Exception):
    """SIGTERM or SIGINT arrived. Its arguments: the signal's number, and what is saved."""


class RankLost(ReportedError):
    """Another process of this run has ended, so this one cannot continue."""


def first_line(error):
    """The first line of an exception's message. System errors lose their numbers."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]


def is_out_of_memory(error):
    """Tell whether an exception says that a GPU, or the machine, has run out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    messages = ("can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in messages)


def run_script(main, less_memory):
    """Run a script's `main`, and turn what it raises into one line and an exit code.

    An error that the user can fix exits with 2, a signal with 128 + its number, as shells expect.
    `less_memory` names the flags that help when memory runs out.
    """
    keep_freed_memory()
    stderr = sys.stderr
    if is_distributed() and os.environ["RANK"] != "0":
        silence()
    # If an encoding lacks α or ±, a question mark replaces it.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test or a notebook may have replaced it
            stream.reconfigure(errors="replace")
    # Importing it warns that there is no CUDA toolkit, which nothing here needs.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        main()
    except (ReportedError, OSError) as error:  # an OSError names its file, and what is wrong
        code, text = 2, f"error: {first_line(error)}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code, text = 2, f"error: out of memory ({first_line(error)}): {less_memory}"
    except (Stopped, KeyboardInterrupt) as error:
        number, saved = error.args or (signal.SIGINT, "")
        if not saved:
            saved = "the same command starts again, or resumes what an earlier one has saved"
        code, text = 128 + number, f"stopped by {signal.Signals(number).name}; {saved}"
    else:
        return
    finally:
        is_silent = sys.stderr is not stderr
        sys.stderr = stderr  # also for the traceback of unexpected errors
    if is_silent and code > 128:
        sys.exit(code)  # rank 0 says what is saved
    if is_silent:
        # Rank 0 reports what happens to all ranks. Then torchrun ends this one before it reports.
        time.sleep(10)
        text = f"rank {os.environ['RANK']}: {text}"
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    sys.exit(code)


def is_distributed():
    """Tell whether torchrun has started several processes, of which this is one."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


def silence():
    """Print no more output or warnings: rank 0 says the same."""
    sys.stdout = sys.stderr = open(os.devnull, "w")


# --------------------------------------------------------------------------------------------------
# Signals


class Stop:
    """Within `with stop:`, SIGTERM and SIGINT are noted, and `stop.check()` raises `Stopped`.

    A run thus ends between two iterations, not within one. A second signal ends it at once, but not
    under torchrun, which passes on what the processes may have received already.
    """

    def __init__(self):
        self.signal = None
        self.handlers = {}

    def __enter__(self):
        self.signal = None
        self.handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as in a shell's background jobs
                self.handlers[number] = signal.signal(number, self.note)

    def __exit__(self, *_):
        self.release()

    def release(self):
        """Restore what signals did before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.signal = number
        if not is_distributed():
            self.release()

    def end(self):
        """Let no signal of torchrun's disturb what this process does before it ends."""
        if is_distributed():
            self.handlers = dict.fromkeys(self.handlers, signal.SIG_IGN)

    def check(self):
        """Raise `Stopped` if a signal has arrived."""
        if self.signal:
            raise Stopped(self.signal, "")


stop = Stop()  # one for the process, as signal handlers are


# --------------------------------------------------------------------------------------------------
# Progress


def progress(iterable=None, **options):
    """A tqdm bar on standard error if that is a terminal, else nothing."""
    return tqdm(iterable, mininterval=1, disable=None, leave=False, **options)


class Interval:
    """`due()` is true when so many seconds have passed since it last was, or since the start."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.last = time.monotonic()

    def restart(self):
        self.last = time.monotonic()

    def due(self):
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


class TimeLeft:
    """`time_left(done)`: how long the rest takes, at the pace since the first call.

    What comes before it, as compilation, does not count.
    """

    def __init__(self, total):
        self.total = total
        self.first = None  # when, and how many were done

    def __call__(self, done):
        now = time.monotonic()
        if self.first is None:
            self.first = now, done
        start, before = self.first
        if done == before:
            return "time left not known yet"
        seconds = (now - start) / (done - before) * (self.total - done)
        return f"about {duration(seconds)} left"


def write_line(text):
    """Print a line above any bar, without buffering, even to a file or a pipe."""
    tqdm.write(text)
    sys.stdout.flush()


def log_line(text):
    """Print a line to standard error, unless that is a terminal, where a bar shows the same."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def with_lines(items, interval, text):
    """Yield `items`, and log `text` and the progress whenever `interval` is due.

    Raises `Stopped` if a signal has been noted.
    """
    for number, item in enumerate(items):
        stop.check()
        if interval.due():
            log_line(f"{text} {number} of {len(items)}")
        yield item


def duration(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


# --------------------------------------------------------------------------------------------------
# Threads


def in_threads(iterators, workers, bar):
    """Exhaust iterators, `workers` at a time, and count on a bar what they yield.

    They share PyTorch's threads: if operations are small, a core for each iterator is faster than
    splitting operations. They take turns, so that all end together. An exception in one of them is
    raised here, and ends the others.
    """
    queue = deque(iterators)
    threads = torch.get_num_threads()
    workers = min(workers, len(queue), threads)
    failed = threading.Event()

    def work():
        torch.set_num_threads(threads // workers)
        while queue and not failed.is_set():
            with suppress(IndexError):  # another worker took the last one
                take_turn(queue, bar, failed)

    if workers < 2:
        while queue:
            take_turn(queue, bar, failed)
        return
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for worker in [pool.submit(work) for _ in range(workers)]:
                    worker.result()
            except BaseException:
                failed.set()  # the pool waits for its workers
                raise
    finally:
        torch.set_num_threads(threads)


def take_turn(queue, bar, failed):
    """Advance the first iterator of `queue`, and append it again unless it is exhausted."""
    iterator = queue.popleft()
    for count, _ in enumerate(iterator, start=1):
        bar.update()
        if failed.is_set():
            return
        if count == 20 and queue:
            queue.append(iterator)
            return


# --------------------------------------------------------------------------------------------------
# Device, memory, versions


def check_device(name):
    """The torch device called `name`. Raises ReportedError if it cannot be used."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # the meta device, for one, has no data to copy
        # A run's convolutions have few shapes, so benchmarking their algorithms pays off.
        torch.backends.cudnn.benchmark = True
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ReportedError(
            f"--device={name} cannot be used ({first_line(error)}): try --device=cpu"
        ) from None


def has_bfloat16(device):
    """Tell whether `device` has instructions for bfloat16.

    Without them PyTorch emulates it, which is slower than float32: three times on an x86 processor
    with AVX-512 but without its bfloat16 extension, ten times without AVX-512.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_amp(amp, device):
    """`amp` if `device` has bfloat16, else False, with a warning."""
    if amp and not has_bfloat16(device):
        warnings.warn(f"--amp: this {device.type} has no bfloat16; continuing in float32")
        return False
    return amp


def describe(device, amp, ranks=1):
    """The device and its precision, for the first line of output: a wrong driver means the CPU."""
    precision = "bfloat16" if amp else "float32"
    if ranks > 1:
        precision += f", {ranks} processes"
    if device.type != "cuda":
        return f"{device.type.upper()}, threads: {torch.get_num_threads()}, {precision}"
    # PyTorch's default, as in MTT: faster on Ampere and later, and exact to three digits only.
    if torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0):
        precision += ", convolutions in TF32"
    return f"{torch.cuda.get_device_name(device)}, {precision}"


def keep_freed_memory():
    """Let glibc keep freed memory: returning large tensors costs a tenth of the time."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc: macOS, Windows, musl
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def peak_memory(device):
    """The peak memory of this process, in bytes: a GPU's on CUDA, else main memory.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return read_memory("/proc/self/status", "VmHWM")


def free_memory(device):
    """The memory that is free for this process, in bytes. None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return read_memory("/proc/meminfo", "MemAvailable")


def activation_memory(gigabytes, device):
    """The bytes of --unroll_memory, by default an eighth of what is free."""
    return (free_memory(device) or 0) / 8 if gigabytes is None else gigabytes * 1e9


def read_memory(path, key):
    """A memory figure from Linux, in bytes; None on other systems."""
    try:
        lines = Path(path).read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
    except (OSError, StopIteration):
        return None


VERSION = "1.0"  # of this project


def versions():
    """The versions that a result depends on."""
    return {
        "eurosat-mtt": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "kornia": version("kornia"),
        "numpy": np.__version__,
    }
