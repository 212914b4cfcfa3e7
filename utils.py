"""What both scripts share, each section using only those above it.

shared flags and seeding
augmentation: differentiable Siamese (DSA) and plain
training and evaluating a network
"""

import argparse
import ctypes
import hashlib
import logging
import math
import os
import platform
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import kornia
import numpy as np
import scipy.ndimage
import torch
import torchvision
from torch.nn import functional as F
from tqdm import tqdm

import files
from files import ReportedError, first_line
from networks import ALIASES, get_network

# ---------------------------------------------------------------------------------------------------------------------
# Shared flags and seeding

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind every flag that has one; wide enough that most flags need one line."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size((100, 24)).columns))

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag gets one line on standard error, no flag may be abbreviated, and help has topics."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False,
                         usage="%(prog)s [flags]")
        self.topics = {}

    def topic(self, title):
        """`add_argument` for flags that help lists under `title`."""
        if title not in self.topics:
            self.topics[title] = self.add_argument_group(title)
        return self.topics[title].add_argument

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def keep_freed_memory():
    """Let glibc keep the memory that is freed. Giving large tensors back to the system costs a tenth of the time."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc: macOS, Windows, musl
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


class Stopped(Exception):
    """SIGTERM or SIGINT came, see `Stop`; `run_script` exits with 128 + the signal's number, as shells expect.

    Made from that number, and what is saved.
    """


class Stop:
    """Within `with stop:`, SIGTERM and SIGINT only leave a note, and `stop.check()` raises `Stopped` where it suits.

    A second signal ends the process at once, as ever.
    """

    def __init__(self):
        self.signal, self.handlers = None, {}

    def __enter__(self):
        self.signal = None
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)
                         if signal.getsignal(number) != signal.SIG_IGN}  # as of a background job

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.signal = number
        self.__exit__()

    def check(self):
        if self.signal:
            raise Stopped(self.signal, "")


stop = Stop()  # one for the process, as signal handlers are


def run_script(main, less_memory):
    """Run a script's `main`; a fault that the user can mend becomes one line on standard error and exit code 2.

    `less_memory` says which flags need less of it.
    """
    keep_freed_memory()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns of CUDA without a GPU
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        main()
    except (ReportedError, OSError) as error:  # an OSError names the file that cannot be read or written, and why
        code, text = 2, f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if not files.is_out_of_memory(error):
            raise
        code, text = 2, f"error: out of memory ({first_line(error)}): {less_memory}"
    except (Stopped, KeyboardInterrupt) as error:
        number, saved = error.args or (signal.SIGINT, "")
        saved = saved or "the same command begins again, or goes on from what an earlier one has saved"
        code, text = 128 + number, f"stopped by {signal.Signals(number).name}; {saved}"
    else:
        return
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    sys.exit(code)


def boolean(text):
    """The booleans of MTT's commands (`--dsa True`); argparse's own `type=bool` takes "False" for true."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def number(kind, minimum, *, exclusive=False, below=math.inf):
    """An argparse type: a number from `minimum` (above it, if `exclusive`) to less than `below`; NaN is refused."""
    what = "a whole number" if kind is int else "a number"
    limit = f"{'more than' if exclusive else 'at least'} {minimum}" + f" and less than {below}" * (below < math.inf)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not minimum <= value < below or (exclusive and value == minimum):  # NaN fails the first comparison
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {limit}")
        return value

    return parse


count = number(int, 1, below=2**31)
positive, not_negative = number(float, 0, exclusive=True, below=1e30), number(float, 0, below=1e30)  # fit into float32


def expanded_path(text):
    """A folder's path; `~` is expanded here, since shells leave it alone after `--flag=`."""
    return Path(os.path.expanduser(text))  # pathlib's raises an error for an unknown user


def strategy(text):
    """A DSA strategy: some groups of `DSA_STRATEGY`, joined by underscores."""
    unknown = [group for group in text.split("_") if group not in DSA_STRATEGY.split("_")]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown group {unknown[0]!r}: join some of {DSA_STRATEGY} by underscores")
    return text


def wandb_name(text):
    """A name that wandb takes."""
    if not text or any(c in text for c in "/\\#?%:"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name on wandb: at least one character, none of /\\#?%:")
    return text


def add_flag(add, name, default=False, help=""):
    """By `add`, a flag that is on when given bare, and also takes True or False."""
    add(name, type=boolean, nargs="?", const=True, default=default, metavar="True|False", help=help)


def add_shared_flags(parser, batch_train):
    """The flags that both scripts understand; `batch_train` is the script's own default batch size."""
    add = parser.topic("data")
    add("--buffer_path", type=expanded_path, default=Path("buffers"), metavar="DIR",
        help="folder of the expert trajectories")
    add = parser.topic("network and training")
    add("--model", type=lambda name: ALIASES.get(name, name), default="ConvNet", metavar="NAME",
        help="network: ConvNet (and variants such as ConvNetD4, ConvNetW32), MLP, ResNet18, VGG16")
    add("--lr_teacher", type=positive, default=0.01, metavar="RATE",
        help="experts' learning rate; in distillation.py, where α starts")
    add("--batch_train", type=count, default=batch_train, metavar="IMAGES",
        help="images per batch when training a network")
    add_flag(add, "--dsa", default=True, help="differentiable Siamese augmentation; False: plain augmentation")
    add("--dsa_strategy", type=strategy, default=DSA_STRATEGY, metavar="GROUPS",
        help="DSA groups, one of which is drawn per batch")
    add = parser.topic("machine")
    add("--seed", type=number(int, 0, below=2**31), default=0, metavar="N", help="everything random follows from it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME",
        help="torch device; cuda where there is one")
    add("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="torch.compile experts, student and evaluation networks")
    add_flag(add, "--amp", help="experts, student and evaluation networks in bfloat16 (autocast)")
    add = parser.topic("Weights & Biases")
    add("--wandb_mode", choices=("online", "offline", "disabled"), help="default: online when logged in, else offline")
    add("--wandb_project", type=wandb_name, default="DatasetDistillation", metavar="NAME", help="wandb project")
    add("--wandb_entity", type=wandb_name, metavar="NAME", help="wandb user or team (default: yours)")


class LogLines(tqdm):
    """What a bar shows, as a line a minute: for standard error that is a file."""

    seconds = 60

    def __init__(self, iterable=None, **options):
        self.last = time.monotonic()
        options |= {"mininterval": self.seconds, "maxinterval": self.seconds, "leave": False}
        line = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed}, {remaining} left{postfix}"
        super().__init__(iterable, bar_format=line, **options)

    def display(self, msg=None, pos=None):
        if msg is None and time.monotonic() - self.last >= self.seconds:  # tqdm.write asks for it, too, after each text
            self.last = time.monotonic()
            print(self, file=sys.stderr, flush=True)

    def clear(self, nolock=False):
        """There is nothing on the screen to take back."""

    def close(self):
        self.sp = None  # as above
        super().close()


def progress(iterable=None, **options):
    """A progress bar on standard error; where that is no terminal, a line a minute, so that logs stay readable."""
    return tqdm(iterable, mininterval=1, **options) if sys.stderr.isatty() else LogLines(iterable, **options)


def duration(seconds):
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def check_device(name):
    """The torch device called `name`; raises ReportedError where there is none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # the meta device, for one, holds no data to copy
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ReportedError(f"--device={name} cannot be used ({first_line(error)}): try --device=cpu") from None


def has_bfloat16(device):
    """Whether `device` computes in bfloat16 by itself.

    Elsewhere PyTorch takes bfloat16, too, and is slower with it than in float32: three times on an x86 processor that
    has AVX-512 without its bfloat16 part, ten times without AVX-512.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_amp(amp, device):
    """`--amp` where `device` has bfloat16; elsewhere False, with a warning."""
    if amp and not has_bfloat16(device):
        warnings.warn(f"--amp: this {device.type} does not compute in bfloat16; going on in float32")
        return False
    return amp


def make_generator(*key):
    """A CPU generator whose stream follows from `key` (numbers and words) alone.

    All random numbers are drawn on the CPU, so that a seed means the same on every device.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def peak_memory(device):
    """The most that this process has held at once, in bytes: of a GPU where `device` is one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):  # no Linux
        return None


def versions():
    """The versions that a result depends on, for records."""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "kornia": kornia.__version__, "numpy": np.__version__}


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: DSA (Zhao & Bilen 2021, "Dataset Condensation with Differentiable Siamese Augmentation"), and plain
#
# Each group of DSA is two functions: one draws its parameters on the CPU, (B, ...) each, in the order of MTT's code;
# the other applies them, differentiably in the images x (B, C, H, W).


def window(x, rows, cols, fill=0.0):
    """Images with pixels x[b, :, rows[b, i], cols[b, j]], or `fill` where that is outside of x (B, C, H, W)."""
    _, channels, height, width = x.shape
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((cols >= 0) & (cols < width))[:, None, None, :]
    rows, cols = rows.clamp(0, height - 1)[:, None, :, None], cols.clamp(0, width - 1)[:, None, None, :]
    x = x.gather(2, rows.expand(-1, channels, -1, width))  # (B, C, len(rows), W)
    x = x.gather(3, cols.expand(-1, channels, x.shape[2], -1))
    return torch.where(inside, x, fill)


def sample_affine(x, matrices):
    """Sample `x` bilinearly at the affine maps `matrices` (B, 2, 3) of the output grid; zeros outside."""
    grid = F.affine_grid(matrices.to(x.dtype), x.shape, align_corners=True)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def draw_color(batch, size, generator):
    return tuple(torch.rand(batch, 1, 1, 1, generator=generator) for _ in range(3))


def apply_color(x, brightness, saturation, contrast):
    x = x + (brightness - 0.5)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (2 * saturation) + mean
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def draw_crop(batch, size, generator):
    shift = int(size / 8 + 0.5)
    return tuple(torch.randint(-shift, shift + 1, (batch, 1), generator=generator) for _ in range(2))


def apply_crop(x, shift_rows, shift_cols):
    rows, cols = (torch.arange(size, device=x.device) for size in x.shape[2:])
    return window(x, rows + shift_rows, cols + shift_cols)


def draw_cutout(batch, size, generator):
    side = int(size / 2 + 0.5)
    return tuple(torch.randint(0, size + 1 - side % 2, (batch, 1), generator=generator) for _ in range(2))


def apply_cutout(x, centre_row, centre_col):
    def cut(size, centre):  # (B, size)
        side = int(size / 2 + 0.5)
        first = centre - side // 2
        index = torch.arange(size, device=x.device)
        return (index >= first) & (index < first + side)

    hole = cut(x.shape[2], centre_row)[:, None, :, None] & cut(x.shape[3], centre_col)[:, None, None, :]
    return x.masked_fill(hole, 0)


def draw_flip(batch, size, generator):
    return (torch.rand(batch, 1, 1, 1, generator=generator),)


def apply_flip(x, chance):
    return torch.where(chance < 0.5, x.flip(3), x)


def draw_scale(batch, size, generator):
    return tuple(torch.rand(batch, generator=generator) * (1.2 - 1 / 1.2) + 1 / 1.2 for _ in range(2))


def apply_scale(x, scale_x, scale_y):
    zero = torch.zeros_like(scale_x)
    return sample_affine(x, torch.stack([scale_x, zero, zero, zero, scale_y, zero], dim=1).view(-1, 2, 3))


def draw_rotate(batch, size, generator):
    return ((torch.rand(batch, generator=generator) - 0.5) * 2 * 15 / 180 * math.pi,)


def apply_rotate(x, angle):
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return sample_affine(x, torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3))


AUGMENTATIONS = {
    "color": (draw_color, apply_color),
    "crop": (draw_crop, apply_crop),
    "cutout": (draw_cutout, apply_cutout),
    "flip": (draw_flip, apply_flip),
    "scale": (draw_scale, apply_scale),
    "rotate": (draw_rotate, apply_rotate),
}


def diff_augment(x, strategy, generator):
    """Apply one group of `strategy`, drawn for the batch, with parameters drawn for each image of `x` (B, C, H, W)."""
    groups = strategy.split("_")
    draw, apply = AUGMENTATIONS[groups[torch.randint(len(groups), (1,), generator=generator)]]
    draws = draw(len(x), x.shape[2], generator)
    return apply(x, *(value.to(x.device, non_blocking=True) for value in draws))


def plain_augment(x, generator):
    """MTT's augmentation without DSA (`--dsa False`): each image is cropped, scaled or rotated. Not differentiable.

    Crop: shifted by -4 to 3 pixels, the border filled with the channel's mean. Scale: resized by U(0.8, 1.2) in each
    direction, nearest neighbour, zeros around. Rotate: -45° to 44°, third-order splines, the border filled with the
    mean.
    """
    batch, _, size, _ = x.shape
    kind = torch.randint(3, (batch, 1), generator=generator)
    shift = torch.randint(-4, 4, (2, batch, 1), generator=generator)
    resized = ((0.8 + 0.4 * torch.rand(2, batch, 1, generator=generator)) * size).int()
    angles = torch.randint(-45, 45, (batch,), generator=generator).tolist()

    index = torch.arange(size)
    side = resized.amax(0).clamp(min=size)  # of the square on which the resized image is centred, then cut out
    centred = index + (side - size) // 2 - (side - resized) // 2  # position in the resized image
    source = torch.where((centred >= 0) & (centred < resized), centred * size // resized, -1)
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    cropped = window(x, *(index + shift).to(x.device), fill=mean)
    scaled = window(x, *source.to(x.device))
    kind = kind.to(x.device)[:, :, None, None]
    x = torch.where(kind == 0, cropped, torch.where(kind == 1, scaled, x))
    for i in torch.nonzero(kind.flatten() == 2).flatten().tolist():  # SciPy rotates one image at a time
        rotated = scipy.ndimage.rotate(x[i].cpu().numpy(), angles[i], axes=(-2, -1), cval=float(mean.mean()))
        top, left = ((length - size) // 2 for length in rotated.shape[1:])
        x[i] = torch.from_numpy(rotated[:, top:top + size, left:left + size])
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluating a network


def initial_network(model, form, generator, device):
    """A fresh network called `model`, its weights drawn from `generator`. Raises ReportedError for an unknown name.

    `form`: number of classes, and side of the images, which have three channels.
    """
    with torch.random.fork_rng(devices=[]):  # PyTorch's layers initialise themselves from the global generator
        torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        try:
            return get_network(model, 3, *form).to(device)
        except ValueError as error:
            raise ReportedError(f"--model={model}: {error}") from None


class Runner:
    """How networks, and functions of tensors, are run: through torch.compile (`compile`), in bfloat16 (`amp`).

    Where compilation fails (no C++ compiler, say), it warns once and goes on without.
    """

    def __init__(self, compile=True, amp=False):
        self.compile, self.amp = compile, amp
        if compile:  # one forward() serves all variants of ConvNet, with several graphs for each
            torch._dynamo.config.recompile_limit = 64

    def attempt(self, compiled, plain):
        """What `compiled()` returns, or `plain()` where there is no compilation, or it fails."""
        if self.compile:
            try:
                return compiled()
            except torch._dynamo.exc.TorchDynamoException as error:
                warnings.warn(f"torch.compile failed, going on without it: {first_line(error)}")
                self.compile = False
        return plain()

    def __call__(self, network):
        """A function from images (B, C, H, W) to float32 logits (B, classes), compiled with channels-last."""
        compiled = torch.compile(network, dynamic=False) if self.compile else None

        def logits(x):
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.amp):
                return self.attempt(lambda: compiled(x.contiguous(memory_format=torch.channels_last)),
                                    lambda: network(x)).float()

        return logits

    def function(self, function):
        """`function`, pure, from tensors to a tuple of tensors, compiled; on CUDA also recorded as a CUDA graph.

        Its first call compiles, and prints how long that took.
        """
        compiled = torch.compile(function, dynamic=False, mode="reduce-overhead") if self.compile else None
        name, calls = getattr(function, "func", function).__name__, 0  # a partial has a function instead of a name

        def replay(*tensors):
            torch.compiler.cudagraph_mark_step_begin()
            return tuple(result.clone() for result in compiled(*tensors))  # the next call overwrites them

        def run(*tensors):
            nonlocal calls
            start, calls = time.perf_counter(), calls + 1
            results = self.attempt(lambda: (replay if tensors[0].is_cuda else compiled)(*tensors),
                                   lambda: function(*tensors))
            if calls == 1 and self.compile:
                tqdm.write(f"compiled {name} in {time.perf_counter() - start:.0f} s")
            return results

        return run


def shuffled_batches(images, labels, batch_size, prepare, generator):
    """One epoch of batches of `images` (N, C, H, W) and labels (N,) in a random order.

    `prepare(x, y, generator)` makes of a batch what the network sees.
    """
    for indices in torch.randperm(len(images), generator=generator).to(images.device).split(batch_size):
        yield prepare(images[indices], labels[indices], generator)


def train_epoch(logits, optimizer, images, labels, batch_size, prepare, generator, bar=None):
    """Train for an epoch of `shuffled_batches`: mean loss and accuracy, scalars on the images' device.

    `bar`, a tqdm, advances with each batch.
    """
    loss_sum, hits = torch.zeros((), device=images.device), torch.zeros((), device=images.device)
    seen = 0
    for x, y in shuffled_batches(images, labels, batch_size, prepare, generator):
        out = logits(x)
        loss = F.cross_entropy(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(y)
        hits += (out.detach().argmax(1) == y).sum()
        seen += len(y)
        if bar is not None:
            bar.update()
    return loss_sum / seen, hits / seen


@torch.no_grad()
def accuracy(network, logits, images, labels, batch_size):
    """Fraction of `images` (N, C, H, W) that the network labels rightly, and the same for each class, a list."""
    network.eval()
    predicted = []
    for x in images.split(batch_size):
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 0, batch_size - len(x)))  # one shape: one compiled graph serves all
        predicted.append(logits(padded)[: len(x)].argmax(1))
    network.train()
    hits = (torch.cat(predicted) == labels).double()
    return hits.mean().item(), (labels.bincount(weights=hits) / labels.bincount()).tolist()


def make_augment(dsa, strategy):
    """A `prepare(x, y, generator)` for `train_epoch`: DSA of this `strategy`, or MTT's plain augmentation."""
    if dsa:
        return lambda x, y, generator: (diff_augment(x, strategy, generator), y)
    return lambda x, y, generator: (plain_augment(x, generator), y)
