"""Train experts on the real images and keep their trajectories: the parameters at initialisation and after every epoch.

    python expert_trajectories.py --dataset=EuroSAT --model=ConvNet --train_epochs=50 --num_experts=100 --zca \
        --buffer_path=BUF --data_path=DATA

writes BUF/EuroSAT/ConvNet/replay_buffer_0.pt, ..., ten experts in each: lists of experts, of snapshots, of tensors, as
MTT's `buffer.py` does. Beside each file, a .json records what the experts were trained on and how, how well they did,
and a checksum. Every expert is saved as soon as it is trained. Run again, the command adds those that are missing:
expert k depends on seed + k and nothing else. Any number of such processes, on any machines, can share one folder.

With --amp on one core of an AMD EPYC, eight epochs of EuroSAT take ConvNetW32 four minutes, and ConvNet half an hour.
"""

import time
from contextlib import contextmanager

import torch

import datasets
import files
import presets
import report
import utils
from datasets import Data
from files import ReportedError
from trajectories import add_expert, expert_files, expert_folder, read_record, read_trajectories


def parse_args():
    parser = utils.Parser(__doc__.splitlines()[0])
    presets.add_flag(parser)
    datasets.add_flags(parser)
    utils.add_shared_flags(parser, batch_train=128)
    add = parser.topic("experts")
    add("--num_experts", type=utils.count, default=100, metavar="N", help="how many experts to train")
    add("--train_epochs", type=utils.count, default=50, metavar="EPOCHS", help="epochs of each expert")
    add("--mom", type=utils.number(float, 0, below=1), default=0.0, metavar="[0,1)", help="momentum")
    add("--l2", type=utils.not_negative, default=0.0, metavar="RATE", help="weight decay")
    utils.add_flag(add, "--decay", help="a tenth of the learning rate after epoch train_epochs // 2 + 1")
    add("--save_interval", type=utils.count, default=10, metavar="N", help="experts per file")
    return presets.parse_args(parser, "experts")


def snapshot(network):
    """Copies of a network's parameters on the CPU, in `parameters()` order."""
    return [p.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for p in network.parameters()]


def train_expert(network, logits, data: Data, augment, generator, bar, log, *, epochs, batch_size, lr, mom, l2, decay):
    """Train `network` on the real images: its `epochs` + 1 snapshots, and what it reached after each epoch.

    `log` takes the latter, too, as soon as it is known.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=mom, weight_decay=l2)
    trajectory, curves = [snapshot(network)], {"loss": [], "train_accuracy": [], "test_accuracy": []}
    for epoch in range(epochs):
        loss, train_accuracy = utils.train_epoch(logits, optimizer, *data.train, batch_size, augment, generator, bar)
        test_accuracy, _ = utils.accuracy(network, logits, *data.test, batch_size)
        trajectory.append(snapshot(network))
        if not (loss.isfinite() and all(p.isfinite().all() for p in trajectory[-1])):
            raise ReportedError(f"an expert diverged in epoch {epoch + 1}: lower --lr_teacher={lr} or --mom={mom}")
        for curve, value in zip(curves.values(), (loss, train_accuracy, test_accuracy)):
            curve.append(round(float(value), 6))
        log({"Epoch": epoch + 1} | {key.title(): curve[-1] for key, curve in curves.items()}, step=epoch + 1)
        bar.set_postfix(loss=f"{loss:.3f}", train=f"{train_accuracy:.1%}", test=f"{test_accuracy:.1%}",
                        refresh=False)
        if decay and epoch == epochs // 2 + 1:
            optimizer = torch.optim.SGD(network.parameters(), lr=lr * 0.1, momentum=mom, weight_decay=l2)
    return trajectory, curves


def experts_in(folder, settings, read=read_record):
    """Seeds of the experts that a folder holds. Raises ReportedError where they were made with other `settings`.

    `read` is what a file's record is read with.
    """
    seeds = set()
    if not folder.exists():
        return seeds
    with files.locked(folder):  # file and record are never seen while one of them is being replaced
        for path in expert_files(folder):
            record = read(path)
            if record is None:
                raise ReportedError(f"{path} has no record of its settings: remove it, or use another --buffer_path")
            files.check_record(path, record["settings"] | record["training"], settings)
            seeds |= {expert["seed"] for expert in record["experts"]}
    return seeds


@contextmanager
def claim(folder, settings, seeds):
    """The first of `seeds` whose expert is neither in the folder nor being trained by another process, or None.

    The expert belongs to this process until the end of the block, or until the process dies.
    """
    done = experts_in(folder, settings)
    for seed in (seed for seed in seeds if seed not in done):
        with files.locked(folder, f".expert_{seed}.lock", wait=False) as mine:
            if mine and seed not in experts_in(folder, settings):  # another may have finished it in between
                yield seed
                return
    yield None


def main():
    args = parse_args()
    device = utils.check_device(args.device)
    args.amp = utils.check_amp(args.amp, device)
    form = datasets.form_of(args.dataset, args.data_path, args.im_size)
    utils.initial_network(args.model, form, utils.make_generator(0), device)  # before the data: refuses unknown names

    hyperparameters = {"epochs": args.train_epochs, "batch_size": args.batch_train, "lr": args.lr_teacher,
                       "mom": args.mom, "l2": args.l2, "decay": args.decay}
    training = hyperparameters | {"dsa": args.dsa and args.dsa_strategy, "amp": args.amp, "seed": args.seed}
    folder = expert_folder(args.buffer_path, args.dataset, args.zca, args.model)
    experts_in(folder, training | {"val_fraction": args.val_fraction})  # refused before minutes of whitening
    data = datasets.load_data(args.dataset, args.data_path, args.zca, args.val_fraction, device, args.im_size)
    augment = utils.make_augment(args.dsa, args.dsa_strategy)
    runner = utils.Runner(args.compile, args.amp)
    settings = data.settings | {"model": args.model}
    record = {"settings": settings, "training": training, "versions": utils.versions()}

    folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is better found out now
    done = experts_in(folder, settings | training, read=lambda path: read_trajectories(path)[1])  # with checksums
    seeds = range(args.seed, args.seed + args.num_experts)
    here = len(done.intersection(seeds))
    print(f"{len(data.train[1])} training, {len(data.val[1])} validation, {len(data.test[1])} test images of "
          f"{data.form.num_classes} classes; {here} of {args.num_experts} experts are in {folder}", flush=True)

    place, batches = "", -(-len(data.train[1]) // args.batch_train)
    while True:
        with claim(folder, settings | training, seeds) as seed:
            if seed is None:
                break
            generator, start = utils.make_generator("expert", seed), time.time()
            network = utils.initial_network(args.model, form, generator, device)
            name = f"expert {seed - args.seed}"
            run = report.Dashboard(folder, name, settings | training | {"expert": seed - args.seed}, "Epoch",
                                   mode=args.wandb_mode, project=args.wandb_project, entity=args.wandb_entity,
                                   group=f"experts {folder.parent.name}/{args.model}")
            with utils.progress(total=args.train_epochs * batches, desc=name, unit="batches", leave=False) as bar:
                trajectory, curves = train_expert(network, runner(network), data, augment, generator, bar, run.log,
                                                  **hyperparameters)
            run.finish()
            place = run.place("the .json beside each trajectory file has the curves")
            expert = {"seed": seed, "seconds": round(time.time() - start, 1)} | curves
            path = folder / f"replay_buffer_{(seed - args.seed) // args.save_interval}.pt"
            with files.locked(folder):
                add_expert(path, trajectory, expert, record)
            print(f"{name:10} loss {curves['loss'][-1]:.4f}, train {curves['train_accuracy'][-1]:7.2%}, "
                  f"test {curves['test_accuracy'][-1]:7.2%}, {utils.duration(expert['seconds'])}; in {path.name}",
                  flush=True)
    done = experts_in(folder, settings | training).intersection(seeds)
    others = ", others are being trained by other processes" if len(done) < args.num_experts else ""
    print(f"{len(done)} of {args.num_experts} experts are in {folder}{others}")
    if place:
        print(place)


if __name__ == "__main__":
    utils.run_script(main, less_memory="lower --batch_train or --im_size, leave out --zca, or use --amp")
