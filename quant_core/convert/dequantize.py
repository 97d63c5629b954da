"""A quantized file as a source of plain weights, dequantized by its own scales one layer at a time."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..errors import RecipeError, SourceError
from ..formats import StoredLayer, detect_layers
from ..formats.detect import UNSCALED_DTYPES, check_companions, legacy_markers, orphan_problem
from ..formats.external import plain_metadata
from ..formats.kinds import quantized_formats
from ..formats.layer_json import QUANTIZATION_KEY
from ..output.metadata import NOTE_KEY, PROVENANCE_KEY
from ..sources import Source, TensorInfo
from ..sources.dtypes import DTYPE_NAMES
from ..sources.opening import convert_names
from ..sources.source import CPU
from .migrate import PLAIN

__all__ = ["DecodedSource", "decode_source"]

_OWN_METADATA = (QUANTIZATION_KEY, PROVENANCE_KEY, NOTE_KEY)


def decode_source(source: Source) -> Source:
    """The weights of a quantized source under ComfyUI's names, see :class:`DecodedSource`; a source of plain weights itself.

    Raises:
        SourceError: as :class:`DecodedSource`, or some of the tensors have no conversion.
    """
    return convert_names(DecodedSource(source)) if quantized_formats(source) else source


class DecodedSource:
    """The weights of a quantized ``source`` in bfloat16, and everything else as it is.

    FP8 without a scale is read as plain weights, as ComfyUI reads it. The error of the quantization stays in the weights:
    a file made from the full-precision original is better.

    Attributes:
        origin: ``source``; its fingerprint counts, since scales and JSON are not among the tensors here.
        layers: codec as text → number of layers.

    Raises:
        SourceError: a layer is in a format that cannot be dequantized, or lacks a scale.
    """

    computed = True

    def __init__(self, source: Source):
        self.origin = source
        self.name, self.paths = source.name, getattr(source, "paths", ())
        self.layers: Counter[str] = Counter()
        self._decode: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        layers = list(detect_layers(source))
        self._stored: dict[str, str] = {}  # name of a weight here → of its quantized values in the file
        shapes: dict[str, tuple[int, ...]] = {}
        hidden = set(legacy_markers(source))
        for layer in layers:
            hidden.update(name for suffix, name in layer.parts.items() if suffix != "weight")
            if not layer.shape:
                self._check_plain(layer)
                continue
            name = f"{layer.name}.weight"
            self._stored[name] = layer.parts["weight"]
            self._decode[name] = partial(self._dequantize, layer)
            shapes[name] = layer.shape
            self.layers[layer.kind] += 1
        check_companions(source, layers)
        renamed = {stored: name for name, stored in self._stored.items()}
        self.tensors: dict[str, TensorInfo] = {}
        for stored, info in source.tensors.items():
            name = renamed.get(stored, stored)
            if stored in hidden:
                continue
            if self._stored.get(name, stored) != stored:
                raise SourceError(
                    f"{self.name}: {name} and {self._stored[name]} are two weights of one layer; give its full-precision original."
                )
            if name not in self._decode and info.dtype in UNSCALED_DTYPES:
                self._decode[name] = torch.Tensor.float
                if name.endswith(".weight"):
                    self.layers[f"{DTYPE_NAMES[info.dtype]} without scales"] += 1
            self.tensors[name] = TensorInfo(PLAIN, shapes.get(name, info.shape)) if name in self._decode else info
        self.metadata = {key: value for key, value in plain_metadata(source).items() if key not in _OWN_METADATA}
        if rest := quantized_formats(self):
            raise SourceError(
                f"{self.name} has {', '.join(rest)} and no scales, so the values are ambiguous; give its full-precision original."
            )

    def _check_plain(self, layer: StoredLayer) -> None:
        """Raise SourceError for a layer without a codec that is quantized all the same."""
        format = layer.config.get("format")
        if layer.problem:
            raise SourceError(layer.problem)
        if not layer.relabelled:
            raise SourceError(f"{self.name}: {layer.name} is in format {format}, which cannot be dequantized here.")
        if problem := orphan_problem(self.origin, layer) if "weight" not in layer.parts else None:
            raise SourceError(problem)
        if layer.config and "weight" in layer.parts:
            dtype = self.origin.tensors[layer.parts["weight"]].dtype
            raise SourceError(
                f"{self.name}: {layer.name} is in format {format or dtype} and has no scale; download the file again."
            )

    def _dequantize(self, layer: StoredLayer, qdata: torch.Tensor) -> torch.Tensor:
        needed = [suffix for suffix in layer.parts if suffix in layer.needed]
        scaled = layer.relabelled
        tensors = {
            suffix: layer.read_scale(self.origin, suffix) if scaled else self.origin.read(layer.parts[suffix])
            for suffix in needed
        }
        others = {suffix: tensor.to(qdata.device) for suffix, tensor in tensors.items()}
        with self._explained(layer):
            return layer.dequantize(qdata, others, PLAIN)

    @contextlib.contextmanager
    def _explained(self, layer: StoredLayer) -> Iterator[None]:
        try:
            yield
        except (
            SourceError,
            RecipeError,
            RuntimeError,
            ValueError,
            IndexError,
        ) as error:  # torch's own for shapes that do not fit
            raise SourceError(
                f"{self.name}: {layer.name} is not a valid layer of format {layer.format_name}: {error}".rstrip(".")
                + "."
            ) from None

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor on ``device``."""
        values = self.origin.read(self._stored.get(name, name), device)
        return self._decode[name](values).to(PLAIN) if name in self._decode else values
