"""Quality card of a quantized file, for the page where it is offered: what it was made of, how, and how exact it is."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..comparison import Comparison, format_value
from ..display import escape_control, human_bytes, markdown_table, size_change
from ..output import inspect_file
from ..version import VERSION
from .report import Report

__all__ = ["QualityCard", "make_quality_card"]

_WORST = 10  # layers in the table
_ROUNDINGS = {
    "auto": "round to nearest with a scale search",
    "nearest": "round to nearest",
    "calibrated": "GPTQ, layer by layer",
}
_PERCENT = "{:.3g} %"


@dataclass(frozen=True)
class QualityCard:
    """The content of a card.

    Attributes:
        title: name of the file, without its suffix.
        format: formats of the layers, that of the recipe first.
        bytes_in, bytes_out: size of the source and of the file.
        rows: (label, text) of all other facts.
        layers: name, shape, weight error and output error of the layers with the largest errors.
        comparison: metrics of sampled images, or None.
    """

    title: str
    format: str
    bytes_in: int
    bytes_out: int
    rows: Sequence[tuple[str, str]]
    layers: Sequence[tuple[str, str, str, str]]
    comparison: Comparison | None

    @property
    def size(self) -> str:
        """Both sizes and their difference."""
        change = size_change(self.bytes_in, self.bytes_out)
        return f"{human_bytes(self.bytes_in)} → {human_bytes(self.bytes_out)}{f', {change}' if change else ''}"

    def markdown(self, image: str | None = None) -> str:
        """The card as Markdown; ``image``: name of its image in the same folder."""
        parts = [f"# {self.title}", *([f"![Quality card]({image.replace(' ', '%20')})"] if image else [])]
        facts = [("format", self.format), ("size", self.size), *self.rows]
        parts.append("\n".join(f"* **{label}**: {text}" for label, text in facts))
        if self.comparison:  # its steps are too many for a card, and its costs are among the facts
            parts.append(replace(self.comparison, steps=[], costs=None).markdown().rstrip("\n"))
        if self.layers:
            parts += [
                "## Layers with the largest errors",
                markdown_table(["layer", "shape", "weight error", "output error"], self.layers),
            ]
        return "\n\n".join(parts) + "\n"


def make_quality_card(report: Report, paths: Sequence[Path], comparison: Comparison | None = None) -> QualityCard:
    """The card of a run and of the files that it wrote.

    Raises:
        SourceError: a file cannot be read.
    """
    return QualityCard(
        title=escape_control(paths[0].stem),
        format=_describe_formats(report),
        bytes_in=report.bytes_in,
        bytes_out=sum(path.stat().st_size for path in paths),
        rows=_make_rows(report, inspect_file(paths[0]).stock, comparison),
        layers=[
            (
                escape_control(layer.name),
                "×".join(map(str, layer.shape)),
                _PERCENT.format(100 * layer.weight_error),
                "–" if layer.output_error is None else _PERCENT.format(100 * layer.output_error),
            )
            for layer in report.worst[:_WORST]
        ],
        comparison=comparison,
    )


def _describe_formats(report: Report) -> str:
    """Formats of the layers, that of the recipe first."""
    counts = Counter(
        f"{layer.format} per {layer.granularity}" + (f", ConvRot {layer.convrot}" if layer.convrot else "")
        for layer in report.layers
    )
    if len(counts) < 2:
        return next(iter(counts), f"{report.format} per {report.granularity}")
    names = sorted(counts, key=lambda name: (not name.startswith(f"{report.format} "), -counts[name]))
    return "; ".join(f"{name} ({counts[name]} layers)" for name in names)


def _make_rows(report: Report, stock: str, comparison: Comparison | None) -> list[tuple[str, str]]:
    outputs = [layer.output_error for layer in report.layers if layer.output_error is not None]
    rows = [
        ("model", escape_control(report.source)),
        ("family", report.recognised),
        ("rounding", _ROUNDINGS.get(report.rounding, report.rounding)),
    ]
    if report.layers:
        weights = [layer.weight_error for layer in report.layers]
        rows += [
            ("layers", f"{len(report.layers)} quantized, {len(report.kept)} other tensors unquantized"),
            ("weight error", _describe_errors(report.median_error, max(weights))),
        ]
    if outputs:
        rows += [
            ("output error", _describe_errors(report.median_output_error, max(outputs))),
            ("validation", "activations of the calibration that the rounding did not use, where it has them"),
        ]
    if report.sequential is not None:
        rows.append(("model output", str(report.sequential)))
    if not math.isnan(report.median_gain):
        rows.append(("error relative to round to nearest", f"{report.median_gain:.2f}×, median of the layers"))
    if comparison:
        rows += _describe_comparison(comparison)
    rows += [("loads in", stock), ("made with", f"learned_rounding {VERSION}")]
    return [(label, text) for label, text in rows if text]


def _describe_errors(median: float, worst: float) -> str:
    return f"median {_PERCENT.format(100 * median)}, largest {_PERCENT.format(100 * worst)}"


def _describe_comparison(comparison: Comparison) -> list[tuple[str, str]]:
    rows = [("images", comparison.title)]
    rows += [(name, format_value(value, name)) for name, value in comparison.means.items()]
    if comparison.costs:
        before, after = comparison.costs
        rows += [
            ("weight memory", f"{human_bytes(before.weight_bytes)} → {human_bytes(after.weight_bytes)}"),
            ("time per step", f"{before.step_seconds:.3g} s → {after.step_seconds:.3g} s"),
            ("activations", after.activations),
        ]
    return rows
