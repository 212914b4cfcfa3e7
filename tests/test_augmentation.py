"""DSA agrees with MTT's and is differentiable; both kinds of augmentation follow a generator."""

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.nn import functional as F

import utils

GROUPS = ("color", "crop", "cutout", "flip", "scale", "rotate")

# Float32 rounds positions between pixels, in its own way on each processor: the reference is up to
# 3e-5 away from what float64 gives, and two processors up to twice that from each other.
ROUNDING = {"rtol": 1e-5, "atol": 6e-5}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def plain_augment(x, generator):
    """Plain augmentation of images (B, C, H, H), drawn and applied."""
    draw, apply = utils.GROUPS["plain"]
    return apply(x, *draw(len(x), x.shape[2], generator))


# --------------------------------------------------------------------------------------------------
# DSA


def test_the_default_strategy_has_all_six_groups():
    assert tuple(utils.DSA_STRATEGY.split("_")) == tuple(utils.AUGMENTATIONS) == GROUPS


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("group", GROUPS)
def test_each_group_equals_the_reference(golden, group, seed):
    reference, (draw, apply) = golden("augmentation"), utils.AUGMENTATIONS[group]
    x = reference["dsa_input"]
    out = apply(x, *draw(len(x), 64, seeded(seed)))
    torch.testing.assert_close(out[[0, 3]], reference[f"dsa_{group}_seed{seed}"], **ROUNDING)


@pytest.mark.parametrize("seed", range(8))
def test_the_whole_strategy_equals_the_reference(golden, seed):
    reference = golden("augmentation")
    out = utils.diff_augment(reference["dsa_input"], utils.DSA_STRATEGY, seeded(seed))
    torch.testing.assert_close(out[[2]], reference[f"dsa_strategy_seed{seed}"], **ROUNDING)


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_has_exact_gradients(group):
    draw, apply = utils.AUGMENTATIONS[group]
    draws = draw(2, 8, seeded(0))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply(x, *draws), x)
    assert torch.autograd.grad(apply(x, *draws).square().sum(), x)[0].any()


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_augments_images_differently_within_a_batch(group):
    x = torch.randn(1, 3, 64, 64, generator=seeded(0)).expand(8, -1, -1, -1)
    out = utils.diff_augment(x, group, seeded(1))
    assert not all(torch.equal(out[0], image) for image in out[1:])


def test_the_same_generator_state_gives_the_same_images():
    x = torch.randn(4, 3, 64, 64, generator=seeded(0))
    for seed in range(6):
        first, again = (utils.diff_augment(x, utils.DSA_STRATEGY, seeded(seed)) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, utils.diff_augment(x, utils.DSA_STRATEGY, seeded(seed + 100)))


def test_augmentation_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    utils.diff_augment(
        torch.randn(2, 3, 64, 64, generator=seeded(0)), utils.DSA_STRATEGY, seeded(1)
    )
    plain_augment(torch.randn(2, 3, 64, 64, generator=seeded(0)), seeded(1))
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------
# Plain augmentation


def centre(image, size=64):
    """The square of `size` pixels in the middle of (C, H, W), as MTT cuts it."""
    top, left = (int((length - size) / 2) for length in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def kind_of(image, augmented):
    """Which operation made (C, 64, 64) `augmented` of `image`; None: none of the three."""
    inner = augmented[:, 4:60, 4:60]
    for row, col in itertools.product(range(-4, 4), repeat=2):
        if torch.equal(inner, image[:, 4 + row : 60 + row, 4 + col : 60 + col]):
            return "crop"
    # Nearest neighbour makes no new values.
    if torch.isin(augmented, torch.cat([image.flatten(), torch.zeros(1)])).all():
        return "scale"
    mean = float(image.mean())
    for angle in range(-45, 45):
        rotated = scipy.ndimage.rotate(image.numpy(), angle, axes=(1, 2), cval=mean)
        if np.allclose(centre(rotated), augmented, atol=1e-4):
            return "rotate"


@pytest.fixture(scope="module")
def plain():
    """An image, and what each of 24 seeds makes of it."""
    image = torch.rand(3, 64, 64, generator=seeded(0)) + 1
    return image, [plain_augment(image[None], seeded(seed))[0] for seed in range(24)]


def test_plain_augmentation_crops_scales_and_rotates_each_about_as_often(plain):
    image, augmented = plain
    kinds = [kind_of(image, out) for out in augmented]
    assert set(kinds) == {"crop", "scale", "rotate"}
    assert min(kinds.count(kind) for kind in set(kinds)) >= 3


def test_plain_scales_are_those_of_mtt(plain):
    image, augmented = plain
    scales = [out for out in augmented if kind_of(image, out) == "scale"]
    found = {}  # size by index
    for size in itertools.product(range(51, 77), repeat=2):
        # Resized, on a square with room for the larger of this and the original.
        side = max(*size, 64)
        square = torch.zeros(3, side, side)
        top, left = (int((side - length) / 2) for length in size)
        square[:, top : top + size[0], left : left + size[1]] = F.interpolate(image[None], size)[0]
        for index, out in enumerate(scales):
            if torch.equal(centre(square), out):
                found[index] = size
    assert len(found) == len(scales)
    assert any(height % 2 or width % 2 for height, width in found.values())


def test_plain_augmentation_keeps_shape_and_input_and_is_finite(plain):
    image, augmented = plain
    assert torch.equal(image, torch.rand(3, 64, 64, generator=seeded(0)) + 1)
    assert all(out.shape == image.shape and out.isfinite().all() for out in augmented)


def test_plain_augmentation_follows_its_generator(plain):
    image, augmented = plain
    for seed, out in enumerate(augmented):
        assert torch.equal(plain_augment(image[None], seeded(seed))[0], out)
    assert len({out.numpy().tobytes() for out in augmented}) > 12


def test_plain_augmentation_treats_each_image_of_a_batch_by_itself():
    images = torch.rand(12, 3, 64, 64, generator=seeded(0)) + 1
    kinds = [kind_of(image, out) for image, out in zip(images, plain_augment(images, seeded(3)))]
    assert {"crop", "scale"} <= set(kinds)
    assert (
        None in kinds or "rotate" in kinds
    )  # None: a rotated image's border is filled with the batch's mean


def test_plain_crops_fill_the_border_with_the_mean_and_scales_with_zeros():
    corners = set()
    for seed in range(24):
        out = plain_augment(torch.ones(1, 3, 64, 64), seeded(seed))
        assert ((out.abs() < 1e-4) | ((out - 1).abs() < 1e-4)).all()
        corners.add(round(float(out[0, 0, 0, 0])))
    assert corners == {0, 1}  # 0: shrunk. A constant image stays constant when cropped or rotated.


# --------------------------------------------------------------------------------------------------
# window


def test_window_equals_a_loop_over_pixels():
    x = torch.randn(2, 3, 5, 7, generator=seeded(0))
    rows, cols = (
        torch.tensor([[-1, 0, 4], [5, 2, -3]]),
        torch.tensor([[6, 7, 0, 1], [-1, 3, 3, 20]]),
    )
    expected = torch.full((2, 3, 3, 4), 9.0)
    for b in range(2):
        for i, row in enumerate(rows[b].tolist()):
            for j, col in enumerate(cols[b].tolist()):
                if 0 <= row < 5 and 0 <= col < 7:
                    expected[b, :, i, j] = x[b, :, row, col]
    assert torch.equal(utils.window(x, rows, cols, fill=9.0), expected)
