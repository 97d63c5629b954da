"""Check a file against what ComfyUI's loader relies on; the loader itself checks little of it.

ComfyUI 0.33 samples noise without an error when a layer lacks its JSON, and finds a wrong scale shape only while it
samples.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..cancellation import CancelCheck
from ..formats import READABLE, Codec, StoredLayer, TensorSpec, detect_layer
from ..formats.detect import LEGACY_MARKER, QUANTIZED_DTYPES, UNSCALED_DTYPES, is_scale, legacy_markers, orphan_problem
from ..formats.expert_bank import count_experts, expert_parts
from ..formats.kinds import find_kinds
from ..formats.layer_json import CONFIG_KEY, QUANTIZATION_KEY, file_layers, header_layers, layer_configs
from ..formats.table import release_number
from ..sources import Source, open_safetensors
from ..sources.dtypes import DTYPE_NAMES
from .metadata import MODEL_RUN_KEY, describe_model_run, provenance
from .values import Finding, check_fp8_values, check_layer_values, is_finite

__all__ = ["Verification", "verify_file", "verify_source"]

_SHAPE_KEYS = ("per_row", "group_size")  # of a layer's JSON, which repeat what the shape of its scale implies
_OPTIONAL_KEY = "per_row"  # which no loader reads: ComfyUI's own files do not have it
_TENSOR_JSON_SINCE = "0.27"  # first ComfyUI that reads the JSON tensors; before, a file needs its header entry
_LEGACY_SCALE = "scale_weight"
_COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SCALE_DTYPES = (torch.float64, *_COMPUTE_DTYPES, *UNSCALED_DTYPES)


@dataclass
class Verification:
    """The result of a check.

    Attributes:
        layers: number of quantized layers.
        problems: one sentence each, empty when the file is valid.
        warnings: one sentence each about a valid file.
        model_run: what a rounding that ran the model recorded, see :func:`~.metadata.describe_model_run`; empty for others.
    """

    layers: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    model_run: str = ""


def verify_file(
    path: str | os.PathLike,
    *,
    check: CancelCheck | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check a safetensors file, or shards by their index, folder or one of them, layer by layer, and the values of its quantized tensors.

    Args:
        check: called often; raise in it to cancel.
        progress: called with the bytes that have been checked, and the bytes of all tensors to check.

    Raises:
        SourceError: the file cannot be read at all.
    """
    with open_safetensors(path) as source:
        return verify_source(source, values=True, check=check, progress=progress)


def verify_source(
    source: Source,
    *,
    values: bool = False,
    check: CancelCheck | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check tensors that are, or are to become, a file; ``values``: read the weights too. See :func:`verify_file`."""
    verifier = _Verifier(source, values, check, progress)
    result = Verification(len(verifier.layers), model_run=describe_model_run(provenance(source).get(MODEL_RUN_KEY)))
    for finding in verifier.findings():
        (result.problems if finding.fatal else result.warnings).append(finding.text)
    return result


class _Verifier:
    """Checks of one source.

    Attributes:
        configs, header: {layer: JSON} of the JSON tensors and of the header.
        layers: {layer: JSON} of the layers that are checked.
    """

    def __init__(
        self,
        source: Source,
        values: bool,
        check: CancelCheck | None,
        progress: Callable[[int, int], None] | None,
    ):
        self._source, self._values, self._check, self._progress = source, values, check, progress
        self.configs, self.header = layer_configs(source)
        self.layers = file_layers(self.configs, self.header)
        self._computed_in = _compute_dtype(source)
        self._markers = [name.removesuffix(LEGACY_MARKER) for name in legacy_markers(source)]  # the prefix of each
        self._done = 0
        checked = self._quantized_tensors()
        self._plain = [name for name in source.tensors if checked and self._is_plain(name)]
        self._total = sum(source.tensors[name].nbytes for name in (*checked, *self._plain))

    def _quantized_tensors(self) -> list[str]:
        weights = {f"{layer}.weight" for layer in self.layers}
        return [
            name for name, info in self._source.tensors.items() if name in weights or info.dtype in QUANTIZED_DTYPES
        ]

    def _is_plain(self, name: str) -> bool:
        """Whether a tensor is unquantized: no scale, and no other part of a quantized layer than its bias."""
        layer, _, suffix = name.rpartition(".")
        part = layer in self.layers
        scale = suffix == _LEGACY_SCALE or is_scale(suffix)
        return self._source.tensors[name].dtype in _COMPUTE_DTYPES and not scale and (not part or suffix == "bias")

    def findings(self) -> Iterator[Finding]:
        """All findings, layer by layer in the order of the file."""
        for layer, config in self.layers.items():
            yield from self._check_layer(layer, config)
        yield from self._check_header()
        yield from self._check_unlabelled()
        yield from self._check_plain()

    def _check_header(self) -> Iterator[Finding]:
        expected = {layer: _stated(config) for layer, config in header_layers(self.configs).items()}
        header = {layer: _stated(config) for layer, config in self.header.items()}
        if not header and any(_needs_header(config) for config in expected.values()):
            yield Finding(
                f"The header has no {QUANTIZATION_KEY}, so ComfyUI before {_TENSOR_JSON_SINCE} cannot read the file.",
                fatal=False,
            )
        if not header or not expected:  # ComfyUI reads files with either alone
            return
        for name, config in expected.items():  # the second name of a layer is that of releases without its format
            if name not in self.configs and name not in header and not _needs_header(config):
                header[name] = config
        for layer in sorted(expected.keys() | header.keys()):
            if expected.get(layer) != header.get(layer):
                yield Finding(
                    f"{layer}: its JSON is {header.get(layer)} in the header and {expected.get(layer)} in the {CONFIG_KEY} tensor."
                )

    def _check_layer(self, layer: str, config: Mapping[str, object]) -> Iterator[Finding]:
        try:
            codec = detect_layer(layer, config, self._source.tensors)
        except ValueError as error:
            yield Finding(f"{error}.")
            return
        own = StoredLayer(layer, dict(config)).relabelled  # other formats need no keys that ComfyUI does not read
        for key in _SHAPE_KEYS:
            required = key in config or (own and key != _OPTIONAL_KEY)
            if required and config.get(key) != codec.config.get(key):
                yield Finding(
                    f"{layer}: its JSON has {key}={config.get(key)}, and the shape of its scale implies {codec.config.get(key)}."
                )
        if codec.format.full_precision_matmul == "always" and not config.get("full_precision_matrix_mult"):
            yield Finding(
                f"{layer}: its JSON lacks full_precision_matrix_mult, and no NVIDIA card multiplies {codec.format.name}; "
                "lrq migrate adds it."
            )
        experts = count_experts(layer, config, self._source.tensors)
        shape = codec.original_shape(self._source.tensors[f"{layer}.weight"].shape, config)[-2:]
        if reason := codec.admits(shape):
            yield Finding(f"{layer}: {reason}.")
        optional = {} if experts else codec.optional(shape)  # ComfyUI does not read those of a bank
        mismatched = [Finding(text) for text in _check_optional(self._source, layer, optional)]
        yield from mismatched or self._check_values(layer, codec, shape, [*codec.specs(shape), *optional], experts)

    def _check_values(
        self, layer: str, codec: Codec, shape: tuple[int, ...], suffixes: Iterable[str], experts: int | None
    ) -> Iterator[Finding]:
        names = {suffix: f"{layer}.{suffix}" for suffix in suffixes if suffix != "weight"}
        scales = {suffix: self._source.read(name) for suffix, name in names.items() if name in self._source.tensors}
        weight = self._read(f"{layer}.weight") if self._values else torch.empty(experts or 0, 0, dtype=torch.uint8)
        if not experts:
            yield from check_layer_values(layer, codec, shape, weight, scales, self._computed_in, self._check)
        for expert in range(experts or 0):
            where, parts = f"{layer}, expert {expert}", expert_parts(scales, expert)
            yield from check_layer_values(where, codec, shape, weight[expert], parts, self._computed_in, self._check)

    def _check_unlabelled(self) -> Iterator[Finding]:
        """Quantized tensors of layers without JSON; those of older formats are valid."""
        foreign = {layer: kind for layer, kind in find_kinds(self._source).items() if kind.foreign}
        for kind, count in sorted(Counter(foreign.values()).items()):
            yield Finding(f"Layers in {kind.name}: {count}. {kind.support}.")
        unscaled: Counter[str] = Counter()
        legacy: list[str] = []
        for name, info in self._source.tensors.items():
            layer, _, suffix = name.rpartition(".")
            if layer in foreign or layer in self.configs or layer in self.header or suffix == LEGACY_MARKER:
                continue
            if suffix == _LEGACY_SCALE:
                legacy.append(layer)
                yield from self._check_legacy(layer)
            elif is_scale(suffix):
                yield self._check_scale(layer, suffix)
            elif info.dtype in UNSCALED_DTYPES:
                scaled = not {f"{layer}.{_LEGACY_SCALE}", f"{layer}.weight_scale"}.isdisjoint(self._source.tensors)
                unscaled[DTYPE_NAMES[info.dtype]] += not scaled
                yield from self._check_fp8(name, scaled)
            elif suffix == "weight" and info.dtype in QUANTIZED_DTYPES:
                yield Finding(
                    f"{layer}: has quantized values ({info.dtype}) and no {CONFIG_KEY} tensor, so ComfyUI would use them as weights."
                )
        if legacy:
            yield Finding(
                f"Layers in scaled FP8 of older tools ({LEGACY_MARKER}), which ComfyUI loads: {len(legacy)}; "
                "lrq migrate writes them in the current format.",
                fatal=False,
            )
        for dtype, count in (+unscaled).items():
            yield Finding(
                f"Tensors in {dtype} without a scale, which ComfyUI loads as plain weights: {count}; "
                "lrq quantize --requantize gives layers a scale.",
                fatal=False,
            )

    def _check_scale(self, layer: str, suffix: str) -> Finding:
        """A scale of a layer without JSON. Migrate refuses one that an unquantized weight may have lost."""
        weight = self._source.tensors.get(f"{layer}.weight")
        quantized = weight is None or weight.dtype in QUANTIZED_DTYPES
        lost = not quantized and orphan_problem(self._source, StoredLayer(layer, {}, {suffix: f"{layer}.{suffix}"}))
        fix = "make the file again from its full-precision original" if lost else "run lrq migrate"
        return Finding(f"{layer}: has a {suffix} and no {CONFIG_KEY} tensor, so ComfyUI ignores it; {fix}.")

    def _check_plain(self) -> Iterator[Finding]:
        """NaN and Inf among the unquantized tensors of a quantized file; some models have masks of -Inf."""
        names = self._plain if self._values else ()
        found = [name for name in names if not is_finite(self._read(name), self._check)]
        if found:
            yield Finding(
                f"Unquantized tensors with NaN or Inf, such as {found[0]}: {len(found)}; check them in the original.",
                fatal=False,
            )

    def _check_fp8(self, name: str, scaled: bool) -> Iterator[Finding]:
        """The values of an FP8 tensor without JSON; ``scaled``: it has a scale."""
        if not self._values:
            return
        expected = not scaled and bool(self.layers or self._markers)
        yield from check_fp8_values(name, self._read(name), scaled=scaled, scale_expected=expected, check=self._check)

    def _check_legacy(self, layer: str) -> Iterator[Finding]:
        """A layer of scaled FP8 of older tools."""
        marked = any(layer.startswith(prefix) for prefix in self._markers)
        weight, scale = self._source.tensors.get(f"{layer}.weight"), f"{layer}.{_LEGACY_SCALE}"
        fix = "lrq migrate writes the layer in the current format"
        if weight is None or weight.dtype not in UNSCALED_DTYPES:
            yield Finding(f"{layer}: has a {_LEGACY_SCALE} and no FP8 weight; download the file again.")
        elif not marked or QUANTIZATION_KEY in self._source.metadata:
            why = f"a {QUANTIZATION_KEY} in its header" if marked else f"no {LEGACY_MARKER} tensor"
            yield Finding(f"{layer}: ComfyUI ignores its {_LEGACY_SCALE} because the file has {why}; {fix}.")
        elif weight.dtype is not torch.float8_e4m3fn:
            yield Finding(
                f"{layer}: ComfyUI converts its {DTYPE_NAMES[weight.dtype]} values to E4M3, which clips them; {fix}."
            )
        elif math.prod((info := self._source.tensors[scale]).shape) != 1 or info.dtype not in _SCALE_DTYPES:
            yield Finding(
                f"{layer}: its {_LEGACY_SCALE} is {info.dtype} {info.shape}, and ComfyUI needs one number; {fix}."
            )
        elif not (torch.isfinite(value := self._source.read(scale).float()) & (value > 0)).all():
            yield Finding(
                f"{layer}: {_LEGACY_SCALE} has values that are not finite and positive; download the file again."
            )

    def _read(self, name: str) -> torch.Tensor:
        """A tensor that counts in the progress."""
        if self._check:
            self._check()
        tensor = self._source.read(name)
        self._done += self._source.tensors[name].nbytes
        if self._progress:
            self._progress(self._done, self._total)
        return tensor


def _check_optional(source: Source, layer: str, optional: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Optional tensors of another dtype or number of elements; :func:`detect_layer` checks the others."""
    for suffix, spec in optional.items():
        info = source.tensors.get(f"{layer}.{suffix}")
        if info is None:
            continue
        readable = info.dtype in (*_SCALE_DTYPES, *spec.views)
        if not readable or math.prod(info.shape) != math.prod(spec.shape):
            yield f"{layer}: {suffix} is {info.dtype} {info.shape}, and must be {spec.dtype} {spec.shape}."


def _stated(config: Mapping[str, object]) -> dict[str, object]:
    """A layer's JSON without the key that no loader reads."""
    return {key: value for key, value in config.items() if key != _OPTIONAL_KEY}


def _needs_header(config: Mapping[str, object]) -> bool:
    """Whether releases of ComfyUI that read the format look for it in the header only."""
    format = READABLE.get(str(config.get("format")))
    since = format and format.stock_since
    return since is not None and release_number(since) < release_number(_TENSOR_JSON_SINCE)


def _compute_dtype(source: Source) -> torch.dtype:
    """The dtype in which ComfyUI computes the model: that of most of its unquantized numbers; bfloat16 without any."""
    sizes: Counter[torch.dtype] = Counter()
    for name, info in source.tensors.items():
        if info.dtype in _COMPUTE_DTYPES and "scale" not in name.rpartition(".")[2]:
            sizes[info.dtype] += math.prod(info.shape)
    return sizes.most_common(1)[0][0] if sizes else torch.bfloat16
