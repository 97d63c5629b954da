"""Open a model file under ComfyUI's tensor names, dequantized on request."""

import contextlib
import copy
from collections.abc import Callable, Iterator

import comfy.utils
import torch
from comfy import model_detection

from ...quant_core.convert.dequantize import decode_source
from ...quant_core.errors import SourceError
from ...quant_core.formats.kinds import quantized_formats
from ...quant_core.recipes.refused import DIFFUSERS, find_refusal
from ...quant_core.sources import Source, TensorInfo, TensorSource, open_source
from ...quant_core.sources.source import CPU
from .folders import DIFFUSION_MODELS, FileSource

__all__ = ["meta_tensors", "open_file"]

State = dict[str, torch.Tensor]
_NOT_CONVERTIBLE = "this ComfyUI has no conversion for it; use a file with ComfyUI's tensor names"
_WRONG_FOLDER = f"ComfyUI converts files in {DIFFUSION_MODELS} only; move the file there"


@contextlib.contextmanager
def open_file(file: FileSource) -> Iterator[Source]:
    """Open the tensors of a file of any supported file format, renamed from diffusers' names to ComfyUI's.

    A quantized file keeps its names unless it is dequantized: ComfyUI's conversions do not know its scales, and its plan is
    refused by the name of its format.

    Raises:
        SourceError: the file has diffusers' names, and ComfyUI does not convert all of them.
    """
    with open_source(file.path) as opened:
        source = decode_source(opened) if file.requantize else opened
        if quantized_formats(source):
            yield source
            return
        convert = _converter(source) if file.kind == DIFFUSION_MODELS else None
        if convert is None and find_refusal(source.tensors) == DIFFUSERS.description:
            raise SourceError(
                f"{source.name} has diffusers' tensor names: {_NOT_CONVERTIBLE if file.kind == DIFFUSION_MODELS else _WRONG_FOLDER}."
            )
        yield RenamedWeights(source, convert) if convert else source


class RenamedWeights:
    """A source whose tensors are renamed and concatenated by ``convert``. The first read loads all of it into memory.

    ``convert`` removes the tensors that it uses from its argument. Raises SourceError when some remain.
    """

    def __init__(self, source: Source, convert: Callable[[State], State]):
        self.name, self.metadata, self.layers = source.name, source.metadata, getattr(source, "layers", {})
        self.paths = getattr(source, "paths", ())
        self._source, self._convert = source, convert
        self._weights: State = {}
        left = meta_tensors(source)
        self.tensors = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in convert(left).items()}
        if left:
            raise SourceError(
                f"{source.name} has diffusers' tensor names: this ComfyUI has no conversion for {len(left)} of its "
                f"{len(source.tensors)} tensors, for example {' and '.join(sorted(left)[:2])}; use a file with ComfyUI's tensor names."
            )

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Read a tensor onto ``device``."""
        if not self._weights:
            self._weights = self._convert({name: self._source.read(name) for name in self._source.tensors})
        return self._weights[name].to(device)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """See :class:`SampledSource`."""
        return TensorSource({name: self.read(name)}).sample(name, offset, length)


def meta_tensors(source: Source) -> State:
    """Tensors of the same names, dtypes and shapes without data."""
    return {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in source.tensors.items()}


def _is_recognized(state: State) -> bool:
    """Whether ComfyUI recognizes a diffusion model in these tensors."""
    return model_detection.model_config_from_unet(copy.copy(state), "") is not None


def _converter(source: Source) -> Callable[[State], State] | None:
    """ComfyUI's conversion from diffusers' names, chosen as its loader does; None where it needs or has none."""
    shapes = meta_tensors(source)
    prefix = model_detection.unet_prefix_from_state_dict(shapes)
    if any(name.startswith(prefix) for name in shapes) or _is_recognized(shapes):
        return None
    try:
        renamed = model_detection.convert_diffusers_mmdit(copy.copy(shapes), "")
    except KeyError:  # one of the names belongs to another model too
        return None
    if renamed is not None:
        return (lambda state: model_detection.convert_diffusers_mmdit(state, "")) if _is_recognized(renamed) else None
    config = model_detection.model_config_from_diffusers_unet(copy.copy(shapes))
    if config is None:
        return None
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    return lambda state: {new: state.pop(old) for old, new in names.items() if old in state}
