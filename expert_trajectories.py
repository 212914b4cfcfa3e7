"""Train experts on the real images and keep their trajectories: the parameters at initialisation and after every epoch.

    python expert_trajectories.py --dataset=EuroSAT --model=ConvNet --train_epochs=50 --num_experts=100 --zca \
        --buffer_path=BUF --data_path=DATA

writes BUF/EuroSAT/ConvNet/replay_buffer_0.pt, ..., ten experts in each: lists of experts, of snapshots, of tensors, as
MTT's `buffer.py` does. Beside each file, a .json records what the experts were trained on and how, and how well they
did. Every expert is saved as soon as it is trained. Run again, the command adds those that are missing: expert k
depends on seed + k and nothing else.

With --amp on one core of an AMD EPYC, eight epochs of EuroSAT take ConvNetW32 four minutes, and ConvNet half an hour.
"""

import time

import torch
from tqdm import tqdm

import utils
from utils import Data, ReportedError


def parse_args():
    parser = utils.Parser(__doc__.splitlines()[0])
    utils.add_shared_flags(parser, batch_train=128)
    add = parser.add_argument
    add("--num_experts", type=utils.count, default=100, help="how many experts to train")
    add("--train_epochs", type=utils.count, default=50, help="epochs of each expert")
    add("--mom", type=utils.number(float, 0, below=1), default=0.0, help="momentum")
    add("--l2", type=utils.not_negative, default=0.0, help="weight decay")
    utils.add_flag(parser, "--decay", help="a tenth of the learning rate after epoch train_epochs // 2 + 1")
    add("--save_interval", type=utils.count, default=10, help="experts per file")
    return parser.parse_args()


def snapshot(network):
    """Copies of a network's parameters on the CPU, in `parameters()` order."""
    return [p.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for p in network.parameters()]


def train_expert(network, logits, data: Data, augment, generator, bar, *, epochs, batch_size, lr, mom, l2, decay):
    """Train `network` on the real images: its `epochs` + 1 snapshots, and what it reached after each epoch."""
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=mom, weight_decay=l2)
    trajectory, curves = [snapshot(network)], {"loss": [], "train_accuracy": [], "test_accuracy": []}
    for epoch in range(epochs):
        loss, train_accuracy = utils.train_epoch(logits, optimizer, *data.train, batch_size, augment, generator, bar)
        if not loss.isfinite():
            raise ReportedError(f"an expert diverged in epoch {epoch + 1}: lower --lr_teacher={lr} or --mom={mom}")
        test_accuracy = utils.accuracy(network, logits, *data.test, batch_size)
        trajectory.append(snapshot(network))
        for curve, value in zip(curves.values(), (loss, train_accuracy, test_accuracy)):
            curve.append(round(float(value), 6))
        bar.set_postfix(loss=f"{loss:.3f}", train=f"{train_accuracy:.1%}", test=f"{test_accuracy:.1%}")
        if decay and epoch == epochs // 2 + 1:
            optimizer = torch.optim.SGD(network.parameters(), lr=lr * 0.1, momentum=mom, weight_decay=l2)
    return trajectory, curves


def read_group(folder, settings, save_interval):
    """What a folder holds already, checked against `settings`.

    Returns the number of files of whole groups and of the experts in them, and the trajectories and records of a last,
    partial group, which is to be completed.
    """
    num_files, num_experts = 0, 0
    files = utils.expert_files(folder)
    for path in files:
        record = utils.read_record(path)
        if record is None:
            raise ReportedError(f"{path} has no record of its settings: remove it, or use another --buffer_path")
        utils.check_record(path, record["settings"] | record["training"], settings)
        if path == files[-1] and len(record["experts"]) < save_interval:
            # The record is written last: experts beyond it come from a run that was killed in between.
            return num_files, num_experts, utils.read_trajectories(path)[:len(record["experts"])], record["experts"]
        num_files, num_experts = num_files + 1, num_experts + len(record["experts"])
    return num_files, num_experts, [], []


def main():
    args = parse_args()
    device = utils.check_device(args.device)
    args.amp = utils.check_amp(args.amp, device)
    utils.initial_network(args.model, utils.make_generator(0), device)  # before the data: refuses unknown names
    data = utils.load_data(args.dataset, args.data_path, args.zca, args.val_fraction, device)
    augment = utils.make_augment(args.dsa, args.dsa_strategy)
    runner = utils.Runner(args.compile, args.amp)

    hyperparameters = {"epochs": args.train_epochs, "batch_size": args.batch_train, "lr": args.lr_teacher,
                       "mom": args.mom, "l2": args.l2, "decay": args.decay}
    settings = data.settings | {"model": args.model}
    training = hyperparameters | {"dsa": args.dsa and args.dsa_strategy, "amp": args.amp, "seed": args.seed}
    folder = utils.expert_folder(args.buffer_path, args.dataset, args.zca, args.model)
    file, done, trajectories, experts = read_group(folder, settings | training, args.save_interval)
    done += len(experts)
    folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is better found out now
    print(f"{len(data.train[1])} training, {len(data.val[1])} validation, {len(data.test[1])} test images; "
          f"{done} of {args.num_experts} experts are in {folder}")

    batches = -(-len(data.train[1]) // args.batch_train)
    for k in range(done, args.num_experts):
        generator, start = utils.make_generator("expert", args.seed + k), time.time()
        network = utils.initial_network(args.model, generator, device)
        with tqdm(total=args.train_epochs * batches, desc=f"expert {k}", unit="batches", mininterval=1) as bar:
            trajectory, curves = train_expert(network, runner(network), data, augment, generator, bar,
                                              **hyperparameters)
        trajectories.append(trajectory)
        experts.append({"seed": args.seed + k, "seconds": round(time.time() - start, 1)} | curves)
        record = {"settings": settings, "training": training, "versions": utils.versions(), "experts": experts}
        path = folder / f"replay_buffer_{file}.pt"
        utils.write_trajectories(path, trajectories, record)
        trajectories = utils.read_trajectories(path)  # by memory map, to have no more than one expert in memory
        if len(trajectories) == args.save_interval or k == args.num_experts - 1:
            print(f"saved {path}: {len(experts)} experts")
        if len(trajectories) == args.save_interval:
            file, trajectories, experts = file + 1, [], []


if __name__ == "__main__":
    utils.run_script(main)
