"""Flags of distillation.py that exclude each other."""

from cli.distillation_flags import defaults_for
from cli.flags import check_split
from datasets.bands import RGB
from datasets.coresets import REAL_SETS, is_saved
from evaluation import names_in
from kernels import KERNELS
from objectives import OBJECTIVES
from reparam_module import UNROLLS
from run.rules import LABELS
from uses import TASKS

# A set learned from all training images has seen those that would choose for it.
WITH_VALIDATION = (
    "give --val_fraction=0.1, for a set that was made with it; others take --lr_teacher, and "
    "--task=size"
)


def check_objective(parser, args):
    """Refuse flags that have no meaning for the objective."""
    objective = OBJECTIVES[args.objective]
    if args.labels not in objective.labels:
        known = " or ".join(objective.labels)
        reason = f"--objective={args.objective} takes --labels={known}"
        parser.error(f"--labels={args.labels}: {reason}")
    defaults = defaults_for(parser, args)
    for name in objective.refuses:
        value = getattr(args, name)
        if value != defaults[name]:
            reason = f"it has no meaning for --objective={args.objective}: leave it out"
            parser.error(f"--{name}={value}: {reason}")


def check_combinations(parser, args):
    """Refuse flags of distillation.py that cannot be combined."""
    # An evaluation has no objective, and a resumed run's flags were checked when it started.
    if not (args.evaluate or args.resume):
        check_objective(parser, args)
    if args.total_steps < args.syn_steps:
        reason = f"lower than --syn_steps={args.syn_steps}, which are part of them"
        parser.error(f"--total_steps={args.total_steps} is {reason}")
    is_soft = LABELS[args.labels].soft
    if is_soft and args.texture:
        reason = "experts do not take canvases: leave one out"
        parser.error(f"--labels={args.labels} and --texture cannot be combined: {reason}")
    if args.label_epoch and not is_soft:
        reason = "hard labels are the classes: add --labels=soft or learned"
        parser.error(f"--label_epoch={args.label_epoch}: {reason}")
    if args.shard_batch and not UNROLLS[args.unroll].shards_batches:
        parser.error(f"--shard_batch and --unroll={args.unroll} cannot be combined: leave one out")
    for name in ("texture", "zca"):
        if args.factor > 1 and getattr(args, name):
            reason = "tiles are parts of plain images: leave one out"
            parser.error(f"--factor={args.factor} and --{name} cannot be combined: {reason}")
    real = REAL_SETS.get(args.evaluate)
    if args.factor > 1 and real and not real.takes_tiles:
        reason = "only random images are cut into tiles: leave one out"
        parser.error(f"--factor={args.factor} and --evaluate={args.evaluate}: {reason}")
    if args.search_alpha and not args.val_fraction:
        parser.error(f"--search_alpha needs validation images: {WITH_VALIDATION}")
    if args.texture and any(name in KERNELS for name in names_in(args.eval_mode)):
        reason = "kernel machines do not take canvases: leave one out"
        parser.error(f"--eval_mode={args.eval_mode} and --texture cannot be combined: {reason}")
    if args.task and TASKS[args.task].needs_validation and not args.val_fraction:
        reason = f"validation images choose α: {WITH_VALIDATION}"
        parser.error(f"--task={args.task} and --val_fraction=0 cannot be combined: {reason}")
    if args.show_bands and args.bands == RGB:
        reason = f"pictures show all three bands of --bands={RGB}: leave it out"
        parser.error(f"--show_bands={args.show_bands}: {reason}")
    if args.zca and args.texture:
        reason = "whitening is fitted to whole images: leave one out"
        parser.error(f"--zca and --texture cannot be combined: {reason}")


def check_commands(parser, given):
    """Refuse commands of distillation.py that contradict each other."""
    check_split(parser, given)
    if "resume" in given:
        if given["resume"].is_file():
            folder = given["resume"].parent
            parser.error(f"--resume={given['resume']} is a file: name the run's folder, {folder}")
        for name in ("run_name", "log_dir", "evaluate", "preset"):
            if name in given:
                parser.error(f"--resume and --{name} cannot be combined: leave one out")
    what = given.get("evaluate")
    if what == "":
        names = ", ".join(REAL_SETS)
        parser.error(f"--evaluate='' names nothing: give a run's folder, images_*.pt, {names}")
    if is_saved(what):
        for name in ("labels", "label_epoch"):
            if name in given:
                parser.error(f"--{name}={given[name]}: a saved set has its labels: leave it out")
    elif what and "labels" in given and LABELS[given["labels"]].learned:
        labels = given["labels"]
        parser.error(f"--labels={labels}: nothing is learned of --evaluate={what}: hard or soft")
    if given.get("search_alpha") and not what:
        parser.error("--search_alpha needs --evaluate: in a run, α is learned")
    if "export" in given and not is_saved(what):
        parser.error("--export needs --evaluate with a saved set")
    if "export" in given and given.get("search_alpha"):
        parser.error("--search_alpha and --export cannot be combined: no network is trained")
    if "task" in given:
        check_task(parser, given)


def check_task(parser, given):
    """Refuse flags beside --task that cannot be had with it."""
    task, name = TASKS[given["task"]], given["task"]
    if not is_saved(given.get("evaluate")):
        parser.error(f"--task={name} needs --evaluate with a saved set")
    if "export" in given:
        parser.error(f"--task={name} and --export cannot be combined: leave one out")
    if "eval_mode" in given and not task.eval_mode:
        reason = "it trains networks called --model: leave it out"
        parser.error(f"--task={name} and --eval_mode cannot be combined: {reason}")
    for flag in ("lr_teacher", "search_alpha"):
        if flag in given and not task.own_alpha:
            reason = "it chooses α for each network: leave it out"
            parser.error(f"--task={name} and --{flag} cannot be combined: {reason}")
