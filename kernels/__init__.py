"""GPU kernels behind one dispatch: ``triton/`` and ``reference/`` (plain torch) hold the same names and signatures.

A tensor on a CUDA device goes to Triton where Triton is installed, everything else to plain torch.
"""

import functools
import importlib.util
import logging

import torch

from . import reference

__all__ = ["round_block", "scale_errors"]

log = logging.getLogger(__name__)


@functools.cache
def _triton():
    """The Triton implementations, or None where there is no Triton; said once."""
    if torch.version.hip or importlib.util.find_spec("triton") is None:
        log.info("Triton is not installed for an NVIDIA GPU here: kernels run in plain torch.")
        return None
    from . import triton

    return triton


def _implementation(tensor: torch.Tensor):
    return (tensor.is_cuda and _triton()) or reference


def round_block(weight, shift, before, coupling, scale, tile_rows, grid):
    """Round a block of columns one after the other, feeding each column's error to the others; see :mod:`.reference`."""
    implementation = reference if coupling is None else _implementation(weight)  # independent columns need no kernel
    return implementation.round_block(weight, shift, before, coupling, scale, tile_rows, grid)


def scale_errors(weight, scale, ratios, column_weight, tile_rows, tile_columns, group, grid):
    """Squared rounding errors under many candidate scales in one pass; see :mod:`.reference`."""
    return _implementation(weight).scale_errors(
        weight, scale, ratios, column_weight, tile_rows, tile_columns, group, grid
    )
