"""Models as tensor sources: files, and the weights of a MODEL or CLIP with their patches baked in."""

from collections.abc import Mapping

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...quant_core.errors import (
    AlreadyQuantizedError,
    NothingToQuantizeError,
    QuantizationError,
)
from ...quant_core.formats.layer_json import CONFIG_KEY
from ...quant_core.sources import TensorInfo, TensorSource
from ...quant_core.sources.source import CPU
from .folders import DIFFUSION_MODELS, TEXT_ENCODERS, FileSource

__all__ = ["READS_ENCODERS", "PatchedWeights", "encoder_parts", "is_quantized", "module_name", "parts_of"]


# Whether this ComfyUI looks for quantized layers in the text encoders of a checkpoint; 0.3.75 does not.
READS_ENCODERS = hasattr(comfy.utils, "detect_layer_quantization")
# Text encoders that ComfyUI loads without looking for quantized layers: they are small, and stay as they are.
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


def _patched_keys(patcher) -> set[str]:
    return {key if isinstance(key, str) else key[0] for key in patcher.patches}


class PatchedWeights:
    """The weights of a ModelPatcher under a prefix as a :class:`~..quant_core.checkpoints.Source`, LoRAs baked in when read.

    A CPU host holds every model in float32, whatever its file held: tensors that fit a 16-bit dtype without loss are
    given in it. ``rename``: state-dict key → name in the file; None leaves a tensor out.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, patcher, name: str, rename):
        self.name = name
        self._patcher = patcher
        state = {rename(key): (key, tensor) for key, tensor in patcher.model_state_dict().items()}
        state.pop(None, None)
        codes = [new for new, (_, tensor) in state.items() if new.endswith(f".{CONFIG_KEY}") or is_quantized(tensor)]
        if codes:
            raise AlreadyQuantizedError(f"The {name} is quantized already; connect its full-precision original.")
        self._keys = {new: key for new, (key, _) in state.items()}
        self._patched = _patched_keys(patcher)
        self._sampled = TensorSource({})
        plain = {new: self._unpatched(key, tensor) for new, (key, tensor) in state.items() if key not in self._patched}
        dtypes = _stored_dtypes(plain)
        self.tensors = {
            new: TensorInfo(dtypes.get(new, torch.float32), tuple(tensor.shape)) for new, (_, tensor) in state.items()
        }

    def _unpatched(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        backup = self._patcher.backup.get(key)
        return tensor if backup is None else backup.weight

    @torch.inference_mode()
    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        key = self._keys[name]
        weight = self._unpatched(key, comfy.utils.get_attr(self._patcher.model, key))
        if key in self._patched:
            patches = self._patcher.patches[key]
            weight = comfy.lora.calculate_weight(patches, weight.to(device, torch.float32, copy=True), key)
        return weight.to(device, self.tensors[name].dtype)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """See :class:`SampledSource`; all samples of a tensor are asked for one after the other."""
        if name not in self._sampled.tensors:
            weight = comfy.utils.get_attr(self._patcher.model, self._keys[name])
            device = comfy.model_management.get_torch_device() if self._keys[name] in self._patched else weight.device
            self._sampled = TensorSource({name: self.read(name, device)})
        return self._sampled.sample(name, offset, length)


def is_quantized(tensor) -> bool:
    """ComfyUI's own class of quantized tensors, wherever the release at hand keeps it."""
    return type(tensor).__name__ == "QuantizedTensor"


def _fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is torch.float32 and torch.equal(tensor.to(dtype).to(torch.float32), tensor)


def _stored_dtypes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
    """Each tensor's dtype; for float32 weights that were widened from a 16-bit dtype, that dtype.

    Widened is a model of which one 16-bit dtype holds more than half of the float32 weights without loss.
    """
    fitting = {
        dtype: {name for name, tensor in tensors.items() if _fits(tensor, dtype)}
        for dtype in (torch.bfloat16, torch.float16)
    }
    sizes = {dtype: sum(tensors[name].numel() for name in names) for dtype, names in fitting.items()}
    narrow = max(sizes, key=sizes.get)
    widened = sizes[narrow] > sum(t.numel() for t in tensors.values() if t.dtype is torch.float32) / 2
    return {name: narrow if widened and name in fitting[narrow] else tensor.dtype for name, tensor in tensors.items()}


def parts_of(source) -> tuple[str, dict[str, object]]:
    """The model folder and {part name: path or Source} of what is connected."""
    if isinstance(source, FileSource):
        return source.kind, {"": source.path}
    if isinstance(source, comfy.sd.CLIP):
        return TEXT_ENCODERS, encoder_parts(source)
    prefix = "diffusion_model."
    return DIFFUSION_MODELS, {
        "": PatchedWeights(source, "MODEL", lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None)
    }


def encoder_parts(clip) -> dict[str, PatchedWeights]:
    """One source per text encoder that ComfyUI can load quantized, named as in files of its own."""
    names = {key.partition(".")[0] for key in clip.patcher.model_state_dict() if ".transformer." in key}
    parts = sorted(names - _PLAIN_ENCODERS)
    if not parts:
        raise NothingToQuantizeError(
            f"ComfyUI loads no quantized weights for {', '.join(sorted(names)) or 'this text encoder'}; leave it as it is."
        )

    def rename(part: str):
        return lambda key: (
            key.removeprefix(f"{part}.").removeprefix("transformer.") if key.startswith(f"{part}.") else None
        )

    return {part: PatchedWeights(clip.patcher, f"CLIP ({part})", rename(part)) for part in parts}


def module_name(model, part: str, layer: str) -> str:
    """A layer's name in the file → its module in the text encoder."""
    for name in (f"{part}.transformer.{layer}", f"{part}.{layer}"):
        try:
            model.get_submodule(name)
            return name
        except AttributeError:
            continue
    raise QuantizationError(
        f"The text encoder has no layer {part}.{layer}; please report the model, it is not supported yet."
    )
