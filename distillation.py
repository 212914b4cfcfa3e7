"""Distill a data set: learn a few synthetic images per class that lead a student along the experts' trajectories.

    python distillation.py --dataset=EuroSAT --ipc=1 --syn_steps=20 --expert_epochs=3 --max_start_epoch=5 --zca \
        --lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --buffer_path=BUF --data_path=DATA

needs the experts of `expert_trajectories.py` with the same --dataset, --model and --zca. Every --eval_it iterations it
trains fresh networks on the synthetic images and tests them on real ones. It logs to Weights & Biases and writes to
logged_files/DATASET/RUN: images, labels and step size as tensors, picture grids, an animation, and results.json.

On two cores of an AMD EPYC, 5000 iterations of ConvNetW32, evaluated every 500, take 1.7 hours.
"""

import hashlib
import json
import math
import os
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import wandb
from PIL import Image, ImageDraw, ImageFont
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import utils
from reparam_module import UNROLLS, ReparamModule
from utils import CLASS_NAMES, IM_SIZE, Data, ReportedError

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


def parse_args():
    parser = utils.Parser(__doc__.splitlines()[0])
    utils.add_shared_flags(parser, batch_train=256)
    add = parser.add_argument
    add("--ipc", type=utils.count, default=1, help="synthetic images per class")
    add("--Iteration", type=utils.number(int, 0), default=5000, help="distillation iterations")
    add("--lr_img", type=utils.not_negative, default=1000.0, help="learning rate of the images")
    add("--lr_lr", type=utils.not_negative, default=1e-5, help="learning rate of the step size α")
    add("--expert_epochs", type=utils.count, default=3, help="M: expert epochs that the student must match")
    add("--syn_steps", type=utils.count, default=20, help="N: the student's steps on synthetic images")
    add("--max_start_epoch", type=utils.count, default=25,
        help="T⁺: segments start at an expert's epoch below this one")
    add("--batch_syn", type=utils.count, help="synthetic images per step (default: all of them)")
    add("--unroll", choices=sorted(UNROLLS), default="adjoint",
        help="gradients through the student's steps: adjoint, in memory that does not grow with their number, or "
        "autograd, the plain double backward of MTT; they agree")
    add("--pix_init", choices=("real", "noise"), default="real", help="what the synthetic images start from")
    utils.add_flag(parser, "--no_aug", help="no augmentation while distilling (evaluation keeps its own)")
    utils.add_flag(parser, "--texture", help="distill canvases, from which random windows are cut; not with --zca")
    add("--canvas_size", type=utils.count, default=2, help="with --texture: side of a canvas, in images")
    add("--canvas_samples", type=utils.count, default=1, help="with --texture: windows per canvas in a batch")
    add("--eval_mode", choices=sorted(EVAL_POOLS), default="S",
        help="networks to evaluate on: S itself; A ConvNet, MLP, ResNet18; "
        "R, M, C itself and ResNet18, MLP, ConvNet; W, D, P, N ConvNet's widths, depths, poolings, normalisations")
    add("--num_eval", type=utils.count, default=5, help="fresh networks per evaluation")
    add("--eval_it", type=utils.count, default=100, help="iterations from one evaluation to the next")
    add("--epoch_eval_train", type=utils.count, default=1000, help="epochs on the synthetic images in an evaluation")
    add("--batch_real", type=utils.count, default=256, help="real images per batch when testing a network")
    add("--max_files", type=utils.count, help="trajectory files to read (default: all)")
    add("--max_experts", type=utils.count, help="experts to read per file (default: all)")
    utils.add_flag(parser, "--load_all", help="hold the experts' snapshots on the device")
    utils.add_flag(parser, "--force_save", help="log pictures to wandb with 50 images per class or more, too")
    add("--log_dir", type=utils.expanded_path, default=Path("logged_files"), help="where results are written")
    add("--run_name", help="name of the run and its folder (default: from the settings)")
    add("--wandb_mode", choices=("online", "offline", "disabled"), help="default: online when logged in, else offline")
    add("--wandb_project", default="DatasetDistillation", help="wandb project")
    add("--wandb_entity", help="wandb user or team")
    args = parser.parse_args()
    if args.zca and args.texture:
        parser.error("--zca and --texture exclude each other: whitening is fitted to whole images; leave one out")
    args.batch_syn = args.batch_syn or args.ipc * len(CLASS_NAMES)
    if args.batch_syn > args.ipc * len(CLASS_NAMES):
        parser.error(f"--batch_syn={args.batch_syn} is more than the {args.ipc * len(CLASS_NAMES)} synthetic images")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Experts


@dataclass(frozen=True)
class Experts:
    trajectories: list  # of experts, of snapshots, of tensors
    records: dict  # of each trajectory file, None for MTT's own
    epochs: int  # that every expert has at least

    @property
    def test_accuracies(self):
        """Of each expert after its last epoch, as far as it is recorded."""
        known = (record["experts"] for record in self.records.values() if record)
        return [expert["test_accuracy"][-1] for experts in known for expert in experts]

    def check_settings(self, settings):
        """Raise ReportedError where experts were made with other `settings`; warn where nothing is recorded."""
        for path, record in self.records.items():
            if record is None:
                warnings.warn(f"{path} has no record of its settings: whether its preprocessing fits cannot be checked")
            else:
                utils.check_record(path, record["settings"], settings)

    def digest(self):
        """What tells one set of experts from another: a hash of settings, losses, and of where the first one ends."""
        known = [len(self.trajectories)]
        for record in filter(None, self.records.values()):
            known += [record["settings"], record["training"], [expert["loss"] for expert in record["experts"]]]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
        for p in self.trajectories[0][-1]:
            digest.update(p.numpy().tobytes())
        return digest.hexdigest()[:16]

    def check_epochs(self, max_start_epoch, expert_epochs):
        """Raise ReportedError where the last segment, from T⁺ − 1 to T⁺ − 1 + M, ends after the experts do."""
        if max_start_epoch - 1 + expert_epochs > self.epochs:
            raise ReportedError(
                f"--max_start_epoch={max_start_epoch} and --expert_epochs={expert_epochs} need experts of "
                f"{max_start_epoch - 1 + expert_epochs} epochs; these have {self.epochs}: lower one of them, "
                "or train experts with more --train_epochs")

    def on_device(self, snapshots, device):
        """The same with each expert's first `snapshots` on the device."""
        trajectories = [[[p.to(device) for p in snapshot] for snapshot in expert[:snapshots]]
                        for expert in self.trajectories]
        return replace(self, trajectories=trajectories)

    def segment(self, expert, epoch, length, device):
        """θ*_t and θ*_{t+M}, flat (P,), of an expert, t = `epoch`, M = `length`.

        Raises ReportedError where they are the same: nothing is learned there, and the loss would divide by zero.
        """
        snapshots = (self.trajectories[expert][t] for t in (epoch, epoch + length))
        start, target = (torch.cat([p.reshape(-1) for p in snapshot]).to(device) for snapshot in snapshots)
        if torch.equal(start, target):
            raise ReportedError(f"expert {expert} is the same at epochs {epoch} and {epoch + length}, as MTT's own are "
                                "when trained on a CPU: train experts again")
        return start, target


def find_experts(folder):
    """The trajectory files in `folder`; raises ReportedError where there are none."""
    files = utils.expert_files(folder)
    if not files:
        raise ReportedError(f"no replay_buffer_0.pt in {folder}: train experts first (expert_trajectories.py with the "
                            "same --dataset, --model, --zca and --buffer_path)")
    return files


def load_experts(files, shapes, max_experts):
    """The experts in trajectory `files`, memory-mapped, `max_experts` of each file (None: all).

    Raises ReportedError where their tensors do not have the network's parameter `shapes`, or a record does not fit.
    """
    trajectories, records = [], {}
    for path in files:
        record, experts = utils.read_record(path), utils.read_trajectories(path)
        if record and len(record["experts"]) != len(experts):
            raise ReportedError(f"{path} holds {len(experts)} experts, but its record {len(record['experts'])}: run "
                                "expert_trajectories.py again to complete it")
        trajectories += experts[:max_experts]
        records[path] = record and record | {"experts": record["experts"][:max_experts]}
    if any([p.shape for p in expert[0]] != shapes for expert in trajectories):
        raise ReportedError(f"{files[0].parent} holds experts of another architecture: use the --model that made them")
    return Experts(trajectories, records, epochs=min(len(expert) for expert in trajectories) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic images and the student that learns from them


def make_student(model, amp, device):
    """A network called `model` as a function of its parameters. Raises ReportedError where it cannot be one."""
    try:
        return ReparamModule(utils.initial_network(model, utils.make_generator(0), device), amp)
    except ValueError as error:
        raise ReportedError(f"--model={model}: {error}") from None


def initial_images(data: Data, ipc, pix_init, canvas_size, generator):
    """Images (ipc * classes, 3, H, W) to start from, H = W = canvas_size * 64, and their labels, ordered by class."""
    label_syn = torch.arange(len(CLASS_NAMES)).repeat_interleave(ipc)
    if pix_init == "noise":
        side = canvas_size * IM_SIZE
        return torch.randn(len(label_syn), 3, side, side, generator=generator), label_syn
    tiles = [[random_real(data, ipc, generator)[0] for _ in range(canvas_size)] for _ in range(canvas_size)]
    return torch.cat([torch.cat(row, dim=3) for row in tiles], dim=2).cpu(), label_syn


def random_real(data: Data, ipc, generator):
    """`ipc` random training images of each class, and their labels, ordered by class."""
    images, labels = data.train
    chosen = []
    for label, name in enumerate(CLASS_NAMES):
        members = torch.nonzero(labels.cpu() == label).flatten()
        if ipc > len(members):
            raise ReportedError(f"--ipc={ipc} is more than the {len(members)} training images of {name}: lower it")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:ipc]])
    chosen = torch.cat(chosen).to(images.device)
    return images[chosen], labels[chosen]


def cut_windows(x, y, samples, generator):
    """Texture mode: `samples` random windows of each canvas (B, 3, H, W), which wraps around, and their labels."""
    offsets = torch.randint(x.shape[2], (2, samples * len(x), 1), generator=generator)
    rows, cols = ((torch.arange(IM_SIZE) + offsets) % x.shape[2]).to(x.device)
    return utils.window(x.repeat(samples, 1, 1, 1), rows, cols), y.repeat(samples)


def make_prepare(augment, samples):
    """`prepare(x, y, generator)` for synthetic batches: cut `samples` windows (0: no texture mode), then augment."""

    def prepare(x, y, generator):
        if samples:
            x, y = cut_windows(x, y, samples, generator)
        return augment(x, y, generator) if augment else (x, y)

    return prepare


def synthetic_batches(image_syn, label_syn, steps, batch_syn, prepare, generator):
    """The student's mini-batches: `steps` batches from random permutations of the synthetic images, each prepared.

    Of each, only the result is kept: on the way back it is prepared once more, from a copy of the generator.
    """
    chunks = []
    for _ in range(steps):
        if not chunks:
            chunks = list(torch.randperm(len(image_syn), generator=generator).to(image_syn.device).split(batch_syn))
        chosen, draws = chunks.pop(), iter((generator, generator.clone_state()))

        def batch(images, chosen=chosen, draws=draws):
            return prepare(images[chosen], label_syn[chosen], next(draws))

        yield checkpoint(batch, image_syn, use_reentrant=False, preserve_rng_state=False)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@dataclass(frozen=True)
class Scores:
    """Accuracies, in [0, 1], of the networks of one evaluation; `val` is empty without a validation set."""

    val: list
    test: list

    def __str__(self):
        parts = (f"{np.mean(part):7.2%} ± {np.std(part):6.2%}" if part else "" for part in (self.val, self.test))
        return "   ".join(f"{part:16}" for part in parts)

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
    networks = [utils.initial_network(model, generator, data.test[0].device) for generator in generators]
    runs = [runner(network) for network in networks]
    settings = {"epochs": epochs, "batch_size": batch_train, "prepare": prepare}
    if step:
        train_together(networks, step, training_sets, syn_lr, generators=generators, name=f"evaluation, {model}",
                       **settings)
    else:
        for index, (network, logits, generator) in enumerate(zip(networks, runs, generators)):
            utils.evaluate_synset(network, logits, *training_sets[index], syn_lr, generator=generator,
                                  name=f"evaluation {index + 1}/{len(networks)}, {model}", **settings)
    val, test = ([utils.accuracy(network, logits, *part, batch_real) for network, logits in zip(networks, runs)]
                 if len(part[1]) else [] for part in (data.val, data.test))
    return Scores(val, test)


def make_sgd_step(model, runner, device):
    """`sgd_step` for networks called `model`; None where they are to be trained one after the other.

    That is on a CPU, which has nothing to gain from larger kernels and was a quarter slower with them, and with batch
    statistics, which are no part of the parameters.
    """
    network = utils.initial_network(model, utils.make_generator(0), device)
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
    """What `utils.evaluate_synset` does, for K networks at once, each with its own training set, generator and draws.

    The training sets must be of one size.
    """
    thetas = torch.stack([parameters_to_vector(network.parameters()) for network in networks]).detach()  # (K, P)
    momenta, lr = torch.zeros_like(thetas), torch.tensor(syn_lr, device=thetas.device)
    for epoch in tqdm(range(epochs + 1), desc=name, unit="epochs", mininterval=1, leave=False):
        of_each = [utils.shuffled_batches(*training_set, batch_size, prepare, generator)
                   for training_set, generator in zip(training_sets, generators)]
        for batches in zip(*of_each):
            thetas, momenta = step(thetas, momenta, *(torch.stack(part) for part in zip(*batches)), lr)
        if epoch == epochs // 2 + 1:
            lr, momenta = lr * 0.1, torch.zeros_like(momenta)
    for network, theta in zip(networks, thetas):
        vector_to_parameters(theta, network.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and files


def draw_grid(images, labels, title):
    """A labelled picture of images (B, 3, H, W), each scaled to its own range: a column per class, or rows of five."""
    count, _, height, width = images.shape
    columns = 5 if count == len(CLASS_NAMES) else len(CLASS_NAMES)
    rows = -(-count // columns)
    scale = max(1, (192 if columns == 5 else 128) // height)
    cell_w, cell_h, head = width * scale + 8, height * scale + 22, 26
    picture = Image.new("RGB", (columns * cell_w + 8, rows * cell_h + head + 4), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    draw.text((8, 6), title, fill="black", font=font)
    # The images are ordered by class: five columns take them as they come, ten take each class down a column.
    order = range(count) if columns == 5 else [c * rows + r for r in range(rows) for c in range(columns)]
    for place, index in enumerate(order):
        image = images[index] - images[index].min()
        pixels = (image / image.max().clamp(min=1e-8) * 255).byte().permute(1, 2, 0).numpy()
        tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        left, top = place % columns * cell_w + 8, place // columns * cell_h + head
        picture.paste(tile, (left, top))
        draw.text((left, top + height * scale + 2), CLASS_NAMES[labels[index]], fill="black", font=font)
    return picture


def clip(images, deviations=2.5):
    """Images with values beyond so many standard deviations from the mean cut off, as in MTT's pictures."""
    mean, std = images.mean(), images.std()
    return images.clamp(mean - deviations * std, mean + deviations * std)


def save_synthetic(folder, tags, image_syn, label_syn, syn_lr, data: Data):
    """Write images, labels and α as bare tensors: images_{tag}.pt and labels_{tag}.pt are what MTT's tools read."""
    tensors = {"images": image_syn, "labels": label_syn, "syn_lr": syn_lr}
    if data.zca:
        tensors["images_zca"] = data.to_pixels(image_syn)
    for name, tensor in tensors.items():
        bare = tensor.detach().cpu().clone()
        for tag in tags:
            utils.write_whole(folder / f"{name}_{tag}.pt", lambda file, bare=bare: torch.save(bare, file))


def save_picture(folder, name, picture, **options):
    utils.write_whole(folder / name, lambda file: picture.save(file, format=name.rsplit(".")[-1], **options))


def save_animation(folder):
    """`animation.gif` of the run's grids, from the first iteration to the last."""
    first, *others = sorted(folder.glob("grid_*.png"))
    frames = (Image.open(path).convert("RGB") for path in others)  # opened one by one: with many images each is large
    save_picture(folder, "animation.gif", Image.open(first).convert("RGB"), save_all=True, append_images=frames,
                 duration=[200] * len(others) + [2000], loop=0)


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases


def start_wandb(folder, config, mode, project, entity):
    """A wandb run that never asks and never fails the run: online when logged in and reachable, else offline."""
    mode = mode or os.environ.get("WANDB_MODE")
    options = {"dir": folder, "config": config, "project": project, "entity": entity, "name": folder.name,
               "settings": wandb.Settings(silent=True, init_timeout=30)}
    try:
        if mode in (None, "online") and not wandb.login(prompt=False, verify=False):
            if mode == "online":
                warnings.warn("--wandb_mode=online, but nobody is logged in (wandb login): logging offline")
            mode = "offline"
        run = wandb.init(mode=mode or "online", **options)
    except (wandb.Error, ValueError) as error:  # ValueError: of what WANDB_... variables may hold
        warnings.warn(f"wandb cannot go online ({utils.first_line(error)}): logging offline")
        try:
            run = wandb.init(mode="offline", **options)
        except (wandb.Error, ValueError) as error:
            raise ReportedError(f"wandb: {utils.first_line(error)} (--wandb_mode=disabled does without)") from None
    if run.settings.mode == "offline":
        print(f"wandb logs offline; to upload: wandb sync {Path(run.dir).parent}")
    elif run.url:
        print(f"wandb: {run.url}")
    return run


def picture_log(image_syn, label_syn, data: Data, title, pictures):
    """MTT's wandb keys for the images: a histogram; with `pictures` also the tensors, as they are and whitening undone.
    """
    log = {"Pixels": wandb.Histogram(image_syn)}
    if not pictures:
        return log
    log["Synthetic_Pixels"] = log["Pixels"]
    views = {"Synthetic": image_syn} | ({"Reconstructed": data.to_pixels(image_syn)} if data.zca else {})
    for name, images in views.items():
        log[f"{name}_Images"] = wandb.Image(draw_grid(images, label_syn, title))
        log[f"Clipped_{name}_Images/std_2.5"] = wandb.Image(draw_grid(clip(images), label_syn, title))
    if data.zca:
        log["Reconstructed_Pixels"] = wandb.Histogram(views["Reconstructed"])
    return log


# ---------------------------------------------------------------------------------------------------------------------
# Main


def run_settings(flags):
    """The flags, a dictionary, that a result depends on: all but paths, names and where it runs."""
    left_out = ("data_path", "buffer_path", "log_dir", "run_name", "device", "load_all", "force_save")
    return {key: value for key, value in flags.items() if key not in left_out and not key.startswith("wandb")}


def run_folder(parent, name, settings):
    """The run's folder below `parent`, `name` or after the settings. Raises ReportedError where another run has it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    zca = "_zca" if settings["zca"] else ""
    folder = parent / (name or f"{settings['model']}_ipc{settings['ipc']}{zca}_seed{settings['seed']}_{digest}")
    results = folder / "results.json"
    if results.exists():
        try:
            record = utils.read_json(results, settings=dict)["settings"]
        except ValueError as error:
            raise ReportedError(f"{results} is damaged ({error}): remove it, or use another --run_name") from None
        utils.check_record(folder, record, settings, "--run_name")
    return folder


class Evaluations:
    """All evaluations of a run, oldest first, and which of them is the best (on average over the networks)."""

    def __init__(self):
        self.rows, self.best = [], None

    def add(self, iteration, scores, syn_lr, losses, seconds):
        """Take an evaluation; `losses` are those since the last one, and their mean is kept. True for a new best."""
        loss = float(np.mean(losses)) if losses else None  # before the first iteration there is none
        self.rows.append({"iteration": iteration, "syn_lr": syn_lr, "loss": loss, "seconds": round(seconds, 1),
                          "scores": scores})
        if self.best is None or mean_choice(scores) > mean_choice(self.best["scores"]):
            self.best = self.rows[-1]
        return self.best is self.rows[-1]

    def log(self):
        """The wandb keys of the latest evaluation."""
        log = {}
        for network, scores in self.rows[-1]["scores"].items():
            best = max((row["scores"][network] for row in self.rows), key=lambda scores: scores.choice)
            for prefix, part in (("", "test"), ("Validation_", "val")):
                if getattr(scores, part):
                    log |= {f"{prefix}Accuracy/{network}": np.mean(getattr(scores, part)),
                            f"{prefix}Std/{network}": np.std(getattr(scores, part)),
                            f"Max_{prefix}Accuracy/{network}": np.mean(getattr(best, part)),
                            f"Max_{prefix}Std/{network}": np.std(getattr(best, part))}
        return log

    def table(self):
        """Lines for the latest evaluation, one per network."""
        row = self.rows[-1]
        loss = "" if row["loss"] is None else f"{row['loss']:6.4f}"
        return "\n".join(f"{row['iteration']:9d} {network:12} {scores}   {row['syn_lr']:8.5f}  {loss}"
                         for network, scores in row["scores"].items())


def mean_choice(scores):
    return np.mean([score.choice for score in scores.values()])


def check_progress(iteration, expert, start_epoch, loss, syn_lr, image_syn):
    """Raise ReportedError where the run has diverged: loss, images or α not finite, or α not positive."""
    if not (math.isfinite(loss) and math.isfinite(syn_lr) and syn_lr > 0 and image_syn.isfinite().all()):
        raise ReportedError(
            f"diverged at iteration {iteration} (expert {expert}, start epoch {start_epoch}): loss {loss:.4g}, "
            f"α {syn_lr:.4g}. Lower --lr_lr, --lr_img, --lr_teacher or --syn_steps; what was saved is kept")


def save_results(folder, settings, data: Data, experts: Experts, baselines, evaluations: Evaluations):
    """Write results.json: settings, versions, every evaluation's accuracies, and what they are compared with."""

    def plain(rows):
        return [row | {"scores": {network: vars(score) for network, score in row["scores"].items()}} for row in rows]

    results = {
        "settings": settings,
        "data": data.settings,
        "experts": len(experts.trajectories),
        "versions": utils.versions(),
        "threads": torch.get_num_threads(),
        "best_iteration": evaluations.best["iteration"],
        "evaluations": plain(evaluations.rows),
        "random_real": plain(baselines),
        "experts_test_accuracy": experts.test_accuracies,
    }
    utils.write_json(folder / "results.json", results)


def summary(data: Data, experts: Experts, baselines, evaluations: Evaluations, num_images, folder):
    """The closing table: what networks reach on random real images, on the distilled ones, on all training images."""
    best = evaluations.best
    rows = [("trained on", "α", "network", f"{'validation':^16}   {'test':^16}")]
    for kind, evaluation in [*(("random real", baseline) for baseline in baselines), ("distilled", best)]:
        rows += [(f"{num_images} {kind} images", f"{evaluation['syn_lr']:.5f}", network, scores)
                 for network, scores in evaluation["scores"].items()]
    if experts.test_accuracies:
        rows.append((f"all {len(data.train[1])} training images", "", "(experts)", Scores([], experts.test_accuracies)))
    table = "\n".join(f"{images:27} {alpha:>8}   {network:12} {scores}" for images, alpha, network, scores in rows)
    return f"\nBest iteration: {best['iteration']}\n{table}\nFiles: {folder}"


def main():
    args = parse_args()
    device = utils.check_device(args.device)
    args.amp = utils.check_amp(args.amp, device)
    pool = list(dict.fromkeys(args.model if name == "model" else name for name in EVAL_POOLS[args.eval_mode]))

    student = make_student(args.model, args.amp, device)  # refuses names before loading
    files = find_experts(utils.expert_folder(args.buffer_path, args.dataset, args.zca, args.model))[:args.max_files]
    experts = load_experts(files, student.shapes, args.max_experts)
    experts.check_epochs(args.max_start_epoch, args.expert_epochs)
    experts.check_settings({"val_fraction": args.val_fraction})  # before whitening another split for minutes
    data = utils.load_data(args.dataset, args.data_path, args.zca, args.val_fraction, device)
    experts.check_settings(data.settings | {"model": args.model})
    settings = run_settings(vars(args)) | {"data": data.settings["digest"], "experts": experts.digest()}
    folder = run_folder(args.log_dir / args.dataset, args.run_name, settings)
    if args.load_all:
        experts = experts.on_device(args.max_start_epoch + args.expert_epochs, device)

    random = utils.make_generator("distillation", args.seed)
    windows, canvas_size = (args.canvas_samples, args.canvas_size) if args.texture else (0, 1)
    image_syn, label_syn = initial_images(data, args.ipc, args.pix_init, canvas_size, random)
    image_syn, label_syn = image_syn.to(device).requires_grad_(True), label_syn.to(device)
    syn_lr = torch.tensor(args.lr_teacher, device=device, requires_grad=True)  # α
    optimizer_img = torch.optim.SGD([image_syn], lr=args.lr_img, momentum=0.5)
    optimizer_lr = torch.optim.SGD([syn_lr], lr=args.lr_lr, momentum=0.5)

    augment = utils.make_augment(args.dsa, args.dsa_strategy)
    prepare_student = make_prepare(augment if args.dsa and not args.no_aug else None, windows)
    prepare_eval = make_prepare(augment, windows)
    runner = utils.Runner(args.compile, args.amp)
    unroll = UNROLLS[args.unroll](student, runner.function)
    sgd_steps = {name: make_sgd_step(name, runner, device) for name in pool}

    def evaluate_pool(training_sets, alpha, prepare, *key):
        more = {"key": (args.seed, *key), "epochs": args.epoch_eval_train, "batch_train": args.batch_train,
                "batch_real": args.batch_real}
        return {name: evaluate(name, training_sets, alpha, data, runner, prepare, step=step, **more)
                for name, step in sgd_steps.items()}

    draws = [utils.make_generator("random real", args.seed, k) for k in range(args.num_eval)]
    real_sets = [random_real(data, args.ipc, draw) for draw in draws]

    def evaluate_random_real(alpha):
        return {"syn_lr": alpha, "scores": evaluate_pool(real_sets, alpha, augment, "random real")}

    folder.mkdir(parents=True, exist_ok=True)
    run = start_wandb(folder, settings, args.wandb_mode, args.wandb_project, args.wandb_entity)
    print(f"{len(label_syn)} synthetic images, {len(experts.trajectories)} experts; results in {folder}")
    print(f"{'iteration':>9} {'network':12} {'validation':^16}   {'test':^16}   {'α':>8}  {'loss':>6}", flush=True)
    start, losses, evaluations = time.time(), [], Evaluations()
    baselines = [evaluate_random_real(args.lr_teacher)]
    with tqdm(total=args.Iteration, mininterval=1) as bar:
        for it in range(args.Iteration + 1):
            log = {"Progress": it, "Synthetic_LR": syn_lr.item()}
            if it % args.eval_it == 0 or it == args.Iteration:
                images = image_syn.detach().clone()
                scores = evaluate_pool([(images, label_syn)] * args.num_eval, syn_lr.item(), prepare_eval, it)
                is_best = evaluations.add(it, scores, syn_lr.item(), losses, time.time() - start)
                bar.write(evaluations.table())
                log |= evaluations.log()
                losses.clear()
                title = f"{args.dataset}, {args.model}, iteration {it}"
                save_picture(folder, f"grid_{it:06d}.png", draw_grid(clip(data.to_pixels(images)), label_syn, title))
                if is_best or it % 1000 == 0 or it == args.Iteration:
                    save_synthetic(folder, [it, "best"] if is_best else [it], images, label_syn, syn_lr, data)
                    pictures = args.ipc < 50 or args.force_save
                    log |= picture_log(images.cpu(), label_syn, data, title, pictures)
                save_results(folder, settings, data, experts, baselines, evaluations)
            if it == args.Iteration:
                run.log(log, step=it)
                break

            expert = int(torch.randint(len(experts.trajectories), (1,), generator=random))
            start_epoch = int(torch.randint(args.max_start_epoch, (1,), generator=random))
            batches = synthetic_batches(image_syn, label_syn, args.syn_steps, args.batch_syn, prepare_student, random)
            segment = experts.segment(expert, start_epoch, args.expert_epochs, device)
            loss, image_syn.grad, syn_lr.grad = unroll(*segment, image_syn, syn_lr, batches)
            optimizer_img.step()
            optimizer_lr.step()
            losses.append(loss.item())
            check_progress(it, expert, start_epoch, losses[-1], syn_lr.item(), image_syn)
            run.log(log | {"Grand_Loss": losses[-1], "Start_Epoch": start_epoch}, step=it)
            bar.set_postfix(loss=f"{losses[-1]:.4f}", α=f"{syn_lr.item():.5f}", refresh=False)
            bar.update()
    if evaluations.best["iteration"]:  # how much of the gain is due to the learned α, and how much to the images
        baselines.append(evaluate_random_real(evaluations.best["syn_lr"]))
        save_results(folder, settings, data, experts, baselines, evaluations)
    save_animation(folder)
    print(summary(data, experts, baselines, evaluations, len(label_syn), folder), flush=True)
    run.finish()


if __name__ == "__main__":
    utils.run_script(main)
