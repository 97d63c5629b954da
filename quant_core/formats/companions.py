"""Tensors that change what quantized values mean, and that no format here has: they are refused, not left out."""

import re
from collections.abc import Container, Iterator

import torch

from .layer_json import CONFIG_KEY, LayerSource

__all__ = ["PACKED_DTYPES", "find_unknown_companions", "is_weight_scale", "is_zero"]

PACKED_DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
)
"""Dtypes of quantized or packed weights; int64 is that of indices."""

# Last parts of names that do not change the weight: biases, and scales of activations and caches.
_HARMLESS = {
    "bias",
    CONFIG_KEY,
    *("input_scale", "scale_input", "output_scale", "activation_scale", "k_scale", "v_scale", "q_scale"),
    *("input_zero_point", "output_zero_point", "input_global_scale"),
}
_SCALES = {"weight_scale", "scale_weight"}  # of layers without JSON
_DECLARED = {  # of formats that the JSON of a layer names
    *_SCALES,
    *("weight_scale_2", "pre_quant_scale", "weight_s_rel", "weight_s_channel", "weight_codebook"),
}
_WORDS = r"scale(?!_shift)|zero|absmax|smooth|rotat|hadamard|lora|svd|g_idx|codebook"
_COMPANION = re.compile(_WORDS)  # in the rest of a name that continues that of quantized values
# Beside quantized values that are not called "weight"; torchao calls theirs "_weight_qdata".
_SIBLING = re.compile(rf"_?(?:weight_[^.]*?|[wq])?(?:{_WORDS})[^.]*$")
_OF_WEIGHT = re.compile(rf"weight[._][^.]*(?:{_WORDS})|(?:scale_weight|wscales)$")  # in any format
_MAX_ZERO_POINTS = 1 << 20  # bytes of the zero points of a weight that are read
_DEPTH = 8  # separators from the end of a name at which it may continue that of a quantized tensor


def find_unknown_companions(source: LayerSource, declared: Container[str], known: Container[str]) -> dict[str, str]:
    """{name of a tensor that belongs to quantized values in an unknown way: name of these values}.

    A linear layer has a weight and a bias. Any other tensor below a layer of quantized values is such a companion: a scale
    under another name, a zero point, a rotation, smoothing factors, a low-rank branch. In a file that was cast to FP8 as a
    whole, tensors of the dtype of the weight are parameters.

    Args:
        declared: layers that have ComfyUI's JSON.
        known: names of tensors that belong to a format.
    """
    layers, values, siblings = {}, {}, {}  # prefix of names → quantized tensor
    for name, info in source.tensors.items():
        if info.dtype in PACKED_DTYPES and len(info.shape) >= 2:
            layer, _, last = name.rpartition(".")
            if last == "weight" and layer:
                layers[f"{layer}."] = name
            else:
                values |= {f"{name}{separator}": name for separator in "._"}
                if layer:
                    siblings.setdefault(f"{layer}.", name)
    if not (layers or values):  # most sources are not quantized; names have many prefixes
        return {}
    found = {}
    for name in source.tensors:
        if name in known:
            continue
        for prefix in _prefixes(name):
            owner = layers.get(prefix)
            if owner is None and prefix in values and _COMPANION.search(name, len(prefix)):
                owner = values[prefix]
            if owner is None and prefix in siblings and _SIBLING.match(name, len(prefix)):
                owner = siblings[prefix]
            if owner not in (None, name) and not _is_harmless(source, name, owner, prefix, declared):
                found[name] = owner
                break
    return found


def _is_harmless(source: LayerSource, name: str, owner: str, prefix: str, declared: Container[str]) -> bool:
    last = name[len(prefix) :]
    names = _HARMLESS | (_DECLARED if prefix[:-1] in declared else _SCALES)
    dtype = source.tensors[name].dtype
    if last.endswith("zero_point") and last not in names and (dtype is torch.int8 or dtype.is_floating_point):
        return is_zero(source, name)
    return last in names or (dtype is source.tensors[owner].dtype and dtype.is_floating_point)


def is_weight_scale(name: str, layers: Container[str]) -> bool:
    """Whether a tensor is named as a scale or a zero point of the weight of one of the layers, in any format."""
    return any(
        prefix[-1] == "." and prefix[:-1] in layers and _OF_WEIGHT.match(name, len(prefix))
        for prefix in _prefixes(name)
    )


def is_zero(source: LayerSource, name: str) -> bool:
    """Whether zero points are all zero, as those of symmetric quantization are; False for a tensor too large for them."""
    return source.tensors[name].nbytes <= _MAX_ZERO_POINTS and not bool(source.read(name).float().any())


def _prefixes(name: str) -> Iterator[str]:
    """Beginnings of a name up to one of its last separators, the longest first."""
    end = len(name)
    for _ in range(_DEPTH):
        end = max(name.rfind(".", 0, end), name.rfind("_", 0, end))
        if end < 1:
            return
        yield name[: end + 1]
