"""A run's page on Weights & Biases."""

import os
import shlex
import shutil
import sys
import uuid
import warnings
from pathlib import Path

import numpy as np
import wandb

from run.report import clip, draw_grid
from system import process
from system.process import first_line


class Dashboard:
    """A run's page on Weights & Biases. It never prompts and never ends the script. It warns.

    Online if logged in and reachable, else offline, in `folder`/wandb. `axis` is the key that all
    others are plotted against. `options` are those of `wandb.init`. An `id` that has been used
    before continues that page. WANDB_DIR, and WANDB_MODE without `mode`, work as in wandb itself.
    WANDB_RUN_ID does not, as a script may have many pages, which would overwrite each other.
    """

    unreachable = False  # the server, as far as this process knows: a try takes half a minute

    def __init__(self, folder, axis, mode, **options):
        # wandb would use the home directory.
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))
        os.environ.setdefault("WANDB_SILENT", "true")  # settings would not outlive `stop_service`
        folder = Path(os.environ.get("WANDB_DIR") or folder)
        options["id"] = options.get("id") or uuid.uuid4().hex[:8]  # else it would be WANDB_RUN_ID
        self.folder = folder / "wandb"
        self.page = None
        for each in modes_to_try(mode or os.environ.get("WANDB_MODE")):
            if each == "online" and Dashboard.unreachable:
                continue
            try:
                self.page = wandb.init(
                    mode=each,
                    dir=folder.absolute(),  # wandb's service may have started elsewhere
                    resume="allow",
                    reinit="finish_previous",
                    settings=wandb.Settings(init_timeout=30),
                    **options,
                )
                break
            except Exception as error:  # of wandb, its service, or a WANDB_... variable's value
                warnings.warn(f"wandb cannot start in mode {each}: {first_line(error)}")
                Dashboard.unreachable |= each == "online"
                stop_service()  # it would consider the run still active
        self.attempt(lambda page: page.define_metric(axis))
        self.attempt(lambda page: page.define_metric("*", step_metric=axis))

    def attempt(self, call):
        """Call `call` with wandb's page. If it fails, warn and continue without wandb."""
        try:
            if self.page:
                call(self.page)
        except Exception as error:
            warnings.warn(f"wandb failed, continuing without it: {first_line(error)}")
            self.page = None

    def log(self, values, step):
        self.attempt(lambda page: page.log(values, step=step))

    def finish(self, **summary):
        """Close the page, with its summary for the table of runs."""
        self.attempt(lambda page: page.summary.update(summary))
        self.attempt(lambda page: page.finish())

    def where_to_look(self):
        """A line that says where the page is, or how to see it."""
        if not self.page:
            return "no wandb"
        if self.page.settings.mode != "offline":
            return f"wandb: {self.page.url or 'disabled'}"
        command = "wandb" if shutil.which("wandb") else Path(sys.executable).with_name("wandb")
        command, folder = shlex.quote(str(command)), shlex.quote(str(self.folder))
        return (
            f"wandb logs offline; to view: {command} leet {folder}; "
            f"to upload: {command} sync {folder}/offline-run-*"
        )


def stop_service():
    try:
        wandb.teardown()
    except Exception as error:
        warnings.warn(f"wandb cannot stop: {first_line(error)}")


def modes_to_try(mode):
    """wandb's modes in order: the given one, or online if there is an account, then offline."""
    if mode in (None, "online") and not logged_in():
        if mode:
            warnings.warn("--wandb_mode=online, but nobody is logged in (wandb login): offline")
        mode = "offline"
    return dict.fromkeys((mode or "online", "offline"))


def logged_in():
    """Tell whether wandb knows an account, from this machine or the environment."""
    try:
        return wandb.login(prompt=False, verify=False)
    except Exception as error:
        warnings.warn(f"wandb cannot log in: {first_line(error)}")
        return False


def score_log(rows):
    """MTT's keys for the latest of `rows`; `Loss` is the mean since the previous evaluation."""
    log = {} if rows[-1]["loss"] is None else {"Loss": rows[-1]["loss"]}
    for network, scores in rows[-1]["scores"].items():
        of_network = (row["scores"][network] for row in rows)
        best = max(of_network, key=lambda scores: scores.selection_accuracy)
        for prefix, part in (("", "test"), ("Val_", "val")):
            values = getattr(scores, part)
            if values:
                log[f"{prefix}Accuracy/{network}"] = np.mean(values)
                log[f"{prefix}Std/{network}"] = np.std(values)
        log[f"Max_Accuracy/{network}"] = np.mean(best.test)
        log[f"Max_Std/{network}"] = np.std(best.test)
    return log


def histogram(images):
    return wandb.Histogram(images)


def picture_log(views, names, title):
    """MTT's keys for pictures of images, clipped and not.

    views  images (K, C, S, S) by their kind: "Synthetic", with ZCA also "Reconstructed"
    names  a text for each image
    """
    log = {}
    caption = f"{title}: {', '.join(dict.fromkeys(names))}"
    for kind, images in views.items():
        log[f"{kind}_Pixels"] = wandb.Histogram(images)
        keys = {f"{kind}_Images": images, f"Clipped_{kind}_Images/std_2.5": clip(images)}
        for key, shown in keys.items():
            log[key] = wandb.Image(draw_grid(shown, names, title), caption=caption)
    return log


def band_log(images, shown, names, title):
    """Two of the same keys for images of bands (K, C, S, S), drawn as `shown` (K, 3, S, S)."""
    caption = f"{title}: {', '.join(dict.fromkeys(names))}"
    picture = wandb.Image(draw_grid(shown, names, title, pixels=True), caption=caption)
    return {"Synthetic_Pixels": wandb.Histogram(images), "Synthetic_Images": picture}


def run_summary(evaluations, seconds, memory):
    """Summarise a run for wandb's table of runs: cost, best and final accuracy, and α.

    `memory` is the peak of each rank, in bytes; None where the system does not say.
    """
    best, final = evaluations.best, evaluations.rows[-1]
    summary = {
        "Best_Iteration": best["iteration"],
        "Total_Seconds": seconds,
        "Peak_Memory": max((peak for peak in memory if peak), default=None),
        "Versions": ", ".join(f"{name} {number}" for name, number in process.versions().items()),
    }
    for prefix, row in (("Best", best), ("Final", final)):
        summary[f"{prefix}_Synthetic_LR"] = row["syn_lr"]
        for network, scores in row["scores"].items():
            summary[f"{prefix}_Accuracy/{network}"] = np.mean(scores.test)
            summary[f"{prefix}_Std/{network}"] = np.std(scores.test)
    return summary
