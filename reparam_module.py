"""A network as a function of one parameter vector, and exact gradients through its training.

Notation (Cazenavette et al. 2022, section 3, algorithm 1):

    θ_i          the student's parameters after i steps, flat, (P,)
    x_i, y_i     step i's augmented mini-batch of synthetic images, (B, C, H, W), and labels:
                 classes (B,), or probabilities (B, classes)
    ℓ(θ, x, y)   mean cross-entropy of the network with parameters θ on a mini-batch
    α            the learnable step size, a scalar
    L            the objective, a function of θ_N

    θ_{i+1} = f(θ_i, x_i, y_i, α),   f(θ, x, y, α) = θ − α ∇_θ ℓ(θ, x, y)

With momentum μ, the student also has a velocity u_i, which starts at 0. Its state z_i is the pair
(θ_i, u_i), a matrix (2, P), and f is a function of z:

    u_{i+1} = μ u_i + ∇_θ ℓ(θ_i, x_i, y_i),   θ_{i+1} = θ_i − α u_{i+1}

Below, θ_i stands for either, and v_i for the adjoint of either. L looks at θ_N alone, so the
adjoint of u_N is 0. As u enters linearly, momentum costs no further product (Deng & Russakovsky,
arXiv 2206.02916).

Two objectives unroll a student (objectives/):

    trajectory   L(θ_N) = ‖θ_N − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖², where θ*_t are an expert's
                 parameters after t epochs, and θ_0 = θ*_t
    loss         L(θ_N) = ℓ(θ_N, x, y) on a batch of real images, where θ_0 are the parameters of a
                 fresh network after some steps that are not differentiated

`AutogradUnroll` keeps the graph of all N steps, as MTT does. `AdjointUnroll` walks back step by
step, with the adjoint v_i = ∂L/∂θ_i, from v_N = ∇L(θ_N). Step i only adds products of v_{i+1} with
the Jacobians of f:

    v_i = (∂f/∂θ)ᵀ v_{i+1},   ∂L/∂x_i = (∂f/∂x)ᵀ v_{i+1},   ∂L/∂y_i = (∂f/∂y)ᵀ v_{i+1},
    ∂L/∂α = Σ_i (∂f/∂α)ᵀ v_{i+1}                                   (all at θ_i, x_i, y_i, α)

They need the activations of step i. Those of the last steps are kept, as many as `memory` allows.
Of the earlier steps only θ_i is kept, and the step is repeated on the way back. In units of a
forward pass, a step costs 3 and its derivative 6: 9 if activations are kept, as in the plain
unroll, and 12 if not. A compiled step keeps little: the results of convolutions and matrix
products, from which the rest follows cheaply.

Both engines take drawn batches, and turn them into (x_i, y_i) by a pure function,
`augment(synthetic, batch)`, which can be computed twice.

If ranks r = 1 … R split each batch into equal parts (x_i^r, y_i^r), ℓ is the mean of theirs, and so
f is the mean of f(θ, x^r, y^r, α). `AdjointUnroll` then uses the means over the ranks for θ_{i+1}
and v_i, with two collectives of P numbers per step. Each rank adds up its own part of ∂L/∂x_i,
∂L/∂y_i and ∂L/∂α. The caller takes their means over the ranks, once.
"""

import copy

import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from networks import AvgPool, is_compiled_for_cpu


def identity(what):
    """The argument itself."""
    return what


class ReparamModule(nn.Module):
    """Call a network with its parameters taken from one flat vector, in `parameters()` order.

    The network's own parameters only provide names and shapes. `num_params` is P, the length of the
    vector. `amp` computes in bfloat16. Parameters, logits and gradients keep their precision.
    `twice`: compiled code is differentiated twice, as an unrolled student's is. Raises ValueError
    for a network with batch statistics: its output depends on more than θ and x.
    """

    def __init__(self, network, amp=False, twice=True):
        super().__init__()
        for pooling in network.modules():
            if isinstance(pooling, AvgPool):
                pooling.differentiated_twice = twice
        fault = student_fault(network)
        if fault:
            raise ValueError(fault)
        self.network = network
        self.amp = amp
        self.names, parameters = zip(*network.named_parameters())
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        self.num_params = sum(self.sizes)

    def once(self, features=identity):
        """The same network, or a network of its features, for code that is differentiated once."""
        same = {id(parameter): parameter for parameter in self.network.parameters()}
        network = copy.deepcopy(self.network, same)  # which shares the parameters
        return ReparamModule(features(network), self.amp, twice=False)

    def forward(self, x, flat_params):
        """Logits (B, classes) of images `x` for parameters `flat_params` (P,).

        Of a network of features (`once`), a list of them. Raises ValueError for another P.
        """
        if flat_params.shape != (self.num_params,):
            raise ValueError(
                f"expected a flat vector of {self.num_params} parameters, "
                f"got shape {tuple(flat_params.shape)}"
            )
        dtype = torch.bfloat16 if self.amp else x.dtype
        parameters = dict(zip(self.names, self.parts(flat_params.to(dtype))))
        images = x.to(dtype)
        if is_compiled_for_cpu(images):
            # The faster layout on a CPU. On a GPU, the compiler chooses it.
            images = images.contiguous(memory_format=torch.channels_last)
        result = functional_call(self.network, parameters, (images,))
        if isinstance(result, torch.Tensor):
            return result.to(x.dtype)
        return [features.to(x.dtype) for features in result]

    def parts(self, vector):
        """A vector (P,) as tensors with the shapes of the parameters."""
        parts = vector.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]


def student_fault(network):
    """The reason why a network cannot be a student; None if it can."""
    if any(True for _ in network.buffers()):
        return (
            "a student cannot have batch normalisation, whose statistics change with every "
            "call: take a network with instance, group or layer normalisation, or none"
        )


def as_they_are(synthetic, batch):
    """An `augment` for ready-made batches (x_i, y_i), in the graph of `synthetic`."""
    return batch


def make_step(student, momentum):
    """f as a compilable function of the student's state, images, labels and α."""

    def loss(theta, x, y):
        return F.cross_entropy(student(x, theta), y)

    def step(theta, x, y, alpha):
        """θ_{i+1} = f(θ_i, x_i, y_i, α)"""
        return (theta - alpha * grad(loss)(theta, x, y),)

    def step_with_momentum(z, x, y, alpha):
        theta, velocity = z
        velocity = momentum * velocity + grad(loss)(theta, x, y)
        return (torch.stack([theta - alpha * velocity, velocity]),)

    return step_with_momentum if momentum else step


class Unroll:
    """The common part of both engines: a student's step, and steps without a gradient.

    student    a `ReparamModule`
    augment    makes (x_i, y_i) from what is learned and a drawn batch
    compile    speeds up a function from tensors to a tuple of tensors
    memory     bytes for kept activations; with 0, memory grows with N only by the θ_i
    mean       where ranks split each batch: the mean over them of a tensor
    momentum   μ
    """

    shards_batches = True  # whether ranks may split each batch (--shard_batch)

    def __init__(
        self,
        student,
        augment=as_they_are,
        compile=identity,
        memory=0,
        mean=identity,
        momentum=0.0,
    ):
        self.student = student
        self.augment = augment
        self.momentum = momentum
        self.step = compile(make_step(student, momentum))
        self.plain_step = compile(make_step(student.once(), momentum))  # of `advance`
        self.memory = memory
        self.mean = mean
        self.bytes_per_step = 0  # what a step's graph keeps, known after the first step

    def state_of(self, theta):
        """The student's state: with momentum (2, P), of parameters (P,) at rest; else θ itself."""
        if self.momentum and theta.dim() == 1:
            return torch.stack([theta, torch.zeros_like(theta)])
        return theta

    @torch.no_grad()
    def advance(self, theta, synthetic, syn_lr, batches):
        """The student's state after a step on each of these batches, without gradients."""
        theta = self.state_of(theta)
        for batch in batches:
            torch.compiler.cudagraph_mark_step_begin()
            (theta,) = self.plain_step(theta, *self.augment(synthetic, batch), syn_lr)
            theta = self.mean(theta)
        return theta


class AutogradUnroll(Unroll):
    """The reference: double backward through all N steps, uncompiled, whose graph is kept."""

    shards_batches = False

    def __call__(self, theta_start, objective, synthetic, syn_lr, batches):
        """L () and its exact gradients with respect to each of `synthetic` and to α ().

        theta_start   θ_0, (P,), or what `advance` returns
        objective     L, a differentiable function of θ_N
        synthetic     what is learned except α: images, and labels if learned; leaf tensors with
                      requires_grad
        syn_lr        α, a scalar leaf tensor with requires_grad
        batches       N batches, of which `augment(synthetic, batch)` makes (x_i, y_i)
        """
        state = self.state_of(theta_start.detach()).requires_grad_(True)
        theta, velocity = state if self.momentum else (state, 0)
        for batch in batches:
            x, y = self.augment(synthetic, batch)
            loss = F.cross_entropy(self.student(x, theta), y)
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            velocity = self.momentum * velocity + gradient if self.momentum else gradient
            theta = theta - syn_lr * velocity
        value = objective(theta)
        return value.detach(), *torch.autograd.grad(value, (*synthetic, syn_lr))


class AdjointUnroll(Unroll):
    """The same gradients, by steps that are pure functions of (θ_i, x_i, y_i, α)."""

    def __call__(self, theta_start, objective, synthetic, syn_lr, batches):
        """The same as for `AutogradUnroll`."""
        # The θ_i are allocated together, before any activation. Between activations, which come and
        # go, they would fragment the heap.
        theta = self.state_of(theta_start.detach())
        thetas = [theta.clone() for _ in range(len(batches) + 1)]  # (P,) each, or (2, P)
        learned = (*synthetic, syn_lr)
        kept = {}  # what `take_step` returned, by the number of the step
        for i, batch in enumerate(batches):
            taken = self.take_step(thetas[i], synthetic, syn_lr, batch, alone=not kept)
            thetas[i + 1].copy_(self.mean(taken[1].detach()))
            self.bytes_per_step = self.bytes_per_step or bytes_of_graph(taken[1])
            if (len(batches) - i) * self.bytes_per_step <= self.memory:
                kept[i] = taken
            del taken

        value, v = value_and_gradient(objective, thetas[-1], self.momentum)
        gradients = [torch.zeros_like(tensor) for tensor in learned]
        for i, batch in reversed(list(enumerate(batches))):
            taken = kept.pop(i, None) or self.take_step(thetas[i], synthetic, syn_lr, batch)
            theta, following = taken
            # Vector-Jacobian products, continued from x_i and y_i to what these were made from.
            v, *products = torch.autograd.grad(following, (theta, *learned), v)
            v = self.mean(v.clone())  # the next replay of a CUDA graph overwrites its results
            for gradient, product in zip(gradients, products):
                gradient += product
            del taken, following  # before the next step's graph is made
        return value, *gradients

    def take_step(self, theta, synthetic, syn_lr, batch, alone=True):
        """θ_i as a leaf, and θ_{i+1}, whose graph leads back to it and to all that is learned.

        `alone`: no earlier step's graph is needed any more, so a CUDA graph may reuse its memory.
        """
        if alone:
            torch.compiler.cudagraph_mark_step_begin()
        theta = theta.detach().requires_grad_(True)
        x, y = self.augment(synthetic, batch)
        return theta, *self.step(theta, x, y, syn_lr)


def value_and_gradient(objective, theta, momentum):
    """L(θ_N) () and its gradient with respect to the student's state, of the same shape."""
    theta = theta.detach().requires_grad_(True)
    value = objective(theta[0] if momentum else theta)
    (gradient,) = torch.autograd.grad(value, theta)
    return value.detach(), gradient


def bytes_of_graph(tensor):
    """The size of all tensors that are kept for the derivative of `tensor`."""
    nodes, seen, sizes = [tensor.grad_fn], set(), {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        names = [name for name in dir(node) if name.startswith("_saved_")]
        for saved in getattr(node, "saved_tensors", ()) or [getattr(node, name) for name in names]:
            for part in saved if isinstance(saved, (list, tuple)) else [saved]:
                if isinstance(part, torch.Tensor):
                    storage = part.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


UNROLLS = {"adjoint": AdjointUnroll, "autograd": AutogradUnroll}
