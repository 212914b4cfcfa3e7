"""A kernel machine trained on the synthetic images should predict the labels of real ones (KIP).

Notation (Nguyen et al. 2021, arXiv 2011.00050, equation 7; kernels.py):

    x_s, y_s   synthetic images and their targets, (n, D) and (n, classes)
    x_t, y_t   a batch of B real images and their targets: one-hot less 1/classes

    L = ½ mean (K_ts (K_ss + λ tr(K_ss)/n I)⁻¹ y_s − y_t)²

K is the NTK, and the mean is over images and classes. There is no network and no unrolled step.
Targets y_s begin as those of real images, and are learned, too. A convolutional kernel (Nguyen et
al. 2021, arXiv 2107.13034) reaches more, but costs (64²)² products for each pair of images.
"""

from dataclasses import dataclass

import torch

import utils
from datasets.preprocessing import Data
from kernels import centred_targets, fit, ntk
from run.state import Step
from system.process import ReportedError
from system.ranks import Ranks


def kip_loss(x_syn, y_syn, x_real, y_real):
    """L, a scalar."""
    predicted = ntk(x_real, x_syn) @ fit(ntk, x_syn, y_syn)  # (B, classes)
    return (predicted - y_real).square().mean() / 2


@dataclass(frozen=True)
class KernelRidge:
    """The `Step` of an iteration, a function of the state and its number.

    Each rank has a part of the batch.
    """

    data: Data
    batch: int
    factor: int
    seed: int
    ranks: Ranks

    def __call__(self, state, it):
        """The same `Step` on every rank."""
        images, labels = self.data.train
        classes = self.data.form.num_classes
        random = utils.make_generator("kernel", self.seed, it)
        drawn = torch.randperm(len(labels), generator=random)[: self.batch]
        drawn = self.ranks.mine(drawn).to(images.device)
        x_real, y_real = images[drawn].flatten(1), centred_targets(labels[drawn], classes)

        learned = {name: t.detach().requires_grad_(True) for name, t in state.learned.items()}
        x_syn = utils.decode(learned["images"], self.factor).flatten(1)
        y_syn = learned.get("labels")
        if y_syn is None:
            y_syn = centred_targets(state.label_syn, classes)
        loss = kip_loss(x_syn, y_syn, x_real, y_real)
        gradients = torch.autograd.grad(loss, list(learned.values()))
        loss, *gradients = self.ranks.mean([loss.detach(), *gradients])
        return Step(loss, dict(zip(learned, gradients)), {}, "kernel")


def check_batch(args, form, size):
    """Raise ReportedError if ranks cannot share out a batch evenly."""
    if args.batch_objective % size:
        raise ReportedError(
            f"--batch_objective={args.batch_objective} cannot be shared out among {size} "
            f"processes: give a multiple of {size}"
        )


def make_kernel(args, inputs, state):
    """The iteration of --objective=kip."""
    ranks = inputs.machine.ranks
    images = len(inputs.data.train[1])
    batch = min(args.batch_objective, images - images % ranks.size)
    return KernelRidge(inputs.data, batch, args.factor, args.seed, ranks)
