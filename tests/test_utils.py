"""What is done to networks: seeding, compilation, training and testing."""

import logging
import re
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import utils
from preprocessing import Form
from process import ReportedError
from utils import Augment, CompileFailures, Compiler

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


@pytest.mark.parametrize("model, side, fault", [("LeNet", 64, "LeNet"), ("ConvNetD7", 64, "D6")])
def test_a_network_that_there_is_not_is_reported_with_its_flag(model, side, fault):
    with pytest.raises(ReportedError, match=f"--model={model}: .*{fault}"):
        utils.initial_network(model, Form(10, side), seeded(0), CPU)


# --------------------------------------------------------------------------------------------------
# Compilation; with a compiler: test_reparam_module.py and test_experts.py


@pytest.fixture
def failures(monkeypatch):
    """The failures of this process, as if there had been none."""
    monkeypatch.setattr(utils.FAILURES, "seen", False)
    return utils.FAILURES


def double(x):
    return (2 * x,)


def test_without_compilation_functions_and_networks_run_as_they_are():
    compiler = Compiler(compile=False)
    assert compiler.function(double) is double
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.randn(2, 3, 2, 2, generator=seeded(0))
    assert torch.equal(compiler(network)(x), network(x))


def test_bfloat16_is_only_inside_a_network():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.randn(2, 3, 2, 2, generator=seeded(0))
    seen = []
    network[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logits = Compiler(compile=False, amp=True)(network)(x)
    assert seen == [torch.bfloat16] and logits.dtype == torch.float32
    assert (logits - network(x)).abs().max() < 0.1


def test_the_first_call_of_a_compiled_function_says_how_long_it_took(failures, monkeypatch, capfd):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compiler = Compiler()
    for function in (compiler.function(double), compiler.function(partial(double))):
        for _ in range(2):
            (result,) = function(torch.ones(3))
            assert result.tolist() == [2, 2, 2]
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"compiled double in \d+ s", line) for line in lines)


def log_failure(log):
    """Log a failure as torch.compile does."""
    try:
        raise RuntimeError("no C++ compiler\nwas found")
    except RuntimeError:
        log.warning("WON'T CONVERT", exc_info=sys.exc_info())


def test_of_many_failed_compilations_one_warning_is_left(caplog):
    log = logging.getLogger("a test of CompileFailures")
    log.addFilter(CompileFailures())
    with pytest.warns(UserWarning, match="continuing without it: no C") as caught:
        log_failure(log)
    assert len(caught) == 1 and str(caught[0].message).endswith("no C++ compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_failure(log)
    assert not caplog.records
    log.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


def test_many_compilers_add_one_filter():
    log = logging.getLogger("torch._dynamo.convert_frame")
    for _ in range(3):
        Compiler()
    assert sum(isinstance(filter, CompileFailures) for filter in log.filters) == 1


def test_after_a_failure_functions_and_networks_run_as_they_are(failures, monkeypatch, capfd):
    def compile(function, **_):
        def run(*args):
            failures.seen = True  # as where there is no C++ compiler, in the first call
            calls.append(function)
            return function(*args)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    calls = []
    compiler = Compiler()
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.randn(2, 3, 2, 2, generator=seeded(0))
    function, forward = compiler.function(double), compiler(network)
    assert compiler.compiles
    for _ in range(2):
        assert torch.equal(function(x)[0], 2 * x) and torch.equal(forward(x), network(x))
    assert calls == [double] and not compiler.compiles
    assert "compiled" not in capfd.readouterr().out


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
    loss, accuracy = utils.train_epoch(network, optimizer, train, augment, batches)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(network(images), labels).item())
    assert accuracy.item() == pytest.approx((network(images).argmax(1) == labels).float().mean())


def test_epochs_train_a_network(linear):
    network, *train = linear
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    augment = Augment(4)
    losses = []
    for epoch in range(20):
        batches = utils.draw_batches(20, 6, None, augment, seeded(epoch))
        loss, accuracy = utils.train_epoch(network, optimizer, train, augment, batches)
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

    total, of_classes = utils.accuracy(network, forward, images, labels, batch_size)
    hits = network(images).argmax(1) == labels
    assert total == pytest.approx(hits.float().mean().item())
    for label, value in enumerate(of_classes):
        assert value == pytest.approx(hits[labels == label].float().mean().item())
    assert shapes == {(batch_size, 3, 4, 4)}  # one shape, so one compiled graph
    assert network.training
