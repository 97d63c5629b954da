"""ComfyUI's quantized linear layer with ``pre_quant_scale``, whose patches apply to the weight before smoothing.

Such a layer stores W/s and multiplies its activations by s (:mod:`...quant_core.formats.smoothing`). ComfyUI adds a LoRA's
ΔW to the stored weight, so that the layer computes x·(W + ΔW·s)ᵀ. Here every patch gets W, and its result is divided by s
before it is quantized again or used.
"""

import copy
import functools

import torch
from comfy.model_patcher import LowVramPatch

from ...quant_core.formats.smoothing import SMOOTHING_KEY, Smoothing

__all__ = ["is_smoothed", "patch_unsmoothed"]


def is_smoothed(layer: torch.nn.Module) -> bool:
    """Whether ``layer`` is a linear layer of ComfyUI that scales its activations."""
    return layer._parameters.get(SMOOTHING_KEY) is not None


def _restore(layer, weight: torch.Tensor) -> torch.Tensor:
    return Smoothing(layer.pre_quant_scale).restore_weight(weight).to(weight.dtype)


def _apply(layer, weight: torch.Tensor) -> torch.Tensor:
    return Smoothing(layer.pre_quant_scale).apply_weight(weight).to(weight.dtype)


class _UnsmoothedPatch(LowVramPatch):
    """A patch that ComfyUI adds to a weight on its way to the GPU."""

    layer: torch.nn.Module

    @classmethod
    def of(cls, patch: LowVramPatch, layer: torch.nn.Module) -> "_UnsmoothedPatch":
        made = copy.copy(patch)
        made.__class__ = cls
        made.layer = layer
        return made

    def __call__(self, weight):
        return _apply(self.layer, super().__call__(_restore(self.layer, weight)))


@functools.lru_cache(maxsize=8)  # ComfyUI makes one class per model
def patch_unsmoothed(linear):
    """A subclass of ComfyUI's quantized Linear, for layers of :func:`is_smoothed`."""
    if getattr(linear, "is_unsmoothed_for_patches", False):
        return linear

    class Linear(linear):
        is_unsmoothed_for_patches = True

        def convert_weight(self, weight, inplace=False, **kwargs):
            return _restore(self, super().convert_weight(weight, inplace=inplace, **kwargs))

        def set_weight(self, weight, *args, **kwargs):
            return super().set_weight(_apply(self, weight), *args, **kwargs)

        @property
        def weight_lowvram_function(self):
            """The patch that dynamic VRAM applies when it moves the weight."""
            return self.__dict__.get("_unsmoothed_patch")

        @weight_lowvram_function.setter
        def weight_lowvram_function(self, patch):
            self.__dict__["_unsmoothed_patch"] = None if patch is None else _UnsmoothedPatch.of(patch, self)

        def forward(self, input, *args, **kwargs):
            functions = self.weight_function
            if not functions:
                return super().forward(input, *args, **kwargs)
            self.weight_function = [
                functools.partial(_restore, self),
                *functions,
                functools.partial(_apply, self),
            ]
            try:
                return super().forward(input, *args, **kwargs)
            finally:
                self.weight_function = functions

    return Linear
