"""What stock ComfyUI 0.33 with comfy-kitchen 0.2.31 does with a layer on a card: facts read in their sources, not measured.

``comfy/model_management.py`` (``supports_fp8_compute``, ``supports_nvfp4_compute``, ``supports_mxfp8_compute``) decides which
formats ``comfy/ops.py`` (``pick_operations``) multiplies; the other formats of ``comfy/quant_ops.py`` (``QUANT_ALGOS``) reach
comfy-kitchen's ``*_linear`` on every card, whose CUDA kernels start at SM 7.5 (INT8, ConvRot W4A4) and SM 8.0 (W4A8), with plain
torch below that. INT4 activations: ``_cuda_device_supports_native_int4_mma`` (SM 8.x) and ``_should_use_turing_int4`` (SM 7.5).
"""

from typing import Literal

from .codec import Codec
from .table import release_number

__all__ = ["CARDS", "Support", "describe_support", "find_support", "parse_card"]

# NVIDIA's compute capabilities between which ComfyUI multiplies other formats.
CARDS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

_KITCHEN = "0.2.31"

Support = Literal["native", "decoded", "unsupported"]
"""native: activations are quantized and multiplied by the quantized weight; decoded: the weight is dequantized and activations
are not quantized; unsupported: stock ComfyUI does not read the format."""


def parse_card(card: str) -> tuple[int, int]:
    """Compute capability of a card as recipes write it: "8.9" is (8, 9)."""
    major, minor = card.split(".")
    return int(major), int(minor)


def find_support(codec: Codec, capability: tuple[int, int]) -> Support:
    """How stock ComfyUI computes layers of this codec on a card of that compute capability."""
    needed = codec.kitchen_since
    if codec.format.stock_since is None or (needed and release_number(needed) > release_number(_KITCHEN)):
        return "unsupported"
    return "native" if codec.quantizes_activations(capability) else "decoded"


def describe_support(codec: Codec, capability: tuple[int, int]) -> str:
    """:func:`find_support` for people, with the elements of quantized activations: "native, INT8 activations"."""
    support = find_support(codec, capability)
    return f"native, {codec.activation_elements(capability).name} activations" if support == "native" else support
