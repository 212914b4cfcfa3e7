"""Distill a data set: learn a few synthetic images per class that lead a student along the experts' trajectories.

    python distillation.py --dataset=EuroSAT --ipc=1 --syn_steps=20 --expert_epochs=3 --max_start_epoch=5 --zca \
        --lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --buffer_path=BUF --data_path=DATA

needs the experts of `expert_trajectories.py` with the same --dataset, --model and --zca. Every --eval_it iterations it
trains fresh networks on the synthetic images and tests them on real ones. It logs to Weights & Biases and writes to
logged_files/DATASET/RUN: images, labels and step size as tensors, picture grids, an animation, and results.json.

On two cores of an AMD EPYC, 5000 iterations of ConvNetW32, evaluated every 500, take 1.7 hours.
"""

import argparse
import hashlib
import json
import math
import sys
import time
import uuid
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import datasets
import files
import presets
import report
import utils
from datasets import Data
from evaluation import (
    EVAL_POOLS,
    Evaluations,
    Scores,
    evaluate_pool,
    make_pool,
    mean_choice,
    plain,
    scored,
    scores_table,
)
from files import ReportedError
from reparam_module import UNROLLS, ReparamModule
from trajectories import Experts, expert_folder, load_experts
from utils import Stopped, stop

RUN_FILE, CHECKPOINT = "run.json", "checkpoint.pt"  # in the run's folder: what it is, and how far it has come
NO_RESULT = ("log_dir", "run_name", "resume", "evaluate", "export", "preset", "alpha_given")  # not what a run is


def parse_args():
    parser = utils.Parser(__doc__.splitlines()[0])
    presets.add_flag(parser)
    datasets.add_flags(parser)
    utils.add_shared_flags(parser, batch_train=256)
    add = parser.topic("data")
    add("--max_files", type=utils.count, metavar="N", help="trajectory files to read (default: all)")
    add("--max_experts", type=utils.count, metavar="N", help="experts to read per file (default: all)")
    utils.add_flag(add, "--skip_damaged", help="go on without damaged trajectory files and experts")
    utils.add_flag(add, "--load_all", help="hold the experts' snapshots on the device")
    add = parser.topic("distillation")
    add("--ipc", type=utils.count, default=1, metavar="N", help="synthetic images per class")
    add("--Iteration", type=utils.number(int, 0), default=5000, metavar="N", help="distillation iterations")
    add("--lr_img", type=utils.not_negative, default=1000.0, metavar="RATE", help="learning rate of the images")
    add("--lr_lr", type=utils.not_negative, default=1e-5, metavar="RATE", help="learning rate of the step size α")
    add("--expert_epochs", type=utils.count, default=3, metavar="M", help="expert epochs that the student must match")
    add("--syn_steps", type=utils.count, default=20, metavar="N", help="the student's steps on synthetic images")
    add("--max_start_epoch", type=utils.count, default=25, metavar="T⁺",
        help="segments start at an expert's epoch below this one")
    add("--batch_syn", type=utils.count, metavar="IMAGES", help="synthetic images per step (default: all of them)")
    add("--unroll", choices=sorted(UNROLLS), default="adjoint",
        help="gradients through the student's steps: adjoint, in memory that does not grow with their number, or "
        "autograd, the plain double backward of MTT; they agree")
    add("--pix_init", choices=("real", "noise"), default="real", help="what the synthetic images start from")
    utils.add_flag(add, "--no_aug", help="no augmentation while distilling (evaluation keeps its own)")
    utils.add_flag(add, "--texture", help="distill canvases, from which random windows are cut; not with --zca")
    add("--canvas_size", type=utils.count, default=2, metavar="IMAGES", help="with --texture: side of a canvas")
    add("--canvas_samples", type=utils.count, default=1, metavar="N",
        help="with --texture: windows per canvas in a batch")
    add = parser.topic("evaluation")
    add("--eval_mode", choices=sorted(EVAL_POOLS), default="S",
        help="networks to evaluate on: S itself; A ConvNet, MLP, ResNet18; "
        "R, M, C itself and ResNet18, MLP, ConvNet; W, D, P, N ConvNet's widths, depths, poolings, normalisations")
    add("--num_eval", type=utils.count, default=5, metavar="N", help="fresh networks per evaluation")
    add("--eval_it", type=utils.count, default=100, metavar="ITERATIONS", help="from one evaluation to the next")
    add("--epoch_eval_train", type=utils.count, default=1000, metavar="EPOCHS",
        help="epochs on the synthetic images in an evaluation")
    add("--batch_real", type=utils.count, default=256, metavar="IMAGES",
        help="real images per batch when testing a network")
    add("--evaluate", metavar="WHAT",
        help="instead of distilling, evaluate a saved set (folder of a run, with its flags, or an images_*.pt with "
        "labels_*.pt beside it), random: --ipc random real images per class, or full: all training images")
    add("--export", type=utils.expanded_path, metavar="DIR",
        help="with --evaluate: write the set as PNGs in class folders and as DD-Ranking takes it, and end")
    add = parser.topic("results")
    add("--log_dir", type=utils.expanded_path, default=Path("logged_files"), metavar="DIR",
        help="where results are written")
    add("--run_name", type=folder_name, metavar="NAME",
        help="name of the run and its folder (default: from the settings)")
    add("--checkpoint_every", type=utils.count, default=100, metavar="ITERATIONS",
        help="from one checkpoint to the next; the same command goes on from the last one")
    add("--resume", type=utils.expanded_path, metavar="DIR", help="go on with the run in DIR, with the flags it had")
    utils.add_flag(add, "--force_save", help="log pictures to wandb with 50 images per class or more, too")
    args = presets.parse_args(parser, "distillation")
    given = {argument.split("=")[0] for argument in sys.argv[1:]}
    for other in given.intersection(("--run_name", "--log_dir", "--evaluate", "--preset")) if args.resume else ():
        parser.error(f"--resume and {other} exclude each other: leave one out")
    if args.evaluate == "":
        parser.error("--evaluate='' names nothing: name a run's folder, an images_*.pt, random or full")
    if args.export and args.evaluate in (None, "random", "full"):
        parser.error("--export needs --evaluate with a saved set")
    if args.resume or args.evaluate not in (None, "random", "full"):
        folder = args.resume or saved_folder(args.evaluate)
        try:
            flags = read_run(folder)["flags"]
            if args.preset:
                parser.error(f"--preset={args.preset}: the run in {folder} has its own flags: leave it out")
            args = parser.parse_args([*flags, *sys.argv[1:]])  # of two, the last one counts
        except FileNotFoundError:
            if args.resume:
                parser.error(f"--resume={args.resume}: no run was begun there (it has no {RUN_FILE})")
        except ReportedError as error:
            parser.error(str(error))
    if args.evaluate == "full" and "--epoch_eval_train" not in given:
        args.epoch_eval_train = 50  # as for experts: of real images, an epoch has thousands of times as many steps
    args.alpha_given = "--lr_teacher" in given
    if args.zca and args.texture:
        parser.error("--zca and --texture exclude each other: whitening is fitted to whole images; leave one out")
    return args


def saved_folder(what):
    """The folder of a saved set, which is named itself, or by one of its files."""
    path = utils.expanded_path(what)
    return path if path.is_dir() else path.parent


def folder_name(text):
    """A run's name, which names a folder in --log_dir and so must not lead out of it."""
    if text in ("", ".", "..") or any(c in text for c in "/\\\0"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder in --log_dir: choose one without '/'")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic images and the student that learns from them


def make_student(model, form, amp, device):
    """A network called `model` as a function of its parameters. Raises ReportedError where it cannot be one."""
    try:
        return ReparamModule(utils.initial_network(model, form, utils.make_generator(0), device), amp)
    except ValueError as error:
        raise ReportedError(f"--model={model}: {error}") from None


def initial_images(data: Data, ipc, pix_init, canvas_size, generator):
    """Images (ipc * classes, 3, S, S) to start from, S = canvas_size * data.form.im_size, and labels, by class."""
    label_syn = torch.arange(data.form.num_classes).repeat_interleave(ipc)
    if pix_init == "noise":
        side = canvas_size * data.form.im_size
        return torch.randn(len(label_syn), 3, side, side, generator=generator), label_syn
    tiles = [[random_real(data, ipc, generator)[0] for _ in range(canvas_size)] for _ in range(canvas_size)]
    return torch.cat([torch.cat(row, dim=3) for row in tiles], dim=2).cpu(), label_syn


def random_real(data: Data, ipc, generator):
    """`ipc` random training images of each class, and their labels, ordered by class."""
    images, labels = data.train
    chosen = []
    for label, name in enumerate(data.classes):
        members = torch.nonzero(labels.cpu() == label).flatten()
        if ipc > len(members):
            raise ReportedError(f"--ipc={ipc} is more than the {len(members)} training images of {name}: lower it")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:ipc]])
    chosen = torch.cat(chosen).to(images.device)
    return images[chosen], labels[chosen]


def random_real_sets(data: Data, ipc, count, seed):
    """The baseline: so many draws of `random_real`, which follow from the seed."""
    return [random_real(data, ipc, utils.make_generator("random real", seed, k)) for k in range(count)]


def cut_windows(x, y, samples, side, generator):
    """Texture mode: `samples` random windows, `side` pixels wide, of each canvas (B, 3, H, W), which wraps around, and
    their labels.
    """
    offsets = torch.randint(x.shape[2], (2, samples * len(x), 1), generator=generator)
    rows, cols = ((torch.arange(side) + offsets) % x.shape[2]).to(x.device)
    return utils.window(x.repeat(samples, 1, 1, 1), rows, cols), y.repeat(samples)


def make_prepare(augment, samples=0, side=None):
    """`prepare(x, y, generator)` for synthetic batches: cut `samples` windows, `side` pixels wide (0: no texture mode),
    then augment.
    """

    def prepare(x, y, generator):
        if samples:
            x, y = cut_windows(x, y, samples, side, generator)
        return augment(x, y, generator) if augment else (x, y)

    return prepare


def check_batch_syn(batch_syn, num_images):
    """--batch_syn, all of the synthetic images where it is None. Raises ReportedError where it is more than these."""
    if (batch_syn or 0) > num_images:
        raise ReportedError(f"--batch_syn={batch_syn} is more than the {num_images} synthetic images: lower it, or "
                            "raise --ipc")
    return batch_syn or num_images


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
# Main


def run_settings(flags):
    """The flags, a dictionary, that a result depends on: all but paths, names, where it runs, and what has no effect.

    What the digests of data and experts tell is left out, too.
    """
    left_out = [*NO_RESULT, "data_path", "buffer_path", "checkpoint_every", "device", "load_all", "skip_damaged",
                "force_save", "im_size"]
    left_out += ["dsa_strategy"] * (not flags["dsa"]) + ["canvas_size", "canvas_samples"] * (not flags["texture"])
    return {key: value for key, value in flags.items() if key not in left_out and not key.startswith("wandb")}


def as_flags(flags):
    """The flags, a dictionary, as they are written in a shell; paths absolute; without those that name the folder."""
    written = {key: value.resolve() if isinstance(value, Path) else value for key, value in flags.items()
               if key not in (*NO_RESULT, "compile") and value is not None}
    return [*(f"--{key}={value}" for key, value in written.items()), f"--{'' if flags['compile'] else 'no-'}compile"]


def run_folder(parent, name, settings):
    """The run's folder below `parent`, `name` or after the settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    zca = "_zca" if settings["zca"] else ""
    return parent / (name or f"{settings['model']}_ipc{settings['ipc']}{zca}_seed{settings['seed']}_{digest}")


def read_run(folder):
    """What `open_run` wrote. Raises FileNotFoundError where nothing is, ReportedError for a damaged file."""
    try:
        run = files.read_json(folder / RUN_FILE, settings=dict, flags=list, wandb_id=str)
        if any(not isinstance(flag, str) or flag.lstrip("-").split("=")[0] in NO_RESULT for flag in run["flags"]):
            raise ValueError("its flags are none that a run writes there")
        return run
    except ValueError as error:
        raise ReportedError(f"{folder / RUN_FILE} is damaged ({error}): use another --run_name, or remove the folder"
                            ) from None


def open_run(folder, settings, flags):
    """Begin a run in `folder`, or go on with it: its id for wandb. Raises ReportedError where its settings differ."""
    try:
        run = read_run(folder)
    except FileNotFoundError:
        run = {"settings": settings, "flags": flags, "wandb_id": uuid.uuid4().hex[:8]}
        files.write_json(folder / RUN_FILE, run)
    if run["settings"] | {"experts": ""} == settings | {"experts": ""} and run["settings"] != settings:
        raise ReportedError(f"{folder} was begun with other experts: some were added, removed or trained again since. "
                            "Take the same, by another --buffer_path, or begin anew under another --run_name")
    files.check_record(folder, run["settings"], settings, "--run_name")
    return run["wandb_id"]


class State:
    """All that changes in a run, and that a checkpoint keeps.

    image_syn, label_syn  the synthetic images (K, 3, H, W) and their labels (K,)
    syn_lr                α
    random                the generator of all draws but those of evaluations
    losses                of each iteration so far
    evaluations           of the synthetic images
    baselines             evaluations of random real images, at the initial α and at the best one
    seconds               that the run has taken before it was resumed
    """

    def __init__(self, image_syn, label_syn, syn_lr, random, *, lr_img, lr_lr, device):
        self.image_syn = image_syn.to(device).requires_grad_(True)
        self.label_syn = label_syn.to(device)
        self.syn_lr = torch.tensor(syn_lr, device=device, requires_grad=True)
        self.random = random
        self.optimizer_img = torch.optim.SGD([self.image_syn], lr=lr_img, momentum=0.5)
        self.optimizer_lr = torch.optim.SGD([self.syn_lr], lr=lr_lr, momentum=0.5)
        self.losses, self.evaluations, self.baselines = [], Evaluations(), []
        self.seconds, self.start, self.finished = 0.0, time.time(), False

    def elapsed(self):
        return self.seconds + time.time() - self.start

    def step(self, loss, grad_image, grad_lr):
        """Move images and α along their gradients, and take the loss that these belong to."""
        self.image_syn.grad, self.syn_lr.grad = grad_image, grad_lr
        self.optimizer_img.step()
        self.optimizer_lr.step()
        self.losses.append(loss.item())

    def save(self, path):
        content = {
            "images": self.image_syn.detach(), "labels": self.label_syn, "syn_lr": self.syn_lr.detach(),
            "optimizer_img": self.optimizer_img.state_dict(), "optimizer_lr": self.optimizer_lr.state_dict(),
            "random": self.random.get_state(), "losses": self.losses, "evaluations": plain(self.evaluations.rows),
            "baselines": plain(self.baselines), "seconds": self.elapsed(), "finished": self.finished}
        files.write_whole(path, lambda file: torch.save(content, file))

    @torch.no_grad()
    def load(self, path):
        """Go back to what `save` wrote, if it did. Raises ReportedError for a damaged file."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            self.image_syn.copy_(content["images"])
            self.label_syn.copy_(content["labels"])
            self.syn_lr.copy_(content["syn_lr"])
            self.optimizer_img.load_state_dict(content["optimizer_img"])
            self.optimizer_lr.load_state_dict(content["optimizer_lr"])
            self.random.set_state(content["random"])
            self.losses, self.seconds, self.finished = (content[key] for key in ("losses", "seconds", "finished"))
            self.evaluations, self.baselines = Evaluations(scored(content["evaluations"])), scored(content["baselines"])
        except FileNotFoundError:
            pass
        except Exception as error:  # a foreign or damaged file raises whatever its bytes happen to trigger
            raise ReportedError(f"{path} is damaged ({files.first_line(error)}): remove it, and the run begins anew"
                                ) from None


def save_synthetic(folder, tags, image_syn, label_syn, syn_lr, data: Data):
    """Write images, labels and α as bare tensors: images_{tag}.pt and labels_{tag}.pt are what MTT's tools read."""
    tensors = {"images": image_syn, "labels": label_syn, "syn_lr": syn_lr}
    if data.zca:
        tensors["images_zca"] = data.to_pixels(image_syn)
    for name, tensor in tensors.items():
        bare = tensor.detach().cpu().clone()
        for tag in tags:
            files.write_whole(folder / f"{name}_{tag}.pt", lambda file, bare=bare: torch.save(bare, file))


def load_set(path, form):
    """Synthetic images, labels, and α (None where it is not saved) from a run's folder or an images_*.pt.

    Beside the latter, labels_*.pt must be. MTT's files are read, too.
    Raises ReportedError where they are not there, or something else, or not of this `datasets.Form`.
    """
    path = path / "images_best.pt" if path.is_dir() else path
    tensors = []
    for name in ("images", "labels", "syn_lr"):
        file = path.with_name(path.name.replace("images", name, 1))
        try:
            tensors.append(torch.load(file, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            if name != "syn_lr":
                raise ReportedError(f"--evaluate={path}: {file} is not there; name a run's folder, or an images_*.pt "
                                    "with labels_*.pt beside it, or random or full") from None
            tensors.append(None)
        except Exception as error:  # a foreign or damaged file raises whatever its bytes happen to trigger
            raise ReportedError(f"--evaluate: {file} cannot be read ({files.first_line(error)})") from None
    images, labels, syn_lr = tensors
    num_classes, im_size = form
    if not (syn_lr is None or (isinstance(syn_lr, torch.Tensor) and syn_lr.numel() == 1 and 0 < syn_lr < math.inf)):
        raise ReportedError(f"--evaluate: the syn_lr_*.pt beside {path} holds no step size, a positive number")
    if not (all(isinstance(part, torch.Tensor) for part in (images, labels)) and images.dim() == 4 and len(images)
            and images.dtype == torch.float32 and images.isfinite().all() and labels.shape == images.shape[:1]
            and labels.dtype == torch.int64 and 0 <= labels.min() <= labels.max() < num_classes
            and images.shape[1] == 3 and images.shape[2] == images.shape[3] >= im_size):
        raise ReportedError(f"--evaluate: {path} holds no synthetic images of these classes: (N, 3, {im_size}, "
                            f"{im_size}) float32, finite, and labels (N,) int64 from 0 to {num_classes - 1}")
    return images, labels, syn_lr


def export_set(folder, images, labels, syn_lr, data: Data):
    """Write a synthetic set for other tools: class folders of PNGs, and a dictionary as DD-Ranking takes it.

    The PNGs show it to the eye, clipped, each scaled to its own range; dd_ranking.pt has what networks learn from.
    """
    if (folder / "images").exists():
        raise ReportedError(f"--export={folder}: there are images already: remove them, or name another folder")
    pixels = report.clip(data.to_pixels(images))
    for label, name in enumerate(data.classes):
        for number, image in enumerate(pixels[labels == label]):
            report.save_picture(folder / "images" / name, f"{number:04d}.png", report.draw_image(image))
    content = {"image_tensor": images, "hard_labels": labels, "syn_lr": syn_lr}
    files.write_whole(folder / "dd_ranking.pt", lambda file: torch.save(content, file))


def check_finite(where, syn_lr, **values):
    """Raise ReportedError, naming `where`, for the first of `values` that is not finite, or for α not positive."""
    fault = next((f"{name} is not finite" for name, value in values.items() if not value.isfinite().all()), None)
    if fault or not 0 < syn_lr < math.inf:
        raise ReportedError(f"diverged at {where}: {fault or 'α is not positive'}, α = {syn_lr.item():.4g}. Lower "
                            "--lr_lr, --lr_img, --lr_teacher or --syn_steps; the checkpoint before it is kept")


def save_results(folder, settings, data: Data, experts: Experts, state: State):
    """Write results.json: settings, versions, every evaluation's accuracies, and what they are compared with."""
    results = {
        "settings": settings,
        "data": data.settings,
        "experts": len(experts.members),
        "versions": utils.versions(),
        "threads": torch.get_num_threads(),
        "best_iteration": state.evaluations.best["iteration"],
        "evaluations": plain(state.evaluations.rows),
        "random_real": plain(state.baselines),
        "experts_test_accuracy": experts.test_accuracies,
    }
    files.write_json(folder / "results.json", results)


def summary(data: Data, experts: Experts, state: State, folder):
    """The closing table: what networks reach on random real images, on the distilled ones, on all training images."""
    best, num_images = state.evaluations.best, len(state.label_syn)
    rows = [("trained on", "α", "network", f"{'validation':^16}   {'test':^16}")]
    for kind, evaluation in [*(("random real", baseline) for baseline in state.baselines), ("distilled", best)]:
        rows += [(f"{num_images} {kind} images", f"{evaluation['syn_lr']:.5f}", network, scores)
                 for network, scores in evaluation["scores"].items()]
    if experts.test_accuracies:
        rows.append((f"all {len(data.train[1])} training images", "", "(experts)", Scores([], experts.test_accuracies)))
    table = "\n".join(f"{images:27} {alpha:>8}   {network:12} {scores}" for images, alpha, network, scores in rows)
    return (f"\nBest iteration: {best['iteration']}\n{table}\n"
            f"Files: {folder} (images_best.pt, curves.png, animation.gif, results.json, ...)")


def save_evaluation(folder, it, state: State, data: Data, title, *, tensors, pictures):
    """Write the picture of an evaluation and, if `tensors`, the images themselves: what wandb logs of them."""
    images = state.image_syn.detach().cpu()
    picture = report.draw_grid(report.clip(data.to_pixels(images)), state.label_syn, title, data.classes)
    report.save_picture(folder, f"grid_{it:06d}.png", picture)
    if not tensors:
        return {}
    tags = [it, "best"] if state.evaluations.best is state.evaluations.rows[-1] else [it]
    save_synthetic(folder, tags, images, state.label_syn, state.syn_lr, data)
    return report.picture_log(images, state.label_syn, data, title, pictures)


def evaluate_saved(args):
    """What --evaluate does, instead of `main`: a table, and the same with all single accuracies in evaluation.json."""
    device = utils.check_device(args.device)
    args.amp = utils.check_amp(args.amp, device)
    form = datasets.form_of(args.dataset, args.data_path, args.im_size)
    runner = utils.Runner(args.compile, args.amp)
    pool = make_pool(args.eval_mode, args.model, form, runner, device)
    saved = None if args.evaluate in ("random", "full") else load_set(utils.expanded_path(args.evaluate), form)
    data = datasets.load_data(args.dataset, args.data_path, args.zca, args.val_fraction, device, args.im_size)
    augment, alpha = utils.make_augment(args.dsa, args.dsa_strategy), args.lr_teacher
    prepare = augment
    if args.evaluate == "full":
        name, sets = "full", [data.train] * args.num_eval
    elif args.evaluate == "random":
        name = f"random_ipc{args.ipc}"
        sets = random_real_sets(data, args.ipc, args.num_eval, args.seed)
    else:
        images, labels, syn_lr = saved
        folder, name = saved_folder(args.evaluate), Path(args.evaluate).resolve().stem
        check_saved(folder, data, args.texture)
        if images.shape[2] != form.im_size and not args.texture:
            raise ReportedError(f"--evaluate: the images of {args.evaluate} have {images.shape[2]} pixels a side, not "
                                f"{form.im_size}: canvases need --texture")
        if syn_lr is None and not args.alpha_given:
            raise ReportedError(f"{folder} holds no α (syn_lr_*.pt): give --lr_teacher, the step size to train with")
        alpha = args.lr_teacher if syn_lr is None or args.alpha_given else float(syn_lr)
        if args.export:
            export_set(args.export, images, labels, alpha, data)
            print(f"{len(images)} images exported to {args.export}")
            return
        sets = [(images.to(device), labels.to(device))] * args.num_eval
        prepare = make_prepare(augment, args.canvas_samples if args.texture else 0, form.im_size)

    scores = evaluate_pool(pool, sets, alpha, data=data, runner=runner, prepare=prepare, key=(args.seed, "saved"),
                           epochs=args.epoch_eval_train, batch_train=args.batch_train, batch_real=args.batch_real)
    title = {"full": "training images", "random": "random real images"}.get(args.evaluate, f"images of {args.evaluate}")
    print(f"{len(sets[0][0])} {title}; networks: {args.num_eval}, epochs: {args.epoch_eval_train}, α = {alpha:.5f}\n")
    print(scores_table(scores, data.classes))
    settings = run_settings(vars(args)) | {"data": data.settings["digest"], "evaluate": args.evaluate, "syn_lr": alpha}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    path = args.log_dir / args.dataset / (args.run_name or f"evaluate_{name}_{digest}") / "evaluation.json"
    rows = plain([{"evaluated": args.evaluate, "images": len(sets[0][0]), "syn_lr": alpha, "scores": scores}])
    files.write_json(path, rows[0] | {"settings": settings, "data": data.settings, "versions": utils.versions()})
    print(f"\nFiles: {path}")


def check_saved(folder, data: Data, texture):
    """Raise ReportedError where a run's images were made for other data than these; MTT's sets record nothing."""
    try:
        settings = read_run(folder)["settings"]
    except FileNotFoundError:
        return
    now = {"dataset": data.settings["dataset"], "zca": data.settings["zca"], "data": data.settings["digest"],
           "val_fraction": data.settings["val_fraction"], "texture": texture}
    files.check_record(folder, settings, now, "set")


def distill(state: State, path, run, evaluate_random_real, evaluate_synthetic, update, *, iterations, eval_it,
            checkpoint_every):
    """From what `state` has reached to the end. A checkpoint goes to `path` as often as asked for, and on a signal.

    `update(it)` and `evaluate_synthetic(it)` change the state, and return what wandb's `run` logs of it;
    `evaluate_random_real(alpha)` adds a baseline.
    """
    with stop:
        try:
            if state.seconds:
                print(f"going on at iteration {len(state.losses)}; to begin anew, remove {path.parent}")
            print(Evaluations.header, flush=True)
            if not state.baselines:
                evaluate_random_real(state.syn_lr.item())
            with utils.progress(total=iterations, initial=len(state.losses), desc="distilling",
                                unit="iterations") as bar:
                for it in range(len(state.losses), iterations + 1):
                    stop.check()
                    log = {"Progress": it, "Synthetic_LR": state.syn_lr.item()}
                    due = (it % eval_it == 0 or it == iterations) and not state.evaluations.has(it)
                    if due:
                        log |= evaluate_synthetic(it)
                    run.log(log, step=it)
                    if due or it % checkpoint_every == 0:
                        state.save(path)
                    if it < iterations:
                        run.log(update(it), step=it)
                        bar.set_postfix(loss=f"{state.losses[-1]:.4f}", α=f"{state.syn_lr.item():.5f}",
                                        best=f"{mean_choice(state.evaluations.best['scores']):.1%}", refresh=False)
                        bar.update()
            best = state.evaluations.best
            if best["iteration"] and len(state.baselines) == 1:  # what of the gain is due to the learned α
                evaluate_random_real(best["syn_lr"])
        except Stopped as stopped:
            state.save(path)
            run.finish()
            saved = f"iteration {len(state.losses)} is saved: the same command goes on from there"
            raise Stopped(stopped.args[0], saved) from None


def main():
    args = parse_args()
    if args.evaluate:
        return evaluate_saved(args)
    device = utils.check_device(args.device)
    form = datasets.form_of(args.dataset, args.data_path, args.im_size)
    args.batch_syn = check_batch_syn(args.batch_syn, args.ipc * form.num_classes)
    flags = as_flags(vars(args))  # as they were given
    args.amp = utils.check_amp(args.amp, device)

    student = make_student(args.model, form, args.amp, device)  # names are refused before loading
    runner = utils.Runner(args.compile, args.amp)
    pool = make_pool(args.eval_mode, args.model, form, runner, device)
    experts = load_experts(expert_folder(args.buffer_path, args.dataset, args.zca, args.model), student.shapes,
                           args.max_files, args.max_experts, args.skip_damaged)
    experts.check_epochs(args.max_start_epoch, args.expert_epochs)
    experts.check_settings({"val_fraction": args.val_fraction})  # before whitening another split for minutes
    experts = experts.check_segments(args.max_start_epoch, args.expert_epochs, args.skip_damaged)
    data = datasets.load_data(args.dataset, args.data_path, args.zca, args.val_fraction, device, args.im_size)
    experts.check_settings(data.settings | {"model": args.model})
    settings = run_settings(vars(args)) | {"data": data.settings["digest"], "experts": experts.digest()}
    folder = args.resume.resolve() if args.resume else run_folder(args.log_dir / args.dataset, args.run_name, settings)
    if args.load_all:
        experts = experts.on_device(args.max_start_epoch + args.expert_epochs, device)

    random = utils.make_generator("distillation", args.seed)
    windows, canvas_size = (args.canvas_samples, args.canvas_size) if args.texture else (0, 1)
    state = State(*initial_images(data, args.ipc, args.pix_init, canvas_size, random), args.lr_teacher, random,
                  lr_img=args.lr_img, lr_lr=args.lr_lr, device=device)
    real_sets = random_real_sets(data, args.ipc, args.num_eval, args.seed)

    augment = utils.make_augment(args.dsa, args.dsa_strategy)
    prepare = make_prepare(augment if args.dsa and not args.no_aug else None, windows, form.im_size)
    prepare_eval = make_prepare(augment, windows, form.im_size)
    unroll = UNROLLS[args.unroll](student, runner.function)
    evaluated = partial(evaluate_pool, pool, data=data, runner=runner, epochs=args.epoch_eval_train,
                        batch_train=args.batch_train, batch_real=args.batch_real)

    def evaluate_random_real(alpha):
        scores = evaluated(real_sets, alpha, prepare=augment, key=(args.seed, "random real"))
        state.baselines.append({"syn_lr": alpha, "scores": scores})

    def evaluate_synthetic(it):
        """Evaluate, save, print: what wandb logs of it."""
        sets, alpha = [(state.image_syn.detach().clone(), state.label_syn)] * args.num_eval, state.syn_lr.item()
        scores = evaluated(sets, alpha, prepare=prepare_eval, key=(args.seed, it))
        is_best = state.evaluations.add(it, scores, alpha, state.losses, state.elapsed())
        tqdm.write(state.evaluations.table())
        save_results(folder, settings, data, experts, state)
        run_title = f"{args.dataset}, {args.model}, images per class: {args.ipc}, seed {args.seed}"
        report.save_curves(folder, run_title, state.losses, state.evaluations.rows, state.baselines)
        return state.evaluations.log() | save_evaluation(
            folder, it, state, data, f"{args.dataset}, {args.model}, iteration {it}",
            tensors=is_best or it % 1000 == 0 or it == args.Iteration, pictures=args.ipc < 50 or args.force_save)

    def update(it):
        """An iteration of distillation: what wandb logs of it."""
        begin = time.perf_counter()
        expert = int(torch.randint(len(experts.members), (1,), generator=random))
        start_epoch = int(torch.randint(args.max_start_epoch, (1,), generator=random))
        batches = synthetic_batches(state.image_syn, state.label_syn, args.syn_steps, args.batch_syn, prepare, random)
        segment = experts.segment(expert, start_epoch, args.expert_epochs, device)
        loss, *gradients = unroll(*segment, state.image_syn, state.syn_lr, batches)
        where = f"iteration {it} ({experts.members[expert].name}, start epoch {start_epoch}, matching loss {loss:.4g})"
        check_finite(where, state.syn_lr, loss=loss, **dict(zip(("∂L/∂images", "∂L/∂α"), gradients)))
        state.step(loss, *gradients)
        check_finite(where, state.syn_lr, images=state.image_syn)
        return {"Grand_Loss": state.losses[-1], "Start_Epoch": start_epoch, "Seconds": time.perf_counter() - begin}

    with files.locked(folder, wait=False) as mine:
        if not mine:
            raise ReportedError(f"another process is at work on the run in {folder}: use another --run_name")
        run_id = open_run(folder, settings, flags)
        state.load(folder / CHECKPOINT)
        if not state.finished:
            config = settings | {"device": str(device)} | utils.versions()
            run = report.Dashboard(folder, folder.name, config, "Progress", mode=args.wandb_mode,
                                   project=args.wandb_project, entity=args.wandb_entity, run_id=run_id)
            print(f"synthetic images: {len(state.label_syn)}, experts: {len(experts.members)}; results in {folder}")
            print(run.place("the pictures and results.json show the same"))
            distill(state, folder / CHECKPOINT, run, evaluate_random_real, evaluate_synthetic, update,
                    iterations=args.Iteration, eval_it=args.eval_it, checkpoint_every=args.checkpoint_every)
            save_results(folder, settings, data, experts, state)
            report.save_animation(folder)
            run.finish(**state.evaluations.summary(state.elapsed(), device))
            state.finished = True
            state.save(folder / CHECKPOINT)
        else:
            print(f"finished before, at iteration {len(state.losses)}; to run it anew, remove {folder}")
        print(summary(data, experts, state, folder), flush=True)


if __name__ == "__main__":
    utils.run_script(main, less_memory="lower --ipc, --batch_syn, --batch_train, --num_eval or --im_size, leave "
                                       "out --zca, or use --amp or --unroll=adjoint")
