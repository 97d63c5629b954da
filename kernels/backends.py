"""Which implementation runs: the fastest one that can, or the one that was asked for.

Every operation has a list of implementations, best first, each with what it needs. ``refusals`` says for each one that
cannot run why not; the reference needs nothing.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from . import cards, reference, tensor_cores, tuning

__all__ = ["BACKENDS", "OPERATIONS", "backend", "implementation", "refusals", "using"]

log = logging.getLogger(__name__)

# Name → what it means, for people.
BACKENDS: Mapping[str, str] = {
    "auto": "Triton or torch, whichever is faster here for a shape: measured once, remembered",
    "triton": "Triton kernels with the launch settings they come with",
    "autotuned": "Triton kernels, with launch settings measured once for each shape and remembered",
    "torch": "torch's own 8-bit matrix products",
    "reference": "plain torch: decode, then multiply",
}
# What a backend means for an operation that has no implementation of that name.
_INSTEAD = {"torch": "reference", "autotuned": "triton"}
VARIABLE = "LEARNED_ROUNDING_BACKEND"


def _asked_for() -> str:
    """The backend that the environment names, or auto."""
    name = os.environ.get(VARIABLE) or "auto"
    if name in BACKENDS:
        return name
    log.warning(
        "%s names no kernel backend: %r, so auto is used; choose one of %s.", VARIABLE, name, ", ".join(BACKENDS)
    )
    return "auto"


_chosen = [_asked_for()]


class Need(NamedTuple):
    """Something an implementation needs: a sentence for people, and a test of the operation's arguments."""

    text: str
    met: Callable[..., bool]


class Implementation(NamedTuple):
    """One way to compute an operation; ``load`` returns the function, and is called only when every need is met."""

    load: Callable[[], Callable]
    needs: tuple[Need, ...] = ()

    def refusal(self, *arguments) -> str:
        """Why it cannot run, empty when it can."""
        return next((need.text for need in self.needs if not need.met(*arguments)), "")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _from_triton(name: str) -> Callable[[], Callable]:
    def load():
        from . import triton

        return getattr(triton, name)

    return load


CUDA = Need("the tensor is not on a CUDA device", lambda x, *_: x.is_cuda)
NVIDIA = Need("the card is not made by NVIDIA", lambda *_: cards.is_nvidia())
TRITON = Need("Triton is not installed", lambda *_: _has_triton())
AMPERE = Need("the card is older than SM 8.0", lambda x, *_: cards.capability(x.device) >= (8, 0))
HALF = Need(
    "inputs must be float16 or bfloat16 where the card has no FP8",
    lambda x, codes, *_: (
        codes.dtype is torch.int8 or x.dtype in (torch.float16, torch.bfloat16) or cards.multiplies_fp8(x.device)
    ),
)
BLOCKS = Need(
    "the block size must be a power of two from 32 to 1024",
    lambda x, codes, scale, bias, block_size, *_: not block_size or _is_power(block_size, 32),
)
WEIGHT_BLOCKS = Need(
    "the block size must be a power of two from 16 to 1024",
    lambda x, dtype, block_size, *_: not block_size or _is_power(block_size, 16),
)
CODE_BLOCKS = Need(
    "the block size must be a power of two from 16 to 1024",
    lambda codes, scale, block_size, *_: not block_size or _is_power(block_size, 16),
)
FLOATS = Need(
    "inputs must be float16, bfloat16 or float32",
    lambda x, *_: x.dtype in (torch.float16, torch.bfloat16, torch.float32),
)
COUPLED = Need("columns do not depend on each other", lambda weight, shift, before, coupling, *_: coupling is not None)
COLUMNS = Need(
    "a block has more columns than a kernel rounds in one go",
    lambda weight, *_: weight.shape[0] <= _from_triton("MAX_COLUMNS")(),
)
_KERNEL = (CUDA, NVIDIA, TRITON, AMPERE)


def _is_power(size: int, least: int) -> bool:
    return least <= size <= 1024 and size & (size - 1) == 0


def _reference(name: str) -> Implementation:
    return Implementation(lambda: getattr(reference, name))


# Operation → backend → implementation, best first.
OPERATIONS: Mapping[str, Mapping[str, Implementation]] = {
    "quantize_inputs": {
        "triton": Implementation(_from_triton("quantize_inputs"), (*_KERNEL, FLOATS, WEIGHT_BLOCKS)),
        "reference": _reference("quantize_inputs"),
    },
    "quantize_weight": {
        "triton": Implementation(_from_triton("quantize_weight"), (*_KERNEL, FLOATS, WEIGHT_BLOCKS)),
        "reference": _reference("quantize_weight"),
    },
    "dequantize_weight": {
        "triton": Implementation(_from_triton("dequantize_weight"), (*_KERNEL, CODE_BLOCKS)),
        "reference": _reference("dequantize_weight"),
    },
    "scaled_linear": {
        "triton": Implementation(_from_triton("scaled_linear"), (*_KERNEL, FLOATS, HALF, BLOCKS)),
        "autotuned": Implementation(_from_triton("autotuned_linear"), (*_KERNEL, FLOATS, HALF, BLOCKS)),
        "torch": Implementation(
            lambda: tensor_cores.scaled_linear, (CUDA, NVIDIA, AMPERE, *map(Need._make, tensor_cores.NEEDS))
        ),
        "reference": _reference("scaled_linear"),
    },
    "round_block": {
        "triton": Implementation(_from_triton("round_block"), (CUDA, NVIDIA, TRITON, COUPLED, COLUMNS)),
        "reference": _reference("round_block"),
    },
    "scale_errors": {
        "triton": Implementation(_from_triton("scale_errors"), (CUDA, NVIDIA, TRITON)),
        "reference": _reference("scale_errors"),
    },
}


def refusals(operation: str, *arguments) -> dict[str, str]:
    """Why each implementation of an operation cannot run with these arguments; those that can are left out."""
    found = {name: entry.refusal(*arguments) for name, entry in OPERATIONS[operation].items()}
    return {name: text for name, text in found.items() if text}


def backend(name: str | None = None) -> str:
    """The backend in use; with a name of :data:`BACKENDS`, that one from now on. Raises ValueError for another name."""
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"There is no kernel backend {name!r}; choose one of {', '.join(BACKENDS)}.")
        _chosen[0] = name
    return _chosen[0]


@contextmanager
def using(name: str):
    """Another backend for a while."""
    before = backend()
    backend(name)
    try:
        yield
    finally:
        backend(before)


@functools.cache
def _say_once(message: str) -> None:
    log.info(message)


def implementation(operation: str, *arguments) -> Callable:
    """The function that is to compute an operation with these arguments."""
    entries = OPERATIONS[operation]
    name = _chosen[0] if _chosen[0] in entries else _INSTEAD.get(_chosen[0])
    if name in entries and not entries[name].refusal(*arguments):
        return entries[name].load()
    refused = refusals(operation, *arguments)
    possible = [name for name in entries if name not in refused]
    if possible == ["reference"]:
        _say_once(f"Kernels run in plain torch: {refused['triton']}.")
    elif _chosen[0] == "auto" and operation == "scaled_linear":
        possible = [tuning.fastest_backend(possible, entries, arguments)]
    return entries[possible[0]].load()
