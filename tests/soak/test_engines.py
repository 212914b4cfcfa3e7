"""The engines at full size: all architectures, compiled, in bfloat16, and their memory."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

import utils
from datasets.preprocessing import Form
from objectives.trajectory import matching_loss
from reparam_module import AdjointUnroll, AutogradUnroll, ReparamModule
from system.compilation import Compiler
from utils import Augment

DSA = utils.augment_groups(True, utils.DSA_STRATEGY)
LR = 0.02


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def match(engine, name, side, augment, *, count=10, steps, batch_syn, dtype, compiler=None):
    """Loss and gradients by an engine, with draws that are the same in every call."""
    compiler = compiler or Compiler(compile=False)
    form = Form(10, augment.side)
    network = utils.initial_network(name, form, utils.make_generator(0), "cpu").to(dtype)
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    target = start + 0.01 * torch.randn(start.shape, generator=seeded(0)).to(dtype)
    images = torch.randn(count, 3, side, side, generator=seeded(1)).to(dtype).requires_grad_(True)
    syn_lr = torch.tensor(LR, dtype=dtype, requires_grad=True)
    batches = utils.draw_batches(count, batch_syn, steps, augment, seeded(5))
    labels = torch.arange(count)

    def make_batch(synthetic, batch):
        return augment(*synthetic, batch, labels)

    unroll = engine(ReparamModule(network, compiler.amp), make_batch, compiler.function)
    return unroll(start, matching_loss(start, target), (images,), syn_lr, batches)


@pytest.mark.parametrize(
    "name, side, steps, batch_syn, windows",
    [
        ("ConvNet", 32, 20, 5, 0),
        ("ConvNet", 64, 2, 3, 0),  # batches of 3 and 2
        ("ConvNetW32", 128, 3, 5, 2),  # texture: two windows of 64×64 from each canvas
        ("ConvNetD4", 32, 3, 5, 0),
        ("ConvNetMP", 32, 3, 5, 0),
        ("ConvNetNP", 16, 3, 5, 0),
        ("ConvNetLN", 32, 3, 5, 0),
        ("ConvNetGN", 32, 3, 5, 0),
        ("ConvNetNN", 32, 3, 5, 0),
        ("ConvNetAS", 32, 3, 5, 0),
        ("ConvNetAL", 32, 3, 5, 0),
        ("MLP", 64, 20, 3, 0),
        ("ResNet18", 32, 2, 2, 0),
        ("VGG16", 32, 2, 2, 0),
    ],
)
def test_both_engines_give_the_same_gradients_in_float64(name, side, steps, batch_syn, windows):
    augment = Augment(64 if windows else side, DSA, windows)
    settings = {"count": 5, "steps": steps, "batch_syn": batch_syn, "dtype": torch.float64}
    loss, images, lr = match(AdjointUnroll, name, side, augment, **settings)
    loss_ref, images_ref, lr_ref = match(AutogradUnroll, name, side, augment, **settings)
    assert images_ref.any() and lr_ref
    assert (images - images_ref).norm() <= 1e-9 * images_ref.norm()
    assert abs(lr - lr_ref) <= 1e-9 * abs(lr_ref)
    assert loss == pytest.approx(float(loss_ref), rel=1e-12)


@pytest.mark.parametrize("name, side", [("ConvNetW32", 64), ("ResNet18", 32)])
def test_compiled_steps_give_the_same_gradients_in_float64(name, side):
    settings = {"steps": 3, "batch_syn": 10, "dtype": torch.float64}
    augment = Augment(side, DSA)
    compiler = Compiler()
    _, images, lr = match(AdjointUnroll, name, side, augment, **settings, compiler=compiler)
    if not compiler.compiles:
        pytest.skip("no C++ compiler, or no header files of Python")
    _, images_ref, lr_ref = match(AdjointUnroll, name, side, augment, **settings)
    assert (images - images_ref).norm() <= 1e-9 * images_ref.norm()
    assert abs(lr - lr_ref) <= 1e-9 * abs(lr_ref)


# Not of ResNet18, whose gradient float32 itself turns away from that of float64 (cosine 0.86).
@pytest.mark.parametrize(
    "name, compile, amp, close",
    [
        ("ConvNet", False, False, 0.9999),
        ("ConvNetW32", True, False, 0.9999),
        pytest.param("ConvNet", True, True, 0.99, marks=pytest.mark.bfloat16),
    ],
)
def test_the_adjoint_is_close_to_autograd_in_lower_precision(name, compile, amp, close):
    settings = {"steps": 3, "batch_syn": 10, "dtype": torch.float32}
    augment = Augment(64, DSA)
    compiler = Compiler(compile, amp)
    _, images, lr = match(AdjointUnroll, name, 64, augment, **settings, compiler=compiler)
    _, images_ref, lr_ref = match(AutogradUnroll, name, 64, augment, **settings)
    cosine = F.cosine_similarity(images.flatten().double(), images_ref.flatten().double(), dim=0)
    assert cosine >= close
    assert lr == pytest.approx(float(lr_ref), rel=0.05 if amp else 1e-3)


def test_memory_of_the_adjoint_grows_only_by_parameters_and_augmented_images():
    """Ten steps and eighty."""
    usual = {"what": "iteration", "device": "cpu", "model": "ConvNetW32", "ipc": 1}
    usual |= {"precision": "float32", "compile": False, "repeat": 0, "memory": 0.0}
    script = ROOT / "tests" / "benchmarks" / "bench.py"

    def peak(times, **more):
        """The least of several processes: the heap's fragmentation differs from one to the next."""
        command = [sys.executable, script, "--child", json.dumps(usual | more)]
        outputs = (subprocess.run(command, check=True, capture_output=True) for _ in range(times))
        return min(json.loads(done.stdout)["peak"] for done in outputs)

    short, long = (peak(3, unroll="adjoint", steps=steps) for steps in (10, 80))
    form = Form(10, 64)
    network = utils.initial_network("ConvNetW32", form, utils.make_generator(0), "cpu")
    parameters = sum(p.numel() for p in network.parameters())
    assert long - short <= 0.05 * short + 70 * 4 * (parameters + 10 * 3 * 64 * 64)
    # That the graph of ten steps takes more shows that this measures something.
    assert peak(1, unroll="autograd", steps=10) > long
