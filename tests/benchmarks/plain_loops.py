"""Matches of DC, DM and CAFE as plain loops: class by class, by autograd, without compilation.

Each takes a network and the `Views` of a match, and returns the loss and its gradient with respect
to the synthetic images. They do what the authors' code does, in PyTorch's own layout.
"""

import torch
from torch.nn import functional as F


def gradients_of(network, x, y, create_graph=False):
    loss = F.cross_entropy(network(x), y)
    return torch.autograd.grad(loss, list(network.parameters()), create_graph=create_graph)


def distance(g, h):
    """DC's, of the gradients of one parameter."""
    g, h = g.flatten(1), h.flatten(1)
    return (1 - (g * h).sum(1) / (g.norm(dim=1) * h.norm(dim=1) + 1e-6)).sum()


def plain_gradients(network, views):
    loss = 0
    for label in views.labels:
        real = gradients_of(network, *views.real(label))
        syn = gradients_of(network, *views.syn(label), create_graph=True)
        loss = loss + sum(distance(g, h) for g, h in zip(real, syn) if g.dim() > 1)
    return loss.detach(), *torch.autograd.grad(loss, views.image_syn)


def plain_distributions(network, views):
    loss = 0
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for label in views.labels:
        real = network.layers(views.real(label)[0])[-1].flatten(1)
        syn = network.layers(views.syn(label)[0])[-1].flatten(1)
        loss = loss + (real.mean(0) - syn.mean(0)).square().sum()
    return loss.detach(), *torch.autograd.grad(loss, views.image_syn)


def plain_features(network, views):
    centres = [network.layers(views.syn(label)[0]) for label in views.labels]
    centres = [[layer.mean(0) for layer in layers] for layers in centres]
    last = torch.stack([layers[-1].flatten() for layers in centres])
    loss = 0
    for label in views.labels:
        x, y = views.real(label)
        with torch.no_grad():
            real = network.layers(x)
        distances = [
            (r.mean(0) - s).square().sum() for r, s in zip(real, centres[label], strict=True)
        ]
        loss = loss + sum(0.1 * each for each in distances[:-2]) + distances[-2]
        loss = loss + 2 * distances[-1]
        inner = real[-1].flatten(1) @ last.T
        loss = loss + 0.01 * F.cross_entropy(inner, y, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, views.image_syn)


LOOPS = {
    "dc": plain_gradients,
    "dsa": plain_gradients,
    "dm": plain_distributions,
    "cafe": plain_features,
}
