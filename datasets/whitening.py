"""ZCA whitening, fitted in minutes and kept in a cache."""

import math

import kornia
import torch

from system import files

ZCA_EPS = 0.1


def eigenvectors(matrix, device):
    """Eigenvalues in ascending order and eigenvectors of a symmetric matrix, both on the CPU."""
    return [result.cpu() for result in torch.linalg.eigh(matrix.to(device))]


def fit_zca(images, eps=ZCA_EPS, device="cpu"):
    """kornia's ZCAWhitening(eps, compute_inv=True), fitted to float images (N, C, H, W) in [0, 1].

    `device` computes the eigenvectors, which takes longest. Images and transforms are on the CPU.

    kornia uses the singular values of the D×D covariance C. Here its eigenvectors V and eigenvalues
    λ are computed. With fewer images than dimensions, those of the N×N Gram matrix are computed
    instead, which has the same λ > 0. Both transforms are a multiple of the identity plus a
    correction on the span of V, so that the null space needs no vectors:

        (C + ε)^{−½} = ε^{−½} I − V diag(λ / (√(λ+ε) √ε (√(λ+ε) + √ε))) Vᵀ
        (C + ε)^{+½} = ε^{+½} I + V diag(λ / (√(λ+ε) + √ε)) Vᵀ
    """
    flat = images.flatten(1)
    mean = flat.mean(0, keepdim=True)
    centred = (flat - mean) / math.sqrt(len(flat) - 1)  # (N, D), so that C = centredᵀ centred
    if len(flat) < flat.shape[1]:
        eigenvalues, vectors = eigenvectors(centred @ centred.T, device)
        keep = eigenvalues > eigenvalues[-1] * 1e-6  # below: rounding
        eigenvalues = eigenvalues[keep]
        vectors = centred.T @ (vectors[:, keep] * eigenvalues.rsqrt())  # (D, rank)
    else:
        covariance = centred.T @ centred
        del centred  # 1 GB for EuroSAT
        eigenvalues, vectors = eigenvectors(covariance, device)
        del covariance
        eigenvalues = eigenvalues.clamp(min=0)
    root, root_eps = (eigenvalues + eps).sqrt(), math.sqrt(eps)
    zca = kornia.enhance.ZCAWhitening(eps=eps, compute_inv=True)
    zca.mean_vector = mean
    zca.transform_matrix = (
        vectors * (-eigenvalues / (root * root_eps * (root + root_eps)))
    ) @ vectors.T
    zca.transform_matrix.diagonal().add_(1 / root_eps)
    zca.transform_inv = (vectors * (eigenvalues / (root + root_eps))) @ vectors.T
    zca.transform_inv.diagonal().add_(root_eps)
    zca.fitted = True
    return zca


def whiten(images, train, cache, device="cpu"):
    """ZCA fitted to `images[train]` and applied to all: float32 images, and the transform.

    images  uint8 (N, C, H, W)
    cache   a file that keeps both, 2.5 GB for EuroSAT, and is memory-mapped when read back: fitting
            takes minutes at 12,288 dimensions
    device  where it is fitted
    """
    zca = kornia.enhance.ZCAWhitening(eps=ZCA_EPS, compute_inv=True)
    cached = files.read_cache(cache, "images", "mean", "transform", "inverse")
    if cached:
        images, zca.mean_vector, zca.transform_matrix, zca.transform_inv = cached.values()
        zca.fitted = True
        return images, zca
    size = 4 * images.numel() + 8 * images[0].numel() ** 2  # the images, and both transforms
    print(f"fitting ZCA on {len(train)} images; kept in {cache} ({size / 1e9:.1f} GB)", flush=True)
    zca = fit_zca(images[train].float().div_(255), device=device)
    white = torch.empty(images.shape)
    for part, out in zip(images.split(2048), white.split(2048)):
        out.copy_(zca(part.float().div_(255)))
    fit = {"mean": zca.mean_vector, "transform": zca.transform_matrix, "inverse": zca.transform_inv}
    files.write_cache(cache, fit | {"images": white})
    return white, zca
