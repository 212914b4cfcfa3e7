"""The sets of images that --evaluate names: real ones, chosen in several ways, and saved ones."""

import hashlib
import json
import math
from functools import partial
from pathlib import Path

import torch

import datasets
import evaluation
import files
import process
import report
import trajectories
import utils
from compilation import Compiler
from experts import load_experts
from preprocessing import initial_images, members_of, real_tiles
from process import ReportedError
from ranks import join, local_device
from saved_sets import check_set, expanded, export_set, load_set, saved_folder
from scores import to_json

# --------------------------------------------------------------------------------------------------
# Real images


def random_real_sets(data, ipc, count, seed, factor=1):
    """`count` draws of `real_tiles`: images (count, N, 3, H, H) and labels (count, n)."""
    generators = (utils.make_generator("random real", seed, k) for k in range(count))
    draws = (real_tiles(data, ipc, factor, generator) for generator in generators)
    return tuple(torch.stack(parts) for parts in zip(*draws))


def evaluate_real(evaluator, real_sets, syn_lr, seed):
    """Evaluate `random_real_sets`, with which a distilled set is compared."""
    scores = evaluation.of_real_images(evaluator)(*real_sets, syn_lr, (seed, "random real"))
    return {"syn_lr": syn_lr, "epochs": evaluator.epochs, "scores": scores}


def herding(features, count):
    """Rows of `features` (N, D) whose mean is close to the mean of all, chosen one by one.

    Herding (Welling 2009) as used for data sets (Rebuffi et al. 2017, iCaRL, algorithm 4).
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    chosen = []
    for size in range(1, count + 1):
        distances = ((total + features) / size - mean).square().sum(1)
        distances[chosen] = math.inf
        chosen.append(int(distances.argmin()))
        total += features[chosen[-1]]
    return chosen


def k_center(features, count):
    """Rows of `features` (N, D) that leave no other row far from all of them, chosen one by one.

    Greedy k-centre (Sener & Savarese 2018, algorithm 1), from the row nearest to the mean.
    """
    chosen = [int((features - features.mean(0)).square().sum(1).argmin())]
    nearest = torch.full_like(features[:, 0], math.inf)  # squared distance to what is chosen
    while len(chosen) < count:
        distances = (features - features[chosen[-1]]).square().sum(1)
        nearest = torch.minimum(nearest, distances)
        chosen.append(int(nearest.argmax()))
    return chosen


CORESETS = {"herding": herding, "k_center": k_center}
REAL_SETS = ("random", *CORESETS, "full")  # of --evaluate


def coreset(data, ipc, choose, features):
    """`ipc` training images per class, chosen by one of CORESETS, and their labels.

    `features` maps images (B, 3, H, H) to the features that they are compared by, (B, D).
    """
    images, labels = data.train
    chosen = []
    for label in range(data.form.num_classes):
        members = members_of(data, label, ipc).to(images.device)
        chosen.append(members[choose(features(images[members]), ipc)])
    chosen = torch.cat(chosen)
    return images[chosen], labels[chosen]


def real_set(args, data, compiler):
    """Images and labels of one of REAL_SETS, as --ipc, --labels and --seed describe it.

    Coresets are chosen by the experts' features. Soft labels are the experts' probabilities.
    """
    what, device = args.evaluate, data.train[0].device
    if what in CORESETS or args.labels == "soft":
        student = evaluation.make_student(args.model, data.form, compiler.amp, device)
        folder = trajectories.expert_folder(args.buffer_path, args.dataset, args.zca, args.model)
        experts = load_experts(
            folder, student.shapes, args.max_files, args.max_experts, args.skip_damaged
        )
        experts.check_settings(data.settings | {"model": args.model})
        experts.check_label_epoch(args.label_epoch)
    if what == "full":
        images, labels = data.train
    elif what == "random":
        images, labels = random_real_sets(data, args.ipc, args.num_eval, args.seed, args.factor)
    else:
        features = partial(experts.features, student)
        images, labels = coreset(data, args.ipc, CORESETS[what], features)
    if args.labels == "soft":
        seen = utils.decode(images.flatten(0, -4), args.factor)
        logits = experts.logits(student, seen, args.label_epoch)
        labels = logits.softmax(1).unflatten(0, labels.shape)
    return images, labels


# --------------------------------------------------------------------------------------------------
# Saved images


def is_saved(what):
    """Whether --evaluate names a saved set."""
    return what is not None and what not in REAL_SETS


def pix_init(text):
    """A value of --pix_init: "real", "noise", or the path of a saved set."""
    return text if text in ("real", "noise") else expanded(text)


def initial_set(args, data, generator):
    """The initial images (K, 3, S, S) and labels of a run, and what --pix_init stands for.

    Labels of a saved set may be probabilities. Raises ReportedError if it does not fit.
    """
    canvas_size = args.canvas_size if args.texture else 1
    start = args.pix_init
    if not isinstance(start, Path):
        if start == "real" and args.factor > 1:
            images, labels = real_tiles(data, args.ipc, args.factor, generator)
        else:
            images, labels = initial_images(data, args.ipc, start, canvas_size, generator)
            labels = labels.repeat_interleave(args.factor**2)
        return images, labels, start
    images, labels = load_set(start, data.form, args.factor, "--pix_init")
    check_set(start, images, args.texture, data.settings, data.form, "--pix_init")
    shape = (args.ipc * data.form.num_classes, 3, *2 * [canvas_size * data.form.im_size])
    if images.shape != shape:
        raise ReportedError(
            f"--pix_init: {start} holds images {tuple(images.shape)}, not {shape}: change --ipc, "
            "or with --texture --canvas_size"
        )
    if labels.dim() == 2 and args.labels == "hard":
        raise ReportedError(
            f"--pix_init: the labels of {start} are probabilities: add --labels=soft or learned"
        )
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    return images, labels, f"set {digest.hexdigest()[:16]}"


# --------------------------------------------------------------------------------------------------
# What --evaluate does


def evaluate_set(args, settings):
    """Train networks on what --evaluate names, print a table, and write evaluation.json.

    `settings` are the flags that a result depends on.
    """
    device = process.check_device(local_device(args.device))
    ranks = join(device)
    form = datasets.form_of(args.dataset, args.data_path, args.im_size)
    compiler = Compiler(args.compile, process.check_amp(args.amp, device))
    print(process.describe(device, compiler.amp, ranks.size), flush=True)
    pool = evaluation.make_pool(args.eval_mode, args.model, form, compiler, device)
    saved = None
    if is_saved(args.evaluate):
        saved = load_set(args.evaluate, form, args.factor, "--evaluate")
    alpha = args.lr_teacher
    if alpha is None:
        raise ReportedError(
            f"{saved_folder(args.evaluate)} holds no α (syn_lr_*.pt): give --lr_teacher, the step "
            "size to train with"
        )

    def check(settings):
        if saved:
            check_set(args.evaluate, saved[0], args.texture, settings, form, "--evaluate")

    data = datasets.load_data(
        args.dataset, args.data_path, args.zca, args.val_fraction, device, args.im_size, check
    )
    evaluator = evaluation.make_evaluator(args, data, pool, compiler, ranks)
    if saved:
        images, labels = saved
        if args.export:
            if ranks.is_first:
                export_set(args.export, utils.decode(images, args.factor), labels, alpha, data)
            print(f"{len(images)} images exported to {args.export}")
            return
        title = f"images of {args.evaluate}"
    else:
        evaluator = evaluation.of_real_images(evaluator)
        images, labels = real_set(args, data, compiler)
        if args.evaluate != "full" and ranks.size > 1:  # rounding may choose and label otherwise
            images, labels = ranks.from_first((images.cpu(), labels.cpu()))
        title = "training images" if args.evaluate == "full" else f"real images ({args.evaluate})"
        title += ", labelled by the experts" if args.labels == "soft" else ""
    scores = evaluator(images.to(device), labels.to(device), alpha, (args.seed, "saved"))
    settings = settings | {"amp": compiler.amp}
    count = images.shape[-4]
    print(f"{count} {title}; networks: {args.num_eval}, ", end="")
    print(f"epochs: {args.epoch_eval_train}, α = {alpha:.5f}\n")
    print(report.scores_table(scores, data.classes))
    row = {"evaluated": args.evaluate, "images": count, "syn_lr": alpha, "scores": scores}
    if ranks.is_first:
        save_evaluation(args, settings, data, row)


def save_evaluation(args, settings, data, row):
    """Write an evaluation to evaluation.json, in a folder named after it and its settings."""
    settings = settings | {"data": data.settings["digest"], "evaluate": args.evaluate}
    settings["syn_lr"] = settings.pop("lr_teacher")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    chosen = args.evaluate == "random" or args.evaluate in CORESETS
    name = f"{args.evaluate}_ipc{args.ipc}" if chosen else Path(args.evaluate).resolve().stem
    folder = args.log_dir / args.dataset / (args.run_name or f"evaluate_{name}_{digest}")
    (content,) = to_json([row])
    content |= {"settings": settings, "data": data.settings, "versions": process.versions()}
    content["device"] = process.describe(data.train[0].device, settings["amp"])
    files.write_json(folder / "evaluation.json", content)
    print(f"\nFiles: {folder / 'evaluation.json'}")
