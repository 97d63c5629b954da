"""A quantized file as a source of plain weights: decoded with its own scales, a layer at a time."""

from collections import Counter

import torch

from .checkpoints import PROVENANCE_KEY, QUANTIZATION_KEY, SampledSource, TensorInfo
from .checkpoints.metadata import NOTE_KEY
from .checkpoints.source import CPU
from .errors import SourceError
from .migrate import coded_layers, old_marks, read_scale

__all__ = ["DecodedSource"]

DTYPE = torch.bfloat16  # eight bits say no more


class DecodedSource:
    """The weights that the codes of ``source`` mean, in bfloat16, and everything else as it is.

    What quantizing did to the weights stays in them: a file made from the full-precision original is better.

    Attributes:
        layers: how many layers were coded in which way.

    Raises:
        SourceError: a layer is in a format that cannot be decoded.
    """

    def __init__(self, source: SampledSource):
        self._source = source
        self.name, self.paths = source.name, getattr(source, "paths", ())
        self.layers: Counter[str] = Counter()
        self._coded, hidden = {}, set(old_marks(source))
        for layer in coded_layers(source):
            if layer.foreign:
                raise SourceError(f"{source.name}: {layer.name} is in the format {layer.config['format']}, which cannot be decoded.")
            hidden.update(name for suffix, name in layer.found.items() if suffix != "weight")
            if layer.encoding:
                self._coded[layer.found["weight"]] = layer
                self.layers[str(layer.encoding)] += 1
        self.tensors = {
            name: TensorInfo(DTYPE, info.shape) if name in self._coded else info
            for name, info in source.tensors.items()
            if name not in hidden
        }
        own = (QUANTIZATION_KEY, PROVENANCE_KEY, NOTE_KEY)
        self.metadata = {key: value for key, value in source.metadata.items() if key not in own}

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor on ``device``."""
        values = self._source.read(name, device)
        if layer := self._coded.get(name):
            scale = read_scale(self._source, layer.found["weight_scale"]).reshape(layer.encoding.scale_shape(values.shape))
            values = layer.encoding.decode(values, scale.to(device)).to(DTYPE)
        return values

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """Bytes that tell the tensor at ``offset`` from others: of its codes where it has some."""
        size = self._source.tensors[name].nbytes
        begin = offset * size // max(self.tensors[name].nbytes, 1)
        return self._source.sample(name, begin, min(length, size - begin))
