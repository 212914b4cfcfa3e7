"""Distill a data set: learn a few synthetic images per class that train a network like real ones.

    python distillation.py --dataset=EuroSAT --ipc=1 --syn_steps=20 --expert_epochs=3 \
        --max_start_epoch=5 --zca --lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 \
        --buffer_path=BUF --data_path=DATA

needs the experts of `expert_trajectories.py` with the same --dataset, --model and --zca. Every
--eval_it iterations it trains fresh networks on the synthetic images and tests them on real ones.
It logs to Weights & Biases and writes to logged_files/DATASET/RUN: images, labels and step size as
tensors, pictures, an animation, and results.json.

On two cores of an AMD EPYC, 5000 iterations of ConvNetW32, evaluated every 500, take 1.7 hours.
"""

import math
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import cli
import datasets
import evaluation
import files
import process
import report
import trajectories
import utils
from cli import Parser, boolean, choice, count, folder_name, folder_path, not_negative, number
from compilation import Compiler
from evaluation import EVAL_POOLS, Evaluator, evaluate_real
from preprocessing import Data, initial_images
from process import ReportedError, Stopped, stop
from reparam_module import UNROLLS, ReparamModule
from scores import Evaluations, from_json, to_json
from trajectories import Experts
from utils import Augment

CHECKPOINT = "checkpoint.pt"  # in the run's folder

# --------------------------------------------------------------------------------------------------
# Flags


def add_flags(parser):
    """Add the flags that only this script has."""
    add = parser.topic("data")
    add("--max_files", count, None, "N", "trajectory files to read (default: all)")
    add("--max_experts", count, None, "N", "experts to read per file (default: all)")
    add("--skip_damaged", boolean, False, "BOOL", "continue without damaged trajectory files")
    add("--load_all", boolean, False, "BOOL", "hold the experts' snapshots on the device")

    add = parser.topic("distillation")
    add("--ipc", count, 1, "N", "synthetic images per class")
    add("--Iteration", number(int, 0), 5000, "N", "distillation iterations")
    add("--lr_img", not_negative, 1000.0, "RATE", "learning rate of the images")
    add("--lr_lr", not_negative, 1e-5, "RATE", "learning rate of the step size α")
    add("--expert_epochs", count, 3, "M", "expert epochs that the student must match")
    add("--syn_steps", count, 20, "N", "the student's steps on synthetic images")
    add("--max_start_epoch", count, 25, "T⁺", "segments start at an expert's epoch below this one")
    add("--batch_syn", count, None, "IMAGES", "synthetic images per step (default: all of them)")
    engines = "gradients by adjoint, in memory that hardly grows with N, or autograd, as in MTT"
    add("--unroll", choice(UNROLLS), "adjoint", "ENGINE", engines)
    memory = "for activations that need not be computed twice (default: 1/8 of what is free)"
    add("--unroll_memory", not_negative, None, "GB", memory)
    add("--pix_init", choice(("real", "noise")), "real", "real|noise", "what the images start from")
    add("--no_aug", boolean, False, "BOOL", "no augmentation while distilling")
    add("--texture", boolean, False, "BOOL", "learn canvases, cut random windows; not with --zca")
    add("--canvas_size", count, 2, "IMAGES", "with --texture: side of a canvas")
    add("--canvas_samples", count, 1, "N", "with --texture: windows per canvas in a batch")

    add = parser.topic("evaluation")
    pools = "S the model itself; A ConvNet, MLP, ResNet18; R, M, C itself and ResNet18, MLP, "
    pools += "ConvNet; W, D, P, N ConvNet's widths, depths, poolings, normalisations"
    add("--eval_mode", choice(EVAL_POOLS), "S", "MODE", pools)
    add("--num_eval", count, 5, "N", "fresh networks per evaluation")
    add("--eval_it", count, 100, "ITERATIONS", "from one evaluation to the next")
    add("--epoch_eval_train", count, 1000, "EPOCHS", "a network's epochs on the synthetic images")
    add("--batch_real", count, 256, "IMAGES", "real images per batch when testing a network")
    sets = "instead of distilling, evaluate a saved set (a run's folder, or images_*.pt), random: "
    sets += "--ipc random real images per class, or full: all training images"
    add("--evaluate", str, None, "WHAT", sets)
    add("--export", folder_path, None, "DIR", "write the set of --evaluate for other tools")

    add = parser.topic("results")
    add("--log_dir", folder_path, Path("logged_files"), "DIR", "where results are written")
    add("--run_name", folder_name, None, "NAME", "of the run's folder (default: from the settings)")
    add("--checkpoint_every", count, 100, "ITERATIONS", "from one checkpoint to the next")
    add("--resume", folder_path, None, "DIR", "resume the run in DIR, with the flags that it had")
    add("--force_save", boolean, False, "BOOL", "log pictures of 50 images per class and more, too")


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
    elif evaluation.is_saved(what):
        saved = parser.recorded(evaluation.saved_folder(what))
        if saved and preset:
            parser.error(f"--preset={given['preset']}: the run has flags of its own: leave it out")
        # Its α is what the images were learned for; None where it is not saved, as by MTT.
        saved["lr_teacher"] = evaluation.saved_step_size(what)
    elif what == "full":
        saved = {"epoch_eval_train": 50}  # of real images, an epoch has far more steps
    args = parser.complete(preset, saved, given)
    if args.zca and args.texture:
        reason = "whitening is fitted to whole images; leave one out"
        parser.error(f"--zca and --texture exclude each other: {reason}")
    return args


def check_commands(parser, given):
    """Refuse flags that contradict each other."""
    if "resume" in given:
        for name in ("run_name", "log_dir", "evaluate", "preset"):
            if name in given:
                parser.error(f"--resume and --{name} exclude each other: leave one out")
    what = given.get("evaluate")
    if what == "":
        parser.error("--evaluate='' names nothing: give a run's folder, images_*.pt, random, full")
    if "export" in given and not evaluation.is_saved(what):
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


def load_inputs(args):
    """Data, experts and networks, each checked before what takes longer to load."""
    # Milliseconds: what is known from the flags alone.
    device = process.check_device(args.device)
    form = datasets.form_of(args.dataset, args.data_path, args.im_size)
    batch_syn_of(args, form)
    compiler = Compiler(args.compile, process.check_amp(args.amp, device))
    student = make_student(args.model, form, compiler.amp, device)
    pool = evaluation.make_pool(args.eval_mode, args.model, form, compiler, device)

    # Seconds: memory-mapped, of which only the segments that can be drawn are read.
    folder = trajectories.expert_folder(args.buffer_path, args.dataset, args.zca, args.model)
    experts = trajectories.load_experts(
        folder, student.shapes, args.max_files, args.max_experts, args.skip_damaged
    )
    experts.check_epochs(args.max_start_epoch, args.expert_epochs)
    experts.check_settings({"val_fraction": args.val_fraction})
    experts = experts.check_segments(args.max_start_epoch, args.expert_epochs, args.skip_damaged)

    # Minutes, where images are whitened for the first time.
    print(process.describe(device, compiler.amp), flush=True)
    data = datasets.load_data(
        args.dataset, args.data_path, args.zca, args.val_fraction, device, args.im_size
    )
    experts.check_settings(data.settings | {"model": args.model})
    real_sets = evaluation.random_real_sets(data, args.ipc, args.num_eval, args.seed)
    evaluator = evaluation.make_evaluator(args, data, pool, compiler)
    return Inputs(data, experts, student, real_sets, evaluator, compiler)


def batch_syn_of(args, form):
    """Synthetic images per step. Raises ReportedError where --batch_syn is more than there are."""
    num_images = args.ipc * form.num_classes
    if args.batch_syn and args.batch_syn > num_images:
        raise ReportedError(
            f"--batch_syn={args.batch_syn} is more than the {num_images} synthetic images: "
            "lower it, or raise --ipc"
        )
    return args.batch_syn or num_images


def make_student(model, form, amp, device):
    """A network called `model` as a function of its parameters.

    Raises ReportedError where it cannot be one.
    """
    network = utils.initial_network(model, form, utils.make_generator(0), device)
    try:
        return ReparamModule(network, amp)
    except ValueError as error:
        raise ReportedError(f"--model={model}: {error}") from None


def student_augment(args, form, apply=utils.apply_group):
    """What the student sees of the synthetic images."""
    # Plain augmentation cannot be differentiated.
    augments = args.dsa and not args.no_aug
    groups = utils.augment_groups(True, args.dsa_strategy) if augments else ()
    return Augment(form.im_size, groups, args.canvas_samples if args.texture else 0, apply)


def make_unroll(args, inputs, make_batch):
    """The engine that --unroll names."""
    memory = process.activation_memory(args.unroll_memory, inputs.data.train[0].device)
    compile = inputs.compiler.function
    engine = UNROLLS[args.unroll](inputs.student, make_batch, compile, memory)
    return inputs.compiler.retrying(engine)


# --------------------------------------------------------------------------------------------------
# What a run changes: synthetic images, α, and what is known of them


class State:
    """All that changes in a run, and that a checkpoint keeps.

    image_syn, label_syn  synthetic images (K, 3, S, S), and their labels (K,)
    syn_lr                α, a scalar; alpha: its value
    random                the generator of all draws but those of evaluations
    losses                matching loss of each iteration so far
    evaluations           of the synthetic images
    baselines             evaluations of random real images, at the initial α and at the best one
    """

    def __init__(self, args, data: Data):
        """Where a run starts."""
        device = data.train[0].device
        # One stream for images, segments and batches: a checkpoint keeps where it stands.
        self.random = utils.make_generator("distillation", args.seed)
        canvas_size = args.canvas_size if args.texture else 1
        images, labels = initial_images(data, args.ipc, args.pix_init, canvas_size, self.random)
        self.image_syn = images.to(device).requires_grad_(True)
        self.label_syn = labels.to(device)
        self.syn_lr = torch.tensor(args.lr_teacher, device=device, requires_grad=True)  # ()
        self.alpha = self.syn_lr.item()
        # One optimiser with two rates does what MTT's two do.
        groups = [
            {"params": [self.image_syn], "lr": args.lr_img},
            {"params": [self.syn_lr], "lr": args.lr_lr},
        ]
        self.optimizer = torch.optim.SGD(groups, momentum=0.5)
        self.losses = []
        self.evaluations = Evaluations()
        self.baselines = []
        self.seconds_before = 0.0  # of the processes that this one resumes
        self.start = time.time()
        self.finished = False

    @property
    def seconds(self):
        return self.seconds_before + time.time() - self.start

    def step(self, loss, grad_image, grad_lr):
        """Move images and α along the gradients of this loss.

        Returns what is not finite, or α that is not positive, as text; None: all is well.
        """
        self.image_syn.grad = grad_image  # (K, 3, S, S)
        self.syn_lr.grad = grad_lr  # ()
        self.optimizer.step()
        checked = {"∂L/∂images": grad_image, "∂L/∂α": grad_lr, "images": self.image_syn}
        finite = [tensor.isfinite().all() for tensor in checked.values()]
        # All that is to be known of an iteration comes by one transfer: it waits for the device.
        values = [loss, self.syn_lr.detach(), *(flag.to(loss.dtype) for flag in finite)]
        loss, self.alpha, *finite = torch.stack(values).tolist()
        self.losses.append(loss)
        return first_fault(loss, self.alpha, dict(zip(checked, finite)))

    def save(self, path):
        content = {
            "images": self.image_syn.detach(),
            "labels": self.label_syn,
            "syn_lr": self.syn_lr.detach(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "losses": self.losses,
            "evaluations": to_json(self.evaluations.rows),
            "baselines": to_json(self.baselines),
            "seconds": self.seconds,
            "finished": self.finished,
        }
        files.write_tensors(path, content)

    @torch.no_grad()
    def load(self, path):
        """Go back to what `save` wrote, if it did. Raises ReportedError for a damaged file."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            # Copied in place: the optimiser refers to these tensors.
            self.image_syn.copy_(content["images"])
            self.label_syn.copy_(content["labels"])
            self.syn_lr.copy_(content["syn_lr"])
            self.alpha = self.syn_lr.item()
            self.optimizer.load_state_dict(content["optimizer"])
            self.random.set_state(content["random"])
            self.losses = content["losses"]
            self.evaluations = Evaluations(from_json(content["evaluations"]))
            self.baselines = from_json(content["baselines"])
            self.seconds_before = content["seconds"]
            self.finished = content["finished"]
        except FileNotFoundError:
            pass  # a new run
        except Exception as error:  # a foreign or damaged file raises whatever its bytes trigger
            raise ReportedError(
                f"{path} is damaged ({process.first_line(error)}): remove it, and the run starts "
                "from scratch"
            ) from None


def first_fault(loss, alpha, finite):
    """What went wrong in an iteration, and what may help; `finite` is by name. None: nothing."""
    faults = [] if math.isfinite(loss) else ["loss is not finite"]
    faults += [f"{name} is not finite" for name, is_finite in finite.items() if not is_finite]
    if not 0 < alpha < math.inf:
        faults.append("α is not positive")
    if not faults:
        return None
    return (
        f"{faults[0]}, α = {alpha:.4g}. Lower --lr_lr, --lr_img, --lr_teacher or --syn_steps; the "
        "checkpoint before it is kept"
    )


# --------------------------------------------------------------------------------------------------
# The run's folder


class Run(NamedTuple):
    """A distillation in its folder."""

    folder: Path
    settings: dict  # what its result depends on
    dashboard: report.Dashboard | None  # None: it is finished


@contextmanager
def open_run(args, inputs, state):
    """Lock the run's folder, record what it is, and go back to its checkpoint: yields a `Run`.

    A signal saves a checkpoint. Raises ReportedError where the folder has another run, or another
    process works on this one.
    """
    # Settings that follow from the machine and the inputs.
    settings = cli.run_settings(args) | {
        "amp": inputs.compiler.amp,
        "batch_syn": batch_syn_of(args, inputs.data.form),
        "data": inputs.data.settings["digest"],
        "experts": inputs.experts.digest(),
    }
    folder = args.log_dir / args.dataset / (args.run_name or cli.default_name(settings))
    if args.resume:
        folder = args.resume.resolve()
    with files.locked(folder, wait=False) as mine:
        if not mine:
            raise ReportedError(
                f"another process is working on the run in {folder}: use another --run_name"
            )
        record = files.start_run(folder, settings, cli.run_flags(args))
        state.load(folder / CHECKPOINT)
        dashboard = None  # a finished run logs nothing more
        if not state.finished:
            config = settings | {"device": args.device} | process.versions()
            page = {"id": record.wandb_id, "name": folder.name, "config": config}
            dashboard = report.Dashboard(folder, "Progress", **cli.wandb_flags(args), **page)
        run = Run(folder, settings, dashboard)
        try:
            with stop:  # from here on, a signal waits for `stop.check`
                yield run
        except Stopped as stopped:
            state.save(run.folder / CHECKPOINT)
            dashboard.finish()
            saved = f"iteration {len(state.losses)} is saved: the same command resumes there"
            raise Stopped(stopped.args[0], saved) from None


def finish(run, inputs, state):
    """Leave everything in the run's folder, then mark the run as finished."""
    stop.release()  # a signal ends the process at once: the next start makes up for it
    report.save_results(run, inputs, state)
    report.save_curves(run, state)
    report.save_animation(run.folder)
    # Last of all: what is killed before it, the next start makes again.
    summary = report.run_summary(state.evaluations, state.seconds, state.syn_lr.device)
    run.dashboard.finish(**summary)
    state.finished = True
    state.save(run.folder / CHECKPOINT)
    print(report.closing_table(run, inputs, state), flush=True)


# --------------------------------------------------------------------------------------------------
# Main


def main():
    args = parse_args()
    if args.evaluate:
        return evaluation.evaluate_saved(args, cli.run_settings(args))

    # Everything that can be refused is, before anything is written.
    inputs = load_inputs(args)
    data, experts, evaluator = inputs.data, inputs.experts, inputs.evaluator
    device = data.train[0].device
    state = State(args, data)
    augment = student_augment(args, data.form, inputs.compiler.augmentation(device))
    make_batch = partial(augment, labels=state.label_syn)
    unroll = make_unroll(args, inputs, make_batch)
    num_syn, batch_syn = len(state.label_syn), batch_syn_of(args, data.form)
    curves_due, line_due = process.Interval(60), process.Interval(60)

    with open_run(args, inputs, state) as run:
        print(report.opening(run, inputs, state), flush=True)
        if state.finished:
            print(report.closing_table(run, inputs, state))
            return
        if args.load_all:  # otherwise each segment is read from the disk, 3 MB of ConvNet
            experts = experts.on_device(args.max_start_epoch + args.expert_epochs, device)
        if not state.baselines:
            alpha = args.lr_teacher
            state.baselines.append(evaluate_real(evaluator, inputs.real_sets, alpha, args.seed))

        bar = report.progress(state, args.Iteration)
        for it in bar:
            stop.check()
            alpha = state.alpha
            log = {"Progress": it, "Synthetic_LR": alpha}

            # Evaluate before the update, as MTT does: iteration 0 is what the images start from.
            due = it % args.eval_it == 0 or it == args.Iteration
            if due and not state.evaluations.has(it):  # as after a kill before the update
                images = state.image_syn.detach()
                scores = evaluator(images, state.label_syn, alpha, (args.seed, it))
                state.evaluations.add(scores, alpha, state.losses, state.seconds)
                process.write_line(report.evaluation_lines(state.evaluations.rows[-1]))
                report.save_images(run, data, state)
                report.save_results(run, inputs, state)
                if curves_due.due():  # drawing them takes half a second
                    report.save_curves(run, state)
                log |= report.evaluation_log(run, data, state, args.force_save)
            run.dashboard.log(log, step=it)
            # After the files of an evaluation: what is killed in between is evaluated once more.
            if due or it % args.checkpoint_every == 0:
                state.save(run.folder / CHECKPOINT)
            if it == args.Iteration:
                break

            # Draw a segment of an expert, and the batches that the student sees on its way.
            begin = time.perf_counter()
            expert = int(torch.randint(len(experts.members), (1,), generator=state.random))
            start_epoch = int(torch.randint(args.max_start_epoch, (1,), generator=state.random))
            # θ*_t and θ*_{t+M}, (P,) each
            segment = experts.segment(expert, start_epoch, args.expert_epochs, device)
            drawn = utils.draw_batches(num_syn, batch_syn, args.syn_steps, augment, state.random)
            batches = utils.to_device(drawn, device)

            # Unroll the student from θ*_t, and differentiate its distance to θ*_{t+M}.
            loss, *gradients = unroll(*segment, state.image_syn, state.syn_lr, batches)

            # Follow the gradients. α may leave the positive numbers, MTT's commonest failure.
            fault = state.step(loss, *gradients)
            loss = state.losses[-1]
            if fault:
                name = experts.members[expert].name
                where = f"({name}, start epoch {start_epoch}, matching loss {loss:.4g})"
                raise ReportedError(f"diverged at iteration {it} {where}: {fault}")

            seconds = time.perf_counter() - begin
            log = {"Grand_Loss": loss, "Start_Epoch": start_epoch, "Seconds": seconds}
            run.dashboard.log(log, step=it)
            status = f"loss {loss:.4f}, α {alpha:.5f}, best {state.evaluations.best_accuracy:.1%}"
            bar.set_postfix_str(status, refresh=False)
            if line_due.due():  # for logs, where there is no bar
                process.log_line(f"iteration {it + 1} of {args.Iteration}: {status}")

        # How much of the gain is due to the learned step size: real images at that α, too.
        best = state.evaluations.best
        if best["iteration"] and len(state.baselines) == 1:
            alpha = best["syn_lr"]
            state.baselines.append(evaluate_real(evaluator, inputs.real_sets, alpha, args.seed))
        finish(run, inputs, state)


if __name__ == "__main__":
    process.run_script(
        main,
        less_memory="lower --ipc, --batch_syn, --batch_train, --num_eval or --im_size, leave out "
        "--zca, or use --amp, --unroll=adjoint or --unroll_memory=0",
    )
