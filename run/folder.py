"""A run's folder: its name, lock, record and checkpoint, and the files of its evaluations."""

import hashlib
import json
import uuid
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from datasets.set_files import save_set
from run.scores import to_json
from system import files
from system.process import RankLost, ReportedError, Stopped, stop
from system.ranks import Ranks

# --------------------------------------------------------------------------------------------------
# What a run is, by its flags

# Flags that say what a command does, and where. No run records them.
COMMANDS = {"log_dir", "run_name", "resume", "evaluate", "task", "export", "preset"}
# Flags that only observe a run, or end it. They may change when it is resumed.
OBSERVING = {"Iteration", "eval_it", "num_eval", "eval_mode", "epoch_eval_train", "batch_real"}
# Flags that no result depends on, or that the digests of data and experts cover.
WITHOUT_EFFECT = {"data_path", "buffer_path", "im_size", "checkpoint_every", "device"}
WITHOUT_EFFECT |= {"bands", "fill_nodata", "show_bands", "split"}
WITHOUT_EFFECT |= {"load_all", "skip_damaged", "force_save", "unroll_memory", "shard_batch"}
WITHOUT_EFFECT |= {"wandb_mode", "wandb_project", "wandb_entity"}


def run_settings(args, defaults):
    """The flags that a result depends on, where they differ from `defaults`."""
    left_out = COMMANDS | WITHOUT_EFFECT
    return {
        name: as_text(value)
        for name, value in vars(args).items()
        if name not in left_out and value != defaults[name]
    }


def run_flags(args):
    """The flags that `--resume` restores, with absolute paths."""
    flags = {name: value for name, value in vars(args).items() if name not in COMMANDS}
    return {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in flags.items()}


def as_text(value):
    return str(value) if isinstance(value, Path) else value


def default_name(args, settings):
    """The name of a run's folder, from the flags and inputs that set its course."""
    course = {name: value for name, value in settings.items() if name not in OBSERVING}
    digest = hashlib.sha256(json.dumps(course, sort_keys=True).encode()).hexdigest()[:6]
    zca = "_zca" if args.zca else ""
    return f"{args.model}_ipc{args.ipc}{zca}_seed{args.seed}_{digest}"


# --------------------------------------------------------------------------------------------------
# Its folder

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Run:
    """A distillation in its folder, to which only rank 0 writes."""

    folder: Path
    ranks: Ranks
    wandb_id: str | None  # of its page; None: another rank has it

    def save(self, state):
        """Write a checkpoint."""
        if self.ranks.is_first:
            state.save(self.folder / CHECKPOINT)

    def save_results(self, facts, state):
        """Write results.json: `facts` about the run, all evaluations, and random real images."""
        results = facts | {
            "best_iteration": state.evaluations.best["iteration"],
            "evaluations": to_json(state.evaluations.rows),
            "random_real": to_json(state.baselines),
        }
        files.write_json(self.folder / "results.json", results)

    def save_test_names(self, names):
        """Write the names of the test images, so that others can test on the same ones."""
        if self.ranks.is_first and names:
            text = "".join(f"{name}\n" for name in names)
            files.write_whole(
                self.folder / "test_images.txt", lambda file: file.write(text.encode())
            )

    def save_set(self, state, pixels_zca):
        """Write the tensors of the synthetic set.

        `pixels_zca` (K, C, S, S) are the images with whitening undone; None: they are not whitened.
        """
        it = len(state.losses)
        for tag in [it, "best"] if state.evaluations.latest_is_best else [it]:
            save_set(self.folder, tag, state.images, state.labels, state.alpha, state.targets)
            if pixels_zca is not None:
                files.write_tensors(self.folder / f"images_zca_{tag}.pt", pixels_zca.clone())


@contextmanager
def open_run(folder, ranks, settings, flags, state):
    """Lock a run's folder, record the run, load its checkpoint, and yield its `Run`.

    settings  what its result depends on
    flags     what --resume restores

    Raises ReportedError where the folder has another run, or another process works on this one.
    """
    with files.locked(folder, wait=False) if ranks.is_first else nullcontext(True) as mine:
        if not mine:
            raise ReportedError(
                f"another process is working on the run in {folder}: use another --run_name"
            )
        record = None
        if ranks.is_first:
            record = start_run(folder, settings, flags)
            state.load(folder / CHECKPOINT)
        agree(ranks, settings, flags, state)
        done = len(state.losses)
        if flags["Iteration"] < done:
            raise ReportedError(
                f"--Iteration={flags['Iteration']}: the run in {folder} is at iteration {done} "
                "already: give more, or start another under another --run_name"
            )
        if record and (record.settings, record.flags) != (settings, flags):
            # A finished run stays as it is.
            if not (state.finished and flags["Iteration"] == done):
                change_run(folder, record, settings, flags)
        yield Run(folder, ranks, record and record.wandb_id)


def start_run(folder, settings, flags):
    """The record of the run in `folder`, new or resumed; settings in OBSERVING may differ.

    A setting that one of them lacks has its default there, as the flags say. Raises ReportedError
    if the run was started with other settings.
    """
    record = files.read_run(folder)
    if record is None:
        record = files.RunRecord(settings, flags, uuid.uuid4().hex[:8])
        files.write_json(folder / files.RUN_RECORD, asdict(record))
        return record
    names = sorted((settings.keys() | record.settings.keys()) - OBSERVING)
    before = {name: record.settings.get(name, record.flags.get(name)) for name in names}
    now = {name: settings.get(name, flags.get(name)) for name in names}
    if {name for name in names if before[name] != now[name]} == {"experts"}:
        raise ReportedError(
            f"{folder} was started with other experts: some were added, removed or retrained. "
            "Use the same (another --buffer_path), or start again under another --run_name"
        )
    files.check_record(folder, before, now, "--run_name")
    return record


def change_run(folder, record, settings, flags):
    """Record that a run continues with other settings."""
    files.write_json(
        folder / files.RUN_RECORD, asdict(replace(record, settings=settings, flags=flags))
    )


@contextmanager
def saved_if_stopped(run, state, dashboard):
    """Within the block, a signal or the end of another rank saves a checkpoint and ends the run."""
    with stop:  # from here on, a signal waits for `ranks.check`
        try:
            yield
        except (Stopped, RankLost) as error:
            leave(run, state, dashboard, error)


def leave(run, state, dashboard, error):
    """Save a checkpoint, and raise the `error` that ends the run again, which then says so."""
    if run.ranks.is_first:
        stop.end()
    # What changes in an iteration changes at its end, so the state is that of its start.
    run.save(state)
    dashboard.finish()
    saved = f"iteration {len(state.losses)} is saved: the same command resumes there"
    if isinstance(error, Stopped):
        with suppress(RankLost):
            run.ranks.gather(None)  # torchrun ends all as soon as one has ended
        raise Stopped(error.args[0], saved) from None
    raise RankLost(f"{error}; {saved}") from None


def agree(ranks, settings, flags, state):
    """Give all ranks rank 0's state. Raises ReportedError if they have other settings.

    How ranks share out the work changes no result, but has to be the same, too.
    """
    mine = settings | {"shard_batch": flags["shard_batch"]}
    theirs = ranks.from_first(mine)
    names = sorted(mine.keys() | theirs.keys())
    different = [name for name in names if mine.get(name) != theirs.get(name)]
    if different:
        raise ReportedError(
            f"{', '.join(different)} differ from those of rank 0: start all processes with the "
            "same flags, data and experts"
        )
    content = ranks.from_first(state.content() if ranks.is_first else None)
    if not ranks.is_first:
        state.restore(content)
