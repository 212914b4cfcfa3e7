"""The flags of distillation.py alone, by topic, and the defaults that depend on others."""

import argparse
from pathlib import Path

from cli.types import (
    bands,
    boolean,
    choice,
    count,
    folder_name,
    folder_path,
    fraction,
    model,
    not_negative,
    number,
)
from datasets import initial_sets
from evaluation import EVAL_POOLS
from kernels import KERNELS
from networks import NETWORKS
from objectives import OBJECTIVES
from reparam_module import UNROLLS
from run.rules import IMAGE_OPTIMIZERS, LABELS, STEP_SIZE_OPTIMIZERS
from uses import TASKS


def eval_mode(text):
    """A row of EVAL_POOLS, or names of networks and kernel machines joined by commas."""
    if text in EVAL_POOLS:
        return text
    names = [model(part.strip()) for part in text.split(",")]
    unknown = [name for name in names if name not in NETWORKS and name not in KERNELS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is unknown: choose from {', '.join(EVAL_POOLS)}, or give the names of "
            "networks, as ConvNet,VGG11"
        )
    return ",".join(names)


# Defaults of which an objective may have its own.
OF_OBJECTIVES = {"optimizer_img": "sgd", "labels": "hard", "no_aug": False, "batch_objective": 512}


def own_default(name):
    """A function of all flags that returns the objective's own default of flag `name`."""
    return lambda args: OBJECTIVES[args.objective].defaults.get(name, OF_OBJECTIVES[name])


def default_lr_img(args):
    """The objective's own rate, if it is for the optimiser, else the optimiser's."""
    own = OBJECTIVES[args.objective].defaults
    if "lr_img" in own and args.optimizer_img == own_default("optimizer_img")(args):
        return own["lr_img"]
    return IMAGE_OPTIMIZERS[args.optimizer_img].rate


def default_lr_labels(args):
    """The rate by which such labels are learned; that of "learned" for others."""
    learned_by = LABELS[args.labels].optimizer or LABELS["learned"].optimizer
    return learned_by.rate


# Defaults that depend on other flags, and on those above them.
DEPENDENT = {name: own_default(name) for name in OF_OBJECTIVES} | {
    "lr_img": default_lr_img,
    "lr_lr": lambda args: STEP_SIZE_OPTIMIZERS[args.optimizer_lr].rate,
    "lr_labels": default_lr_labels,
    "total_steps": lambda args: args.syn_steps,
}


def add_distillation_flags(parser):
    """Add the flags that only distillation.py has."""
    add = parser.topic("experts")
    add("--max_files", type=count, metavar="N", help="trajectory files to read (default: all)")
    add("--max_experts", type=count, metavar="N", help="experts to read per file (default: all)")
    add("--skip_damaged", type=boolean, default=False, help="continue without damaged files")
    add("--load_all", type=boolean, default=False, help="keep the experts' snapshots on the device")
    add_objective_flags(parser)
    add_learning_flags(parser)
    add_set_flags(parser)
    add_output_flags(parser)


def add_objective_flags(parser):
    """Add those of the objective, and of how it is computed."""
    add = parser.topic("distillation")
    add("--Iteration", type=number(int, 0), default=5000, metavar="N", help="iterations")
    add(
        "--objective",
        type=choice(OBJECTIVES),
        default="trajectory",
        help="of docs/protocol.md: MTT; RaT-BPTT; DC, DSA; DM, CAFE; KIP",
    )
    add("--expert_epochs", type=count, default=3, metavar="M", help="expert epochs to match")
    add("--syn_steps", type=count, default=20, metavar="N", help="steps of the student")
    add("--mom_syn", type=fraction, default=0.0, metavar="μ", help="momentum of these steps")
    add(
        "--max_start_epoch",
        type=count,
        default=25,
        metavar="T⁺",
        help="segments start before this epoch",
    )
    add(
        "--total_steps",
        type=count,
        metavar="T",
        help="with loss: all steps; a random window of N is differentiated (default: N)",
    )
    add(
        "--batch_objective",
        type=count,
        help="real images: loss 512, kip 2048; dc, dsa, dm, cafe: 256 per class",
    )
    add(
        "--segments",
        type=count,
        default=1,
        metavar="S",
        help="segments (or windows, or networks) whose gradients are averaged",
    )
    add("--shard_batch", type=boolean, default=False, help="torchrun's processes share batches")
    add("--batch_syn", type=count, help="synthetic images per step (default: all of them)")
    add(
        "--no_aug",
        type=boolean,
        help="no augmentation during distillation (default: False, dc True)",
    )
    add(
        "--unroll",
        type=choice(UNROLLS),
        default="adjoint",
        help="gradients: adjoint, in memory that hardly grows with N, or autograd, as MTT",
    )
    add(
        "--unroll_memory",
        type=not_negative,
        help="GB of activations kept, not recomputed (default: 1/8 of free memory)",
    )


def add_learning_flags(parser):
    """Add those of the optimisers and of running means."""
    add = parser.topic("what is learned")
    add(
        "--optimizer_img",
        type=choice(IMAGE_OPTIMIZERS),
        help="of the images (default: sgd, kip adam)",
    )
    add(
        "--lr_img",
        type=not_negative,
        help="of the images (default: 1000, adam 0.01; dc, dsa, cafe 0.1, dm 1, kip 0.04)",
    )
    add(
        "--optimizer_lr",
        type=choice(STEP_SIZE_OPTIMIZERS),
        default="sgd",
        help="optimiser of α, or Adam of log α, which keeps α positive",
    )
    add("--lr_lr", type=not_negative, help="rate of α (default: 1e-05, log_adam 0.01)")
    add(
        "--lr_labels",
        type=not_negative,
        help="rate of learned labels (default: 5.0, targets 0.04)",
    )
    add(
        "--ema",
        type=fraction,
        default=0.0,
        metavar="D",
        help="decay of the running means that are evaluated and saved; 0: no means",
    )


def add_set_flags(parser):
    """Add those of the synthetic set: its make-up, and its first images and labels."""
    add = parser.topic("synthetic images")
    add("--ipc", type=count, default=1, metavar="N", help="synthetic images per class")
    add(
        "--factor",
        type=number(int, 1, below=65),
        default=1,
        help="each image holds F × F tiles, each enlarged to an image of its own",
    )
    add(
        "--pix_init",
        type=initial_sets.pix_init,
        default="real",
        metavar="real|noise|SET",
        help="initial images: real ones, noise, or a saved set with its α and labels",
    )
    add(
        "--labels",
        type=choice(LABELS),
        help="hard: classes; soft: the experts' probabilities; learned: soft at first; targets: "
        "kip's (default: hard, kip targets)",
    )
    add(
        "--label_epoch",
        type=count,
        help="epoch of the experts that make the soft labels (default: their last)",
    )
    add("--texture", type=boolean, default=False, help="learn canvases, cut random windows")
    add("--canvas_size", type=count, default=2, help="with --texture: side of a canvas")
    add(
        "--canvas_samples",
        type=count,
        default=1,
        metavar="N",
        help="with --texture: windows per canvas",
    )


def add_output_flags(parser):
    """Add those of the evaluation and of its results."""
    add = parser.topic("evaluation")
    add(
        "--eval_mode",
        type=eval_mode,
        default="S",
        metavar="MODE|NAMES",
        help="networks: S: --model; A, R, M, C, T: others; W, D, P, N: ConvNets; K: and NTK; "
        "or names",
    )
    add(
        "--search_alpha",
        type=boolean,
        default=False,
        help="with --evaluate: choose α for each network, by validation accuracy",
    )
    add("--num_eval", type=count, default=5, metavar="N", help="fresh networks per evaluation")
    add("--eval_it", type=count, default=100, help="iterations between evaluations")
    add(
        "--epoch_eval_train",
        type=count,
        default=1000,
        help="epochs per network; 50 for --evaluate=full",
    )
    add("--batch_real", type=count, default=256, help="batch size for testing")
    add(
        "--evaluate",
        help="only evaluate: a run's folder, images_*.pt, random, herding, k_center or full",
    )
    add(
        "--task",
        type=choice(TASKS),
        help="with --evaluate: what a set is used for, measured (docs/uses.md)",
    )
    add("--export", type=folder_path, help="export the set of --evaluate for other tools")

    add = parser.topic("results")
    add("--log_dir", type=folder_path, default=Path("logged_files"), help="folder of results")
    add("--run_name", type=folder_name, help="run's folder (default: from the settings)")
    add("--checkpoint_every", type=count, default=100, help="iterations between checkpoints")
    add("--resume", type=folder_path, help="resume the run in this folder with its own flags")
    add(
        "--show_bands",
        type=bands,
        metavar="R,G,B",
        help="three of --bands for pictures (default: B04,B03,B02, or the first three)",
    )
    add("--force_save", type=boolean, default=False, help="log pictures also from --ipc=50 on")


def completed(parser, *layers):
    """All flags as a namespace, with the defaults that depend on others. Later layers win."""
    args = parser.complete(*layers)
    for name, default in DEPENDENT.items():
        if getattr(args, name) is None:
            setattr(args, name, default(args))
    return args


def defaults_for(parser, args):
    """The default of each flag, beside the others of `args`."""
    return parser.defaults | {name: default(args) for name, default in DEPENDENT.items()}
