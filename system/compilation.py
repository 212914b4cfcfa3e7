"""Compilation of networks, and of the steps of students and evaluations, by `torch.compile`."""

import logging
import operator
import time
import warnings
from pathlib import Path

import torch
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.custom_graph_pass import CustomGraphPass

from system.process import first_line, is_out_of_memory, write_line

# --------------------------------------------------------------------------------------------------
# The compiler

# The share of a step's activations that a compiled step keeps for its derivative, from 0 to 1. At
# 0.4 these are the results of convolutions and matrix products. The rest is recomputed from them,
# which is faster than writing and reading it.
ACTIVATION_BUDGET = 0.4


class Compiler:
    """Run networks and functions through `torch.compile`, in bfloat16 (`amp`), or as they are.

    If something cannot be compiled, for instance without a C++ compiler, everything runs uncompiled
    from then on, after a warning.
    """

    def __init__(self, compile=True, amp=False):
        self.compile = compile
        self.amp = amp
        self.graphs = torch.cuda.is_available()  # whether functions become CUDA graphs
        if compile:
            # One ConvNet.forward serves all its variants, with several graphs for each.
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.suppress_errors = True
            torch._inductor.config.joint_custom_pre_pass = SecondDerivatives()
            log = logging.getLogger("torch._dynamo.convert_frame")
            if FAILURES not in log.filters:
                log.addFilter(FAILURES)

    @property
    def compiles(self):
        return self.compile and not FAILURES.seen

    def __call__(self, network):
        """A function from images (B, C, H, W) to the network's logits (B, classes), in float32."""
        compiled = torch.compile(network, dynamic=False) if self.compile else None

        def forward(x):
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.amp):
                if not self.compiles:
                    return network(x).float()
                # Compiled convolutions are faster in this layout.
                return compiled(x.contiguous(memory_format=torch.channels_last)).float()

        return forward

    def function(self, function):
        """Compile a pure function from tensors to a tuple of tensors, on CUDA as a CUDA graph.

        It can be differentiated once. The first call compiles it, with its derivative if a tensor
        requires grad, and prints how long that took. `retrying` makes it fall back where it fails.
        """
        if not self.compile:
            return function
        # The one without CUDA graphs is for `degrade`. Neither is compiled before its first call.
        graphs = torch.compile(function, dynamic=False, mode="reduce-overhead")
        plain = torch.compile(function, dynamic=False)
        name = getattr(function, "func", function).__name__  # of a partial, the function's
        is_first = True

        def run(*tensors):
            with torch._functorch.config.patch(activation_memory_budget=ACTIVATION_BUDGET):
                return (graphs if self.graphs else plain)(*tensors)

        def call(*tensors):
            nonlocal is_first
            if not self.compiles:
                return function(*tensors)
            start = time.perf_counter()
            if is_first:
                write_line(f"compiling {name}")
            results = run(*tensors)
            if is_first and results[0].requires_grad:
                differentiate(results, tensors)
                results = run(*tensors)  # with a graph again
            if is_first and self.compiles:
                write_line(f"compiled {name} in {time.perf_counter() - start:.0f} s")
            is_first = False
            if tensors[0].is_cuda:  # the next replay overwrites the graph's own results
                results = tuple(result.clone() for result in results)
            return results

        return call

    def on_gpu(self, function, device):
        """A function of small operations, on CUDA compiled at its first call with each shape.

        There, they take longer to launch than to run. On a CPU, compiling would take longer than it
        saves.
        """
        if device.type != "cuda" or not self.compile:
            return function
        compiled = torch.compile(function, dynamic=False)

        def run(*args):
            return (compiled if self.compiles else function)(*args)

        return run

    def retrying(self, function):
        """A pure function that is retried with less compilation, if compilation may have failed.

        CUDA and Triton raise RuntimeErrors, but so does much else. A call that keeps failing
        raises.
        """

        def call(*args):
            try:
                return function(*args)
            except RuntimeError as error:
                if is_out_of_memory(error) or not self.degrade(error):
                    raise
            return call(*args)

        return call

    def degrade(self, error):
        """Drop CUDA graphs, and the next time compilation. False: the error comes from neither."""
        may_be = torch.cuda.is_available() or isinstance(error, TorchDynamoException)
        if not (self.compiles and may_be):
            return False
        what = "a CUDA graph" if self.graphs else "torch.compile"
        warnings.warn(f"{what} failed, continuing without it: {first_line(error)}")
        if not self.graphs:
            FAILURES.seen = True
        self.graphs = False
        return True


def differentiate(results, tensors):
    """Compute the derivative of a compiled function once, so that it is compiled too."""
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    torch.autograd.grad(results[0], leaves, torch.zeros_like(results[0]), allow_unused=True)


class CompileFailures(logging.Filter):
    """Turns PyTorch's log of a failed compilation into one warning, and remembers it."""

    def __init__(self):
        super().__init__()
        self.seen = False

    def filter(self, record):
        if record.exc_info and not self.seen:
            self.seen = True
            fault, remedy = compile_fault(record.exc_info[1])
            warnings.warn(f"torch.compile failed, continuing without it: {fault} ({remedy})")
        return not record.exc_info


def compile_fault(error):
    """Say why a compilation failed, and what helps, from PyTorch's `error`."""
    cause = getattr(error, "inner_exception", None) or error.__cause__ or error
    system = next((e for e in (cause, cause.__cause__, cause.__context__) if is_of_files(e)), None)
    if system:
        where = "name a folder that can be written by TORCHINDUCTOR_CACHE_DIR"
        return first_line(system), f"{where}; --no-compile does without"
    return first_line(cause), "it needs a C++ compiler, as g++; --no-compile does without"


def is_of_files(error):
    """Tell whether an exception is a system's about a file or folder."""
    return isinstance(error, OSError) and error.filename is not None


FAILURES = CompileFailures()  # one for the process, as loggers are

# --------------------------------------------------------------------------------------------------
# Second derivatives of convolutions

aten = torch.ops.aten


class SecondDerivatives(CustomGraphPass):
    """Compute a convolution's second derivative w.r.t. its weights as cuDNN and oneDNN expect it.

    The adjoint a of a convolution's input and the adjoint g of its result give an adjoint of its
    weights. PyTorch's double backward computes it as a convolution of a with the kernel g, which is
    as large as the image, both with batch and channels swapped. Libraries have no fast algorithm
    for that. It equals the weight gradient of an ordinary convolution.
    """

    def __call__(self, graph):
        for node in list(graph.find_nodes(op="call_function", target=aten.convolution.default)):
            x, g = (swapped(argument) for argument in node.args[:2])
            if x is not None and g is not None:
                replace_convolution(graph, node, x, g)

    def uuid(self):
        """The key of this pass in PyTorch's cache of compiled graphs."""
        return Path(__file__).read_bytes()


SWAP = [1, 0, 2, 3]  # batch and channels


def swapped(node):
    """The node whose swapped form `node` is; None if it is no swap."""
    if node.target is aten.permute.default and list(node.args[1]) == SWAP:
        return node.args[0]
    return None


def replace_convolution(graph, node, x, g):
    """Replace `node`, the convolution of `x` with `g`, by a weight gradient."""
    _, _, _, dilation, padding, stride, *_, groups = node.args
    shape = node.meta["val"].transpose(0, 1).shape
    # The derivative takes the weights, but only for their shape.
    weights = (n.args[1] for n in x.users if n.target is aten.convolution.default)
    weights = [w for w in weights if w.meta["val"].shape == shape]
    if not weights:
        return
    arguments = (g, x, weights[0], None, stride, padding, dilation, False, [0, 0], groups)
    with graph.inserting_before(node):
        gradients = append(
            graph, aten.convolution_backward.default, *arguments, [False, True, False]
        )
        gradient = append(graph, operator.getitem, gradients, 1)
        replacement = append(graph, aten.permute.default, gradient, SWAP)
    node.replace_all_uses_with(replacement)
    graph.erase_node(node)


def append(graph, function, *args):
    """Append a node that calls `function`, with the tensor that it will return as its `val`."""
    node = graph.call_function(function, args)
    values = torch.fx.node.map_arg(args, lambda argument: argument.meta["val"])
    node.meta["val"] = function(*values)
    return node
