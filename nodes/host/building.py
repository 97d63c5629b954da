"""From quantized files back to a MODEL or CLIP, by ComfyUI's own loaders wherever they know the format."""

import copy
import inspect
from pathlib import Path

import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ...quant_core.errors import QuantizationError
from ...quant_core.formats import detect_layer
from ...quant_core.formats.layer_json import layer_configs
from ...quant_core.output.metadata import ENCODER_PREFIX
from ...quant_core.sources import SafetensorsFile
from ..runtime.decoded_linear import as_bytes, decoding_operations
from .folders import CHECKPOINTS, DIFFUSION_MODELS, TEXT_ENCODERS, FileSource
from .native_int8 import with_native_int8
from .quantizing import Quantized
from .running import is_interrupt
from .sources import READS_ENCODERS, is_quantized, module_name

__all__ = [
    "build_clip",
    "build_model",
    "knows",
    "layers_to_decode",
    "load_quantized",
    "quantized_layers",
    "quantized_linear",
    "reload",
]


def knows(format: str | None) -> bool:
    """Whether this ComfyUI itself multiplies that format; None for a layer that names none."""
    return format in getattr(comfy.quant_ops, "QUANT_ALGOS", {})


def layers_to_decode(path: Path) -> list[str]:
    """The quantized layers of a file, when it holds a format that this ComfyUI cannot read by itself; else none.

    Raises:
        QuantizationError: one of them is none that is decoded here.
    """
    with SafetensorsFile(path) as opened:
        configs, tensors = layer_configs(opened)[0], opened.tensors
    if all(knows(config.get("format")) for config in configs.values()):
        return []
    try:
        for layer, config in configs.items():
            detect_layer(layer, config, tensors)
    except ValueError as error:
        raise QuantizationError(f"{path.name} cannot be loaded: {error}.") from None
    return list(configs)


def _classic(loader) -> dict:
    """Options that leave out the dynamic loading of newer releases."""
    return {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(loader).parameters else {}


def _decoding(loader, options: str = "model_options") -> dict:
    """Options that make one of ComfyUI's loaders use our operations.

    Dynamic loading hands LoRAs to layers of ComfyUI's own only, so that is left out.
    """
    return {options: {"custom_operations": decoding_operations(comfy.ops.manual_cast)}, **_classic(loader)}


def _load_model(path: Path, kind: str):
    """The MODEL in a file of formats that ComfyUI knows."""
    if kind == CHECKPOINTS:
        return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
    return comfy.sd.load_diffusion_model(str(path))


def _load_decoding_model(path: Path, kind: str, disable_dynamic: bool = True):
    """The MODEL in a file of which ComfyUI does not know a format."""
    model = _mapped_model(path, kind)
    if model is None:
        raise QuantizationError("ComfyUI does not recognise this model; save it, and load it where it is supported.")
    model.cached_patcher_init = (_load_decoding_model, (path, kind))  # by which newer ComfyUI makes it once more
    return model


def _mapped_model(path: Path, kind: str):
    """The MODEL in a file, which is mapped into memory, as ComfyUI's own loader makes it; None for one that it does not recognise."""
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    load, options = comfy.sd.load_diffusion_model_state_dict, {}
    if kind == CHECKPOINTS:
        load, options = comfy.sd.load_state_dict_guess_config, {"output_vae": False, "output_clip": False}
    if layers := layers_to_decode(path):
        tensors = as_bytes(tensors, layers)
    made = load(tensors, metadata=metadata, **options, **(_decoding if layers else _classic)(load))
    return made[0] if isinstance(made, tuple) else made


_UNLIKE = "size mismatch"  # as torch says where ComfyUI takes a model for another one, of other widths


def reload(path: Path, kind: str, clip_type: str = ""):
    """What ComfyUI's own loader makes of a saved file, as a ModelPatcher; None for a model that it does not recognise.

    Where it cannot read a format itself it is given layers that decode it. Codes stay in the file, which is mapped into memory.
    ``clip_type``: of a text encoder, as far as it is known; the file alone does not say whose it is.

    Raises:
        QuantizationError: ComfyUI takes fewer layers for quantized than the file holds.
    """
    try:
        if kind == TEXT_ENCODERS:
            return _reloaded_clip(path, clip_type)
        model = _mapped_model(path, kind)
    except RuntimeError as error:
        if _UNLIKE not in str(error):
            raise
        return None
    if model is not None:
        _check_built(model, path, "model", kind)
    return model


def _reloaded_clip(path: Path, clip_type: str):
    """The text encoder in a file by that choice of Load CLIP, else by the first that takes all its layers."""
    if comfy.sd.detect_te_model(comfy.utils.load_torch_file(str(path), safe_load=True)) is None:
        return None
    problems = []
    for name in sorted(comfy.sd.CLIPType.__members__, key=lambda name: name != clip_type.upper()):
        try:
            return _clip_in(path, TEXT_ENCODERS, name).patcher
        except Exception as error:  # what a loader says of another model's file
            if is_interrupt(error) or _UNLIKE in str(error):
                raise
            problems.append(error)
    raise problems[0]


def _coded(path: Path, encoders: bool | None) -> int:
    """How many layers of a file are quantized: of text encoders in a checkpoint, of all else, or of both."""
    with SafetensorsFile(path) as opened:
        layers = layer_configs(opened)[0]
    return sum(encoders is None or layer.startswith(ENCODER_PREFIX) is encoders for layer in layers)


def _check_built(patcher, path: Path, what: str, kind: str, encoders: bool = False) -> None:
    """Every layer that is quantized in the file must be so in the model: ComfyUI's loader does not say when one is not.

    ``encoders``: those of text encoders in a checkpoint, not the others.
    """
    expected = _coded(path, encoders if kind == CHECKPOINTS else None)
    found = len(quantized_layers(patcher))
    if found < expected:
        raise QuantizationError(
            f"ComfyUI's loader took only {found} of {expected} quantized layers of this {what}; please report the model, it is not supported yet."
        )


def quantized_layers(patcher) -> dict[str, str]:
    """{module name: dtype of its codes} of the layers of a ModelPatcher that hold codes."""
    layers = {}
    for name, module in patcher.model.named_modules():
        weight = getattr(module, "weight", None)
        if is_quantized(weight) or getattr(module, "is_quantized", False):
            layers[name] = str(getattr(weight, "_qdata", weight).dtype).removeprefix("torch.")
    return layers


def load_quantized(source: FileSource) -> tuple:
    """(MODEL, CLIP) in a quantized file, through layers of ours where this ComfyUI cannot run a format; blockers for what it is not.

    Raises:
        QuantizationError: the file holds no quantized layers, or ComfyUI does not take all of them.
    """
    with SafetensorsFile(source.path) as opened:
        if not layer_configs(opened)[0]:
            raise QuantizationError(
                f"{source.path.name} holds no quantized layers; load it with ComfyUI's own loader, or quantize it first."
            )
    no_model = ExecutionBlocker(f"{source.path.name} is a text encoder: use the CLIP output, not MODEL.")
    no_clip = ExecutionBlocker(f"{source.path.name} is a diffusion model: use the MODEL output, not CLIP.")
    model = no_model if source.kind == TEXT_ENCODERS else _model_in(source.path, source.kind)
    clip = no_clip if source.kind == DIFFUSION_MODELS else _clip_in(source.path, source.kind, source.clip_type)
    return model, clip


def _model_in(path: Path, kind: str):
    """The MODEL in a quantized file."""
    model = (_load_decoding_model if layers_to_decode(path) else _load_model)(path, kind)
    _check_built(model, path, "model", kind)
    return model


def _clip_in(path: Path, kind: str, clip_type: str):
    """The CLIP in a quantized file; of a checkpoint ComfyUI reads it alone, and codes in it perhaps not."""
    embeddings = folder_paths.get_folder_paths("embeddings")
    if kind == CHECKPOINTS:
        load = comfy.sd.load_checkpoint_guess_config
        decode = _coded(path, encoders=True) and (layers_to_decode(path) or not READS_ENCODERS)
        ours = _decoding(load, "te_model_options") if decode else {}
        clip = load(
            str(path), output_vae=False, output_clip=True, output_model=False, embedding_directory=embeddings, **ours
        )[1]
        if clip is not None:
            _check_built(clip.patcher, path, "text encoder", kind, encoders=True)
        return clip
    clip = comfy.sd.load_clip(
        ckpt_paths=[str(path)],
        embedding_directory=embeddings,
        clip_type=comfy.sd.CLIPType[clip_type.upper()],
        **(_decoding(comfy.sd.load_clip) if layers_to_decode(path) else {}),
    )
    _check_built(clip.patcher, path, "text encoder", kind)
    return clip


def build_model(source, quantized: Quantized, native_int8_kernels: bool = False):
    """The quantized MODEL, made by ComfyUI's own loader; an ExecutionBlocker when there is none to make.

    ``native_int8_kernels``: see :func:`.native_int8.with_native_int8`.
    """
    if quantized.kind == TEXT_ENCODERS:
        return ExecutionBlocker("Learned Round Quantize was given a text encoder: use its CLIP output, not MODEL.")
    model = _model_in(quantized.files[""], quantized.kind)
    model.model.learned_rounding_file = quantized  # the model may be read again from its file
    if not isinstance(source, FileSource):
        _carry_over(source, model)
    return with_native_int8(model) if native_int8_kernels else model


def _carry_over(original, model) -> None:
    """What nodes between the loader and us set on the MODEL: sampling, attention patches, wrappers … LoRAs are baked."""
    twin = original.clone()
    model.model_options = twin.model_options
    model.object_patches = {
        key: patch for key, patch in twin.object_patches.items() if not key.startswith("diffusion_model")
    }
    for name in ("attachments", "additional_models", "callbacks", "wrappers", "injections"):
        setattr(model, name, getattr(twin, name))


def build_clip(source, quantized: Quantized):
    """The quantized CLIP; an ExecutionBlocker when there is none to make."""
    if isinstance(source, comfy.sd.CLIP):
        return _rebuilt_clip(source, quantized)
    if quantized.kind == DIFFUSION_MODELS:
        return ExecutionBlocker("Learned Round Quantize was given a diffusion model: use its MODEL output, not CLIP.")
    clip = _clip_in(quantized.files[""], quantized.kind, source.clip_type)
    if quantized.kind == TEXT_ENCODERS:
        clip.cond_stage_model.learned_rounding_file = quantized
    return clip


def _rebuilt_clip(clip, quantized: Quantized):
    """A twin of ``clip`` whose quantized layers are ComfyUI's own quantized linear layers."""
    model = clip.cond_stage_model
    layers = {}  # module name → the layer's tensors
    for part, path in quantized.files.items():
        with SafetensorsFile(path) as opened:
            for layer, config in layer_configs(opened)[0].items():
                names = [name for name in opened.tensors if name.rpartition(".")[0] == layer]
                tensors = {name.rpartition(".")[2]: opened.read(name) for name in names}
                layers[module_name(model, part, layer)] = (tensors, config)
    weights = {id(module.weight): module.weight for module in map(model.get_submodule, layers)}
    twin = copy.deepcopy(model, memo=weights)
    for name, (tensors, config) in layers.items():
        parent, _, child = name.rpartition(".")
        original = model.get_submodule(name)
        dtype = (original.weight if original.bias is None else original.bias).dtype
        linear = quantized_linear(name, tensors, config, original.bias, dtype, original.weight.device)
        setattr(twin.get_submodule(parent), child, linear)
    rebuilt = clip.clone()
    rebuilt.cond_stage_model = twin
    decoded = not all(knows(config["format"]) for _, config in layers.values())
    patcher = comfy.model_patcher.ModelPatcher if decoded else type(clip.patcher)  # as in _decoding
    rebuilt.patcher = patcher(twin, load_device=clip.patcher.load_device, offload_device=clip.patcher.offload_device)
    for name in ("object_patches", "model_options", "hook_mode", "is_clip", "force_cast_weights"):
        if hasattr(clip.patcher, name):
            setattr(rebuilt.patcher, name, copy.copy(getattr(clip.patcher, name)))
    return rebuilt


def quantized_linear(
    name: str, tensors: dict[str, torch.Tensor], config: dict, bias=None, dtype=torch.float32, device=None
):
    """A linear layer of codes that decodes them when it runs: ComfyUI's own where it knows the format.

    Args:
        tensors: the layer's tensors by the last part of their names, as they stand in a file.
        config: the layer's JSON.
        bias: instead of that among the tensors; the layer has one when either is there.
        dtype: what the layer computes in.
    """
    if knows(config["format"]):
        operations = comfy.ops.mixed_precision_ops({name: config}, dtype, full_precision_mm=True)
    else:
        operations = decoding_operations(comfy.ops.manual_cast)
    state = {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    if bias is not None:
        state[f"{name}.bias"] = bias
    outer, inner = detect_layer(name, config, state).weight_shape(tuple(tensors["weight"].shape), config)
    linear = operations.Linear(inner, outer, bias=f"{name}.bias" in state, device=device, dtype=dtype)
    linear._load_from_state_dict(state, f"{name}.", {}, True, [], [], [])
    return linear
