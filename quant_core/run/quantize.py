"""The one loop: tensors in, quantized tensors out, events on the way. Nodes and command line both run it."""

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from ... import kernels
from ..calibration import Calibration, Inputs, input_scale
from ..cancellation import CancelCheck, wait_for
from ..errors import (
    CalibrationError,
    NonFiniteWeightError,
    NothingToQuantizeError,
    OutOfMemoryError,
    OutputExistsError,
    QuantizationError,
    SourceError,
)
from ..events import LayerFinished, LayerKept, LayerStarted, Listener, PlannedLayer, RunFinished, RunStarted
from ..formats.weight import config_bytes
from ..layer import quantize_weight
from ..output import (
    PROVENANCE_KEY,
    QUANTIZATION_KEY,
    SafetensorsWriter,
    final_path,
    header_bytes,
    keep_apart,
    loading_note,
    provenance,
    quantization_metadata,
    remove_leftovers,
)
from ..output.metadata import CONFIG_SUFFIX
from ..output.staging import Staging, tensor_checksum
from ..recipes import Plan, Recipe
from ..recipes.presets import NONE
from ..sources import SafetensorsFile, Source, TensorInfo, TensorSource, open_source
from ..sources.source import CPU, fingerprint
from ..version import VERSION
from .allocate import measure_plan
from .report import Report

__all__ = ["quantize_file", "quantize_tensors", "QuantizedTensors", "output_name", "usable_device"]

log = logging.getLogger(__name__)

DEFAULT_RECIPE = Recipe()
NON_FINITE = "holds NaN or Inf, so it stays in full precision"
CORRECTED = "bias of a quantized layer, corrected for its mean error"


class Sink(Protocol):
    """Where tensors go.

    Attributes:
        notes: events and JSON of layers that a run before has finished.
        lasting: whether the next run may go on with what this one notes.
    """

    lasting: bool
    notes: Sequence[tuple[list, dict | None]]

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Take one tensor; returns its size in bytes."""

    def note(self, value: dict) -> None:
        """Take what is to be known of the tensors since the last note, as JSON."""


class _DictSink(dict):
    notes, lasting = (), False

    def add(self, name: str, tensor: torch.Tensor) -> int:
        self[name] = tensor.cpu()
        return tensor.nbytes

    def note(self, value: dict) -> None:
        """A state dict has no next run."""


@dataclass(frozen=True)
class QuantizedTensors:
    """A quantized state dict, the header pairs that belong to it, and the report."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    report: Report


def _read_ahead(
    source: Source, places: list[tuple[str, torch.device]], check: CancelCheck
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read each tensor to its device, one ahead while the caller works on the one before."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="learned-rounding-read")
    try:
        ahead = None
        for index, (name, device) in enumerate(places):
            tensor = wait_for(ahead or pool.submit(source.read, name, device), check)
            ahead = pool.submit(source.read, *places[index + 1]) if index + 1 < len(places) else None
            yield name, tensor
            del tensor
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a read under way ends when the source is closed


class _WriteBehind:
    """A sink whose tensors are written by a thread of its own, one at a time; a context that waits for the last."""

    def __init__(self, sink: Sink, check: CancelCheck):
        self._sink, self._check = sink, check
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="learned-rounding-write")
        self._staging = Staging()
        self._pending: Future | None = None

    def add(self, tensors: Mapping[str, torch.Tensor], note: dict, given: Mapping[str, torch.Tensor]) -> None:
        """Take the tensors of one layer, and what is to be known of it, once those of the layer before are written.

        ``given``: tensors of the source whose checksums belong to that.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, tensors, note, given)

    def _write(self, tensors: Mapping[str, torch.Tensor], note: dict, given: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._sink.add(name, tensor)
        self._sink.note(note | {"sums": _checksums(given, self._staging)})

    def wait(self) -> None:
        """Wait until everything taken is written."""
        if self._pending is not None:
            wait_for(self._pending, self._check)

    def __enter__(self) -> "_WriteBehind":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(
                wait=kind is None, cancel_futures=True
            )  # a write that hangs ends when it can: nobody waits for it


_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "ALLOC_FAILED",
)  # in errors that have no class of their own


@contextlib.contextmanager
def _enough_memory(otherwise: str):
    """Memory that runs out inside is an :class:`OutOfMemoryError` that begins with ``otherwise``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            sign in str(error) for sign in _NO_MEMORY
        ):
            raise
        raise OutOfMemoryError(
            f"{otherwise}; close other programs and models, or choose another device or a lighter rounding."
        ) from error


class _Clock:
    """Seconds since the start, and how long the remaining bytes will take at the pace so far."""

    def __init__(self, total: int):
        self._start = time.perf_counter()
        self._total, self._done = total, 0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def skip(self, count: int) -> None:
        """Bytes that cost no time say nothing of the pace."""
        self._total -= count

    def advance(self, count: int) -> float:
        self._done += count
        return self.elapsed * (self._total - self._done) / self._done if self._done else 0.0


def _report(source: Source, plan: Plan, recipe: Recipe, calibration: Calibration | None, **more) -> Report:
    preset = plan.preset.name if plan.preset else NONE
    rounding = recipe.resolve(calibration is not None).rounding
    return Report(
        source.name,
        recipe.format.name,
        recipe.format.granularity or "",
        rounding,
        preset,
        choice=plan.choice,
        recognised=plan.explanation,
        **more,
    )


def _run(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    calibration: Calibration | None,
    sink: Sink,
    device: torch.device,
    emit: Listener,
    check: CancelCheck,
) -> tuple[Report, dict[str, dict[str, object]]]:
    """Carry every tensor of ``plan`` from ``source`` to ``sink``; returns the report and {layer: JSON}."""
    total = sum(1 for _ in plan.names("quantize"))
    bytes_in = sum(info.nbytes for info in source.tensors.values())
    report = _report(source, plan, recipe, calibration, bytes_in=bytes_in, device=str(device))
    configs: dict[str, dict[str, object]] = {}
    biases = _biases(source, plan, recipe, calibration)

    def tell(event: LayerFinished | LayerKept) -> None:
        (report.layers if isinstance(event, LayerFinished) else report.kept).append(event)
        emit(event)

    def kept(name: str, reason: str, **more) -> LayerKept:
        clock.advance(source.tensors[name].nbytes)
        return LayerKept(name, source.tensors[name].shape, reason, **more)

    summed = sink.lasting and not _paths(source)

    def put(
        tensors: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], *events: LayerFinished | LayerKept
    ) -> None:
        report.bytes_out += sum(tensor.nbytes for tensor in tensors.values())
        layer = events[0].name.removesuffix(".weight")
        writing.add(tensors, _note(events, configs.get(layer)), given if summed else {})
        for event in events:
            tell(event)

    _check_names(source, plan, recipe)
    others = len(source.tensors) - total
    layers = tuple(_planned(source, plan))
    emit(
        RunStarted(
            source.name,
            report.format,
            report.granularity,
            report.preset,
            total,
            others,
            bytes_in,
            layers,
            report.rounding,
        )
    )
    clock = _Clock(bytes_in)
    for name in plan.names("remove"):
        tell(kept(name, plan.decisions[name].reason, removed=True))

    def quantize(name: str, tensor: torch.Tensor, index: int) -> None:
        info = source.tensors[name]
        emit(LayerStarted(index, total, name, info.shape))
        began = clock.elapsed
        own = recipe.of(plan.decisions[name])
        layer = name.removesuffix(".weight")
        known = (calibration and calibration.inputs(layer)) or Inputs()
        bias_name = biases.get(name)
        bias = source.read(bias_name) if bias_name else None
        beside = {bias_name: bias} if bias_name else {}
        given = {name: tensor, **beside}
        try:
            with _enough_memory(f"{device} has too little memory for layer {layer}, {'×'.join(map(str, info.shape))}"):
                quantized = quantize_weight(
                    tensor,
                    **_layer_options(own, known, calibration),
                    gram=known.gram,
                    holdout_gram=known.holdout_gram,
                    mean_input=known.mean,
                    input_scale=_input_scale(own, known),
                    bias=bias,
                    check=check,
                )
        except NonFiniteWeightError:
            put(
                given,
                given,
                kept(name, NON_FINITE, planned=False),
                *(kept(also, plan.decisions[also].reason) for also in beside),
            )
            return
        except CalibrationError as error:
            raise CalibrationError(f"{layer}: {error}") from error
        writing.wait()  # so that the layer's time holds what the disk takes
        tensors = quantized.tensors(layer)
        configs[layer] = quantized.config
        rounded = quantized.rounded
        eta = clock.advance(info.nbytes)
        finished = LayerFinished(
            index,
            total,
            name,
            info.shape,
            quantized.format.name,
            quantized.granularity,
            quantized.weight_error,
            clock.elapsed - began,
            info.nbytes,
            sum(tensor.nbytes for tensor in tensors.values()),
            clock.elapsed,
            eta,
            rounded.winner,
            rounded.gain,
            rounded.output_error,
            rounded.note,
            quantized.encoding.rotation and quantized.encoding.rotation.size,
            tuple(torch.stack(quantized.scale.aminmax()).tolist()),
        )
        corrected = quantized.bias is not bias
        put(
            tensors,
            given,
            finished,
            *(kept(also, CORRECTED if corrected else plan.decisions[also].reason) for also in beside),
        )

    for events, config in sink.notes:  # what a run before has made of a layer
        if config:
            configs[events[0].name.removesuffix(".weight")] = config
        for event in events:
            clock.skip(source.tensors[event.name].nbytes)
            if isinstance(event, LayerFinished):
                emit(LayerStarted(event.index, total, event.name, event.shape))
            tell(event)
    report.taken_up = len(report.layers)
    if sink.notes:
        log.info(
            "%s: goes on with %d of %d layers, which a run that was stopped has finished.",
            source.name,
            report.taken_up,
            total,
        )
    done = {event.name for event in (*report.layers, *report.kept)}
    index = sum(1 for name in plan.names("quantize") if name in done)
    read_with_weight = set(biases.values())
    places = [(name, _place(plan, name, device)) for name in plan.output_names() if name not in read_with_weight | done]
    with _WriteBehind(sink, check) as writing:
        for name, tensor in _read_ahead(source, places, check):
            check()
            if plan.decisions[name].action == "keep":
                put({name: tensor}, {name: tensor}, kept(name, plan.decisions[name].reason))
            else:
                quantize(name, tensor, index)
                index += 1
            del tensor  # before the reader takes the next one but one
    if not configs:
        raise NothingToQuantizeError(
            f"{source.name}: every layer that was to be quantized {NON_FINITE}; the model is damaged."
        )
    report.seconds = clock.elapsed
    return report, configs


_EVENTS = {kind.__name__: kind for kind in (LayerFinished, LayerKept)}


def _paths(source: Source | Calibration | None) -> tuple[Path, ...]:
    """The files that a source or a calibration is read from; none of one in memory."""
    return getattr(source, "paths", ())


def _place(plan: Plan, name: str, device: torch.device) -> torch.device:
    """Where a tensor of the source is read to."""
    return device if plan.decisions[name].action == "quantize" else CPU


def _checksums(tensors: Mapping[str, torch.Tensor], staging: Staging) -> dict[str, int]:
    return {name: tensor_checksum(tensor, staging) for name, tensor in tensors.items()}


def _told(
    source: Source, plan: Plan, device: torch.device, staging: Staging, note: dict
) -> tuple[list[LayerFinished | LayerKept], dict | None]:
    """The events and the JSON of a layer from a note; raises whatever a note that is none of this source's leads to.

    Whether a source in memory is that of the dead run, no file's state tells: its tensors are read again.
    """
    events = [
        _EVENTS[kind](**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
        for kind, fields in note["events"]
    ]
    if not all(source.tensors[event.name].shape == event.shape for event in events) or not isinstance(
        note["config"] or {}, dict
    ):
        raise ValueError("a note of another source")
    given = (
        {}
        if _paths(source)
        else {event.name: source.read(event.name, _place(plan, event.name, device)) for event in events}
    )
    if note["sums"] != _checksums(given, staging):
        raise ValueError("a note of other weights")
    return events, note["config"]


def _note(events: Iterable[LayerFinished | LayerKept], config: dict | None) -> dict:
    """What the next run must know of a layer to tell of it as this one did."""
    return {"events": [[type(event).__name__, vars(event)] for event in events], "config": config}


def _planned(source: Source, plan: Plan) -> Iterator[PlannedLayer]:
    for name in plan.output_names():
        shape, decision = source.tensors[name].shape, plan.decisions[name]
        if name.endswith(".weight") and len(shape) > 1:
            yield PlannedLayer(name, shape, decision.reason if decision.action == "keep" else "")


def _check_names(source: Source, plan: Plan, recipe: Recipe) -> None:
    """Refuse a source that has, beside a plain weight, what quantizing it makes: the output would hold one name twice."""
    kept = set(plan.names("keep"))
    for name in plan.names("quantize"):
        layer = name.removesuffix(".weight")
        suffixes = [
            *recipe.of(plan.decisions[name]).encoding.specs(source.tensors[name].shape),
            "input_scale",
            CONFIG_SUFFIX[1:],
        ]
        for suffix in suffixes:
            if f"{layer}.{suffix}" in kept:
                raise SourceError(
                    f"{source.name}: {layer}.{suffix} stands beside a weight in full precision, which has no use for it; the file is damaged, or half "
                    "of it was quantized: give the original."
                )


def _biases(source: Source, plan: Plan, recipe: Recipe, calibration: Calibration | None) -> dict[str, str]:
    """Weight → bias of the layers whose bias may be corrected; they are read and written with their weight."""
    wanted = recipe.rounding.get("bias_correction")
    if wanted == "none" or (wanted == "auto" and calibration is None):
        return {}
    pairs = ((name, name.removesuffix(".weight") + ".bias") for name in plan.names("quantize"))
    decisions = plan.decisions
    return {name: bias for name, bias in pairs if bias in decisions and decisions[bias].action == "keep"}


def _layer_options(recipe: Recipe, known: Inputs, calibration: Calibration | None) -> dict[str, object]:
    """What the recipe asks of a layer; one that the calibration does not know cannot be asked for learned rounding."""
    uncalibrated = calibration is not None and known.gram is None
    return (replace(recipe, rounding=recipe.rounding.uncalibrated()) if uncalibrated else recipe).layer_options


def _input_scale(recipe: Recipe, known: Inputs) -> float | None:
    if known.histogram is None or known.amax is None or not recipe.encoding.static_inputs:
        return None
    return input_scale(known.histogram, float(known.amax.max()))


def _metadata(
    source: Source, recipe: Recipe, configs: Mapping[str, dict[str, object]], mark: str | None
) -> dict[str, str]:
    made = {"version": VERSION, "fingerprint": mark, "recipe": recipe.to_dict()}
    return {
        **source.metadata,
        **loading_note(configs),
        QUANTIZATION_KEY: quantization_metadata(configs),
        PROVENANCE_KEY: json.dumps(made, separators=(",", ":")),
    }


def _header_bound(source: Source, plan: Plan, recipe: Recipe, calibrated: bool, metadata: Mapping[str, str]) -> int:
    """Room for the header whatever becomes of each layer: quantized, or kept after all."""
    tensors = [(name, source.tensors[name]) for name in plan.output_names()]
    for name in plan.names("quantize"):
        layer, encoding = name.removesuffix(".weight"), recipe.of(plan.decisions[name]).encoding
        specs = encoding.specs(source.tensors[name].shape)
        tensors += [(f"{layer}.{suffix}", TensorInfo(*spec)) for suffix, spec in specs.items()]
        if calibrated and encoding.static_inputs:
            tensors.append((f"{layer}.input_scale", TensorInfo(torch.float32, ())))
        tensors.append((layer + CONFIG_SUFFIX, TensorInfo(torch.uint8, (len(config_bytes(encoding.config)),))))
    return header_bytes(tensors, metadata)


def _nothing(*_) -> None:
    """Default listener and cancellation check."""


def quantize_tensors(
    tensors: Mapping[str, torch.Tensor],
    recipe: Recipe = DEFAULT_RECIPE,
    *,
    calibration: Calibration | None = None,
    metadata: Mapping[str, str] | None = None,
    device: str | torch.device | None = None,
    on_event: Listener | None = None,
    check: CancelCheck | None = None,
) -> QuantizedTensors:
    """Quantize a state dict of plain weights in memory; ``tensors`` is left untouched, results lie on the CPU.

    ``calibration``: what is known of the layers' inputs; layers that it does not know are rounded to nearest.
    ``device``: where the arithmetic runs; None for the first GPU, else the CPU. ``check`` raises to cancel.
    """
    source, sink, emit = TensorSource(tensors, metadata), _DictSink(), on_event or _nothing
    recipe.resolve(calibration is not None)
    plan, device, check = recipe.plan(source, check=check), usable_device(device), check or _nothing
    _check_calibration(source, calibration)
    with _enough_memory(f"{device} has too little memory for {source.name}"):
        if recipe.format.measured:
            plan = measure_plan(source, recipe, calibration, device=device, emit=emit, check=check)
        report, configs = _run(source, plan, recipe, calibration, sink, device, emit, check)
    emit(RunFinished(report))
    mark = _mark(source, recipe, calibration)
    return QuantizedTensors(dict(sink), _metadata(source, recipe, configs, mark), report)


def quantize_file(
    source: str | os.PathLike | Source,
    destination: str | os.PathLike,
    recipe: Recipe = DEFAULT_RECIPE,
    *,
    calibration: Calibration | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    unfinished: str | None = None,
    on_event: Listener | None = None,
    check: CancelCheck | None = None,
) -> Report:
    """Quantize a model file (see :func:`~.checkpoints.sources.open_source`), or any :class:`Source`, into a new safetensors file.

    The file appears under its final name only when it is complete and on disk. An output with the same fingerprint
    (source, recipe, calibration, version) is left as it is, and where its inputs may be newer it is made again and compared; any
    other is refused unless ``overwrite``, one that appears meanwhile too. Where a run of the same was killed, its finished layers are
    taken up, and the file comes out as if it had not been. An output that is a link is followed.
    ``calibration``: what is known of the layers' inputs; layers that it does not know are rounded to nearest.
    ``device``: where the arithmetic runs; None for the first GPU, else the CPU. ``check`` raises to cancel.
    ``unfinished``: the name that the hidden files of runs bear until they are finished, by default the output's: with the same one, a run
    goes on with a dead one's whatever name its own output gets.

    Raises:
        QuantizationError: see :mod:`.errors`; nothing is left behind then.
    """
    if isinstance(source, (str, os.PathLike)):
        with open_source(source) as opened:
            return quantize_file(
                opened,
                destination,
                recipe,
                calibration=calibration,
                device=device,
                overwrite=overwrite,
                unfinished=unfinished,
                on_event=on_event,
                check=check,
            )
    destination = final_path(destination)
    hidden = destination.with_name(unfinished or destination.name)
    emit, check, device = on_event or _nothing, check or _nothing, usable_device(device)
    origins, statistics = _paths(source), _paths(calibration)
    inputs = (*origins, *statistics)
    before = _states(inputs)
    keep_apart(destination, {"source": origins, "calibration": statistics})
    recipe.resolve(calibration is not None)
    plan = recipe.plan(source, check=check)
    _check_calibration(source, calibration)
    mark = _mark(source, recipe, calibration)
    if destination.exists():
        standing = _made_by(destination, mark)
        if standing and origins and not _newer(inputs, destination):  # of weights in memory nothing but comparing tells
            remove_leftovers(hidden)
            return _report(source, plan, recipe, calibration, output=str(destination), already_done=True)
        if not standing and not overwrite:
            raise OutputExistsError(
                f"{destination} exists and was made from something else; choose another output or overwrite it."
            )
    with _enough_memory(f"{device} has too little memory for {source.name}"):
        if recipe.format.measured:
            plan = measure_plan(source, recipe, calibration, device=device, emit=emit, check=check)
        planned = {
            name.removesuffix(".weight"): recipe.of(plan.decisions[name]).encoding.config
            for name in plan.names("quantize")
        }
        reserve = _header_bound(source, plan, recipe, calibration is not None, _metadata(source, recipe, planned, mark))
        run = mark and json.dumps([mark, planned, list(before.values()), _computes_on(device)])
        parse = functools.partial(_told, source, plan, device, Staging())
        with SafetensorsWriter(
            destination, reserve, run, overwrite=overwrite, unfinished=unfinished, parse=parse, check=check
        ) as writer:
            report, configs = _run(source, plan, recipe, calibration, writer, device, emit, check)
            _check_unchanged(source, before)
            report.bytes_out = writer.finish(_metadata(source, recipe, configs, mark))
    report.already_done = writer.stood
    remove_leftovers(hidden)
    report.output = str(destination)
    emit(RunFinished(report))
    return report


def _states(paths: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """What changes with a file's contents; of those that still lie there."""
    states = {}
    for path in paths:
        with contextlib.suppress(OSError):
            found = path.stat()
            states[path] = found.st_ino, found.st_size, found.st_mtime_ns
    return states


def _check_unchanged(source: Source, before: Mapping[Path, tuple[int, ...]]) -> None:
    """A file that was replaced is still read as it was; one that was written to is a mixture. Those of the calibration too."""
    for path, state in _states(before).items():
        if state[0] == before[path][0] and state != before[path]:
            raise SourceError(f"{source.name}: {path} was changed while it was read; run again.")


def _computes_on(device: torch.device) -> list[str]:
    """What may round ties otherwise: the arithmetic of one run is that of one machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [name, torch.__version__, kernels.backend()]


def _check_calibration(source: Source, calibration: Calibration | None) -> None:
    if calibration is not None:
        weights = ((name, info.shape) for name, info in source.tensors.items() if name.endswith(".weight"))
        calibration.check({name.removesuffix(".weight"): shape for name, shape in weights})


def _mark(source: Source, recipe: Recipe, calibration: Calibration | None) -> str | None:
    """The fingerprint of a run; None where it has none, and so never counts as done already."""
    if calibration is None:
        return fingerprint(source, VERSION, recipe.to_json())
    return calibration.mark and fingerprint(source, VERSION, recipe.to_json(), calibration.mark)


def _newer(inputs: Iterable[Path], output: Path) -> bool:
    """Whether an input may have changed since: written, or another file moved to its place, whatever time that one bears."""
    made = output.stat().st_mtime_ns
    return any(max(found.st_mtime_ns, found.st_ctime_ns) > made for found in (path.stat() for path in inputs))


def _made_by(path: Path, mark: str | None) -> bool:
    """Whether the file at ``path`` bears the mark of this run, which is made from samples of the source."""
    if mark is None:
        return False
    try:
        with SafetensorsFile(path) as made:
            return provenance(made).get("fingerprint") == mark
    except QuantizationError:
        return False


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None for the first GPU, else the CPU. Raises :class:`QuantizationError` for one that does not work."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise QuantizationError(f"The device '{device}' cannot be used here: {str(error).splitlines()[0]}") from None
    return chosen


def output_name(source: str | os.PathLike, label: str) -> Path:
    """The file beside the source that is written when no output is named; ``label``: what is made of it, in a word."""
    source = Path(source)
    if source.is_dir():
        source = source.absolute()
        stem = source.name
    else:
        stem = source.name.removesuffix(".index.json").rpartition(".")[0] or source.name
    return source.parent / f"{stem}_{label}.safetensors"
