"""Build a MODEL or CLIP from the files of a finished run, with the settings of the incoming one."""

import copy

import comfy.model_management
import comfy.model_patcher
import comfy.sd
from comfy_execution.graph_utils import ExecutionBlocker

from ...quant_core.formats.layer_json import layer_configs
from ...quant_core.sources import SafetensorsFile
from .decoding import layers_to_decode, make_quantized_linear
from .folders import DIFFUSION_MODELS, TEXT_ENCODERS, FileSource
from .foreign_weights import DECODED
from .loading import load_clip, load_model
from .native_int8 import use_native_int8
from .native_layers import AUTO
from .quantizing import Quantized
from .sources import find_module

__all__ = ["build_clip", "build_model"]


def build_model(source, quantized: Quantized, native_int8_kernels: str = AUTO):
    """The quantized MODEL, made by ComfyUI's own loader; an ExecutionBlocker where the source is a text encoder.

    ``native_int8_kernels``: see :func:`.native_int8.use_native_int8`.
    """
    if quantized.kind == TEXT_ENCODERS:
        return ExecutionBlocker("Learned Round Quantize was given a text encoder: use its CLIP output, not MODEL.")
    model = load_model(quantized.files[""], quantized.kind)
    model.model.learned_rounding_file = quantized  # ComfyUI may read the file again while the model exists
    if not isinstance(source, FileSource):
        _copy_settings(source, model)
    return use_native_int8(model, native_int8_kernels)


def _copy_settings(original, model) -> None:
    """Copy what other nodes set on the MODEL: sampling, attention patches, wrappers and the like; LoRAs are applied already."""
    clone = original.clone()
    model.model_options = clone.model_options
    model.object_patches = {
        key: patch for key, patch in clone.object_patches.items() if not key.startswith("diffusion_model")
    }
    for name in ("attachments", "additional_models", "callbacks", "wrappers", "injections"):
        setattr(model, name, getattr(clone, name))


def build_clip(source, quantized: Quantized):
    """The quantized CLIP; an ExecutionBlocker where the source is a diffusion model, None for a checkpoint without one."""
    if isinstance(source, comfy.sd.CLIP):
        return _rebuild_clip(source, quantized)
    if quantized.kind == DIFFUSION_MODELS:
        return ExecutionBlocker("Learned Round Quantize was given a diffusion model: use its MODEL output, not CLIP.")
    clip = load_clip(quantized.files[""], quantized.kind, source.clip_type)
    if clip is not None and quantized.kind == TEXT_ENCODERS:
        clip.cond_stage_model.learned_rounding_file = quantized
    return clip


def _unload(patcher) -> None:
    """Move a model to its offload device: ComfyUI would not know of the VRAM that the copy of a loaded model occupies."""
    loaded = comfy.model_management.current_loaded_models
    others = [entry for entry in loaded if not patcher.is_clone(entry.model)]
    comfy.model_management.free_memory(1e30, patcher.load_device, others)


def _rebuild_clip(clip, quantized: Quantized):
    """A copy of ``clip`` with quantized linear layers in place of those that the files contain."""
    _unload(clip.patcher)
    model = clip.cond_stage_model
    layers = {}  # module name → (tensors by suffix, JSON)
    for part, path in quantized.files.items():
        with SafetensorsFile(path) as file:
            for layer, config in layer_configs(file)[0].items():
                names = [name for name in file.tensors if name.rpartition(".")[0] == layer]
                tensors = {name.rpartition(".")[2]: file.read(name) for name in names}
                layers[find_module(model, part, layer)] = (tensors, config)
    weights = {id(module.weight): module.weight for module in map(model.get_submodule, layers)}
    rebuilt_model = copy.deepcopy(model, memo=weights)  # the memo keeps replaced weights from being copied
    for name, (tensors, config) in layers.items():
        parent, _, child = name.rpartition(".")
        original = model.get_submodule(name)
        # ComfyUI dequantizes a bank of experts as a whole, which few formats can, unless it has the dtype of the activations.
        dtype = (original.weight if original.bias is None or original.weight.ndim == 3 else original.bias).dtype
        if not dtype.is_floating_point:  # quantized by another pack
            dtype = DECODED
        linear = make_quantized_linear(name, tensors, config, dtype, original.weight.device)
        setattr(rebuilt_model.get_submodule(parent), child, linear)
    rebuilt = clip.clone()
    rebuilt.cond_stage_model = rebuilt_model
    decoded = any(layers_to_decode(path) for path in quantized.files.values())
    # Decoding layers need the classic loading, see decoding_options.
    patcher = comfy.model_patcher.ModelPatcher if decoded else type(clip.patcher)
    rebuilt.patcher = patcher(
        rebuilt_model, load_device=clip.patcher.load_device, offload_device=clip.patcher.offload_device
    )
    for name in ("object_patches", "model_options", "hook_mode", "is_clip", "force_cast_weights"):
        if hasattr(clip.patcher, name):
            setattr(rebuilt.patcher, name, copy.copy(getattr(clip.patcher, name)))
    return rebuilt
