"""What happened in a run, layer by layer: data, JSON and a table for people."""

import dataclasses
import json
import math
from dataclasses import dataclass, field

from .events import LayerFinished, LayerKept

__all__ = ["Report", "human_bytes"]

_UNITS = ("B", "KB", "MB", "GB", "TB")


def human_bytes(count: float) -> str:
    """Decimal units, three digits: 19.2 MB."""
    power = 0
    while count >= 999.5 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_UNITS[power]}"


@dataclass
class Report:
    """The outcome of one run.

    Attributes:
        layers: one :class:`LayerFinished` per quantized layer, in file order.
        kept: one :class:`LayerKept` per tensor copied or removed.
        bytes_in, bytes_out: size of the source's tensors and of the output file, or of its tensors when no file was written.
        seconds: wall-clock time of the run.
        output: path of the file, None when tensors were returned.
        already_done: the output was there, with the same fingerprint; nothing was computed.
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

    @property
    def median_error(self) -> float:
        """Median over layers of ‖Ŵ − W‖/‖W‖; NaN without layers."""
        errors = sorted(layer.weight_error for layer in self.layers)
        middle = len(errors) // 2
        return (
            math.nan if not errors else errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2
        )

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
        return {**dataclasses.asdict(self), "median_error": None if not self.layers else self.median_error}

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def table(self, worst: int = 5) -> str:
        """The summary users see at the end: totals, the worst layers, and layers that had to be kept."""
        if self.already_done:
            return f"Already done: {self.output} was made from the same source and recipe."
        reasons: dict[str, int] = {}
        for kept in self.kept:
            reasons[kept.reason] = reasons.get(kept.reason, 0) + 1
        ratio = self.bytes_out / self.bytes_in if self.bytes_in else 1.0
        rows = [
            ("format", f"{self.format} per {self.granularity}, rounding {self.rounding}"),
            ("layers quantized", f"{len(self.layers)}"),
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
            ("size", f"{human_bytes(self.bytes_in)} → {human_bytes(self.bytes_out)} ({ratio:.0%})"),
            ("seconds", f"{self.seconds:.1f} on {self.device}"),
        ]
        rows += [("file", self.output)] if self.output else []
        rows += [
            (f"worst {place}", f"{layer.weight_error:.5f}  {layer.name} {layer.shape[0]}×{layer.shape[1]}")
            for place, layer in enumerate(self.worst[:worst], 1)
        ]
        rows += [("KEPT", f"{kept.name}: {kept.reason}") for kept in self.unplanned]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)
