"""The task `size`: kilobytes of a set in several formats, and what networks learn from each.

Every format is encoded for real, decoded again, and trained on. Labels count: hard ones take a byte
each, and probabilities four or two bytes each. The weights of two networks stand beside them.
"""

import io
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from networks import get_network
from run.scores import spread
from system import process
from uses.study import Outcome, new_figure

KILOBYTE = 1000  # bytes
COLOURS = 3  # channels of a picture for people
WEIGHTS = ("ConvNetW32", "ResNet18")

# --------------------------------------------------------------------------------------------------
# Formats


class Encoded(NamedTuple):
    """A tensor as bytes."""

    parts: list  # of bytes
    shape: tuple

    @property
    def size(self):
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class Floats:
    """Plain numbers of a type, without a header."""

    dtype: torch.dtype

    def encode(self, tensor):
        return Encoded([tensor.to(self.dtype).numpy().tobytes()], tensor.shape)

    def decode(self, encoded):
        """A tensor of this shape, float32."""
        numbers = torch.frombuffer(bytearray(encoded.parts[0]), dtype=self.dtype)
        return numbers.view(encoded.shape).float()


@dataclass(frozen=True)
class Pictures:
    """A file of 8 bits per channel for each image, as Pillow writes it.

    Images of other than three channels take a grey picture for each channel. The smallest number of
    all images is 0 and the largest 255. These two come first, in float32.
    """

    kind: str  # Pillow's name
    options: dict

    def encode(self, images):
        """Encode images (N, C, H, W)."""
        low, high = images.min(), images.max()
        levels = (images - low) / (high - low).clamp(min=1e-8) * 255
        parts = [torch.stack([low, high]).numpy().tobytes()]
        levels = levels.round().byte()
        in_colour = images.shape[1] == COLOURS
        levels = levels.permute(0, 2, 3, 1) if in_colour else levels.flatten(0, 1)
        for pixels in levels.numpy():  # (H, W, 3) or (H, W)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, self.kind, **self.options)
            parts.append(file.getvalue())
        return Encoded(parts, images.shape)

    def decode(self, encoded):
        """Images (N, C, H, W), float32."""
        ends, *pictures = encoded.parts
        low, high = np.frombuffer(ends, dtype=np.float32).tolist()
        arrays = [np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures]
        pixels = torch.from_numpy(np.stack(arrays))
        in_colour = encoded.shape[1] == COLOURS
        pixels = pixels.permute(0, 3, 1, 2) if in_colour else pixels.view(encoded.shape)
        return pixels.float() / 255 * (high - low) + low


class Format(NamedTuple):
    """A form in which a set can be sent."""

    images: object
    labels: Floats  # of probabilities


HALF = Floats(torch.float16)
FORMATS = {
    "float32": Format(Floats(torch.float32), Floats(torch.float32)),
    "float16": Format(HALF, HALF),
    "PNG, 8 bit": Format(Pictures("png", {"optimize": True}), HALF),
    "JPEG, quality 95": Format(Pictures("jpeg", {"quality": 95, "subsampling": 0}), HALF),
    "JPEG, quality 75": Format(Pictures("jpeg", {"quality": 75}), HALF),
}


def sent(training_set, form):
    """A `TrainingSet` as it arrives in a `Format`, and the bytes that it takes."""
    device = training_set.images.device
    encoded = form.images.encode(training_set.images.cpu())
    images, size, labels = form.images.decode(encoded), encoded.size, training_set.labels
    if labels.is_floating_point():
        encoded = form.labels.encode(labels.cpu())
        labels = form.labels.decode(encoded)
        labels = labels / labels.sum(-1, keepdim=True)
        size += encoded.size
    else:
        size += len(labels) * (1 if labels.max() < 256 else 2)
    arrived = replace(training_set, images=images.to(device), labels=labels.to(device))
    return arrived, size


# --------------------------------------------------------------------------------------------------
# The task


@dataclass(frozen=True)
class Row:
    """A form of a set, its size, and the accuracy that it gives."""

    title: str
    size: int  # bytes
    val: list
    test: list  # of each network; empty: unknown

    @property
    def kilobytes(self):
        return self.size / KILOBYTE

    @property
    def per_kilobyte(self):
        """Percent of test accuracy for each kilobyte; None if unknown."""
        return 100 * float(np.mean(self.test)) / self.kilobytes if self.test else None


def compare_formats(study):
    """Train networks on the set as it arrives in each format."""
    chosen = study.distilled.with_alpha(study.key)
    rows = []
    for title, form in FORMATS.items():
        arrived, count = sent(chosen, form)
        scores = arrived.scores(study.key)
        rows.append(Row(title, count, scores.val, scores.test))
        process.write_line(f"{title:18} {rows[-1].kilobytes:10.1f} kB   {spread(scores.test)}")
    rows += weights(study)
    content = [vars(r) | {"kB": r.kilobytes, "percent_per_kB": r.per_kilobyte} for r in rows]
    content = {"syn_lr": chosen.alpha, "rows": content}
    return Outcome(table_of(rows), content, picture_of(rows))


def weights(study):
    """A `Row` for the weights of each network that takes such images, as float32.

    Accuracy is the experts', where there are some of the same network.
    """
    form = study.data.form
    rows = []
    for name in WEIGHTS:
        try:
            network = get_network(name, form.channels, form.num_classes, form.im_size)
        except ValueError:  # of another side
            continue
        known = study.experts.test_accuracies if name == study.model else []
        count = sum(p.numel() * p.element_size() for p in network.parameters())
        rows.append(Row(f"weights, {name}", count, [], known))
    return rows


def table_of(rows):
    """Kilobytes, accuracy, and accuracy per kilobyte: a row for each format."""
    lines = [f"{'sent as':22} {'kB':>10}   {'test accuracy':16}   {'% per kB':>8}"]
    for row in rows:
        rate = "" if row.per_kilobyte is None else f"{row.per_kilobyte:8.3f}"
        lines.append(f"{row.title:22} {row.kilobytes:10.1f}   {spread(row.test):16}   {rate}")
    return "\n".join(line.rstrip() for line in lines)


def picture_of(rows):
    """A Figure of accuracy against kilobytes; a line where the accuracy is unknown."""
    figure = new_figure(7, 4)
    axis = figure.subplots()
    for number, row in enumerate(rows):
        color = f"C{number}"
        if row.test:
            mean, error = 100 * np.mean(row.test), 100 * np.std(row.test)
            style = {"fmt": "o", "capsize": 3, "color": color}
            axis.errorbar(row.kilobytes, mean, error, label=row.title, **style)
        else:
            axis.axvline(row.kilobytes, linestyle=":", color=color, label=row.title)
    axis.set(xscale="log", xlabel="kilobytes", ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure
