"""Gradients through a block of a host's model: kernels that give the same bits again, and tensors that autograd may save."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import QuantizationError

__all__ = ["UndifferentiableError", "deterministic_kernels", "find_backends", "without_inference_tensors"]

# Kernels of attention, the fast ones first. The second entry is for blocks whose fast kernels are not deterministic.
_BACKENDS: tuple[Sequence[SDPBackend], ...] = (
    (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    (SDPBackend.MATH,),
)


class UndifferentiableError(QuantizationError):
    """A block has no backward pass, or one that gives other bits when it is repeated."""


@contextlib.contextmanager
def deterministic_kernels(backends: Sequence[SDPBackend]) -> Iterator[None]:
    """Use the deterministic variants of torch's operators, and these kernels of attention.

    The settings are those of the process. Operators without such a variant only warn, because :func:`find_backends` compares.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with sdpa_kernel(list(backends)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def find_backends(gradients: Callable[[], Sequence[torch.Tensor]]) -> Sequence[SDPBackend]:
    """The first kernels of attention with which two backward passes give the same bits.

    Args:
        gradients: runs one backward pass.

    Raises:
        UndifferentiableError: there are none; the message is a part of a sentence.
    """
    reason = ""
    for backends in _BACKENDS:
        with deterministic_kernels(backends):
            try:
                first, second = gradients(), gradients()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # of a kernel of the host
                reason = f"its backward pass fails: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
                continue
            if all(map(torch.equal, first, second)):
                return backends
            reason = "two backward passes of one call give different gradients"
    raise UndifferentiableError(reason)


@contextlib.contextmanager
def without_inference_tensors(module: torch.nn.Module, skipped: Iterable[torch.nn.Module] = ()) -> Iterator[None]:
    """Replace parameters and buffers that were made in inference mode by copies, which autograd can save.

    To be entered outside of inference mode.

    Args:
        skipped: modules that keep theirs, because their forward is replaced.
    """
    kept = set(skipped)
    replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for inner in module.modules():
            tables: tuple[dict[str, Any], ...] = (inner._parameters, inner._buffers)
            for table in () if inner in kept else tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_inference():
                        replaced.append((table, name, tensor))
                        copy: Any = tensor.detach().clone()
                        if table is inner._parameters:
                            copy = torch.nn.Parameter(copy, requires_grad=False)
                        table[name] = copy
        yield
    finally:
        for table, name, tensor in replaced:
            table[name] = tensor
