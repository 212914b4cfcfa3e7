"""The kernels that a GPU would run, generated without one.

A student's step, its derivative, DSA and a step of evaluation are traced, and Inductor generates
Triton code of them for a GPU that it is made to see. Nothing runs.
"""

import collections
import re
import types
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch._dynamo import device_interface
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cudagraph_utils import check_multiple_devices_or_any_cpu_nodes
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import BoxedBool, get_first_incompatible_cudagraph_node
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import reparam_module
import training
import utils
from datasets.preprocessing import Form
from reparam_module import AdjointUnroll, ReparamModule
from system.compilation import ACTIVATION_BUDGET, SecondDerivatives

pytest.importorskip("triton", reason="Triton, which generates kernels for GPUs, is not installed")
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
CLASSES, SIDE, NETWORKS = 10, 64, 5
LIBRARY_CALL = r"(?:= |^ +)(?:extern_kernels|torch\.ops\.aten)\.(\w+)[\w.]*\("
# The most that were seen of ConvNet; DSA's are at most 10 of a step's.
STEP_KERNELS, STEP_KERNELS_AMP = 147, 143
EVALUATION_KERNELS = 286
GPUS = {"sm_90": (9, 0), "sm_75": (7, 5)}

# --------------------------------------------------------------------------------------------------
# A GPU that is not there


def properties_of(capability):
    """What Inductor asks about a GPU: those of an H100, or of an RTX 2080 Ti."""
    is_recent = capability >= (8, 0)
    return types.SimpleNamespace(
        name="pretended",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132 if is_recent else 68,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048 if is_recent else 1024,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30 if is_recent else 11 << 30,
        shared_memory_per_block_optin=232448 if is_recent else 65536,
        L2_cache_size=50 << 20 if is_recent else 5767168,
        gcnArchName="",
        is_integrated=0,
    )


@contextmanager
def pretended_gpu(capability):
    """Inductor and Triton see a GPU, as far as generating code asks for it."""
    properties = properties_of(capability)
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: capability >= (8, 0),
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "_lazy_init": lambda: None,
    }
    workers = {"caching_worker_device_properties": [properties]}
    workers |= {"caching_worker_current_devices": 0}
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    pretended = types.SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CUDA,
    )
    with pytest.MonkeyPatch.context() as patch, active_driver(pretended):
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
            if hasattr(device_interface.CudaInterface, name):
                patch.setattr(device_interface.CudaInterface, name, staticmethod(answer))
        for name, answer in workers.items():
            patch.setitem(getattr(device_interface, name), "cuda", answer)
        # Without worker processes, which would begin to compile what is generated.
        patch.setattr(AsyncCompile, "use_process_pool", staticmethod(lambda: False))
        yield


@contextmanager
def active_driver(pretended):
    """Triton's driver is another one; whether there is Triton for a GPU is found out anew."""
    try:
        forget_answers()
        driver.set_active(pretended)
        yield
    finally:
        driver.set_active(None)
        forget_answers()


def forget_answers():
    """PyTorch asks once whether there is Triton, and remembers it."""
    for function in vars(torch.utils._triton).values():
        getattr(function, "cache_clear", lambda: None)()


# --------------------------------------------------------------------------------------------------
# From a function to kernels


class Traced(Exception):
    """A function was traced: nothing has to be compiled for the CPU."""


def traced(function, *inputs):
    """The graph that Inductor gets of a function, and how to partition it; none for no gradients.

    This is done on the CPU, since autograd wants a driver even where CUDA tensors are fake, and so
    do Inductor's first passes, which fold constants. They have the one that `Compiler` adds.
    """
    found = []

    def stop(graph, inputs, **options):
        graph = compile_fx._recursive_joint_graph_passes(graph, input_device=torch.device("cpu"))
        found.append((graph, options))
        raise Traced

    backend = aot_autograd(
        fw_compiler=stop,
        inference_compiler=stop,
        partition_fn=stop,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(suppress_errors=False):
        with torch._inductor.config.patch(joint_custom_pre_pass=SecondDerivatives()):
            with pytest.raises(Exception, match="Traced"):
                compiled(*inputs)
    return found[0]


def partitioned(graph, options):
    """The graphs forward and, if there are gradients, backward, on CUDA."""
    inputs = moved(graph)
    if not options:
        return [graph]
    with torch._functorch.config.patch(activation_memory_budget=ACTIVATION_BUDGET):
        return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **options)


def moved(graph):
    """Move a graph to CUDA, with the values in its nodes' `meta`: its inputs there, all fake."""

    def move(value):
        return CUDA if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, move)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, move)
    inputs = inputs_of(graph)
    mode = detect_fake_mode(inputs)
    with mode:
        inputs = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA) for x in inputs
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    return inputs


def inputs_of(graph):
    return [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]


def lowered(graph, is_backward, is_inference):
    """What Inductor makes of a graph on CUDA: its Python code, and the GraphLowering."""
    found = []
    generate = GraphLowering.codegen

    def stop(self):
        found.append((generate(self)[0].value, self))
        raise Traced

    inputs = inputs_of(graph)
    with pytest.MonkeyPatch.context() as patch, V.set_fake_mode(detect_fake_mode(inputs)):
        patch.setattr(GraphLowering, "codegen", stop)
        with pytest.raises(Exception, match="Traced"):
            compile_fx.compile_fx_inner(
                graph,
                inputs,
                static_input_idxs=[],
                cudagraphs=BoxedBool(True),
                is_backward=is_backward,
                is_inference=is_inference,
                graph_id=0,
            )
    return found[0]


def kernels(capability, function, *inputs):
    """How often each kind of kernel runs: "triton", or the name of a library's operation.

    In the derivative, too, where an input requires grad.
    """
    graph, options = traced(function, *inputs)
    counts = collections.Counter()
    parts = partitioned(graph, options)
    with pretended_gpu(capability):
        for number, part in enumerate(parts):
            check_convolutions(part.graph)
            assert not get_first_incompatible_cudagraph_node(part)
            source, lowering = lowered(part, number == 1, is_inference=not options)
            assert not lowering.disable_cudagraphs_reason
            assert not check_multiple_devices_or_any_cpu_nodes(lowering.device_node_mapping)
            call = source[source.index("def call(") :]
            counts["triton"] += len(re.findall(r"triton_\w+\.run\(", call))
            counts.update(re.findall(LIBRARY_CALL, call, re.MULTILINE))
    return counts


def check_convolutions(graph):
    """No convolution has groups, or a kernel as large as the image."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        check_convolution(*node.args[:2], groups=node.args[8])
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        check_convolution(*node.args[1:3], groups=node.args[9])


def check_convolution(x, weights, groups):
    image, kernel = (node.meta["val"].shape for node in (x, weights))
    assert groups == 1, f"{groups} groups, kernels {tuple(kernel)}"
    assert kernel[-1] <= 3, f"kernels {tuple(kernel)} for images {tuple(image)}"


# --------------------------------------------------------------------------------------------------
# What is generated


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Functions are traced on the CPU, before their graphs are moved."""
    monkeypatch.setattr(reparam_module, "is_compiled_for_cpu", lambda x: False)


def student_of(model, amp=False):
    network = utils.initial_network(model, Form(CLASSES, SIDE), utils.make_generator(0), "cpu")
    return ReparamModule(network, amp)


def step_kernels(gpu, model, amp=False):
    """Kernels of a student's step, and of its derivative."""
    student = student_of(model, amp)
    theta = torch.zeros(student.num_params, requires_grad=True)
    x = torch.zeros(CLASSES, 3, SIDE, SIDE, requires_grad=True)
    alpha = torch.tensor(0.01, requires_grad=True)
    return kernels(gpu, AdjointUnroll(student).step, theta, x, torch.arange(CLASSES), alpha)


def group_kernels(gpu, group):
    """Kernels of a group of DSA, and of its derivative."""
    draw, _ = utils.AUGMENTATIONS[group]
    parameters = draw(CLASSES, SIDE, utils.make_generator(0))
    x = torch.zeros(CLASSES, 3, SIDE, SIDE, requires_grad=True)
    return kernels(gpu, utils.apply_group, x, group, parameters)


@pytest.fixture(scope="module", params=GPUS.values(), ids=GPUS)
def augmentation(request):
    """A GPU, and the most kernels that a group of DSA has there."""
    counts = {group: group_kernels(request.param, group) for group in utils.AUGMENTATIONS}
    return request.param, max(count.total() for count in counts.values())


@pytest.mark.parametrize("amp, most", [(False, STEP_KERNELS), (True, STEP_KERNELS_AMP)])
def test_a_students_step_has_few_kernels_and_fits_a_cuda_graph(augmentation, amp, most):
    """Forward and backward, augmentation included."""
    gpu, of_group = augmentation
    if amp and gpu < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    counts = step_kernels(gpu, "ConvNet", amp)
    assert counts["triton"] and counts["convolution_backward"]
    assert counts.total() + of_group <= most


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_step_of_evaluation_has_few_kernels_and_fits_a_cuda_graph(gpu):
    student = student_of("ConvNet")
    thetas = torch.zeros(NETWORKS, student.num_params)
    x = torch.zeros(NETWORKS, CLASSES, 3, SIDE, SIDE)
    y = torch.arange(CLASSES).repeat(NETWORKS, 1)
    step = partial(training.sgd_step, student)
    counts = kernels(gpu, step, thetas, thetas, x, y, torch.tensor(0.01))
    # Three layers forward, and backward.
    assert counts["convolution"] == counts["convolution_backward"] == 3 * NETWORKS
    assert counts.total() <= EVALUATION_KERNELS
