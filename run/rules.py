"""Rules by which all that is learned follows its gradients: optimisers, kinds of labels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Optimizer:
    """A value of --optimizer_img or --optimizer_lr, or what labels are learned by."""

    make: Callable  # of parameters and a learning rate
    rate: float  # the default learning rate
    of_log: bool = False  # learns the logarithm, so that the value itself stays positive


def sgd(parameters, rate):
    return torch.optim.SGD(parameters, lr=rate, momentum=0.5)


def heavy_sgd(parameters, rate):
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def adam(parameters, rate, betas=(0.9, 0.999)):
    return torch.optim.Adam(parameters, lr=rate, betas=betas)


IMAGE_OPTIMIZERS = {"sgd": Optimizer(sgd, 1000.0), "adam": Optimizer(adam, 0.01)}
STEP_SIZE_OPTIMIZERS = {  # --optimizer_lr
    "sgd": Optimizer(sgd, 1e-5),
    "log_adam": Optimizer(lambda p, rate: adam(p, rate, (0.9, 0.99)), 0.01, of_log=True),
}


def softmax(logits):
    return logits.softmax(1)


def probabilities_of(targets):
    """Probabilities (n, classes) for the targets of kernel machines (n, classes).

    `kernels.centred_targets` is undone, and what is negative then counts as 0. Centred
    probabilities come back unchanged.
    """
    shares = (targets + 1 / targets.shape[1]).clamp(min=0)
    return shares / shares.sum(1, keepdim=True).clamp(min=1e-12)


@dataclass(frozen=True)
class Labels:
    """A value of --labels."""

    soft: bool  # probabilities, at first the experts'
    optimizer: Optimizer | None = None  # by which they are learned; None: they are not
    read: Callable = softmax  # what networks take of the tensor that stands for them, a matrix
    centred: bool = False  # whether that tensor holds targets of a kernel machine

    @property
    def learned(self):
        return self.optimizer is not None

    @property
    def in_rows(self):
        """True if they are read from a matrix (n, classes)."""
        return self.soft or self.centred


LABELS = {
    "hard": Labels(soft=False),
    "soft": Labels(soft=True),
    "learned": Labels(soft=True, optimizer=Optimizer(heavy_sgd, 5.0)),
    "targets": Labels(
        soft=False, optimizer=Optimizer(adam, 0.04), read=probabilities_of, centred=True
    ),
}


@dataclass(frozen=True)
class Rules:
    """Rules by which all that is learned follows its gradients, from flags of these names."""

    optimizer_img: str = "sgd"
    lr_img: float = 1000.0
    optimizer_lr: str = "sgd"
    lr_lr: float | None = 1e-5  # None: α is not learned
    labels: str = "hard"
    lr_labels: float = 5.0  # of labels that are learned
    ema: float = 0.0
    clip: bool = False  # gradients at twice their running norms
    halvings: tuple = ()  # iterations after which the images' rate is halved
