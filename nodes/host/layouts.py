"""ComfyUI's own loaders read the formats of this pack.

ComfyUI keeps what it knows of formats in a table, ``QUANT_ALGOS``, which its quantized layers ask when they run; ours are
added to it. Only loading is a chain of conditions on formats, in one function of ``comfy.ops``, which is wrapped: a layer
in one of our formats is loaded by it as ``int8_tensorwise``, whose keys are the same, and is given its own layout
afterwards. So a layer of ours gets all that ComfyUI does for its own, and a layer in any other format goes straight to it.
"""

import functools
import inspect
import logging

import comfy.ops
import comfy.quant_ops
import torch

from ...quant_core.formats import FORMATS, detect_layer
from ...quant_core.formats.layer_json import CONFIG_KEY, config_tensor, read_config

__all__ = ["add_layouts"]

log = logging.getLogger(__name__)

_LOADER = "_load_quantized_module"
_ARGUMENTS = ["module", "super_load", "state_dict", "prefix"]
_CARRIER = "int8_tensorwise"
_OURS = [name for name, entry in FORMATS.items() if entry.stock_since is None]


def _obstacle() -> str | None:
    """What keeps ComfyUI's loaders from reading our formats; None when nothing does."""
    loader = getattr(comfy.ops, _LOADER, None)
    if loader is None:
        return f"comfy.ops has no {_LOADER}"
    if list(inspect.signature(loader).parameters)[: len(_ARGUMENTS)] != _ARGUMENTS:
        return f"comfy.ops.{_LOADER} takes other arguments"
    if _CARRIER not in comfy.quant_ops.QUANT_ALGOS:
        return f"comfy.quant_ops.QUANT_ALGOS has no {_CARRIER}"
    try:
        from ..runtime import layouts
    except ImportError as error:
        return str(error)
    if comfy.ops.QuantizedTensor is not layouts.QuantizedTensor:
        return "comfy.ops has a QuantizedTensor of its own"
    return None


def add_layouts() -> None:
    """Make ComfyUI's loaders read our formats. A format that it already has stays as it is.

    Where this ComfyUI is built otherwise nothing is touched, and the log says so: models quantized in the graph, and
    those of our Load Quantized Model, still run, through layers of our own.
    """
    algorithms = getattr(comfy.quant_ops, "QUANT_ALGOS", {})
    missing = [name for name in _OURS if name not in algorithms]
    if missing and (obstacle := _obstacle()):
        log.warning(
            "Learned Rounding: ComfyUI's own loaders cannot read %s files here (%s); Load Quantized Model does.",
            ", ".join(missing),
            obstacle,
        )
    elif missing:
        from ..runtime.layouts import LAYOUTS

        for name in missing:
            own = {"storage_t": FORMATS[name].storage_dtype, "comfy_tensor_layout": LAYOUTS[name].__name__}
            algorithms[name] = {**algorithms[_CARRIER], **own}
        setattr(comfy.ops, _LOADER, _wrapped(getattr(comfy.ops, _LOADER), frozenset(missing)))


def _wrapped(load, formats: frozenset[str]):
    @functools.wraps(load)
    def load_quantized_module(module, super_load, state_dict, prefix, *args, **kwargs):
        stored = state_dict.get(prefix + CONFIG_KEY)
        config = {} if stored is None else read_config(stored, prefix + CONFIG_KEY)
        loading = functools.partial(_load_layer, load, config) if config.get("format") in formats else load
        return loading(module, super_load, state_dict, prefix, *args, **kwargs)

    return load_quantized_module


def _load_layer(load, config: dict, module, super_load, state_dict, prefix: str, *args, **kwargs) -> None:
    """Make ``module`` a layer of the codes under ``prefix``. ``config``: the layer's JSON. Raises ValueError when they do not fit it."""
    from ..runtime.layouts import LAYOUTS, QuantizedTensor

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
    module.__class__ = _ours(type(module))


class _OurLinear:
    """What ComfyUI's quantized Linear leaves out for a layer of ours.

    It saves the layer's whole JSON, and its inputs are contiguous: torch takes other ones apart into products with a
    stack of decoded weights, where it is not in inference mode.
    """

    def _forward(self, input, weight, bias):
        return super()._forward(input.contiguous(), weight, bias)

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        from ..runtime.layouts import LAYOUTS

        state, key = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs), prefix + CONFIG_KEY
        if key in state and self.quant_format in LAYOUTS:
            state[key] = config_tensor(LAYOUTS[self.quant_format].codec(self.weight._params.block_size).config)
        return state


@functools.lru_cache(maxsize=8)  # ComfyUI makes one class per model
def _ours(linear):
    """ComfyUI's class of a quantized layer, with what it leaves out."""
    return linear if issubclass(linear, _OurLinear) else type("Linear", (_OurLinear, linear), {})
