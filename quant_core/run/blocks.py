"""Layers of a run that are rounded block by block with a running model, and those of its blocks that a killed run finished."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from ..calibration import Calibration, LayerStatistics
from ..cancellation import CancelCheck
from ..display import shorten
from ..errors import RecipeError
from ..events import LayerFinished, Listener
from ..formats import QuantizedBank, QuantizedWeight, detect_layer
from ..layer import Layer
from ..output.metadata import describe_model_run
from ..recipes import Plan, Recipe
from ..sequential import ModelWalk, PendingLayer, ReplayedModel
from ..sources import Source
from .resume import RunJournal

__all__ = [
    "BlockQueue",
    "FinishedLayers",
    "StartedLayer",
    "WalkSummary",
    "base_name",
    "open_blocks",
    "require_model",
    "walk_fingerprint",
]

_REASON = 300  # characters in the metadata of a file
NEEDS_MODEL = (
    "Rounding '{}' runs the model, which only ComfyUI can: use the node Learned Round Quantize with the MODEL and a calibration "
    "whose replay_calls is not 0."
)
KEPT = {
    "calibrated": "in its block, sequential rounding is not better",
    "sequential": "sequential",
    "reconstructed": "sequential and reconstructed",
}  # note of the layers of a block by the rounding that is kept


@dataclass(frozen=True)
class StartedLayer:
    """A layer that is being quantized.

    Attributes:
        name: name of its weight.
        tensors: source tensors of the layer: the weight, and a bias that may be corrected.
        bias_name: name of that bias, None without.
        began: time of the run in s; None where other layers are quantized at the same time.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    bias_name: str | None
    began: float | None

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias that may be corrected."""
        return None if self.bias_name is None else self.tensors[self.bias_name]


FinishedLayers = list[tuple[StartedLayer, QuantizedWeight | QuantizedBank]]


@dataclass(frozen=True)
class WalkSummary:
    """What is recorded of a run with a model.

    Attributes:
        card: compute capability that activations are quantized for, as "9.0"; "native" for any that multiplies the format.
        calls: number of recorded calls.
        output_error: relative error of the model's output in the validation calls; None where it could not be followed.
        weights_only_error: the same with unquantized activations; None too where the card quantizes none.
        unfollowed: why layers keep their layer-wise result; empty where the model could be followed.
        blocks: rounding that is kept → number of blocks.
    """

    card: str
    calls: int
    output_error: float | None = None
    weights_only_error: float | None = None
    unfollowed: str = ""
    blocks: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain values, without what is not known."""
        values = {**vars(self), "unfollowed": shorten(self.unfollowed, _REASON)}
        return {name: value for name, value in values.items() if value not in (None, "", {})}

    def __str__(self) -> str:
        """For users: what :func:`describe_model_run` returns, and "; blocks: 40 sequential, 17 calibrated"."""
        kept = ", ".join(f"{count} {rounding}" for rounding, count in self.blocks.items())
        return "; ".join(filter(None, (describe_model_run(self.to_dict()), kept and f"blocks: {kept}")))


def describe_card(capability: tuple[int, int] | None) -> str:
    """``card`` of :class:`WalkSummary`."""
    return "native" if capability is None else ".".join(map(str, capability))


def walk_fingerprint(recipe: Recipe, calls: str | None, device: torch.device) -> str | None:
    """What the result of a run depends on if it runs the model on a device; None for roundings that do not.

    ``calls``: fingerprint of the recorded calls.
    """
    if not recipe.rounding.runs_model:
        return None
    return f"{calls} {describe_card(recipe.find_capability(device))}"


def require_model(recipe: Recipe, model: ReplayedModel | None = None) -> None:
    """Raise RecipeError where the rounding runs the model and there is none."""
    if recipe.rounding.runs_model and model is None:
        raise RecipeError(NEEDS_MODEL.format(recipe.rounding.rounding))


@contextlib.contextmanager
def open_blocks(
    model: ReplayedModel | None,
    source: Source,
    plan: Plan,
    recipe: Recipe,
    calibration: Calibration | None,
    journal: RunJournal | None,
    *,
    emit: Listener,
    check: CancelCheck,
) -> Iterator["BlockQueue | None"]:
    """The queue of a run whose rounding runs the model; None for other roundings, which need no ``model``."""
    if not recipe.rounding.runs_model:
        yield None
        return
    assert model is not None  # see :func:`require_model`
    capability = recipe.find_capability(model.device)
    codecs = [
        recipe.of(plan.decisions[name]).format.codec_for(source.tensors[name].shape[-1])
        for name in plan.names("quantize")
    ]
    with ModelWalk(
        model,
        [base_name(name) for name in plan.names("quantize")],
        rounding=recipe.rounding,
        capability=capability,
        weights_only=any(codec.quantizes_activations(capability) for codec in codecs),
        sensitivity=calibration.step_sensitivity if calibration else lambda layer: None,
        seed=recipe.seed,
        emit=emit,
        check=check,
    ) as walk:
        yield BlockQueue(walk, source, recipe, journal, WalkSummary(describe_card(capability), len(model.validation)))


class BlockQueue:
    """Hold the layers of a block until all are read, then round them together.

    Args:
        journal: of a killed run whose layers are restored, or None.
        summary: what is known before the first block.
    """

    def __init__(
        self, walk: ModelWalk, source: Source, recipe: Recipe, journal: RunJournal | None, summary: WalkSummary
    ):
        self._walk, self._source, self._recipe, self._journal = walk, source, recipe, journal
        self._summary = summary
        self._waiting = [set(block.layers) for block in walk.blocks]  # layers that are not read yet
        self._pending: dict[str, tuple[StartedLayer, PendingLayer]] = {}
        self._configs: Mapping[str, Mapping[str, object]] = {}
        self._passed = 0

    def position(self, tensor: str) -> int:
        """Place of a tensor of the source in the order of a run: layers outside of the blocks come first."""
        found = self._walk.position(base_name(tensor)) if tensor.endswith(".weight") else None
        return -1 if found is None else found

    def restore(self, done: set[str], configs: Mapping[str, Mapping[str, object]]) -> set[str]:
        """Take the layers of a killed run; returns the weights of incomplete blocks, which are read again.

        Args:
            done: names of source tensors.
            configs: layer → JSON configuration, of the quantized ones.
        """
        self._configs = dict(configs)
        for layer in configs:
            if self._walk.position(layer) is None:
                self._walk.add_outside(layer, *self._read(layer))
        again = set()
        for layers in self._waiting:
            weights = {f"{layer}.weight" for layer in layers}
            if weights <= done:
                layers.clear()
            again |= (weights & done) if layers else set()
        return again

    def add(self, started: StartedLayer, layer: Layer | None, finished: FinishedLayers) -> FinishedLayers:
        """Add a layer with its layer-wise result; returns the layers that are finished then.

        Args:
            layer: None for a bank of experts.
            finished: the layer and its result; empty where it stays unquantized.
        """
        name = base_name(started.name)
        position = self._walk.position(name)
        if position is None:
            for _, quantized in finished:
                if isinstance(quantized, QuantizedWeight):
                    self._walk.add_outside(name, quantized.codec, quantized.parts(), quantized.shape)
            return finished
        for _, quantized in finished:
            assert layer is not None and isinstance(quantized, QuantizedWeight)
            slim = replace(layer, statistics=LayerStatistics(sensitivity=layer.statistics.sensitivity))
            rounding = replace(self._recipe.rounding.layerwise(), smoothing=None)
            self._pending[name] = started, PendingLayer(slim, quantized, rounding, self._recipe.seed)
        self._waiting[position].discard(name)
        return [] if self._waiting[position] else self._round(position)

    def _round(self, position: int) -> FinishedLayers:
        self._pass_restored(position)
        self._passed = position + 1
        pending, self._pending = self._pending, {}
        compared = len(self._walk.results)
        results = self._walk.round_block({name: layer for name, (_, layer) in pending.items()})
        block = self._walk.results[-1] if len(self._walk.results) > compared else None
        notes = (KEPT[block.kept], block.note) if block else ()
        finished: FinishedLayers = []
        for name, (started, _) in pending.items():
            made = results[name]
            finished.append((started, replace(made, note="; ".join(filter(None, (made.note, *notes))))))
        return finished

    def _pass_restored(self, stop: int) -> None:
        """Let the calls go through the blocks of a killed run that come before the block ``stop``."""
        for block in self._walk.blocks[self._passed : stop]:
            quantized = [name for name in block.layers if name in self._configs]
            self._walk.pass_block({name: self._read(name) for name in quantized})
        self._passed = max(self._passed, stop)

    def finish(self, layers: Iterable[LayerFinished]) -> WalkSummary:
        """What is recorded of the run, after its last layer; ``layers``: all that are quantized."""
        self._pass_restored(len(self._walk.blocks))
        errors, summary = self._walk.model_errors(), replace(self._summary, blocks=self._count_blocks(layers))
        if errors is None:
            return replace(summary, unfollowed=self._walk.unfollowed or "")
        return replace(summary, output_error=errors.quantized, weights_only_error=errors.weights_only)

    def _count_blocks(self, layers: Iterable[LayerFinished]) -> dict[str, int]:
        """Rounding that is kept → number of blocks, from the notes of layers: those of a killed run have them too."""
        roundings = {note: rounding for rounding, note in KEPT.items()}
        kept = {
            self.position(layer.name): roundings[note]
            for layer in layers
            for note in layer.note.split("; ")
            if note in roundings
        }
        return dict(sorted(Counter(kept.values()).items()))

    def _read(self, layer: str):
        """Codec, tensors and shape of a restored layer."""
        assert self._journal is not None
        parts = self._journal.read_layer(layer)
        found = detect_layer(layer, self._configs[layer], {f"{layer}.{suffix}": part for suffix, part in parts.items()})
        return found.of_values(parts), parts, self._source.tensors[f"{layer}.weight"].shape


def base_name(weight: str) -> str:
    """Name of a layer from that of its weight."""
    return weight.removesuffix(".weight")
