"""Devices, and what they compute in."""

import platform
import warnings

import torch

from system.process import ReportedError, first_line


def check_device(name):
    """The torch device called `name`. Raises ReportedError if it cannot be used."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # the meta device, for one, has no data to copy
        # A run's convolutions have few shapes, so benchmarking their algorithms pays off.
        torch.backends.cudnn.benchmark = True
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ReportedError(
            f"--device={name} cannot be used ({first_line(error)}): try --device=cpu"
        ) from None


def has_bfloat16(device):
    """Tell whether `device` has instructions for bfloat16.

    Without them PyTorch emulates it, which is slower than float32: three times on an x86 processor
    with AVX-512 but without its bfloat16 extension, ten times without AVX-512.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_amp(amp, device):
    """`amp` if `device` has bfloat16, else False, with a warning."""
    if amp and not has_bfloat16(device):
        warnings.warn(f"--amp: this {device.type} has no bfloat16; continuing in float32")
        return False
    return amp


def describe(device, amp, ranks=1):
    """The device and its precision, for the first line of output: a wrong driver means the CPU."""
    precision = "bfloat16" if amp else "float32"
    if ranks > 1:
        precision += f", {ranks} processes"
    if device.type != "cuda":
        return f"{device.type.upper()}, threads: {torch.get_num_threads()}, {precision}"
    # PyTorch's default, as in MTT: faster on Ampere and later, and exact to three digits only.
    if torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0):
        precision += ", convolutions in TF32"
    return f"{torch.cuda.get_device_name(device)}, {precision}"
