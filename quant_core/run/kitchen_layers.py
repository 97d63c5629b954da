"""Linear layers of comfy-kitchen, which ComfyUI runs its formats with, from the tensors of a file.

comfy-kitchen comes with ComfyUI. It is imported to time its layers only; without it, formats that this package has no kernel
for are not measured. The layouts and their parameters are those of ComfyUI 0.33, ``comfy/ops.py``, ``_load_quantized_module``.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
import torch.nn.functional as F

from ..formats import Codec, Parts

__all__ = ["kitchen_version", "prepare_kitchen_layer"]


def _rotation_size(codec: Codec) -> int:
    return codec.rotation.size if codec.rotation else 0


# Format → comfy-kitchen's layout, and the layout's parameters from the codec and the tensors of a layer.
_LAYOUTS: Mapping[str, tuple[str, Callable[[Codec, Parts], dict[str, object]]]] = {
    "int8_tensorwise": (
        "TensorWiseINT8Layout",
        lambda codec, parts: {
            "scale": parts["weight_scale"],
            **({"convrot": True, "convrot_groupsize": _rotation_size(codec)} if codec.rotation else {}),
        },
    ),
    "nvfp4": (
        "TensorCoreNVFP4Layout",
        lambda codec, parts: {"scale": parts["weight_scale_2"], "block_scale": parts["weight_scale"]},
    ),
    "mxfp8": (
        "TensorCoreMXFP8Layout",
        lambda codec, parts: {"scale": parts["weight_scale"].view(torch.float8_e8m0fnu)},
    ),
    "convrot_w4a4": (
        "TensorCoreConvRotW4A4Layout",
        lambda codec, parts: {
            "scale": parts["weight_scale"],
            "convrot_groupsize": _rotation_size(codec),
            "linear_dtype": codec.config["linear_dtype"],
        },
    ),
    "asym_w4a8_int8": (
        "AsymW4A8Int8Layout",
        lambda codec, parts: {
            "scale": parts["weight_s_rel"],
            "s_channel": parts["weight_s_channel"],
            "codebook": parts.get("weight_codebook"),
            "group_size": codec.group_size,
            "convrot_groupsize": _rotation_size(codec),
        },
    ),
}
_QUANTIZED_FIRST = (
    "nvfp4",
    "mxfp8",
)  # ComfyUI quantizes the activations of these before the layer, as a tensor of the layout


def kitchen_version() -> str | None:
    """Version of comfy-kitchen; None where it is not installed."""
    try:
        return version("comfy-kitchen")
    except PackageNotFoundError:
        return None


def prepare_kitchen_layer(
    codec: Codec, parts: Parts, shape: tuple[int, int], dtype: torch.dtype, *, native: bool
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The layer as ComfyUI computes it: a function of activations (tokens, in) of ``dtype``; None where it cannot.

    Args:
        parts: suffix → tensor of the layer.
        shape: (out, in) of the weight.
        native: quantize activations; else the weight is dequantized.
    """
    tensors = _import_tensors()
    if tensors is None or codec.format.name not in _LAYOUTS:
        return None
    name, parameters = _LAYOUTS[codec.format.name]
    layout, quantized = tensors.get_layout_class(name), tensors.QuantizedTensor
    params = layout.Params(**parameters(codec, parts), orig_dtype=dtype, orig_shape=shape)
    weight = quantized(parts["weight"], name, params)
    if not native:
        return lambda x: F.linear(x, weight.dequantize())
    if codec.format.name in _QUANTIZED_FIRST:
        return lambda x: F.linear(quantized.from_float(x, name), weight)
    return lambda x: F.linear(x, weight)


def _import_tensors() -> ModuleType | None:
    try:
        from comfy_kitchen import tensor
    except ImportError:
        return None
    return tensor
