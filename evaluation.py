"""Evaluation: fresh networks are trained on a small set of images and tested on real ones."""

import hashlib
import json
import math
import os
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.func import grad
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import datasets
import files
import process
import report
import utils
from compilation import Compiler
from preprocessing import Data, random_real
from process import ReportedError, first_line, stop
from reparam_module import ReparamModule
from scores import Scores, to_json
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
        labels  classes (N,), or probabilities (N, classes)
        syn_lr  α, the learning rate to train with
        key     of all that is random: initial weights, order of the images, augmentation
        """
        if images.dim() == 4:
            images = images.expand(self.num_eval, *images.shape)
        return {name: self.evaluate(name, images, labels, syn_lr, key) for name in self.pool}

    def evaluate(self, name, images, labels, syn_lr, key):
        """`Scores` of the networks called `name`."""
        form, device = self.data.form, images.device
        keys = [("evaluation", *key, name, index) for index in range(self.num_eval)]
        generators = [utils.make_generator(*key) for key in keys]
        networks = [utils.initial_network(name, form, random, device) for random in generators]
        forwards = [self.compiler(network) for network in networks]
        # So small a batch leaves most of a GPU, or of a processor's cores, without work.
        batch = min(len(labels), self.batch_train) * (self.augment.windows or 1)
        is_small = batch <= 64
        if is_small and self.pool[name]:
            train = images, labels
            self.train_together(self.pool[name], networks, train, syn_lr, generators)
        else:
            workers = torch.get_num_threads() if is_small and device.type == "cpu" else 1
            trainings = [
                self.evaluate_synset(network, forward, (x, labels), syn_lr, generator)
                for network, forward, x, generator in zip(networks, forwards, images, generators)
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

        `step` is `sgd_step` for these networks, `train` images (K, N, 3, H, H) and labels (N,).
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
                made = [self.augment(x, batch, labels) for x, batch in zip(images, batches)]
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


def random_real_sets(data, ipc, count, seed):
    """`count` draws of `random_real`: images (count, ipc * classes, 3, H, H), labels of one."""
    generators = (utils.make_generator("random real", seed, k) for k in range(count))
    draws = [random_real(data, ipc, generator) for generator in generators]
    return torch.stack([images for images, _ in draws]), draws[0][1]


def evaluate_real(evaluator, real_sets, syn_lr, seed):
    """An evaluation of `random_real_sets`: what a distilled set is compared with."""
    scores = of_real_images(evaluator)(*real_sets, syn_lr, (seed, "random real"))
    return {"syn_lr": syn_lr, "scores": scores}


def fresh_sgd(network, rate):
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)


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
    x, y, rate       images (K, B, C, H, W), labels (K, B), learning rate ()

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


# --------------------------------------------------------------------------------------------------
# Saved sets


def is_saved(what):
    """Whether --evaluate names a saved set."""
    return what not in (None, "random", "full")


def saved_folder(what):
    """The folder of a saved set, which is named itself, or by one of its files."""
    path = expanded(what)
    return path if path.is_dir() else path.parent


def expanded(what):
    return Path(os.path.expanduser(what))  # pathlib's raises an error for an unknown user


def saved_path(what, name):
    """The file of a saved set's "images", "labels" or "syn_lr"."""
    path = expanded(what)
    path = path / "images_best.pt" if path.is_dir() else path
    return path.with_name(path.name.replace("images", name, 1))


def read_tensor(what, name):
    """One of a saved set's "images", "labels", "syn_lr"; None where there is no such file."""
    path = saved_path(what, name)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # a foreign or damaged file raises whatever its bytes trigger
        raise ReportedError(f"--evaluate: {path} cannot be read ({first_line(error)})") from None


def saved_step_size(what):
    """The α of a saved set; None where it is not saved, as by MTT.

    Raises ReportedError where the file holds something else.
    """
    syn_lr = read_tensor(what, "syn_lr")
    if syn_lr is None:
        return None
    is_scalar = isinstance(syn_lr, torch.Tensor) and syn_lr.numel() == 1
    if not (is_scalar and 0 < syn_lr < math.inf):
        raise ReportedError(
            f"--evaluate: the syn_lr_*.pt beside {what} holds no step size, a positive number"
        )
    return float(syn_lr)


def load_set(what, form):
    """Images and labels of a saved set, MTT's as well.

    Raises ReportedError where they are missing, or do not fit this `datasets.Form`.
    """
    images = read_tensor(what, "images")
    labels = read_tensor(what, "labels")
    for name, tensor in (("images", images), ("labels", labels)):
        if tensor is None:
            raise ReportedError(
                f"--evaluate={what}: {saved_path(what, name)} is not there; name a run's folder, "
                "or an images_*.pt with labels_*.pt beside it, or random or full"
            )
    if not (is_image_set(images, form) and is_label_set(labels, images, form)):
        size, last = form.im_size, form.num_classes - 1
        raise ReportedError(
            f"--evaluate: {what} holds no synthetic images of these classes: (N, 3, {size}, {size})"
            f" float32, finite, and labels (N,) int64 from 0 to {last}, or probabilities "
            f"(N, {last + 1}) float32"
        )
    return images, labels


def is_image_set(images, form):
    if not (isinstance(images, torch.Tensor) and images.dtype == torch.float32):
        return False
    if images.dim() != 4 or not len(images) or images.shape[1] != 3:
        return False
    height, width = images.shape[2:]
    return height == width >= form.im_size and bool(images.isfinite().all())


def is_label_set(labels, images, form):
    if not isinstance(labels, torch.Tensor):
        return False
    if labels.dtype == torch.float32:
        fits = labels.shape == (len(images), form.num_classes) and bool((labels >= 0).all())
        return fits and bool(((labels.sum(1) - 1).abs() < 1e-3).all())
    if labels.dtype != torch.int64:
        return False
    return labels.shape == images.shape[:1] and 0 <= labels.min() <= labels.max() < form.num_classes


def check_set(what, images, texture, data: Data):
    """Raise ReportedError where images were made for other data, or need --texture."""
    folder = saved_folder(what)
    if record := files.read_run(folder):  # MTT's sets have none
        now = {key: data.settings[key] for key in ("dataset", "zca", "val_fraction")}
        now |= {"data": data.settings["digest"], "texture": texture}
        files.check_record(folder, record.settings, now, "set")
    if images.shape[2] != data.form.im_size and not texture:
        raise ReportedError(
            f"--evaluate: the images of {what} have {images.shape[2]} pixels a side, not "
            f"{data.form.im_size}: canvases need --texture"
        )


def export_set(folder, images, labels, syn_lr, data: Data):
    """Write a synthetic set for other tools: PNGs in class folders, and dd_ranking.pt.

    The PNGs are for the eye: clipped, each in its own range. DD-Ranking's dictionary has what
    networks learn from. Raises ReportedError where the folder has images already.
    """
    if (folder / "images").exists():
        raise ReportedError(
            f"--export={folder}: there are images already: remove them, or name another folder"
        )
    pixels = report.clip(data.to_pixels(images))
    classes = labels if labels.dim() == 1 else labels.argmax(1)
    for label, name in enumerate(data.classes):
        for number, image in enumerate(pixels[classes == label]):
            path = folder / "images" / name / f"{number:04d}.png"
            report.save_picture(path, report.draw_image(image))
    content = {"image_tensor": images, "hard_labels": classes, "syn_lr": syn_lr}
    if labels.dim() == 2:
        content["soft_labels"] = labels
    files.write_tensors(folder / "dd_ranking.pt", content)


def evaluate_saved(args, settings):
    """What --evaluate does: print a table, and write every accuracy to evaluation.json.

    `settings` are the flags that a result depends on.
    """
    device = process.check_device(args.device)
    form = datasets.form_of(args.dataset, args.data_path, args.im_size)
    compiler = Compiler(args.compile, process.check_amp(args.amp, device))
    print(process.describe(device, compiler.amp), flush=True)
    pool = make_pool(args.eval_mode, args.model, form, compiler, device)
    saved = load_set(args.evaluate, form) if is_saved(args.evaluate) else None
    data = datasets.load_data(
        args.dataset, args.data_path, args.zca, args.val_fraction, device, args.im_size
    )
    evaluator = make_evaluator(args, data, pool, compiler)
    alpha = args.lr_teacher
    if args.evaluate == "full":
        evaluator, (images, labels) = of_real_images(evaluator), data.train
    elif args.evaluate == "random":
        evaluator = of_real_images(evaluator)
        images, labels = random_real_sets(data, args.ipc, args.num_eval, args.seed)
    else:
        images, labels = saved
        check_set(args.evaluate, images, args.texture, data)
        if alpha is None:
            raise ReportedError(
                f"{saved_folder(args.evaluate)} holds no α (syn_lr_*.pt): give --lr_teacher, the "
                "step size to train with"
            )
        if args.export:
            export_set(args.export, images, labels, alpha, data)
            print(f"{len(images)} images exported to {args.export}")
            return
    scores = evaluator(images.to(device), labels.to(device), alpha, (args.seed, "saved"))
    settings = settings | {"amp": compiler.amp}
    title = {"full": "training images", "random": "random real images"}.get(
        args.evaluate, f"images of {args.evaluate}"
    )
    print(f"{len(labels)} {title}; networks: {args.num_eval}, ", end="")
    print(f"epochs: {args.epoch_eval_train}, α = {alpha:.5f}\n")
    print(report.scores_table(scores, data.classes))
    row = {"evaluated": args.evaluate, "images": len(labels), "syn_lr": alpha, "scores": scores}
    save_evaluation(args, settings, data, row)


def save_evaluation(args, settings, data, row):
    """Write an evaluation to evaluation.json, in a folder named after it and its settings."""
    settings = settings | {"data": data.settings["digest"], "evaluate": args.evaluate}
    settings["syn_lr"] = settings.pop("lr_teacher")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    name = {"random": f"random_ipc{args.ipc}"}.get(
        args.evaluate, Path(args.evaluate).resolve().stem
    )
    folder = args.log_dir / args.dataset / (args.run_name or f"evaluate_{name}_{digest}")
    (content,) = to_json([row])
    content |= {"settings": settings, "data": data.settings, "versions": process.versions()}
    content["device"] = process.describe(data.train[0].device, settings["amp"])
    files.write_json(folder / "evaluation.json", content)
    print(f"\nFiles: {folder / 'evaluation.json'}")
