"""Settings by name, for --preset. docs/hyperparameters.md says where each of them comes from, and what it reached."""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Flags, as they are written in a shell."""

    data: str  # of both scripts
    experts: str  # of expert_trajectories.py alone
    distillation: str  # of distillation.py alone


MTT_EXPERTS = "--num_experts=100 --train_epochs=50 --batch_train=256 --lr_teacher=0.01"
EUROSAT_EXPERTS = "--num_experts=20 --train_epochs=8 --batch_train=128 --lr_teacher=0.01"
MTT_RULE = "--val_fraction=0"  # experts see all training images, and the best iteration is chosen on the test set
CIFAR10, CIFAR100 = f"--dataset=CIFAR10 {MTT_RULE}", f"--dataset=CIFAR100 {MTT_RULE}"
TINY = f"--dataset=ImageFolder --im_size=64 --model=ConvNetD4 {MTT_RULE}"

PRESETS = {
    "cifar10-1": Preset(f"{CIFAR10} --zca", MTT_EXPERTS, "--ipc=1 --syn_steps=50 --expert_epochs=2 --max_start_epoch=2 "
                        "--lr_img=100 --lr_lr=1e-07 --lr_teacher=0.01"),
    "cifar10-10": Preset(f"{CIFAR10} --zca", MTT_EXPERTS, "--ipc=10 --syn_steps=30 --expert_epochs=2 "
                         "--max_start_epoch=20 --lr_img=100 --lr_lr=1e-05 --lr_teacher=0.001"),
    "cifar10-50": Preset(CIFAR10, MTT_EXPERTS, "--ipc=50 --syn_steps=30 --expert_epochs=2 --max_start_epoch=40 "
                         "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.001"),
    "cifar100-1": Preset(f"{CIFAR100} --zca", MTT_EXPERTS, "--ipc=1 --syn_steps=20 --expert_epochs=3 "
                         "--max_start_epoch=20 --lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01"),
    "cifar100-10": Preset(CIFAR100, MTT_EXPERTS, "--ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=20 "
                          "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01"),
    "cifar100-50": Preset(f"{CIFAR100} --zca", MTT_EXPERTS, "--ipc=50 --syn_steps=80 --expert_epochs=2 "
                          "--max_start_epoch=40 --lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --batch_syn=125"),
    "eurosat-1": Preset("--dataset=EuroSAT", EUROSAT_EXPERTS, "--ipc=1 --syn_steps=20 --expert_epochs=2 "
                        "--max_start_epoch=2 --lr_img=10000 --lr_lr=1e-05 --lr_teacher=0.02"),
    "eurosat-10": Preset("--dataset=EuroSAT", EUROSAT_EXPERTS, "--ipc=10 --syn_steps=20 --expert_epochs=2 "
                         "--max_start_epoch=4 --lr_img=10000 --lr_lr=1e-05 --lr_teacher=0.02"),
    "eurosat-50": Preset("--dataset=EuroSAT", EUROSAT_EXPERTS, "--ipc=50 --syn_steps=20 --expert_epochs=2 "
                         "--max_start_epoch=5 --lr_img=10000 --lr_lr=1e-05 --lr_teacher=0.02 --batch_syn=100"),
    "tiny-1": Preset(TINY, MTT_EXPERTS, "--ipc=1 --syn_steps=10 --expert_epochs=2 --max_start_epoch=10 "
                     "--lr_img=10000 --lr_lr=0.0001 --lr_teacher=0.01"),
    "tiny-10": Preset(TINY, MTT_EXPERTS, "--ipc=10 --syn_steps=20 --expert_epochs=2 --max_start_epoch=40 "
                      "--lr_img=10000 --lr_lr=0.0001 --lr_teacher=0.01 --batch_syn=200"),
    "tiny-50": Preset(TINY, MTT_EXPERTS, "--ipc=50 --syn_steps=20 --expert_epochs=2 --max_start_epoch=40 "
                      "--lr_img=10000 --lr_lr=0.0001 --lr_teacher=0.01 --batch_syn=300"),
}


def add_flag(parser):
    parser.topic("data")("--preset", choices=sorted(PRESETS), metavar="NAME",
                         help=f"settings by name, other flags win: {', '.join(PRESETS)}")


def parse_args(parser, script):
    """The command line's flags, those of its --preset for a `script` ("experts", "distillation") before them."""
    args = parser.parse_args()
    if not args.preset:
        return args
    preset = PRESETS[args.preset]
    flags = [*preset.data.split(), *getattr(preset, script).split()]
    print(f"--preset={args.preset}: {' '.join(flags)}", flush=True)
    return parser.parse_args([*flags, *sys.argv[1:]])  # of two, the last one counts
