"""Presets of both scripts. docs/hyperparameters.md says where each comes from, and its result."""

# MTT's experts see all training images, and its best iteration is chosen on the test set.
MTT_EXPERTS = {"num_experts": 100, "train_epochs": 50, "batch_train": 256, "lr_teacher": 0.01}
MTT_RULE = {"val_fraction": 0.0}
CIFAR10 = {"dataset": "CIFAR10"} | MTT_RULE
CIFAR100 = {"dataset": "CIFAR100"} | MTT_RULE
TINY = {"dataset": "ImageFolder", "im_size": 64, "model": "ConvNetD4"} | MTT_RULE
ZCA = {"zca": True}
MTT_FLAGS = ("ipc", "syn_steps", "expert_epochs", "max_start_epoch", "lr_img", "lr_lr")
MTT_FLAGS += ("lr_teacher", "batch_syn")
MTT_TABLE = {  # for both scripts, and values of MTT_FLAGS
    "cifar10-1": (CIFAR10 | ZCA, (1, 50, 2, 2, 100.0, 1e-7, 0.01)),
    "cifar10-10": (CIFAR10 | ZCA, (10, 30, 2, 20, 100.0, 1e-5, 0.001)),
    "cifar10-50": (CIFAR10, (50, 30, 2, 40, 1000.0, 1e-5, 0.001)),
    "cifar100-1": (CIFAR100 | ZCA, (1, 20, 3, 20, 1000.0, 1e-5, 0.01)),
    "cifar100-10": (CIFAR100, (10, 20, 2, 20, 1000.0, 1e-5, 0.01)),
    "cifar100-50": (CIFAR100 | ZCA, (50, 80, 2, 40, 1000.0, 1e-5, 0.01, 125)),
    "tiny-1": (TINY, (1, 10, 2, 10, 10000.0, 1e-4, 0.01)),
    "tiny-10": (TINY, (10, 20, 2, 40, 10000.0, 1e-4, 0.01, 200)),
    "tiny-50": (TINY, (50, 20, 2, 40, 10000.0, 1e-4, 0.01, 300)),
}

EUROSAT = {"dataset": "EuroSAT", "model": "ConvNetW32"}
EUROSAT_EXPERTS = {"num_experts": 8, "train_epochs": 12, "batch_train": 128, "lr_teacher": 0.01}
EUROSAT_RECIPE = {
    "syn_steps": 40,
    "mom_syn": 0.9,
    "expert_epochs": 2,
    "max_start_epoch": 2,
    "labels": "learned",
    "optimizer_img": "adam",
    "lr_img": 0.02,
    "optimizer_lr": "log_adam",
    "lr_teacher": 0.004,
    "ema": 0.99,
    "eval_it": 300,
}
EUROSAT_HARD = {
    "syn_steps": 20,
    "expert_epochs": 2,
    "max_start_epoch": 4,
    "lr_img": 10000.0,
    "lr_lr": 1e-5,
    "lr_teacher": 0.02,
}
EUROSAT_LOSS = {  # continues a set: --pix_init=RUN
    "objective": "loss",
    "syn_steps": 30,
    "total_steps": 150,
    "mom_syn": 0.9,
    "labels": "learned",
    "lr_labels": 1.0,
    "optimizer_img": "adam",
    "lr_img": 0.005,
    "optimizer_lr": "log_adam",
    "lr_lr": 0.005,
    "ema": 0.98,
}
EUROSAT_OTHERS = {  # other objectives, at one and at ten images per class
    "dc": {"Iteration": 300, "eval_it": 100},
    "dsa": {"Iteration": 300, "eval_it": 100},
    "dm": {"Iteration": 300, "eval_it": 150},
    "cafe": {"Iteration": 300, "eval_it": 100},
    "kip": {"Iteration": 1500, "eval_it": 300, "eval_mode": "K"},
}
# α of networks on one image per class of these sets, by validation; on ten it is the default's.
EUROSAT_ALPHAS = {"dc": 0.003, "dsa": 0.003, "dm": 0.001, "cafe": 0.001, "kip": 0.001}
EUROSAT_TABLE = {
    "eurosat-1": {"ipc": 1, "Iteration": 1500} | EUROSAT_RECIPE,
    "eurosat-1-loss": {"ipc": 1, "Iteration": 300} | EUROSAT_LOSS,
    "eurosat-1-tiles": {"ipc": 1, "factor": 2, "Iteration": 300} | EUROSAT_RECIPE,
    "eurosat-1-tiles-loss": {"ipc": 1, "factor": 2, "Iteration": 200} | EUROSAT_LOSS,
    "eurosat-10": {"ipc": 10} | EUROSAT_HARD,
}
EUROSAT_TABLE |= {
    f"eurosat-{ipc}-{objective}": {"objective": objective, "ipc": ipc} | more
    for ipc in (1, 10)
    for objective, more in EUROSAT_OTHERS.items()
}
for objective, alpha in EUROSAT_ALPHAS.items():
    EUROSAT_TABLE[f"eurosat-1-{objective}"]["lr_teacher"] = alpha
DM_10 = EUROSAT_TABLE["eurosat-10-dm"]
EUROSAT_TABLE["eurosat-50-dm"] = DM_10 | {"ipc": 50, "ema": 0.99, "Iteration": 600, "eval_it": 300}
EUROSAT_TABLE["eurosat-10-tiles-dm"] = DM_10 | {"factor": 2, "Iteration": 400, "eval_it": 200}
PRESETS = {
    name: {"experts": data | MTT_EXPERTS, "distillation": data | dict(zip(MTT_FLAGS, values))}
    for name, (data, values) in MTT_TABLE.items()
} | {
    name: {"experts": EUROSAT | EUROSAT_EXPERTS, "distillation": EUROSAT | flags}
    for name, flags in EUROSAT_TABLE.items()
}


def preset_flags(name, script):
    """Print and return a preset's flags (None: none) for "experts" or "distillation"."""
    if name is None:
        return {}
    flags = PRESETS[name][script]
    words = " ".join(f"--{key}={value}" for key, value in flags.items())
    print(f"--preset={name}: {words}", flush=True)
    return flags
