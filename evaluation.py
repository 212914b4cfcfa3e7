"""Evaluation: fresh networks are trained on a synthetic set, and tested on real images."""

import warnings
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import utils
from datasets import Data
from files import ReportedError
from reparam_module import ReparamModule
from utils import stop

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


def spread(accuracies):
    """Mean and standard deviation, in percent; of a single network, which has no spread, the former."""
    deviation = f" ± {np.std(accuracies):6.2%}" if len(accuracies) > 1 else ""
    return f"{np.mean(accuracies):7.2%}{deviation}" if accuracies else ""


@dataclass(frozen=True)
class Scores:
    """Accuracies, in [0, 1], of the networks of one evaluation; `val` is empty without a validation set.

    `classes` has the test accuracies in each class, a list for every network.
    """

    val: list
    test: list
    classes: list = field(default_factory=list)

    def __str__(self):
        return "   ".join(f"{spread(part):16}" for part in (self.val, self.test))

    @property
    def choice(self):
        """What the best iteration is chosen by: the validation set; where there is none, the test set (MTT's rule)."""
        return np.mean(self.val or self.test)


def evaluate(model, training_sets, syn_lr, data: Data, runner, prepare, key, *, step, epochs, batch_train, batch_real):
    """Train a fresh `model` on each of `training_sets`, pairs of images and labels, and test it on real images.

    Initial weights and augmentation follow from `key`, not from what ran before. With a `step` of
    `make_sgd_step`, all networks are trained together.
    """
    generators = [utils.make_generator("evaluation", *key, model, index) for index in range(len(training_sets))]
    networks = [utils.initial_network(model, data.form, generator, data.test[0].device) for generator in generators]
    runs = [runner(network) for network in networks]
    settings = {"epochs": epochs, "batch_size": batch_train, "prepare": prepare}
    if step:
        train_together(networks, step, training_sets, syn_lr, generators=generators, name=f"evaluation, {model}",
                       **settings)
    else:
        for index, (network, logits, generator) in enumerate(zip(networks, runs, generators)):
            evaluate_synset(network, logits, *training_sets[index], syn_lr, generator=generator,
                                  name=f"evaluation {index + 1}/{len(networks)}, {model}", **settings)
    diverged = sum(not all(p.isfinite().all() for p in network.parameters()) for network in networks)
    if diverged:
        warnings.warn(f"{diverged} of {len(networks)} networks ({model}) diverged in evaluation: α = {syn_lr:.4g} is "
                      "too large for them; they count with what guessing is worth")
    val, test = ([utils.accuracy(network, logits, *part, batch_real) for network, logits in zip(networks, runs)]
                 if len(part[1]) else [] for part in (data.val, data.test))
    return Scores([total for total, _ in val], [total for total, _ in test], [classes for _, classes in test])


def make_sgd_step(model, form, runner, device):
    """`sgd_step` for networks called `model`; None where they are to be trained one after the other.

    That is on a CPU, which has nothing to gain from larger kernels and was a quarter slower with them, and with batch
    statistics, which are no part of the parameters.
    """
    network = utils.initial_network(model, form, utils.make_generator(0), device)
    if device.type != "cuda" or any(True for _ in network.buffers()):
        return None
    return runner.function(partial(sgd_step, ReparamModule(network, runner.amp)))


def sgd_step(module, thetas, momenta, x, y, lr):
    """A step of SGD, momentum 0.9 and weight decay 5e-4, for K networks at once, which share every kernel.

    thetas, momenta  parameters of ReparamModule `module` and their momenta, (K, P), of which new ones are returned
    x, y, lr         images (K, B, C, H, W), labels (K, B), learning rate ()
    """

    def loss(theta, x, y):
        return F.cross_entropy(module(x, theta), y)

    momenta = 0.9 * momenta + vmap(grad(loss))(thetas, x, y) + 5e-4 * thetas
    return thetas - lr * momenta, momenta


def train_together(networks, step, training_sets, syn_lr, *, epochs, batch_size, prepare, generators, name):
    """What `evaluate_synset` does, for K networks at once, each with its own training set, generator and draws.

    The training sets must be of one size.
    """
    thetas = torch.stack([parameters_to_vector(network.parameters()) for network in networks]).detach()  # (K, P)
    momenta, lr = torch.zeros_like(thetas), torch.tensor(syn_lr, device=thetas.device)
    for epoch in utils.progress(range(epochs + 1), desc=name, unit="epochs", leave=False):
        stop.check()
        of_each = [utils.shuffled_batches(*training_set, batch_size, prepare, generator)
                   for training_set, generator in zip(training_sets, generators)]
        for batches in zip(*of_each):
            thetas, momenta = step(thetas, momenta, *(torch.stack(part) for part in zip(*batches)), lr)
        if epoch == epochs // 2 + 1:
            lr, momenta = lr * 0.1, torch.zeros_like(momenta)
    for network, theta in zip(networks, thetas):
        load_vector(network, theta)


@torch.no_grad()
def load_vector(network, theta):
    """Copy a vector (P,) into a network's parameters.

    `vector_to_parameters` would make them views of it. Those of a row of (K, P) begin at any multiple of 4 bytes, while
    the network's compiled forward reads 16 at once, as it may from a parameter's own storage, and does not check: on a
    GPU, the process would die of a misaligned address.
    """
    parameters = list(network.parameters())
    for parameter, part in zip(parameters, theta.split([p.numel() for p in parameters])):
        parameter.copy_(part.view(parameter.shape))


def evaluate_synset(network, logits, image_syn, label_syn, syn_lr, epochs, batch_size, prepare, generator, name):
    """Train a fresh network on a synthetic set, as MTT's evaluation does, under a progress bar called `name`.

    `epochs` + 1 epochs of SGD at `syn_lr` with momentum 0.9 and weight decay 5e-4; after epoch `epochs // 2 + 1`, a
    tenth of the rate and a fresh optimiser.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=syn_lr, momentum=0.9, weight_decay=5e-4)
    for epoch in utils.progress(range(epochs + 1), desc=name, unit="epochs", leave=False):
        stop.check()
        utils.train_epoch(logits, optimizer, image_syn, label_syn, batch_size, prepare, generator)
        if epoch == epochs // 2 + 1:
            optimizer = torch.optim.SGD(network.parameters(), lr=syn_lr * 0.1, momentum=0.9, weight_decay=5e-4)


def make_pool(mode, model, form, runner, device):
    """The networks that --eval_mode evaluates on, each once: names, and the `step` to train them with.

    Raises ReportedError where one of them does not take images of this `datasets.Form`.
    """
    names = dict.fromkeys(model if name == "model" else name for name in EVAL_POOLS[mode])
    try:
        return {name: make_sgd_step(name, form, runner, device) for name in names}
    except ReportedError as error:
        raise ReportedError(f"--eval_mode={mode}: {error}") from None


def scores_table(scores, classes):
    """Lines for scores by network: in all, and in each of the `classes` (names)."""
    lines = [f"{'network':22} {'validation':^16}   {'test':^16}"]
    lines += [f"{network:22} {score}" for network, score in scores.items()]
    lines += ["", f"{'test, by class':22} " + "   ".join(f"{network:16}" for network in scores)]
    for label, name in enumerate(classes):
        parts = ([of_classes[label] for of_classes in score.classes] for score in scores.values())
        lines.append(f"{name:22} " + "   ".join(f"{spread(part):16}" for part in parts).rstrip())
    return "\n".join(lines)


def evaluate_pool(pool, training_sets, syn_lr, *args, **settings):
    """Scores of each network of a `make_pool`; see `evaluate`."""
    return {name: evaluate(name, training_sets, syn_lr, *args, step=step, **settings) for name, step in pool.items()}


class Evaluations:
    """All evaluations of a run, oldest first, and which of them is the best (on average over the networks)."""

    header = f"{'iteration':>9} {'network':12} {'validation':^16}   {'test':^16}   {'α':>8}  {'loss':>6}  {'time':>8}"

    def __init__(self, rows=()):
        self.rows = list(rows)

    @property
    def best(self):
        return max(self.rows, key=lambda row: mean_choice(row["scores"]))  # the first, where several are

    def has(self, iteration):
        return any(row["iteration"] == iteration for row in self.rows)

    def add(self, iteration, scores, syn_lr, losses, seconds):
        """Take an evaluation; of `losses`, one per iteration, the mean since the last one is kept. True: a new best."""
        recent = losses[self.rows[-1]["iteration"] if self.rows else 0:]
        loss = float(np.mean(recent)) if recent else None  # before the first iteration there is none
        self.rows.append({"iteration": iteration, "syn_lr": syn_lr, "loss": loss, "seconds": round(seconds, 1),
                          "scores": scores})
        return self.best is self.rows[-1]

    def log(self):
        """The wandb keys of the latest evaluation; `Loss` is the mean of the iterations since the one before."""
        log = {} if self.rows[-1]["loss"] is None else {"Loss": self.rows[-1]["loss"]}
        for network, scores in self.rows[-1]["scores"].items():
            best = max((row["scores"][network] for row in self.rows), key=lambda scores: scores.choice)
            for prefix, part in (("", "test"), ("Validation_", "val")):
                if getattr(scores, part):
                    log |= {f"{prefix}Accuracy/{network}": np.mean(getattr(scores, part)),
                            f"{prefix}Std/{network}": np.std(getattr(scores, part)),
                            f"Max_{prefix}Accuracy/{network}": np.mean(getattr(best, part)),
                            f"Max_{prefix}Std/{network}": np.std(getattr(best, part))}
        return log

    def summary(self, seconds, device):
        """What wandb's table of runs shows of a run: what it took, best and final accuracy, and α then."""
        versions = ", ".join(f"{name} {version}" for name, version in utils.versions().items())
        summary = {"Best_Iteration": self.best["iteration"], "Total_Seconds": seconds,
                   "Peak_Memory": utils.peak_memory(device), "Versions": versions}
        for prefix, row in (("Best", self.best), ("Final", self.rows[-1])):
            summary[f"{prefix}_Synthetic_LR"] = row["syn_lr"]
            for network, scores in row["scores"].items():
                summary[f"{prefix}_Accuracy/{network}"] = np.mean(scores.test)
                summary[f"{prefix}_Std/{network}"] = np.std(scores.test)
        return summary

    def table(self):
        """Lines for the latest evaluation, one per network."""
        row = self.rows[-1]
        loss = "" if row["loss"] is None else f"{row['loss']:6.4f}"
        time = utils.duration(row["seconds"])
        return "\n".join(f"{row['iteration']:9d} {network:12} {scores}   {row['syn_lr']:8.5f}  {loss:>6}  {time:>8}"
                         for network, scores in row["scores"].items())


def mean_choice(scores):
    return np.mean([score.choice for score in scores.values()])


def plain(rows):
    """Evaluations as dictionaries, lists and numbers only."""
    return [row | {"scores": {network: vars(scores) for network, scores in row["scores"].items()}} for row in rows]


def scored(rows):
    """What `plain` was made from."""
    return [row | {"scores": {network: Scores(**scores) for network, scores in row["scores"].items()}} for row in rows]
