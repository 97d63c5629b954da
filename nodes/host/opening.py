"""A model file as ComfyUI will see it: decoded where that is asked for, diffusers' names turned into ComfyUI's."""

import contextlib
import copy
from collections.abc import Callable, Iterator

import comfy.utils
import torch
from comfy import model_detection

from ...quant_core.convert.dequantize import DecodedSource
from ...quant_core.errors import SourceError
from ...quant_core.output.inspect import quantized_formats
from ...quant_core.recipes.refused import DIFFUSERS, find_refusal
from ...quant_core.sources import Source, TensorInfo, TensorSource, open_source
from ...quant_core.sources.source import CPU
from .folders import DIFFUSION_MODELS, FileSource

__all__ = ["opened"]

State = dict[str, torch.Tensor]
_NOT_RENAMED = "and this ComfyUI has no names of its own for them; give a file that has ComfyUI's names"
_NOT_HERE = f"which ComfyUI turns into its own for files in {DIFFUSION_MODELS} only; move it there"


@contextlib.contextmanager
def opened(file: FileSource) -> Iterator[Source]:
    """The tensors of a file under ComfyUI's names, of whatever kind the file is.

    Raises SourceError for diffusers' names that ComfyUI does not turn into its own, all of them.
    """
    with open_source(file.path) as source:
        if file.requantize and quantized_formats(source):
            source = DecodedSource(source)
        convert = _converter(source) if file.kind == DIFFUSION_MODELS else None
        if convert is None and find_refusal(source.tensors) == DIFFUSERS.description:
            raise SourceError(
                f"{source.name} is under diffusers' layer names, {_NOT_RENAMED if file.kind == DIFFUSION_MODELS else _NOT_HERE}."
            )
        yield RenamedWeights(source, convert) if convert else source


class RenamedWeights:
    """A source whose tensors another program joined and named otherwise. Read whole, into memory, with the first tensor.

    ``convert`` takes out of what it is given all that it uses. Raises SourceError when it leaves something.
    """

    def __init__(self, source: Source, convert: Callable[[State], State]):
        self.name, self.metadata, self.layers = source.name, source.metadata, getattr(source, "layers", {})
        self.paths = getattr(source, "paths", ())
        self._source, self._convert = source, convert
        self._weights: State = {}
        left = _shapes(source)
        self.tensors = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in convert(left).items()}
        if left:
            raise SourceError(
                f"{source.name} is under diffusers' layer names, and this ComfyUI has none of its own for {len(left)} of its {len(source.tensors)} "
                f"tensors, such as {' and '.join(sorted(left)[:2])}; give a file that has ComfyUI's names."
            )

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor on ``device``."""
        if not self._weights:
            self._weights = self._convert({name: self._source.read(name) for name in self._source.tensors})
        return self._weights[name].to(device)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """See :class:`SampledSource`."""
        return TensorSource({name: self.read(name)}).sample(name, offset, length)


def _shapes(source: Source) -> State:
    return {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in source.tensors.items()}


def _known(state: State) -> bool:
    return model_detection.model_config_from_unet(copy.copy(state), "") is not None


def _converter(source: Source) -> Callable[[State], State] | None:
    """ComfyUI's own way from diffusers' names to its own, as its loader chooses it; None for names it knows as they are."""
    shapes = _shapes(source)
    prefix = model_detection.unet_prefix_from_state_dict(shapes)
    if any(name.startswith(prefix) for name in shapes) or _known(shapes):
        return None
    try:
        renamed = model_detection.convert_diffusers_mmdit(copy.copy(shapes), "")
    except KeyError:  # by one name it takes the model for another
        return None
    if renamed is not None:
        return (lambda state: model_detection.convert_diffusers_mmdit(state, "")) if _known(renamed) else None
    config = model_detection.model_config_from_diffusers_unet(copy.copy(shapes))
    if config is None:
        return None
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    return lambda state: {ours: state.pop(theirs) for theirs, ours in names.items() if theirs in state}
