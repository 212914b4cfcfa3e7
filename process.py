"""What a script needs of the process that it runs in, from its first signal to its exit code."""

import ctypes
import logging
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
# Faults, and the exit codes that they end in


class ReportedError(Exception):
    """A fault that the user can mend. `run_script` prints it as one line and exits with code 2."""


class Stopped(Exception):
    """SIGTERM or SIGINT arrived. Made from the signal's number, and a note of what is saved."""


def first_line(error):
    """An exception's message, cut to one line; of the system's errors without their numbers."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]


def is_out_of_memory(error):
    """Whether an exception says that a GPU, or the machine, has run out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    messages = ("can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in messages)


def run_script(main, less_memory):
    """Run a script's `main`, and turn what it raises into one line and an exit code.

    A fault that the user can mend exits with 2, a signal with 128 + its number, as shells expect.
    `less_memory` names the flags that help when memory runs out.
    """
    keep_freed_memory()
    # Where an encoding lacks α or ±, a question mark stands for it.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not what a test or a notebook puts there
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
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    sys.exit(code)


# --------------------------------------------------------------------------------------------------
# Signals


class Stop:
    """Within `with stop:`, SIGTERM and SIGINT leave a note, which `stop.check()` raises.

    So a run ends between two iterations, not within one. A second signal ends it at once.
    """

    def __init__(self):
        self.signal = None
        self.handlers = {}

    def __enter__(self):
        self.signal = None
        self.handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell's background jobs have it
                self.handlers[number] = signal.signal(number, self.note)

    def __exit__(self, *_):
        self.release()

    def release(self):
        """From here on, signals do what they did before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.signal = number
        self.release()

    def check(self):
        """Raise `Stopped` where a signal has arrived."""
        if self.signal:
            raise Stopped(self.signal, "")


stop = Stop()  # one for the process, as signal handlers are


# --------------------------------------------------------------------------------------------------
# Progress


def progress(iterable=None, **options):
    """A tqdm bar on standard error where that is a terminal; elsewhere nothing."""
    return tqdm(iterable, mininterval=1, disable=None, leave=False, **options)


class Interval:
    """`due()` is true whenever so many seconds have passed since it was, or since the start."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.last = time.monotonic()

    def due(self):
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


def write_line(text):
    """A line on standard output, above any bar, and at once, also into a file or a pipe."""
    tqdm.write(text)
    sys.stdout.flush()


def log_line(text):
    """A line on standard error, unless that is a terminal, where a bar shows the same."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def with_lines(items, interval, text):
    """`items`, with a log line whenever `interval` is due: `text`, and how far it is."""
    for number, item in enumerate(items):
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
    """Run iterators to their ends, so many at a time, and count on a bar what they yield.

    They share PyTorch's threads: where operations are small, it is faster to give each iterator a
    core than to split operations. They take turns, so that all end together. What one of them
    raises is raised here, and ends the others.
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
    """Advance the first iterator of `queue`, and append it again unless it is at its end."""
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
    """The torch device called `name`. Raises ReportedError where it cannot be used."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # the meta device, for one, has no data to copy
        # A run's convolutions have few shapes: trying their algorithms pays.
        torch.backends.cudnn.benchmark = True
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ReportedError(
            f"--device={name} cannot be used ({first_line(error)}): try --device=cpu"
        ) from None


def has_bfloat16(device):
    """Whether `device` has instructions for bfloat16.

    Without them PyTorch emulates it, which is slower than float32: three times on an x86 processor
    with AVX-512 but not its bfloat16 part, ten times without AVX-512.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_amp(amp, device):
    """`amp` where `device` has bfloat16; elsewhere False, with a warning."""
    if amp and not has_bfloat16(device):
        warnings.warn(f"--amp: this {device.type} has no bfloat16; continuing in float32")
        return False
    return amp


def describe(device, amp):
    """The device and its precision, for the first line of output: a wrong driver means the CPU."""
    precision = "bfloat16" if amp else "float32"
    if device.type != "cuda":
        return f"{device.type.upper()}, threads: {torch.get_num_threads()}, {precision}"
    # PyTorch's default, as in MTT: faster on Ampere and later, and exact to three digits only.
    if torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0):
        precision += ", convolutions in TF32"
    return f"{torch.cuda.get_device_name(device)}, {precision}"


def keep_freed_memory():
    """Let glibc keep freed memory: giving large tensors back costs a tenth of the time."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc: macOS, Windows, musl
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def peak_memory(device):
    """The most memory that this process has held, in bytes: a GPU's on CUDA, else main memory.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return read_memory("/proc/self/status", "VmHWM")


def free_memory(device):
    """What is free for this process to take, in bytes. None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return read_memory("/proc/meminfo", "MemAvailable")


def activation_memory(gigabytes, device):
    """The bytes of --unroll_memory, by default an eighth of what is free."""
    return (free_memory(device) or 0) / 8 if gigabytes is None else gigabytes * 1e9


def read_memory(path, key):
    """One of Linux's figures, in bytes; None on other systems."""
    try:
        lines = Path(path).read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
    except (OSError, StopIteration):
        return None


def versions():
    """The versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "kornia": version("kornia"),
        "numpy": np.__version__,
    }
