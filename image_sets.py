"""The sets of images that --evaluate names: real ones, chosen in several ways, and saved ones."""

import hashlib
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import datasets
import evaluation
import files
import process
import report
import trajectories
import utils
from compilation import Compiler
from preprocessing import Data, initial_images, members_of, random_real
from process import ReportedError, first_line
from scores import to_json

# --------------------------------------------------------------------------------------------------
# Real images


def random_real_sets(data, ipc, count, seed):
    """`count` draws of `random_real`: images (count, N, 3, H, H) and labels (count, N)."""
    generators = (utils.make_generator("random real", seed, k) for k in range(count))
    draws = (random_real(data, ipc, generator) for generator in generators)
    return tuple(torch.stack(parts) for parts in zip(*draws))


def evaluate_real(evaluator, real_sets, syn_lr, seed):
    """An evaluation of `random_real_sets`: what a distilled set is compared with."""
    scores = evaluation.of_real_images(evaluator)(*real_sets, syn_lr, (seed, "random real"))
    return {"syn_lr": syn_lr, "scores": scores}


def herding(features, count):
    """Rows of `features` (N, D) whose mean comes close to the mean of all, chosen one by one.

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
    """`ipc` training images of each class, which one of CORESETS chooses, and their labels.

    `features` is a function from images (B, 3, H, H) to what they are compared by, (B, D).
    """
    images, labels = data.train
    chosen = []
    for label in range(data.form.num_classes):
        members = members_of(data, label, ipc).to(images.device)
        chosen.append(members[choose(features(images[members]), ipc)])
    chosen = torch.cat(chosen)
    return images[chosen], labels[chosen]


def real_set(args, data, compiler):
    """Images and labels of one of REAL_SETS, which --ipc, --labels and --seed describe.

    The experts' features choose coresets, and their probabilities are soft labels.
    """
    what, device = args.evaluate, data.train[0].device
    if what in CORESETS or args.labels == "soft":
        student = evaluation.make_student(args.model, data.form, compiler.amp, device)
        folder = trajectories.expert_folder(args.buffer_path, args.dataset, args.zca, args.model)
        experts = trajectories.load_experts(
            folder, student.shapes, args.max_files, args.max_experts, args.skip_damaged
        )
        experts.check_settings(data.settings | {"model": args.model})
    if what == "full":
        images, labels = data.train
    elif what == "random":
        images, labels = random_real_sets(data, args.ipc, args.num_eval, args.seed)
    else:
        features = partial(experts.features, student)
        images, labels = coreset(data, args.ipc, CORESETS[what], features)
    if args.labels == "soft":
        logits = experts.logits(student, images.flatten(0, -4))
        labels = logits.softmax(1).unflatten(0, labels.shape)
    return images, labels


# --------------------------------------------------------------------------------------------------
# Saved sets


def is_saved(what):
    """Whether --evaluate names a saved set."""
    return what is not None and what not in REAL_SETS


def saved_folder(what):
    """The folder of a saved set, which is named itself, or by one of its files."""
    path = expanded(what)
    return path if path.is_dir() else path.parent


def expanded(what):
    return Path(os.path.expanduser(what))  # pathlib's raises an error for an unknown user


class SavedSet(NamedTuple):
    """What files hold, unchecked; None: there is no such file."""

    images: object
    labels: object
    syn_lr: object


def find_set(what, flag):
    """The `SavedSet` that a path names: a run's folder, or a file of this project or of others.

    They are images_*.pt with labels_*.pt and syn_lr_*.pt (this project, MTT) or lr_*.pt (DATM)
    beside it, dd_ranking.pt (DD-Ranking), and res_*.pt (DC, DM), whose last experiment is taken.
    Raises ReportedError for what cannot be read.
    """
    path = expanded(what)
    if path.is_dir():
        exported = path / "dd_ranking.pt"
        path = path / "images_best.pt"
        path = exported if exported.exists() and not path.exists() else path
    content = read_file(path, flag)
    if isinstance(content, dict) and "image_tensor" in content:
        labels = content.get("soft_labels", content.get("hard_labels"))
        return SavedSet(content["image_tensor"], labels, content.get("syn_lr"))
    if isinstance(content, dict) and is_pair((content.get("data") or [None])[-1]):
        return SavedSet(*content["data"][-1], None)

    def beside(name):
        if "images" not in path.name:
            return None
        return read_file(path.with_name(path.name.replace("images", name, 1)), flag)

    syn_lr = beside("syn_lr")
    return SavedSet(content, beside("labels"), beside("lr") if syn_lr is None else syn_lr)


def is_pair(found):
    return isinstance(found, (list, tuple)) and len(found) == 2


SCALAR = np.float64(0).__reduce__()[0]  # where it is differs between versions of NumPy
NUMPY_SCALARS = [SCALAR, (SCALAR, "numpy.core.multiarray.scalar"), np.dtype]
NUMPY_SCALARS += [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]


def read_file(path, flag):
    """What `torch.save` wrote; None where there is no such file."""
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):  # accuracies, in DC's files
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # a foreign or damaged file raises whatever its bytes trigger
        raise ReportedError(f"{flag}: {path} cannot be read ({first_line(error)})") from None


def saved_step_size(what, flag="--evaluate"):
    """The α of a saved set; None where it is not saved, as by MTT.

    Raises ReportedError where the file holds something else.
    """
    syn_lr = find_set(what, flag).syn_lr
    if syn_lr is None:
        return None
    try:
        alpha = float(syn_lr)
    except (TypeError, ValueError, RuntimeError):
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise ReportedError(
            f"{flag}: what is saved with {what} as α (syn_lr_*.pt) is no step size, a positive "
            f"number, but {description(syn_lr)}"
        )
    return alpha


def load_set(what, form, flag="--evaluate"):
    """Images (N, 3, H, H) float32, and labels, of a saved set: classes, or probabilities.

    Raises ReportedError where they are missing, or do not fit this `datasets.Form`.
    """
    found = find_set(what, flag)
    for name, part in (("images", found.images), ("labels", found.labels)):
        if part is None:
            others = ", ".join(REAL_SETS) if flag == "--evaluate" else "real, noise"
            raise ReportedError(
                f"{flag}={what}: there are no {name}: name a run's folder, a file images_*.pt with "
                f"labels_*.pt beside it, dd_ranking.pt, res_*.pt of DC, or {others}"
            )
    images, labels = as_images(found.images), as_labels(found.labels)
    if not (is_image_set(images, form) and is_label_set(labels, images, form)):
        size, last = form.im_size, form.num_classes - 1
        raise ReportedError(
            f"{flag}: {what} holds no synthetic images of these classes: (N, 3, {size}, {size}) "
            f"float32, finite, and labels (N,) int64 from 0 to {last}, or probabilities (N, "
            f"{last + 1}) float32; found images {description(found.images)} and labels "
            f"{description(found.labels)}"
        )
    return images, labels


def as_images(found):
    """The same in float32, if nothing is lost by it."""
    return as_float32(found) if isinstance(found, torch.Tensor) else found


def as_labels(found):
    """Classes as int64, probabilities as float32, if nothing is lost by it."""
    if not isinstance(found, torch.Tensor):
        return found
    if found.dim() != 1:
        return as_float32(found)
    classes = found.to(torch.int64)
    return classes if torch.equal(classes.to(found.dtype), found) else found


def as_float32(found):
    if not found.is_floating_point():
        return found
    converted = found.detach().float()
    is_same = torch.equal(converted.to(found.dtype).nan_to_num(), found.nan_to_num())
    return converted if is_same else found


def description(found):
    """What a file holds, in a few words."""
    if not isinstance(found, torch.Tensor):
        return f"a {type(found).__name__}"
    kind = str(found.dtype).removeprefix("torch.")
    values = f", {found.min():.4g} to {found.max():.4g}" if found.numel() else ""
    if found.dim() == 2 and found.is_floating_point():
        sums = found.sum(1)
        values += f", rows that sum to {sums.min():.4g} to {sums.max():.4g}"
    return f"{tuple(found.shape)} {kind}{values}"


def pix_init(text):
    """A value of --pix_init: "real", "noise", or the path of a saved set."""
    return text if text in ("real", "noise") else expanded(text)


def initial_set(args, data, generator):
    """Images (K, 3, S, S) and labels that a run starts from, and what --pix_init stands for.

    Labels of a saved set may be probabilities. Raises ReportedError where it does not fit.
    """
    canvas_size = args.canvas_size if args.texture else 1
    start = args.pix_init
    if not isinstance(start, Path):
        images, labels = initial_images(data, args.ipc, start, canvas_size, generator)
        return images, labels, start
    images, labels = load_set(start, data.form, "--pix_init")
    check_set(start, images, args.texture, data.settings, data.form, "--pix_init")
    classes = labels if labels.dim() == 1 else labels.argmax(1)
    shape = (args.ipc * data.form.num_classes, 3, *2 * [canvas_size * data.form.im_size])
    if images.shape != shape:
        raise ReportedError(
            f"--pix_init: {start} holds images {tuple(images.shape)}, not {shape}: change --ipc, "
            "or with --texture --canvas_size"
        )
    if labels is not classes and args.labels == "hard":
        raise ReportedError(
            f"--pix_init: the labels of {start} are probabilities: add --labels=soft or learned"
        )
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    return images, labels, f"set {digest.hexdigest()[:16]}"


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


def check_set(what, images, texture, settings, form, flag="--evaluate"):
    """Raise ReportedError where images were made for other data, or need --texture.

    `settings` are those of the data, and `form` their `datasets.Form`.
    """
    folder = saved_folder(what)
    if record := files.read_run(folder):  # MTT's sets have none
        now = {key: settings[key] for key in ("dataset", "zca", "val_fraction")}
        now |= {"data": settings["digest"], "texture": texture}
        files.check_record(folder, record.settings, now, "set")
    if images.shape[2] != form.im_size and not texture:
        raise ReportedError(
            f"{flag}: the images of {what} have {images.shape[2]} pixels a side, not "
            f"{form.im_size}: canvases need --texture"
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


# --------------------------------------------------------------------------------------------------
# What --evaluate does


def evaluate_set(args, settings):
    """Train networks on what --evaluate names: print a table, write all to evaluation.json.

    `settings` are the flags that a result depends on.
    """
    device = process.check_device(args.device)
    form = datasets.form_of(args.dataset, args.data_path, args.im_size)
    compiler = Compiler(args.compile, process.check_amp(args.amp, device))
    print(process.describe(device, compiler.amp), flush=True)
    pool = evaluation.make_pool(args.eval_mode, args.model, form, compiler, device)
    saved = load_set(args.evaluate, form) if is_saved(args.evaluate) else None
    alpha = args.lr_teacher
    if alpha is None:
        raise ReportedError(
            f"{saved_folder(args.evaluate)} holds no α (syn_lr_*.pt): give --lr_teacher, the step "
            "size to train with"
        )

    def check(settings):
        if saved:
            check_set(args.evaluate, saved[0], args.texture, settings, form)

    data = datasets.load_data(
        args.dataset, args.data_path, args.zca, args.val_fraction, device, args.im_size, check
    )
    evaluator = evaluation.make_evaluator(args, data, pool, compiler)
    if saved:
        images, labels = saved
        if args.export:
            export_set(args.export, images, labels, alpha, data)
            print(f"{len(images)} images exported to {args.export}")
            return
        title = f"images of {args.evaluate}"
    else:
        evaluator = evaluation.of_real_images(evaluator)
        images, labels = real_set(args, data, compiler)
        title = "training images" if args.evaluate == "full" else f"real images ({args.evaluate})"
        title += ", labelled by the experts" if args.labels == "soft" else ""
    scores = evaluator(images.to(device), labels.to(device), alpha, (args.seed, "saved"))
    settings = settings | {"amp": compiler.amp}
    count = images.shape[-4]
    print(f"{count} {title}; networks: {args.num_eval}, ", end="")
    print(f"epochs: {args.epoch_eval_train}, α = {alpha:.5f}\n")
    print(report.scores_table(scores, data.classes))
    row = {"evaluated": args.evaluate, "images": count, "syn_lr": alpha, "scores": scores}
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
