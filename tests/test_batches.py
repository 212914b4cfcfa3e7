"""Batches: drawn once, sent in one piece, and applied as often as wished."""

import math

import pytest
import torch

import utils
from utils import Augment, Batch

DSA = utils.augment_groups(True, utils.DSA_STRATEGY)
AUGMENTS = {
    "whole images": Augment(16),
    "DSA": Augment(16, DSA),
    "plain": Augment(16, utils.augment_groups(False, "")),
    "windows": Augment(16, windows=2),
    "windows with DSA": Augment(16, DSA, windows=3),
}
every_augment = pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
CPU = torch.device("cpu")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def canvases():
    """Four images of 32×32 pixels for windows of half the side, and their labels."""
    return torch.randn(4, 3, 32, 32, generator=seeded(0)), torch.tensor([4, 5, 6, 7])


def of_side(augment, images):
    """What `augment` is for: canvases for windows, otherwise images of its side."""
    return images if augment.windows else images[:, :, : augment.side, : augment.side]


# --------------------------------------------------------------------------------------------------
# Augment


@pytest.mark.parametrize("dsa, groups", [(True, ("color", "flip")), (False, ("plain",))])
def test_groups_are_those_of_the_strategy_or_plain_augmentation(dsa, groups):
    assert utils.augment_groups(dsa, "color_flip") == groups
    assert all(group in utils.GROUPS for group in groups)


@every_augment
@pytest.mark.parametrize("seed", range(6))
def test_a_drawn_batch_gives_the_same_images_each_time(augment, canvases, seed):
    images, labels = canvases
    images = of_side(augment, images)
    batch = augment.draw(torch.tensor([2, 0, 3]), seeded(seed))
    x, y = augment(images, batch, labels)
    again, y_again = augment(images, batch, labels)
    assert x.shape == (3 * (augment.windows or 1), 3, 16, 16)
    assert torch.equal(x, again) and torch.equal(y, y_again)
    if augment.groups != ("plain",):  # which cannot be differentiated
        with_graph, _ = augment(images.clone().requires_grad_(), batch, labels)
        assert with_graph.requires_grad and torch.equal(x, with_graph)


@every_augment
def test_a_batch_takes_the_images_that_it_names_and_leaves_them_as_they_are(augment, canvases):
    images, labels = canvases
    images = of_side(augment, images)
    before = images.clone()
    _, y = augment(images, augment.draw(torch.tensor([1, 1, 3]), seeded(0)), labels)
    assert y.tolist() == [5, 5, 7] * (augment.windows or 1)
    assert torch.equal(images, before)


def test_without_groups_the_network_sees_the_images_themselves(canvases):
    images, labels = canvases
    x, y = Augment(32)(images, Augment(32).draw(torch.tensor([3, 1]), seeded(0)), labels)
    assert torch.equal(x, images[[3, 1]]) and torch.equal(y, labels[[3, 1]])


def test_windows_of_a_canvas_wrap_around_its_borders(canvases):
    images, labels = canvases
    augment = Augment(24, windows=2)
    windows, window_labels = augment(images, augment.draw(torch.arange(4), seeded(1)), labels)
    assert windows.shape == (8, 3, 24, 24)
    assert window_labels.tolist() == [4, 5, 6, 7] * 2
    corners = set()
    for window, canvas in zip(windows, images.repeat(2, 1, 1, 1)):
        top, left = torch.nonzero(canvas[0] == window[0, 0, 0])[0].tolist()
        assert torch.equal(canvas.roll((-top, -left), dims=(1, 2))[:, :24, :24], window)
        corners.add((top, left))
    assert len(corners) == 8 and any(max(corner) > 8 for corner in corners)  # some wrap around


# --------------------------------------------------------------------------------------------------
# Batches of an epoch, or of a student's steps


def test_batches_pass_over_all_images_before_any_comes_again():
    batches = utils.draw_batches(10, 4, 6, Augment(16), seeded(0))
    passes = [
        torch.cat([b.indices for b in three]).tolist() for three in (batches[:3], batches[3:])
    ]
    assert [len(batch.indices) for batch in batches] == [2, 4, 4, 2, 4, 4]  # in MTT's order
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10))
    assert passes[0] != passes[1]


@pytest.mark.parametrize("count, batch_size", [(10, 4), (8, 4), (3, 256)])
def test_an_epoch_has_each_image_once(count, batch_size):
    batches = utils.draw_batches(count, batch_size, None, Augment(16, DSA), seeded(0))
    assert len(batches) == math.ceil(count / batch_size)
    assert sorted(torch.cat([b.indices for b in batches]).tolist()) == list(range(count))
    assert all(batch.group in DSA for batch in batches)


def test_each_batch_draws_a_group_of_its_own():
    batches = utils.draw_batches(4, 4, 60, Augment(16, DSA), seeded(0))
    assert {batch.group for batch in batches} == set(DSA)


# --------------------------------------------------------------------------------------------------
# On their way to the device


def test_tensors_that_are_sent_arrive_as_they_were():
    random = seeded(0)
    tensors = [
        torch.randint(9, (5,), generator=random, dtype=torch.int32),
        torch.rand(3, 1, generator=random) < 0.5,
        torch.randn(2, 3, 4, generator=random, dtype=torch.float64),
        torch.tensor(0.25),
        torch.randn(7, generator=random).to(torch.bfloat16),
        torch.empty(0, 4),
        torch.randint(255, (3, 3), generator=random, dtype=torch.uint8),
        torch.randint(2**40, (1, 1, 1), generator=random),
        torch.randn(4, 5, generator=random).T,  # not contiguous
        torch.randn(3, generator=random).half(),
        torch.tensor(float("nan")),
    ]
    sent = utils.send(tensors, CPU)
    assert len(sent) == len(tensors)
    for tensor, arrived in zip(tensors, sent):
        assert arrived.dtype == tensor.dtype and arrived.shape == tensor.shape
        assert torch.equal(arrived.nan_to_num(7), tensor.nan_to_num(7))
    before = tensors[0].clone()
    sent[0].zero_()
    assert torch.equal(tensors[0], before)  # a copy, though on the same device


def test_batches_that_are_sent_are_the_same_batches():
    random = seeded(0)
    of_each = [utils.draw_batches(5, 2, 9, augment, random) for augment in AUGMENTS.values()]
    batches = [batch for mixed in zip(*of_each) for batch in mixed]
    moved = utils.to_device(batches, CPU)
    assert {batch.group for batch in batches} >= {None, "plain", "color", "rotate"}
    assert len(moved) == len(batches)
    for batch, other in zip(batches, moved):
        assert isinstance(other, Batch) and other.group == batch.group
        for part, other_part in zip(parts(batch), parts(other), strict=True):
            assert torch.equal(part, other_part) and part.dtype == other_part.dtype


def parts(batch):
    return [batch.indices, *batch.offsets, *batch.parameters]
