"""A network as a function of one flat parameter vector, and the exact gradients of trajectory matching through it.

Notation (Cazenavette et al. 2022, section 3, algorithm 1):

    θ_i          the student's parameters after i steps, flat, (P,)
    x_i, y_i     the augmented mini-batch of synthetic images of step i, (B, C, H, W) and (B,)
    ℓ(θ, x)      mean cross-entropy of the network with parameters θ on the mini-batch x
    α            the learnable step size, a scalar
    θ*_t         an expert's parameters after t epochs

    θ_0 = θ*_t,   θ_{i+1} = θ_i − α ∇_θ ℓ(θ_i, x_i),   L = ‖θ_N − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖²

`AutogradUnroll` keeps the graph of all N steps, as MTT does. `AdjointUnroll` keeps only the θ_i, and walks back with
the adjoint v_i = ∂L/∂θ_i, from v_N = 2 (θ_N − θ*_{t+M}) / ‖θ*_t − θ*_{t+M}‖². All that step i adds comes from one
scalar, the derivative of the loss in the direction of v = v_{i+1}, held fixed:

    s_i(θ, x) = ∇_θ ℓ(θ, x) · v

    v_i = v − α ∂s_i/∂θ,   ∂L/∂x_i = −α ∂s_i/∂x,   ∂L/∂α = −Σ_i s_i             (all at θ_i, x_i)

since ∂s_i/∂θ = H_i v and ∂s_i/∂x = (∂g_i/∂x)ᵀ v, with the gradient g_i = ∇_θ ℓ and the Hessian H_i of step i. Counted
in forward passes, a step costs 3 on the way forward and 9 on the way back, 12 in all; the plain unroll, which keeps
what the 3 have computed, 9.
"""

import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value
from torch.nn import functional as F


class ReparamModule(nn.Module):
    """Call a network with its parameters taken from one flat vector, in `parameters()` order.

    The network's own parameters lend only their names and shapes. `num_params` is P, the length of the vector. `amp`
    computes in bfloat16; parameters, logits and gradients stay as they are. Raises ValueError for a network with batch
    statistics: they are no function of θ and x alone.
    """

    def __init__(self, network, amp=False):
        super().__init__()
        if any(True for _ in network.buffers()):
            raise ValueError("a student cannot have batch normalisation, whose statistics change from call to call: "
                             "take a network with instance, group or layer normalisation, or none")
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
        dtype = torch.bfloat16 if self.amp else x.dtype
        parts = flat_params.to(dtype).split(self.sizes)
        parameters = {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes)}
        return functional_call(self.network, parameters, (x.to(dtype),)).to(x.dtype)


class AutogradUnroll:
    """The reference: double backward through all N steps, whose graph is kept. `compile` is not used."""

    def __init__(self, student, compile=None):
        self.student = student

    def __call__(self, theta_start, theta_target, image_syn, syn_lr, batches):
        """L () and its exact gradients, ∂L/∂image_syn (shaped like `image_syn`) and ∂L/∂α ().

        theta_start   θ*_t, (P,)
        theta_target  θ*_{t+M}, (P,)
        image_syn     the leaf tensor that the batches are made from, with requires_grad
        syn_lr        α, a scalar leaf tensor with requires_grad
        batches       iterable of N pairs (x_i, y_i), x_i attached to `image_syn`'s graph
        """
        theta = theta_start.detach().requires_grad_(True)
        for x, y in batches:
            loss = F.cross_entropy(self.student(x, theta), y)
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - syn_lr * gradient
        matching_loss = (theta - theta_target).square().sum() / (theta_start - theta_target).square().sum()
        grad_image, grad_lr = torch.autograd.grad(matching_loss, (image_syn, syn_lr))
        return matching_loss.detach(), grad_image, grad_lr


class AdjointUnroll:
    """The same gradients in memory that does not grow with N, but for the θ_i and the graphs of augmentation.

    `compile` makes a pure function, from tensors to a tuple of tensors, faster: nothing else crosses from step to step.
    """

    def __init__(self, student, compile=lambda function: function):
        def loss(theta, x, y):
            return F.cross_entropy(student(x, theta), y)

        def step(theta, x, y, alpha):
            """θ_{i+1}"""
            return (theta - alpha * grad(loss)(theta, x, y),)

        def step_back(theta, x, y, alpha, v):
            """v_i, ∂L/∂x_i and what step i adds to ∂L/∂α, from v = v_{i+1}"""

            def s(theta, x):
                return grad(loss)(theta, x, y).dot(v)

            (s_theta, s_x), value = grad_and_value(s, argnums=(0, 1))(theta, x)
            return v - alpha * s_theta, -alpha * s_x, -value

        self.step, self.step_back = compile(step), compile(step_back)

    def __call__(self, theta_start, theta_target, image_syn, syn_lr, batches):
        """As of `AutogradUnroll`."""
        # All that is kept is allocated first, the θ_i in one piece: between activations, which come and go, they
        # would fragment the heap.
        batches, alpha = list(batches), syn_lr.detach()
        thetas = theta_start.detach().repeat(len(batches) + 1, 1).unbind()  # each (P,)
        for theta, following, (x, y) in zip(thetas, thetas[1:], batches):
            following.copy_(*self.step(theta, x.detach(), y, alpha))
        distance = (theta_start - theta_target).square().sum()
        matching_loss = (thetas[-1] - theta_target).square().sum() / distance
        v = 2 * (thetas[-1] - theta_target) / distance
        grad_image, grad_lr = torch.zeros_like(image_syn), torch.zeros_like(alpha)
        for theta, (x, y) in zip(thetas[-2::-1], batches[::-1]):
            v, grad_x, share = self.step_back(theta, x.detach(), y, alpha, v)
            grad_image += torch.autograd.grad(x, image_syn, grad_x)[0]
            grad_lr += share
        return matching_loss, grad_image, grad_lr


UNROLLS = {"adjoint": AdjointUnroll, "autograd": AutogradUnroll}
