"""Starts the scripts by forking a process that has imported all they need: a tenth of a second instead of four.

Reads one JSON object per line from standard input, and answers each with one line. {"flags": [script, flag, ...],
"cwd": ..., "home": ..., "out": file for both outputs, "limits": {name of a resource limit: value}} starts a script; the
answer is its process id. {"wait": process id} waits for its end; the answer is the exit code, as of `subprocess`.
"""

import json
import os
import resource
import runpy
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def child(flags, cwd, out, home, limits):
    """Become the script that `flags` begin with."""
    os.chdir(cwd)
    os.environ["HOME"] = home
    for number in (0, 1, 2):
        os.dup2(os.open(os.devnull if number == 0 else out, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.argv, code = flags, 0
    try:
        runpy.run_path(str(ROOT / flags[0]), run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main():
    import distillation  # noqa: F401  (and with it all that takes time to import)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (answer := os.fork()):
            child(**request)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
