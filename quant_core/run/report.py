"""Report of a run, layer by layer: data, JSON, a text table and Markdown."""

import dataclasses
import json
import math
import os
import secrets
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..display import human_bytes, markdown_table, size_change, three_digits
from ..events import LayerFinished, LayerKept
from ..file_system import long_path, remove_file, replace_file
from ..output.durable import flush_to_disk
from ..recipes import Plan, Recipe
from ..recipes.plan import Choice
from ..recipes.presets import NONE
from .blocks import WalkSummary

__all__ = ["PartSummary", "Report"]


_MOST_REASONS = 3  # in the summary


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class PartSummary:
    """What a report states for each text encoder of a CLIP by itself: ``choice`` and ``sequential`` of its :class:`Report`."""

    choice: Choice | None = None
    sequential: WalkSummary | None = None


@dataclass
class Report:
    """The result of one run.

    Attributes:
        source: name of the source.
        format, granularity, rounding, preset: of the recipe, with "auto" resolved.
        layers: one :class:`LayerFinished` per quantized layer, in the order of the source.
        kept: one :class:`LayerKept` per copied or removed tensor.
        bytes_in, bytes_out: size of the source tensors, and of the output file or, without one, of its tensors.
        seconds: wall-clock time of the run in s.
        device: device of the arithmetic.
        output: path of the file, None if tensors were returned.
        already_done: the output already existed with the same content.
        taken_up: number of layers that were resumed from a killed run.
        choice: curve of the bit allocation and the chosen point, for mixed precision.
        sequential: errors of the model, of a run with a model.
        parts: name → summary of each text encoder of a CLIP with several; empty for others.
        recognised: recognised model and preset.
        warnings: choices that match no layer, and other files that the model needs.
    """

    source: str
    format: str
    granularity: str
    rounding: str
    preset: str
    layers: list[LayerFinished] = field(default_factory=list)
    kept: list[LayerKept] = field(default_factory=list)
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    device: str = "cpu"
    output: str | None = None
    already_done: bool = False
    taken_up: int = 0
    choice: Choice | None = None
    sequential: WalkSummary | None = None
    parts: dict[str, PartSummary] = field(default_factory=dict)
    recognised: str = ""
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def for_plan(cls, source: str, plan: Plan, recipe: Recipe, *, calibrated: bool) -> "Report":
        """The report of a run over ``plan`` before its first layer; ``source``: name of the source."""
        return cls(
            source=source,
            format=recipe.format.name,
            granularity=recipe.format.granularity or "",
            rounding=recipe.resolve(calibrated).rounding,
            preset=plan.preset.name if plan.preset else NONE,
            choice=plan.choice,
            recognised=plan.explanation,
            warnings=list(plan.warnings),
        )

    @property
    def median_error(self) -> float:
        """Median of ‖Ŵ − W‖/‖W‖ over the layers; NaN without layers."""
        return _median([layer.weight_error for layer in self.layers])

    @property
    def median_output_error(self) -> float:
        """Median output error of the calibrated layers; NaN without any."""
        return _median([layer.output_error for layer in self.layers if layer.output_error is not None])

    @property
    def median_gain(self) -> float:
        """Median of the objective relative to RTN, over the layers where solvers were compared; NaN without any."""
        return _median([layer.gain for layer in self.layers if layer.gain is not None])

    @property
    def solvers(self) -> dict[str, int]:
        """Solver → number of layers for which it was the best, in falling order."""
        return dict(Counter(layer.solver for layer in self.layers).most_common())

    @property
    def worst(self) -> list[LayerFinished]:
        """Layers in order of falling weight error."""
        return sorted(self.layers, key=lambda layer: -layer.weight_error)

    @property
    def unplanned(self) -> list[LayerKept]:
        """Layers that were to be quantized but cannot be, with the reason."""
        return [kept for kept in self.kept if not kept.planned]

    def summarize(self) -> dict[str, Any]:
        """The summary in JSON documents, whose keys are stable: plain values, None for what was not measured."""
        names = ("output", "already_done", "format", "granularity", "rounding", "preset")
        measured = {name: getattr(self, name) for name in ("bytes_in", "bytes_out", "seconds", "device")}
        return {
            **{name: getattr(self, name) for name in names},
            **(dict.fromkeys(measured) if self.already_done else measured),
            "layers": len(self.layers),
            "resumed": self.taken_up,
            "unquantized": len(self.kept),
            "median_error": _finite(self.median_error),
            "median_output_error": _finite(self.median_output_error),
            "warnings": self.warnings,
        }

    def to_dict(self) -> dict:
        """The fields and summary statistics as plain values; None for NaN."""
        summary = {name: getattr(self, name) for name in ("median_error", "median_output_error", "median_gain")}
        finite = {name: None if math.isnan(value) else value for name, value in summary.items()}
        return {**dataclasses.asdict(self), **finite, "solvers": self.solvers}

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: Path) -> None:
        """Write the JSON; an existing file is replaced atomically. Raises OSError."""
        text = self.to_json() + "\n"
        if path.exists() and not path.is_file():  # a terminal or a pipe
            path.write_text(text, encoding="utf-8")
            return
        target = long_path(Path(os.path.realpath(path)))
        partial = target.with_name(f".{secrets.token_hex(4)}.partial")
        try:
            with open(partial, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                flush_to_disk(file.fileno())
            replace_file(partial, target)
        finally:
            remove_file(partial)

    def table(self, worst: int = 5) -> str:
        """Text table: totals, the layers with the largest error, and layers that cannot be quantized."""
        if self.already_done:
            return self._already
        rows = self._rows()
        rows += [
            (f"worst {place}", f"{three_digits(layer.weight_error)}  {layer.name} {'×'.join(map(str, layer.shape))}")
            for place, layer in enumerate(self.worst[:worst], 1)
        ]
        rows += self._note_rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)

    def markdown(self, worst: int = 20) -> str:
        """The report in Markdown, with a second table of the layers with the largest error."""
        if self.already_done:
            return self._already
        shapes = {layer.name: "×".join(map(str, layer.shape)) for layer in self.layers}
        layers = [
            (
                layer.name,
                shapes[layer.name],
                f"{layer.format} per {layer.granularity}",
                layer.solver,
                three_digits(layer.weight_error),
                "–" if layer.output_error is None else three_digits(layer.output_error),
            )
            for layer in self.worst[:worst]
        ]
        summary = markdown_table(["", self.source], self._rows() + self._note_rows(), texts=2)
        by_layer = markdown_table(["worst layers", "shape", "format", "solver", "weight error", "output error"], layers)
        return f"{summary}\n\n{by_layer}\n" if layers else f"{summary}\n"

    @property
    def _already(self) -> str:
        return f"Already done: {self.output or 'the output'} was made from the same source and recipe."

    def _rows(self) -> list[tuple[str, str]]:
        """(label, text) of the totals."""
        reasons = Counter(kept.reason for kept in self.kept).most_common(_MOST_REASONS)
        kept = ", ".join(f"{count} {reason}" for reason, count in reasons)
        resumed = f", {self.taken_up} of them resumed" if self.taken_up else ""
        change = size_change(self.bytes_in, self.bytes_out)
        rows = [
            *([("model", self.recognised)] if self.recognised else []),
            *(("warning", text) for text in self.warnings),
            ("format", f"{self._format}, rounding {self.rounding}"),
            *self._part_rows(),
            ("layers quantized", f"{len(self.layers)}{resumed}"),
            ("unquantized", f"{len(self.kept)}" + (f" ({kept})" if kept else "")),
            (
                "weight error",
                f"median {three_digits(self.median_error)}, worst {three_digits(self.worst[0].weight_error)}"
                if self.layers
                else "none",
            ),
            *self._rounding_rows(),
            ("size", f"{human_bytes(self.bytes_in)} → {human_bytes(self.bytes_out)}{f' ({change})' if change else ''}"),
            ("time", f"{three_digits(self.seconds)} s on {self.device}"),
        ]
        return rows + ([("file", self.output)] if self.output else [])

    def _part_rows(self) -> list[tuple[str, str]]:
        rows = []
        for name, part in (self.parts or {"": self}).items():
            where = f", {name}" if name else ""
            if part.choice:
                rows += [(f"mixed precision{where}", str(part.choice)), (f"size and error{where}", part.choice.outline)]
            if part.sequential:
                rows.append((f"model output{where}", str(part.sequential)))
        return rows

    def _note_rows(self) -> list[tuple[str, str]]:
        notes = Counter(layer.note for layer in self.layers if layer.note)
        rows = [("note", f"{note} ({count} layers)") for note, count in notes.items()]
        return rows + [("NOT QUANTIZED", f"{kept.name}: {kept.reason}") for kept in self.unplanned]

    @property
    def _format(self) -> str:
        rotated = {layer.name: f", ConvRot {layer.convrot}" if layer.convrot else "" for layer in self.layers}
        counts = Counter(f"{layer.format} per {layer.granularity}{rotated[layer.name]}" for layer in self.layers)
        if len(counts) < 2:
            return next(iter(counts), f"{self.format} per {self.granularity}")
        return "; ".join(f"{name}: {count} layers" for name, count in counts.most_common())

    def _rounding_rows(self) -> list[tuple[str, str]]:
        rows = []
        if not math.isnan(self.median_output_error):
            errors = [layer.output_error for layer in self.layers if layer.output_error is not None]
            rows.append(
                ("output error", f"median {three_digits(self.median_output_error)}, worst {three_digits(max(errors))}")
            )
        if not math.isnan(self.median_gain):
            best = ", ".join(f"{solver} {count}" for solver, count in self.solvers.items())
            rows.append(("relative to RTN", f"median {three_digits(self.median_gain)}×; best solver: {best}"))
        return rows
