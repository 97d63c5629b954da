"""Sequential rounding: each layer is rounded for the activations that the quantized layers before it produce.

A model that can be called again (:class:`ReplayedModel`) is followed block by block with recorded calls; inside a block the
layers are rounded in the order of their execution.
"""

from .block import PendingLayer
from .model import Block, ReplayedModel, UnfollowedModelError, find_blocks
from .walk import ModelErrors, ModelWalk

__all__ = [
    "Block",
    "ModelErrors",
    "ModelWalk",
    "PendingLayer",
    "ReplayedModel",
    "UnfollowedModelError",
    "find_blocks",
]
