"""Register this pack's own formats with ComfyUI's loaders.

ComfyUI's quantized layers look up a format in the table ``QUANT_ALGOS`` when they run; this module adds entries to it. Only
loading branches on the name of the format, in one function of ``comfy.ops``. A wrapper of that function loads a layer of our
formats as ``int8_tensorwise``, which has the same keys, and then replaces the layout. Our layers thus have every feature of
ComfyUI's own. Layers of other formats are loaded by ComfyUI's function unchanged.
"""

import functools
import inspect
import logging

import comfy.ops
import comfy.quant_ops
import torch

from ...quant_core.formats import FORMATS, detect_layer
from ...quant_core.formats.layer_json import CONFIG_KEY, config_tensor, read_config
from .expanding import LOADER, expand_in_place
from .extended_linear import extend_linear, has_short_forward
from .smoothed_linear import is_smoothed, patch_unsmoothed

__all__ = ["add_layouts"]

log = logging.getLogger(__name__)

_ARGUMENTS = ["module", "super_load", "state_dict", "prefix"]
_CARRIER = "int8_tensorwise"
_OWN_FORMATS = [name for name, entry in FORMATS.items() if entry.stock_since is None]


def _find_obstacle() -> str | None:
    """The reason why formats cannot be registered in this ComfyUI; None when they can."""
    loader = getattr(comfy.ops, LOADER, None)
    if loader is None:
        return f"comfy.ops has no {LOADER}"
    if list(inspect.signature(loader).parameters)[: len(_ARGUMENTS)] != _ARGUMENTS:
        return f"comfy.ops.{LOADER} takes other arguments"
    if _CARRIER not in comfy.quant_ops.QUANT_ALGOS:
        return f"comfy.quant_ops.QUANT_ALGOS has no {_CARRIER}"
    try:
        from comfy_kitchen.tensor import QuantizedTensor

        from ..runtime import layouts  # noqa: F401 (fails where comfy-kitchen lacks a function that it needs)
    except ImportError as error:
        return str(error)
    if comfy.ops.QuantizedTensor is not QuantizedTensor:
        return "comfy.ops does not use comfy-kitchen's QuantizedTensor"
    return None


def add_layouts() -> None:
    """Register our formats with ComfyUI's loaders; entries that ComfyUI already has stay unchanged.

    Where this ComfyUI has other internals, nothing is changed and a warning is logged. Models quantized in the graph and
    models of Load Quantized Model then run through :mod:`..runtime.decoded_linear`.
    """
    algorithms = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
    missing = [name for name in _OWN_FORMATS if name not in algorithms]
    if missing and (obstacle := _find_obstacle()):
        log.warning(
            "Learned Rounding: ComfyUI's own loaders cannot read %s files here (%s); use Load Quantized Model.",
            ", ".join(missing),
            obstacle,
        )
    elif missing:
        from ..runtime.layouts import LAYOUTS

        for name in missing:
            own = {"storage_t": FORMATS[name].storage_dtype, "comfy_tensor_layout": LAYOUTS[name].__name__}
            algorithms[name] = {**algorithms[_CARRIER], **own}
        setattr(comfy.ops, LOADER, _wrap_loader(getattr(comfy.ops, LOADER), frozenset(missing)))


def _wrap_loader(load, formats: frozenset[str]):
    """ComfyUI's function ``load``, with our formats ``formats``, expanded layers, and our forward pass and patches of linear layers."""

    @functools.wraps(load)
    def load_quantized_module(module, super_load, state_dict, prefix, *args, **kwargs):
        stored = state_dict.get(prefix + CONFIG_KEY)
        config = {} if stored is None else read_config(stored, prefix + CONFIG_KEY)
        loading = functools.partial(_load_layer, load, config) if config.get("format") in formats else load
        expand_in_place(config, state_dict, prefix)
        loading(module, super_load, state_dict, prefix, *args, **kwargs)
        if has_short_forward(module):
            module.__class__ = extend_linear(type(module))
        elif is_smoothed(module):
            module.__class__ = patch_unsmoothed(type(module))

    vars(load_quantized_module)["expands_layers"] = True  # see expanding.is_expanded
    return load_quantized_module


def _load_layer(load, config: dict, module, super_load, state_dict, prefix: str, *args, **kwargs) -> None:
    """Load the quantized layer under ``prefix`` into ``module``; ``config``: its JSON. Raises ValueError where they contradict."""
    from comfy_kitchen.tensor import QuantizedTensor

    from ..runtime.layouts import LAYOUTS

    codec = detect_layer(prefix.removesuffix("."), config, state_dict)
    layout, dtype = LAYOUTS[codec.format.name], codec.format.storage_dtype
    state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].view(torch.int8)
    state_dict[prefix + CONFIG_KEY] = config_tensor({"format": _CARRIER})
    load(module, super_load, state_dict, prefix, *args, **kwargs)
    loaded = module.weight
    params = layout.Params(loaded._params.scale, loaded._params.orig_dtype, loaded._params.orig_shape, codec.block_size)
    weight = QuantizedTensor(loaded._qdata.view(dtype), layout.__name__, params)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    module.quant_format, module.layout_type = codec.format.name, layout.__name__
