"""A quantized file as a source of plain weights: decoded with its own scales, a layer at a time."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..errors import RecipeError, SourceError
from ..formats import FOREIGN
from ..output import PROVENANCE_KEY, QUANTIZATION_KEY
from ..output.inspect import BITSANDBYTES, quantized_formats
from ..output.metadata import CONFIG_SUFFIX, NOTE_KEY
from ..sources import SampledSource, TensorInfo
from ..sources.dtypes import DTYPE_NAMES
from ..sources.source import CPU
from .migrate import PLAIN, UNSCALED, CodedLayer, coded_layers, foreign_layers, old_marks, read_scale

__all__ = ["DecodedSource"]


class DecodedSource:
    """The weights that the codes of ``source`` mean, in bfloat16, and everything else as it is.

    FP8 without a scale are weights as they stand, as ComfyUI reads them. What quantizing did to the weights stays in them: a
    file made from the full-precision original is better.

    Attributes:
        origin: ``source``, whose fingerprint counts: codes mean something by scales and JSON that are no tensors here.
        layers: how many layers were coded in which way.

    Raises:
        SourceError: a layer is in a format that cannot be decoded, or codes lack the scale they mean something by.
    """

    def __init__(self, source: SampledSource):
        self.origin = source
        self.name, self.paths = source.name, getattr(source, "paths", ())
        self.layers: Counter[str] = Counter()
        self._decode: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        if BITSANDBYTES in quantized_formats(source):
            raise SourceError(
                f"{self.name} is quantized by bitsandbytes, which is not decoded here; give its full-precision original."
            )
        shapes: dict[str, tuple[int, ...]] = {}
        hidden = set(old_marks(source))
        for layer in coded_layers(source):
            if layer.foreign:
                continue
            hidden.update(name for suffix, name in layer.found.items() if suffix != "weight")
            if not layer.encoding and layer.config and "weight" in layer.found:
                raise SourceError(
                    f"{self.name}: {layer.name} is in {layer.config.get('format') or 'codes'} and lacks its weight_scale; fetch the file again."
                )
            if layer.encoding:
                self._decode[layer.found["weight"]] = partial(self._decoded, layer)
                self.layers[str(layer.encoding)] += 1
        for layer, config in foreign_layers(source).items():
            shapes[f"{layer}.weight"] = self._add_foreign(layer, config, hidden)
        for name, info in source.tensors.items():
            if name not in hidden | self._decode.keys() and info.dtype in UNSCALED:
                self._decode[name] = torch.Tensor.float
                if name.endswith(".weight"):
                    self.layers[f"{DTYPE_NAMES[info.dtype]} without scales"] += 1
        self.tensors = {
            name: TensorInfo(PLAIN, shapes.get(name, info.shape)) if name in self._decode else info
            for name, info in source.tensors.items()
            if name not in hidden
        }
        own = (QUANTIZATION_KEY, PROVENANCE_KEY, NOTE_KEY)
        self.metadata = {key: value for key, value in source.metadata.items() if key not in own}
        if rest := quantized_formats(self):
            raise SourceError(
                f"{self.name} holds {', '.join(rest)} and no scales, so what they mean is lost; give its full-precision original."
            )

    def _add_foreign(self, layer: str, config: dict, hidden: set[str]) -> tuple[int, int]:
        """Note how the layer is decoded and what stands beside it; returns the shape of its weight."""
        format, tensors = FOREIGN.get(config["format"]), self.origin.tensors
        if format is None:
            raise SourceError(f"{self.name}: {layer} is in the format {config['format']}, which cannot be decoded.")
        if missing := [part for part in ("weight", *format.parts) if f"{layer}.{part}" not in tensors]:
            raise SourceError(
                f"{self.name}: {layer} is in the format {config['format']} and lacks its {missing[0]}; fetch the file again."
            )
        parts = {part: f"{layer}.{part}" for part in (*format.parts, *format.more) if f"{layer}.{part}" in tensors}
        hidden.update(parts.values(), [f"{layer}{CONFIG_SUFFIX}"])
        self.layers[config["format"]] += 1
        with self._explained(layer, config):
            shape = format.shape(tensors[f"{layer}.weight"].shape, config)
        self._decode[f"{layer}.weight"] = partial(self._decoded_foreign, layer, config, parts, shape)
        return shape

    def _decoded(self, layer: CodedLayer, codes: torch.Tensor) -> torch.Tensor:
        scale = read_scale(self.origin, layer.found["weight_scale"]).reshape(layer.encoding.scale_shape(codes.shape))
        return layer.encoding.decode(codes, scale.to(codes.device))

    def _decoded_foreign(
        self, layer: str, config: dict, parts: dict[str, str], shape: tuple[int, int], codes: torch.Tensor
    ) -> torch.Tensor:
        scales = {part: self.origin.read(name, codes.device) for part, name in parts.items()}
        with self._explained(layer, config):
            return FOREIGN[config["format"]].decode(codes, scales, config)[: shape[0], : shape[1]]

    @contextlib.contextmanager
    def _explained(self, layer: str, config: dict) -> Iterator[None]:
        try:
            yield
        except (SourceError, RecipeError, RuntimeError, IndexError) as error:  # torch's own for tensors that do not fit
            raise SourceError(
                f"{self.name}: {layer} is no sound layer of the format {config['format']}: {error}".rstrip(".") + "."
            ) from None

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor on ``device``."""
        values = self.origin.read(name, device)
        return self._decode[name](values).to(PLAIN) if name in self._decode else values
