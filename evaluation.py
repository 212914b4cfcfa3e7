"""Evaluation: fresh networks are trained on a small set of images and tested on real ones."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.func import grad
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import utils
from datasets.preprocessing import Data, random_real
from kernels import KERNELS, ROWS, centred_targets, fit
from reparam_module import ReparamModule
from system import process
from system.compilation import Compiler
from system.process import Interval, ReportedError, Stopped, stop
from system.ranks import ALONE, Ranks
from utils import Augment

# --------------------------------------------------------------------------------------------------
# The evaluator

EVAL_POOLS = {  # --eval_mode: the networks or KERNELS for evaluation, `model` standing for --model
    "S": ("model",),
    "A": ("ConvNet", "MLP", "ResNet18"),
    "R": ("model", "ResNet18"),
    "M": ("model", "MLP"),
    "C": ("model", "ConvNet"),
    "K": ("model", "NTK"),
    "W": ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"),
    "D": ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"),
    "P": ("ConvNetNP", "ConvNetMP", "ConvNetAP"),
    "T": ("ConvNetW32", "ConvNet", "ConvNetD4", "ResNet18", "VGG11", "MLP"),
    "N": ("ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"),
}


def make_pool(mode, model, form, machine):
    """The networks of --eval_mode, by name, each with the step that trains several at once.

    Kernel machines are trained in closed form, and have none.

    Raises ReportedError if one of them does not accept images of this `preprocessing.Form`.
    """
    names = dict.fromkeys(model if name == "model" else name for name in EVAL_POOLS[mode])
    try:
        return {
            name: None if name in KERNELS else make_sgd_step(name, form, machine) for name in names
        }
    except ReportedError as error:
        raise ReportedError(f"--eval_mode={mode}: {error}") from None


MOST_IMAGES = 10_000  # that a kernel machine is trained on: its kernel takes 0.8 GB in float64


class Trainee(NamedTuple):
    """A network to be trained."""

    network: torch.nn.Module
    forward: Callable  # compiled
    random: torch.Generator  # of the order of images, and of augmentation


class Tested(NamedTuple):
    """The accuracy of a trained network."""

    val: float | None  # accuracy on the validation images, in [0, 1]; None: there are none
    test: float
    classes: list  # test accuracy on each class
    is_finite: bool  # whether its logits are


def tested_on(data, accuracy):
    """`Tested` by a function that returns a `utils.Accuracy` on images and labels."""
    test = accuracy(*data.test)
    if not len(data.val[1]):
        return Tested(None, test.mean, test.classes, test.is_finite)
    val = accuracy(*data.val)
    return Tested(val.mean, test.mean, test.classes, test.is_finite and val.is_finite)


@dataclass(frozen=True)
class Evaluator:
    """`evaluator(images, labels, syn_lr, key)` trains fresh networks and returns their `Scores`."""

    data: Data
    pool: dict  # what `make_pool` returns
    num_eval: int  # networks of each name
    epochs: int
    batch_train: int
    batch_real: int
    augment: Augment
    compiler: Compiler
    ranks: Ranks = ALONE  # which share out the networks
    line_due: Interval = field(default_factory=partial(Interval, 60))

    def __call__(self, images, labels, syn_lr, key, targets=None):
        """Scores by the network's name.

        images  (N, C, H, H), or (num_eval, N, C, H, H), a set for each network
        labels  classes (n,), or probabilities (n, classes) of the n images or, with a `factor`,
                tiles; with a set for each network, (num_eval, ...)
        syn_lr  α, the learning rate to train with
        key     seeds all that is random: initial weights, order of the images, augmentation
        targets  real-valued labels (n, classes) for kernel machines; None: they take `labels`
        """
        if targets is None:
            targets = centred_targets(labels, self.data.form.num_classes)
        scores = {}
        for name in self.pool:
            if name in KERNELS:
                scores[name] = self.evaluate_kernel(name, images, targets)
            else:
                sets = [images, labels]
                if images.dim() == 4:
                    sets = [part.expand(self.num_eval, *part.shape) for part in sets]
                scores[name] = self.evaluate(name, *sets, syn_lr, key)
        return scores

    def evaluate_kernel(self, name, images, targets):
        """`Scores` of a kernel machine, which is trained in closed form: one, or one of each set.

        Nothing about it is random, so every rank computes the same.
        """
        sets = [(images, targets)] if images.dim() == 4 else zip(images, targets)
        tested = [self.test_kernel(KERNELS[name], *each) for each in sets]
        return scores_of(tested)

    def test_kernel(self, kernel, images, targets):
        """Train a kernel machine on images (N, C, H, H) and targets, and test it: `Tested`."""
        x = utils.decode(images, self.augment.factor).flatten(1)
        if len(x) > MOST_IMAGES:
            raise ReportedError(
                f"a kernel machine of {len(x)} images is too large, as it takes the products of "
                f"all pairs: give at most {MOST_IMAGES}, or another --eval_mode"
            )
        coefficients = fit(kernel, x, targets)

        def accuracy(real, labels):
            parts = [kernel(part.flatten(1), x) @ coefficients for part in real.split(ROWS)]
            return utils.accuracy_of(torch.cat(parts), labels)

        return tested_on(self.data, accuracy)

    def of_network(self, name):
        """The same for the networks called `name` alone."""
        return replace(self, pool={name: self.pool[name]})

    def evaluate(self, name, images, labels, syn_lr, key):
        """`Scores` of the networks called `name`, of all ranks."""

        def test(network, forward):
            return list(self.test(network, forward))

        measured = self.measure(name, (images, labels), syn_lr, key, test)
        scores = scores_of([Tested(*each) for each in measured])
        warn_of_diverged(name, scores.diverged, len(measured), syn_lr)
        return scores

    def measure(self, name, train, syn_lr, key, test):
        """`test(network, forward)` of each trained network called `name`, of all ranks.

        `train` has a set for each network: images (num_eval, N, C, H, H), and labels. `test`
        returns what `ranks.pack` takes.
        """
        numbers = self.ranks.mine(range(self.num_eval))
        train = [self.ranks.mine(part) for part in train]
        keys = [("evaluation", *key, name, number) for number in numbers]
        measured, stopped = [], None
        try:
            if keys:
                trainees = [self.fresh(name, key, train[0].device) for key in keys]
                measured = self.train_and_test(name, trainees, train, syn_lr, test)
        except Stopped as error:  # on this rank; the others learn of it when they are done
            stopped = error.args[0]
        of_ranks = self.ranks.gather([stopped, measured])
        signals = [number for number, _ in of_ranks if number]
        if signals:
            raise Stopped(signals[0], "")
        # Network n is the one of number n // ranks on rank n % ranks.
        places = [divmod(n, len(of_ranks)) for n in range(self.num_eval)]
        return [of_ranks[rank][1][number] for number, rank in places]

    def fresh(self, name, key, device):
        """A `Trainee` called `name`; `key` seeds all that is random about it."""
        random = utils.make_generator(*key)
        network = utils.initial_network(name, self.data.form, random, device)
        return Trainee(network, self.compiler(network), random)

    def train_and_test(self, name, trainees, train, syn_lr, test):
        """Train each of `trainees`, networks called `name`; a list of what `test` returns of each.

        `train` has a set for each: images (K, N, C, H, H), and labels.
        """
        self.line_due.restart()
        images, labels = train
        # Such a small batch leaves most of a GPU, or of a processor's cores, idle.
        batch = min(labels.shape[1], self.batch_train) * (self.augment.windows or 1)
        is_small = batch <= 64
        if is_small and self.pool[name]:
            networks, forwards, generators = zip(*trainees)
            self.train_together(self.pool[name], networks, train, syn_lr, generators)
            return [test(*pair) for pair in zip(networks, forwards)]
        results = {}
        todo = []
        for number, trainee in enumerate(trainees):
            pair = trainee.network, trainee.forward
            own = images[number], labels[number]
            training = self.evaluate_synset(*pair, own, syn_lr, trainee.random)
            todo.append(then_test(training, trainee, test, results))
        total = len(todo) * (self.epochs + 1)
        # A thread for each network, so that its digits do not depend on how many there are.
        each_alone = is_small and images.device.type == "cpu"
        with process.progress(total=total, desc=f"evaluation, {name}", unit="epochs") as bar:
            process.in_threads(todo, each_alone, bar)
        return [results[trainee] for trainee in trainees]

    def test(self, network, forward):
        """Test a trained network: `Tested`. One that diverged counts as guessing."""

        def accuracy(images, labels):
            return utils.accuracy(network, forward, images, labels, self.batch_real)

        return tested_on(self.data, accuracy)

    def evaluate_synset(self, network, forward, train, syn_lr, generator):
        """Train a fresh network on images (N, C, H, H) and labels, as MTT's evaluation does.

        `epochs` + 1 epochs of SGD at `syn_lr`, with momentum 0.9 and weight decay 5e-4. After epoch
        `epochs // 2 + 1`, a tenth of the learning rate and a fresh optimiser. Yields after each
        epoch.
        """
        optimizer = fresh_sgd(network, syn_lr)
        for epoch in range(self.epochs + 1):
            stop.check()
            batches = self.draw_epoch(train[1], generator)
            utils.train_epoch(forward, optimizer, train, self.augment, batches)
            if epoch == self.epochs // 2 + 1:
                optimizer = fresh_sgd(network, syn_lr * 0.1)
            self.log_epoch(epoch)
            yield

    def train_together(self, step, networks, train, syn_lr, generators):
        """The same as `evaluate_synset`, for K networks at once, each with its own draws.

        `step` is `sgd_step` for these networks. `train` holds a set for each: images (K, N, C, H,
        H), and labels (K, N) or (K, N, classes).
        """
        images, labels = train
        thetas = torch.stack([parameters_to_vector(n.parameters()) for n in networks]).detach()
        momenta = torch.zeros_like(thetas)  # (K, P), as the parameters
        rate = torch.tensor(syn_lr, device=thetas.device)
        name = f"evaluation, {len(networks)} networks"
        for epoch in process.progress(range(self.epochs + 1), desc=name, unit="epochs"):
            stop.check()
            of_networks = [self.draw_epoch(y, g) for y, g in zip(labels, generators)]
            for batches in zip(*of_networks):
                made = [self.augment(x, batch, y) for x, batch, y in zip(images, batches, labels)]
                x, y = (torch.stack(part) for part in zip(*made))
                thetas, momenta = step(thetas, momenta, x, y, rate)
            if epoch == self.epochs // 2 + 1:
                rate = rate * 0.1
                momenta = torch.zeros_like(momenta)
            self.log_epoch(epoch)
        for network, theta in zip(networks, thetas):
            load_vector(network, theta)

    def log_epoch(self, epoch):
        """Once a minute, log how far networks are, where there is no bar."""
        if self.line_due.due():
            process.log_line(f"evaluation: epoch {epoch + 1} of {self.epochs + 1}")

    def draw_epoch(self, labels, generator):
        """The batches of an epoch on images with these labels (n, ...)."""
        batches = utils.draw_batches(len(labels), self.batch_train, None, self.augment, generator)
        return utils.to_device(batches, labels.device)


def make_evaluator(args, data, pool, machine):
    """The evaluator that the flags describe. It sees synthetic images as augmented canvases."""
    groups = utils.augment_groups(args.dsa, args.dsa_strategy)
    windows = args.canvas_samples if args.texture else 0
    apply = utils.group_function(machine.compiler, data.device)
    return Evaluator(
        data=data,
        pool=pool,
        num_eval=args.num_eval,
        epochs=args.epoch_eval_train,
        batch_train=args.batch_train,
        batch_real=args.batch_real,
        augment=Augment(data.form.im_size, groups, windows, args.factor, apply),
        compiler=machine.compiler,
        ranks=machine.ranks,
    )


def of_real_images(evaluator):
    """The same evaluator for real images, which are not canvases."""
    return replace(evaluator, augment=replace(evaluator.augment, windows=0))


def then_test(training, trainee, test, results):
    """Exhaust a `training`, then put what `test` returns of its network into `results`."""
    yield from training
    results[trainee] = test(trainee.network, trainee.forward)


def fresh_sgd(network, rate):
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)


def make_student(model, form, amp, device):
    """A network called `model` as a function of its parameters.

    Raises ReportedError if that is impossible.
    """
    network = utils.initial_network(model, form, utils.make_generator(0), device)
    try:
        return ReparamModule(network, amp)
    except ValueError as error:
        raise ReportedError(f"--model={model}: {error}") from None


def make_sgd_step(model, form, machine):
    """`sgd_step` for networks called `model`; None if they are trained one after the other.

    That is the case on a CPU, where threads are faster, and with batch statistics, which are not
    part of the parameters.
    """
    network = utils.initial_network(model, form, utils.make_generator(0), machine.device)
    if machine.device.type != "cuda" or any(True for _ in network.buffers()):
        return None
    step = partial(sgd_step, ReparamModule(network, machine.amp))
    return machine.compiler.retrying(machine.compiler.function(step))


def sgd_step(module, thetas, momenta, x, y, rate):
    """A step of SGD, momentum 0.9 and weight decay 5e-4, for K networks in one graph.

    thetas, momenta  parameters of ReparamModule `module`, and their momenta, (K, P)
    x, y, rate       images (K, B, C, H, W), labels (K, B) or (K, B, classes), learning rate ()

    Returns the new parameters and momenta.
    """

    def loss(theta, x, y):
        return F.cross_entropy(module(x, theta), y)

    # One after the other: `vmap` would turn their convolutions into grouped ones, for which
    # libraries have few fast algorithms. In a CUDA graph, many small kernels cost little to launch.
    gradients = [grad(loss)(*tensors) for tensors in zip(thetas, x, y)]
    momenta = 0.9 * momenta + torch.stack(gradients) + 5e-4 * thetas
    return thetas - rate * momenta, momenta


@torch.no_grad()
def load_vector(network, theta):
    """Copy a vector (P,) into a network's parameters.

    `vector_to_parameters` would make them views of it. Views of a row of (K, P) begin at any
    multiple of 4 bytes. The network's compiled forward reads 16 bytes at once, as it may from a
    parameter's own storage, and does not check. On a GPU, the process would die of a misaligned
    address.
    """
    parameters = list(network.parameters())
    for parameter, part in zip(parameters, theta.split([p.numel() for p in parameters])):
        parameter.copy_(part.view(parameter.shape))


def warn_of_diverged(name, diverged, count, syn_lr):
    if diverged:
        warnings.warn(
            f"{diverged} of {count} networks ({name}) diverged in evaluation: α = {syn_lr:.4g} is "
            "too large for them, so they count as guessing"
        )


# --------------------------------------------------------------------------------------------------
# The step size of networks that a set was not learned for

ALPHAS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # of --search_alpha


def search_alphas(evaluator, images, labels, key):
    """The best α of ALPHAS for each network, by the validation accuracy of one trained with each.

    A set's own α was learned for the network that it was distilled with. Others may diverge at it,
    or hardly learn. Kernel machines have none.
    """
    pool = {name: step for name, step in evaluator.pool.items() if name not in KERNELS}
    # Validation images take the place of the test images, which would be tested for nothing.
    data = replace(evaluator.data, val=no_images(evaluator.data), test=evaluator.data.val)
    single = replace(evaluator, num_eval=1, data=data, pool=pool)
    if images.dim() == 5:  # a set for each network
        images, labels = images[:1], labels[:1]
    reached = {}
    for alpha in ALPHAS:
        for name, scores in single(images, labels, alpha, (*key, "search")).items():
            reached[name, alpha] = selection_rank({name: scores})
            process.write_line(f"{name:12} α = {alpha:<7g} {scores.selection_accuracy:7.2%}")
    return {name: max(ALPHAS, key=lambda a: reached[name, a]) for name in pool}


def no_images(data):
    """A part of `Data` that has no images."""
    return tuple(part[:0] for part in data.train)


# --------------------------------------------------------------------------------------------------
# Random real images, with which a distilled set is compared


def random_real_sets(data, layout, count, seed):
    """`count` draws of `random_real`: images (count, K, C, H, H) and classes (count, n)."""
    draws = []
    for number in range(count):
        draws.append(random_real(data, layout, utils.make_generator("random real", seed, number)))
    images, labels = zip(*draws)
    return torch.stack(images), torch.stack(labels)


def evaluate_real(evaluator, real_sets, syn_lr, seed):
    """Evaluate `random_real_sets`."""
    scores = of_real_images(evaluator)(*real_sets, syn_lr, (seed, "random real"))
    return {"syn_lr": syn_lr, "epochs": evaluator.epochs, "scores": scores}


# --------------------------------------------------------------------------------------------------
# Accuracies of an evaluation, and of all evaluations of a run


def spread(accuracies):
    """Mean ± population standard deviation, in percent. A single network has no spread."""
    if not accuracies:
        return ""
    deviation = f" ± {np.std(accuracies):6.2%}" if len(accuracies) > 1 else ""
    return f"{np.mean(accuracies):7.2%}{deviation}"


@dataclass(frozen=True)
class Scores:
    """Accuracies, in [0, 1], of the networks of one evaluation."""

    val: list  # empty without a validation set
    test: list
    classes: list = field(default_factory=list)  # test accuracy per class, a list per network
    diverged: int = 0  # networks that count as guessing

    def __str__(self):
        return "   ".join(f"{spread(part):16}" for part in (self.val, self.test))

    @property
    def selection_accuracy(self):
        """The accuracy that selects the best iteration: validation, or without it, test.

        Using the test set is MTT's rule.
        """
        return np.mean(self.val or self.test)


def scores_of(tested):
    """The `Scores` of several networks, each `Tested`."""
    return Scores(
        [each.val for each in tested if each.val is not None],
        [each.test for each in tested],
        [each.classes for each in tested],
        sum(not each.is_finite for each in tested),
    )


def mean_selection_accuracy(scores):
    """The mean over networks, of their `scores` by name."""
    return np.mean([score.selection_accuracy for score in scores.values()])


def selection_rank(scores):
    """The key by which `scores`, by network, are compared: those with a diverged network last."""
    diverged = sum(score.diverged for score in scores.values())
    return not diverged, mean_selection_accuracy(scores)


class Evaluations:
    """All evaluations of a run, oldest first."""

    def __init__(self, rows=()):
        self.rows = list(rows)

    @property
    def comparable(self):
        """The evaluations of the same networks as the latest one, trained for as many epochs."""

        def kind(row):
            return row["scores"].keys(), row["epochs"]

        return [row for row in self.rows if kind(row) == kind(self.rows[-1])]

    @property
    def best(self):
        """The comparable evaluation with the highest selection accuracy, the first if tied."""
        return max(self.comparable, key=lambda row: selection_rank(row["scores"]))

    @property
    def best_accuracy(self):
        """The selection accuracy of the best evaluation."""
        return mean_selection_accuracy(self.best["scores"])

    @property
    def latest_is_best(self):
        return self.best is self.rows[-1]

    def has(self, iteration, names):
        """Tell whether the networks called `names` were evaluated at an iteration."""
        at = (row["scores"].keys() for row in self.rows if row["iteration"] == iteration)
        return any(of_row == names for of_row in at)

    def add(self, scores, syn_lr, losses, seconds, epochs):
        """Add an evaluation by networks of so many epochs, after iterations with these losses."""
        recent = losses[self.rows[-1]["iteration"] if self.rows else 0 :]
        row = {
            "iteration": len(losses),
            "syn_lr": syn_lr,
            "loss": float(np.mean(recent)) if recent else None,  # mean since the last evaluation
            "seconds": round(seconds, 1),
            "epochs": epochs,
            "scores": scores,
        }
        self.rows.append(row)


def to_json(rows):
    """Evaluations as dictionaries, lists and numbers only."""
    return [
        row | {"scores": {name: vars(scores) for name, scores in row["scores"].items()}}
        for row in rows
    ]


def from_json(rows):
    """Restore what `to_json` was given."""
    return [
        row | {"scores": {name: Scores(**scores) for name, scores in row["scores"].items()}}
        for row in rows
    ]
