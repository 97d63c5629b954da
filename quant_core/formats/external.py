"""Formats of other quantizers: recognised by their tensor names, then read or refused, each by its name.

A layer of these formats has no ComfyUI layer JSON. The file layouts are those of the libraries' own serialization code, named
at each row of :data:`EXTERNAL`.
"""

import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from . import bitsandbytes, compressed_tensors
from .codec import Parts
from .companions import is_zero
from .layer_json import LayerSource

__all__ = ["EXTERNAL", "ExternalFormat", "ExternalLayer", "find_external", "plain_metadata"]

_ONE_BYTE = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_ORIGINAL = "give its full-precision original"
_NO_DECODER = f"this version has no decoder for them; {_ORIGINAL}"

Names = Mapping[str, str]
"""The tensors of a layer by key: key → name in the file. A layer that is read has a "weight"."""


@dataclass(frozen=True)
class ExternalFormat:
    """A format of another quantizer.

    With neither ``decode`` nor ``refusal`` a layer is an 8-bit weight and its scale, as in our formats, under other names.

    Attributes:
        name: for users.
        parts: key → end of a tensor's name, after the layer's. A layer of the format has all of them; the first is the mark
            that few other tensors have.
        optional: the same of tensors that a layer may have.
        accepts: further conditions on the tensors of a layer.
        scale_divisor: what a stored scale is divided by.
        read_shape: (out, in) of the weight of a layer. Raises ValueError with the reason where the tensors contradict it.
        decode: the weight (out, in) as float32 from the tensors of a layer by key.
        refusal: why the weights cannot be dequantized, and what to do, end of a sentence; empty where they can.
    """

    name: str
    parts: Names
    optional: Names = field(default_factory=dict)
    accepts: Callable[[LayerSource, Names], bool] = lambda source, names: True
    scale_divisor: float = 1.0
    read_shape: Callable[[LayerSource, Names], tuple[int, int]] | None = None
    decode: Callable[[Parts, tuple[int, ...]], torch.Tensor] | None = None
    refusal: str = ""

    @property
    def mark(self) -> str:
        """End of the name of the tensor by which a layer is found."""
        return next(iter(self.parts.values()))

    @property
    def renamed(self) -> bool:
        """A layer is an 8-bit weight and its scale under other names."""
        return self.decode is None and not self.refusal

    def find_names(self, source: LayerSource, layer: str) -> Names | None:
        """The tensors of a layer of that base name; None where it is in another format."""
        names = {key: layer + end for key, end in {**self.parts, **self.optional}.items()}
        names = {key: name for key, name in names.items() if name in source.tensors}
        return names if self.parts.keys() <= names.keys() and self.accepts(source, names) else None


@dataclass(frozen=True)
class ExternalLayer:
    """A layer of an external format: its base name and its tensors."""

    name: str
    format: ExternalFormat
    parts: Names


def _has_8_bits(source: LayerSource, names: Names) -> bool:
    """The weight is a matrix of 8-bit values."""
    weight = source.tensors[names["weight"]]
    return weight.dtype in _ONE_BYTE and len(weight.shape) == 2


def _has_blocks_of_128(source: LayerSource, names: Names) -> bool:
    """The weight is FP8, and its scale is one per 128 × 128 block of it, and neither one per row nor one for all."""
    weight, scale = source.tensors[names["weight"]], source.tensors[names["weight_scale"]]
    if not _has_8_bits(source, names) or weight.dtype is torch.int8:
        return False
    counts = tuple(-(-side // 128) for side in weight.shape)
    return tuple(scale.shape) == counts and math.prod(counts) > 1 and counts != (weight.shape[0], 1)


def _is_row_major(source: LayerSource, names: Names) -> bool:
    """The INT8 weight is not in a layout of a tensor core (``weight_format``, 0: row-major)."""
    layout = names.get("weight_format")
    if layout and (math.prod(source.tensors[layout].shape) != 1 or source.read(layout).reshape(()) != 0):
        return False
    return _has_8_bits(source, names)


def _is_torchao_8_bit(source: LayerSource, names: Names) -> bool:
    """The header calls the weight a tensor of a class that is quantized values times a scale, without zero points."""
    zero_point = names.get("zero_point")
    if zero_point and not is_zero(source, zero_point):
        return False
    weight = names["weight"].removesuffix("._weight_qdata") + ".weight"
    try:
        kind = json.loads(source.metadata.get(weight, "null"))
    except (ValueError, RecursionError):
        return False
    return isinstance(kind, dict) and kind.get("_type") in ("Float8Tensor", "Int8Tensor") and _has_8_bits(source, names)


def _is_awq(source: LayerSource, names: Names) -> bool:
    """The packed weight is (in, out/8), that of GPTQ (in/8, out)."""
    packed, scales = source.tensors[names["weight"]].shape, source.tensors[names["scales"]].shape
    return len(packed) == len(scales) == 2 and packed[1] != scales[1]


def _has_unpacked_weight(source: LayerSource, names: Names) -> bool:
    """There is a weight of quantized values: norms have a tensor ``scale`` too, and files that are FP8 as a whole."""
    weight, scale = (source.tensors[names[key]].dtype for key in ("weight", "weight_scale"))
    return weight in (*_ONE_BYTE, torch.uint8, torch.int16, torch.int32) and scale is not weight


def _is_expert_bank(source: LayerSource, names: Names) -> bool:
    return len(source.tensors[names["weight"]].shape) == 3


def _is_nvfp4(source: LayerSource, names: Names) -> bool:
    return source.tensors[names["weight"]].dtype is torch.uint8


_BITSANDBYTES_PARTS = {"weight": ".weight", "absmax": ".weight.absmax", "quant_map": ".weight.quant_map"}
_NESTED = {"nested_absmax": ".weight.nested_absmax", "nested_quant_map": ".weight.nested_quant_map"}
_PACKED = {"weight": ".weight_packed", "weight_scale": ".weight_scale"}
_INPUT = {"input_scale": ".input_scale", "output_scale": ".output_scale"}

EXTERNAL: tuple[ExternalFormat, ...] = (
    # transformers, integrations/finegrained_fp8.py: the name notwithstanding, W = weight · weight_scale_inv.
    ExternalFormat(
        "Hugging Face FP8",
        {"weight_scale": ".weight_scale_inv", "weight": ".weight"},
        {"input_scale": ".activation_scale"},
        accepts=_has_8_bits,
    ),
    *(
        ExternalFormat(
            "Hugging Face FP8 experts",
            {"weight_scale": scale, "weight": ""},
            accepts=_is_expert_bank,
            refusal=_NO_DECODER,
        )
        for scale in ("_scale_inv", "_scales_inv")
    ),
    # DeepSeek's own checkpoints (inference/kernel.py) call the same scales "scale".
    ExternalFormat(
        "DeepSeek FP8", {"weight_scale": ".scale", "weight": ".weight"}, accepts=_has_blocks_of_128
    ),
    # SDNQ, quantizer.py: transposition (quantized matmul) and rotation (Hadamard) are in its config.json alone.
    ExternalFormat(
        "SDNQ",
        {"weight_scale": ".scale", "weight": ".weight"},
        {"zero_point": ".zero_point", "svd_up": ".svd_up", "svd_down": ".svd_down"},
        accepts=_has_unpacked_weight,
        refusal=f"the file does not tell whether they are transposed or rotated; save the model dequantized with SDNQ, or {_ORIGINAL}",
    ),
    # optimum-quanto, tensor/weights/qbytes.py and qbits.py
    ExternalFormat(
        "quanto",
        {"shift": ".weight._shift"},
        {"weight": ".weight._data", "packed": ".weight._data._data", "scale": ".weight._scale", **_INPUT},
        refusal=f"the file does not contain the shape of weights of 2 and 4 bits; {_ORIGINAL}",
    ),
    ExternalFormat(
        "quanto", {"weight": ".weight._data", "weight_scale": ".weight._scale"}, _INPUT, accepts=_has_8_bits
    ),
    ExternalFormat("quanto", {"weight": ".weight._data"}, refusal=f"its scales are missing or packed; {_ORIGINAL}"),
    # bitsandbytes, functional.py (QuantState) and nn/modules.py (Linear8bitLt)
    *(
        ExternalFormat(
            f"bitsandbytes {kind.upper()}",
            {"quant_state": f".weight.quant_state.bitsandbytes__{kind}", **_BITSANDBYTES_PARTS},
            _NESTED,
            read_shape=bitsandbytes.read_shape,
            decode=bitsandbytes.decode,
        )
        for kind in ("nf4", "fp4")
    ),
    ExternalFormat(
        "bitsandbytes INT8",
        {"weight_scale": ".SCB", "weight": ".weight"},
        {"weight_format": ".weight_format"},
        accepts=_is_row_major,
        scale_divisor=127,
    ),
    *(
        ExternalFormat("bitsandbytes", {"mark": mark}, refusal=f"part of its quantization state is missing; {_ORIGINAL}")
        for mark in (".weight.absmax", ".weight.quant_map", ".SCB")
    ),
    # compressed-tensors, compressors/pack_quantized and nvfp4. Its unpacked 8-bit weights have our names.
    ExternalFormat(
        "compressed-tensors NVFP4",
        {**_PACKED, "weight_global_scale": ".weight_global_scale"},
        {"input_global_scale": ".input_global_scale"},
        read_shape=compressed_tensors.read_nvfp4_shape,
        decode=compressed_tensors.decode_nvfp4,
    ),
    ExternalFormat(
        "compressed-tensors packed INT",
        {**_PACKED, "weight_shape": ".weight_shape"},
        read_shape=compressed_tensors.read_packed_shape,
        decode=compressed_tensors.decode_packed,
    ),
    ExternalFormat("compressed-tensors", {"weight": ".weight_packed"}, refusal=_NO_DECODER),
    # ModelOpt's weights have the names of ComfyUI's nvfp4 and another order of values and scales.
    ExternalFormat(
        "NVFP4 without layer JSON",
        {"weight_scale_2": ".weight_scale_2", "weight": ".weight", "weight_scale": ".weight_scale"},
        {"input_scale": ".input_scale", "pre_quant_scale": ".pre_quant_scale"},
        accepts=_is_nvfp4,
        refusal=f"the order of its values and scales is unknown; {_ORIGINAL} or a file made for ComfyUI",
    ),
    # nunchaku: 4-bit values in the order of its tensor core instructions, beside low-rank branch and smoothing factors
    ExternalFormat(
        "nunchaku SVDQuant",
        {"scales": ".wscales", "weight": ".qweight"},
        refusal=f"their order is that of nunchaku's kernels; load it with nunchaku's nodes, or {_ORIGINAL}",
    ),
    # TinyChat's AWQ kernels, also of nunchaku's text encoders
    ExternalFormat(
        "AWQ of TinyChat",
        {"zeros": ".scaled_zeros", "weight": ".qweight", "scales": ".scales"},
        refusal=_NO_DECODER,
    ),
    ExternalFormat(
        "AWQ",
        {"weight": ".qweight", "scales": ".scales", "zeros": ".qzeros"},
        accepts=_is_awq,
        refusal=_NO_DECODER,
    ),
    ExternalFormat(
        "GPTQ",
        {"weight": ".qweight", "scales": ".scales"},
        refusal=f"the file does not tell which of two meanings its zero points have; {_ORIGINAL}",
    ),
    # torchao, prototype/safetensors
    ExternalFormat(
        "torchao",
        {"weight": "._weight_qdata", "weight_scale": "._weight_scale"},
        {"zero_point": "._weight_zero_point"},
        accepts=_is_torchao_8_bit,
    ),
    ExternalFormat(
        "torchao", {"weight": "._weight_qdata"}, refusal=f"only its Float8Tensor and Int8Tensor are read; {_ORIGINAL}"
    ),
    ExternalFormat("MXFP4", {"weight": "_blocks", "scales": "_scales"}, refusal=_NO_DECODER),
    ExternalFormat("HQQ", {"weight": ".W_q"}, refusal=_NO_DECODER),
    ExternalFormat("EXL3", {"weight": ".trellis", "scales": ".suh"}, refusal=_NO_DECODER),
)  # fmt: skip

_MARKS = tuple(sorted({entry.mark for entry in EXTERNAL}))


def find_external(source: LayerSource, declared: Container[str] = ()) -> Iterator[ExternalLayer]:
    """Every layer in an external format, in the order of the tensors; ``declared``: layers that have ComfyUI's JSON."""
    for layer in dict.fromkeys(_candidates(source.tensors)):
        if layer not in declared:
            for entry in EXTERNAL:
                if layer + entry.mark in source.tensors and (names := entry.find_names(source, layer)):
                    yield ExternalLayer(layer, entry, names)
                    break


def _candidates(names: Iterable[str]) -> Iterator[str]:
    """Base names of the tensors whose names end in a mark."""
    for name in names:
        if name.endswith(_MARKS):
            yield from (name[: -len(mark)] for mark in _MARKS if name.endswith(mark) and len(name) > len(mark))


def plain_metadata(source: LayerSource) -> dict[str, str]:
    """The header metadata of a source without the entries by which torchao describes each tensor."""
    try:
        names = json.loads(source.metadata.get("tensor_names", "[]"))
    except (ValueError, RecursionError):
        names = []
    described = {str(name) for name in names} | {"tensor_names"} if isinstance(names, list) and names else set()
    return {key: value for key, value in source.metadata.items() if key not in described}
