"""The synthetic images of a class should have the gradient of its real ones (DC, DSA).

Notation (Zhao et al. 2021, arXiv 2006.05929, equation 9; that of reparam_module.py):

    X_c, S_c   real and synthetic images of class c
    A          augmentation, none in DC; in DSA, the same draw for both (Zhao & Bilen 2021, arXiv
               2102.08259)
    g, h       ∇_θ ℓ(θ, A(X_c), c) and ∇_θ ℓ(θ, A(S_c), c)

    L = Σ_c D(g, h),   D(g, h) = Σ_layers Σ_i (1 − g_i·h_i / (‖g_i‖ ‖h_i‖ + 1e-6))

where g_i and h_i are the gradients of the weights of a layer's output i. Biases and other
parameters of one dimension do not count. θ is a fresh network's. Between the matches of the outer
loop, it is trained on the synthetic images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.func import grad
from torch.nn import functional as F

from objectives.classwise import loops_of, make_classwise
from objectives.pairs import mean_over_parts

EPSILON = 1e-6

# --------------------------------------------------------------------------------------------------
# Distances of gradients, lists of tensors in `parameters()` order


def ours(real, syn):
    """D, the distance of the papers, a scalar."""
    total = 0
    for g, h in zip(real, syn):
        if g.dim() > 1:
            g, h = g.flatten(1), h.flatten(1)  # (outputs, inputs)
            scale = g.norm(dim=1) * h.norm(dim=1) + EPSILON
            total = total + (1 - (g * h).sum(1) / scale).sum()
    return total


def mse(real, syn):
    """‖g − h‖², of all parameters."""
    return sum((g - h).square().sum() for g, h in zip(real, syn))


def cos(real, syn):
    """1 − the cosine of g and h, of all parameters."""
    g, h = (torch.cat([part.flatten() for part in parts]) for parts in (real, syn))
    return 1 - (g @ h) / (g.norm() * h.norm() + EPSILON)


# --------------------------------------------------------------------------------------------------
# The objective


def class_gradient(student):
    """∇_θ ℓ (P,) as a compilable function of θ, images and labels."""

    def loss(theta, x, y):
        return F.cross_entropy(student(x, theta), y)

    def real_gradient(theta, x, y):
        return (grad(loss)(theta, x, y),)

    return real_gradient


def gradient_distance(student, distance=ours):
    """D as a compilable function of θ, images of a class, their labels, and g (P,)."""
    gradient = class_gradient(student)

    def matching_distance(theta, x, y, target):
        (found,) = gradient(theta, x, y)
        return (distance(student.parts(target), student.parts(found)),)

    return matching_distance


@dataclass(frozen=True)
class MatchGradients:
    """L and its gradient with respect to the synthetic images, class by class.

    Only one class's graph is held at a time.
    """

    real_gradient: Callable  # `class_gradient`, compiled
    distance: Callable  # `gradient_distance`, compiled

    def __call__(self, theta, views, own):
        loss, gradient = theta.new_zeros(()), torch.zeros_like(views.image_syn)
        for label in own:
            with torch.no_grad():
                target = mean_over_parts(self.real_gradient, theta, *views.real(label))
            (distance,) = self.distance(theta, *views.syn(label), target)
            gradient += torch.autograd.grad(distance, views.image_syn)[0]
            loss += distance.detach()
        return loss, gradient


def make_gradients(args, inputs, state):
    """The iteration of --objective=dc and dsa, which differ by what augments."""
    compile, student = inputs.machine.compiler.function, inputs.student
    real_gradient = compile(class_gradient(student.once()))
    goal = MatchGradients(real_gradient, compile(gradient_distance(student)))
    return make_classwise(args, inputs, state, goal, loops_of(args.ipc))
