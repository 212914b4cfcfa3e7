"""The CUDA path on a machine without a GPU: all tensors get there, and few steps wait for it.

CUDA tensors are fake: they have shapes and a device, but no content. Operations on them check that
their tensors are on one device. What needs the content, as `.item()`, would wait for the GPU.
"""

import collections
from dataclasses import replace

import pytest
import torch
import torch._functorch.eager_transforms as eager
from conftest import arguments, make_state
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import evaluation
import reparam_module
import training
import utils
from datasets.preprocessing import Data, Form
from evaluation import Evaluator
from objectives.real_loss import RealLoss, real_loss
from objectives.segments import Segments
from objectives.trajectory import MatchTrajectory
from reparam_module import AdjointUnroll, ReparamModule
from system import devices
from system.compilation import Compiler
from system.machine import Machine
from system.ranks import ALONE
from trajectories import Expert, Experts
from utils import Augment

CUDA = torch.device("cuda", 0)
CLASSES, SIDE, STEPS, EPOCHS = 10, 16, 3, 3
FORM = Form(CLASSES, SIDE)
DSA = utils.augment_groups(True, utils.DSA_STRATEGY)

# --------------------------------------------------------------------------------------------------
# Fake CUDA tensors


def is_cuda(value):
    return isinstance(value, torch.Tensor) and value.is_cuda


VALUES = {"item": 0.5, "__float__": 0.5, "__int__": 1, "__index__": 1, "__bool__": True}
COPIES = ("to", "cpu", "cuda", "copy_", "tensor", "as_tensor")


class HalfFake(TorchFunctionMode):
    """CPU tensors are real, CUDA tensors fake. Counts what waits for the GPU, in `waits`.

    Reading a value waits, and is answered by a made-up one. A copy waits, too, unless it goes to
    the GPU from pinned memory and is `non_blocking`. Raises AssertionError where a CPU tensor meets
    CUDA tensors, which PyTorch itself allows for scalars and indices.
    """

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        fakes = [tensor for tensor in tensors if tensor.is_cuda]
        if name == "pin_memory":  # which asks the driver
            return pinned(args[0])
        if fakes and name in (*VALUES, "tolist"):
            self.waits[name] += 1
            with unset_fake_temporarily():
                return VALUES.get(name) or torch.full(fakes[0].shape, 0.5).tolist()
        goes_to_gpu = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not fakes and not goes_to_gpu:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name == "_has_compatible_shallow_copy_type":  # a question of `network.to`
            return False
        if name in COPIES:
            return self.copy(func, name, args, kwargs)
        strangers = [tuple(tensor.shape) for tensor in tensors if not tensor.is_cuda]
        assert not (fakes and strangers), f"{name}: CPU tensors {strangers} among CUDA tensors"
        return func(*args, **kwargs)

    def copy(self, func, name, args, kwargs):
        result = func(*args, **kwargs)
        source = args[1] if name == "copy_" else args[0]
        is_free = kwargs.get("non_blocking") and getattr(source, "is_pinned_", False)
        if is_cuda(source) != result.is_cuda and not (result.is_cuda and is_free):
            self.waits[name] += 1
        return result


def pinned(tensor):
    """The same tensor, marked as one in pinned memory."""
    tensor = tensor.view(tensor.shape)
    tensor.is_pinned_ = True
    return tensor


def zeros_for_gradients(outputs, inputs, *_, **__):
    """A stand-in for `torch.autograd.grad`, which asks the driver even where tensors are fake."""
    tensors = (inputs,) if torch.is_tensor(inputs) else inputs
    return tuple(torch.zeros_like(tensor) for tensor in tensors)


def zero_grad_of_leaves(loss, *_, **__):
    """A stand-in for `loss.backward()`: sets the `grad` of the leaves that it would reach."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)


@pytest.fixture
def waits(monkeypatch):
    """In this test CUDA tensors are fake: the counter of what waits for the GPU."""
    monkeypatch.setattr(torch.autograd, "grad", zeros_for_gradients)
    monkeypatch.setattr(eager, "_autograd_grad", zeros_for_gradients)
    monkeypatch.setattr(torch.Tensor, "backward", zero_grad_of_leaves)
    # Fake tensors have no memory to tell them apart by.
    monkeypatch.setattr(reparam_module, "bytes_of_graph", lambda tensor: 1)
    # Their own version reads one value after the other.
    monkeypatch.setattr(FakeTensor, "tolist", torch.Tensor.tolist)
    counted = HalfFake()
    # Sampling asks cuDNN for its version where it is enabled.
    with torch.backends.cudnn.flags(enabled=False):
        with FakeTensorMode(allow_non_fake_inputs=True), counted:
            yield counted.waits


def on_gpu(count):
    """`count` fake images and labels."""
    return torch.zeros(count, 3, SIDE, SIDE).to(CUDA), (torch.arange(count) % CLASSES).to(CUDA)


def fresh_network(device=CUDA):
    return utils.initial_network("ConvNetD1", FORM, utils.make_generator(0), device)


def data_on_gpu():
    part = on_gpu(2 * CLASSES)
    return Data(part, part, part, tuple("abcdefghij"), {}, None)


# --------------------------------------------------------------------------------------------------
# What is counted


def reads(x):
    x.sum().item(), x.tolist(), bool(x.any()), float(x[0]), x.cpu()
    torch.zeros(2).copy_(x[:2])


def sends(x):
    pageable = torch.zeros(2)
    pageable.to(x.device), pageable.to(x.device, non_blocking=True)
    pageable.pin_memory().to(x.device)
    torch.tensor(0.5, device=x.device)
    pageable.pin_memory().to(x.device, non_blocking=True)  # the only one that is not waited for


@pytest.mark.parametrize("function, count", [(reads, 6), (sends, 4)])
def test_what_waits_for_the_gpu_is_counted(waits, function, count):
    x = torch.zeros(4).to(CUDA)
    waits.clear()
    function(x)
    assert waits.total() == count


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.zeros(4),
        lambda x: x * torch.tensor(0.5),  # an operation would take it, but no CUDA graph does
        lambda x: x[torch.arange(2)],
    ],
)
def test_a_tensor_on_the_cpu_is_an_error(waits, function):
    x = torch.zeros(4).to(CUDA)
    with pytest.raises(AssertionError, match="among CUDA tensors"):
        function(x)


# --------------------------------------------------------------------------------------------------
# Distillation


def initial_state(objective, labels):
    args = arguments(objective=objective, pix_init="noise", lr_img=1.0, labels=labels)
    return make_state(args, data_on_gpu(), torch.zeros(CLASSES, CLASSES).to(CUDA))


def two_snapshots():
    snapshot = [p.detach() for p in fresh_network("cpu").parameters()]
    return Experts([Expert([snapshot, snapshot], "expert", None)])


def make_objective(name, load_all, student, augment):
    if name == "trajectory":
        experts = two_snapshots()
        return MatchTrajectory(experts.on_device(2, CUDA) if load_all else experts, 1, 1, CUDA)
    augment = replace(augment, windows=0)
    return RealLoss("ConvNetD1", data_on_gpu(), augment, 4, 5, STEPS, real_loss(student))


@pytest.mark.parametrize(
    "name, load_all", [("trajectory", False), ("trajectory", True), ("loss", False)]
)
@pytest.mark.parametrize("memory", [0, float("inf")])
@pytest.mark.parametrize("windows, learned", [(0, False), (2, False), (0, True)])
def test_an_iteration_of_distillation_waits_once(waits, memory, name, load_all, windows, learned):
    state = initial_state(name, "learned" if learned else "hard")
    student = ReparamModule(fresh_network())
    augment = Augment(SIDE, DSA, windows)
    objective = make_objective(name, load_all, student, augment)
    options = {"memory": memory, "momentum": 0.9 if learned else 0.0}
    unroll = AdjointUnroll(student, state.batch_maker(augment), **options)
    how = {"seed": 0, "shard_batch": False, "ranks": ALONE}
    segments = Segments(objective, unroll, unroll.advance, augment, 2, STEPS, CLASSES, **how)
    waits.clear()

    step = segments(state, 0)
    assert not waits
    state.step(step)
    assert waits == {"tolist": 1}

    assert all(is_cuda(tensor) for tensor in (step.loss, *step.gradients.values()))
    assert all(is_cuda(tensor) for tensor in (*state.learned.values(), *state.leaves()))


@pytest.mark.parametrize("group", utils.AUGMENTATIONS)
def test_each_group_of_dsa_works_on_cuda_without_waiting(waits, group):
    images, labels = on_gpu(CLASSES)
    augment = Augment(SIDE, (group,))
    batches = [augment.draw(torch.arange(4), utils.make_generator(0))]
    waits.clear()
    (batch,) = utils.to_device(batches, CUDA)
    x, y = augment(images, batch, labels)
    assert is_cuda(x) and x.shape == (4, 3, SIDE, SIDE)
    assert is_cuda(y) and y.shape == (4,)
    assert not waits


# --------------------------------------------------------------------------------------------------
# Training networks


def test_an_epoch_of_an_expert_does_not_wait(waits):
    train, network = on_gpu(2 * CLASSES), fresh_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    augment, random = Augment(SIDE, DSA), utils.make_generator(0)
    waits.clear()
    batches = utils.draw_batches(len(train[1]), 4, None, augment, random)
    batches = utils.to_device(batches, CUDA)
    forward = Compiler(compile=False)(network)
    loss, hits = training.train_epoch(forward, optimizer, train, augment, batches)
    assert not waits
    assert is_cuda(loss) and is_cuda(hits)
    assert all(is_cuda(p.grad) for p in network.parameters())


@pytest.fixture
def evaluator(waits):
    """An `Evaluator` of two networks."""
    compiler = Compiler(compile=False)
    return Evaluator(
        data=data_on_gpu(),
        pool=evaluation.make_pool("S", "ConvNetD1", FORM, Machine(CUDA, ALONE, compiler)),
        num_eval=2,
        epochs=EPOCHS - 1,  # MTT adds one
        batch_train=4,
        batch_real=8,
        augment=Augment(SIDE, DSA),
        compiler=compiler,
    )


def test_networks_that_are_evaluated_together_wait_once(waits, evaluator):
    """Once in all, for α; at most once per network and epoch would be tolerable."""
    networks = [fresh_network() for _ in range(evaluator.num_eval)]
    generators = map(utils.make_generator, range(evaluator.num_eval))
    plan = evaluation.Plan(*on_gpu(CLASSES), 0.01, ())
    pairs = zip(networks, generators)
    trainees = [evaluation.Trainee(plan, network, None, g) for network, g in pairs]
    (step,) = evaluator.pool.values()
    waits.clear()
    evaluator.train_together(step, trainees)
    assert waits.total() <= 1
    assert all(is_cuda(p) for network in networks for p in network.parameters())


# --------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("capability, is_recent", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_and_tf32_are_for_recent_gpus(monkeypatch, capability, is_recent):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert devices.has_bfloat16(CUDA) == is_recent
    text = devices.describe(CUDA, amp=False)
    assert text.startswith("a GPU, float32") and ("TF32" in text) == is_recent
    if is_recent:
        assert devices.check_amp(True, CUDA)
    else:
        with pytest.warns(UserWarning, match="this cuda has no bfloat16"):
            assert not devices.check_amp(True, CUDA)


@pytest.mark.parametrize("amp", [False, True])
def test_without_tf32_none_is_mentioned(monkeypatch, amp):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert devices.describe(CUDA, amp) == f"a GPU, {'bfloat16' if amp else 'float32'}"
