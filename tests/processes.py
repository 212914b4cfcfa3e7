"""Scripts in processes of their own, forked from a server that has imported what takes seconds."""

import contextlib
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# The scripts, what they import when they need it, and what unpickles a `Process`.
PRELOADED = ["distillation", "expert_trajectories", "torchvision", "torch._dynamo", "requests"]
PRELOADED += ["matplotlib.backends.backend_agg", "yaml", "pytest", "processes"]
context = multiprocessing.get_context("forkserver")


def start_server(environment):
    """Start the server, unless it runs: `environment` are variables that imports depend on."""
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    # The server of Python 3.11 does not take over sys.path.
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before.get("PYTHONPATH", "")])
    try:
        os.environ.update(environment, PYTHONPATH=path)
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Process:
    """A script in a process of its own, which writes both outputs to files.

    flags        script and flags
    cwd          its working folder
    out, err     where its outputs go; may be the same file
    environment  variables that are added
    limits       resource limits by name, as RLIMIT_AS
    kill_at      the number of the file renaming before which the process kills itself
    copies       a folder for copies of `cwd`, made before each file renaming and numbered from 1
    curves       whether curves.png is drawn, which takes longer than a short run; else it is blank
    """

    def __init__(
        self,
        flags,
        cwd,
        out,
        err,
        environment,
        limits=None,
        kill_at=None,
        copies=None,
        curves=True,
    ):
        self.out = out
        self.err = err
        for path in (out, err):
            path.touch()
        todo = (flags, cwd, out, err, environment, limits or {}, kill_at, copies, curves)
        self.process = context.Process(target=become, args=todo, daemon=True)
        self.process.start()

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, number)

    def wait(self, seconds=100):
        """Its exit code; minus the number of the signal that ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it has not ended:\n{self.output()}"
        return self.process.exitcode

    def output(self):
        return self.out.read_text()

    def wait_for(self, text, seconds=100):
        """Wait until the output has `text`."""
        end = time.monotonic() + seconds
        while text not in self.output():
            assert self.process.is_alive() and time.monotonic() < end, self.output()
            time.sleep(0.005)


def become(flags, cwd, out, err, environment, limits, kill_at, copies, curves):
    """Turn this process into the script that `flags` begin with."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where the tests ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as under nohup
    os.chdir(cwd)
    os.environ.update(environment)
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False) for number, mode in enumerate("rww")
    )
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if kill_at:
        os.replace = killing(os.replace, kill_at)
    if copies:
        os.replace = copying(os.replace, cwd, copies)
    if not curves:
        blank_curves()
    sys.argv = flags
    code = 0
    try:
        runpy.run_path(str(ROOT / flags[0]), run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def killing(function, number):
    """The same function, but its call of that number kills the process instead."""
    calls = itertools.count(1)

    def call(*args, **options):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return call


def copying(function, folder, copies):
    """The same function, but each call first copies a folder, as a kill would leave it."""
    calls = itertools.count(1)

    def call(*args, **options):
        shutil.copytree(folder, copies / str(next(calls)))
        return function(*args, **options)

    return call


def blank_curves():
    """Replace `report.save_curves` by a function that draws nothing."""
    from run import report
    from system import files

    def save(path, curves):
        pixel = Image.new("L", (1, 1))
        files.write_whole(path, lambda file: pixel.save(file, format="png"))

    report.save_curves = save
