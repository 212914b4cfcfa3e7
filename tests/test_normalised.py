"""datasets/normalised.py: images stay in the type of their files until some are asked for."""

import pytest
import torch

from datasets.normalised import Normalised, channel_statistics
from datasets.preprocessing import Raw
from datasets.splits import split_dataset

CPU = torch.device("cpu")
TYPES = {
    torch.uint8: (0, 256, 255),
    torch.uint16: (0, 65_536, 1),
    torch.int16: (-9000, 9000, 1),
    torch.float32: (0, 2, 1),
}


def raw_of(dtype):
    """A `Raw` data set of this type: 60 images of 2 classes, 4 channels."""
    low, high, _ = TYPES[dtype]
    random = torch.Generator().manual_seed(0)
    images = torch.randint(low, high, (60, 4, 6, 6), generator=random).to(dtype)
    labels = torch.arange(60) % 2
    split = split_dataset(labels, 0.2, ("a", "b"))
    mean, std = channel_statistics(images, split.train)
    return Raw(images, labels, split, ("a", "b"), {"zca": False, "mean": mean, "std": std}, None)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_asked_for_is_bit_for_bit_what_normalising_all_images_gives(dtype):
    raw = raw_of(dtype)
    mean, std = (torch.tensor(raw.settings[name]).view(-1, 1, 1) for name in ("mean", "std"))
    found, labels = raw.preprocessed(CPU).val
    images = raw.images[raw.split.val].float().div_(TYPES[dtype][2]).sub_(mean).div_(std)
    assert found.shape == images.shape and len(found) == len(images)
    assert torch.equal(labels, raw.labels[raw.split.val])
    for chosen in (slice(None), slice(2, 5), slice(0, 0), torch.tensor([3, 0, 3]), labels == 1):
        assert torch.equal(found[chosen], images[chosen])
    assert torch.equal(torch.stack(list(found)), images)
    parts = list(found.split(5))
    assert [len(part) for part in parts] == [len(part) for part in images.split(5)]
    assert torch.equal(torch.cat(parts), images)


def test_the_images_of_all_parts_share_the_memory_of_the_file():
    raw = raw_of(torch.uint16)
    data = raw.preprocessed(CPU)
    for images, _ in (data.train, data.val, data.test):
        assert isinstance(images, Normalised)
        assert images.stored.data_ptr() == raw.images.data_ptr()


@pytest.mark.parametrize("dtype", TYPES)
def test_statistics_are_those_of_the_rows_in_float64(dtype):
    raw = raw_of(dtype)
    values = raw.images[raw.split.train].double() / TYPES[dtype][2]
    expected = values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0)
    for found, of_torch in zip(channel_statistics(raw.images, raw.split.train), expected):
        torch.testing.assert_close(torch.tensor(found).double(), of_torch, rtol=1e-6, atol=0)
