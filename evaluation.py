"""Evaluation: fresh networks are trained on a small set of images and tested on real ones."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.utils import parameters_to_vector

import training
import utils
from datasets.preprocessing import Data, random_real
from kernels import KERNELS, ROWS, centred_targets, fit
from run.scores import Tested, scores_of
from system import process, threads
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


def names_in(mode):
    """The names that a value of --eval_mode stands for: a pool's, or its own, joined by commas."""
    return EVAL_POOLS.get(mode) or tuple(mode.split(","))


def make_pool(mode, model, form, machine):
    """The networks of --eval_mode, by name, each with the step that trains several at once.

    Kernel machines are trained in closed form, and have none.

    Raises ReportedError if one of them does not accept images of this `preprocessing.Form`.
    """
    names = dict.fromkeys(model if name == "model" else name for name in names_in(mode))
    pool = {}
    for name in names:
        try:
            kernel = name in KERNELS
            pool[name] = None if kernel else training.make_sgd_step(name, form, machine)
        except ReportedError as error:
            others = "" if name == model else ". Name others, as --eval_mode=ConvNet,MLP"
            raise ReportedError(f"--eval_mode={mode}: {error}{others}") from None
    return pool


MOST_IMAGES = 10_000  # that a kernel machine is trained on: its kernel takes 0.8 GB in float64


class Plan(NamedTuple):
    """A set that a network is trained on, and how."""

    images: torch.Tensor  # (N, C, H, H)
    labels: torch.Tensor  # classes (n,), or probabilities (n, classes)
    alpha: float  # α, the learning rate
    key: tuple  # with the network's name and number, seeds all that is random about it
    number: int = 0


class Trainee(NamedTuple):
    """A network to be trained, as its `Plan` says."""

    plan: Plan
    network: torch.nn.Module
    forward: Callable  # compiled
    random: torch.Generator  # of the order of images, and of augmentation


def tested_on(data, accuracy):
    """`Tested` by a function that returns a `training.Accuracy` on images and labels."""
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
        self.check_count(images)
        if targets is None:
            targets = centred_targets(labels, self.data.form.num_classes)
        scores = {}
        for name in self.pool:
            if name in KERNELS:
                scores[name] = self.evaluate_kernel(name, images, targets)
            else:
                scores[name] = self.evaluate(name, self.plans(images, labels, syn_lr, key))
        return scores

    def check_count(self, images):
        """Raise ReportedError if there are too many images for a kernel machine of the pool."""
        count = images.shape[-4] * self.augment.factor**2
        kernels = [name for name in self.pool if name in KERNELS]
        if kernels and count > MOST_IMAGES:
            raise ReportedError(
                f"{kernels[0]}, a kernel machine, of {count} images is too large, as it takes the "
                f"products of all pairs: give at most {MOST_IMAGES}, or another --eval_mode"
            )

    def evaluate_kernel(self, name, images, targets):
        """`Scores` of a kernel machine, which is trained in closed form: one, or one of each set.

        Nothing about it is random, so every rank computes the same.
        """
        sets = [(images, targets)] if is_one_set(images) else zip(images, targets)
        tested = [self.test_kernel(KERNELS[name], *each) for each in sets]
        return scores_of(tested)

    def test_kernel(self, kernel, images, targets):
        """Train a kernel machine on images (N, C, H, H) and targets, and test it: `Tested`."""
        x = utils.decode(images, self.augment.factor).flatten(1)
        coefficients = fit(kernel, x, targets)

        def accuracy(real, labels):
            parts = [kernel(part.flatten(1), x) @ coefficients for part in real.split(ROWS)]
            return training.accuracy_of(torch.cat(parts), labels)

        return tested_on(self.data, accuracy)

    def of_network(self, name):
        """The same for the networks called `name` alone."""
        return replace(self, pool={name: self.pool[name]})

    def plans(self, images, labels, alpha, key):
        """A `Plan` for each of `num_eval` networks, of what a call takes."""
        numbers = range(self.num_eval)
        if is_one_set(images):
            return [Plan(images, labels, alpha, key, number) for number in numbers]
        return [Plan(images[n], labels[n], alpha, key, n) for n in numbers]

    def evaluate(self, name, plans):
        """`Scores` of networks called `name`, one for each of `plans`, of all ranks."""

        def test(network, forward):
            return list(self.test(network, forward))

        measured = self.measure(name, plans, test)
        scores = scores_of([Tested(*each) for each in measured])
        warn_of_diverged(name, scores.diverged, len(measured), plans[0].alpha)
        return scores

    def measure(self, name, plans, test):
        """`test(network, forward)` of trained networks called `name`, one for each of `plans`.

        They are those of all ranks. `test` returns what `ranks.pack` takes.
        """
        mine = self.ranks.mine(plans)
        measured, stopped = [], None
        try:
            if mine:
                trainees = [self.fresh(name, plan) for plan in mine]
                measured = self.train_and_test(name, trainees, test)
        except Stopped as error:  # on this rank; the others learn of it when they are done
            stopped = error.args[0]
        of_ranks = self.ranks.gather([stopped, measured])
        signals = [number for number, _ in of_ranks if number]
        if signals:
            raise Stopped(signals[0], "")
        # Network n is the one of number n // ranks on rank n % ranks.
        places = [divmod(n, len(of_ranks)) for n in range(len(plans))]
        return [of_ranks[rank][1][number] for number, rank in places]

    def fresh(self, name, plan):
        """A `Trainee` called `name`, with initial weights."""
        random = utils.make_generator("evaluation", *plan.key, name, plan.number)
        network = utils.initial_network(name, self.data.form, random, self.data.device)
        return Trainee(plan, network, self.compiler(network), random)

    def train_and_test(self, name, trainees, test):
        """Train `trainees`, networks called `name`; a list of what `test` returns of each.

        Their plans have equally many images.
        """
        self.line_due.restart()
        # Such a small batch leaves most of a GPU, or of a processor's cores, idle.
        batch = min(len(trainees[0].plan.labels), self.batch_train) * (self.augment.windows or 1)
        is_small = batch <= 64
        if is_small and self.pool[name]:
            self.train_together(self.pool[name], trainees)
            return [test(trainee.network, trainee.forward) for trainee in trainees]
        results = {}
        todo = [self.train_then_test(trainee, test, results) for trainee in trainees]
        total = len(todo) * (self.epochs + 1)
        # A thread for each network, so that its digits do not depend on how many there are.
        each_alone = is_small and self.data.device.type == "cpu"
        with process.progress(total=total, desc=f"evaluation, {name}", unit="epochs") as bar:
            threads.in_threads(todo, each_alone, bar)
        return [results[trainee.network] for trainee in trainees]

    def train_then_test(self, trainee, test, results):
        """Train a `Trainee`, then put what `test` returns of its network into `results`."""
        yield from self.evaluate_synset(trainee)
        results[trainee.network] = test(trainee.network, trainee.forward)

    def test(self, network, forward):
        """Test a trained network: `Tested`. One that diverged counts as guessing."""
        return tested_on(self.data, partial(self.accuracy, network, forward))

    def accuracy(self, network, forward, images, labels):
        """The `training.Accuracy` of a trained network on real images."""
        return training.accuracy(network, forward, images, labels, self.batch_real)

    def evaluate_synset(self, trainee):
        """Train a `Trainee` on its images, as MTT's evaluation does.

        `epochs` + 1 epochs of SGD at α, with momentum 0.9 and weight decay 5e-4. After epoch
        `epochs // 2 + 1`, a tenth of the learning rate and a fresh optimiser. Yields after each
        epoch.
        """
        images, labels, alpha = trainee.plan[:3]
        optimizer = training.fresh_sgd(trainee.network, alpha)
        for epoch in range(self.epochs + 1):
            stop.check()
            batches = self.draw_epoch(labels, trainee.random)
            training.train_epoch(
                trainee.forward, optimizer, (images, labels), self.augment, batches
            )
            if epoch == self.epochs // 2 + 1:
                optimizer = training.fresh_sgd(trainee.network, alpha * 0.1)
            self.log_epoch(epoch)
            yield

    def train_together(self, step, trainees):
        """The same as `evaluate_synset`, for K networks at once, each with its own draws.

        `step` is `sgd_step` for these networks.
        """
        thetas = torch.stack([parameters_to_vector(t.network.parameters()) for t in trainees])
        thetas = thetas.detach()  # (K, P), as their momenta
        momenta = torch.zeros_like(thetas)
        rates = torch.tensor([[t.plan.alpha] for t in trainees], device=thetas.device)  # (K, 1)
        name = f"evaluation, {len(trainees)} networks"
        for epoch in process.progress(range(self.epochs + 1), desc=name, unit="epochs"):
            stop.check()
            of_networks = [self.draw_epoch(t.plan.labels, t.random) for t in trainees]
            for batches in zip(*of_networks):
                made = []
                for trainee, batch in zip(trainees, batches):
                    made.append(self.augment(trainee.plan.images, batch, trainee.plan.labels))
                x, y = (torch.stack(part) for part in zip(*made))
                thetas, momenta = step(thetas, momenta, x, y, rates)
            if epoch == self.epochs // 2 + 1:
                rates = rates * 0.1
                momenta = torch.zeros_like(momenta)
            self.log_epoch(epoch)
        for trainee, theta in zip(trainees, thetas):
            training.load_vector(trainee.network, theta)

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


def is_one_set(images):
    """Tell whether images are a set (N, C, H, H) for all networks, or one for each."""
    return len(images.shape) == 4


def of_real_images(evaluator):
    """The same evaluator for real images, which are not canvases."""
    return replace(evaluator, augment=replace(evaluator.augment, windows=0))


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
    or hardly learn. All start from the same weights. Kernel machines have no α.
    """
    if not is_one_set(images):
        images, labels = images[0], labels[0]
    plans = [Plan(images, labels, alpha, (*key, "search")) for alpha in ALPHAS]

    def validate(network, forward):
        found = evaluator.accuracy(network, forward, *evaluator.data.val)
        return [found.is_finite, found.mean]  # those that diverged are last

    best = {}
    for name, step in evaluator.pool.items():
        if name in KERNELS:
            continue
        # A graph of all networks would take longer to compile than they take to train.
        at_once = evaluator.ranks.size if step else len(plans)
        reached = []
        for start in range(0, len(plans), at_once):
            reached += evaluator.measure(name, plans[start : start + at_once], validate)
        by_alpha = dict(zip(ALPHAS, reached))
        for alpha, (is_finite, accuracy) in by_alpha.items():
            fault = "" if is_finite else " (diverged)"
            process.write_line(f"{name:12} α = {alpha:<7g} {accuracy:7.2%}{fault}")
        best[name] = max(by_alpha, key=by_alpha.get)
    return best


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
