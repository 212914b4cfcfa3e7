"""Train experts on the real images, and keep their trajectories: the parameters after each epoch.

    python expert_trajectories.py --dataset=EuroSAT --model=ConvNet --train_epochs=50 \
        --num_experts=100 --zca --buffer_path=BUF --data_path=DATA

writes BUF/EuroSAT/ConvNet/replay_buffer_0.pt, ..., one expert per file: a list of one trajectory, a
list of snapshots, each a list of tensors. MTT reads it like the files of its `buffer.py`. Beside
each, a .json records what the expert was trained on and how, how well it did, and a checksum. Run
again, the command adds missing experts: expert k depends on seed + k and nothing else. Any number
of these processes, on any machines, can share one folder.

With --amp on one core of an Intel Xeon with AMX, twelve epochs of EuroSAT take ConvNetW32 three and
a half minutes.
"""

import time
import warnings
from contextlib import contextmanager

import torch

import training
import trajectories
import utils
from cli.flags import (
    add_shared_flags,
    check_split,
    expert_folder_of,
    selection_of,
    wandb_options,
)
from cli.parser import Parser
from cli.presets import preset_flags
from cli.types import boolean, count, fraction, not_negative
from datasets import by_name
from reparam_module import student_fault
from run.wandb_page import Dashboard
from system import files, process
from system.machine import set_up
from system.process import ReportedError, stop
from utils import Augment


def add_flags(parser):
    """Add the flags that only this script has."""
    add = parser.topic("experts")
    add("--num_experts", type=count, default=100, metavar="N", help="how many experts to train")
    add("--train_epochs", type=count, default=50, help="epochs of each expert")
    add("--mom", type=fraction, default=0.0, help="momentum")
    add("--l2", type=not_negative, default=0.0, help="weight decay")
    add(
        "--decay",
        type=boolean,
        default=False,
        help="learning rate / 10 after epoch train_epochs // 2 + 1",
    )


def make_parser():
    """The parser of this script's flags."""
    parser = Parser(__doc__)
    add_shared_flags(parser, batch_train=128)
    add_flags(parser)
    return parser


def parse_args():
    parser = make_parser()
    given = parser.given()
    check_split(parser, given)
    return parser.complete(preset_flags(given.get("preset"), "experts"), given)


# --------------------------------------------------------------------------------------------------
# Training


def train_expert(args, data, compiler, seed, dashboard):
    """Train an expert; return its snapshots, before the first epoch and after each, and curves.

    Raises ReportedError if it diverges.
    """
    device = data.train[0].device
    # Initial weights, order of the images and augmentation all follow from the seed.
    random = utils.make_generator("expert", seed)
    network = utils.initial_network(args.model, data.form, random, device)
    forward = compiler(network)
    groups = utils.augment_groups(args.dsa, args.dsa_strategy)
    augment = Augment(data.form.im_size, groups, apply=utils.group_function(compiler, device))
    optimizer = sgd(args, network, args.lr_teacher)
    line_due = process.Interval(60)

    trajectory = [snapshot(network)]  # epochs + 1 in the end
    curves = {"loss": [], "train_accuracy": [], "test_accuracy": []}
    for epoch in range(1, args.train_epochs + 1):
        # A whole epoch is drawn first, which takes one copy to the device, not one per step.
        count = len(data.train[1])
        batches = utils.draw_batches(count, args.batch_train, None, augment, random)
        batches = utils.to_device(batches, device)
        name = f"expert {seed - args.seed}, epoch {epoch} of {args.train_epochs}"
        bar = process.progress(batches, desc=name, unit="batches")
        bar = process.with_lines(bar, line_due, f"{name}: batch")
        # Loss and accuracy are those on the augmented images, as seen in training.
        loss, accuracy = training.train_epoch(forward, optimizer, data.train, augment, bar)
        test_accuracy = training.accuracy(network, forward, *data.test, args.batch_train).mean

        trajectory.append(snapshot(network))
        # Otherwise a student would match NaN for hours.
        if not (loss.isfinite() and all(p.isfinite().all() for p in trajectory[-1])):
            raise ReportedError(
                f"an expert diverged in epoch {epoch}: lower --lr_teacher={args.lr_teacher} or "
                f"--mom={args.mom}"
            )
        for curve, value in zip(curves.values(), (loss, accuracy, test_accuracy)):
            curve.append(round(float(value), 6))  # waits for the device, once per epoch
        latest = {key.title(): curve[-1] for key, curve in curves.items()}
        dashboard.log({"Epoch": epoch} | latest, step=epoch)
        # MTT counts epochs from 0: after its epoch `epochs // 2 + 1`, a fresh optimiser.
        if args.decay and epoch == args.train_epochs // 2 + 2:
            optimizer = sgd(args, network, args.lr_teacher * 0.1)
    return trajectory, curves


def sgd(args, network, rate):
    parameters = network.parameters()
    return torch.optim.SGD(parameters, lr=rate, momentum=args.mom, weight_decay=args.l2)


def snapshot(network):
    """Copies of a network's parameters on the CPU, in `parameters()` order."""
    # `copy`: on a CPU, MTT's snapshots are views of the live weights, so they are all alike.
    layout = {"copy": True, "memory_format": torch.contiguous_format}
    return [p.detach().to("cpu", **layout) for p in network.parameters()]


# --------------------------------------------------------------------------------------------------
# The folder that experts share


def training_settings(args, amp):
    """Settings of the experts' training, for their records."""
    return {
        "epochs": args.train_epochs,
        "batch_size": args.batch_train,
        "lr": args.lr_teacher,
        "mom": args.mom,
        "l2": args.l2,
        "decay": args.decay,
        "dsa": args.dsa and args.dsa_strategy,
        "amp": amp,
        "seed": args.seed,
    }


def seeds_in(folder, settings, read=trajectories.read_record):
    """Seeds of the experts in a folder, whose records `read` returns.

    Raises ReportedError if they were made with other `settings`.
    """
    seeds = set()
    # No lock: a file that exists has a record, and neither changes.
    for path in trajectories.expert_files(folder):
        record = read(path)
        if record is None:
            raise ReportedError(
                f"{path} has no record of its settings, so its folder cannot be shared: use "
                "another --buffer_path"
            )
        files.check_record(path, record["settings"] | record["training"], settings)
        seeds.add(record["expert"]["seed"])
    return seeds


@contextmanager
def claim(folder, settings, seeds):
    """The first of `seeds` whose expert is neither trained nor in training; None if there is none.

    The expert belongs to this process until the block ends or the process dies.
    """
    done = seeds_in(folder, settings)
    # Another process may train any of the others, now or on another machine.
    for seed in (seed for seed in seeds if seed not in done):
        with files.locked(folder, f".expert_{seed}.lock", wait=False) as mine:
            if mine and seed not in seeds_in(folder, settings):  # finished in between
                yield seed
                return
    yield None


def verified(path):
    """The record of an expert, after checking its file's checksum."""
    _, record = trajectories.read_trajectories(path)
    return record


# --------------------------------------------------------------------------------------------------
# Main


def main():
    args = parse_args()
    machine = set_up(args.device, args.compile, args.amp)
    print(machine, flush=True)
    selection = selection_of(args)
    form = selection.form
    # An unknown network is refused here, before the data are loaded.
    network = utils.initial_network(args.model, form, utils.make_generator(0), machine.device)
    fault = student_fault(network)
    if fault:
        warnings.warn(f"distillation.py will refuse these experts, --model={args.model}: {fault}")

    # Experts with other settings are refused before minutes of whitening.
    training = training_settings(args, machine.amp)
    folder = expert_folder_of(args)
    seeds_in(folder, training | {"val_fraction": args.val_fraction})
    raw = by_name.read_dataset(selection)
    settings = raw.settings | {"model": args.model}
    seeds_in(folder, settings | training)
    data = raw.preprocessed(machine.device)
    record = {"settings": settings, "training": training, "versions": process.versions()}
    record["device"] = str(machine)

    # Hours of training are wasted if the folder cannot be written.
    folder.mkdir(parents=True, exist_ok=True)
    wanted = range(args.seed, args.seed + args.num_experts)
    # Checksums are verified once, here: it takes a second per gigabyte.
    here = seeds_in(folder, settings | training, read=verified).intersection(wanted)
    train, val, test = (len(labels) for _, labels in (data.train, data.val, data.test))
    print(f"{train} training, {val} validation, {test} test images ", end="")
    print(f"of {form.num_classes} classes; ", end="")
    print(f"{len(here)} of {args.num_experts} experts are in {folder}", flush=True)
    if args.compile and len(here) < args.num_experts:
        print("the first batch compiles the network, which takes up to a minute", flush=True)

    where = None
    with stop:  # a signal gives the expert up, and this process's claim on it
        while True:
            with claim(folder, settings | training, wanted) as seed:
                if seed is None:
                    break
                line, where = add_expert(args, data, machine.compiler, folder, seed, record)
                machine.ranks.print(line)
    machine.ranks.gather(None)  # until all have trained theirs
    here = seeds_in(folder, settings | training).intersection(wanted)
    others = "" if len(here) == args.num_experts else "; other processes are training the rest"
    print(f"{len(here)} of {args.num_experts} experts are in {folder}{others}")
    if where:
        print(where)


def add_expert(args, data, compiler, folder, seed, record):
    """Train an expert and save it. Returns a line about it, and where it is on wandb."""
    number = seed - args.seed
    page = {  # on wandb, one for each expert
        "name": f"expert {number}",
        "config": record["settings"] | record["training"] | {"expert": number},
        "group": f"experts {folder.parent.name}/{args.model}",
    }
    dashboard = Dashboard(folder, "Epoch", **wandb_options(args), **page)
    start = time.time()
    trajectory, curves = train_expert(args, data, compiler, seed, dashboard)
    seconds = round(time.time() - start, 1)  # without loading the data, which all share
    dashboard.finish()

    expert = {"seed": seed, "seconds": seconds} | curves
    path = trajectories.expert_path(folder, number)
    # Writers take turns, since the holder of the lock removes what killed processes left.
    with files.locked(folder):
        trajectories.save_expert(path, trajectory, record | {"expert": expert})
    return expert_line(number, expert, path.name), dashboard.where_to_look()


def expert_line(number, expert, name):
    train, test = expert["train_accuracy"][-1], expert["test_accuracy"][-1]
    reached = f"loss {expert['loss'][-1]:.4f}, train {train:7.2%}, test {test:7.2%}"
    time = process.duration(expert["seconds"])
    return f"expert {number:<3} {reached}, {time}; in {name}"


if __name__ == "__main__":
    process.run_script(
        main, less_memory="lower --batch_train or --im_size, leave out --zca, or use --amp"
    )
