"""Evaluation: fresh networks are trained on a small set of images and tested on real ones."""

import warnings
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.func import grad
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import process
import utils
from compilation import Compiler
from preprocessing import Data
from process import ReportedError, stop
from reparam_module import ReparamModule
from scores import Scores
from utils import Augment

# --------------------------------------------------------------------------------------------------
# The evaluator

EVAL_POOLS = {  # --eval_mode: the networks trained for evaluation, `model` standing for --model
    "S": ("model",),
    "A": ("ConvNet", "MLP", "ResNet18"),
    "R": ("model", "ResNet18"),
    "M": ("model", "MLP"),
    "C": ("model", "ConvNet"),
    "W": ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"),
    "D": ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"),
    "P": ("ConvNetNP", "ConvNetMP", "ConvNetAP"),
    "N": ("ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"),
}


def make_pool(mode, model, form, compiler, device):
    """The networks of --eval_mode, by name, each with the step that trains several at once.

    Raises ReportedError where one of them does not take images of this `datasets.Form`.
    """
    names = dict.fromkeys(model if name == "model" else name for name in EVAL_POOLS[mode])
    try:
        return {name: make_sgd_step(name, form, compiler, device) for name in names}
    except ReportedError as error:
        raise ReportedError(f"--eval_mode={mode}: {error}") from None


@dataclass(frozen=True)
class Evaluator:
    """`evaluator(images, labels, syn_lr, key)` trains fresh networks, and gives their `Scores`."""

    data: Data
    pool: dict  # what `make_pool` returns
    num_eval: int  # networks of each name
    epochs: int
    batch_train: int
    batch_real: int
    augment: Augment
    compiler: Compiler

    def __call__(self, images, labels, syn_lr, key):
        """Scores by the network's name.

        images  (N, 3, H, H), or (num_eval, N, 3, H, H), a set for each network
        labels  classes (N,), or probabilities (N, classes); with a set for each, (num_eval, ...)
        syn_lr  α, the learning rate to train with
        key     of all that is random: initial weights, order of the images, augmentation
        """
        if images.dim() == 4:
            images, labels = (part.expand(self.num_eval, *part.shape) for part in (images, labels))
        return {name: self.evaluate(name, images, labels, syn_lr, key) for name in self.pool}

    def evaluate(self, name, images, labels, syn_lr, key):
        """`Scores` of the networks called `name`."""
        form, device = self.data.form, images.device
        keys = [("evaluation", *key, name, index) for index in range(self.num_eval)]
        generators = [utils.make_generator(*key) for key in keys]
        networks = [utils.initial_network(name, form, random, device) for random in generators]
        forwards = [self.compiler(network) for network in networks]
        # So small a batch leaves most of a GPU, or of a processor's cores, without work.
        batch = min(images.shape[1], self.batch_train) * (self.augment.windows or 1)
        is_small = batch <= 64
        if is_small and self.pool[name]:
            train = images, labels
            self.train_together(self.pool[name], networks, train, syn_lr, generators)
        else:
            workers = torch.get_num_threads() if is_small and device.type == "cpu" else 1
            trainings = [
                self.evaluate_synset(network, forward, train, syn_lr, generator)
                for network, forward, train, generator in zip(
                    networks, forwards, zip(images, labels), generators
                )
            ]
            total = len(trainings) * (self.epochs + 1)
            with process.progress(total=total, desc=f"evaluation, {name}", unit="epochs") as bar:
                process.in_threads(trainings, workers, bar)

        warn_of_diverged(name, networks, syn_lr)
        parts = []
        for part in (self.data.val, self.data.test):
            tested = zip(networks, forwards) if len(part[1]) else ()
            parts.append([utils.accuracy(*pair, *part, self.batch_real) for pair in tested])
        val, test = parts
        return Scores(
            [total for total, _ in val],
            [total for total, _ in test],
            [of_classes for _, of_classes in test],
        )

    def evaluate_synset(self, network, forward, train, syn_lr, generator):
        """Train a fresh network on images (N, 3, H, H) and labels, as MTT's evaluation does.

        `epochs` + 1 epochs of SGD at `syn_lr`, momentum 0.9 and weight decay 5e-4; after epoch
        `epochs // 2 + 1`, a tenth of the rate and a fresh optimiser. Yields after each epoch.
        """
        optimizer = fresh_sgd(network, syn_lr)
        for epoch in range(self.epochs + 1):
            stop.check()
            batches = self.draw_epoch(train[0], generator)
            utils.train_epoch(forward, optimizer, train, self.augment, batches)
            if epoch == self.epochs // 2 + 1:
                optimizer = fresh_sgd(network, syn_lr * 0.1)
            yield

    def train_together(self, step, networks, train, syn_lr, generators):
        """What `evaluate_synset` does, for K networks at once, each with draws of its own.

        `step` is `sgd_step` for these networks, `train` a set for each: images (K, N, 3, H, H),
        and labels (K, N) or (K, N, classes).
        """
        images, labels = train
        thetas = torch.stack([parameters_to_vector(n.parameters()) for n in networks]).detach()
        momenta = torch.zeros_like(thetas)  # (K, P), as the parameters
        rate = torch.tensor(syn_lr, device=thetas.device)
        name = f"evaluation, {len(networks)} networks"
        for epoch in process.progress(range(self.epochs + 1), desc=name, unit="epochs"):
            stop.check()
            of_networks = [self.draw_epoch(x, g) for x, g in zip(images, generators)]
            for batches in zip(*of_networks):
                made = [self.augment(x, batch, y) for x, batch, y in zip(images, batches, labels)]
                x, y = (torch.stack(part) for part in zip(*made))
                thetas, momenta = step(thetas, momenta, x, y, rate)
            if epoch == self.epochs // 2 + 1:
                rate = rate * 0.1
                momenta = torch.zeros_like(momenta)
        for network, theta in zip(networks, thetas):
            load_vector(network, theta)

    def draw_epoch(self, images, generator):
        """The batches of an epoch on images (N, 3, H, H)."""
        batches = utils.draw_batches(len(images), self.batch_train, None, self.augment, generator)
        return utils.to_device(batches, images.device)


def make_evaluator(args, data, pool, compiler):
    """The evaluator that the flags describe; it sees synthetic images as augmented canvases."""
    groups = utils.augment_groups(args.dsa, args.dsa_strategy)
    windows = args.canvas_samples if args.texture else 0
    apply = compiler.augmentation(data.train[0].device)
    return Evaluator(
        data=data,
        pool=pool,
        num_eval=args.num_eval,
        epochs=args.epoch_eval_train,
        batch_train=args.batch_train,
        batch_real=args.batch_real,
        augment=Augment(data.form.im_size, groups, windows, apply),
        compiler=compiler,
    )


def of_real_images(evaluator):
    """The same evaluator for real images, which are no canvases."""
    return replace(evaluator, augment=replace(evaluator.augment, windows=0))


def fresh_sgd(network, rate):
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)


def make_student(model, form, amp, device):
    """A network called `model` as a function of its parameters.

    Raises ReportedError where it cannot be one.
    """
    network = utils.initial_network(model, form, utils.make_generator(0), device)
    try:
        return ReparamModule(network, amp)
    except ValueError as error:
        raise ReportedError(f"--model={model}: {error}") from None


def make_sgd_step(model, form, compiler, device):
    """`sgd_step` for networks called `model`; None where they are trained one after the other.

    That is on a CPU, where threads do better, and with batch statistics, which are no part of the
    parameters.
    """
    network = utils.initial_network(model, form, utils.make_generator(0), device)
    if device.type != "cuda" or any(True for _ in network.buffers()):
        return None
    return compiler.function(partial(sgd_step, ReparamModule(network, compiler.amp)))


def sgd_step(module, thetas, momenta, x, y, rate):
    """A step of SGD, momentum 0.9 and weight decay 5e-4, for K networks in one graph.

    thetas, momenta  parameters of ReparamModule `module`, and their momenta, (K, P)
    x, y, rate       images (K, B, C, H, W), labels (K, B) or (K, B, classes), learning rate ()

    Returns the new parameters and momenta.
    """

    def loss(theta, x, y):
        return F.cross_entropy(module(x, theta), y)

    # One after the other: `vmap` would make grouped convolutions of theirs, for which libraries
    # have few fast algorithms. As a CUDA graph, many small kernels cost little to launch.
    gradients = [grad(loss)(*tensors) for tensors in zip(thetas, x, y)]
    momenta = 0.9 * momenta + torch.stack(gradients) + 5e-4 * thetas
    return thetas - rate * momenta, momenta


@torch.no_grad()
def load_vector(network, theta):
    """Copy a vector (P,) into a network's parameters.

    `vector_to_parameters` would make them views of it. Those of a row of (K, P) begin at any
    multiple of 4 bytes, while the network's compiled forward reads 16 at once, as it may from a
    parameter's own storage, and does not check: on a GPU the process would die of a misaligned
    address.
    """
    parameters = list(network.parameters())
    for parameter, part in zip(parameters, theta.split([p.numel() for p in parameters])):
        parameter.copy_(part.view(parameter.shape))


def warn_of_diverged(name, networks, syn_lr):
    diverged = sum(
        not all(p.isfinite().all() for p in network.parameters()) for network in networks
    )
    if diverged:
        warnings.warn(
            f"{diverged} of {len(networks)} networks ({name}) diverged in evaluation: "
            f"α = {syn_lr:.4g} is too large for them; they count as guessing"
        )
