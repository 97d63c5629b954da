"""Banks of experts: tensors (experts, out, in) with a matrix of each expert of a mixture-of-experts layer.

ComfyUI reads them quantized in its class ``MoEExperts``, which 0.33 uses for GPT-OSS alone. It recognizes that model by the
names here (``comfy/sd.py``, ``detect_te_model``).
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from ..sources import TensorInfo

__all__ = ["find_banks", "is_bank"]

_SIDES = 3
_READ = re.compile(r"(?P<model>(?:.*\.)?)layers\.\d+\.mlp\.experts\.(?:gate_up|down)_proj\.weight")
_MARK = "layers.0.self_attn.sinks"
_EXPERTS = re.compile(r"(?:^|[._])experts?[._]")


def is_bank(name: str, info: TensorInfo) -> bool:
    """Whether a tensor has the name and the number of sides of a bank of experts, in any model."""
    return len(info.shape) == _SIDES and _EXPERTS.search(name) is not None


def find_banks(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Name → dtype and shape of the matrix of one expert, of the banks that ComfyUI reads quantized.

    Args:
        tensors: all tensors of a model or checkpoint.
    """
    found = {name: match for name in tensors if (match := _READ.fullmatch(name))}
    return {
        name: replace(info, shape=info.shape[1:])
        for name, match in found.items()
        if len((info := tensors[name]).shape) == _SIDES and match["model"] + _MARK in tensors
    }
