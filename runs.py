"""What a distillation is, and its folder: locked, recorded, resumed, finished."""

import hashlib
import json
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import files
import process
import report
import wandb_page
from process import Interval, RankLost, ReportedError, Stopped, stop
from ranks import Ranks

# --------------------------------------------------------------------------------------------------
# What a run is, by its flags

# Flags that say what a command does, and where.
COMMANDS = {"log_dir", "run_name", "resume", "evaluate", "export", "preset"}
# Flags that only observe a run, or end it. They may change when it is resumed.
OBSERVING = {"Iteration", "eval_it", "num_eval", "eval_mode", "epoch_eval_train", "batch_real"}
# Flags that no result depends on, or that the digests of data and experts cover.
WITHOUT_EFFECT = {"data_path", "buffer_path", "im_size", "checkpoint_every", "device"}
WITHOUT_EFFECT |= {"load_all", "skip_damaged", "force_save", "unroll_memory", "shard_batch"}
WITHOUT_EFFECT |= {"wandb_mode", "wandb_project", "wandb_entity"}


def run_settings(args):
    """The flags that a result depends on."""
    left_out = COMMANDS | WITHOUT_EFFECT
    if not args.dsa:
        left_out |= {"dsa_strategy"}
    if not args.texture:
        left_out |= {"canvas_size", "canvas_samples"}
    # What earlier versions did not know.
    if args.segments == 1:
        left_out |= {"segments"}
    if args.factor == 1:
        left_out |= {"factor"}
    if args.label_epoch is None:
        left_out |= {"label_epoch"}
    if args.objective == "trajectory":
        left_out |= {"total_steps", "batch_objective"}
    else:
        left_out |= {"expert_epochs", "max_start_epoch"}
    if args.labels != "learned":
        left_out |= {"lr_labels"}
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def run_flags(args):
    """The flags that `--resume` restores, with absolute paths."""
    flags = {name: value for name, value in vars(args).items() if name not in COMMANDS}
    return {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in flags.items()}


def default_name(settings):
    """The name of a run's folder, from the flags and inputs that set its course."""
    course = {name: value for name, value in settings.items() if name not in OBSERVING}
    digest = hashlib.sha256(json.dumps(course, sort_keys=True).encode()).hexdigest()[:6]
    zca = "_zca" if settings["zca"] else ""
    return f"{settings['model']}_ipc{settings['ipc']}{zca}_seed{settings['seed']}_{digest}"


# --------------------------------------------------------------------------------------------------
# Its folder

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Run:
    """A distillation in its folder, to which only rank 0 writes."""

    folder: Path
    settings: dict  # what its result depends on
    ranks: Ranks
    dashboard: wandb_page.Dashboard | None  # None: it is finished
    curves_due: Interval  # drawing them takes half a second

    def save(self, state):
        """Write a checkpoint."""
        if self.ranks.is_first:
            state.save(self.folder / CHECKPOINT)

    def record(self, inputs, state, force_save):
        """Print and write the latest evaluation. Returns what Weights & Biases should show."""
        if not self.ranks.is_first:
            return {}
        process.write_line(report.evaluation_lines(state.evaluations.rows[-1]))
        report.save_images(self, inputs.data, state)
        report.save_results(self, inputs, state)
        if self.curves_due.due():
            report.save_curves(self, state)
        return wandb_page.evaluation_log(self, inputs.data, state, force_save)


@contextmanager
def open_run(args, settings, inputs, state):
    """Lock the run's folder, record the run, load its checkpoint, and yield a `Run`.

    A signal saves a checkpoint, as does the end of another rank. Raises ReportedError where the
    folder has another run, or another process works on this one.
    """
    folder = args.log_dir / args.dataset / (args.run_name or default_name(settings))
    if args.resume:
        folder = args.resume.resolve()
    ranks = inputs.ranks
    with files.locked(folder, wait=False) if ranks.is_first else nullcontext(True) as mine:
        if not mine:
            raise ReportedError(
                f"another process is working on the run in {folder}: use another --run_name"
            )
        record = None
        if ranks.is_first:
            record = files.start_run(folder, settings, run_flags(args), OBSERVING)
            state.load(folder / CHECKPOINT)
        agree(ranks, settings, state)
        check_iterations(args, folder, len(state.losses))
        state.resume(args.Iteration, inputs.evaluator)
        dashboard = None  # a finished run logs nothing more, and stays as it is
        if not state.finished:
            dashboard = open_dashboard(args, folder, settings, record)
        run = Run(folder, settings, ranks, dashboard, Interval(60))
        with stop:  # from here on, a signal waits for `ranks.check`
            try:
                yield run
            except (Stopped, RankLost) as error:
                leave(run, state, error)


def leave(run, state, error):
    """Save a checkpoint, and raise the `error` that ends the run again, which then says so."""
    if run.ranks.is_first:
        stop.end()
    # What changes in an iteration changes at its end, so the state is that of its start.
    run.save(state)
    run.dashboard.finish()
    saved = f"iteration {len(state.losses)} is saved: the same command resumes there"
    if isinstance(error, Stopped):
        with suppress(RankLost):
            run.ranks.gather(None)  # torchrun ends all as soon as one has ended
        raise Stopped(error.args[0], saved) from None
    raise RankLost(f"{error}; {saved}") from None


def agree(ranks, settings, state):
    """Give all ranks rank 0's state. Raises ReportedError if they have other settings."""
    theirs = ranks.from_first(settings)
    different = [name for name in settings if settings[name] != theirs.get(name)]
    if different:
        raise ReportedError(
            f"{', '.join(different)} differ from those of rank 0: start all processes with the "
            "same flags, data and experts"
        )
    content = ranks.from_first(state.content() if ranks.is_first else None)
    if not ranks.is_first:
        state.restore(content)


def open_dashboard(args, folder, settings, record):
    """The run's page on Weights & Biases; `record` None: another rank has it."""
    if record is None:
        return wandb_page.Dashboard(folder, "Progress", "disabled")
    flags = run_flags(args)
    if (record.settings, record.flags) != (settings, flags):
        files.change_run(folder, record, settings, flags)
    config = settings | {"device": args.device} | process.versions()
    page = {"id": record.wandb_id, "name": folder.name, "config": config}
    return wandb_page.Dashboard(folder, "Progress", **wandb_page.options(args), **page)


def check_iterations(args, folder, done):
    """Raise ReportedError if a run has already taken more iterations than requested."""
    if args.Iteration < done:
        raise ReportedError(
            f"--Iteration={args.Iteration}: the run in {folder} is at iteration {done} already: "
            "give more, or start another under another --run_name"
        )


def finish(run, inputs, state):
    """Save everything in the run's folder, then mark the run as finished."""
    stop.release()  # a signal ends the process at once, and the next start does the rest
    memory = run.ranks.gather(process.peak_memory(state.label_syn.device))
    if not run.ranks.is_first:
        return
    report.save_results(run, inputs, state)
    report.save_curves(run, state)
    report.save_animation(run.folder)
    # Last of all: if killed before this, the next start makes everything again.
    summary = wandb_page.run_summary(state.evaluations, state.seconds, memory)
    run.dashboard.finish(**summary)
    state.finished = True
    run.save(state)
    print(report.closing_table(run, inputs, state), flush=True)
    if len(memory) > 1:
        print(report.memory_line(memory), flush=True)
