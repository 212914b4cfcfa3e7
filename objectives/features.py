"""The synthetic images of a class should have the mean features of its real ones (DM, CAFE).

Notation (Zhao & Bilen 2023, arXiv 2110.04181, equation 4; Wang et al. 2022, arXiv 2203.01531,
equations 4 to 8; that of reparam_module.py):

    X_c, S_c   real and synthetic images of class c
    A          augmentation, the same draw for both
    φ          the input of the last layer of a network with parameters θ, a vector
    φ_l        its features after activation l = 1 … n, and φ_{n+1} = φ, shaped
    w_l        1 for the last two of the n + 1, and 0.1 for the others
    m_c        mean φ(A(S_c)), the centre of a class

DM, on a fresh network for each iteration:

    L = Σ_c ‖mean φ(A(X_c)) − m_c‖²

CAFE, on a network that is trained on the synthetic images between its updates:

    L = Σ_c Σ_l w_l ‖mean φ_l(A(X_c)) − mean φ_l(A(S_c))‖² + Σ_c ‖mean φ(A(X_c)) − m_c‖²
        + 0.01 Σ_c Σ_{x ∈ A(X_c)} CE(softmax_c'(φ(x)·m_c'), c)

The authors of CAFE train and update until accuracies stop changing. Here, DC's fixed loops take
their place, since their length is known.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from networks import LastFeatures
from objectives.classwise import NO_TRAINING, loops_of, make_classwise
from objectives.pairs import in_parts, mean_over_parts

EARLY_WEIGHT, LATE_WEIGHT = 0.1, 1.0  # w_l
DISCRIMINATION = 0.01

# --------------------------------------------------------------------------------------------------
# All features of a network, as a network of their own


class AllFeatures(LastFeatures):
    """A list of √w_l φ_l of all layers (B, …), and φ (B, D) behind them.

    The square of a difference of their means is a summand of CAFE's first two terms.
    """

    def forward(self, x):
        *early, late, last = self.network.layers(x)
        scaled = [EARLY_WEIGHT**0.5 * layer for layer in early]
        scaled += [LATE_WEIGHT**0.5 * layer for layer in (late, last)]
        return [*scaled, last]


# Images are averaged before layers are put side by side: the averages are small.


def mean_features(student):
    """Mean features ((D,),) as a compilable function of θ and images (B, C, H, W)."""

    def real_means(theta, x):
        return (torch.cat([layer.mean(0).flatten() for layer in student(x, theta)]),)

    return real_means


def mean_and_last(student):
    """Mean features (D,), and φ of each image (B, size), the last of a student's features.

    A compilable function of θ and images (B, C, H, W).
    """

    def real_features(theta, x):
        layers = student(x, theta)
        return torch.cat([layer.mean(0).flatten() for layer in layers]), layers[-1]

    return real_features


def class_means(student):
    """Mean features (classes, D), and those of φ alone (classes, size).

    A compilable function of θ and images (classes, n, C, H, W).
    """

    def syn_means(theta, x):
        layers = student(x.flatten(0, 1), theta)
        means = [layer.unflatten(0, x.shape[:2]).mean(1).flatten(1) for layer in layers]
        return torch.cat(means, dim=1), means[-1]

    return syn_means


# --------------------------------------------------------------------------------------------------
# The objectives, as functions of θ and the views of an iteration


@dataclass(frozen=True)
class MatchDistributions:
    """L of DM, over the classes `own`, and its gradient with respect to the synthetic images."""

    real_means: Callable  # `mean_features` of φ, compiled
    syn_means: Callable  # `class_means` of φ, compiled

    def __call__(self, theta, views, own):
        with torch.no_grad():
            batches = (views.real(label)[0] for label in own)
            real = [mean_over_parts(self.real_means, theta, x) for x in batches]
        images = torch.stack([views.syn(label)[0] for label in own])  # (classes, n, C, H, W)
        syn, _ = self.syn_means(theta, images)
        loss = (torch.stack(real) - syn).square().sum()
        return loss.detach(), *torch.autograd.grad(loss, views.image_syn)


@dataclass(frozen=True)
class AlignFeatures:
    """L of CAFE and its gradient with respect to the synthetic images.

    A rank has the summands of its classes, `own`, in which the centres of all classes stand.
    """

    real_features: Callable  # `mean_and_last` of all features, compiled
    syn_means: Callable  # `class_means` of all features, compiled

    def __call__(self, theta, views, own):
        images = torch.stack([views.syn(label)[0] for label in views.labels])
        means, centres = self.syn_means(theta, images)  # (classes, D), (classes, size)
        loss = 0
        for label in own:
            x, y = views.real(label)
            real, last = self.of_real(theta, x)
            loss = loss + (real - means[label]).square().sum()
            inner = last @ centres.T  # (B, classes)
            loss = loss + DISCRIMINATION * F.cross_entropy(inner, y, reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, views.image_syn)

    @torch.no_grad()
    def of_real(self, theta, x):
        """Mean features (D,) of real images (B, C, H, W), and φ of each (B, size)."""
        mean, last = 0, []
        for share, (of_part, features) in in_parts(self.real_features, theta, x):
            mean = mean + share * of_part
            last.append(features)
        return mean, torch.cat(last)


# --------------------------------------------------------------------------------------------------
# The flags, as these objectives take them


def make_distributions(args, inputs, state):
    """The iteration of --objective=dm."""
    compile = inputs.machine.compiler.function
    student = inputs.student.once(LastFeatures)
    goal = MatchDistributions(compile(mean_features(student)), compile(class_means(student)))
    return make_classwise(args, inputs, state, goal, NO_TRAINING)


def make_features(args, inputs, state):
    """The iteration of --objective=cafe."""
    compile = inputs.machine.compiler.function
    student = inputs.student.once(AllFeatures)
    goal = AlignFeatures(compile(mean_and_last(student)), compile(class_means(student)))
    return make_classwise(args, inputs, state, goal, loops_of(args.ipc))
