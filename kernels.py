"""Kernels of infinitely wide networks, and the ridge regression that trains one in closed form.

Notation (Nguyen et al. 2021, arXiv 2011.00050, KIP; Jacot et al. 2018, arXiv 1806.07572, the NTK):

    x, x'      two images as vectors, (D,)
    k(x, x')   the kernel of the network at initialisation (NNGP)
    Θ(x, x')   the kernel of the network in training (NTK)

The network is fully connected: three hidden layers of ReLUs and a linear one, σ_w² = 2,
σ_b² = 0.01, in the NTK parametrisation. It begins with

    k(x, x') = σ_w² x·x' / D + σ_b²,   Θ = k

and each hidden layer turns these, with s = √(k(x, x) k(x', x')) and c = k(x, x') / s, into

    κ₁ = s (√(1 − c²) + (π − acos c) c) / 2π,   κ₀ = (π − acos c) / 2π
    k ← σ_w² κ₁ + σ_b²,   Θ ← k + σ_w² κ₀ Θ                         (both with the new k)

Trained on n images x_s with targets y_s (n, classes), the network predicts for images x_t

    f(x_t) = K_ts (K_ss + λ tr(K_ss)/n I)⁻¹ y_s,   λ = 1e-6
"""

import math

import torch
from torch.nn import functional as F

HIDDEN_LAYERS = 3
WEIGHTS, BIAS = 2.0, 0.01  # the variances σ_w² and σ_b²
RIDGE = 1e-6  # λ
ROWS = 2048  # of images to predict at once: 40 MB for each of a layer's terms, at n = 5000


def wide_kernels(x, other):
    """k and Θ (N, n) of images x (N, D) with `other` images (n, D)."""
    size = x.shape[1]
    k = WEIGHTS * x @ other.T / size + BIAS  # (N, n)
    of_x, of_other = (WEIGHTS * z.square().sum(1) / size + BIAS for z in (x, other))  # k(x, x)
    theta = k
    for _ in range(HIDDEN_LAYERS):
        s = (of_x[:, None] * of_other).sqrt()
        cos, angle, sin = cosine_angle_sine(k / s)
        k1 = s * (sin + (math.pi - angle) * cos) / (2 * math.pi)
        k0 = (math.pi - angle) / (2 * math.pi)
        k = WEIGHTS * k1 + BIAS
        theta = k + WEIGHTS * k0 * theta
        of_x, of_other = (WEIGHTS * z / 2 + BIAS for z in (of_x, of_other))  # κ₁ = k/2 at c = 1
    return k, theta


def cosine_angle_sine(c):
    """c, acos c and √(1 − c²), which are 1, 0 and 0 where c is 1 but for rounding.

    There acos has no derivative. An image's angle with itself does not depend on it, so it is 0.
    """
    rounding = 4 * torch.finfo(c.dtype).eps
    is_same = c > 1 - rounding
    inside = torch.where(is_same, 0, c).clamp(min=rounding - 1)
    zero = torch.zeros_like(c)
    angle = torch.where(is_same, zero, inside.acos())
    sin = torch.where(is_same, zero, (1 - inside.square()).sqrt())
    return torch.where(is_same, zero + 1, inside), angle, sin


def ntk(x, other):
    """Θ (N, n) of images x (N, D) with `other` images (n, D)."""
    return wide_kernels(x, other)[1]


def ridge_coefficients(kernel, targets):
    """(K + λ tr(K)/n I)⁻¹ y, (n, classes), for a kernel matrix K (n, n) and targets y."""
    ridge = RIDGE * kernel.trace() / len(kernel)
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    return torch.linalg.solve(kernel + ridge * identity, targets)


def fit(kernel, x, targets):
    """Coefficients (n, classes) of the network that is trained on images x (n, D).

    In float64, since the rounding of float32 is as large as λ.
    """
    x = x.double()
    return ridge_coefficients(kernel(x, x), targets.double()).to(targets.dtype)


def centred_targets(labels, num_classes):
    """Targets (..., classes) of labels, classes or probabilities (..., classes): less 1/classes."""
    rows = labels if labels.is_floating_point() else F.one_hot(labels, num_classes).float()
    return rows - 1 / num_classes


# --------------------------------------------------------------------------------------------------
# Kernel machines by name

KERNELS = {"NTK": ntk}
