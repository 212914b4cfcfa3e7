"""Compilation: what runs compiled, what happens where it fails, the derivatives of convolutions."""

import logging
import re
import sys
import warnings
from functools import partial

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.func import grad

from system import compilation
from system.compilation import CompileFailures, Compiler, aten

# --------------------------------------------------------------------------------------------------
# What runs compiled, and what happens where it fails; with networks: test_reparam_module.py


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def failures(monkeypatch):
    """The failures of this process, as if there had been none."""
    monkeypatch.setattr(compilation.FAILURES, "seen", False)
    return compilation.FAILURES


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
    assert len(lines) == 4
    assert all(re.fullmatch(r"compil(ing double|ed double in \d+ s)", line) for line in lines)


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
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
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


@pytest.fixture
def fail(failures, monkeypatch):
    """A function: have all that is compiled fail with a message; returns the modes of its calls."""

    def fail(message):
        modes = []

        def compile(function, mode=None, **_):
            def run(*_):
                modes.append(mode)
                raise RuntimeError(message)

            return run

        monkeypatch.setattr(torch, "compile", compile)
        return modes

    return fail


def test_what_fails_on_cuda_runs_without_graphs_then_uncompiled(fail, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    modes = fail("operation not permitted when stream is capturing")
    compiler = Compiler()
    function = compiler.retrying(compiler.function(double))
    with pytest.warns(UserWarning, match="failed, continuing without it: operation") as caught:
        assert function(torch.ones(3))[0].tolist() == [2, 2, 2]
    assert modes == ["reduce-overhead", None]
    assert [str(w.message).split(" failed")[0] for w in caught] == ["a CUDA graph", "torch.compile"]


@pytest.mark.parametrize("cuda, message", [(True, "CUDA out of memory"), (False, "no such shape")])
def test_a_lack_of_memory_and_faults_on_a_cpu_are_raised_at_once(fail, monkeypatch, cuda, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    modes = fail(message)
    compiler = Compiler()
    with pytest.raises(RuntimeError, match=message):
        compiler.retrying(compiler.function(double))(torch.ones(3))
    assert len(modes) == 1


# --------------------------------------------------------------------------------------------------
# Second derivatives of convolutions


def derivative(layer, stride, groups):
    """A function that differentiates a convolution twice, and tensors to call it with."""
    weights = torch.randn(layer, 4 // groups, 3, 3, generator=seeded(0), dtype=torch.float64)
    x = torch.randn(2, 4, 9, 9, generator=seeded(1), dtype=torch.float64)

    def first(weights, x):
        def loss(weights):
            return nn.functional.conv2d(x, weights, None, stride, 1, groups=groups).pow(3).sum()

        inner = grad(loss)(weights)
        outer = grad(lambda x: nn.functional.conv2d(x, weights, None, stride, 1).pow(3).sum())
        return (inner.sum() + outer(x).sum() if groups == 1 else inner.sum(),)

    return first, (weights.requires_grad_(True), x.requires_grad_(True))


@pytest.mark.parametrize("stride", [1, 2])
def test_compiled_second_derivatives_are_gradients_of_ordinary_convolutions(
    failures, monkeypatch, stride
):
    """None has a kernel as large as the image, and they are what PyTorch computes."""
    kernels, replaced = [], []

    class Watched(compilation.SecondDerivatives):
        def __call__(self, graph):
            before = odd_kernels(graph)
            super().__call__(graph)
            replaced.append(len(before))
            kernels.extend(odd_kernels(graph))
            graph.lint()

        def uuid(self):
            return None  # not cached: the test needs to see it run

    function, tensors = derivative(5, stride, 1)
    compiler = Compiler()
    monkeypatch.setattr(torch._inductor.config, "joint_custom_pre_pass", Watched())
    (result,) = compiler.function(function)(*tensors)
    if not compiler.compiles:
        pytest.skip("no C++ compiler, or no header files of Python")
    assert sum(replaced) >= 1 and not kernels
    computed = torch.autograd.grad(result, tensors)
    expected = torch.autograd.grad(function(*tensors)[0], tensors)
    for ours, theirs in zip(computed, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def odd_kernels(graph):
    """Sides of the convolutions' kernels that are larger than 3."""
    nodes = graph.find_nodes(op="call_function", target=aten.convolution.default)
    sides = [node.args[1].meta["val"].shape[-1] for node in nodes]
    return [side for side in sides if side > 3]
