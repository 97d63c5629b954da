"""ComfyUI's quantized linear layer with a short forward pass, and with the layer JSON of our formats.

ComfyUI prepares the weight in every call: it looks for patches, casts it and moves it to the GPU. Its Python code for that
takes longer than most layers run on a GPU, even where the weight is in VRAM and has no patches. The short forward pass then
calls the kernels directly; in every other case ComfyUI's own forward pass runs.
"""

import functools
from collections.abc import Callable, Mapping

import comfy.ops
import torch

from ... import kernels
from ...quant_core.formats.layer_json import CONFIG_KEY, config_tensor
from . import native_int8

__all__ = ["extend_linear", "has_short_forward"]

_FP8_LAYOUT = "TensorCoreFP8E4M3Layout"
_DEVICES = ("cuda",)


def _run_int8(layer, x, weight, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    if native_int8.is_native_int8_off():
        return forward()
    return native_int8.run_native_int8(x, weight, layer._parameters["bias"])


def _run_fp8(layer, x, weight, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    parameters, qdata = layer._parameters, weight._qdata
    if not kernels.has_static_fp8(x, qdata):
        return forward()
    scale, input_scale = weight._params.scale, parameters.get("input_scale")
    return kernels.fp8_static_linear(x, qdata, scale, input_scale, parameters["bias"])


def _run_scaled(layer, x, weight, forward) -> torch.Tensor:
    params = weight._params
    return kernels.scaled_linear(
        x, weight._qdata, params.scale, layer._parameters["bias"], block_size=params.block_size or 0
    )


@functools.cache
def _short_forwards() -> Mapping[str, Callable]:
    """Layout → function (layer, activations, weight, ComfyUI's forward pass) that computes the layer."""
    from ..runtime.layouts import LAYOUTS

    own = {layout.__name__: _run_scaled for layout in LAYOUTS.values()}
    return {native_int8.LAYOUT: _run_int8, _FP8_LAYOUT: _run_fp8, **own}


def has_short_forward(layer: torch.nn.Module) -> bool:
    """Whether ``layer`` is a linear layer of ComfyUI whose layout has a short forward pass."""
    return hasattr(layer, "in_features") and getattr(layer, "layout_type", None) in _short_forwards()


def _is_ready(layer, x) -> bool:
    """Whether a layer's weight is on the device of its activations, has their dtype and no patches."""
    attributes, parameters = layer.__dict__, layer._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    return (
        type(x) is torch.Tensor  # not a tracer, and not quantized
        and x.device.type in _DEVICES
        and not layer.weight_function
        and not layer.bias_function
        and "_v" not in attributes  # dynamic VRAM
        and not attributes.get("comfy_force_cast_weights")
        and not attributes["_full_precision_mm"]
        and "pre_quant_scale" not in parameters
        and weight.dtype is x.dtype
        and weight.device == x.device
        and (bias is None or bias.dtype is x.dtype and bias.device == x.device)
        and not x.requires_grad
        and not torch.compiler.is_compiling()
    )


@functools.lru_cache(maxsize=8)  # ComfyUI makes one class per model
def extend_linear(linear):
    """A subclass of ComfyUI's quantized Linear, for layers with one of the layouts of :func:`has_short_forward`."""
    if getattr(linear, "is_extended", False):
        return linear

    class Linear(linear):
        is_extended = True

        def forward(self, input, *args, **kwargs):
            if not _is_ready(self, input):
                return super().forward(input, *args, **kwargs)
            comfy.ops.run_every_op()  # ComfyUI's check for an interrupt
            stock = functools.partial(super().forward, input, *args, **kwargs)
            return _short_forwards()[self.layout_type](self, input, self._parameters["weight"], stock)

        def _forward(self, input, weight, bias):
            # Without inference mode torch splits activations of other strides into batched products with the expanded
            # dequantized weight.
            return super()._forward(input.contiguous() if self._is_own else input, weight, bias)

        @property
        def _is_own(self) -> bool:
            from ..runtime.layouts import LAYOUTS

            return self.quant_format in LAYOUTS

        def state_dict(self, *args, destination=None, prefix="", **kwargs):
            from ..runtime.layouts import LAYOUTS

            state = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
            key = prefix + CONFIG_KEY
            if key in state and self._is_own:
                state[key] = config_tensor(LAYOUTS[self.quant_format].codec(self.weight._params.block_size).config)
            return state

    return Linear
