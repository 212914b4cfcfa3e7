"""ZCA agrees with kornia's, is undone by its inverse, and is fitted once."""

import os

import kornia
import pytest
import torch
from conftest import load_data

from datasets import folders
from datasets.splits import split_dataset
from datasets.whitening import fit_zca


def small_images(count):
    """Smooth images (count, 3, 8, 8) in [0, 1], correlated as real ones are: 192 dimensions."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fine = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, size=8, mode="bilinear")
    return 0.7 * smooth + 0.3 * fine


# Both compute in float32 and were seen to differ by at most 7e-7 of the largest entry.
@pytest.mark.parametrize("count", [600, 50], ids=["more than dimensions", "fewer than dimensions"])
@pytest.mark.parametrize("name", ["mean_vector", "transform_matrix", "transform_inv"])
def test_the_fit_agrees_with_kornia(count, name):
    images = small_images(count)
    ours = getattr(fit_zca(images), name)
    theirs = getattr(kornia.enhance.ZCAWhitening(eps=0.1, compute_inv=True).fit(images), name)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("count", [600, 50])
def test_the_inverse_undoes_the_transform(count):
    images = small_images(count)
    zca = fit_zca(images)
    unseen = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    for x in (images, unseen):
        torch.testing.assert_close(zca.inverse_transform(zca(x)), x, rtol=0, atol=1e-5)


def test_whitened_images_have_the_covariance_that_eps_leaves():
    images = small_images(600)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(images.flatten(1).T))
    white = torch.linalg.eigvalsh(torch.cov(fit_zca(images)(images).flatten(1).T))
    torch.testing.assert_close(white, eigenvalues / (eigenvalues + 0.1), rtol=1e-3, atol=1e-4)


def test_loading_with_zca_a_second_time_reads_the_cache_and_gives_the_same(
    tiny_folder, tmp_path, capfd
):
    def load():
        return load_data("ImageFolder", tmp_path, True, 0.5, "cpu", im_size=16)

    for folder in tiny_folder.iterdir():
        if folder.is_dir():
            (tmp_path / folder.name).symlink_to(folder)
    first = load()
    assert "fitting ZCA on 30 images" in capfd.readouterr().out
    (cache,) = tmp_path.glob("zca_*.pt")
    made = os.stat(cache).st_mtime_ns
    data = load()
    assert "fitting ZCA" not in capfd.readouterr().out
    assert list(tmp_path.glob("zca_*.pt")) == [cache] and os.stat(cache).st_mtime_ns == made
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(data, part)[0], getattr(first, part)[0])

    images, labels, _, classes, *_ = folders.load_image_folder(tmp_path, 16)
    pixels = images[split_dataset(labels, 0.5, classes).train] / 255
    torch.testing.assert_close(data.to_pixels(data.train[0]), pixels, rtol=0, atol=1e-3)
    torch.testing.assert_close(data.zca(pixels), data.train[0], rtol=0, atol=1e-3)
    assert data.settings["zca"] is True and "mean" not in data.settings
