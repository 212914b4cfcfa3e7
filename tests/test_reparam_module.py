"""The unrolled student: its loss and gradients are exact, by either engine."""

import warnings
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import utils
from datasets.preprocessing import Form
from networks import ConvNet, get_network
from objectives.trajectory import matching_loss
from reparam_module import (
    UNROLLS,
    AdjointUnroll,
    AutogradUnroll,
    ReparamModule,
    bytes_of_graph,
)
from system.compilation import Compiler
from utils import Augment

STEPS = 4
LR = 0.02
DSA = utils.augment_groups(True, utils.DSA_STRATEGY)


def reference_start(num_params):
    index = torch.arange(num_params, dtype=torch.float64)
    start = 0.05 * torch.sin(index)
    return start, start + 0.01 * torch.cos(index)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape):
    return torch.randn(shape, generator=seeded(1))


def small(side=16, **variant):
    """A ConvNet of four filters."""
    torch.manual_seed(0)
    return ConvNet(3, 10, side, width=4, **variant)


def segment(network, dtype):
    """Some θ*_t and θ*_{t+M}: initial weights, and others near them."""
    start = torch.cat([p.detach().flatten() for p in network.parameters()]).to(dtype)
    return start, start + 0.01 * torch.randn(start.shape, generator=seeded(0), dtype=dtype)


def match(
    engine,
    network,
    images,
    augment,
    *,
    steps,
    batch_syn=10,
    dtype=torch.float64,
    compile=lambda function: function,
    before=0,
    **options,
):
    """Loss and gradients by an engine, with draws that are the same in every call."""
    labels = torch.arange(len(images))
    images = images.to(dtype).requires_grad_(True)
    syn_lr = torch.tensor(LR, dtype=dtype, requires_grad=True)
    batches = utils.draw_batches(len(images), batch_syn, before + steps, augment, seeded(5))
    make_batch = batch_maker(augment, labels)
    unroll = engine(ReparamModule(network.to(dtype)), make_batch, compile, **options)
    start, target = segment(network, dtype)
    state = unroll.advance(start, (images,), syn_lr, batches[:before])
    return unroll(state, matching_loss(start, target), (images,), syn_lr, batches[before:])


def batch_maker(augment, labels):
    return lambda synthetic, batch: augment(*synthetic, batch, labels)


def cosine(a, b):
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0)


# --------------------------------------------------------------------------------------------------
# Reference values


@pytest.fixture(scope="module", params=sorted(UNROLLS))
def unroll(golden, request):
    """The reference values, and loss and gradients as computed here."""
    reference = golden("unroll")
    student = ReparamModule(get_network("ConvNet", 3, 10, 64).double())
    images = reference["unroll_images"].clone().requires_grad_(True)
    syn_lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    batches = [(images, torch.arange(10))] * STEPS
    unroll = UNROLLS[request.param](student)
    start, target = reference_start(student.num_params)
    return reference, unroll(start, matching_loss(start, target), (images,), syn_lr, batches)


@pytest.mark.parametrize(
    "index, key", [(0, "unroll_loss"), (1, "unroll_grad_images"), (2, "unroll_grad_lr")]
)
def test_loss_and_gradients_equal_the_reference(unroll, index, key):
    reference, computed = unroll
    scale = reference[key].abs().max()
    torch.testing.assert_close(
        computed[index] / scale, reference[key] / scale, rtol=1e-10, atol=1e-10
    )


def test_the_student_ends_where_the_reference_does(golden):
    reference = golden("unroll")
    network = get_network("ConvNet", 3, 10, 64).double()
    student = ReparamModule(network)
    theta, _ = reference_start(student.num_params)
    for _ in range(STEPS):
        theta.requires_grad_(True)
        loss = F.cross_entropy(student(reference["unroll_images"], theta), torch.arange(10))
        theta = (theta - LR * torch.autograd.grad(loss, theta)[0]).detach()
    torch.testing.assert_close(theta.sum(), reference["unroll_theta_sum"], rtol=1e-10, atol=0)


# --------------------------------------------------------------------------------------------------
# Each engine


@pytest.mark.parametrize("engine", UNROLLS.values(), ids=UNROLLS)
def test_gradients_equal_finite_differences_under_augmentation_and_changing_batches(engine):
    student = ReparamModule(small(depth=2).double())
    start = 0.3 * torch.randn(student.num_params, dtype=torch.float64, generator=seeded(1))
    target = start + 0.05 * torch.randn(start.shape, dtype=torch.float64, generator=seeded(2))
    images = noise(10, 3, 16, 16).double()
    augment = Augment(16, DSA)
    batches = utils.draw_batches(10, 4, 6, augment, seeded(5))
    unroll = engine(student, batch_maker(augment, torch.arange(10)))

    def match(images, syn_lr):
        images = images.detach().requires_grad_(True)
        syn_lr = torch.tensor(float(syn_lr), dtype=torch.float64, requires_grad=True)
        return unroll(start, matching_loss(start, target), (images,), syn_lr, batches)

    _, grad_images, grad_lr = match(images, 0.1)
    step = 1e-6
    numeric_lr = (match(images, 0.1 + step)[0] - match(images, 0.1 - step)[0]) / (2 * step)
    torch.testing.assert_close(grad_lr, numeric_lr, rtol=1e-6, atol=0)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=seeded(3))
    above, below = (match(images + sign * step * direction, 0.1)[0] for sign in (1, -1))
    numeric = (above - below) / (2 * step)
    torch.testing.assert_close((grad_images * direction).sum(), numeric, rtol=1e-6, atol=0)


@pytest.mark.parametrize("engine", UNROLLS.values(), ids=UNROLLS)
def test_a_student_that_takes_no_step_toward_the_target_has_loss_one(engine):
    student = ReparamModule(small(depth=1))
    start = torch.randn(student.num_params, generator=seeded(0))
    images = noise(10, 3, 16, 16).requires_grad_(True)
    syn_lr = torch.tensor(0.0, requires_grad=True)
    batches = [(images, torch.arange(10))]
    loss, grad_images, _ = engine(student)(
        start, matching_loss(start, start + 1), (images,), syn_lr, batches
    )
    assert loss == 1
    assert not grad_images.any()


@pytest.mark.parametrize("engine", UNROLLS.values(), ids=UNROLLS)
def test_an_engine_leaves_its_inputs_as_they_are(engine):
    network = small(depth=1)
    images = noise(5, 3, 16, 16)
    batches = [(images.requires_grad_(True), torch.arange(5))] * 2
    inputs = [*segment(network, torch.float32), images, torch.tensor(LR, requires_grad=True)]
    before = [tensor.detach().clone() for tensor in inputs]
    start, target, images, syn_lr = inputs
    unroll = engine(ReparamModule(network))
    unroll(start, matching_loss(start, target), (images,), syn_lr, batches)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before))
    assert images.grad is None


@pytest.mark.parametrize("kept", [0, 1, 3, 5])
def test_the_adjoint_keeps_the_graphs_of_as_many_steps_as_memory_allows(kept):
    """It takes the others twice, one at a time, and the gradients are the same bit for bit."""
    images = noise(10, 3, 16, 16).double().requires_grad_(True)
    syn_lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    alive, most = weakref.WeakSet(), []

    def watched(function):
        def run(*tensors):
            results = function(*tensors)
            alive.add(results[0])
            most.append(len(alive))
            return results

        return run

    augment = Augment(16, DSA)
    batches = utils.draw_batches(10, 10, 5, augment, seeded(0))
    make_batch = batch_maker(augment, torch.arange(10))
    student = ReparamModule(small(depth=2).double())
    start, target = segment(student, torch.float64)
    inputs = start, matching_loss(start, target), (images,), syn_lr, batches
    reference = AdjointUnroll(student, make_batch)
    expected = reference(*inputs)
    memory = (kept + 0.5) * reference.bytes_per_step
    results = AdjointUnroll(student, make_batch, watched, memory)(*inputs)
    assert len(most) == 5 + (5 - kept) and max(most) == max(1, kept)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected))
    assert not any(tensor.requires_grad for tensor in results)


@pytest.mark.parametrize("network", [small(depth=2), get_network("MLP", 3, 10, 16)])
def test_the_size_of_a_graph_is_that_of_the_tensors_it_keeps(network):
    student = ReparamModule(network)
    theta = torch.zeros(student.num_params, requires_grad=True)
    x = noise(10, 3, 16, 16)
    results = student(x, theta)
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = student(x, theta)
    assert bytes_of_graph(results) == sum(sizes.values()) > x.nbytes


# --------------------------------------------------------------------------------------------------
# The two engines agree; networks of full size: soak/test_engines.py


@pytest.mark.parametrize(
    "network, side, batch_syn, windows",
    [
        (small(), 16, 5, 0),
        (small(), 16, 3, 0),  # batches of 3 and 2
        (small(), 32, 5, 2),  # texture: two windows of 16×16 from each canvas of 32×32
        (small(depth=4), 16, 5, 0),
        (small(depth=2, pooling="max"), 16, 5, 0),
        (small(depth=2, pooling="none"), 16, 5, 0),
        (small(depth=2, norm="layer"), 16, 5, 0),
        (small(depth=2, norm="group"), 16, 5, 0),
        (small(depth=2, norm="none"), 16, 5, 0),
        (small(depth=2, act="sigmoid"), 16, 5, 0),
        (small(depth=2, act="leakyrelu"), 16, 5, 0),
        (get_network("MLP", 3, 10, 16), 16, 3, 0),
    ],
    ids=lambda value: None if isinstance(value, int) else type(value).__name__,
)
def test_both_engines_give_the_same_gradients_in_float64(network, side, batch_syn, windows):
    check_engines_agree(network, side, Augment(16, DSA, windows), steps=6, batch_syn=batch_syn)


def test_both_engines_give_the_same_gradients_for_the_network_of_the_experiments():
    network = utils.initial_network("ConvNet", Form(10, 64), utils.make_generator(0), "cpu")
    check_engines_agree(network, 64, Augment(64, DSA), steps=2, batch_syn=3)


@pytest.mark.parametrize("before", [0, 3], ids=["from rest", "from a velocity"])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_both_engines_give_the_same_gradients_with_momentum(momentum, before):
    settings = {"steps": 5, "batch_syn": 4, "momentum": momentum, "before": before}
    check_engines_agree(small(depth=2), 16, Augment(16, DSA), **settings)


def test_momentum_takes_the_steps_of_pytorchs_optimiser():
    network = small(depth=1).double()
    student = ReparamModule(network)
    theta = parameters_to_vector(network.parameters()).detach().clone()
    images, labels = noise(10, 3, 16, 16).double(), torch.arange(10)
    unroll = AdjointUnroll(student, momentum=0.9)
    state = unroll.advance(theta, (), torch.tensor(0.05), [(images, labels)] * 2)
    state = unroll.advance(state, (), torch.tensor(0.05), [(images, labels)] * 2)  # goes on
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(state[0], parameters_to_vector(network.parameters()).detach())


def check_engines_agree(network, side, augment, **settings):
    (loss, images, lr), (loss_ref, images_ref, lr_ref) = (
        match(engine, network, noise(5, 3, side, side), augment, **settings)
        for engine in (AdjointUnroll, AutogradUnroll)
    )
    assert images_ref.any() and lr_ref
    assert (images - images_ref).norm() <= 1e-9 * images_ref.norm()
    assert abs(lr - lr_ref) <= 1e-9 * abs(lr_ref)
    assert loss == pytest.approx(float(loss_ref), rel=1e-12)


def test_both_engines_nearly_agree_in_float32():
    network = utils.initial_network("ConvNetW32", Form(10, 32), utils.make_generator(0), "cpu")
    settings = {"steps": 4, "dtype": torch.float32}
    (_, images, lr), (_, images_ref, lr_ref) = (
        match(engine, network, noise(10, 3, 32, 32), Augment(32, DSA), **settings)
        for engine in (AdjointUnroll, AutogradUnroll)
    )
    assert cosine(images, images_ref) >= 0.9999
    assert lr == pytest.approx(float(lr_ref), rel=1e-3)


def test_compiled_steps_give_the_same_gradients_and_say_how_long_compiling_took(capfd):
    inputs = small(depth=1), noise(10, 3, 16, 16), Augment(16, DSA)
    settings = {"steps": 3, "dtype": torch.float32}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = match(AdjointUnroll, *inputs, **settings, compile=Compiler().function)
    if any("torch.compile failed" in str(warning.message) for warning in caught):
        pytest.skip("no C++ compiler, or no header files of Python")
    _, images_ref, lr_ref = match(AutogradUnroll, *inputs, **settings)
    _, images, lr = compiled
    assert cosine(images, images_ref) >= 0.9999
    assert lr == pytest.approx(float(lr_ref), rel=1e-3)
    out = capfd.readouterr().out
    assert "compiled step in" in out and out.count("compiled") == 1


@pytest.mark.bfloat16
def test_bfloat16_gives_nearly_the_same_gradients():
    network = utils.initial_network("ConvNetW32", Form(10, 64), utils.make_generator(0), "cpu")
    start, target = segment(network, torch.float32)

    def match(amp):
        images = noise(10, 3, 64, 64).requires_grad_(True)
        syn_lr = torch.tensor(0.01, requires_grad=True)
        batches = [(images, torch.arange(10))] * 5
        engine = AdjointUnroll(ReparamModule(network, amp))
        return engine(start, matching_loss(start, target), (images,), syn_lr, batches)

    loss, images, syn_lr = match(amp=False)
    amp_loss, amp_images, amp_syn_lr = match(amp=True)
    assert amp_images.dtype == torch.float32 and not torch.equal(amp_images, images)
    assert cosine(amp_images, images) > 0.99
    torch.testing.assert_close(amp_loss, loss, rtol=0.05, atol=0)
    torch.testing.assert_close(amp_syn_lr, syn_lr, rtol=0.05, atol=0)


# --------------------------------------------------------------------------------------------------
# A network as a function of its parameters


@pytest.mark.parametrize("name", ["ConvNetW32", "MLP", "ResNet18"])
def test_the_module_with_a_networks_own_parameters_is_that_network(name):
    network = get_network(name, 3, 10, 32)
    x = noise(2, 3, 32, 32)
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    with torch.no_grad():
        assert torch.equal(ReparamModule(network)(x, flat), network(x))


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_vector_of_another_length_is_refused(extra):
    student = ReparamModule(small(depth=1))
    message = f"{student.num_params} parameters.*{student.num_params + extra}"
    with pytest.raises(ValueError, match=message):
        student(torch.randn(1, 3, 16, 16), torch.zeros(student.num_params + extra))


@pytest.mark.parametrize("name", ["ConvNetBN", "ResNet18BN"])
def test_a_student_with_batch_normalisation_is_refused(name):
    with pytest.raises(ValueError, match=r"batch normalisation.*take a network with instance"):
        ReparamModule(get_network(name, 3, 10, 32))
