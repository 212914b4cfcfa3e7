"""Distill a data set: learn a few synthetic images per class that train a network like real ones.

    python distillation.py --dataset=EuroSAT --model=ConvNetW32 --ipc=1 --syn_steps=20 \
        --expert_epochs=3 --max_start_epoch=5 --zca --lr_img=1000 --lr_lr=1e-05 \
        --lr_teacher=0.01 --buffer_path=BUF --data_path=DATA

needs the experts of `expert_trajectories.py` with the same --dataset, --model and --zca. With
another --objective, and labels that are hard or those of a set in --pix_init, it needs none. Every
--eval_it iterations it trains fresh networks on the synthetic images and tests them on real ones.
It logs to Weights & Biases and writes to logged_files/DATASET/RUN: images, labels and step size as
tensors, pictures, an animation, and results.json.

On an NVIDIA H200, 5000 iterations of ConvNetW32, evaluated six times, take 8 minutes beside seven
other runs. On two cores of an AMD EPYC, an iteration takes 0.7 seconds.
"""

import math
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import evaluate_set
import evaluation
import training
import utils
from cli import distillation_flags, exclusions, flags
from cli.parser import Parser
from cli.presets import preset_flags
from datasets import by_name, initial_sets, saved_sets, set_files
from datasets.coresets import REAL_SETS, is_saved
from datasets.preprocessing import Data, Layout, check_factor
from evaluation import Evaluator, evaluate_real
from kernels import centred_targets
from objectives import OBJECTIVES
from objectives.segments import batch_syn_of
from reparam_module import ReparamModule
from run import report, show
from run.folder import default_name, open_run, run_flags, run_settings, saved_if_stopped
from run.rules import LABELS, Rules
from run.state import Start, State
from system import files, process
from system.machine import Machine, set_up
from system.process import Interval, ReportedError
from trajectories import Experts
from uses import TASKS

# --------------------------------------------------------------------------------------------------
# Flags


def make_parser():
    """The parser of this script's flags."""
    parser = Parser(__doc__)
    flags.add_shared_flags(parser, batch_train=256)
    distillation_flags.add_distillation_flags(parser)
    return parser


def parse_args():
    """The flags of this run: given ones win over a saved run's, a preset's, and the defaults."""
    parser = make_parser()
    given = parser.given()
    exclusions.check_commands(parser, given)

    # A saved run brings its own flags, so that evaluating or resuming it needs no others.
    what, start = given.get("evaluate"), given.get("pix_init")
    preset = preset_flags(given.get("preset"), "distillation")
    saved = {}
    if "resume" in given:
        saved = parser.recorded(given["resume"])
        if not saved:
            parser.error(f"--resume={given['resume']}: no run was started there (no run.json)")
    elif is_saved(what):
        saved = recorded_set(parser, what)
        if saved and preset:
            parser.error(f"--preset={given['preset']}: the run has its own flags: leave it out")
        # The images were learned for its α. None if it was not saved, as by MTT.
        saved["lr_teacher"] = saved_sets.saved_step_size(what, "--evaluate")
        if "task" in given:
            saved["eval_mode"] = TASKS[given["task"]].eval_mode or "S"
    elif what:  # real images; nothing is learned of them, whatever a preset says
        saved = {"labels": "hard"}
        if REAL_SETS[what].epochs:
            saved["epoch_eval_train"] = REAL_SETS[what].epochs
    elif isinstance(start, Path):
        alpha = saved_sets.saved_step_size(start, "--pix_init")
        if alpha:
            saved["lr_teacher"] = alpha
    args = distillation_flags.completed(parser, preset, saved, given)
    exclusions.check_combinations(parser, args)
    return args


def recorded_set(parser, what):
    """The flags of the run that made the saved set `what`; none without a record, as of MTT's.

    Somebody else's record may name any folder. Its --data_path, where archives are unpacked and
    caches are written, is only taken if this project has written there before.
    """
    record = set_files.read_record(what, "--evaluate")
    if not record:
        return {}
    path = set_files.saved_folder(what) / files.RUN_RECORD
    recorded = parser.checked(record.flags, path if path.exists() else what)
    if not by_name.is_in_use(recorded.get("data_path", Path())):
        recorded.pop("data_path", None)
    return recorded


def settings_of(args):
    """The flags that a result depends on, where they differ from their defaults."""
    return run_settings(args, distillation_flags.defaults_for(make_parser(), args))


# --------------------------------------------------------------------------------------------------
# What a run starts from


class Inputs(NamedTuple):
    machine: Machine
    data: Data
    experts: Experts
    student: ReparamModule
    real_sets: tuple | None  # random real images and labels, a set for each network; None: too few
    evaluator: Evaluator
    view: report.View = report.RGB_VIEW  # the bands that pictures show


def load_inputs(args):
    """Data, experts and networks, each checked before anything slower is loaded."""
    # Milliseconds: what is known from the flags alone.
    machine = set_up(args.device, args.compile, args.amp)
    selection = flags.selection_of(args)
    form = selection.form
    check_factor(args.factor, form)
    OBJECTIVES[args.objective].check_ranks(args, form, machine.ranks.size)
    batch_syn_of(args, form)
    if selection.names:
        report.shown_bands(selection.names, args.show_bands)
    student = training.make_student(args.model, form, machine)
    pool = evaluation.make_pool(args.eval_mode, args.model, form, machine)

    # Seconds: files are memory-mapped, and only segments that can be drawn are read.
    experts = find_experts(args, student)
    print(machine, flush=True)
    raw = by_name.read_dataset(selection)
    experts.check_settings(raw.settings | {"model": args.model})

    # Minutes, where images are whitened for the first time.
    data = raw.preprocessed(machine.device)
    view = report.view_of(data, args.show_bands)
    if OBJECTIVES[args.objective].needs_experts:
        experts.warn_of_few_steps(args.syn_steps, args.expert_epochs, len(data.train[1]))
    layout = Layout(args.ipc, args.factor)
    real_sets = None
    with suppress(ReportedError):  # too few images of a class, which noise does not need
        real_sets = evaluation.random_real_sets(data, layout, args.num_eval, args.seed)
    evaluator = evaluation.make_evaluator(args, data, pool, machine)
    return Inputs(machine, data, experts, student, real_sets, evaluator, view)


def find_experts(args, student):
    """The experts that the objective or the labels need; none if neither does."""
    follows = OBJECTIVES[args.objective].needs_experts
    has_labels = initial_sets.has_soft_labels(args.pix_init) and not args.label_epoch
    if not follows and (has_labels or not LABELS[args.labels].soft):
        return Experts([])
    experts = flags.experts_of(args, student)
    experts.check_settings({"val_fraction": args.val_fraction})
    experts.check_label_epoch(args.label_epoch)
    if follows:
        segments = args.max_start_epoch, args.expert_epochs
        experts.check_epochs(*segments)
        experts = experts.with_whole_segments(*segments, args.skip_damaged)
    return experts


def input_settings(args, inputs, state):
    """Settings that a result depends on besides the flags: the machine and the inputs."""
    return {
        "amp": inputs.machine.amp,
        "batch_syn": batch_syn_of(args, inputs.data.form),
        "pix_init": state.source,
        "data": inputs.data.settings["digest"],
        "experts": inputs.experts.digest() if inputs.experts.members else None,
    }


def initial_state(args, inputs):
    """The state of a run that begins: images, labels and α, and how they are learned."""
    layout = Layout(args.ipc, args.factor, args.canvas_size if args.texture else 1)
    random = utils.make_generator("distillation", args.seed)
    start, source = initial_sets.initial_set(
        args.pix_init, layout, args.texture, inputs.data, random
    )
    logits = initial_logits(args, inputs, start)
    objective = OBJECTIVES[args.objective]
    rules = Rules(
        optimizer_img=args.optimizer_img,
        lr_img=args.lr_img,
        optimizer_lr=args.optimizer_lr,
        lr_lr=args.lr_lr if objective.learns_alpha else None,
        labels=args.labels,
        lr_labels=args.lr_labels,
        ema=args.ema,
        clip=objective.clips,
        halvings=objective.halvings,
    )
    begin = Start(start.images, start.classes, logits, args.lr_teacher, source)
    return State(begin, rules, inputs.data.device)


def initial_logits(args, inputs, start):
    """The tensor from which labels are read (n, classes), at the start; None: they are classes.

    `start` is the `SyntheticSet` that the run begins with.
    """
    kind, labels = LABELS[args.labels], start.labels
    if kind.centred:
        known = start.targets
        return centred_targets(labels, inputs.data.form.num_classes) if known is None else known
    logits = labels.clamp(min=1e-12).log() if labels.dim() == 2 else None
    if logits is not None and not kind.soft:
        takers = [name for name in OBJECTIVES[args.objective].labels if LABELS[name].in_rows]
        remedy = f"add --labels={' or '.join(takers)}" if takers else "take a set with classes"
        raise ReportedError(
            f"--pix_init: the labels of {args.pix_init} are probabilities: {remedy}"
        )
    if kind.soft and (logits is None or args.label_epoch):
        tiles = utils.decode(start.images.to(inputs.data.device), args.factor)
        logits = inputs.experts.logits(inputs.student, tiles, args.label_epoch)
    return logits


# --------------------------------------------------------------------------------------------------
# Main


def main():
    args = parse_args()
    if args.evaluate:
        return evaluate_set.main(args, settings_of(args))

    # Everything that can be refused is refused before anything is written.
    inputs = load_inputs(args)
    data, evaluator, ranks = inputs.data, inputs.evaluator, inputs.machine.ranks
    state = initial_state(args, inputs)
    settings = settings_of(args) | input_settings(args, inputs, state)
    folder = args.log_dir / args.dataset / (args.run_name or default_name(args, settings))
    if args.resume:
        folder = args.resume.resolve()
    objective = OBJECTIVES[args.objective]
    compute = objective.make(args, inputs, state)

    with open_run(folder, ranks, settings, run_flags(args), state) as run:
        state.resume(args.Iteration, evaluator)
        if state.finished:
            it = len(state.losses)
            print(f"finished before, at iteration {it}; to start from scratch, remove {folder}")
            print(show.closing_table(run, state, data, inputs.experts))
            return
        dashboard = show.open_dashboard(run, vars(args) | settings, flags.wandb_options(args))
        show.print_opening(run, state, inputs.experts, dashboard)
        run.save_test_names(data.test_names)
        with saved_if_stopped(run, state, dashboard):
            if inputs.real_sets is None:
                warnings.warn(f"a class has fewer than {args.ipc} real images to compare with")
            elif not state.baselines:
                alpha = args.lr_teacher
                real = evaluate_real(evaluator, inputs.real_sets, alpha, args.seed)
                state.baselines.append(real)

            numbers = range(len(state.losses), args.Iteration + 1)
            curves_due, status_due = Interval(60), Interval(60)  # curves take half a second
            time_left = process.TimeLeft(args.Iteration - numbers.start)
            bar = process.progress(
                numbers, initial=numbers.start, total=args.Iteration, desc="distilling"
            )
            for it in bar:
                ranks.check()
                log = {"Progress": it, "Synthetic_LR": state.alpha}

                # Evaluate before the update, as MTT does: at iteration 0, the initial images.
                due = it % args.eval_it == 0 or it == args.Iteration
                if due and not state.evaluations.has(it, evaluator.pool.keys()):  # as after a kill
                    key = args.seed, it
                    scores = evaluator(state.images, state.labels, state.alpha, key, state.targets)
                    state.add_evaluation(scores, evaluator.epochs)
                    if ranks.is_first:
                        log |= show.evaluation(args, run, state, data, inputs.view)
                        run.save_results(show.facts_about(inputs, settings), state)
                        if curves_due.due():
                            show.save_curves(args, run, state, objective)
                dashboard.log(log, step=it)
                # After the files of an evaluation: a run killed in between evaluates again.
                if due or it % args.checkpoint_every == 0:
                    run.save(state)
                if it == args.Iteration:
                    break

                # Compute the objective and its gradients, and follow them.
                begin = time.perf_counter()
                step = compute(state, it)
                fault = state.step(step)
                loss = state.losses[-1]
                if fault:  # α may stop being positive, MTT's most common failure
                    where = f"({step.source}, {objective.title} {loss:.4g})"
                    raise ReportedError(f"diverged at iteration {it} {where}: {fault}")

                seconds = time.perf_counter() - begin
                dashboard.log({objective.log_key: loss, **step.log, "Seconds": seconds}, step=it)
                status = show.status_of(state)
                bar.set_postfix_str(status, refresh=False)
                if status_due.due():  # for logs, where there is no bar
                    left = time_left(it + 1 - numbers.start)
                    process.log_line(f"iteration {it + 1} of {args.Iteration}: {status}; {left}")

            # Real images at the learned α too: how much of the gain is due to the step size.
            best = state.evaluations.best
            before = state.baselines[-1]["syn_lr"] if state.baselines else best["syn_lr"]
            # α is float32.
            if best["iteration"] and not math.isclose(before, best["syn_lr"], rel_tol=1e-6):
                real = evaluate_real(evaluator, inputs.real_sets, best["syn_lr"], args.seed)
                state.baselines = [state.baselines[0], real]
            facts = show.facts_about(inputs, settings)
            show.finish(args, run, state, objective, dashboard, facts)
            if ranks.is_first:
                print(show.closing_table(run, state, data, inputs.experts), flush=True)


if __name__ == "__main__":
    process.run_script(
        main,
        less_memory="lower --ipc, --batch_syn, --batch_train, --num_eval or --im_size, leave out "
        "--zca, or use --amp, --unroll=adjoint or --unroll_memory=0",
    )
