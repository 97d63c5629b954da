"""Calibration files: statistics of the inputs of a model's layers as safetensors."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import CalibrationError, SourceError
from ..output import SafetensorsWriter, header_bytes
from ..sources import SafetensorsFile, TensorInfo
from ..sources.source import fingerprint
from .hessian import Inputs, LowRankGram, PackedGram, PairedGram
from .histogram import BINS
from .statistics import Calibration

__all__ = ["SUFFIX", "CalibrationFile", "architecture", "write_calibration"]

SUFFIX = ".calib.safetensors"
_KEY = "learned_rounding_calibration"
_VERSION = 1
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of layers in whole checkpoints
_KINDS = ("gram", "holdout_gram", "mean", "amax", "histogram")
_FORMS = {  # what a Gram may consist of, the longer first
    ("panels", "roots", "mean"): PairedGram,
    ("panels", "roots"): PackedGram,
    ("factor", "diagonal"): LowRankGram,
}


def architecture(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A mark of a model's layers by their names and shapes (out, in): the same for a model and its fine-tunes."""
    lines = "\n".join(f"{name} {out}x{inner}" for name, (out, inner) in sorted(shapes.items()))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


class CalibrationFile:
    """A safetensors file, read layer by layer; a context.

    Of each input it may hold, under the name of a layer that is given it: ``gram`` and ``holdout_gram``, (in, in) in any
    float dtype, or packed as ``….panels`` and ``….roots``, or in low rank as ``….factor`` (in, rank) and ``….diagonal``;
    ``mean`` and ``amax`` (in,), and ``histogram``. The header says which layers share an input, their shapes, and what was
    sampled, and how sensitive the model is to errors of each; without it every layer has an input of its own.

    Attributes:
        path: where it lies; ``paths``: the same as a tuple.
        mark: changes when the statistics do.
        layers: layer → (out, in), as far as known.
        provenance: what was sampled, as it was given to :func:`write_calibration`.

    Raises:
        SourceError: the file is missing or is no safetensors file.
        CalibrationError: it holds no statistics, was made by a newer version, or holds what is none (when it is read).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.paths = (self.path,)
        self._file = SafetensorsFile(path)
        try:
            self._parse()
        except BaseException:
            self._file.close()
            raise
        self.mark = fingerprint(self._file)
        self._last: tuple[str, Inputs | None] | None = None

    def _parse(self) -> None:
        if not any(name.endswith((".gram", ".gram.panels", ".gram.factor")) for name in self._file.tensors):
            raise CalibrationError(
                f"{self.path} holds no Grams of layers, so it is no calibration; choose another file."
            )
        try:
            header = json.loads(self._file.metadata.get(_KEY, "{}"))
            if header.get("version", _VERSION) > _VERSION:
                raise CalibrationError(f"{self.path} was made by a newer version of this node pack; update it.")
            layers = {
                str(name): (str(site), int(out), int(inner))
                for name, (site, out, inner) in header.get("layers", {}).items()
            }
            self._tokens = {
                str(site): (int(learned), int(held)) for site, (learned, held) in header.get("tokens", {}).items()
            }
            self._sensitivity = {str(name): float(value) for name, value in header.get("sensitivity", {}).items()}
            for name, value in self._sensitivity.items():
                if not 0 <= value < float("inf"):
                    raise ValueError(f"{name} has the sensitivity {value}")
            self.provenance = dict(header.get("provenance", {}))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CalibrationError(f"{self.path} has a damaged header ({error}); calibrate again.") from None
        self._sites = {name: site for name, (site, _, _) in layers.items()}
        self.layers = {name: (out, inner) for name, (_, out, inner) in layers.items()}

    def _known_as(self, layer: str) -> str:
        """The name under which a layer is known here: without the prefix of a whole checkpoint, if need be."""
        if layer not in self._sites:
            bare = next((layer.removeprefix(prefix) for prefix in _PREFIXES if layer.startswith(prefix)), layer)
            return bare if bare in self._sites else layer
        return layer

    def inputs(self, layer: str) -> Inputs | None:
        name = self._known_as(layer)
        site = self._sites.get(name, name)
        if self._last is None or self._last[0] != site:  # layers that share an input mostly follow each other
            found = {kind: self._read(f"{site}.{kind}") for kind in _KINDS}
            shapes = {kind: tuple(found[kind].shape) for kind in ("amax", "histogram") if found[kind] is not None}
            if (
                any(len(shape) != 1 or not all(shape) for shape in shapes.values())
                or shapes.get("histogram", (BINS,)) != (BINS,)
                or [*shapes] == ["histogram"]
            ):
                raise CalibrationError(
                    f"{self.path}: what {site} was given is described by {shapes}, which says nothing; calibrate again."
                )
            self._last = site, Inputs(**found) if any(value is not None for value in found.values()) else None
        known, sensitivity = self._last[1], self._sensitivity.get(name)
        return known if known is None or sensitivity is None else replace(known, sensitivity=sensitivity)

    def sensitivity_of(self, layer: str) -> float | None:
        return self._sensitivity.get(self._known_as(layer))

    @property
    def sensitivity(self) -> Mapping[str, float]:
        """Layer → :attr:`~.gram.Inputs.sensitivity`, of those that were measured."""
        return self._sensitivity

    def tokens(self, layer: str) -> tuple[int, int]:
        """How many tokens the Gram is the mean of, and from how many the held-out rows were drawn."""
        return self._tokens.get(self._sites.get(layer, layer), (0, 0))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.check_layers(self.layers, shapes)

    def check_layers(self, known: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """As :meth:`check`, of some of the layers."""
        have = {self._known_as(name): tuple(shape) for name, shape in shapes.items()}
        for name, shape in known.items():
            if name not in have:
                raise CalibrationError(
                    f"{self.path.name} was made for another architecture: the model has no layer {name}; calibrate this model."
                )
            if have[name] != shape:
                raise CalibrationError(
                    f"{self.path.name} was made for another architecture: its layer {name} is {shape[0]}×{shape[1]}, "
                    f"the model's is {'×'.join(map(str, have[name]))}; calibrate this model."
                )

    def part(self, name: str) -> Calibration:
        """What is known of one text encoder of several, by the names its layers have in a file of its own."""
        return _Part(self, f"{name}.") if any(layer.startswith(f"{name}.") for layer in self.layers) else self

    def _read(self, name: str):
        tensors = self._file.tensors
        if name in tensors:
            return self._values(name)
        present = tuple(part for part in dict.fromkeys(sum(_FORMS, ())) if f"{name}.{part}" in tensors)
        if present and present not in _FORMS:
            raise SourceError(f"{self.path}: {name}.{present[0]} has no counterpart; the file is damaged.")
        return _FORMS[present](*(self._values(f"{name}.{part}") for part in present)) if present else None

    def _values(self, name: str) -> torch.Tensor:
        values = self._file.read(name)
        if not values.is_floating_point():
            raise CalibrationError(
                f"{self.path}: {name} is of {values.dtype}, which no statistics are; calibrate again."
            )
        return values if values.element_size() > 1 else values.float()  # torch computes little in FP8

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "CalibrationFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Part:
    """The layers of a calibration whose names begin with ``prefix``, without it."""

    def __init__(self, whole: CalibrationFile, prefix: str):
        self._whole, self._prefix, self.mark, self.paths = whole, prefix, whole.mark, whole.paths

    def inputs(self, layer: str) -> Inputs | None:
        return self._whole.inputs(self._prefix + layer)

    def sensitivity_of(self, layer: str) -> float | None:
        return self._whole.sensitivity_of(self._prefix + layer)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        own = {name: shape for name, shape in self._whole.layers.items() if name.startswith(self._prefix)}
        self._whole.check_layers(own, {self._prefix + name: shape for name, shape in shapes.items()})


def _tensors(site: str, inputs: Inputs) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """Name, tensor and dtype in the file."""
    for kind, value in vars(inputs).items():
        if isinstance(value, torch.Tensor):
            yield f"{site}.{kind}", value, torch.float32
        elif value is not None:
            parts = next(parts for parts, make in _FORMS.items() if isinstance(value, make))
            for part in parts:
                tensor = getattr(value, part)
                wide = part not in ("panels", "factor")
                yield f"{site}.{kind}.{part}", tensor, torch.float32 if wide else _narrow(part, tensor)


def _narrow(part: str, tensor: torch.Tensor) -> torch.dtype:
    """Correlations lie in −1…1, where float16 is the most precise; factors may be of any size."""
    return torch.float16 if part == "panels" else torch.bfloat16 if tensor.dtype is not torch.float16 else tensor.dtype


def write_calibration(
    path: str | os.PathLike,
    inputs: Mapping[str, Inputs],
    sites: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    tokens: Mapping[str, tuple[int, int]],
    provenance: Mapping[str, object],
    sensitivity: Mapping[str, float] | None = None,
) -> int:
    """Write statistics as :class:`CalibrationFile` reads them; returns the file's size in bytes.

    Args:
        inputs: name of an input → what is known of it.
        sites: layer → name of its input.
        shapes: layer → (out, in).
        tokens: name of an input → how many tokens its Gram is the mean of, and how many were held out.
        provenance: what was sampled, as JSON values.
        sensitivity: layer → see :class:`~.gram.Inputs`; of as many as were measured.
    """
    header = {
        "version": _VERSION,
        "architecture": architecture(shapes),
        "layers": {layer: [site, *shapes[layer]] for layer, site in sites.items()},
        "tokens": {site: list(counts) for site, counts in tokens.items()},
        "sensitivity": {layer: value for layer, value in (sensitivity or {}).items() if layer in sites},
        "provenance": dict(provenance),
    }
    metadata = {_KEY: json.dumps(header, separators=(",", ":"))}
    planned = [
        (name, TensorInfo(dtype, tuple(tensor.shape)))
        for site, known in inputs.items()
        for name, tensor, dtype in _tensors(site, known)
    ]
    with SafetensorsWriter(path, header_bytes(planned, metadata)) as writer:
        for site, known in inputs.items():
            for name, tensor, dtype in _tensors(site, known):
                writer.add(name, tensor.to(dtype))
        return writer.finish(metadata)
