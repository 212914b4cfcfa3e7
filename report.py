"""What a person sees of a run: pictures, and pages on Weights & Biases."""

import os
import warnings

import wandb
from PIL import Image, ImageDraw, ImageFont

import files
from files import ReportedError, first_line
from utils import CLASS_NAMES, Data

# ---------------------------------------------------------------------------------------------------------------------
# Pictures and files


def draw_grid(images, labels, title):
    """A labelled picture of images (B, 3, H, W), each scaled to its own range: a column per class, or rows of five."""
    count, _, height, width = images.shape
    columns = 5 if count == len(CLASS_NAMES) else len(CLASS_NAMES)
    rows = -(-count // columns)
    scale = max(1, (192 if columns == 5 else 128) // height)
    cell_w, cell_h, head = width * scale + 8, height * scale + 22, 26
    picture = Image.new("RGB", (columns * cell_w + 8, rows * cell_h + head + 4), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    draw.text((8, 6), title, fill="black", font=font)
    # The images are ordered by class: five columns take them as they come, ten take each class down a column.
    order = range(count) if columns == 5 else [c * rows + r for r in range(rows) for c in range(columns)]
    for place, index in enumerate(order):
        image = images[index] - images[index].min()
        pixels = (image / image.max().clamp(min=1e-8) * 255).byte().permute(1, 2, 0).numpy()
        tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        left, top = place % columns * cell_w + 8, place // columns * cell_h + head
        picture.paste(tile, (left, top))
        draw.text((left, top + height * scale + 2), CLASS_NAMES[labels[index]], fill="black", font=font)
    return picture


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


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases


def start_wandb(folder, run_id, config, mode, project, entity):
    """A wandb run that never asks and never fails the run: online when logged in and reachable, else offline.

    A `run_id` that has been used before continues that run.
    """
    mode = mode or os.environ.get("WANDB_MODE")
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))  # instead of the home directory
    options = {"dir": folder, "config": config, "project": project, "entity": entity, "name": folder.name,
               "id": run_id, "resume": "allow", "settings": wandb.Settings(silent=True, init_timeout=30)}
    try:
        if mode in (None, "online") and not wandb.login(prompt=False, verify=False):
            if mode == "online":
                warnings.warn("--wandb_mode=online, but nobody is logged in (wandb login): logging offline")
            mode = "offline"
        run = wandb.init(mode=mode or "online", **options)
    except (wandb.Error, ValueError) as error:  # ValueError: of what WANDB_... variables may hold
        warnings.warn(f"wandb cannot go online ({first_line(error)}): logging offline")
        try:
            run = wandb.init(mode="offline", **options)
        except (wandb.Error, ValueError) as error:
            raise ReportedError(f"wandb: {first_line(error)} (--wandb_mode=disabled does without)") from None
    if run.settings.mode == "offline":
        print(f"wandb logs offline; to upload: wandb sync {folder / 'wandb'}/offline-run-*")
    elif run.url:
        print(f"wandb: {run.url}")
    return run


def picture_log(image_syn, label_syn, data: Data, title, pictures):
    """MTT's wandb keys for the images: a histogram; with `pictures` also the tensors, as they are and whitening undone.
    """
    log = {"Pixels": wandb.Histogram(image_syn)}
    if not pictures:
        return log
    log["Synthetic_Pixels"] = log["Pixels"]
    views = {"Synthetic": image_syn} | ({"Reconstructed": data.to_pixels(image_syn)} if data.zca else {})
    for name, images in views.items():
        log[f"{name}_Images"] = wandb.Image(draw_grid(images, label_syn, title))
        log[f"Clipped_{name}_Images/std_2.5"] = wandb.Image(draw_grid(clip(images), label_syn, title))
    if data.zca:
        log["Reconstructed_Pixels"] = wandb.Histogram(views["Reconstructed"])
    return log
