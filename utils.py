"""Seeds, augmentation and batches, for both scripts."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import scipy.ndimage
import torch
from torch.nn import functional as F

from networks import get_network
from system.process import ReportedError

# --------------------------------------------------------------------------------------------------
# Seeding


def make_generator(*key):
    """A CPU generator whose stream follows from `key` (numbers and words) alone.

    All random numbers are drawn on the CPU, so that a seed means the same on every device.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def initial_network(model, form, generator, device):
    """A fresh network called `model`, with weights drawn from `generator`.

    `form` is the `preprocessing.Form` of the images. Raises ReportedError for an unknown name, and
    for a side that does not fit.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator))
    # PyTorch's layers initialise themselves from the global generator, which is then restored.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network = get_network(model, form.channels, form.num_classes, form.im_size)
            return network.to(device)
        except ValueError as error:
            raise ReportedError(f"--model={model}: {error}") from None


# --------------------------------------------------------------------------------------------------
# DSA (Zhao & Bilen 2021, "Dataset Condensation with Differentiable Siamese Augmentation")
#
# Each group is two functions. One draws its parameters on the CPU, (B, ...) each, in the order of
# MTT's code. The other applies them, differentiably in the images x (B, C, H, W).

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"


def window(x, rows, cols, fill=0.0):
    """Images with pixels x[b, :, rows[b, i], cols[b, j]], or `fill` where that is outside x."""
    _, channels, height, width = x.shape
    inside_rows = (rows >= 0) & (rows < height)  # (B, H')
    inside_cols = (cols >= 0) & (cols < width)  # (B, W')
    inside = inside_rows[:, None, :, None] & inside_cols[:, None, None, :]
    rows = rows.clamp(0, height - 1)[:, None, :, None]
    cols = cols.clamp(0, width - 1)[:, None, None, :]
    x = x.gather(2, rows.expand(-1, channels, -1, width))  # (B, C, H', W)
    x = x.gather(3, cols.expand(-1, channels, x.shape[2], -1))  # (B, C, H', W')
    return torch.where(inside, x, fill)


def sample_affine(x, matrices):
    """`x` sampled bilinearly at affine maps (B, 2, 3) of the output grid; zeros outside."""
    grid = F.affine_grid(matrices.to(x.dtype), x.shape, align_corners=True)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def draw_color(batch, size, generator):
    return tuple(torch.rand(batch, 1, 1, 1, generator=generator) for _ in range(3))


def apply_color(x, brightness, saturation, contrast):
    x = x + (brightness - 0.5)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (2 * saturation) + mean
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def draw_crop(batch, size, generator):
    shift = int(size / 8 + 0.5)
    return tuple(
        torch.randint(-shift, shift + 1, (batch, 1), generator=generator) for _ in range(2)
    )


def apply_crop(x, shift_rows, shift_cols):
    rows, cols = (torch.arange(size, device=x.device) for size in x.shape[2:])
    return window(x, rows + shift_rows, cols + shift_cols)


def draw_cutout(batch, size, generator):
    side = int(size / 2 + 0.5)
    last = size - side % 2
    return tuple(torch.randint(0, last + 1, (batch, 1), generator=generator) for _ in range(2))


def apply_cutout(x, centre_row, centre_col):
    def cut(size, centre):  # (B, size)
        side = int(size / 2 + 0.5)
        first = centre - side // 2
        index = torch.arange(size, device=x.device)
        return (index >= first) & (index < first + side)

    rows, cols = cut(x.shape[2], centre_row), cut(x.shape[3], centre_col)
    return x.masked_fill(rows[:, None, :, None] & cols[:, None, None, :], 0)


def draw_flip(batch, size, generator):
    return (torch.rand(batch, 1, 1, 1, generator=generator),)


def apply_flip(x, chance):
    return torch.where(chance < 0.5, x.flip(3), x)


def draw_scale(batch, size, generator):
    low, high = 1 / 1.2, 1.2
    return tuple(torch.rand(batch, generator=generator) * (high - low) + low for _ in range(2))


def apply_scale(x, scale_x, scale_y):
    zero = torch.zeros_like(scale_x)
    matrices = torch.stack([scale_x, zero, zero, zero, scale_y, zero], dim=1)
    return sample_affine(x, matrices.view(-1, 2, 3))


def draw_rotate(batch, size, generator):
    return ((torch.rand(batch, generator=generator) - 0.5) * 2 * 15 / 180 * math.pi,)


def apply_rotate(x, angle):
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1)
    return sample_affine(x, matrices.view(-1, 2, 3))


AUGMENTATIONS = {
    "color": (draw_color, apply_color),
    "crop": (draw_crop, apply_crop),
    "cutout": (draw_cutout, apply_cutout),
    "flip": (draw_flip, apply_flip),
    "scale": (draw_scale, apply_scale),
    "rotate": (draw_rotate, apply_rotate),
}


def diff_augment(x, strategy, generator):
    """One group of `strategy`, drawn and applied to images x (B, C, H, W), as MTT's DiffAugment."""
    group, parameters = draw_group(strategy.split("_"), len(x), x.shape[2], generator)
    return apply_group(x, group, [parameter.to(x.device) for parameter in parameters])


# --------------------------------------------------------------------------------------------------
# Plain augmentation (`--dsa False`): MTT's crop, scale or rotation of each image


def draw_plain(batch, size, generator):
    kind = torch.randint(3, (batch, 1), generator=generator)
    shift = torch.randint(-4, 4, (2, batch, 1), generator=generator)
    scale = 0.8 + 0.4 * torch.rand(2, batch, 1, generator=generator)
    angle = torch.randint(-45, 45, (batch,), generator=generator)
    return kind, shift, scale, angle


def apply_plain(x, kind, shift, scale, angle):
    """Each image of x (B, C, H, H) cropped, scaled or rotated. Not differentiable.

    Crop: shifted by -4 to 3 pixels, the border filled with the channel's mean. Scale: resized by
    U(0.8, 1.2) in each direction, nearest neighbour, zeros around. Rotate: by -45° to 44°, with
    third-order splines, the border filled with the mean.
    """
    size = x.shape[2]
    index = torch.arange(size, device=x.device)
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    cropped = window(x, *(index + shift), fill=mean)

    resized = (scale * size).int()  # (2, B, 1)
    side = resized.amax(0).clamp(min=size)  # of the square that MTT centres the result on, and cuts
    centred = index + (side - size) // 2 - (side - resized) // 2  # position in the resized image
    source = torch.where((centred >= 0) & (centred < resized), centred * size // resized, -1)
    scaled = window(x, *source)

    kind = kind[:, :, None, None]
    x = torch.where(kind == 0, cropped, torch.where(kind == 1, scaled, x))
    angles = angle.tolist()
    for i in torch.nonzero(kind.flatten() == 2).flatten().tolist():
        image = x[i].cpu().numpy()  # SciPy rotates one image at a time, on the CPU
        rotated = scipy.ndimage.rotate(image, angles[i], axes=(-2, -1), cval=float(mean.mean()))
        top, left = ((length - size) // 2 for length in rotated.shape[1:])
        x[i] = torch.from_numpy(rotated[:, top : top + size, left : left + size])
    return x


# --------------------------------------------------------------------------------------------------
# Batches
#
# A batch is drawn before it is made. Drawing decides all that is random about it, on the CPU. What
# is differentiated or compiled afterwards is a pure function, and can be computed twice.

GROUPS = {**AUGMENTATIONS, "plain": (draw_plain, apply_plain)}


def augment_groups(dsa, strategy):
    """The GROUPS of --dsa and --dsa_strategy."""
    return tuple(strategy.split("_")) if dsa else ("plain",)


def draw_group(groups, batch, size, generator):
    """One of `groups`, and its parameters for `batch` images with sides of `size` pixels."""
    group = groups[torch.randint(len(groups), (1,), generator=generator)]
    draw, _ = GROUPS[group]
    return group, draw(batch, size, generator)


def apply_group(x, group, parameters):
    _, apply = GROUPS[group]
    return apply(x, *parameters)


def decode(images, factor, indices=slice(None)):
    """Cut images (N, C, H, W) into factor × factor tiles, as networks see them: (n, C, H, W).

    Each of the n = N * factor² tiles is enlarged bilinearly to the size of an image: several small
    images in the place of one, as in IDC (Kim et al. 2022, arXiv 2205.14959, section 3.2). Tile
    k * factor² + r * factor + c is in row r and column c of image k. `indices` (B,) chooses tiles.
    """
    if factor == 1:
        return images[indices]
    channels, height, width = images.shape[1:]
    small = height // factor, width // factor
    tiles = images.unfold(2, small[0], small[0]).unfold(3, small[1], small[1])
    tiles = tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, *small)
    return F.interpolate(tiles[indices], size=(height, width), mode="bilinear")


def group_function(compiler, device):
    """`apply_group` for this device: compiled on a GPU, but for plain augmentation, by SciPy."""
    compiled = compiler.on_gpu(apply_group, device)

    def apply(x, group, parameters):
        return (apply_group if group == "plain" else compiled)(x, group, parameters)

    return apply


class Batch(NamedTuple):
    """All that is random about a batch of B images."""

    indices: torch.Tensor  # (B,) of images in their set
    offsets: tuple = ()  # texture: each window's corner, in parts of the canvas, (B * windows, 1)
    group: str | None = None  # what augments the batch; None: nothing
    parameters: tuple = ()  # of the group, (B, ...) each


@dataclass(frozen=True)
class Augment:
    """Turn batches of images into what a network sees."""

    side: int  # of what the network sees, in pixels
    groups: tuple = ()  # of GROUPS, one of which is drawn per batch; none: no augmentation
    windows: int = 0  # texture: windows cut from each canvas; 0: images are taken whole
    factor: int = 1  # each image holds factor × factor tiles, which are what indices count
    apply: Callable = apply_group

    def draw(self, indices, generator):
        """A `Batch` of the images `indices` (B,)."""
        offsets, group, parameters = (), None, ()
        count = len(indices) * (self.windows or 1)
        if self.windows:
            offsets = tuple(torch.rand(count, 1, generator=generator) for _ in range(2))
        if self.groups:
            group, parameters = draw_group(self.groups, count, self.side, generator)
        return Batch(indices, offsets, group, parameters)

    def part(self, batch, ranks):
        """A rank's part of a drawn batch, which has equally many images for each."""

        def mine(values, windows=self.windows or 1):
            """Of (windows * B, ...), where the first windows of all images come first."""
            by_window = values.unflatten(0, (windows, len(batch.indices)))
            part = by_window[:, ranks.rank :: ranks.size].flatten(0, 1)
            return part.clone(memory_format=torch.contiguous_format)  # as `send` needs it

        offsets, parameters = (tuple(map(mine, v)) for v in (batch.offsets, batch.parameters))
        return Batch(mine(batch.indices, 1), offsets, batch.group, parameters)

    def __call__(self, images, batch, labels):
        """Make a drawn batch: images (B, C, side, side), and labels (B,)."""
        x, y = decode(images, self.factor, batch.indices), labels[batch.indices]
        if batch.offsets:
            x, y = self.cut_windows(x, y, batch.offsets)
        if batch.group:
            x = self.apply(x, batch.group, batch.parameters)
        return x, y

    def cut_windows(self, x, y, offsets):
        """Windows of canvases (B, C, H, H), which wrap around, and their labels."""
        pixels = torch.arange(self.side, device=x.device)
        corners = ((offset * x.shape[2]).long() for offset in offsets)
        rows, cols = ((pixels + corner) % x.shape[2] for corner in corners)
        return window(x.repeat(self.windows, 1, 1, 1), rows, cols), y.repeat(self.windows)


def draw_batches(count, batch_size, steps, augment, generator):
    """`steps` batches from random permutations of `count` images. `steps` None: one epoch."""
    if steps is None:
        chunks = torch.randperm(count, generator=generator).split(batch_size)
        return [augment.draw(indices, generator) for indices in chunks]
    batches, chunks = [], []
    for _ in range(steps):
        if not chunks:
            chunks = list(torch.randperm(count, generator=generator).split(batch_size))
        batches.append(augment.draw(chunks.pop(), generator))  # the last one first, as in MTT
    return batches


def to_device(batches, device):
    """The same batches on `device`, moved by one copy that nothing waits for."""
    parts = [part for b in batches for part in (b.indices, *b.offsets, *b.parameters)]
    moved = iter(send(parts, device))

    def take(parts):
        return tuple(next(moved) for _ in parts)

    return [Batch(next(moved), take(b.offsets), b.group, take(b.parameters)) for b in batches]


def send(tensors, device):
    """The same tensors on `device`, copied there as one."""
    # Larger types come first, so that each part begins at a multiple of its type's size.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    packed = torch.cat([tensors[i].reshape(-1).view(torch.uint8) for i in order])
    if torch.device(device).type == "cuda":
        packed = packed.pin_memory()  # a copy from unpinned memory would block
    parts = packed.to(device, non_blocking=True).split([tensors[i].nbytes for i in order])
    sent = dict(zip(order, parts))
    return [sent[i].view(t.dtype).view(t.shape) for i, t in enumerate(tensors)]
