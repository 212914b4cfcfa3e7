"""The unrolled student: its loss and gradients are exact."""

import pytest
import torch
from torch.nn import functional as F

import utils
from distillation import synthetic_batches
from networks import ConvNet, get_network
from reparam_module import ReparamModule, match_trajectory

STEPS, LR = 4, 0.02


def reference_start(num_params):
    index = torch.arange(num_params, dtype=torch.float64)
    start = 0.05 * torch.sin(index)
    return start, start + 0.01 * torch.cos(index)


@pytest.fixture(scope="module")
def unroll(golden):
    """The reference values, and loss and gradients as computed here."""
    reference = golden("unroll")
    student = ReparamModule(get_network("ConvNet", 3, 10, 64).double())
    images = reference["unroll_images"].clone().requires_grad_(True)
    syn_lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    batches = [(images, torch.arange(10))] * STEPS
    return reference, match_trajectory(student, *reference_start(student.num_params), images, syn_lr, batches)


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


def test_gradients_equal_finite_differences_under_augmentation_and_changing_batches():
    torch.manual_seed(0)
    student = ReparamModule(ConvNet(3, 10, 16, width=4, depth=2).double())
    start = 0.3 * torch.randn(student.num_params, dtype=torch.float64)
    target = start + 0.05 * torch.randn(student.num_params, dtype=torch.float64)
    images, labels = torch.randn(10, 3, 16, 16, dtype=torch.float64), torch.arange(10)

    def prepare(x, y, generator):
        return utils.diff_augment(x, utils.DSA_STRATEGY, generator), y

    def match(images, syn_lr):
        images = images.detach().requires_grad_(True)
        syn_lr = torch.tensor(float(syn_lr), dtype=torch.float64, requires_grad=True)
        batches = synthetic_batches(images, labels, 6, 4, prepare, torch.Generator().manual_seed(5))
        return match_trajectory(student, start, target, images, syn_lr, batches)

    _, grad_images, grad_lr = match(images, 0.1)
    step = 1e-6
    numeric_lr = (match(images, 0.1 + step)[0] - match(images, 0.1 - step)[0]) / (2 * step)
    torch.testing.assert_close(grad_lr, numeric_lr, rtol=1e-6, atol=0)
    direction = torch.randn_like(images)
    numeric = (match(images + step * direction, 0.1)[0] - match(images - step * direction, 0.1)[0]) / (2 * step)
    torch.testing.assert_close((grad_images * direction).sum(), numeric, rtol=1e-6, atol=0)


def test_a_student_that_takes_no_step_toward_the_target_has_loss_one():
    student = ReparamModule(ConvNet(3, 10, 16, width=4, depth=1))
    start, images = torch.randn(student.num_params), torch.randn(10, 3, 16, 16, requires_grad=True)
    syn_lr = torch.tensor(0.0, requires_grad=True)
    loss, grad_images, _ = match_trajectory(student, start, start + 1, images, syn_lr, [(images, torch.arange(10))])
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
    network = utils.initial_network("ConvNetW32", utils.make_generator(0), "cpu")
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    target = start + 0.01 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))

    def match(amp):
        images = torch.randn(10, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        syn_lr = torch.tensor(0.01, requires_grad=True)
        batches = [(images, torch.arange(10))] * 5
        return match_trajectory(ReparamModule(network, amp), start, target, images, syn_lr, batches)

    (loss, images, syn_lr), (amp_loss, amp_images, amp_syn_lr) = match(amp=False), match(amp=True)
    assert amp_images.dtype == torch.float32 and not torch.equal(amp_images, images)
    assert F.cosine_similarity(amp_images.flatten(), images.flatten(), dim=0) > 0.99
    torch.testing.assert_close(torch.stack([amp_loss, amp_syn_lr]), torch.stack([loss, syn_lr]), rtol=0.05, atol=0)
