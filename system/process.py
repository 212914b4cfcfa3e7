"""The process of a script: errors, signals, progress, versions."""

import ctypes
import logging
import os
import platform
import re
import signal
import sys
import time
import warnings
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
    """One of SIGNALS arrived. Its arguments: the signal's number, and what is saved."""


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


def one_line(text):
    """The same text, with control characters and line ends as Python writes them: \\n."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def run_script(main, less_memory):
    """Run a script's `main`, and turn what it raises into one line and an exit code.

    An error that the user can fix exits with 2, a signal with 128 + its number, as shells expect.
    `less_memory` names the flags that help when memory runs out.
    """
    keep_freed_memory()
    prepare_outputs()
    stderr = sys.stderr
    if is_distributed() and os.environ.get("RANK") != "0":
        silence()
    # Importing it warns that there is no CUDA toolkit, which nothing here needs.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        check_launcher()
        main()
    except ReportedError as error:
        code, text = 2, f"error: {error}"
    except OSError as error:  # it names its file, and what is wrong
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
    print(one_line(f"{Path(sys.argv[0]).name}: {text}"), file=sys.stderr)
    sys.exit(code)


def keep_freed_memory():
    """Let glibc keep freed memory: returning large tensors costs a tenth of the time."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc: macOS, Windows, musl
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them


def is_distributed():
    """Tell whether torchrun has started several processes, of which this is one."""
    return (os.environ.get("WORLD_SIZE") or "1") != "1"


def check_launcher():
    """Raise ReportedError, naming the variable, if a launcher's variables are incomplete or odd."""
    values = {name: os.environ.get(name, "") for name in LAUNCHER}
    size = values["WORLD_SIZE"]
    if not is_distributed():
        if values["RANK"] not in ("", "0"):
            raise ReportedError(
                f"RANK={values['RANK']}, but not WORLD_SIZE, which says how many processes there "
                "are: set both, as torchrun does, or neither"
            )
        return
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise ReportedError(
            f"{', '.join(missing)} not set, though WORLD_SIZE={size} is: start with torchrun, or "
            "set them as it does (LOCAL_RANK=0 if each machine has one process), or unset "
            "WORLD_SIZE to run alone"
        )
    limits = {"WORLD_SIZE": (2, 10**6), "MASTER_PORT": (1, 65535)}
    for name in ("WORLD_SIZE", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        low, high = limits.get(name) or (0, int(size) - 1)
        if not (values[name].isdecimal() and low <= int(values[name]) <= high):
            raise ReportedError(
                f"{name}={values[name]} is no whole number from {low} to {high}: start with "
                "torchrun, which sets it"
            )


# --------------------------------------------------------------------------------------------------
# Outputs


class Output:
    """A text stream that, once nobody reads it any more, ends a run as a signal does.

    The run is saved then. All that is written later goes nowhere.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.attempt(lambda: self.stream.write(text))

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, call):
        try:
            return call()
        except OSError:  # the reader of a pipe has ended, or a terminal was closed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # Python flushes it when it ends, too
            os.close(nowhere)
            stop.lose_output()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def prepare_outputs():
    """Let no fault of standard output or standard error break a run."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number, and output
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):  # a test or a notebook may have replaced it
            # If an encoding lacks α or ±, a question mark replaces it.
            stream.reconfigure(errors="replace")
        setattr(sys, name, Output(stream))


def silence():
    """Print no more output or warnings: rank 0 says the same."""
    sys.stdout = sys.stderr = open(os.devnull, "w")


# --------------------------------------------------------------------------------------------------
# Signals


# Of a user, a closed terminal, and of schedulers before time is up: SLURM's --signal, SGE, LSF.
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class Stop:
    """Within `with stop:`, SIGNALS are noted, and `stop.check()` raises `Stopped`.

    A run thus ends between two iterations, not within one. A second signal ends it at once, but not
    under torchrun, which passes on what the processes may have received already.
    """

    def __init__(self):
        self.signal = None
        self.lost_output = None  # the signal of that, if the output was lost
        self.handlers = {}

    def __enter__(self):
        self.signal = self.lost_output
        self.handlers = {}
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
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

    def lose_output(self):
        """Note that nobody reads what is printed."""
        self.signal = self.lost_output = signal.SIGPIPE

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
# Versions

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
