"""The command --evaluate: networks trained on real images or on a saved set; tasks and exports."""

import hashlib
import json
from functools import partial
from pathlib import Path

import evaluation
import training
import utils
from cli.flags import expert_folder_of, experts_of, selection_of
from datasets import by_name
from datasets.coresets import REAL_SETS, coreset, is_saved
from datasets.preprocessing import Layout, check_factor
from datasets.saved_sets import check_set, load_set
from datasets.set_files import saved_folder
from run import report
from run.export import check_free, export_set, exported_record
from run.rules import LABELS
from run.scores import to_json
from system import files, process
from system.machine import set_up
from system.process import ReportedError
from trajectories import Experts, expert_files
from uses import TASKS
from uses.study import Study, TrainingSet

NO_EXPERTS = Experts([])

# --------------------------------------------------------------------------------------------------
# Real images


def real_set(args, evaluator, machine):
    """One of REAL_SETS as a `TrainingSet`, the same on all ranks, and the experts that it takes.

    They choose coresets by their features, and give soft labels, their probabilities.
    """
    kind, data, soft = REAL_SETS[args.evaluate], evaluator.data, LABELS[args.labels].soft
    experts = NO_EXPERTS
    if kind.choose or soft:
        student = training.make_student(args.model, data.form, machine)
        experts = matching_experts(args, data, student)
        experts.check_label_epoch(args.label_epoch)
    if kind.choose:
        features = partial(experts.features, student)
        images, labels = coreset(data, args.ipc, kind.choose, features)
    elif kind.takes_ipc:
        layout = Layout(args.ipc, args.factor)
        images, labels = evaluation.random_real_sets(data, layout, args.num_eval, args.seed)
    else:
        images, labels = data.train
    title = f"real images ({args.evaluate})" if kind.takes_ipc else "training images"
    if soft:
        tiles = utils.decode(images.flatten(0, -4), args.factor) if kind.takes_ipc else images
        labels = experts.labels(student, tiles, args.label_epoch).unflatten(0, labels.shape)
        title += ", labelled by the experts"
    if kind.takes_ipc and machine.ranks.size > 1:  # rounding may choose otherwise
        chosen = machine.ranks.from_first((images.cpu(), labels.cpu()))
        images, labels = (part.to(data.device) for part in chosen)
    return TrainingSet(title, images, labels, evaluator, alpha_of(args)), experts


def alpha_of(args):
    """α for a `TrainingSet`; None: it is searched."""
    return None if args.search_alpha else args.lr_teacher


def matching_experts(args, data, student):
    """The experts of this network on these data."""
    experts = experts_of(args, student)
    experts.check_settings(data.settings | {"model": args.model})
    return experts


# --------------------------------------------------------------------------------------------------
# The command


def main(args, settings):
    """Train networks on what --evaluate names, print a table, and write evaluation.json.

    `settings` are the flags that a result depends on.
    """
    machine = set_up(args.device, args.compile, args.amp)
    print(machine, flush=True)
    if args.export:
        check_free(args.export)
        files.check_writable(args.export)
    selection = selection_of(args)
    form = selection.form
    check_factor(args.factor, form)
    pool = evaluation.make_pool(args.eval_mode, args.model, form, machine)
    saved = None
    if is_saved(args.evaluate):
        saved = load_set(args.evaluate, form, args.factor, "--evaluate")
        if not args.export:
            check_alpha(args)
    raw = by_name.read_dataset(selection)
    if saved:
        check_set(args.evaluate, saved.images, args.texture, raw.settings, form, "--evaluate")
    data = raw.preprocessed(machine.device)
    if args.export:
        if machine.ranks.is_first:
            view = report.view_of(data, args.show_bands)
            record = exported_record(args, data)
            export_set(args.export, saved, args.lr_teacher, data, view, record)
        return
    evaluator = evaluation.make_evaluator(args, data, pool, machine)
    if saved:
        saved = saved.to(machine.device)
    if args.task:
        run_task(args, settings, study_of(args, saved, evaluator, machine))
    elif saved:
        parts = saved.images, saved.labels, evaluator, alpha_of(args), saved.targets
        training_set = TrainingSet(f"images of {args.evaluate}", *parts)
        evaluate(args, settings, training_set, NO_EXPERTS, machine)
    else:
        evaluator = evaluation.of_real_images(evaluator)
        training_set, experts = real_set(args, evaluator, machine)
        evaluate(args, settings, training_set, experts, machine)


def check_alpha(args):
    """Raise ReportedError if networks cannot train on a saved set for lack of an α."""
    chooses_alpha = args.search_alpha or (args.task and TASKS[args.task].needs_validation)
    if args.lr_teacher is None and not chooses_alpha:
        raise ReportedError(
            f"{saved_folder(args.evaluate)} holds no α (syn_lr_*.pt): give --lr_teacher, the step "
            "size to train with, or --search_alpha"
        )


def evaluate(args, settings, training_set, experts, machine):
    """Train and test networks on a `TrainingSet`, print the table, and write evaluation.json.

    `experts` are those that chose the images, or labelled them.
    """
    evaluator, key = training_set.evaluator, (args.seed, "saved")
    settings = settings | inputs_of(evaluator.data, experts, machine)
    evaluator.check_count(training_set.images)
    files.check_writable(evaluation_folder(args, settings))  # before minutes of training
    alphas = training_set.alphas(key)
    if args.search_alpha:
        shown = ", ".join(f"α = {value:g} ({name})" for name, value in alphas.items())
    else:
        shown = f"α = {args.lr_teacher:.5f}"
    scores = {}
    for name in evaluator.pool:
        scores[name] = training_set.of_network(name, alphas.get(name)).scores(key)

    count = training_set.images.shape[-4]
    how = f"networks: {args.num_eval}, epochs: {args.epoch_eval_train}, {shown}"
    print(f"{count} {training_set.title}; {how}\n")
    print(report.scores_table(scores, evaluator.data.classes))
    if machine.ranks.is_first:
        row = {"evaluated": args.evaluate, "images": count, "scores": scores}
        row["syn_lr"] = alphas if args.search_alpha else args.lr_teacher
        (content,) = to_json([row])
        path = write_evaluation(args, settings, content, evaluator.data, machine)
        print(f"\nFiles: {path}")


def inputs_of(data, experts, machine):
    """Settings that an evaluation depends on besides the flags: the machine and the inputs."""
    inputs = {"amp": machine.amp, "data": data.settings["digest"]}
    if experts.members:
        inputs["experts"] = experts.digest()
    return inputs


def write_evaluation(args, settings, content, data, machine):
    """Write a JSON file of `content` and all that it depends on; returns its path.

    It is named after the task, or evaluation.json without one.
    """
    content |= {"settings": settings, "data": data.settings, "device": str(machine)}
    content |= {"versions": process.versions()}
    path = evaluation_folder(args, settings) / f"{args.task or 'evaluation'}.json"
    files.write_json(path, content)
    return path


def evaluation_folder(args, settings):
    """The folder of an evaluation, named after it and its settings."""
    known = settings | {"evaluate": args.evaluate, "lr_teacher": args.lr_teacher}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:6]
    real = REAL_SETS.get(args.evaluate)
    has_ipc = real and real.takes_ipc
    name = f"{args.evaluate}_ipc{args.ipc}" if has_ipc else Path(args.evaluate).resolve().stem
    return args.log_dir / args.dataset / (args.run_name or f"evaluate_{name}_{digest}")


# --------------------------------------------------------------------------------------------------
# Tasks


def study_of(args, saved, evaluator, machine):
    """The `Study` of a saved set, with the experts of --model where there are some."""
    task = TASKS[args.task]
    experts = NO_EXPERTS
    if task.takes_experts and expert_files(expert_folder_of(args)):
        student = training.make_student(args.model, evaluator.data.form, machine)
        experts = matching_experts(args, evaluator.data, student)
    searches_alpha = args.search_alpha or not task.own_alpha
    alpha = None if searches_alpha else args.lr_teacher
    distilled = TrainingSet("the set", saved.images, saved.labels, evaluator, alpha, saved.targets)
    classes = saved.classes[:: distilled.tiles].cpu()
    return Study(args.evaluate, distilled, classes, args.model, experts, machine, args.seed)


def run_task(args, settings, study):
    """Run a task, print its table, and write its JSON file and its picture."""
    how = f"networks: {args.num_eval}, epochs: {args.epoch_eval_train}, seed: {args.seed}"
    print(f"{len(study.classes)} images of {args.evaluate}; {how}", flush=True)
    settings = settings | inputs_of(study.data, study.experts, study.machine)
    files.check_writable(evaluation_folder(args, settings))
    outcome = TASKS[args.task].run(study)
    print(f"\n{outcome.table}")
    if study.machine.ranks.is_first:
        content = {"evaluated": args.evaluate, "task": args.task} | outcome.content
        path = write_evaluation(args, settings, content, study.data, study.machine)
        report.save_figure(path.with_suffix(".png"), outcome.picture)
        print(f"\nFiles: {path} (and .png)")
