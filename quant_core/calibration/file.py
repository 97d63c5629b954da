"""Calibration files: statistics of the input activations of a model's layers as safetensors."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..cancellation import CancelCheck
from ..deprecated import renamed_attribute
from ..errors import CalibrationError, SourceError
from ..output import SafetensorsWriter, header_bytes
from ..sources import SafetensorsFile, TensorInfo
from ..sources.source import fingerprint
from .hessian import Hessian, LowRankHessian, PackedHessian, PairedHessian, TriangularHessian
from .histogram import BINS
from .statistics import Calibration, LayerStatistics, StepSensitivity

__all__ = ["SUFFIX", "CalibrationFile", "hash_architecture", "write_calibration"]

SUFFIX = ".calib.safetensors"
_METADATA_KEY = "learned_rounding_calibration"
_VERSION = 2  # of files with 8-bit factors; those without are written as version 1, which release 0.1.0 reads
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of layer names in full checkpoints

# Tensor names: field of LayerStatistics → suffix after the name of the layer.
_STATISTICS = {
    "hessian": "gram",
    "validation_hessian": "holdout_gram",
    "mean": "mean",
    "amax": "amax",
    "histogram": "histogram",
}
# Form of a Hessian → field → (suffix after that of the statistic, dtype). Correlations are in −1…1, where float16 is the
# most precise 16-bit type; factors have any magnitude.
_HESSIANS: dict[type, dict[str, tuple[str, torch.dtype]]] = {
    PairedHessian: {
        "panels": ("panels", torch.float16),
        "rms": ("roots", torch.float32),
        "mean": ("mean", torch.float32),
    },
    PackedHessian: {"panels": ("panels", torch.float16), "rms": ("roots", torch.float32)},
    TriangularHessian: {
        "levels": ("triangle", torch.int8),
        "scales": ("triangle_scales", torch.float32),
        "diagonal": ("triangle_diagonal", torch.float32),
        "rms": ("roots", torch.float32),
    },
    LowRankHessian: {"factor": ("factor", torch.bfloat16), "diagonal": ("diagonal", torch.float32)},
}
_LARGEST_TENSOR = TensorInfo(torch.bfloat16, (1 << 40, 1 << 40))  # for the reserve of the header
_HESSIAN_ENDINGS = (
    ".gram",
    ".gram.panels",
    ".gram.triangle",
    ".gram.factor",
)  # a tensor name with one of them identifies the file


@dataclass(frozen=True)
class _Header:
    """JSON object in the file's metadata. The field names are its keys in version 1.

    Attributes:
        version: of the file format.
        architecture: see :func:`hash_architecture`.
        layers: layer → (layer under whose name its statistics are stored, out, in).
        tokens: layer under whose name statistics are stored → (tokens in the Hessian, tokens that the validation
            activations were sampled from).
        sensitivity: layer → :attr:`~.statistics.LayerStatistics.sensitivity`.
        provenance: description of the calibration data.
        step_sensitivity: layer → (position, sensitivity) pairs, see :meth:`~.statistics.Calibration.step_sensitivity`;
            left out of the file if empty.
    """

    version: int
    architecture: str
    layers: dict[str, tuple[str, int, int]]
    tokens: dict[str, tuple[int, int]]
    sensitivity: dict[str, float]
    provenance: dict[str, object]
    step_sensitivity: dict[str, StepSensitivity] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of a file with this header."""
        values = {key: value for key, value in vars(self).items() if value or key != "step_sensitivity"}
        return {_METADATA_KEY: json.dumps(values, separators=(",", ":"))}

    @classmethod
    def parse(cls, path: Path, text: str) -> "_Header":
        """Parse the metadata of the file at ``path``.

        Raises:
            CalibrationError: it is not valid, or was written by a newer version.
        """
        try:
            values = json.loads(text)
            version = values.get("version", 1)
            if version > _VERSION:
                raise CalibrationError(
                    f"{path} was written by a newer version of this node pack; update the node pack."
                )
            layers = {
                str(k): (str(owner), int(out), int(inner))
                for k, (owner, out, inner) in values.get("layers", {}).items()
            }
            tokens = {
                str(k): (int(count), int(validation)) for k, (count, validation) in values.get("tokens", {}).items()
            }
            sensitivity = {str(k): float(value) for k, value in values.get("sensitivity", {}).items()}
            for layer, value in sensitivity.items():
                if not 0 <= value < float("inf"):
                    raise ValueError(f"sensitivity of {layer} is {value}")
            steps = {
                str(k): tuple((float(position), float(value)) for position, value in pairs)
                for k, pairs in values.get("step_sensitivity", {}).items()
            }
            for layer, pairs in steps.items():
                if not all(0 <= position <= 1 and 0 <= value < float("inf") for position, value in pairs):
                    raise ValueError(f"step sensitivity of {layer} is {pairs}")
            architecture, provenance = str(values.get("architecture", "")), dict(values.get("provenance", {}))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CalibrationError(f"{path} has an invalid calibration header ({error}); calibrate again.") from None
        return cls(version, architecture, layers, tokens, sensitivity, provenance, steps)


def hash_architecture(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Hash the names and shapes (out, in) of a model's layers; the same for a model and its fine-tunes."""
    lines = "\n".join(f"{name} {out}x{inner}" for name, (out, inner) in sorted(shapes.items()))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


class CalibrationFile:
    """A :class:`~.statistics.Calibration` in a safetensors file, read layer by layer; a context manager.

    Tensors, each optional, after the name of the layer: ``gram`` (H) and ``holdout_gram`` (H of the validation
    activations), (in, in) in any float dtype, packed as ``….panels`` and ``….roots``, as an 8-bit factor ``….triangle``
    with ``….triangle_scales``, ``….triangle_diagonal`` and ``….roots``, see :class:`~.hessian.TriangularHessian`, or in low
    rank as ``….factor`` (in, rank) and ``….diagonal``; ``mean`` and ``amax`` (in,); ``histogram`` (bins,). The metadata list the layers that
    share statistics, their shapes, sensitivities and the provenance; without metadata each layer has its own statistics.

    Attributes:
        path: of the file; ``paths``: the same as a tuple.
        fingerprint: changes when the statistics change.
        layers: layer → (out, in), for layers listed in the metadata.
        sensitivities: layer → :attr:`~.statistics.LayerStatistics.sensitivity`, where measured; ``step_sensitivities``: those of
            single steps, see :meth:`step_sensitivity`.
        provenance: description of the calibration data as passed to :func:`write_calibration`.

    Raises:
        SourceError: the file is missing or is not a valid safetensors file.
        CalibrationError: it contains no statistics, was written by a newer version, or is not valid. Tensors are checked
            when they are read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.paths = (self.path,)
        self._file = SafetensorsFile(path)
        try:
            if not any(name.endswith(_HESSIAN_ENDINGS) for name in self._file.tensors):
                raise CalibrationError(
                    f"{self.path} is not a calibration file: no Hessian found; choose a file made by Calibrate."
                )
            header = _Header.parse(self.path, self._file.metadata.get(_METADATA_KEY, "{}"))
        except BaseException:
            self._file.close()
            raise
        self.fingerprint = fingerprint(self._file)
        self.layers = {name: (out, inner) for name, (_, out, inner) in header.layers.items()}
        self.sensitivities: Mapping[str, float] = header.sensitivity
        self.step_sensitivities: Mapping[str, StepSensitivity] = header.step_sensitivity
        self.provenance = header.provenance
        self._owners = {name: owner for name, (owner, _, _) in header.layers.items()}
        self._tokens = header.tokens
        self._last: tuple[str, LayerStatistics | None] | None = None

    def _resolve_name(self, layer: str) -> str:
        """Return the name of a layer in this file: without the prefix of a full checkpoint, where only that is listed."""
        if layer in self._owners:
            return layer
        bare = next((layer.removeprefix(prefix) for prefix in _PREFIXES if layer.startswith(prefix)), layer)
        return bare if bare in self._owners else layer

    inputs = renamed_attribute("inputs", "layer_statistics")

    def layer_statistics(self, layer: str) -> LayerStatistics | None:
        name = self._resolve_name(layer)
        owner = self._owners.get(name, name)
        if self._last is None or self._last[0] != owner:  # layers that share statistics are mostly adjacent
            self._last = owner, self._read_statistics(owner)
        statistics, sensitivity = self._last[1], self.sensitivities.get(name)
        if statistics is None or sensitivity is None:
            return statistics
        return replace(statistics, sensitivity=sensitivity)

    def sensitivity(self, layer: str) -> float | None:
        return self.sensitivities.get(self._resolve_name(layer))

    def step_sensitivity(self, layer: str) -> StepSensitivity | None:
        return self.step_sensitivities.get(self._resolve_name(layer))

    def tokens(self, layer: str) -> tuple[int, int]:
        """Return the number of tokens in the Hessian, and the number that validation activations were sampled from."""
        return self._tokens.get(self._owners.get(layer, layer), (0, 0))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.check_layers(self.layers, shapes)

    def check_layers(self, layers: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check as :meth:`check` does, but only ``layers`` of this file."""
        model = {self._resolve_name(name): tuple(shape) for name, shape in shapes.items()}
        for name, shape in layers.items():
            if name not in model:
                raise CalibrationError(
                    f"{self.path.name} was made for another architecture: the model has no layer {name}; "
                    "calibrate this model."
                )
            if model[name] != shape:
                raise CalibrationError(
                    f"{self.path.name} was made for another architecture: layer {name} is {shape[0]}×{shape[1]} in the "
                    f"calibration and {'×'.join(map(str, model[name]))} in the model; calibrate this model."
                )

    def part(self, name: str) -> Calibration:
        """Return the statistics of one of several text encoders, with the layer names of its own file."""
        prefix = f"{name}."
        return _Part(self, prefix) if any(layer.startswith(prefix) for layer in self.layers) else self

    def _read_statistics(self, owner: str) -> LayerStatistics | None:
        names = {field: f"{owner}.{suffix}" for field, suffix in _STATISTICS.items()}
        statistics = LayerStatistics(
            self._read_hessian(names["hessian"]),
            self._read_hessian(names["validation_hessian"]),
            self._read_optional(names["mean"]),
            self._read_optional(names["amax"]),
            self._read_optional(names["histogram"]),
        )
        amax, counts = statistics.amax, statistics.histogram
        if amax is not None and (amax.ndim != 1 or not len(amax)):
            raise CalibrationError(f"{self.path}: {names['amax']} has shape {tuple(amax.shape)}; calibrate again.")
        if counts is not None and (tuple(counts.shape) != (BINS,) or amax is None):
            raise CalibrationError(
                f"{self.path}: {names['histogram']} has shape {tuple(counts.shape)} and {names['amax']} is "
                f"{'missing' if amax is None else 'present'}; expected ({BINS},) with amax; calibrate again."
            )
        return statistics if any(value is not None for value in vars(statistics).values()) else None

    def _read_hessian(self, name: str) -> Hessian | None:
        if name in self._file.tensors:
            return self._read_tensor(name)
        suffixes = {form: {field: suffix for field, (suffix, _) in parts.items()} for form, parts in _HESSIANS.items()}
        found = {
            part for parts in suffixes.values() for part in parts.values() if f"{name}.{part}" in self._file.tensors
        }
        if not found:
            return None
        for form, parts in suffixes.items():
            if found == set(parts.values()):
                return form(**{field: self._read_tensor(f"{name}.{part}") for field, part in parts.items()})
        raise SourceError(
            f"{self.path}: {name} is incomplete, only {', '.join(sorted(found))} found; the file is damaged."
        )

    def _read_optional(self, name: str) -> torch.Tensor | None:
        return self._read_tensor(name) if name in self._file.tensors else None

    def _read_tensor(self, name: str) -> torch.Tensor:
        values = self._file.read(name)
        if values.dtype is torch.int8 and name.endswith(".triangle"):
            return values
        if not values.is_floating_point():
            raise CalibrationError(
                f"{self.path}: {name} has dtype {values.dtype}, but statistics are floating point; calibrate again."
            )
        return values if values.element_size() > 1 else values.float()  # torch has few FP8 operators

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "CalibrationFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Part:
    """The layers of a calibration file whose names start with ``prefix``, without the prefix."""

    def __init__(self, file: CalibrationFile, prefix: str):
        self._file, self._prefix, self.fingerprint, self.paths = file, prefix, file.fingerprint, file.paths

    def layer_statistics(self, layer: str) -> LayerStatistics | None:
        return self._file.layer_statistics(self._prefix + layer)

    def sensitivity(self, layer: str) -> float | None:
        return self._file.sensitivity(self._prefix + layer)

    def step_sensitivity(self, layer: str) -> StepSensitivity | None:
        return self._file.step_sensitivity(self._prefix + layer)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        layers = {name: shape for name, shape in self._file.layers.items() if name.startswith(self._prefix)}
        self._file.check_layers(layers, {self._prefix + name: shape for name, shape in shapes.items()})


def _named_tensors(owner: str, statistics: LayerStatistics) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """Yield (name, tensor, dtype) as stored in the file."""
    for statistic, suffix in _STATISTICS.items():
        value = getattr(statistics, statistic)
        if isinstance(value, torch.Tensor):
            yield f"{owner}.{suffix}", value, torch.float32
        elif value is not None:
            for part, (part_suffix, dtype) in _HESSIANS[type(value)].items():
                tensor = getattr(value, part)
                if dtype is torch.bfloat16 and tensor.dtype is torch.float16:
                    dtype = torch.float16  # 16 bits already; bfloat16 would round a second time
                yield f"{owner}.{suffix}.{part_suffix}", tensor, dtype


def _possible_names(owner: str) -> Iterator[str]:
    """Yield the names of all tensors that an owner may have."""
    for suffix in _STATISTICS.values():
        yield f"{owner}.{suffix}"
        yield from (f"{owner}.{suffix}.{part}" for parts in _HESSIANS.values() for part, _ in parts.values())


def write_calibration(
    path: str | os.PathLike,
    statistics: Mapping[str, LayerStatistics],
    owners: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    tokens: Mapping[str, tuple[int, int]],
    provenance: Mapping[str, object],
    sensitivities: Mapping[str, float] | None = None,
    check: CancelCheck = lambda: None,
    step_sensitivities: Mapping[str, StepSensitivity] | None = None,
) -> int:
    """Write statistics as :class:`CalibrationFile` reads them; returns the size of the file in bytes.

    Args:
        statistics: owner → statistics of its activations, each looked up once. An owner is a layer whose statistics other
            layers may share.
        owners: layer → its owner.
        shapes: layer → (out, in).
        tokens: owner → (tokens in the Hessian, tokens that the validation activations were sampled from).
        provenance: description of the calibration data, as JSON values.
        sensitivities: layer → :attr:`~.statistics.LayerStatistics.sensitivity`, where measured.
        check: called often; raise in it to cancel, which leaves no file.
        step_sensitivities: layer → :meth:`~.statistics.Calibration.step_sensitivity`, where measured.
    """
    header = _Header(
        version=1,
        architecture=hash_architecture(shapes),
        layers={layer: (owner, shapes[layer][0], shapes[layer][1]) for layer, owner in owners.items()},
        tokens=dict(tokens),
        sensitivity={layer: value for layer, value in (sensitivities or {}).items() if layer in owners},
        provenance=dict(provenance),
        step_sensitivity={layer: value for layer, value in (step_sensitivities or {}).items() if layer in owners},
    )
    names = [name for owner in statistics for name in _possible_names(owner)]
    reserve = header_bytes([(name, _LARGEST_TENSOR) for name in names], header.metadata)
    with SafetensorsWriter(path, reserve, check=check) as writer:
        for owner in statistics:
            check()
            layer_statistics = statistics[owner]
            if isinstance(layer_statistics.hessian, TriangularHessian):
                header = replace(header, version=_VERSION)
            for name, tensor, dtype in _named_tensors(owner, layer_statistics):
                writer.add(name, tensor.to(dtype))
        return writer.finish(header.metadata)
