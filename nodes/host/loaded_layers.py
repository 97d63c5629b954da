"""Compare the tensors of a file with those of the model that ComfyUI loaded from it, and run layers of each format."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import comfy.model_management
import comfy.quant_ops
import torch
from comfy import model_detection

from ...quant_core.errors import VerificationError
from ...quant_core.formats import Codec, TensorSpec, detect_layer
from ...quant_core.formats.expert_bank import expert_parts
from ...quant_core.formats.layer_json import CONFIG_KEY
from .decoding import make_quantized_linear
from .expanding import ExpandedTensors, expanded_codec, is_expanded, layer_parts
from .sources import is_quantized

__all__ = [
    "JSON_SUFFIX",
    "LoadedFile",
    "compare_tensors",
    "match_diffusion_model",
    "match_single_layers",
    "match_text_encoder",
    "run_layers",
]

JSON_SUFFIX = f".{CONFIG_KEY}"  # end of the name of a layer's JSON tensor
_TOKENS = 32  # of the random activations; kernels of some cards refuse 16 and fewer
_TOLERANCE = 0.1  # relative error of a layer's output; quantized activations cause about 0.03, wrong weights about 1
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class LoadedFile:
    """The tensors of a file, and the model that ComfyUI loaded from it.

    Attributes:
        file: tensors of the file under the names that they have in the model; expanded layers are INT8.
        model: tensors of the model; quantized values, scales and JSON of its quantized layers have the names of a file.
        modules: layers of the model by name.
        elsewhere: names of the file's tensors that this loader does not load.
        configs: {layer: JSON} of the file's quantized layers; of expanded ones, that of the INT8 layer.
        codecs: the same layers' codecs.
        shapes: the same layers' (out, in), or (experts, out, in) of a bank.
        expanded: whether some of them are expanded.

    Raises:
        ValueError: (from the constructor) the tensors of a layer contradict its JSON.
    """

    file: Mapping[str, torch.Tensor]
    model: Mapping[str, torch.Tensor]
    modules: Mapping[str, torch.nn.Module]
    elsewhere: Iterable[str] = ()
    configs: dict[str, dict] = field(init=False)
    codecs: dict[str, Codec] = field(init=False)
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    expanded: bool = field(init=False)

    def __post_init__(self):
        names = [name for name in self.file if name.endswith(JSON_SUFFIX)]
        self.configs = {name.removesuffix(JSON_SUFFIX): _read_json(self.file[name]) for name in names}
        self.codecs = {layer: detect_layer(layer, config, self.file) for layer, config in self.configs.items()}
        self.shapes = {
            layer: codec.original_shape(tuple(self.file[f"{layer}.weight"].shape), self.configs[layer])
            for layer, codec in self.codecs.items()
        }
        expanded = {layer: codec for layer, codec in self.codecs.items() if is_expanded(codec)}
        self.expanded = bool(expanded)
        self.file = ExpandedTensors(self.file, expanded)
        self.codecs |= {layer: expanded_codec(codec) for layer, codec in expanded.items()}
        self.configs |= {layer: self.codecs[layer].config for layer in expanded}


def _read_json(tensor: torch.Tensor) -> dict:
    return json.loads(tensor.cpu().numpy().tobytes())


def match_single_layers(tensors: Mapping[str, torch.Tensor]) -> LoadedFile:
    """The quantized matrices of a file, each loaded by itself, for models that ComfyUI does not recognize."""
    layers: dict[str, dict[str, torch.Tensor]] = {
        name.removesuffix(JSON_SUFFIX): {} for name in tensors if name.endswith(JSON_SUFFIX)
    }
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if layer in layers:
            layers[layer][suffix] = tensor
    layers = {layer: parts for layer, parts in layers.items() if parts["weight"].ndim == 2}  # no banks of experts
    modules = {
        layer: make_quantized_linear(layer, dict(parts), _read_json(parts[CONFIG_KEY]))
        for layer, parts in layers.items()
    }
    model = {name: tensor for layer, module in modules.items() for name, tensor in _state(module, f"{layer}.").items()}
    file = {f"{layer}.{suffix}": tensor for layer, parts in layers.items() for suffix, tensor in parts.items()}
    return LoadedFile(file, model, modules, tensors.keys() - file.keys())


def match_diffusion_model(tensors: Mapping[str, torch.Tensor], model) -> LoadedFile:
    """The tensors of a file under the names that ComfyUI's configuration of the model gives them."""
    prefix = model_detection.unet_prefix_from_state_dict(tensors)
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    inside = inside or dict(tensors)
    elsewhere = [name for name in tensors if name.removeprefix(prefix) not in inside]
    named = model.model_config.process_unet_state_dict(inside)
    root = model.diffusion_model
    return LoadedFile(named, _state(root), dict(root.named_modules()), elsewhere)


def match_text_encoder(tensors: Mapping[str, torch.Tensor], model) -> LoadedFile:
    """The tensors of a file under their names in the text encoder that loaded them: a prefix and the name in the file."""
    state = _state(model)
    first = next(name.removesuffix(JSON_SUFFIX) + ".weight" for name in tensors if name.endswith(JSON_SUFFIX))
    prefix = next((name.removesuffix(first) for name in state if name.endswith(f".{first}")), "")
    prefixes = (prefix, prefix.removesuffix("transformer."))
    named = {
        next((start + name for start in prefixes if start + name in state), prefix + name): tensor
        for name, tensor in tensors.items()
    }
    state = {name: tensor for name, tensor in state.items() if name.startswith(prefix) or name in named}
    return LoadedFile(named, state, dict(model.named_modules()))


def _state(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """State dict of a module, with the scales of quantized layers, which older ComfyUI excludes."""
    state = {}
    for name, tensor in module.state_dict(prefix=prefix).items():
        if is_quantized(tensor):
            state |= {name: tensor._qdata, f"{name}_scale": tensor._layout_params["scale"]}
        else:
            state[name] = tensor
    return state


def compare_tensors(loaded: LoadedFile) -> list[str]:
    """Check that the model has each tensor of the file, bit for bit or converted to the dtype of the model.

    Returns:
        Names of unquantized tensors that the model does not have; the file has them from its source.

    Raises:
        VerificationError: a tensor or layer of the model differs, or one of a quantized layer is missing.
    """
    specs = {layer: _check_layer(loaded, layer, config) for layer, config in loaded.configs.items()}
    unused = []
    for name, tensor in loaded.file.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        layer, _, suffix = name.rpartition(".")
        quantized = layer in loaded.configs
        if quantized and suffix == CONFIG_KEY:
            continue  # checked by _check_layer
        if name not in loaded.model:
            if quantized:
                raise VerificationError(f"{layer}: {suffix} is missing in ComfyUI's model.")
            unused.append(name)
            continue
        found = loaded.model[name]
        if quantized and suffix in specs[layer]:
            same = found.dtype in (tensor.dtype, *specs[layer][suffix].views) and _has_same_bytes(tensor, found)
        else:
            same = _is_same(tensor, found)
        if not same:
            raise VerificationError(f"{layer or name}: {suffix} differs between ComfyUI's model and the file.")
    return unused


def _check_layer(loaded: LoadedFile, layer: str, config: dict) -> dict[str, TensorSpec]:
    """Specifications of a layer's tensors by suffix. Raises VerificationError unless the model has it in the file's format and shape."""
    module = loaded.modules.get(layer)
    if module is None:
        raise VerificationError(f"{layer}: ComfyUI's model has no layer of that name.")
    codec, shape = loaded.codecs[layer], loaded.shapes[layer]
    json_tensor = loaded.model.get(layer + JSON_SUFFIX)
    if json_tensor is not None:
        try:
            found = detect_layer(layer, _read_json(json_tensor), loaded.model)
        except ValueError as error:
            raise VerificationError(f"ComfyUI's model has an invalid layer: {error}.") from None
        if found != codec:
            raise VerificationError(f"{layer}: JSON {found.config} in ComfyUI's model, {codec.config} in the file.")
    elif getattr(module, "layout_type", None) != comfy.quant_ops.QUANT_ALGOS[config["format"]]["comfy_tensor_layout"]:
        layout = getattr(module, "layout_type", "an unquantized layer")
        raise VerificationError(f"{layer}: {layout} in ComfyUI's model, {codec} in the file.")
    bank = (module.num_experts,) if len(shape) == 3 else ()
    expected = (*bank, module.out_features, module.in_features)
    if shape != expected:
        raise VerificationError(f"{layer}: weight of shape {shape} in the file, {expected} in ComfyUI's model.")
    return {**codec.specs(shape[-2:]), **codec.optional(shape[-2:])}


def _is_same(tensor: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether ``found`` equals an unquantized tensor bit for bit, or after conversion to its dtype of at least 16 bits."""
    if found.dtype is not tensor.dtype:
        if found.dtype.itemsize < min(2, tensor.dtype.itemsize):
            return False
        tensor = tensor.to(found.dtype)
    return _has_same_bytes(tensor, found)


def _has_same_bytes(tensor: torch.Tensor, found: torch.Tensor) -> bool:
    return tensor.shape == found.shape and torch.equal(_view_bytes(tensor), _view_bytes(found))


def _view_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def run_layers(loaded: LoadedFile, device: torch.device) -> dict[str, str]:
    """Run the smallest layer of each codec on ``device`` as the model does; returns {codec: name of the layer}.

    Raises:
        VerificationError: an output differs from that of the file's weights, with and without quantized activations.
    """
    by_size = sorted(loaded.shapes, key=lambda layer: math.prod(loaded.shapes[layer]), reverse=True)
    smallest = {str(loaded.codecs[layer]): layer for layer in by_size}
    for layer in smallest.values():
        comfy.model_management.throw_exception_if_processing_interrupted()
        error = _output_error(loaded, layer, device)
        if not error < _TOLERANCE:  # true of NaN too
            raise VerificationError(f"{layer}: its output in ComfyUI has a relative error of {error:.3g}.")
    return smallest


def _output_error(loaded: LoadedFile, layer: str, device: torch.device) -> float:
    """Relative error of a layer's output for random activations, the smaller of that with and without quantized ones.

    That of the first expert of a bank.
    """
    module, parts = loaded.modules[layer].to(device), layer_parts(loaded.file, layer)
    *bank, outer, inner = loaded.shapes[layer]
    forward = partial(cast(Callable[..., torch.Tensor], module.expert_linear), i=0) if bank else module
    parts = expert_parts(parts, 0) if bank else parts
    codec, shape = loaded.codecs[layer].of_values(parts), (outer, inner)
    weight, bias = codec.dequantize(parts, shape), parts.get("bias")
    activations = torch.randn(_TOKENS, inner, generator=torch.Generator().manual_seed(0))
    if codec.static_activations and "input_scale" in parts:  # larger activations clip where ComfyUI quantizes them
        activations *= parts["input_scale"] * codec.format.elements.max / activations.abs().max()
    activations = activations.to(_compute_dtype(module))
    output = forward(activations.to(device)).float().cpu()
    bias = None if bias is None else bias.float()
    # comfy-kitchen without its CUDA kernels quantizes to INT4, whatever linear_dtype is.
    dtypes = codec.options.get("linear_dtype", ())
    codecs = [replace(codec, linear_dtype=dtype) for dtype in dtypes] or [codec]
    quantized = [codec.quantize_activations(activations) for codec in codecs]
    expected = [torch.nn.functional.linear(x, weight, bias) for x in (activations.float(), *quantized)]
    return min(float((output - each).norm() / each.norm().clamp_min(_TINY)) for each in expected)


def _compute_dtype(module: torch.nn.Module) -> torch.dtype:
    """The dtype of a layer's activations."""
    weight = module.weight
    params = getattr(weight, "_params", None)
    if params is not None:
        return params.orig_dtype
    return getattr(weight, "_layout_params", {}).get("orig_dtype", getattr(module, "original_dtype", torch.float32))
