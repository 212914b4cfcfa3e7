"""The flags that both scripts have, by topic."""

import os
from dataclasses import fields
from pathlib import Path

import torch

import trajectories
from cli.presets import PRESETS
from cli.types import (
    bands,
    boolean,
    choice,
    count,
    dataset,
    folder_path,
    fraction,
    model,
    number,
    positive,
    strategy,
    wandb_name,
)
from datasets.bands import RGB
from datasets.by_name import DATASETS, IM_SIZE, Selection
from utils import DSA_STRATEGY

WANDB_PROJECT = "DatasetDistillation"


def add_shared_flags(parser, batch_train):
    """Add the flags of both scripts; `batch_train` is the script's own default batch size."""
    add_data_flags(parser)
    add_network_flags(parser, batch_train)
    add_machine_flags(parser)


def add_data_flags(parser):
    """Add those of the data and the experts' folder."""
    side = number(int, 2, below=4097)
    add = parser.topic("data")
    add(
        "--preset",
        type=choice(PRESETS),
        help="settings of docs/hyperparameters.md, by name; other flags override them",
    )
    add("--dataset", type=dataset, default="EuroSAT", metavar="NAME", help=", ".join(DATASETS))
    add("--data_path", type=folder_path, default=Path("data"), help="data set and its caches")
    add("--im_size", type=side, help=f"image side, for ImageFolder and ToySAT (default: {IM_SIZE})")
    add(
        "--bands",
        type=bands,
        default=RGB,
        metavar="rgb|all|NAMES",
        help="of GeoTIFFs: B02,B03,B04,B08, for ImageFolder positions as 1,2,3,7",
    )
    add(
        "--fill_nodata",
        type=number(float, -1e30, below=1e30),
        metavar="VALUE",
        help="with --bands: value for NaN and nodata (default: such files are refused)",
    )
    add("--zca", type=boolean, default=False, help="whiten, instead of normalising channels")
    add(
        "--val_fraction",
        type=fraction,
        default=0.1,
        metavar="[0,1)",
        help="share of training images that select the best iteration; 0: the test set",
    )
    add(
        "--split",
        type=folder_path,
        metavar="FILE|FOLDER",
        help="list NAME-train.txt (beside NAME-val.txt and NAME-test.txt), or its folder",
    )
    add("--buffer_path", type=folder_path, default=Path("buffers"), help="expert trajectories")


def add_network_flags(parser, batch_train):
    """Add those of networks and their training."""
    add = parser.topic("network and training")
    add(
        "--model",
        type=model,
        default="ConvNet",
        help="ConvNet and variants (ConvNetD4, ConvNetW32), MLP, ResNet18, VGG11, VGG16",
    )
    add("--lr_teacher", type=positive, default=0.01, help="experts' rate; initial α")
    add("--batch_train", type=count, default=batch_train, help="batch size of networks")
    add("--dsa", type=boolean, default=True, help="differentiable augmentation; False: plain")
    add(
        "--dsa_strategy",
        type=strategy,
        default=DSA_STRATEGY,
        help="DSA groups, one of which is drawn per batch",
    )


def add_machine_flags(parser):
    """Add those of the machine, and of Weights & Biases."""
    has_cuda = torch.cuda.is_available()
    add = parser.topic("machine")
    add(
        "--seed",
        type=number(int, 0, below=2**31),
        default=0,
        metavar="N",
        help="of everything random",
    )
    add("--device", default="cuda" if has_cuda else "cpu", metavar="NAME", help="torch device")
    add("--compile", type=boolean, default=True, help="torch.compile all networks")
    off = {"dest": "compile", "action": "store_false"}
    parser.topics["machine"].add_argument("--no-compile", help="the same as --compile=False", **off)
    add("--amp", type=boolean, default=False, help="compute in bfloat16")

    add = parser.topic("Weights & Biases")
    add(
        "--wandb_mode",
        type=choice(("online", "offline", "disabled")),
        help="default: online, if logged in",
    )
    add(
        "--wandb_project",
        type=wandb_name,
        help=f"project (default: WANDB_PROJECT, or {WANDB_PROJECT})",
    )
    add("--wandb_entity", type=wandb_name, help="user or team (default: yours)")


def check_split(parser, given):
    """Refuse --val_fraction beside --split."""
    if given.get("split") and "val_fraction" in given:
        reason = "the lists say which images are for validation: leave it out"
        parser.error(f"--split and --val_fraction={given['val_fraction']}: {reason}")


def selection_of(args):
    """The `Selection` of data that flags make."""
    return Selection(**{field.name: getattr(args, field.name) for field in fields(Selection)})


def expert_folder_of(args):
    """The folder of the trajectory files of --model."""
    return trajectories.expert_folder(args.buffer_path, args.dataset, args.zca, args.model)


def experts_of(args, student):
    """The `Experts` in that folder, as the flags of distillation.py choose them."""
    chosen = args.max_files, args.max_experts, args.skip_damaged
    return trajectories.load_experts(expert_folder_of(args), student.shapes, *chosen)


def wandb_options(args):
    """The page of a run on Weights & Biases, as arguments of `wandb_page.Dashboard`."""
    return {
        "mode": args.wandb_mode,
        "project": args.wandb_project or os.environ.get("WANDB_PROJECT") or WANDB_PROJECT,
        "entity": args.wandb_entity,
    }
