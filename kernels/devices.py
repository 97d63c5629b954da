"""Capabilities of the device of a tensor."""

import functools

import torch

__all__ = ["compute_capability", "has_fp8_matmul", "is_nvidia"]


def is_nvidia() -> bool:
    """Whether torch's CUDA devices are NVIDIA GPUs.

    ROCm builds of torch also call AMD GPUs "cuda", and their capability numbers have another meaning.
    """
    return torch.version.hip is None


@functools.cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU: (8, 9) is SM 8.9."""
    return torch.cuda.get_device_capability(device)


def has_fp8_matmul(device: torch.device) -> bool:
    """Whether FP8 weights are multiplied by FP8 activations; elsewhere the weight is dequantized instead.

    NVIDIA GPUs have FP8 tensor cores from SM 8.9 on. A CPU emulates their result.
    """
    return device.type != "cuda" or (is_nvidia() and compute_capability(device) >= (8, 9))
