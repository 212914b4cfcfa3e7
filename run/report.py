"""A run as tables, pictures and curves."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from datasets.bands import RED_GREEN_BLUE
from run.scores import spread
from system import files, process
from system.process import ReportedError

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


def closing_table(rows):
    """A table of rows with a title, α (None: unknown), and scores by network.

    Scores are `scores.Scores`, or text.
    """
    lines = [("trained on", "α", "network", f"{'validation':^16}   {'test':^16}")]
    for title, alpha, scores in rows:
        alpha = "" if alpha is None else f"{alpha:.5f}"
        lines += [(title, alpha, network, score) for network, score in scores.items()]
    width = max(27, *(len(title) for title, *_ in lines))
    return "\n".join(f"{row[0]:{width}} {row[1]:>8}   {row[2]:12} {row[3]}" for row in lines)


def memory_line(peaks):
    """A line for the peak memory of each rank, in bytes."""
    return f"Peak memory by rank: {', '.join(f'{(peak or 0) / 1e9:.2f}' for peak in peaks)} GB"


# --------------------------------------------------------------------------------------------------
# Pictures

MAX_SIDE = 30_000  # of a picture, in pixels: GIF allows 65,535
MAX_PIXELS = 30_000_000  # Pillow warns from 90 million on


def clip(images, deviations=2.5):
    """Images clipped at so many standard deviations from the mean, as in MTT."""
    mean, std = images.mean(), images.std()
    return images.clamp(mean - deviations * std, mean + deviations * std)


@dataclass(frozen=True)
class View:
    """The bands that pictures show as red, green and blue.

    low, high  the pixels that are drawn as 0 and as 1, (3, 1, 1); None: images are RGB already
    """

    channels: tuple = (0, 1, 2)
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None

    @property
    def is_stretched(self):
        return self.low is not None

    def of_pixels(self, pixels):
        """Pixels (B, C, H, W) as (B, 3, H, W) to be drawn: RGB clipped, bands stretched."""
        if not self.is_stretched:
            return clip(pixels)
        shown = pixels[:, list(self.channels)]
        return ((shown - self.low) / (self.high - self.low)).clamp(0, 1)


RGB_VIEW = View()
PERCENTILES = (2, 98)  # of real images: QGIS's default, and common in remote sensing
SAMPLE = 1000  # training images that percentiles are computed from, at most


def view_of(data, show_bands):
    """The `View` of a data set; `show_bands` are three of its bands, joined by commas, or None.

    Raises ReportedError if they are not.
    """
    names = data.settings.get("bands")
    if names is None:
        return RGB_VIEW
    chosen = [names.index(name) for name in shown_bands(names, show_bands)]
    images = data.train[0]
    pixels = data.to_pixels(images[:: -(-len(images) // SAMPLE)])[:, chosen]
    ends = np.percentile(pixels.numpy(), PERCENTILES, axis=(0, 2, 3))  # (2, 3)
    low, high = torch.from_numpy(ends.astype(np.float32)).view(2, 3, 1, 1)
    return View(tuple(chosen), low, torch.where(high > low, high, low + 1))


def shown_bands(names, show_bands):
    """The three of the bands `names` that are shown: true colours where they are there."""
    if show_bands is None:
        if set(RED_GREEN_BLUE) <= set(names):
            return RED_GREEN_BLUE
        last = len(names) - 1
        return tuple(names[min(place, last)] for place in range(3))  # of fewer, the last again
    chosen = show_bands.split(",")
    if len(chosen) != 3 or not set(chosen) <= set(names):
        raise ReportedError(
            f"--show_bands={show_bands}: name three of the bands in use, {', '.join(names)}"
        )
    return chosen


def draw_image(image, pixels=False):
    """A picture of an image (3, H, W), scaled to its own range.

    With `pixels`, the range is at least [0, 1], so that real images have their true colours.
    """
    low, high = image.min(), image.max()
    if pixels:
        low, high = low.clamp(max=0), high.clamp(min=1)
    image = (image - low) / (high - low).clamp(min=1e-8)
    return Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy())


def draw_grid(images, names, title, pixels=False):
    """A picture of images (B, 3, H, W) in their order, each as `draw_image` scales it.

    Rows of ten, or of five for up to ten images. `names` has a text for each. The title says if a
    picture of all images would be too large.
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
        ImageDraw.Draw(tile).text((0, height * scale + 2), names[index], fill="black", font=font)
        row, column = divmod(index, columns)
        picture.paste(tile, (gap + column * cell_w, head + row * cell_h))
    return picture


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


@dataclass(frozen=True)
class Curves:
    """The content of curves.png."""

    title: str
    rows: list  # comparable evaluations, oldest first
    baselines: list  # evaluations of random real images
    losses: list  # of each iteration
    loss_title: str
    standstill: float | None  # the loss of a student that does not move, if known


def save_curves(path, curves):
    """Draw accuracy, loss and α against the iteration."""
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    figure.suptitle(curves.title)
    accuracy, loss, alpha = figure.subplots(1, 3)
    plot_accuracy(accuracy, curves.rows, curves.baselines)
    plot_loss(loss, curves)
    iterations = [row["iteration"] for row in curves.rows]
    alpha.plot(iterations, [row["syn_lr"] for row in curves.rows], marker=".")
    alpha.set(xlabel="iteration", ylabel="α, the step size")
    for axis in (accuracy, loss, alpha):
        axis.grid(alpha=0.3)
    save_figure(path, figure)


def save_figure(path, figure):
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
        if not baselines:
            continue
        real = 100 * np.mean(baselines[0]["scores"][network].test)
        label = f"{network}, random real images, test"
        axis.axhline(real, color=color, linestyle=":", label=label)
    axis.set(xlabel="iteration", ylabel="accuracy, % (mean ± std of the networks)")
    axis.legend(fontsize="small")


def plot_loss(axis, curves):
    losses = curves.losses
    window = max(1, len(losses) // 50)
    opacity = 0.3 if window > 1 else 1
    axis.plot(losses, color="C0", alpha=opacity, linewidth=0.8, label="each iteration")
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        middle = np.arange(len(smooth)) + window // 2
        axis.plot(middle, smooth, color="C0", label=f"mean of {window}")
    if curves.standstill is not None:
        axis.axhline(
            curves.standstill, color="grey", linestyle=":", label="a student that does not move"
        )
    axis.set(xlabel="iteration", ylabel=curves.loss_title)
    axis.legend(fontsize="small")
