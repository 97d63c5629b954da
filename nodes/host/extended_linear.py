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
from . import native_layers

__all__ = ["extend_linear", "has_short_forward"]

_FP8_LAYOUT = "TensorCoreFP8E4M3Layout"
_DEVICES = ("cuda",)


def _run_native(multiply, x, weight, bias, layer) -> torch.Tensor | None:
    return None if native_layers.is_off() else multiply(x, weight, bias)


def _run_fp8(x, weight, bias, layer) -> torch.Tensor | None:
    qdata, scale, input_scale = weight._qdata, weight._params.scale, layer._parameters.get("input_scale")
    if native_layers.is_off() or not kernels.has_static_fp8(x, qdata, scale, input_scale):
        return None
    return kernels.fp8_static_linear(x, qdata, scale, input_scale, bias)


def _run_scaled(x, weight, bias, layer) -> torch.Tensor:
    params = weight._params
    return kernels.scaled_linear(x, weight._qdata, params.scale, bias, block_size=params.block_size or 0)


@functools.cache
def _short_forwards() -> Mapping[str, Callable]:
    """Layout → function (activations, weight, bias, layer) that computes the layer; None where it cannot."""
    from ..runtime.layouts import LAYOUTS

    own = {layout.__name__: _run_scaled for layout in LAYOUTS.values()}
    native = native_layers.NATIVE_LAYERS.items()
    return {
        **{layout: functools.partial(_run_native, layer.multiply) for layout, layer in native},
        _FP8_LAYOUT: _run_fp8,
        **own,
    }


def has_short_forward(layer: torch.nn.Module) -> bool:
    """Whether ``layer`` is a linear layer of ComfyUI whose layout has a short forward pass."""
    is_linear = hasattr(layer, "_forward")  # an embedding or a bank of experts has none
    return is_linear and getattr(layer, "layout_type", None) in _short_forwards()


def _is_plain(layer, x) -> bool:
    """Whether a layer's weight has no patches or casts, and its activations are those of an eager forward pass."""
    if torch.compiler.is_compiling():  # first, so that a compiled graph has no guards on the rest
        return False
    attributes = layer.__dict__
    return (
        type(x) is torch.Tensor  # not a tracer, and not quantized
        and x.device.type in _DEVICES
        and not layer.weight_function
        and not layer.bias_function
        and not attributes.get("comfy_force_cast_weights")
        and not attributes.get("_full_precision_mm", True)
        and "_prefetch" not in attributes
        and "pre_quant_scale" not in layer._parameters
        and not x.requires_grad
    )


def _fits(layer, x, weight, bias) -> bool:
    """Whether the weight has the layer's layout, and weight and bias have the device and dtype of the activations."""
    return (
        getattr(weight, "_layout_cls", None) == layer.layout_type  # another node may have replaced the weight
        and weight.dtype is x.dtype
        and weight.device == x.device
        and (bias is None or (bias.dtype is x.dtype and bias.device == x.device))
    )


def _run_short(layer, x) -> torch.Tensor | None:
    """Run a layer by the short forward pass; None where ComfyUI's own must run."""
    if not _is_plain(layer, x):
        return None
    run = _short_forwards()[layer.layout_type]
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if _fits(layer, x, weight, bias):
        return run(x, weight, bias, layer)
    pages = layer.__dict__.get("_v")
    return None if pages is None else _run_resident(layer, x, pages, run)


def _run_resident(layer, x, pages, run) -> torch.Tensor | None:
    """As :func:`_run_short` with dynamic VRAM, which moves ``pages``: if the weight and its patches are in VRAM already."""
    from comfy_aimdo import model_vbar

    signature = model_vbar.vbar_fault(pages)  # pins the pages, unless they do not fit into VRAM
    if signature is None:
        return None
    try:
        if not model_vbar.vbar_signature_compare(signature, layer._v_signature):
            return None
        weight, bias = layer._v_weight, layer._v_bias
        return run(x, weight, bias, layer) if _fits(layer, x, weight, bias) else None
    finally:
        model_vbar.vbar_unpin(pages)


@functools.lru_cache(maxsize=8)  # ComfyUI makes one class per model
def extend_linear(linear):
    """A subclass of ComfyUI's quantized Linear, for layers with one of the layouts of :func:`has_short_forward`."""
    if getattr(linear, "is_extended", False):
        return linear

    class Linear(linear):
        is_extended = True

        def forward(self, input, *args, **kwargs):
            result = _run_short(self, input)
            if result is None:
                return super().forward(input, *args, **kwargs)
            comfy.ops.run_every_op()  # ComfyUI's check for an interrupt
            return result

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
