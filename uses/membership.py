"""The task `membership`: is an image in the training data of a set?

The attack calls an image a member where a trained network's loss on it is below a threshold (Yeom
et al. 2018, arXiv 1709.01604). It is told by its whole ROC curve, and by the true positives at 1%
false ones (Carlini et al. 2022, arXiv 2112.03570). Distilled images that start from real ones may
stay close to them, so each one's nearest training image is looked for as well.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.integrate import trapezoid
from torch.nn import functional as F

import utils
from datasets.preprocessing import PIX_INIT, Layout, random_real
from datasets.set_files import read_record
from evaluation import warn_of_diverged
from run.scores import spread
from system import process
from uses.study import Outcome, TrainingSet, new_figure, random_images

FALSE_POSITIVES = 0.01
# On all data: one network, for a tenth of the epochs of --evaluate=full, at the experts' rate.
FULL_EPOCHS = 5
FULL_ALPHA = 0.01
YARDSTICK = 100  # test images, whose nearest training images are looked for as well


# --------------------------------------------------------------------------------------------------
# The attack


@dataclass(frozen=True)
class Probe:
    """The losses of a trained network on images, which are not augmented."""

    images: torch.Tensor
    labels: torch.Tensor
    batch: int

    @torch.no_grad()
    def __call__(self, network, forward):
        """The cross-entropy of each image (n,), float64, on the CPU; infinite where it is none."""
        network.eval()
        losses = []
        for x, y in zip(self.images.split(self.batch), self.labels.split(self.batch)):
            padded = F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.batch - len(x)))  # one compiled graph
            losses.append(F.cross_entropy(forward(padded)[: len(x)], y, reduction="none"))
        network.train()
        return torch.cat(losses).double().nan_to_num(nan=torch.inf).cpu()


@dataclass(frozen=True)
class Attack:
    """The finds of the threshold on networks, each with its own members."""

    trained_on: str
    members: str  # which images are
    counts: tuple  # of members, and of others
    curves: list  # of each network: false positives and hits, as `roc` returns them

    @property
    def aucs(self):
        """The area under each network's curve, in [0, 1]; a guess has 0.5."""
        return [float(trapezoid(hits, false)) for false, hits in self.curves]

    @property
    def hits(self):
        """True positives of each network at FALSE_POSITIVES; a guess has `hits_chance`."""
        return [hits_at(*curve, FALSE_POSITIVES) for curve in self.curves]

    @property
    def chance(self):
        """The standard deviation of the area of a guess (Mann & Whitney 1947)."""
        m, n = self.counts
        return ((m + n + 1) / (12 * m * n)) ** 0.5

    @property
    def hits_chance(self):
        """The expected true positives of a guess; with few others, more than FALSE_POSITIVES."""
        n = self.counts[1]
        return (int(FALSE_POSITIVES * n) + 1) / (n + 1)


def roc(members, others):
    """The ROC curve of losses, members' (m,) and others' (n,).

    Returns false positives and hits, fractions that rise from 0 to 1: a threshold at each loss
    calls those at or below it members.
    """
    thresholds = np.unique(np.concatenate([members, others]))
    false = np.searchsorted(np.sort(others), thresholds, side="right") / len(others)
    hits = np.searchsorted(np.sort(members), thresholds, side="right") / len(members)
    return np.concatenate([[0], false]), np.concatenate([[0], hits])


def hits_at(false, hits, allowed):
    """The most hits with at most `allowed` false positives."""
    return float(hits[false <= allowed].max())


def attacks(study):
    """An `Attack` or two on networks of each kind: on the set, on random images, on all."""
    test = study.data.test
    train = sample(study.data.train, len(test[1]), study.seed)
    everything = all_images(study.distilled.evaluator)
    found = []
    for training_set in (study.distilled, random_images(study), everything):
        parts = train, test, own_images(training_set)
        found += attacks_by(losses_of(training_set, parts, study.key), training_set.title)
    return found


def attacks_by(losses, title):
    """Attacks by the losses of each network on members, on others, and on images of its own.

    The last part has those of all networks, of which each has an equal share, or none.
    """
    curves, own_curves = [], []
    for number, (members, others, own) in enumerate(losses):
        curves.append(roc(members, others))
        if len(own):
            own = np.split(own, len(losses))[number]
            own_curves.append(roc(own, others))
    found = [Attack(title, "training images", (len(members), len(others)), curves)]
    if own_curves:
        found.append(Attack(title, "those images", (len(own), len(others)), own_curves))
    return found


def losses_of(training_set, parts, key):
    """The losses of each network on the images of each part."""
    process.write_line(f"\n{training_set.title}")
    images = torch.cat([images[:] for images, _ in parts])
    labels = torch.cat([labels for _, labels in parts])
    probe = Probe(images, labels, training_set.evaluator.batch_real)
    training_set = training_set.with_alpha(key)
    measured = training_set.measure(probe, key)
    diverged = sum(not losses.isfinite().all() for losses in measured)
    (name,) = training_set.evaluator.pool
    warn_of_diverged(name, diverged, len(measured), training_set.alpha)
    ends = np.cumsum([len(labels) for _, labels in parts])[:-1]
    return [np.split(losses.numpy(), ends) for losses in measured]


def sample(part, count, seed):
    """`count` images of a part of the data, or all if there are fewer, with their labels."""
    images, labels = part
    random = utils.make_generator("members", seed)
    chosen = torch.randperm(len(labels), generator=random)[:count].to(labels.device)
    return images[chosen], labels[chosen]


def all_images(evaluator):
    """All training images as a `TrainingSet`."""
    title = f"all {len(evaluator.data.train[1])} training images, {FULL_EPOCHS} epochs"
    augment = replace(evaluator.augment, windows=0, factor=1)
    short = replace(evaluator, augment=augment, epochs=FULL_EPOCHS - 1, num_eval=1)
    return TrainingSet(title, *evaluator.data.train, short, FULL_ALPHA)


def own_images(training_set):
    """The real images of all networks that have their own, with classes; none of tiles."""
    images, labels = training_set.images, training_set.labels
    if not training_set.axis or training_set.tiles > 1:
        return training_set.evaluator.data.no_images
    return images.flatten(0, 1), labels.flatten()


# --------------------------------------------------------------------------------------------------
# Nearest training images


def nearest(images, data):
    """The nearest training image of each of `images` (n, C, H, H): distances and indices (n,).

    The distance is the L2 norm of the difference in pixels, which are in [0, 1] in real images.
    """
    pixels = data.to_pixels(images).flatten(1)
    best = torch.full((len(images),), torch.inf)
    index = torch.zeros(len(images), dtype=torch.int64)
    start = 0
    for part in data.train[0].split(1024):
        distances = torch.cdist(pixels, data.to_pixels(part).flatten(1))  # (n, 1024)
        distance, place = distances.min(1)
        index = torch.where(distance < best, place + start, index)
        best = torch.minimum(best, distance)
        start += len(part)
    # `cdist` multiplies matrices, and so rounds distances near 0 to 0.01.
    found = data.to_pixels(data.train[0][index.to(data.device)]).flatten(1)
    return (pixels - found).norm(dim=1), index


def first_images(what, data):
    """The real images that a saved set started from; None if its run does not say so."""
    record = read_record(what, "--evaluate")
    if record is None or PIX_INIT.get(record.settings.get("pix_init")) is not random_real:
        return None
    flags = record.flags
    layout = Layout(flags["ipc"], flags["factor"])
    random = utils.make_generator("distillation", flags["seed"])
    images, _ = random_real(data, layout, random)
    return images


# --------------------------------------------------------------------------------------------------
# The task


def attack_members(study):
    """Attack networks that were trained on the set, and look for its nearest training images."""
    found = attacks(study)
    rows = []
    for attack in found:
        m, n = attack.counts
        row = {"trained_on": attack.trained_on, "members": attack.members}
        row |= {"num_members": m, "num_others": n, "auc": attack.aucs, "hits": attack.hits}
        chance = {"auc_chance_deviation": attack.chance, "hits_chance": attack.hits_chance}
        rows.append(row | chance)
    table, images = nearest_images(study)
    text = f"{table_of(found)}\n\n{table}\n\n{sentence(found[0])}"
    content = {"false_positives": FALSE_POSITIVES, "rows": rows, "nearest": images}
    return Outcome(text, content, picture_of(found))


def nearest_images(study):
    """The nearest training image of each image of the set: a text, and the figures.

    They are compared with those of test images, which no network was trained on.
    """
    data = study.data
    factor = study.distilled.evaluator.augment.factor
    images = utils.decode(study.distilled.images, factor)
    if images.shape[2] != data.form.im_size:
        return "Nearest training images are left out: canvases are larger than they are.", None
    distances, index = nearest(images, data)
    of_test, _ = nearest(sample(data.test, YARDSTICK, study.seed)[0], data)
    figures = {"distance": distances.tolist(), "index": index.tolist()}
    figures |= {"class": data.train[1].cpu()[index].tolist(), "test_distance": of_test.tolist()}
    text = (
        f"Nearest training image (L2 in pixels), median: {distances.median():.2f} for the "
        f"{len(images)} images, {of_test.median():.2f} for {len(of_test)} test images."
    )
    first = first_images(study.what, data)
    if first is None:
        return f"{text}\nWhich images the set started from is not recorded beside it.", figures
    _, start = nearest(utils.decode(first, factor), data)  # of a tile, it may be another image
    same = (start == index).tolist()
    figures |= {"start": start.tolist(), "is_start": same}
    chance = 1 / len(data.train[1])
    begun = "that the image started from" if factor == 1 else "nearest to the tile at its start"
    text += (
        f"\nThe nearest is the one {begun} for {sum(same)} of {len(same)}; "
        f"chance: {chance * len(same):.2g}."
    )
    return text, figures


def table_of(found):
    """AUC and true positives: a row for each attack, and their chance levels."""
    width = max(len(attack.trained_on) for attack in found)
    hits_title = f"true positives at {FALSE_POSITIVES:.0%} false"
    lines = [f"{'trained on':{width}}  {'members':16} {'number':>13}  {'AUC':16}  {hits_title}"]
    for attack in found:
        numbers = " / ".join(map(str, attack.counts))
        cells = f"{attack.trained_on:{width}}  {attack.members:16} {numbers:>13}"
        lines.append(f"{cells}  {spread(attack.aucs):16}  {spread(attack.hits)}")
    chance = " / ".join(f"{attack.chance:.2%}" for attack in found)
    hits = " / ".join(f"{attack.hits_chance:.2%}" for attack in found)
    lines.append(f"Chance for these numbers: AUC 50% (± {chance}), true positives {hits}")
    return "\n".join(lines)


def sentence(attack):
    """A sentence on an attack that claims no more than it found."""
    return (
        f"A loss threshold tells training from test images with an AUC of "
        f"{np.mean(attack.aucs):.1%} for networks trained on the set, where guessing has 50%. "
        "That is a figure for this attack on these networks, and no bound for stronger ones."
    )


def picture_of(found):
    """A Figure of the ROC curves, the mean over the networks, on logarithmic axes."""
    figure = new_figure(5.5, 5)
    axis = figure.subplots()
    grid = np.geomspace(1e-3, 1, 200)
    for attack in found:
        hits = np.mean([np.interp(grid, *curve) for curve in attack.curves], axis=0)
        axis.plot(grid, hits, label=f"{attack.trained_on}; members: {attack.members}")
    axis.plot(grid, grid, ":", color="grey", label="chance")
    axis.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1))
    axis.set(xlabel="false positives", ylabel="true positives")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower right")
    return figure
