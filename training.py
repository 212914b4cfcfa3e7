"""Networks in training: epochs, steps of several networks in one graph, and accuracy."""

from functools import partial
from typing import NamedTuple

import torch
from torch.func import grad
from torch.nn import functional as F

import utils
from reparam_module import ReparamModule
from system.process import ReportedError

# --------------------------------------------------------------------------------------------------
# One network


def fresh_sgd(network, rate):
    """SGD of MTT's evaluation."""
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)


def train_epoch(forward, optimizer, train, augment, batches):
    """Train on drawn batches of `train`, images (N, C, H, W) and labels, one step each.

    Labels are classes (N,), or probabilities (N, classes), whose most likely class counts as
    correct. Returns their mean loss and accuracy as scalars on the images' device. Reading them
    waits for it.
    """
    images, labels = train
    loss_sum, hits = torch.zeros(2, device=images.device)
    seen = 0
    for batch in batches:
        x, y = augment(images, batch, labels)
        logits = forward(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(y)
        classes = y if y.dim() == 1 else y.argmax(1)
        hits += (logits.detach().argmax(1) == classes).sum()
        seen += len(y)
    return loss_sum / seen, hits / seen


class Accuracy(NamedTuple):
    """The accuracy of a network on a set of images."""

    mean: float  # fraction classified correctly
    classes: list  # the same of each class
    is_finite: bool  # whether all logits are


@torch.no_grad()
def accuracy(network, forward, images, labels, batch_size):
    """The `Accuracy` of a network on `images` (N, C, H, W), in batches."""
    network.eval()
    logits = []
    for x in images.split(batch_size):
        missing = batch_size - len(x)
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing))  # one shape, so one compiled graph
        logits.append(forward(padded)[: len(x)])
    network.train()
    return accuracy_of(torch.cat(logits), labels)


def accuracy_of(logits, labels):
    """The `Accuracy` of logits (N, classes) on images with these labels (N,).

    NaN has no largest entry, so a network that diverged would always say class 0. It has the
    accuracy of guessing instead, 1 / classes.
    """
    classes = logits.shape[1]
    if not logits.isfinite().all():
        return Accuracy(1 / classes, [1 / classes] * classes, False)
    hits = (logits.argmax(1) == labels).double()
    of_classes = labels.bincount(weights=hits) / labels.bincount()
    return Accuracy(hits.mean().item(), of_classes.tolist(), True)


# --------------------------------------------------------------------------------------------------
# Networks as functions of their parameters


def make_student(model, form, machine):
    """A network called `model` as a function of its parameters.

    Raises ReportedError if that is impossible.
    """
    network = utils.initial_network(model, form, utils.make_generator(0), machine.device)
    try:
        return ReparamModule(network, machine.amp)
    except ValueError as error:
        raise ReportedError(f"--model={model}: {error}") from None


def make_sgd_step(model, form, machine):
    """`sgd_step` for networks called `model`; None if they are trained one after the other.

    That is the case on a CPU, where threads are faster, and with batch statistics, which are not
    part of the parameters.
    """
    network = utils.initial_network(model, form, utils.make_generator(0), machine.device)
    if machine.device.type != "cuda" or any(True for _ in network.buffers()):
        return None
    step = partial(sgd_step, ReparamModule(network, machine.amp))
    return machine.compiler.retrying(machine.compiler.function(step))


def sgd_step(module, thetas, momenta, x, y, rates):
    """A step of SGD, momentum 0.9 and weight decay 5e-4, for K networks in one graph.

    thetas, momenta  parameters of ReparamModule `module`, and their momenta, (K, P)
    x, y             images (K, B, C, H, W), labels (K, B) or (K, B, classes)
    rates            learning rates (K, 1)

    Returns the new parameters and momenta.
    """

    def loss(theta, x, y):
        return F.cross_entropy(module(x, theta), y)

    # One after the other: `vmap` would turn their convolutions into grouped ones, for which
    # libraries have few fast algorithms. In a CUDA graph, many small kernels cost little to launch.
    gradients = [grad(loss)(*tensors) for tensors in zip(thetas, x, y)]
    momenta = 0.9 * momenta + torch.stack(gradients) + 5e-4 * thetas
    return thetas - rates * momenta, momenta


@torch.no_grad()
def load_vector(network, theta):
    """Copy a vector (P,) into a network's parameters.

    `vector_to_parameters` would make them views of it. Views of a row of (K, P) begin at any
    multiple of 4 bytes. The network's compiled forward reads 16 bytes at once, as it may from a
    parameter's own storage, and does not check. On a GPU, the process would die of a misaligned
    address.
    """
    parameters = list(network.parameters())
    for parameter, part in zip(parameters, theta.split([p.numel() for p in parameters])):
        parameter.copy_(part.view(parameter.shape))
