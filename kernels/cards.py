"""What the card of a tensor can do."""

import functools

import torch

__all__ = ["capability", "is_nvidia", "multiplies_fp8"]


def is_nvidia() -> bool:
    """Whether torch's CUDA devices are NVIDIA's; AMD's go by the same name, and their numbers mean something else."""
    return torch.version.hip is None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA card: (8, 9) is SM 8.9."""
    return torch.cuda.get_device_capability(device)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether FP8 codes are multiplied by FP8 codes; elsewhere they are decoded, and inputs stay as they are.

    NVIDIA's cards do so from SM 8.9 on. A CPU computes what these compute.
    """
    return device.type != "cuda" or is_nvidia() and capability(device) >= (8, 9)
