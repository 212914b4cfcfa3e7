"""What a person sees of a run: pictures, and pages on Weights & Biases."""

import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import wandb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import files
from datasets import Data
from files import first_line

# ---------------------------------------------------------------------------------------------------------------------
# Pictures and files


def draw_image(image):
    """A picture of an image (3, H, W), scaled to its own range."""
    image = image - image.min()
    return Image.fromarray((image / image.max().clamp(min=1e-8) * 255).byte().permute(1, 2, 0).numpy())


SIDE, PIXELS = 30_000, 30_000_000  # that a picture has at most: GIF ends at 65,535 a side, Pillow warns from 90 Mpx on


def draw_grid(images, labels, title, classes):
    """A labelled picture of images (B, 3, H, W), each scaled to its own range, `classes` naming the labels (B,).

    One image per class: rows of five, or of ten from eleven classes on. Several: a column per class, or, where there
    are more than ten, a row with the first ten of each. The title says where not all images have found room.
    """
    of_classes = [torch.nonzero(labels.cpu() == label).flatten().tolist() for label in range(len(classes))]
    most, few = max(map(len, of_classes)), len(classes) <= 10
    shown = most if few else min(most, 10)
    columns = (5 if few else 10) if most == 1 else len(classes) if few else shown
    table = [part[:shown] + [None] * (shown - len(part)) for part in of_classes]  # a row per class
    order = [index for line in (zip(*table) if few else table) for index in line]

    height, width = images.shape[2:]
    scale = max(1, (192 if len(order) <= 10 else 128) // height)
    cell_w, cell_h, head = width * scale + 8, height * scale + 22, 26
    rows = min(-(-len(order) // columns), max(1, min(SIDE, PIXELS // (columns * cell_w)) // cell_h))
    order = order[:rows * columns]
    if (drawn := len(order) - order.count(None)) < len(images):
        title += f", {drawn} of {len(images)} images"
    title += "; each image in its own range"
    font = ImageFont.load_default(size=12)
    picture_w = max(columns * cell_w, int(font.getlength(title)) + 8) + 8
    picture = Image.new("RGB", (picture_w, rows * cell_h + head + 4), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, 6), title, fill="black", font=font)
    for place, index in enumerate(order):
        if index is None:
            continue
        tile = draw_image(images[index]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        left, top = place % columns * cell_w + 8, place // columns * cell_h + head
        picture.paste(tile, (left, top))
        name = shortened(classes[labels[index]], font, width * scale)
        draw.text((left, top + height * scale + 2), name, fill="black", font=font)
    return picture


def shortened(text, font, width):
    """As much of a text as fits into so many pixels."""
    if font.getlength(text) <= width:
        return text
    return next((text[:end] + "…" for end in range(len(text) - 1, 0, -1) if font.getlength(text[:end] + "…") <= width),
                "")


def clip(images, deviations=2.5):
    """Images with values beyond so many standard deviations from the mean cut off, as in MTT's pictures."""
    mean, std = images.mean(), images.std()
    return images.clamp(mean - deviations * std, mean + deviations * std)


def save_picture(folder, name, picture, **options):
    files.write_whole(folder / name, lambda file: picture.save(file, format=name.rsplit(".")[-1], **options))


def save_animation(folder):
    """`animation.gif` of the run's grids, from the first iteration to the last."""
    first, *others = sorted(folder.glob("grid_*.png"))
    frames = (Image.open(path).convert("RGB") for path in others)  # opened one by one: with many images each is large
    save_picture(folder, "animation.gif", Image.open(first).convert("RGB"), save_all=True, append_images=frames,
                 duration=[200] * len(others) + [2000], loop=0)


def save_curves(folder, title, losses, rows, baselines):
    """`curves.png`: accuracy, matching loss and α against the iteration.

    losses     of each iteration
    rows       evaluations of the synthetic images
    baselines  evaluations of random real images
    """
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    figure.suptitle(title)
    accuracy, loss, alpha = figure.subplots(1, 3)
    iterations = [row["iteration"] for row in rows]
    for number, network in enumerate(rows[-1]["scores"]):
        for part, style in (("test", "-"), ("val", "--")):
            values = [getattr(row["scores"][network], part) for row in rows]
            if values[0]:
                mean, std = 100 * np.mean(values, 1), 100 * np.std(values, 1)
                name = {"test": "test", "val": "validation"}[part]
                accuracy.plot(iterations, mean, style, color=f"C{number}", marker=".", label=f"{network}, {name}")
                accuracy.fill_between(iterations, mean - std, mean + std, color=f"C{number}", alpha=0.12, linewidth=0)
        real = 100 * np.mean(baselines[0]["scores"][network].test)
        accuracy.axhline(real, color=f"C{number}", linestyle=":", label=f"{network}, random real images, test")
    accuracy.set(xlabel="iteration", ylabel="accuracy, % (mean ± std of the networks)")
    accuracy.legend(fontsize="small")
    window = max(1, len(losses) // 50)
    loss.plot(losses, color="C0", alpha=0.3 if window > 1 else 1, linewidth=0.8, label="each iteration")
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        loss.plot(np.arange(len(smooth)) + window // 2, smooth, color="C0", label=f"mean of {window}")
    loss.axhline(1, color="grey", linestyle=":", label="a student that does not move")
    loss.set(xlabel="iteration", ylabel="matching loss")
    loss.legend(fontsize="small")
    alpha.plot(iterations, [row["syn_lr"] for row in rows], marker=".")
    alpha.set(xlabel="iteration", ylabel="α, the learned step size")
    for axis in (accuracy, loss, alpha):
        axis.grid(alpha=0.3)
    files.write_whole(folder / "curves.png", lambda file: figure.savefig(file, format="png", dpi=100))


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases


def logged_in():
    """Whether wandb knows an account, on this machine or by its environment."""
    try:
        return wandb.login(prompt=False, verify=False)
    except Exception as error:
        warnings.warn(f"wandb cannot log in: {first_line(error)}")
        return False


class Dashboard:
    """A run on Weights & Biases that never asks anything, and never ends the script: what fails is a warning.

    Online when logged in and reachable, else offline, in `folder`/wandb. A `run_id` that has been used before continues
    that run. `axis` is the key that all others are drawn against.
    """

    def __init__(self, folder, name, config, axis, *, mode, project, entity, run_id=None, group=None):
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))  # instead of the home directory
        self.folder, self.run = folder / "wandb", None
        options = {"dir": folder, "name": name, "config": config, "project": project, "entity": entity, "group": group,
                   "id": run_id, "resume": "allow" if run_id else None, "reinit": "finish_previous",
                   "settings": wandb.Settings(silent=True, init_timeout=30)}
        wished = mode or os.environ.get("WANDB_MODE")
        if wished in (None, "online") and not logged_in():
            if wished:
                warnings.warn(f"--wandb_mode={wished}, but nobody is logged in (wandb login): logging offline")
            wished = "offline"
        for mode in dict.fromkeys((wished or "online", "offline")):
            try:
                self.run = wandb.init(mode=mode, **options)
                break
            except Exception as error:  # wandb's own, or of what WANDB_... variables hold, or of its service
                warnings.warn(f"wandb cannot start in mode {mode}: {first_line(error)}")
        self.attempt(lambda run: run.define_metric(axis))
        self.attempt(lambda run: run.define_metric("*", step_metric=axis))

    def attempt(self, call):
        """Call `call` with wandb's run, if there is one; where it fails, warn, and go on without wandb."""
        try:
            if self.run:
                call(self.run)
        except Exception as error:
            warnings.warn(f"wandb failed, going on without: {first_line(error)}")
            self.run = None

    def place(self, instead):
        """Where to look, in a line; `instead` says where without an account."""
        if not self.run:
            return "no wandb"
        if self.run.settings.mode == "offline":
            wandb_command = "wandb" if shutil.which("wandb") else Path(sys.executable).with_name("wandb")
            return (f"wandb logs offline; to upload: {wandb_command} sync {self.folder}/offline-run-*; without an "
                    f"account, {instead}")
        return f"wandb: {self.run.url or 'disabled'}"

    def log(self, values, step):
        self.attempt(lambda run: run.log(values, step=step))

    def finish(self, **summary):
        """End the run, with what the table of runs shall show of it."""
        self.attempt(lambda run: run.summary.update(summary))
        self.attempt(lambda run: run.finish())


def picture_log(image_syn, label_syn, data: Data, title, pictures):
    """MTT's wandb keys for the images: a histogram; with `pictures` also the tensors, as they are and whitening undone.
    """
    log = {"Pixels": wandb.Histogram(image_syn)}
    if not pictures:
        return log
    log["Synthetic_Pixels"] = log["Pixels"]
    caption = f"{title}: {', '.join(dict.fromkeys(data.classes[label] for label in label_syn))}"
    views = {"Synthetic": image_syn} | ({"Reconstructed": data.to_pixels(image_syn)} if data.zca else {})
    for name, images in views.items():
        log[f"{name}_Images"] = wandb.Image(draw_grid(images, label_syn, title, data.classes), caption=caption)
        log[f"Clipped_{name}_Images/std_2.5"] = wandb.Image(
            draw_grid(clip(images), label_syn, title, data.classes), caption=caption)
    if data.zca:
        log["Reconstructed_Pixels"] = wandb.Histogram(views["Reconstructed"])
    return log
