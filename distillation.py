"""Distill a data set: learn a few synthetic images per class that train a network like real ones.

    python distillation.py --dataset=EuroSAT --ipc=1 --syn_steps=20 --expert_epochs=3 \
        --max_start_epoch=5 --zca --lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 \
        --buffer_path=BUF --data_path=DATA

needs the experts of `expert_trajectories.py` with the same --dataset, --model and --zca. With
--objective=loss and hard labels it needs none. Every --eval_it iterations it trains fresh networks
on the synthetic images and tests them on real ones. It logs to Weights & Biases and writes to
logged_files/DATASET/RUN: images, labels and step size as tensors, pictures, an animation, and
results.json.

On an NVIDIA H200, 5000 iterations of ConvNetW32, evaluated six times, take 8 minutes beside seven
other runs. On two cores of an AMD EPYC, an iteration takes 0.7 seconds.
"""

import time
from pathlib import Path
from typing import NamedTuple

import cli
import datasets
import evaluation
import image_sets
import process
import report
import saved_sets
import trajectories
import utils
from cli import (
    Parser,
    boolean,
    choice,
    count,
    folder_name,
    folder_path,
    fraction,
    not_negative,
    number,
    positive,
)
from compilation import Compiler
from evaluation import EVAL_POOLS, Evaluator
from experts import Experts, load_experts
from image_sets import evaluate_real
from preprocessing import Data
from process import ReportedError
from ranks import Ranks, join, local_device
from reparam_module import UNROLLS, ReparamModule
from runs import finish, open_run, run_settings
from segments import batch_syn_of, check_shares, make_segments
from state import IMAGE_OPTIMIZERS, STEP_SIZE_OPTIMIZERS, State

LABELS = ("hard", "soft", "learned")

# --------------------------------------------------------------------------------------------------
# Flags


def add_flags(parser):
    """Add the flags that only this script has."""
    add = parser.topic("data")
    add("--max_files", count, None, "N", "trajectory files to read (default: all)")
    add("--max_experts", count, None, "N", "experts to read per file (default: all)")
    add("--skip_damaged", boolean, False, "BOOL", "continue without damaged trajectory files")
    add("--load_all", boolean, False, "BOOL", "keep the experts' snapshots on the device")

    add = parser.topic("distillation")
    add("--ipc", count, 1, "N", "synthetic images per class")
    add("--Iteration", number(int, 0), 5000, "N", "distillation iterations")
    goals = "the student's goal: follow an expert's trajectory (MTT), or reach a low loss on real "
    goals += "images (RaT-BPTT), which needs no experts"
    add("--objective", choice(("trajectory", "loss")), "trajectory", "trajectory|loss", goals)
    add("--optimizer_img", choice(IMAGE_OPTIMIZERS), "sgd", "sgd|adam", "optimiser of the images")
    rates = "learning rate of the images (default: 1000, with adam 0.01)"
    add("--lr_img", not_negative, None, "RATE", rates)
    logs = "optimiser of the step size α: sgd, or Adam on log α, which keeps α positive"
    add("--optimizer_lr", choice(STEP_SIZE_OPTIMIZERS), "sgd", "sgd|log_adam", logs)
    rates = "learning rate of the step size α (default: 1e-5, with log_adam 0.01)"
    add("--lr_lr", not_negative, None, "RATE", rates)
    means = "decay of running means of all that is learned, which are evaluated and saved; 0: none"
    add("--ema", fraction, 0.0, "[0,1)", means)
    add("--clip", boolean, None, "BOOL", "clip each gradient at twice its running norm")
    skips = "skip updates by iterations whose objective is above this (default: none)"
    add("--max_loss", positive, None, "LOSS", skips)
    tiles = "synthetic images hold F × F tiles, each enlarged to an image of its own"
    add("--factor", number(int, 1, below=65), 1, "F", tiles)
    add("--expert_epochs", count, 3, "M", "expert epochs that the student must match")
    add("--syn_steps", count, 20, "N", "differentiated steps on the synthetic images")
    window = "with loss: total steps, of which a random window of N is differentiated (default: N)"
    add("--total_steps", count, None, "T", window)
    add("--batch_objective", count, 512, "IMAGES", "with loss: real images per iteration")
    several = "segments of trajectories (or windows, of the loss) whose gradients are averaged"
    add("--segments", count, 1, "S", several)
    parts = "split each batch among torchrun's processes, not the segments"
    add("--shard_batch", boolean, False, "BOOL", parts)
    add("--max_start_epoch", count, 25, "T⁺", "segments start at an expert's epoch before this one")
    add("--batch_syn", count, None, "IMAGES", "synthetic images per step (default: all of them)")
    engines = "gradient engine: adjoint, whose memory hardly grows with N, or autograd, as in MTT"
    add("--unroll", choice(UNROLLS), "adjoint", "ENGINE", engines)
    memory = "memory for activations kept instead of recomputed (default: 1/8 of free memory)"
    add("--unroll_memory", not_negative, None, "GB", memory)
    starts = "initial images: real ones, noise, or a saved set with its α and labels"
    add("--pix_init", image_sets.pix_init, "real", "real|noise|SET", starts)
    kinds = "hard: classes; soft: the experts' probabilities; learned: soft, then learned"
    add("--labels", choice(LABELS), "hard", "|".join(LABELS), kinds)
    epochs = "epoch of the experts whose probabilities are the labels (default: their last)"
    add("--label_epoch", count, None, "EPOCH", epochs)
    add("--lr_labels", not_negative, 5.0, "RATE", "learning rate of learned labels (logits)")
    add("--no_aug", boolean, False, "BOOL", "no augmentation during distillation")
    add("--texture", boolean, False, "BOOL", "learn canvases, cut random windows; not with --zca")
    add("--canvas_size", count, 2, "IMAGES", "with --texture: side of a canvas")
    add("--canvas_samples", count, 1, "N", "with --texture: windows per canvas in a batch")
    add_output_flags(parser)


def add_output_flags(parser):
    """Those that say how sets are evaluated, and where results go."""
    add = parser.topic("evaluation")
    pools = "S: the model itself; A: ConvNet, MLP, ResNet18; R, M, C: itself and ResNet18, MLP, "
    pools += "ConvNet; W, D, P, N: ConvNet's widths, depths, poolings, normalisations"
    add("--eval_mode", choice(EVAL_POOLS), "S", "MODE", pools)
    add("--num_eval", count, 5, "N", "fresh networks per evaluation")
    add("--eval_it", count, 100, "ITERATIONS", "iterations between evaluations")
    add("--epoch_eval_train", count, 1000, "EPOCHS", "epochs per network on the synthetic images")
    add("--batch_real", count, 256, "IMAGES", "batch size for testing networks on real images")
    sets = "instead of distilling, evaluate a saved set (a run's folder, or images_*.pt) or real "
    sets += "images: random, herding or k_center (--ipc per class), or full (all of training)"
    add("--evaluate", str, None, "WHAT", sets)
    add("--export", folder_path, None, "DIR", "export the set of --evaluate for other tools")

    add = parser.topic("results")
    add("--log_dir", folder_path, Path("logged_files"), "DIR", "where results are written")
    add("--run_name", folder_name, None, "NAME", "run's folder (default: from the settings)")
    add("--checkpoint_every", count, 100, "ITERATIONS", "iterations between checkpoints")
    add("--resume", folder_path, None, "DIR", "resume the run in DIR with its own flags")
    add("--force_save", boolean, False, "BOOL", "log pictures even for 50 images per class or more")


def parse_args():
    """The flags of this run: given ones win over a saved run's, a preset's, and the defaults."""
    parser = Parser(__doc__.splitlines()[0])
    cli.add_shared_flags(parser, batch_train=256)
    add_flags(parser)
    given = parser.given()
    check_commands(parser, given)

    # A saved run brings its own flags, so that evaluating or resuming it needs no others.
    what = given.get("evaluate")
    preset = cli.preset_flags(given.get("preset"), "distillation")
    saved = {}
    if "resume" in given:
        saved = parser.recorded(given["resume"])
        if not saved:
            parser.error(f"--resume={given['resume']}: no run was started there (no run.json)")
    elif image_sets.is_saved(what):
        saved = parser.recorded(saved_sets.saved_folder(what))
        if saved and preset:
            parser.error(f"--preset={given['preset']}: the run has its own flags: leave it out")
        # The images were learned for its α. None if it was not saved, as by MTT.
        saved["lr_teacher"] = saved_sets.saved_step_size(what, "--evaluate")
    elif isinstance(start := given.get("pix_init"), Path):
        if alpha := saved_sets.saved_step_size(start, "--pix_init"):
            saved["lr_teacher"] = alpha
    elif what == "full":
        saved = {"epoch_eval_train": 50}  # of real images, an epoch has far more steps
    args = completed(parser, preset, saved, given)
    check_combinations(parser, args)
    return args


def completed(parser, *layers):
    """All flags, with the defaults that depend on others."""
    args = parser.complete(*layers)
    if args.lr_img is None:
        args.lr_img = IMAGE_OPTIMIZERS[args.optimizer_img].rate
    if args.lr_lr is None:
        args.lr_lr = STEP_SIZE_OPTIMIZERS[args.optimizer_lr].rate
    if args.clip is None:
        args.clip = args.objective == "loss"
    if args.total_steps is None:
        args.total_steps = args.syn_steps
    return args


def check_combinations(parser, args):
    """Refuse flags that cannot be combined."""
    if args.total_steps < args.syn_steps:
        reason = f"lower than --syn_steps={args.syn_steps}, which are part of them"
        parser.error(f"--total_steps={args.total_steps} is {reason}")
    if args.labels != "hard" and args.texture:
        reason = "experts do not take canvases: leave one out"
        parser.error(f"--labels={args.labels} and --texture cannot be combined: {reason}")
    if args.labels == "hard" and args.label_epoch:
        reason = "hard labels are the classes: add --labels=soft or learned"
        parser.error(f"--label_epoch={args.label_epoch}: {reason}")
    if args.shard_batch and args.unroll == "autograd":
        parser.error("--shard_batch and --unroll=autograd cannot be combined: leave one out")
    for name in ("texture", "zca"):
        if args.factor > 1 and getattr(args, name):
            reason = "tiles are parts of plain images: leave one out"
            parser.error(f"--factor={args.factor} and --{name} cannot be combined: {reason}")
    if args.zca and args.texture:
        reason = "whitening is fitted to whole images: leave one out"
        parser.error(f"--zca and --texture cannot be combined: {reason}")


def check_commands(parser, given):
    """Refuse flags that contradict each other."""
    if "resume" in given:
        if given["resume"].is_file():
            folder = given["resume"].parent
            parser.error(f"--resume={given['resume']} is a file: name the run's folder, {folder}")
        for name in ("run_name", "log_dir", "evaluate", "preset"):
            if name in given:
                parser.error(f"--resume and --{name} cannot be combined: leave one out")
    what = given.get("evaluate")
    if what == "":
        names = ", ".join(image_sets.REAL_SETS)
        parser.error(f"--evaluate='' names nothing: give a run's folder, images_*.pt, {names}")
    if image_sets.is_saved(what):
        for name in ("labels", "label_epoch"):
            if name in given:
                parser.error(f"--{name}={given[name]}: a saved set has its labels: leave it out")
    elif what and given.get("labels") == "learned":
        parser.error(f"--labels=learned: nothing is learned of --evaluate={what}: hard or soft")
    if "export" in given and not image_sets.is_saved(what):
        parser.error("--export needs --evaluate with a saved set")


# --------------------------------------------------------------------------------------------------
# What a run starts from


class Inputs(NamedTuple):
    data: Data
    experts: Experts
    student: ReparamModule
    real_sets: tuple  # random real images and labels, a set for each network of an evaluation
    evaluator: Evaluator
    compiler: Compiler
    ranks: Ranks


def load_inputs(args):
    """Data, experts and networks, each checked before anything slower is loaded."""
    # Milliseconds: what is known from the flags alone.
    device = process.check_device(local_device(args.device))
    ranks = join(device)
    form = datasets.form_of(args.dataset, args.data_path, args.im_size)
    num_syn = args.ipc * form.num_classes
    if form.im_size % args.factor:
        raise ReportedError(
            f"--factor={args.factor}: images of {form.im_size} pixels a side cannot be cut into "
            "that many tiles: choose a divisor"
        )
    check_shares(args.segments, args.shard_batch, num_syn, batch_syn_of(args, form), ranks.size)
    compiler = Compiler(args.compile, process.check_amp(args.amp, device))
    student = evaluation.make_student(args.model, form, compiler.amp, device)
    pool = evaluation.make_pool(args.eval_mode, args.model, form, compiler, device)

    # Seconds: files are memory-mapped, and only segments that can be drawn are read.
    experts = find_experts(args, student)

    # Minutes, where images are whitened for the first time.
    print(process.describe(device, compiler.amp, ranks.size), flush=True)
    data = datasets.load_data(
        **cli.data_flags(args),
        device=device,
        check=lambda settings: experts.check_settings(settings | {"model": args.model}),
    )
    if args.objective == "trajectory":
        experts.warn_of_few_steps(args.syn_steps, args.expert_epochs, len(data.train[1]))
    real_sets = image_sets.random_real_sets(data, args.ipc, args.num_eval, args.seed, args.factor)
    evaluator = evaluation.make_evaluator(args, data, pool, compiler, ranks)
    return Inputs(data, experts, student, real_sets, evaluator, compiler, ranks)


def find_experts(args, student):
    """The experts that the objective or the labels need; none if neither does."""
    if args.objective == "loss" and args.labels == "hard":
        return Experts([])
    folder = trajectories.expert_folder(args.buffer_path, args.dataset, args.zca, args.model)
    experts = load_experts(
        folder, student.shapes, args.max_files, args.max_experts, args.skip_damaged
    )
    experts.check_settings({"val_fraction": args.val_fraction})
    experts.check_label_epoch(args.label_epoch)
    if args.objective == "trajectory":
        segments = args.max_start_epoch, args.expert_epochs
        experts.check_epochs(*segments)
        experts = experts.check_segments(*segments, args.skip_damaged)
    return experts


def settings_of(args, inputs, state):
    """What a run's result depends on: flags, and what follows from the machine and the inputs."""
    return run_settings(args) | {
        "amp": inputs.compiler.amp,
        "batch_syn": batch_syn_of(args, inputs.data.form),
        "pix_init": state.source,
        "data": inputs.data.settings["digest"],
        "experts": inputs.experts.digest() if inputs.experts.members else None,
    }


def soften(args, inputs, state):
    """Give the images soft labels: those of the set they start from, or the experts'."""
    logits = state.logits
    if logits is None or args.label_epoch:
        images = utils.decode(state.images, args.factor)
        logits = inputs.experts.logits(inputs.student, images, args.label_epoch)
    state.soften(logits, args.lr_labels if args.labels == "learned" else None)


# --------------------------------------------------------------------------------------------------
# Main


def main():
    args = parse_args()
    if args.evaluate:
        return image_sets.evaluate_set(args, run_settings(args))

    # Everything that can be refused is refused before anything is written.
    inputs = load_inputs(args)
    evaluator = inputs.evaluator
    state = State(args, inputs.data)
    if args.labels != "hard":
        soften(args, inputs, state)
    segments = make_segments(args, inputs, state)
    line_due = process.Interval(60)

    with open_run(args, settings_of(args, inputs, state), inputs, state) as run:
        print(report.opening(run, inputs, state), flush=True)
        if state.finished:
            print(report.closing_table(run, inputs, state))
            return
        if not state.baselines:
            alpha = args.lr_teacher
            state.baselines.append(evaluate_real(evaluator, inputs.real_sets, alpha, args.seed))

        bar = report.progress(state, args.Iteration)
        for it in bar:
            inputs.ranks.check()
            alpha = state.alpha
            log = {"Progress": it, "Synthetic_LR": alpha}

            # Evaluate before the update, as MTT does. Iteration 0 evaluates the initial images.
            due = it % args.eval_it == 0 or it == args.Iteration
            if due and not state.evaluations.has(it, evaluator.pool.keys()):  # as after a kill
                scores = evaluator(state.images, state.labels, alpha, (args.seed, it))
                state.evaluations.add(scores, alpha, state.losses, state.seconds, evaluator.epochs)
                log |= run.record(inputs, state, args.force_save)
            run.dashboard.log(log, step=it)
            # After the files of an evaluation: a run killed in between evaluates again.
            if due or it % args.checkpoint_every == 0:
                run.save(state)
            if it == args.Iteration:
                break

            # Unroll students on the synthetic images, and differentiate what they reach.
            begin = time.perf_counter()
            loss, gradients, task = segments(state, it)

            # Follow the gradients. α may stop being positive, MTT's most common failure.
            fault = state.step(loss, gradients)
            loss = state.losses[-1]
            if fault:
                where = f"({task.source}, {segments.objective.name} {loss:.4g})"
                raise ReportedError(f"diverged at iteration {it} {where}: {fault}")

            seconds = time.perf_counter() - begin
            log = {segments.objective.log_key: loss, **task.log, "Seconds": seconds}
            run.dashboard.log(log, step=it)
            best = state.evaluations.best_accuracy
            status = f"loss {loss:.4f}, α {state.current_alpha:.5f}, best {best:.1%}"
            bar.set_postfix_str(status, refresh=False)
            if line_due.due():  # for logs, where there is no bar
                process.log_line(f"iteration {it + 1} of {args.Iteration}: {status}")

        # Real images at the learned α too: how much of the gain is due to the step size.
        best = state.evaluations.best
        alpha = best["syn_lr"]
        if best["iteration"] and state.baselines[-1]["syn_lr"] != alpha:
            real = evaluate_real(evaluator, inputs.real_sets, alpha, args.seed)
            state.baselines = [state.baselines[0], real]
        finish(run, inputs, state)


if __name__ == "__main__":
    process.run_script(
        main,
        less_memory="lower --ipc, --batch_syn, --batch_train, --num_eval or --im_size, leave out "
        "--zca, or use --amp, --unroll=adjoint or --unroll_memory=0",
    )
