"""Images in the type of their files, normalised by channel when some of them are asked for.

Thirteen bands of EuroSAT take 2.9 GB as uint16, and 5.8 GB as float32. Only what is asked for, such
as a batch, is ever float32.
"""

import math
from dataclasses import dataclass

import torch

PIXELS = 2**17  # at once, for statistics: a megabyte of float64, which stays in a cache


def unit_of(images):
    """The number that stands for 1: 255 in 8 bits. Others are taken as their files have them."""
    return 255 if images.dtype == torch.uint8 else 1


def channels(settings):
    """Mean and standard deviation of each channel, (C, 1, 1) each."""
    return [torch.tensor(settings[name]).view(-1, 1, 1) for name in ("mean", "std")]


@dataclass(frozen=True)
class Normalised:
    """Some images of a data set (n, C, H, H), in the place of a float32 tensor of them all.

    An index, a slice or `split` returns float32 tensors: (value / unit − mean) / deviation.
    """

    stored: torch.Tensor  # all images of the data set (N, C, H, H), in the type of their files
    rows: torch.Tensor  # which of them these are (n,), on the same device
    mean: torch.Tensor  # (C, 1, 1), in units
    std: torch.Tensor

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, chosen):
        stored = self.stored
        is_unsigned = stored.dtype == torch.uint16  # which PyTorch does not index everywhere
        bits = stored.view(torch.int16) if is_unsigned else stored
        found = bits[self.rows[chosen]].view(stored.dtype)
        images = found.to(torch.float32, copy=True)  # one image, by its number, is a view
        # A tensor on the device: by a number, a GPU would multiply by its inverse.
        unit = torch.tensor(float(unit_of(stored)), device=images.device)
        return images.div_(unit).sub_(self.mean).div_(self.std)

    def split(self, size):
        """Yield float32 images (size, C, H, H), the last ones fewer."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @property
    def shape(self):
        return torch.Size((len(self), *self.stored.shape[1:]))

    @property
    def device(self):
        return self.stored.device


def channel_statistics(images, rows):
    """Mean and standard deviation of each channel of the images `rows` of (N, C, H, H), in units.

    Sums of whole numbers are exact (of 16 bits, in images of up to 1448 pixels a side), so they are
    the same on every machine. A channel that is the same everywhere has a deviation of 1, so that
    it becomes 0.
    """
    size, unit = images[0, 0].numel(), unit_of(images)
    exact = float if images.is_floating_point() else int
    count = size * len(rows)
    mean, std = [], []
    for channel in range(images.shape[1]):
        total = squares = 0
        for part in rows.split(max(1, PIXELS // size)):
            values = images[part, channel].flatten().double()
            total += exact(values.sum())
            squares += exact(values.dot(values))
        variance = max(count * squares - total**2, 0) / count**2
        mean.append(total / count / unit)
        std.append(math.sqrt(variance) / unit or 1.0)
    return mean, std
