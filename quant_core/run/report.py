"""What happened in a run, layer by layer: data, JSON and a table for people."""

import dataclasses
import json
import math
import os
import secrets
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..display import human_bytes, markdown_table
from ..events import LayerFinished, LayerKept
from ..output.durable import to_disk
from ..recipes.plan import Choice

__all__ = ["Report"]


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


@dataclass
class Report:
    """The outcome of one run.

    Attributes:
        layers: one :class:`LayerFinished` per quantized layer, in file order.
        kept: one :class:`LayerKept` per tensor copied or removed.
        bytes_in, bytes_out: size of the source's tensors and of the output file, or of its tensors when no file was written.
        seconds: wall-clock time of the run.
        output: path of the file, None when tensors were returned.
        already_done: the output was there, with the same fingerprint; nothing was computed, or it was and came out the same.
        taken_up: layers that a run before, which was stopped, had finished.
        choice: what formats were chosen from, where they were measured.
        recognised: what the model was taken for, and how sure that is.
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
    recognised: str = ""

    @property
    def median_error(self) -> float:
        """Median over layers of ‖Ŵ − W‖/‖W‖; NaN without layers."""
        return _median([layer.weight_error for layer in self.layers])

    @property
    def median_output_error(self) -> float:
        """Median of the output error over the layers whose inputs are known; NaN without any."""
        return _median([layer.output_error for layer in self.layers if layer.output_error is not None])

    @property
    def median_gain(self) -> float:
        """Median, over the layers where roundings were compared, of what is minimised relative to nearest; NaN without."""
        return _median([layer.gain for layer in self.layers if layer.gain is not None])

    @property
    def solvers(self) -> dict[str, int]:
        """Solver → how many layers it won, the busiest first."""
        return dict(Counter(layer.solver for layer in self.layers).most_common())

    @property
    def worst(self) -> list[LayerFinished]:
        """Layers by falling weight error."""
        return sorted(self.layers, key=lambda layer: -layer.weight_error)

    @property
    def unplanned(self) -> list[LayerKept]:
        """Layers that were to be quantized and had to be kept, with the reason."""
        return [kept for kept in self.kept if not kept.planned]

    def to_dict(self) -> dict:
        """Plain values, with the summary numbers beside the lists."""
        summary = {name: getattr(self, name) for name in ("median_error", "median_output_error", "median_gain")}
        finite = {name: None if math.isnan(value) else value for name, value in summary.items()}
        return {**dataclasses.asdict(self), **finite, "solvers": self.solvers}

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: Path) -> None:
        """Write the JSON; a file that is there stays whole until it is replaced. Raises OSError."""
        text = self.to_json() + "\n"
        if path.exists() and not path.is_file():  # a terminal, a pipe
            path.write_text(text, encoding="utf-8")
            return
        target = Path(os.path.realpath(path))
        partial = target.with_name(f".{secrets.token_hex(4)}.partial")
        try:
            with open(partial, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                to_disk(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def table(self, worst: int = 5) -> str:
        """The summary users see at the end: totals, the worst layers, and layers that had to be kept."""
        if self.already_done:
            return self._already
        rows = self._rows()
        rows += [
            (f"worst {place}", f"{layer.weight_error:.5f}  {layer.name} {layer.shape[0]}×{layer.shape[1]}")
            for place, layer in enumerate(self.worst[:worst], 1)
        ]
        rows += self._note_rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)

    def markdown(self, worst: int = 20) -> str:
        """The same in markdown, with the worst layers as a table of their own."""
        if self.already_done:
            return self._already
        shapes = {layer.name: "×".join(map(str, layer.shape)) for layer in self.layers}
        layers = [
            (
                layer.name,
                shapes[layer.name],
                f"{layer.format} per {layer.granularity}",
                layer.solver,
                f"{layer.weight_error:.5f}",
                "–" if layer.output_error is None else f"{layer.output_error:.5f}",
            )
            for layer in self.worst[:worst]
        ]
        summary = markdown_table(["", self.source], self._rows() + self._note_rows())
        by_layer = markdown_table(["worst layers", "shape", "format", "solver", "weight error", "output error"], layers)
        return f"{summary}\n\n{by_layer}\n" if layers else f"{summary}\n"

    @property
    def _already(self) -> str:
        return f"Already done: {self.output or 'it'} was made from the same source and recipe."

    def _rows(self) -> list[tuple[str, str]]:
        """(label, text) of the totals."""
        reasons: dict[str, int] = {}
        for kept in self.kept:
            reasons[kept.reason] = reasons.get(kept.reason, 0) + 1
        ratio = self.bytes_out / self.bytes_in if self.bytes_in else 1.0
        rows = [
            *([("model", self.recognised)] if self.recognised else []),
            ("format", f"{self._format}, rounding {self.rounding}"),
            *([("measured", str(self.choice)), ("size and error", self.choice.outline)] if self.choice else []),
            (
                "layers quantized",
                f"{len(self.layers)}"
                + (f", {self.taken_up} of them by a run that was stopped" if self.taken_up else ""),
            ),
            (
                "tensors kept",
                f"{len(self.kept)} ({', '.join(f'{count} {reason}' for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1])[:3])})"
                if self.kept
                else "0",
            ),
            (
                "weight error",
                f"median {self.median_error:.5f}, worst {self.worst[0].weight_error:.5f}" if self.layers else "none",
            ),
            *self._rounding_rows(),
            ("size", f"{human_bytes(self.bytes_in)} → {human_bytes(self.bytes_out)} ({ratio:.0%})"),
            ("seconds", f"{self.seconds:.1f} on {self.device}"),
        ]
        return rows + ([("file", self.output)] if self.output else [])

    def _note_rows(self) -> list[tuple[str, str]]:
        notes = Counter(layer.note for layer in self.layers if layer.note)
        rows = [("note", f"{note} ({count} layers)") for note, count in notes.items()]
        return rows + [("KEPT", f"{kept.name}: {kept.reason}") for kept in self.unplanned]

    @property
    def _format(self) -> str:
        if self.choice is None:
            return f"{self.format} per {self.granularity}"
        rotated = {layer.name: f", ConvRot {layer.convrot}" if layer.convrot else "" for layer in self.layers}
        counts = Counter(f"{layer.format} per {layer.granularity}{rotated[layer.name]}" for layer in self.layers)
        return "; ".join(f"{name}: {count} layers" for name, count in counts.most_common())

    def _rounding_rows(self) -> list[tuple[str, str]]:
        rows = []
        if not math.isnan(self.median_output_error):
            errors = [layer.output_error for layer in self.layers if layer.output_error is not None]
            rows.append(("output error", f"median {self.median_output_error:.5f}, worst {max(errors):.5f}"))
        if not math.isnan(self.median_gain):
            won = ", ".join(f"{solver} {count}" for solver, count in self.solvers.items())
            rows.append(("against nearest", f"median {self.median_gain:.3f}×; layers won: {won}"))
        return rows
