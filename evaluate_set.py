"""The command --evaluate: networks trained on real images or on a saved set; tasks and exports."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import evaluation
import training
import trajectories
import utils
from cli.flags import selection_of
from datasets import by_name
from datasets.coresets import CORESETS, coreset
from datasets.preprocessing import Layout, check_factor
from datasets.saved_sets import check_set, is_saved, load_set
from datasets.set_files import saved_folder
from run import report
from run.export import check_free, export_set, exported_record
from run.rules import LABELS
from run.scores import to_json
from system import files, machine, process
from system.process import ReportedError
from trajectories import Experts, load_experts
from uses import TASKS
from uses.study import Study, TrainingSet

NO_EXPERTS = Experts([])

# --------------------------------------------------------------------------------------------------
# Real images


def real_set(args, data, student, experts):
    """Images and labels of one of REAL_SETS, as --ipc, --factor, --labels and --seed describe it.

    Coresets are chosen by the experts' features. Soft labels are the experts' probabilities.
    """
    what = args.evaluate
    if what == "full":
        images, labels = data.train
    elif what == "random":
        layout = Layout(args.ipc, args.factor)
        images, labels = evaluation.random_real_sets(data, layout, args.num_eval, args.seed)
    else:
        features = partial(experts.features, student)
        images, labels = coreset(data, args.ipc, CORESETS[what], features)
    if LABELS[args.labels].soft:
        tiles = images if what == "full" else utils.decode(images.flatten(0, -4), args.factor)
        labels = experts.labels(student, tiles, args.label_epoch).unflatten(0, labels.shape)
    return images, labels


def matching_experts(args, data, student, label_epoch=None):
    """The experts of this network on these data, with labels of their epoch `label_epoch`."""
    folder = trajectories.expert_folder(args.buffer_path, args.dataset, args.zca, args.model)
    experts = load_experts(
        folder, student.shapes, args.max_files, args.max_experts, args.skip_damaged
    )
    experts.check_settings(data.settings | {"model": args.model})
    experts.check_label_epoch(label_epoch)
    return experts


# --------------------------------------------------------------------------------------------------
# The command


def main(args, settings):
    """Train networks on what --evaluate names, print a table, and write evaluation.json.

    `settings` are the flags that a result depends on.
    """
    place = machine.set_up(args.device, args.compile, args.amp)
    print(place, flush=True)
    if args.export:
        check_free(args.export)
        files.check_writable(args.export)
    selection = selection_of(args)
    form = selection.form
    check_factor(args.factor, form)
    pool = evaluation.make_pool(args.eval_mode, args.model, form, place)
    saved = None
    if is_saved(args.evaluate):
        saved = load_set(args.evaluate, form, args.factor, "--evaluate")
        if not args.export:
            check_alpha(args)
    raw = by_name.read_dataset(selection)
    if saved:
        check_set(args.evaluate, saved.images, args.texture, raw.settings, form, "--evaluate")
    data = raw.preprocessed(place.device)
    if args.export:
        if place.ranks.is_first:
            view = report.view_of(data, args.show_bands)
            record = exported_record(args, data)
            export_set(args.export, saved, args.lr_teacher, data, view, record)
        return
    evaluator = evaluation.make_evaluator(args, data, pool, place)
    if saved:
        saved = saved.to(place.device)
    if args.task:
        run_task(args, settings, study_of(args, saved, evaluator, place))
    elif saved:
        subject = Subject(f"images of {args.evaluate}", saved.images, saved.labels, saved.targets)
        evaluate(args, settings, subject, evaluator, place)
    else:
        evaluator = evaluation.of_real_images(evaluator)
        evaluate(args, settings, real_subject(args, data, place), evaluator, place)


def check_alpha(args):
    """Raise ReportedError if networks cannot train on a saved set for lack of an α."""
    chooses_alpha = args.search_alpha or (args.task and TASKS[args.task].needs_validation)
    if args.lr_teacher is None and not chooses_alpha:
        raise ReportedError(
            f"{saved_folder(args.evaluate)} holds no α (syn_lr_*.pt): give --lr_teacher, the step "
            "size to train with, or --search_alpha"
        )


class Subject(NamedTuple):
    """A set that is evaluated: images (N, C, H, H), or (num_eval, N, C, H, H) of random ones."""

    title: str
    images: torch.Tensor
    labels: torch.Tensor  # classes, or probabilities, of the images or their tiles
    targets: torch.Tensor | None = None  # of kernel machines
    experts: Experts = NO_EXPERTS  # that chose the images, or labelled them


def real_subject(args, data, place):
    """The `Subject` of one of REAL_SETS, the same on all ranks."""
    student, experts = None, NO_EXPERTS
    if args.evaluate in CORESETS or LABELS[args.labels].soft:
        student = training.make_student(args.model, data.form, place.amp, data.device)
        experts = matching_experts(args, data, student, args.label_epoch)
    images, labels = real_set(args, data, student, experts)
    if args.evaluate != "full" and place.ranks.size > 1:  # rounding may choose otherwise
        chosen = place.ranks.from_first((images.cpu(), labels.cpu()))
        images, labels = (part.to(place.device) for part in chosen)
    title = "training images" if args.evaluate == "full" else f"real images ({args.evaluate})"
    if LABELS[args.labels].soft:
        title += ", labelled by the experts"
    return Subject(title, images, labels, experts=experts)


def evaluate(args, settings, subject, evaluator, place):
    """Train and test networks on a `Subject`, print the table, and write evaluation.json."""
    key, pool = (args.seed, "saved"), evaluator.pool
    title, images, labels, targets, experts = subject
    settings = settings | inputs_of(evaluator.data, experts, place)
    evaluator.check_count(images)
    files.check_writable(evaluation_folder(args, settings))  # before minutes of training
    if args.search_alpha:
        alphas = evaluation.search_alphas(evaluator, images, labels, key)
        shown = ", ".join(f"α = {value:g} ({name})" for name, value in alphas.items())
    else:
        alphas, shown = dict.fromkeys(pool, args.lr_teacher), f"α = {args.lr_teacher:.5f}"
    scores = {}
    for name in pool:
        single = evaluator.of_network(name)
        scores |= single(images, labels, alphas.get(name), key, targets)

    count = images.shape[-4]
    how = f"networks: {args.num_eval}, epochs: {args.epoch_eval_train}, {shown}"
    print(f"{count} {title}; {how}\n")
    print(report.scores_table(scores, evaluator.data.classes))
    if place.ranks.is_first:
        row = {"evaluated": args.evaluate, "images": count, "scores": scores}
        row["syn_lr"] = alphas if args.search_alpha else args.lr_teacher
        (content,) = to_json([row])
        path = write_evaluation(args, settings, content, evaluator.data, place)
        print(f"\nFiles: {path}")


def inputs_of(data, experts, place):
    """Settings that an evaluation depends on besides the flags: the machine and the inputs."""
    inputs = {"amp": place.amp, "data": data.settings["digest"]}
    if experts.members:
        inputs["experts"] = experts.digest()
    return inputs


def write_evaluation(args, settings, content, data, place):
    """Write a JSON file of `content` and all that it depends on; returns its path.

    It is named after the task, or evaluation.json without one.
    """
    content |= {"settings": settings, "data": data.settings, "device": str(place)}
    content |= {"versions": process.versions()}
    path = evaluation_folder(args, settings) / f"{args.task or 'evaluation'}.json"
    files.write_json(path, content)
    return path


def evaluation_folder(args, settings):
    """The folder of an evaluation, named after it and its settings."""
    known = settings | {"evaluate": args.evaluate, "lr_teacher": args.lr_teacher}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:6]
    has_ipc = args.evaluate == "random" or args.evaluate in CORESETS
    name = f"{args.evaluate}_ipc{args.ipc}" if has_ipc else Path(args.evaluate).resolve().stem
    return args.log_dir / args.dataset / (args.run_name or f"evaluate_{name}_{digest}")


# --------------------------------------------------------------------------------------------------
# Tasks


def study_of(args, saved, evaluator, place):
    """The `Study` of a saved set, with the experts of --model where there are some."""
    task = TASKS[args.task]
    folder = trajectories.expert_folder(args.buffer_path, args.dataset, args.zca, args.model)
    experts = NO_EXPERTS
    if task.takes_experts and trajectories.expert_files(folder):
        student = training.make_student(args.model, evaluator.data.form, place.amp, place.device)
        experts = matching_experts(args, evaluator.data, student)
    searches_alpha = args.search_alpha or not task.own_alpha
    alpha = None if searches_alpha else args.lr_teacher
    parts = saved.images, saved.labels, evaluator, alpha, saved.targets
    distilled = TrainingSet("the set", *parts)
    classes = saved.classes[:: distilled.tiles].cpu()
    return Study(args.evaluate, distilled, classes, args.model, experts, place, args.seed)


def run_task(args, settings, study):
    """Run a task, print its table, and write its JSON file and its picture."""
    how = f"networks: {args.num_eval}, epochs: {args.epoch_eval_train}, seed: {args.seed}"
    print(f"{len(study.classes)} images of {args.evaluate}; {how}", flush=True)
    settings = settings | inputs_of(study.data, study.experts, study.place)
    files.check_writable(evaluation_folder(args, settings))
    outcome = TASKS[args.task].run(study)
    print(f"\n{outcome.table}")
    if study.place.ranks.is_first:
        content = {"evaluated": args.evaluate, "task": args.task} | outcome.content
        path = write_evaluation(args, settings, content, study.data, study.place)
        report.save_figure(path.with_suffix(".png"), outcome.picture)
        print(f"\nFiles: {path} (and .png)")
