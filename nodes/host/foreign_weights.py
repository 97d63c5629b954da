"""Weights of a MODEL or CLIP that another node pack stores in a class of its own: dequantized by it, else refused by name."""

import re
from collections.abc import Callable
from inspect import getattr_static
from operator import methodcaller
from typing import NamedTuple

import comfy.utils
import torch

from ...quant_core.errors import AlreadyQuantizedError, SourceError

__all__ = ["DECODED", "HeldWeight", "hold_weight"]

_DISPATCH = "__torch_dispatch__"  # overridden by tensors without memory of their own
DECODED = torch.bfloat16  # dtype of weights that another pack dequantizes, as of those in GGUF files
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_VALUES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PACKED = (torch.uint8, torch.int8, torch.int16)  # matrices of these dtypes are quantized values
_ADVICE = "choose its file in Load Model File for Quantization, or connect the full-precision original"
Decoder = Callable[[torch.Tensor], torch.Tensor]
Loader = Callable[[torch.Tensor, torch.device], torch.Tensor]


class HeldWeight(NamedTuple):
    """A tensor of a model: itself, and what dequantizes it onto a device (None for plain values)."""

    tensor: torch.Tensor
    decode: Loader | None


def hold_weight(model: torch.nn.Module, key: str, name: str) -> HeldWeight:
    """The tensor ``key`` of ``model``.

    Args:
        name: kind of the model, for messages.

    Raises:
        AlreadyQuantizedError: the weight is quantized, and neither it nor its layer has a method that dequantizes it.
        SourceError: the weight has no values in memory, or is in the state dict alone.
    """
    layer = key.rpartition(".")[0]
    try:
        module, tensor = comfy.utils.get_attr(model, layer) if layer else model, comfy.utils.get_attr(model, key)
    except AttributeError:
        raise SourceError(f"The {name} has {key} in its state dict and not in its layers; {_ADVICE}.") from None
    if tensor.is_meta:
        raise SourceError(f"The {name} has no values of {key} in memory ({_describe(module, tensor)}); {_ADVICE}.")
    if decode := _find_decoder(module, tensor):
        return HeldWeight(tensor, _explain(decode, name, key, tensor))
    if not _has_values(tensor):
        raise AlreadyQuantizedError(
            f"The {name} is already quantized: {key} is a {_describe(module, tensor)}, which cannot be dequantized here; {_ADVICE}."
        )
    return HeldWeight(tensor if type(tensor) in _PLAIN else tensor.as_subclass(torch.Tensor), None)


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor holds its values."""
    if type(tensor) in _PLAIN:
        return tensor.dtype not in _PACKED or tensor.dim() < 2
    if getattr_static(type(tensor), _DISPATCH) is not getattr_static(torch.Tensor, _DISPATCH):
        return False
    stored = tensor.as_subclass(torch.Tensor)
    return stored.dtype in _VALUES and stored.shape == tensor.shape


def _find_decoder(module: torch.nn.Module, tensor: torch.Tensor) -> Decoder | None:
    """The dequantization of a weight's class (torchao, quanto) or of its layer (ComfyUI-GGUF); None for plain values."""
    if type(tensor) in _PLAIN:
        return None
    if type(tensor).dequantize is not torch.Tensor.dequantize:
        return methodcaller("dequantize")
    get_weight: Callable[..., torch.Tensor] | None = getattr(module, "get_weight", None)
    if get_weight and not _has_values(tensor):
        return lambda weight: get_weight(_without_patches(weight), torch.float32)
    return None


def _without_patches(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without patches that its loader stored in it: those of the model that is loaded now, and applied by ``get_weight``."""
    if not getattr(tensor, "patches", None):
        return tensor
    copy = tensor.as_subclass(torch.Tensor).as_subclass(type(tensor))
    for attribute, value in (vars(tensor) | {"patches": []}).items():
        setattr(copy, attribute, value)
    return copy


def _explain(decode: Decoder, name: str, key: str, tensor: torch.Tensor) -> Loader:
    """``decode`` on a device, with errors of other packs as a SourceError, and its result as a plain tensor of the weight's shape."""
    shape, kind = tuple(tensor.shape), type(tensor).__name__

    def decode_weight(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
        try:
            values = decode(_move(weight, device)).as_subclass(torch.Tensor)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of another pack
            raise SourceError(
                f"The {name} cannot be read: dequantizing {key} ({kind}) failed ({error}); {_ADVICE}."
            ) from error
        if tuple(values.shape) != shape or values.dtype not in _VALUES:
            found = f"{values.dtype} {list(values.shape)}"
            raise SourceError(
                f"The {name} cannot be read: {key} ({kind}) dequantizes to {found}, not to {list(shape)}; {_ADVICE}."
            )
        return values

    return decode_weight


def _move(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``weight`` on ``device``; where it is, if its class cannot be moved."""
    if weight.device == device:
        return weight
    try:
        return weight.to(device)
    except NotImplementedError:
        return weight


def _describe(module: torch.nn.Module, tensor: torch.Tensor) -> str:
    """The class that stores a weight, and the package or node pack that it is from."""
    kind = type(module) if type(tensor) in _PLAIN else type(tensor)
    pack = re.split(r"[/\\]", kind.__module__)[-1].partition(".")[0]  # ComfyUI names modules of packs by their path
    return f"{kind.__name__} of {pack}"
