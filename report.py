"""How a run is shown: tables, pictures, curves."""

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import files
import process
from scores import spread, to_json

# --------------------------------------------------------------------------------------------------
# Tables

EVALUATION_HEADER = (
    f"{'iteration':>9} {'network':12} {'validation':^16}   {'test':^16}   "
    f"{'α':>8}  {'loss':>6}  {'time':>8}"
)


def evaluation_lines(row):
    """An evaluation under EVALUATION_HEADER, a line per network."""
    loss = "" if row["loss"] is None else f"{row['loss']:6.4f}"
    rest = f"{row['syn_lr']:8.5f}  {loss:>6}  {process.duration(row['seconds']):>8}"
    return "\n".join(
        f"{row['iteration']:9d} {network:12} {scores}   {rest}"
        for network, scores in row["scores"].items()
    )


def scores_table(scores, classes):
    """A table of each network's scores: overall, and on each of the `classes` (names)."""
    lines = [f"{'network':22} {'validation':^16}   {'test':^16}"]
    lines += [f"{network:22} {score}" for network, score in scores.items()]
    names = "   ".join(f"{network:16}" for network in scores)
    lines += ["", f"{'test, by class':22} {names}"]
    for label, name in enumerate(classes):
        parts = ([of_network[label] for of_network in s.classes] for s in scores.values())
        columns = "   ".join(f"{spread(part):16}" for part in parts)
        lines.append(f"{name:22} {columns}".rstrip())
    return "\n".join(lines)


def opening(run, inputs, state):
    """What a run prints first."""
    it = len(state.losses)
    if state.finished:
        return f"finished before, at iteration {it}; to start from scratch, remove {run.folder}"
    experts = len(inputs.experts.members)
    lines = [
        f"synthetic images: {len(state.images)}, experts: {experts}; results in {run.folder}",
        run.dashboard.where_to_look(),
    ]
    if state.seconds_before:
        lines.append(f"resuming at iteration {it}; to start from scratch, remove {run.folder}")
    return "\n".join([*lines, EVALUATION_HEADER])


def closing_table(run, inputs, state):
    """What networks learn from real images, from the distilled ones, and from all real ones."""
    best = state.evaluations.best
    rows = [("trained on", "α", "network", f"{'validation':^16}   {'test':^16}")]
    count = len(state.images)
    of_tiles = f" of {tiles} tiles" if (tiles := len(state.label_syn) // count) > 1 else ""
    kinds = [f"{count} random real images{of_tiles}", "the same, at the learned α"]
    kinds = [*kinds[: len(state.baselines)], f"{count} distilled images{of_tiles}"]
    rows_of = zip(kinds, [*state.baselines, best])
    for images, row in rows_of:
        for network, scores in row["scores"].items():
            rows.append((images, f"{row['syn_lr']:.5f}", network, scores))
    if accuracies := inputs.experts.test_accuracies:
        images = f"all {len(inputs.data.train[1])} training images"
        rows.append((images, "", "(experts)", f"{'':16}   {spread(accuracies)}"))
    width = max(27, *(len(images) for images, *_ in rows))
    lines = [f"{row[0]:{width}} {row[1]:>8}   {row[2]:12} {row[3]}" for row in rows]
    names = "images_best.pt, curves.png, animation.gif, results.json, ..."
    return "\n".join(
        ["", f"Best iteration: {best['iteration']}", *lines, f"Files: {run.folder} ({names})"]
    )


def memory_line(peaks):
    """A line for the peak memory of each rank, in bytes."""
    return f"Peak memory by rank: {', '.join(f'{(peak or 0) / 1e9:.2f}' for peak in peaks)} GB"


def save_results(run, inputs, state):
    """results.json: settings, versions, all evaluations, and what they are compared with."""
    results = {
        "settings": run.settings,
        "data": inputs.data.settings,
        "experts": len(inputs.experts.members),
        "versions": process.versions(),
        "device": process.describe(state.label_syn.device, run.settings["amp"]),
        "best_iteration": state.evaluations.best["iteration"],
        "evaluations": to_json(state.evaluations.rows),
        "random_real": to_json(state.baselines),
        "experts_test_accuracy": inputs.experts.test_accuracies,
    }
    files.write_json(run.folder / "results.json", results)


# --------------------------------------------------------------------------------------------------
# Pictures

MAX_SIDE = 30_000  # of a picture, in pixels: GIF allows 65,535
MAX_PIXELS = 30_000_000  # Pillow warns from 90 million on


def clip(images, deviations=2.5):
    """Images clipped at so many standard deviations from the mean, as in MTT."""
    mean, std = images.mean(), images.std()
    return images.clamp(mean - deviations * std, mean + deviations * std)


def draw_image(image, pixels=False):
    """A picture of an image (3, H, W), scaled to its own range.

    With `pixels`, the range is at least [0, 1], so that real images have their true colours.
    """
    low, high = image.min(), image.max()
    if pixels:
        low, high = low.clamp(max=0), high.clamp(min=1)
    image = (image - low) / (high - low).clamp(min=1e-8)
    return Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy())


def draw_grid(images, labels, title, classes, pixels=False):
    """A labelled picture of images (B, 3, H, W) in their order, each as `draw_image` scales it.

    Rows of ten, or of five for up to ten images. `classes` names the labels (B,). The title says if
    a picture of all images would be too large.
    """
    few = len(images) <= 10
    columns = 5 if few else 10
    height, width = images.shape[2:]
    scale = max(1, (192 if few else 128) // height)
    gap, line, head = 8, 20, 26  # in pixels: between tiles, under one, above all
    cell_w, cell_h = width * scale + gap, height * scale + line
    room = min(MAX_SIDE, MAX_PIXELS // (columns * cell_w)) // cell_h
    rows = min(-(-len(images) // columns), max(1, room))
    shown = min(len(images), rows * columns)
    if shown < len(images):
        title += f", {shown} of {len(images)} images"
    title += "" if pixels else "; each image in its own range"

    font = ImageFont.load_default(size=12)
    picture_w = gap + max(columns * cell_w, int(font.getlength(title)))
    picture = Image.new("RGB", (picture_w, head + rows * cell_h), "white")
    ImageDraw.Draw(picture).text((gap, 6), title, fill="black", font=font)
    for index in range(shown):
        tile = Image.new("RGB", (width * scale, cell_h), "white")  # cuts names that are too long
        image = draw_image(images[index], pixels)
        tile.paste(image.resize((width * scale, height * scale), Image.Resampling.NEAREST))
        name = classes[labels[index]]
        ImageDraw.Draw(tile).text((0, height * scale + 2), name, fill="black", font=font)
        row, column = divmod(index, columns)
        picture.paste(tile, (gap + column * cell_w, head + row * cell_h))
    return picture


def progress(state, iterations):
    """The remaining iterations, one more than the updates, with a bar on a terminal."""
    done = len(state.losses)
    numbers = range(done, iterations + 1)
    bar = {"initial": done, "total": iterations, "desc": "distilling", "unit": "iterations"}
    return process.progress(numbers, **bar)


def run_title(run):
    return f"{run.settings['dataset']}, {run.settings['model']}"


def save_images(run, data, state):
    """Save a picture of the synthetic images and, if `is_kept`, their tensors."""
    it = len(state.losses)
    images = state.images.cpu()
    labels = classes_in_order(images, state)
    pixels = clip(data.to_pixels(images))
    title = f"{run_title(run)}, iteration {it}"
    grid = draw_grid(pixels, labels, title, data.classes, pixels=True)
    save_picture(run.folder / f"grid_{it:06d}.png", grid)
    if is_kept(run, state):
        # Bare tensors: images_*.pt and labels_*.pt are what MTT's tools read.
        syn_lr = torch.tensor(state.alpha)
        tensors = {"images": images, "labels": state.labels.cpu(), "syn_lr": syn_lr}
        if data.zca:
            tensors["images_zca"] = data.to_pixels(images)
        tags = [it, "best"] if state.evaluations.latest_is_best else [it]
        for name, tensor in tensors.items():
            for tag in tags:
                files.write_tensors(run.folder / f"{name}_{tag}.pt", tensor.clone())


def classes_in_order(images, state):
    """The class of each image (K,), from those of its tiles."""
    return state.label_syn[:: len(state.label_syn) // len(images)].cpu()


def is_kept(run, state):
    """Whether images are kept: at a new best, every 1000 iterations, and at the end."""
    it = len(state.losses)
    is_last = it == run.settings["Iteration"]
    return state.evaluations.latest_is_best or it % 1000 == 0 or is_last


def save_picture(path, picture, **options):
    kind = path.suffix.removeprefix(".")
    files.write_whole(path, lambda file: picture.save(file, format=kind, **options))


def save_animation(folder):
    """`animation.gif` of a run's grids, from the first iteration to the last."""
    first, *others = sorted(folder.glob("grid_*.png"))
    # Opened one by one, since they are large.
    frames = (Image.open(path).convert("RGB") for path in others)
    save_picture(
        folder / "animation.gif",
        Image.open(first).convert("RGB"),
        save_all=True,
        append_images=frames,
        duration=[200] * len(others) + [2000],
        loop=0,
    )


# --------------------------------------------------------------------------------------------------
# Curves


def save_curves(run, state):
    """`curves.png`: accuracy, matching loss and α against the iteration."""
    rows = state.evaluations.comparable
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    ipc, seed = run.settings["ipc"], run.settings["seed"]
    figure.suptitle(f"{run_title(run)}, images per class: {ipc}, seed {seed}")
    accuracy, loss, alpha = figure.subplots(1, 3)
    plot_accuracy(accuracy, rows, state.baselines)
    plot_loss(loss, state.losses, run.settings["objective"])
    alpha.plot([row["iteration"] for row in rows], [row["syn_lr"] for row in rows], marker=".")
    alpha.set(xlabel="iteration", ylabel="α, the learned step size")
    for axis in (accuracy, loss, alpha):
        axis.grid(alpha=0.3)
    path = run.folder / "curves.png"
    files.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))


def plot_accuracy(axis, rows, baselines):
    iterations = [row["iteration"] for row in rows]
    for number, network in enumerate(rows[-1]["scores"]):
        color = f"C{number}"
        for part, name, style in (("test", "test", "-"), ("val", "validation", "--")):
            values = [getattr(row["scores"][network], part) for row in rows]
            if not values[0]:
                continue
            mean = np.array([100 * np.mean(accuracies) for accuracies in values])
            std = np.array([100 * np.std(accuracies) for accuracies in values])
            label = f"{network}, {name}"
            axis.plot(iterations, mean, style, color=color, marker=".", label=label)
            band = {"color": color, "alpha": 0.12, "linewidth": 0}
            axis.fill_between(iterations, mean - std, mean + std, **band)
        real = 100 * np.mean(baselines[0]["scores"][network].test)
        label = f"{network}, random real images, test"
        axis.axhline(real, color=color, linestyle=":", label=label)
    axis.set(xlabel="iteration", ylabel="accuracy, % (mean ± std of the networks)")
    axis.legend(fontsize="small")


def plot_loss(axis, losses, objective):
    window = max(1, len(losses) // 50)
    opacity = 0.3 if window > 1 else 1
    axis.plot(losses, color="C0", alpha=opacity, linewidth=0.8, label="each iteration")
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        middle = np.arange(len(smooth)) + window // 2
        axis.plot(middle, smooth, color="C0", label=f"mean of {window}")
    if objective == "trajectory":
        axis.axhline(1, color="grey", linestyle=":", label="a student that does not move")
    name = {"trajectory": "matching loss", "loss": "loss on real images"}[objective]
    axis.set(xlabel="iteration", ylabel=name)
    axis.legend(fontsize="small")
