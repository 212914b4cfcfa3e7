"""A network as a function of one flat parameter vector, and the student's trajectory that is differentiated through.

Notation (Cazenavette et al. 2022, section 3, algorithm 1):

    θ_i          the student's parameters after i steps, flat, (P,)
    x_i, y_i     the augmented mini-batch of synthetic images of step i, (B, C, H, W) and (B,)
    ℓ(θ, x)      mean cross-entropy of the network with parameters θ on the mini-batch x
    α            the learnable step size
    θ*_t         an expert's parameters after t epochs

    θ_0 = θ*_t,   θ_{i+1} = θ_i − α ∇_θ ℓ(θ_i, x_i),   L = ‖θ_N − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖²
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F


class ReparamModule(nn.Module):
    """Call a network with its parameters taken from one flat vector, in `parameters()` order.

    The network's own parameters lend only their names and shapes. `num_params` is P, the length of the vector. `amp`
    computes in bfloat16 where autocast does; parameters, logits and gradients stay as they are.
    """

    def __init__(self, network, amp=False):
        super().__init__()
        self.network, self.amp = network, amp
        self.names, parameters = zip(*network.named_parameters())
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        self.num_params = sum(self.sizes)

    def forward(self, x, flat_params):
        """Logits (B, classes) of images `x` under `flat_params` (P,). Raises ValueError for another P than its own."""
        if flat_params.shape != (self.num_params,):
            raise ValueError(
                f"expected a flat vector of {self.num_params} parameters, got shape {tuple(flat_params.shape)}")
        parts = flat_params.split(self.sizes)
        parameters = {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes)}
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return functional_call(self.network, parameters, (x,)).to(x.dtype)


def match_trajectory(student, theta_start, theta_target, image_syn, syn_lr, batches):
    """The matching loss L of a student trained on synthetic batches, and its exact gradients.

    student       ReparamModule
    theta_start   θ*_t, (P,)
    theta_target  θ*_{t+M}, (P,)
    image_syn     the leaf tensor that the batches were made from, with requires_grad
    syn_lr        α, a scalar leaf tensor with requires_grad
    batches       iterable of N pairs (x_i, y_i), x_i attached to `image_syn`'s graph

    Returns L (), ∂L/∂image_syn (shaped like `image_syn`) and ∂L/∂α (). This is MTT's own way, the plain unroll: the
    graph of all N steps is kept and walked back once, so memory grows with N.
    """
    theta = theta_start.detach().requires_grad_(True)
    for x, y in batches:
        loss = F.cross_entropy(student(x, theta), y)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - syn_lr * gradient
    matching_loss = (theta - theta_target).square().sum() / (theta_start - theta_target).square().sum()
    grad_image, grad_lr = torch.autograd.grad(matching_loss, (image_syn, syn_lr))
    return matching_loss.detach(), grad_image, grad_lr
