"""The unrolled student: its loss and gradients are exact, by either engine."""

import warnings

import pytest
import torch
from torch.nn import functional as F

import utils
from distillation import make_prepare, synthetic_batches
from networks import ConvNet, get_network
from reparam_module import UNROLLS, AdjointUnroll, AutogradUnroll, ReparamModule

STEPS, LR = 4, 0.02


def reference_start(num_params):
    index = torch.arange(num_params, dtype=torch.float64)
    start = 0.05 * torch.sin(index)
    return start, start + 0.01 * torch.cos(index)


def augment(x, y, generator):
    return utils.diff_augment(x, utils.DSA_STRATEGY, generator), y


def segment(network, dtype):
    """Some θ*_t and θ*_{t+M}: initial weights, and others near them."""
    start = torch.cat([p.detach().flatten() for p in network.parameters()]).to(dtype)
    return start, start + 0.01 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def cosine(a, b):
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0)


@pytest.fixture(scope="module", params=sorted(UNROLLS))
def unroll(golden, request):
    """The reference values, and loss and gradients as computed here."""
    reference = golden("unroll")
    student = ReparamModule(get_network("ConvNet", 3, 10, 64).double())
    images = reference["unroll_images"].clone().requires_grad_(True)
    syn_lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    batches = [(images, torch.arange(10))] * STEPS
    unroll = UNROLLS[request.param](student)
    return reference, unroll(*reference_start(student.num_params), images, syn_lr, batches)


@pytest.mark.parametrize("index, key", [
    (0, "unroll_loss"), (1, "unroll_grad_images"), (2, "unroll_grad_lr")])
def test_loss_and_gradients_equal_the_reference(unroll, index, key):
    reference, computed = unroll
    scale = reference[key].abs().max()
    torch.testing.assert_close(computed[index] / scale, reference[key] / scale, rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("unroll", UNROLLS.values(), ids=UNROLLS)
def test_gradients_equal_finite_differences_under_augmentation_and_changing_batches(unroll):
    torch.manual_seed(0)
    student = ReparamModule(ConvNet(3, 10, 16, width=4, depth=2).double())
    start = 0.3 * torch.randn(student.num_params, dtype=torch.float64)
    target = start + 0.05 * torch.randn(student.num_params, dtype=torch.float64)
    images, labels = torch.randn(10, 3, 16, 16, dtype=torch.float64), torch.arange(10)

    def match(images, syn_lr):
        images = images.detach().requires_grad_(True)
        syn_lr = torch.tensor(float(syn_lr), dtype=torch.float64, requires_grad=True)
        batches = synthetic_batches(images, labels, 6, 4, augment, torch.Generator().manual_seed(5))
        return unroll(student)(start, target, images, syn_lr, batches)

    _, grad_images, grad_lr = match(images, 0.1)
    step = 1e-6
    numeric_lr = (match(images, 0.1 + step)[0] - match(images, 0.1 - step)[0]) / (2 * step)
    torch.testing.assert_close(grad_lr, numeric_lr, rtol=1e-6, atol=0)
    direction = torch.randn_like(images)
    numeric = (match(images + step * direction, 0.1)[0] - match(images - step * direction, 0.1)[0]) / (2 * step)
    torch.testing.assert_close((grad_images * direction).sum(), numeric, rtol=1e-6, atol=0)


@pytest.mark.parametrize("unroll", UNROLLS.values(), ids=UNROLLS)
def test_a_student_that_takes_no_step_toward_the_target_has_loss_one(unroll):
    student = ReparamModule(ConvNet(3, 10, 16, width=4, depth=1))
    start, images = torch.randn(student.num_params), torch.randn(10, 3, 16, 16, requires_grad=True)
    syn_lr = torch.tensor(0.0, requires_grad=True)
    loss, grad_images, _ = unroll(student)(start, start + 1, images, syn_lr, [(images, torch.arange(10))])
    assert loss == 1
    assert not grad_images.any()


@pytest.mark.parametrize("name", ["ConvNetW32", "MLP", "ResNet18"])
def test_the_module_with_a_networks_own_parameters_is_that_network(name):
    network, x = get_network(name, 3, 10, 64), torch.randn(2, 3, 64, 64)
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    with torch.no_grad():
        assert torch.equal(ReparamModule(network)(x, flat), network(x))


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_vector_of_another_length_is_refused(extra):
    student = ReparamModule(ConvNet(3, 10, 16, width=4, depth=1))
    with pytest.raises(ValueError, match=f"{student.num_params} parameters.*{student.num_params + extra}"):
        student(torch.randn(1, 3, 16, 16), torch.zeros(student.num_params + extra))


@pytest.mark.bfloat16
def test_bfloat16_gives_nearly_the_same_gradients():
    network = utils.initial_network("ConvNetW32", (10, 64), utils.make_generator(0), "cpu")
    start, target = segment(network, torch.float32)

    def match(amp):
        images = torch.randn(10, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        syn_lr = torch.tensor(0.01, requires_grad=True)
        batches = [(images, torch.arange(10))] * 5
        return AdjointUnroll(ReparamModule(network, amp))(start, target, images, syn_lr, batches)

    (loss, images, syn_lr), (amp_loss, amp_images, amp_syn_lr) = match(amp=False), match(amp=True)
    assert amp_images.dtype == torch.float32 and not torch.equal(amp_images, images)
    assert cosine(amp_images, images) > 0.99
    torch.testing.assert_close(torch.stack([amp_loss, amp_syn_lr]), torch.stack([loss, syn_lr]), rtol=0.05, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The two engines agree


def match(engine, network, images, prepare, *, steps, batch_syn=10, dtype=torch.float64):
    """Loss and gradients by an engine, with draws that are the same in every call."""
    student = ReparamModule(network.to(dtype))
    images = images.to(dtype).requires_grad_(True)
    syn_lr = torch.tensor(LR, dtype=dtype, requires_grad=True)
    batches = synthetic_batches(images, torch.arange(len(images)), steps, batch_syn, prepare,
                                torch.Generator().manual_seed(5))
    return engine(student)(*segment(network, dtype), images, syn_lr, batches)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name, side, steps, batch_syn, windows", [
    ("ConvNet", 32, 20, 5, 0),
    ("ConvNet", 64, 2, 3, 0),  # batches of 3 and 2
    ("ConvNetW32", 128, 3, 5, 2),  # texture: two windows of 64×64 from each canvas of 128×128
    ("ConvNetD4", 32, 3, 5, 0),
    ("ConvNetMP", 32, 3, 5, 0),
    ("ConvNetNP", 16, 3, 5, 0),
    ("ConvNetLN", 32, 3, 5, 0),
    ("ConvNetGN", 32, 3, 5, 0),
    ("ConvNetNN", 32, 3, 5, 0),
    ("ConvNetAS", 32, 3, 5, 0),
    ("ConvNetAL", 32, 3, 5, 0),
    ("MLP", 64, 20, 3, 0),
    ("ResNet18", 32, 2, 2, 0),
    ("VGG16", 32, 2, 2, 0),
])
def test_both_engines_give_the_same_gradients_in_float64(name, side, steps, batch_syn, windows):
    random = utils.make_generator(0)
    network = utils.initial_network(name, (10, 64), random, "cpu") if windows else get_network(name, 3, 10, side)
    prepare = make_prepare(augment, windows, 64)
    (loss, images, lr), (loss_ref, images_ref, lr_ref) = (
        match(engine, network, noise(5, 3, side, side), prepare, steps=steps, batch_syn=batch_syn)
        for engine in (AdjointUnroll, AutogradUnroll))
    assert images_ref.any() and lr_ref
    assert (images - images_ref).norm() <= 1e-9 * images_ref.norm()
    assert abs(lr - lr_ref) <= 1e-9 * abs(lr_ref) and loss == pytest.approx(float(loss_ref), rel=1e-12)


def test_both_engines_nearly_agree_in_float32():
    network = utils.initial_network("ConvNet", (10, 64), utils.make_generator(0), "cpu")
    (_, images, lr), (_, images_ref, lr_ref) = (
        match(engine, network, noise(10, 3, 64, 64), augment, steps=4, dtype=torch.float32)
        for engine in (AdjointUnroll, AutogradUnroll))
    assert cosine(images, images_ref) >= 0.9999 and lr == pytest.approx(float(lr_ref), rel=1e-3)


def test_compiled_steps_give_the_same_gradients_and_say_how_long_compiling_took(capfd):
    network, runner = utils.initial_network("ConvNetW32", (10, 64), utils.make_generator(0), "cpu"), utils.Runner()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (_, images, lr), (_, images_ref, lr_ref) = (
            match(engine, network, noise(10, 3, 64, 64), augment, steps=3, dtype=torch.float32)
            for engine in (lambda student: AdjointUnroll(student, runner.function), AutogradUnroll))
    if any("torch.compile failed" in str(warning.message) for warning in caught):
        pytest.skip("no C++ compiler, or no header files of Python")
    assert cosine(images, images_ref) >= 0.9999 and lr == pytest.approx(float(lr_ref), rel=1e-3)
    out = capfd.readouterr().out
    assert "compiled step in" in out and "compiled step_back in" in out and out.count("compiled") == 2


def test_the_adjoint_keeps_no_graph_of_the_steps():
    network, batches = get_network("ConvNetD1", 3, 10, 16), []
    images, syn_lr = noise(10, 3, 16, 16).requires_grad_(True), torch.tensor(LR, requires_grad=True)
    engine = AdjointUnroll(ReparamModule(network))
    crossing = []

    def watched(function):
        def run(*tensors):
            results = function(*tensors)
            crossing.extend([*tensors, *results])
            return results
        return run

    engine.step, engine.step_back = watched(engine.step), watched(engine.step_back)
    batches = synthetic_batches(images, torch.arange(10), 3, 10, augment, torch.Generator())
    engine(*segment(network, torch.float32), images, syn_lr, batches)
    assert len(crossing) == 3 * (4 + 1) + 3 * (5 + 3)
    assert not any(tensor.requires_grad for tensor in crossing)


@pytest.mark.parametrize("name", ["ConvNetBN", "ResNet18BN"])
def test_a_student_with_batch_normalisation_is_refused(name):
    with pytest.raises(ValueError, match=r"batch normalisation.*take a network with instance"):
        ReparamModule(get_network(name, 3, 10, 32))
