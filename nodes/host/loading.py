"""Load quantized files as a MODEL or CLIP, by ComfyUI's own loaders and with our decoding layers where they are needed."""

from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ...quant_core.errors import QuantizationError
from ...quant_core.formats.layer_json import layer_configs
from ...quant_core.output.metadata import ENCODER_PREFIX
from ...quant_core.sources import SafetensorsFile, model_paths
from ..runtime.decoded_linear import view_as_bytes
from .decoding import check_kinds, classic_options, decoding_options, layers_to_decode
from .folders import CHECKPOINTS, DIFFUSION_MODELS, TEXT_ENCODERS, FileSource
from .running import is_interrupt
from .sources import READS_ENCODERS, is_quantized

__all__ = ["load_clip", "load_model", "load_quantized", "quantized_layers", "reload_file"]

_SIZE_MISMATCH = "size mismatch"  # torch's message where ComfyUI detects another model, with other widths


def load_quantized(source: FileSource) -> tuple:
    """(MODEL, CLIP) of a quantized file; an ExecutionBlocker for the one that the file does not contain.

    Raises:
        QuantizationError: the file has no quantized layers or those of another quantizer, is one of several shards, or ComfyUI
            does not load all layers.
    """
    if len(model_paths(source.path)) > 1:
        raise QuantizationError(
            f"{source.path.name} is one of several shards, and ComfyUI's loader reads one file; join them with lrq migrate."
        )
    with SafetensorsFile(source.path) as file:
        check_kinds(file)
        if not layer_configs(file)[0]:
            raise QuantizationError(
                f"{source.path.name} has no quantized layers; load it with ComfyUI's own loader, or quantize it first."
            )
    no_model = ExecutionBlocker(f"{source.path.name} is a text encoder: use the CLIP output, not MODEL.")
    no_clip = ExecutionBlocker(f"{source.path.name} is a diffusion model: use the MODEL output, not CLIP.")
    model = no_model if source.kind == TEXT_ENCODERS else load_model(source.path, source.kind)
    clip = no_clip if source.kind == DIFFUSION_MODELS else load_clip(source.path, source.kind, source.clip_type)
    return model, clip


def load_model(path: Path, kind: str):
    """The MODEL of a quantized file. Raises QuantizationError where ComfyUI does not load all quantized layers."""
    if layers_to_decode(path):
        model = _load_decoding_model(path, kind)
    elif kind == CHECKPOINTS and READS_ENCODERS:
        model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
    else:  # also a checkpoint in 0.3.75, whose loader of checkpoints knows no dtype for the layers if it is given ours
        model = comfy.sd.load_diffusion_model(str(path), **_dtype_options(path))
    _check_layers(model, path, "model", kind)
    return model


def _dtype_options(path: Path) -> dict:
    """Options of a loader that keep the unquantized tensors of a file in their dtype.

    ComfyUI 0.3.75 gives them the dtype of most weights: on a GPU with FP8 tensor cores that of the quantized ones.
    """
    if READS_ENCODERS or not comfy.model_management.supports_fp8_compute():
        return {}
    sizes = dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), 0)
    with SafetensorsFile(path) as file:
        quantized = layer_configs(file)[0]
        prefix = comfy.model_detection.unet_prefix_from_state_dict(file.tensors)  # "model." too if there is none
        of_model = [name for name in file.tensors if name.startswith(prefix)] or file.tensors
        for name in of_model:
            layer, _, part = name.rpartition(".")
            dtype = file.tensors[name].dtype
            if dtype in sizes and (layer not in quantized or part == "bias"):
                sizes[dtype] += file.tensors[name].nbytes
    dtype = max(sizes, key=lambda dtype: sizes[dtype])
    return {"model_options": {"dtype": dtype}} if sizes[dtype] else {}


def _load_decoding_model(path: Path, kind: str, disable_dynamic: bool = True):
    """The MODEL of a file with a format that ComfyUI cannot run."""
    model = _load_mapped_model(path, kind)
    if model is None:
        raise QuantizationError(
            f"ComfyUI does not recognize the model in {path.name}; save it, and load it in a ComfyUI that supports it."
        )
    model.cached_patcher_init = (_load_decoding_model, (path, kind))  # newer ComfyUI reloads a model by this call
    return model


def _load_mapped_model(path: Path, kind: str):
    """The MODEL of a memory-mapped file from ComfyUI's own loader; None where it does not recognize the model."""
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    load, options = comfy.sd.load_diffusion_model_state_dict, {}
    layers = layers_to_decode(path)
    if kind == CHECKPOINTS and (layers or READS_ENCODERS):
        load, options = comfy.sd.load_state_dict_guess_config, {"output_vae": False, "output_clip": False}
    if layers:
        tensors = view_as_bytes(tensors, layers)
        options |= decoding_options(load)
    else:
        options |= classic_options(load) | _dtype_options(path)
    loaded = load(tensors, metadata=metadata, **options)
    return loaded[0] if isinstance(loaded, tuple) else loaded


def reload_file(path: Path, kind: str, clip_type: str = ""):
    """The ModelPatcher that ComfyUI's own loader makes of a saved file; None where it does not recognize the model.

    Formats that ComfyUI cannot run get decoding layers. Quantized values stay in the file, which is memory-mapped.

    Args:
        clip_type: type of a text encoder where it is known; the file does not name it.

    Raises:
        QuantizationError: ComfyUI loads fewer quantized layers than the file has.
    """
    try:
        if kind == TEXT_ENCODERS:
            return _reload_clip(path, clip_type)
        model = _load_mapped_model(path, kind)
    except RuntimeError as error:
        if _SIZE_MISMATCH not in str(error):
            raise
        return None
    if model is not None:
        _check_layers(model, path, "model", kind)
    return model


def _reload_clip(path: Path, clip_type: str):
    """The text encoder of a file as that type of Load CLIP, else as the first type that loads all its layers."""
    if comfy.sd.detect_te_model(comfy.utils.load_torch_file(str(path), safe_load=True)) is None:
        return None
    problems = []
    for name in sorted(comfy.sd.CLIPType.__members__, key=lambda name: name != clip_type.upper()):
        try:
            clip = load_clip(path, TEXT_ENCODERS, name)
            assert clip is not None  # only a checkpoint can lack a text encoder
            return clip.patcher
        except Exception as error:  # any error of a loader for another text encoder
            if is_interrupt(error) or _SIZE_MISMATCH in str(error):
                raise
            problems.append(error)
    raise problems[0]


def load_clip(path: Path, kind: str, clip_type: str):
    """The CLIP of a quantized file; None for a checkpoint without a text encoder.

    Raises:
        QuantizationError: ComfyUI does not load all quantized layers.
    """
    embeddings = folder_paths.get_folder_paths("embeddings")
    if kind == CHECKPOINTS:
        load = comfy.sd.load_checkpoint_guess_config
        # 0.3.75 does not load quantized layers in the text encoders of a checkpoint.
        decode = _count_layers(path, encoders=True) and (layers_to_decode(path) or not READS_ENCODERS)
        options = decoding_options(load, "te_model_options") if decode else {}
        clip = load(
            str(path), output_vae=False, output_clip=True, output_model=False, embedding_directory=embeddings, **options
        )[1]
        if clip is not None:
            _check_layers(clip.patcher, path, "text encoder", kind, encoders=True)
        return clip
    clip = comfy.sd.load_clip(
        ckpt_paths=[str(path)],
        embedding_directory=embeddings,
        clip_type=comfy.sd.CLIPType[clip_type.upper()],
        **(decoding_options(comfy.sd.load_clip) if layers_to_decode(path) else {}),
    )
    _check_layers(clip.patcher, path, "text encoder", kind)
    return clip


def _count_layers(path: Path, encoders: bool | None) -> int:
    """Number of quantized layers of a file: in the text encoders of a checkpoint, in all its other parts, or in both (None)."""
    with SafetensorsFile(path) as file:
        layers = layer_configs(file)[0]
    return sum(encoders is None or layer.startswith(ENCODER_PREFIX) is encoders for layer in layers)


def _check_layers(patcher, path: Path, what: str, kind: str, encoders: bool = False) -> None:
    """Raise QuantizationError where the model has fewer quantized layers than the file: ComfyUI's loader does not report it.

    ``encoders``: count the text encoders of a checkpoint instead of its other parts.
    """
    expected = _count_layers(path, encoders if kind == CHECKPOINTS else None)
    found = len(quantized_layers(patcher))
    if found < expected:
        raise QuantizationError(
            f"ComfyUI loaded only {found} of the {expected} quantized layers of the {what} in {path.name}, so the model "
            "is not supported; please report it."
        )


def quantized_layers(patcher) -> dict[str, str]:
    """{module name: dtype of its quantized values} of the quantized layers of a ModelPatcher."""
    layers = {}
    for name, module in patcher.model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and (is_quantized(weight) or getattr(module, "is_quantized", False)):
            qdata: torch.Tensor = getattr(weight, "_qdata", weight)
            layers[name] = str(qdata.dtype).removeprefix("torch.")
    return layers
