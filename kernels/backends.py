"""Backend selection: the fastest implementation that supports the arguments, or the requested one.

Every operation has a table of implementations, best first, each with its requirements. :func:`refusals` returns the
unmet requirement of each implementation; the reference implementation has none.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from . import devices, reference, tensor_cores, tuning

__all__ = ["BACKENDS", "OPERATIONS", "backend", "has_triton", "implementation", "refusals", "using"]

log = logging.getLogger(__name__)

# Name → description for users.
BACKENDS: Mapping[str, str] = {
    "auto": "Triton or torch, whichever is faster for a shape; measured once and cached",
    "triton": "Triton kernels with the shipped launch configurations",
    "autotuned": "Triton kernels with launch configurations measured once per shape and cached",
    "torch": "torch's own 8-bit matrix products",
    "reference": "plain torch: dequantize, then multiply",
}
# Backend → the one used for operations that it does not implement.
_FALLBACKS = {"torch": "reference", "autotuned": "triton"}
VARIABLE = "LEARNED_ROUNDING_BACKEND"


def _read_environment() -> str:
    """Backend named by the environment variable, or auto."""
    name = os.environ.get(VARIABLE) or "auto"
    if name in BACKENDS:
        return name
    log.warning("%s=%r is not a kernel backend; using auto. Valid backends: %s.", VARIABLE, name, ", ".join(BACKENDS))
    return "auto"


_selected = [_read_environment()]


class Need(NamedTuple):
    """Requirement of an implementation: the message if it is unmet, and a predicate over the operation's arguments."""

    text: str
    met: Callable[..., bool]


class Implementation(NamedTuple):
    """Implementation of an operation; ``load`` imports and returns the function once every need is met."""

    load: Callable[[], Callable]
    needs: tuple[Need, ...] = ()

    def refusal(self, *arguments) -> str:
        """Message of the first unmet need, or an empty string."""
        return next((need.text for need in self.needs if not need.met(*arguments)), "")


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _from_triton(name: str) -> Callable[[], Callable]:
    def load():
        from . import triton

        return getattr(triton, name)

    return load


def _max_columns() -> int:
    from . import triton

    return triton.MAX_COLUMNS


def _max_beam_width() -> int:
    from . import triton

    return triton.MAX_BEAM_WIDTH


CUDA = Need("the tensor is not on a CUDA device", lambda x, *_: x.is_cuda)
NVIDIA = Need("the GPU is not made by NVIDIA", lambda *_: devices.is_nvidia())
TRITON = Need("Triton is not installed", lambda *_: has_triton())
AMPERE = Need("the GPU is older than SM 8.0", lambda x, *_: devices.compute_capability(x.device) >= (8, 0))
HALF = Need(
    "activations must be float16 or bfloat16 on a GPU without FP8 tensor cores",
    lambda x, qdata, *_: (
        qdata.dtype is torch.int8 or x.dtype in (torch.float16, torch.bfloat16) or devices.has_fp8_matmul(x.device)
    ),
)
BLOCKS = Need(
    "the block size must be a power of two from 32 to 1024",
    lambda x, qdata, scale, bias, block_size, *_: not block_size or _is_power_of_two(block_size, 32),
)
WEIGHT_BLOCKS = Need(
    "the block size must be a power of two from 16 to 1024",
    lambda x, dtype, block_size, *_: not block_size or _is_power_of_two(block_size, 16),
)
QDATA_BLOCKS = Need(
    "the block size must be a power of two from 16 to 1024",
    lambda qdata, scale, block_size, *_: not block_size or _is_power_of_two(block_size, 16),
)
FLOATS = Need(
    "activations must be float16, bfloat16 or float32",
    lambda x, *_: x.dtype in (torch.float16, torch.bfloat16, torch.float32),
)
COUPLED = Need("columns do not depend on each other", lambda weight, shift, before, coupling, *_: coupling is not None)
COLUMNS = Need(
    "a block has more columns than the kernel supports", lambda weight, *_: weight.shape[0] <= _max_columns()
)
BEAM = Need(
    "the beam is wider than the kernel supports",
    lambda weight, shift, coupling, column_cost, scale, group_rows, element, beam_width, *_: (
        beam_width <= _max_beam_width()
    ),
)
GROUPS = Need(
    "the length of a group must be a power of two from 4 to 256",
    lambda values, bits, *_: _is_group(values.shape[1] // bits.shape[1]),
)
PACKED_GROUPS = Need(
    "the length of a group must be a multiple of 16",
    lambda qdata, group_scale, *_: 2 * qdata.shape[1] // group_scale.shape[1] % 16 == 0,
)
LAYER_GROUPS = PACKED_GROUPS._replace(met=lambda x, *weight: PACKED_GROUPS.met(*weight))
_KERNEL = (CUDA, NVIDIA, TRITON, AMPERE)


def _is_power_of_two(size: int, least: int) -> bool:
    return least <= size <= 1024 and size & (size - 1) == 0


def _is_group(size: int) -> bool:
    return 4 <= size <= 256 and size & (size - 1) == 0


def _reference(name: str) -> Implementation:
    return Implementation(lambda: getattr(reference, name))


# Operation → backend → implementation, best first. Those of quantize_inputs, scaled_linear and w4a8_linear return a
# function for activations of one shape, which :mod:`.prepared` keeps.
OPERATIONS: Mapping[str, Mapping[str, Implementation]] = {
    "quantize_inputs": {
        "triton": Implementation(_from_triton("prepare_quantizer"), (*_KERNEL, FLOATS, WEIGHT_BLOCKS)),
        "reference": _reference("prepare_quantizer"),
    },
    "quantize_weight": {
        "triton": Implementation(_from_triton("quantize_weight"), (*_KERNEL, FLOATS, WEIGHT_BLOCKS)),
        "reference": _reference("quantize_weight"),
    },
    "dequantize_weight": {
        "triton": Implementation(_from_triton("dequantize_weight"), (*_KERNEL, QDATA_BLOCKS)),
        "reference": _reference("dequantize_weight"),
    },
    "scaled_linear": {
        "triton": Implementation(_from_triton("prepare_linear"), (*_KERNEL, FLOATS, HALF, BLOCKS)),
        "autotuned": Implementation(_from_triton("prepare_autotuned_linear"), (*_KERNEL, FLOATS, HALF, BLOCKS)),
        "torch": Implementation(
            lambda: tensor_cores.prepare_linear, (CUDA, NVIDIA, AMPERE, *map(Need._make, tensor_cores.NEEDS))
        ),
        "reference": _reference("prepare_linear"),
    },
    "expand_weight": {
        "triton": Implementation(_from_triton("expand_weight"), (CUDA, NVIDIA, TRITON, PACKED_GROUPS)),
        "reference": _reference("expand_weight"),
    },
    "w4a8_linear": {
        "triton": Implementation(_from_triton("prepare_w4a8_linear"), (*_KERNEL, FLOATS, LAYER_GROUPS)),
        "reference": _reference("prepare_w4a8_linear"),
    },
    "round_block": {
        "triton": Implementation(_from_triton("round_block"), (CUDA, NVIDIA, TRITON, COUPLED, COLUMNS)),
        "reference": _reference("round_block"),
    },
    "round_block_beam": {
        "triton": Implementation(_from_triton("round_block_beam"), (CUDA, NVIDIA, TRITON, COLUMNS, BEAM)),
        "reference": _reference("round_block_beam"),
    },
    "scale_errors": {
        "triton": Implementation(_from_triton("scale_errors"), (CUDA, NVIDIA, TRITON)),
        "reference": _reference("scale_errors"),
    },
    "search_level_scales": {
        "triton": Implementation(_from_triton("search_level_scales"), (CUDA, NVIDIA, TRITON, GROUPS)),
        "reference": _reference("search_level_scales"),
    },
}


def refusals(operation: str, *arguments) -> dict[str, str]:
    """Return the unmet need of each implementation of an operation for these arguments; usable ones are omitted."""
    found = {name: entry.refusal(*arguments) for name, entry in OPERATIONS[operation].items()}
    return {name: text for name, text in found.items() if text}


def backend(name: str | None = None) -> str:
    """Return the selected backend; with a name of :data:`BACKENDS`, select it first.

    Raises:
        ValueError: ``name`` is not in :data:`BACKENDS`.
    """
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"{name!r} is not a kernel backend; choose one of {', '.join(BACKENDS)}.")
        _selected[0] = name
    return _selected[0]


@contextmanager
def using(name: str):
    """Context manager that selects a backend and restores the previous one on exit."""
    before = backend()
    backend(name)
    try:
        yield
    finally:
        backend(before)


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)


def implementation(operation: str, *arguments) -> Callable:
    """Return the function that computes an operation for these arguments."""
    entries = OPERATIONS[operation]
    selected = backend()
    name = selected if selected in entries else _FALLBACKS.get(selected, selected)
    if name in entries and not entries[name].refusal(*arguments):
        return entries[name].load()
    usable = (name for name, entry in entries.items() if not entry.refusal(*arguments))
    first = next(usable)
    if first == "reference":
        _log_once(f"Kernels run in plain torch: {entries['triton'].refusal(*arguments)}.")
    elif selected == "auto" and operation == "scaled_linear":
        first = tuning.fastest_backend([first, *usable], entries, arguments)
    return entries[first].load()
