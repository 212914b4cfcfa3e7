"""What is done to networks: seeding, training and testing."""

import pytest
import torch
from torch import nn

import training
import utils
from datasets.preprocessing import Form
from system import process
from utils import Augment

CPU = torch.device("cpu")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------
# Seeding


def test_a_stream_follows_from_its_key_alone():
    first, again, *others = (
        torch.rand(4, generator=utils.make_generator(*key)).tolist()
        for key in (("a", 1), ("a", 1), ("a", 2), ("b", 1), ("a", "1"), ("a",))
    )
    assert first == again
    assert len({tuple(numbers) for numbers in (first, *others)}) == 5


def test_a_network_follows_from_its_generator_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    weights = [
        next(utils.initial_network("MLP", Form(10, 8), seeded(seed), CPU).parameters())
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------
# Training and testing


@pytest.fixture
def linear():
    """A linear network and a data set that it can learn: 20 images of two classes."""
    torch.manual_seed(0)
    images = torch.randn(20, 3, 4, 4)
    labels = (images[:, 0].mean((1, 2)) > 0).long()
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), images, labels


def test_an_epoch_gives_the_mean_loss_and_accuracy_of_its_images(linear):
    network, *train = linear
    images, labels = train
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    augment = Augment(4)
    batches = utils.draw_batches(20, 6, None, augment, seeded(0))  # the last one has 2 images
    loss, accuracy = training.train_epoch(network, optimizer, train, augment, batches)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(network(images), labels).item())
    assert accuracy.item() == pytest.approx((network(images).argmax(1) == labels).float().mean())


def test_epochs_train_a_network(linear):
    network, *train = linear
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    augment = Augment(4)
    losses = []
    for epoch in range(20):
        batches = utils.draw_batches(20, 6, None, augment, seeded(epoch))
        loss, accuracy = training.train_epoch(network, optimizer, train, augment, batches)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5 and accuracy == 1


@pytest.mark.parametrize("batch_size", [1, 6, 20, 256])
def test_accuracy_is_the_same_in_batches_of_any_size(linear, batch_size):
    network, images, labels = linear
    shapes = set()

    def forward(x):
        assert not network.training and not torch.is_grad_enabled()
        shapes.add(tuple(x.shape))
        return network(x)

    total, of_classes, is_finite = training.accuracy(network, forward, images, labels, batch_size)
    assert is_finite
    hits = network(images).argmax(1) == labels
    assert total == pytest.approx(hits.float().mean().item())
    for label, value in enumerate(of_classes):
        assert value == pytest.approx(hits[labels == label].float().mean().item())
    assert shapes == {(batch_size, 3, 4, 4)}  # one shape, so one compiled graph
    assert network.training


def test_a_network_that_diverged_counts_as_guessing(linear):
    network, *test = linear
    test = [*test, 20]  # the batch size
    guessing = training.Accuracy(1 / 10, [1 / 10] * 10, is_finite=False)
    for value in (torch.nan, torch.inf):
        bad = torch.tensor([value] + [0.0] * 9)
        assert training.accuracy(network, lambda x, b=bad: b.repeat(len(x), 1), *test) == guessing


def test_the_time_left_follows_the_pace_since_the_first_call(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    time_left = process.TimeLeft(10)
    now[0] = 500.0  # compiling
    assert time_left(1) == "time left not known yet"
    now[0] += 60.0
    assert time_left(4) == "about 0:02:00 left"  # 20 seconds each, six to go
