"""A distillation's folder: locked, recorded, gone on with, finished."""

from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cli
import files
import process
import report
import wandb_page
from process import ReportedError, Stopped, stop

CHECKPOINT = "checkpoint.pt"


class Run(NamedTuple):
    """A distillation in its folder."""

    folder: Path
    settings: dict  # what its result depends on
    dashboard: wandb_page.Dashboard | None  # None: it is finished


@contextmanager
def open_run(args, settings, evaluator, state):
    """Lock the run's folder, record what it is, and go back to its checkpoint: yields a `Run`.

    A signal saves a checkpoint. Raises ReportedError where the folder has another run, or another
    process works on this one.
    """
    folder = args.log_dir / args.dataset / (args.run_name or cli.default_name(settings))
    if args.resume:
        folder = args.resume.resolve()
    with files.locked(folder, wait=False) as mine:
        if not mine:
            raise ReportedError(
                f"another process is working on the run in {folder}: use another --run_name"
            )
        flags = cli.run_flags(args)
        record = files.start_run(folder, settings, flags, cli.OBSERVING)
        state.load(folder / CHECKPOINT)
        check_iterations(args, folder, len(state.losses))
        state.go_on(args.Iteration, evaluator)
        dashboard = None  # a finished run logs nothing more, and stays as it is
        if not state.finished:
            files.change_run(folder, record, settings, flags)
            config = settings | {"device": args.device} | process.versions()
            page = {"id": record.wandb_id, "name": folder.name, "config": config}
            dashboard = wandb_page.Dashboard(folder, "Progress", **cli.wandb_flags(args), **page)
        run = Run(folder, settings, dashboard)
        try:
            with stop:  # from here on, a signal waits for `stop.check`
                yield run
        except Stopped as stopped:
            state.save(run.folder / CHECKPOINT)
            dashboard.finish()
            saved = f"iteration {len(state.losses)} is saved: the same command resumes there"
            raise Stopped(stopped.args[0], saved) from None


def check_iterations(args, folder, done):
    """Raise ReportedError where a run has taken more iterations than it is to have."""
    if args.Iteration < done:
        raise ReportedError(
            f"--Iteration={args.Iteration}: the run in {folder} is at iteration {done} already: "
            "give more, or start another under another --run_name"
        )


def finish(run, inputs, state):
    """Leave everything in the run's folder, then mark the run as finished."""
    stop.release()  # a signal ends the process at once: the next start makes up for it
    report.save_results(run, inputs, state)
    report.save_curves(run, state)
    report.save_animation(run.folder)
    # Last of all: what is killed before it, the next start makes again.
    summary = wandb_page.run_summary(state.evaluations, state.seconds, state.syn_lr.device)
    run.dashboard.finish(**summary)
    state.finished = True
    state.save(run.folder / CHECKPOINT)
    print(report.closing_table(run, inputs, state), flush=True)
