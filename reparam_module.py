"""A network as a function of one parameter vector, and exact gradients of trajectory matching.

Notation (Cazenavette et al. 2022, section 3, algorithm 1):

    θ_i          the student's parameters after i steps, flat, (P,)
    x_i, y_i     step i's augmented mini-batch of synthetic images, (B, C, H, W), and labels (B,)
    ℓ(θ, x)      mean cross-entropy of the network with parameters θ on the mini-batch x
    α            the learnable step size, a scalar
    θ*_t         an expert's parameters after t epochs

    θ_0 = θ*_t,   θ_{i+1} = θ_i − α ∇_θ ℓ(θ_i, x_i),   L = ‖θ_N − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖²

`AutogradUnroll` keeps the graph of all N steps, as MTT does. `AdjointUnroll` keeps only the θ_i,
and walks back with the adjoint v_i = ∂L/∂θ_i, from v_N = 2 (θ_N − θ*_{t+M}) / ‖θ*_t − θ*_{t+M}‖².
All that step i adds comes from one scalar, the derivative of the loss in the direction of
v = v_{i+1}, held fixed:

    s_i(θ, x) = ∇_θ ℓ(θ, x) · v

    v_i = v − α ∂s_i/∂θ,   ∂L/∂x_i = −α ∂s_i/∂x,   ∂L/∂α = −Σ_i s_i          (all at θ_i, x_i)

since ∂s_i/∂θ = H_i v and ∂s_i/∂x = (∂g_i/∂x)ᵀ v, with the gradient g_i = ∇_θ ℓ and the Hessian H_i
of step i. In units of a forward pass, a step costs 3 on the way forward and 9 on the way back, 12
in all; the plain unroll, which keeps what the 3 have computed, 9.

Both engines take batches as they were drawn, and make (x_i, y_i) of them by a pure function,
`augment(image_syn, batch)`. The adjoint makes them twice, rather than keep the graphs that lead
from the synthetic images to every x_i.
"""

import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value
from torch.nn import functional as F


class ReparamModule(nn.Module):
    """Call a network with its parameters taken from one flat vector, in `parameters()` order.

    The network's own parameters lend only their names and shapes. `num_params` is P, the length of
    the vector. `amp` computes in bfloat16; parameters, logits and gradients stay as they are.
    Raises ValueError for a network with batch statistics: its output depends on more than θ and x.
    """

    def __init__(self, network, amp=False):
        super().__init__()
        if any(True for _ in network.buffers()):
            raise ValueError(
                "a student cannot have batch normalisation, whose statistics change with every "
                "call: take a network with instance, group or layer normalisation, or none"
            )
        self.network = network
        self.amp = amp
        self.names, parameters = zip(*network.named_parameters())
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        self.num_params = sum(self.sizes)

    def forward(self, x, flat_params):
        """Logits (B, classes) of images `x` for parameters `flat_params` (P,).

        Raises ValueError for another P.
        """
        if flat_params.shape != (self.num_params,):
            raise ValueError(
                f"expected a flat vector of {self.num_params} parameters, "
                f"got shape {tuple(flat_params.shape)}"
            )
        dtype = torch.bfloat16 if self.amp else x.dtype
        parts = flat_params.to(dtype).split(self.sizes)
        parts = [part.view(shape) for part, shape in zip(parts, self.shapes)]
        parameters = dict(zip(self.names, parts))
        return functional_call(self.network, parameters, (x.to(dtype),)).to(x.dtype)


def as_they_are(image_syn, batch):
    """An `augment` for batches (x_i, y_i) that are made already, x_i in `image_syn`'s graph."""
    return batch


class AutogradUnroll:
    """The reference: double backward through all N steps, whose graph is kept. Never compiled."""

    def __init__(self, student, augment=as_they_are, compile=None):
        self.student = student
        self.augment = augment

    def __call__(self, theta_start, theta_target, image_syn, syn_lr, batches):
        """L () and its exact gradients, ∂L/∂image_syn (shaped like `image_syn`) and ∂L/∂α ().

        theta_start   θ*_t, (P,)
        theta_target  θ*_{t+M}, (P,)
        image_syn     synthetic images, a leaf tensor with requires_grad
        syn_lr        α, a scalar leaf tensor with requires_grad
        batches       N batches, of which `augment(image_syn, batch)` makes (x_i, y_i)
        """
        theta = theta_start.detach().requires_grad_(True)
        for batch in batches:
            x, y = self.augment(image_syn, batch)
            loss = F.cross_entropy(self.student(x, theta), y)
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - syn_lr * gradient
        distance = (theta_start - theta_target).square().sum()
        matching_loss = (theta - theta_target).square().sum() / distance
        grad_image, grad_lr = torch.autograd.grad(matching_loss, (image_syn, syn_lr))
        return matching_loss.detach(), grad_image, grad_lr


class AdjointUnroll:
    """The same gradients in memory that grows with N only by the θ_i.

    `compile` makes a pure function, from tensors to a tuple of tensors, faster: nothing else
    crosses from one step to the next.
    """

    def __init__(self, student, augment=as_they_are, compile=lambda function: function):
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

        self.augment = augment
        self.step = compile(step)
        self.step_back = compile(step_back)

    def __call__(self, theta_start, theta_target, image_syn, syn_lr, batches):
        """The same as for `AutogradUnroll`."""
        alpha = syn_lr.detach()
        # The θ_i are allocated in one piece, before any activation: between these, which come and
        # go, they would fragment the heap.
        thetas = theta_start.detach().repeat(len(batches) + 1, 1).unbind()  # each (P,)
        for theta, following, batch in zip(thetas, thetas[1:], batches):
            with torch.no_grad():
                x, y = self.augment(image_syn, batch)
            following.copy_(*self.step(theta, x.detach(), y, alpha))

        distance = (theta_start - theta_target).square().sum()
        matching_loss = (thetas[-1] - theta_target).square().sum() / distance
        v = 2 * (thetas[-1] - theta_target) / distance
        grad_image = torch.zeros_like(image_syn)
        grad_lr = torch.zeros_like(alpha)
        for theta, batch in zip(thetas[-2::-1], batches[::-1]):
            x, y = self.augment(image_syn, batch)  # once more, now for its graph
            v, grad_x, share = self.step_back(theta, x.detach(), y, alpha, v)
            grad_image += torch.autograd.grad(x, image_syn, grad_x)[0]
            grad_lr += share
        return matching_loss, grad_image, grad_lr


UNROLLS = {"adjoint": AdjointUnroll, "autograd": AutogradUnroll}
