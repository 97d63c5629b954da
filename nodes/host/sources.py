"""Models as tensor sources: files, and the weights of a MODEL or CLIP with their patches applied."""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy import model_detection

from ...quant_core.errors import AlreadyQuantizedError, NothingToQuantizeError, QuantizationError
from ...quant_core.formats.layer_json import CONFIG_KEY
from ...quant_core.sources import Source, TensorInfo, TensorSource
from ...quant_core.sources.source import CPU
from ...quant_core.sources.staging import Staging
from .file_slices import load_weight
from .folders import DIFFUSION_MODELS, TEXT_ENCODERS, FileSource
from .foreign_weights import DECODED, hold_weight
from .opening import meta_tensors

__all__ = [
    "READS_ENCODERS",
    "PatchedWeights",
    "encoder_parts",
    "find_module",
    "is_quantized",
    "model_weights",
    "split_parts",
]

# Whether this ComfyUI loads quantized layers in the text encoders of a checkpoint; 0.3.75 does not.
READS_ENCODERS = hasattr(comfy.utils, "detect_layer_quantization")
# Text encoders in which ComfyUI does not load quantized layers; they are small.
_PLAIN_ENCODERS = {
    "clip_l",
    "clip_g",
    "clip_h",
    "t5base",
    "pile_t5xl",
    "mt5xl",
    "hydit_clip",
    "byt5_small",
    "sam3_clip",
    "t5gemma",
}

_JSON = (bool, int, float, str, list)  # types of values in a configuration
_PART = 1 << 20  # elements that are compared at a time: fresh memory of a whole weight costs more than the comparison


def _patched_keys(patcher) -> set[str]:
    """State-dict keys of the tensors that have patches; a patch of a part of a tensor has a tuple as its key."""
    return {key if isinstance(key, str) else key[0] for key in patcher.patches}


class PatchedWeights:
    """The weights of a ModelPatcher as a source of tensors; reading a tensor applies its LoRAs.

    ComfyUI on a CPU converts every model to float32 when it loads it. Tensors that a 16-bit dtype represents exactly are
    returned in that dtype.

    Args:
        rename: state-dict key → name in a file; None excludes the tensor.
        others: name → tensor of the file that no module has, such as a tokenizer.

    Raises:
        AlreadyQuantizedError: some of the weights are quantized, and their class cannot dequantize them.
        SourceError: some of the weights have no values in memory.
    """

    metadata: Mapping[str, str] = {}
    computed = True

    def __init__(
        self,
        patcher,
        name: str,
        rename: Callable[[str], str | None],
        others: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ):
        self.name, self._others = name, dict(others)
        self._patcher = patcher
        state = patcher.model_state_dict()
        self._keys = {new: key for key in _weight_keys(patcher.model, state) if (new := rename(key)) is not None}
        if any(new.endswith(f".{CONFIG_KEY}") or is_quantized(state.get(key)) for new, key in self._keys.items()):
            raise AlreadyQuantizedError(f"The {name} is already quantized; connect its full-precision original.")
        self._patched = _patched_keys(patcher)
        self._sampled, self._staging = TensorSource({}), Staging()
        held = {new: hold_weight(patcher.model, key, name) for new, key in self._keys.items()}
        unpatched = {new: weight for new, weight in held.items() if self._keys[new] not in self._patched}
        plain = {
            new: self._unpatched(self._keys[new], weight.tensor)
            for new, weight in unpatched.items()
            if weight.decode is None
        }
        dtypes = dict.fromkeys(unpatched, DECODED) | _stored_dtypes(plain)
        self.tensors: Mapping[str, TensorInfo] = {
            new: TensorInfo(dtypes.get(new, torch.float32), tuple(weight.tensor.shape)) for new, weight in held.items()
        } | {new: TensorInfo(tensor.dtype, tuple(tensor.shape)) for new, tensor in self._others.items()}

    def _unpatched(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` without the patches that ComfyUI applies to the model in memory."""
        backup = self._patcher.backup.get(key)
        return tensor if backup is None else backup.weight

    @torch.inference_mode()
    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Read a tensor onto ``device``, with its patches."""
        if name in self._others:
            return self._others[name].to(device)
        key = self._keys[name]
        held = hold_weight(self._patcher.model, key, self.name)
        weight = self._unpatched(key, held.tensor)
        if held.decode:
            weight = held.decode(weight, device)
        if key in self._patched:
            patches = self._patcher.patches[key]
            weight = load_weight(weight, device, self._staging).to(torch.float32, copy=True)
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return load_weight(weight, device, self._staging).to(self.tensors[name].dtype)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """See :class:`SampledSource`. Samples of one tensor must be requested one after the other: the last tensor is cached."""
        if name in self._others:
            return TensorSource(self._others).sample(name, offset, length)
        if name not in self._sampled.tensors:
            weight = comfy.utils.get_attr(self._patcher.model, self._keys[name])
            device = comfy.model_management.get_torch_device() if self._keys[name] in self._patched else weight.device
            self._sampled = TensorSource({name: self.read(name, device)})
        return self._sampled.sample(name, offset, length)


def _weight_keys(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Keys of the tensors of ``state`` in the model; for several tensors of one quantized weight the key of that weight."""
    keys: dict[str, None] = {}
    for key, tensor in state.items():
        if owner := _find_owner(model, key):
            keys[owner] = None
        elif not tensor.is_meta or _find_attribute(model, key) is not None:
            keys[key] = None  # ComfyUI-GGUF adds meta tensors that the model does not have, for estimates of memory
    return list(keys)


def _find_owner(model: torch.nn.Module, key: str) -> str | None:
    """Key of the tensor that ``key`` is a part of: quanto's weight._data, weight.quant_state.… of bitsandbytes; None if there is none."""
    owner = key.rpartition(".")[0]
    while owner and not isinstance(_find_attribute(model, owner), torch.Tensor):
        owner = owner.rpartition(".")[0]
    return owner or None


def _find_attribute(model: torch.nn.Module, key: str) -> object:
    try:
        return comfy.utils.get_attr(model, key)
    except AttributeError:
        return None


def is_quantized(tensor) -> bool:
    """Whether ``tensor`` is of ComfyUI's class of quantized tensors, whose module depends on the release."""
    return type(tensor).__name__ == "QuantizedTensor"


def _fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` represents every value of a float32 tensor exactly."""
    return tensor.dtype is torch.float32 and all(
        torch.equal(part.to(dtype).to(torch.float32), part) for part in tensor.flatten().split(_PART)
    )


def _stored_dtypes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
    """Each tensor's dtype; for float32 tensors that ComfyUI converted from a 16-bit dtype, that dtype.

    A model counts as converted if one 16-bit dtype represents more than half of its float32 weights exactly.
    """
    fitting = {
        dtype: {name for name, tensor in tensors.items() if _fits(tensor, dtype)}
        for dtype in (torch.bfloat16, torch.float16)
    }
    sizes = {dtype: sum(tensors[name].numel() for name in names) for dtype, names in fitting.items()}
    narrow = max(sizes, key=lambda dtype: sizes[dtype])
    converted = sizes[narrow] > sum(t.numel() for t in tensors.values() if t.dtype is torch.float32) / 2
    return {name: narrow if converted and name in fitting[narrow] else tensor.dtype for name, tensor in tensors.items()}


def split_parts(source) -> tuple[str, Mapping[str, FileSource | PatchedWeights]]:
    """(model folder, {part name: file or weights}) of a FileSource, MODEL or CLIP; a whole model is the part ""."""
    if isinstance(source, FileSource):
        return source.kind, {"": source}
    if isinstance(source, comfy.sd.CLIP):
        return TEXT_ENCODERS, encoder_parts(source)
    return DIFFUSION_MODELS, {"": model_weights(source)}


def model_weights(model) -> PatchedWeights:
    """The weights of a MODEL, with the tensor names of diffusion model files."""
    prefix = "diffusion_model."
    weights = PatchedWeights(model, "MODEL", lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None)
    weights.metadata = _undetected_config(model, weights)
    return weights


def _undetected_config(model, weights: Source) -> dict[str, str]:
    """Header metadata with what ComfyUI read from the header of the model's own file, and does not detect in the tensors.

    LTX-Video 0.9.5 and LTX-2 have such values, among them the positions of frames.
    """
    config = getattr(getattr(model.model, "model_config", None), "unet_config", {})
    detected = model_detection.detect_unet_config(meta_tensors(weights), "")
    if detected is None:
        return {}
    more = {key: value for key, value in config.items() if key not in detected and isinstance(value, _JSON)}
    metadata = {"config": json.dumps({"transformer": more})}
    read = model_detection.detect_unet_config(meta_tensors(weights), "", metadata=dict(metadata))
    return metadata if read != detected else {}  # ComfyUI reads the header of some families only


def encoder_parts(clip) -> dict[str, PatchedWeights]:
    """{name: weights} of the text encoders that ComfyUI can load quantized, with the tensor names of text encoder files."""
    names = {key.partition(".")[0] for key in clip.patcher.model_state_dict() if ".transformer." in key}
    parts = sorted(names - _PLAIN_ENCODERS)
    if not parts:
        raise NothingToQuantizeError(
            f"ComfyUI does not load quantized weights for {', '.join(sorted(names)) or 'this text encoder'}; use it unquantized."
        )

    def rename(part: str) -> Callable[[str], str | None]:
        return lambda key: (
            key.removeprefix(f"{part}.").removeprefix("transformer.") if key.startswith(f"{part}.") else None
        )

    tokenizer = clip.tokenizer.state_dict() if len(parts) == 1 else {}  # as ComfyUI's CLIPSave writes it
    others = {name: tensor for name, tensor in tokenizer.items() if isinstance(tensor, torch.Tensor)}
    return {part: PatchedWeights(clip.patcher, f"CLIP ({part})", rename(part), others) for part in parts}


def find_module(model, part: str, layer: str) -> str:
    """The module name, in the text encoder ``model``, of a layer of a file. Raises QuantizationError where there is none."""
    for name in (f"{part}.transformer.{layer}", f"{part}.{layer}"):
        try:
            model.get_submodule(name)
            return name
        except AttributeError:
            continue
    raise QuantizationError(
        f"ComfyUI's text encoder has no layer {part}.{layer}, so the model is not supported; please report it."
    )
