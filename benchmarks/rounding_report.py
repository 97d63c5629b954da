"""Report of a result of ``rounding.py``: Markdown tables for the README, and a plot."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from learned_rounding.quant_core.display import markdown_table

__all__ = ["markdown", "plot"]

# Plotted method → color: grey without calibration, blue with calibration, orange for the published tool.
_COLORS = {
    "nearest": "#8c8c8c",
    "scale search": "#bdbdbd",
    "principal": "#5c5c5c",
    "calibrated, 0 sweeps": "#9ecae1",
    "calibrated, 1 sweep": "#4292c6",
    "calibrated, 4 sweeps": "#08519c",
    "published, learned": "#e6842a",
}


def markdown(result: dict) -> str:
    """Markdown tables of every section, after a line with device, date and command."""
    parts = [f"{_describe_run(result)}, torch {result['torch']} (`{result['command']}`)."]
    encoder = [row for row in result["rows"] if row["section"] == "minilm"]
    if encoder:
        measured = [row for row in encoder if "median" in row]
        common, few = _split_by_coverage(measured)
        exact = [row for row in encoder if row not in measured]
        parts += [
            f"Error of the final embedding: weights only{_list_cards(encoder)}.",
            _pivot(exact + common, _errors),
            "Error of the final embedding, weights only, with corrected biases.",
            _pivot([row for row in common if "bias" in row], lambda row: f"{row['bias']:.4f}"),
            "Output error of a layer relative to nearest: median / worst / number of layers with a larger error.",
            _pivot(common, _layers),
            "Run time of all 36 layers in s.",
            _pivot(common, _seconds),
        ]
        if few:
            parts += [
                "Other rounding methods: error of the final embedding; output error of a layer; run time in s.",
                *(_pivot(few, cell) for cell in (_errors, _layers, _seconds)),
            ]
    random = [row for row in result["rows"] if row["section"] == "synthetic"]
    for weight in dict.fromkeys(row["weight"] for row in random):
        few = [
            row
            for row in random
            if row["weight"] == weight
            and (row["format"], row["per"]) in (("float8_e4m3fn", "tensor"), ("int8_tensorwise", "row"))
        ]
        parts += [
            f"Random weight, {weight}: errors in %, principal loss relative to nearest.",
            markdown_table(
                ["format", "method", "weight error", "principal loss", "white", "anisotropic", "aligned", "seconds"],
                (
                    [_format(row), row["method"], _percent(row["weight error"]), f"{row['principal']:.3f}"]
                    + [_percent(row[kind]) for kind in ("white", "anisotropic", "aligned")]
                    + [f"{row['seconds']:.3g}"]
                    for row in few
                ),
            ),
        ]
    timed = [row for row in result["rows"] if row["section"] == "speed"]
    if timed:
        memory = " / additional peak memory in MB" if "peak MB" in timed[0] else ""
        parts += [
            f"Run time of a layer in s{memory}.",
            _pivot(
                timed, lambda row: f"{row['seconds']:.3g}" + (f" / {row['peak MB']:.0f}" if memory else ""), "shape"
            ),
        ]
    return "\n\n".join(parts) + "\n"


def plot(result: dict, path: Path) -> None:
    """Plot the error of the final embedding as grouped bars: one group per format, one bar per method.

    Exits with status 2 if matplotlib is not installed or the result has no minilm section.
    """
    try:
        import matplotlib
    except ImportError:
        print("The plot requires matplotlib; run 'pip install matplotlib'.", file=sys.stderr)
        raise SystemExit(2) from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "rounding", "font.size": 9})
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["section"] == "minilm" and row["embedding"]]
    if not rows:
        print("The result has no minilm section to plot; run rounding.py with --only minilm.", file=sys.stderr)
        raise SystemExit(2)
    formats = list(dict.fromkeys(map(_format, rows)))
    values: dict[str, dict[str, float]] = {method: {} for method in _COLORS}
    labels = {method: method for method in _COLORS}
    for row in rows:
        learned = row["method"].startswith("published") and row["method"] != "published, nearest"
        method = "published, learned" if learned else row["method"]
        if method in values:
            values[method][_format(row)] = row["embedding"]
            labels[method] = row["method"]
    plotted = [method for method in _COLORS if values[method]]
    width = 0.85 / len(plotted)
    figure, axes = pyplot.subplots(figsize=(11, 4.6), layout="constrained")
    for number, method in enumerate(plotted):
        groups = [group for group, name in enumerate(formats) if name in values[method]]
        offset = (number - (len(plotted) - 1) / 2) * width
        axes.bar(
            [group + offset for group in groups],
            [values[method][formats[group]] for group in groups],
            width * 0.92,
            color=_COLORS[method],
            label=labels[method],
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xticks(range(len(formats)), [name.replace("_", "\n").replace(" ", "\n", 1) for name in formats])
    axes.set_ylabel("relative error of the final embedding")
    axes.set_title(f"MiniLM-L6 with quantized weights, 36 layers; lower is better ({_describe_run(result)})")
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(plotted), loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _split_by_coverage(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Split rows into those of methods that were measured with most formats, and the others."""
    counts = Counter(row["method"] for row in rows)
    most = {method for method, count in counts.items() if 2 * count > max(counts.values())}
    return [row for row in rows if row["method"] in most], [row for row in rows if row["method"] not in most]


def _cards(row: dict) -> list[str]:
    """Return the columns of errors with quantized activations."""
    return [column for column in row if column.startswith("SM ")]


def _list_cards(rows: list[dict]) -> str:
    return "".join(f" / {card}" for card in _cards(rows[0]))


def _errors(row: dict) -> str:
    return " / ".join(f"{row[column]:.4f}" for column in ("embedding", *_cards(row)))


def _layers(row: dict) -> str:
    return f"{row['median']:.3f} / {row['worst']:.3f} / {row['worse']}"


def _seconds(row: dict) -> str:
    return f"{row['seconds']:.3g}"


def _describe_run(result: dict) -> str:
    return f"{result['device']}, {result['cores']} cores, {result['date']}"


def _format(row: dict) -> str:
    return f"{row['format']} {row['per']}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g}"


def _pivot(rows: list[dict], cell: Callable[[dict], str], *keys: str) -> str:
    """Build a table with a line per format (and value of ``keys``) and a column per method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault((*(row[key] for key in keys), _format(row)), {})[row["method"]] = cell(row)
    cells = ([*line, *(by_method.get(method, "") for method in methods)] for line, by_method in lines.items())
    return markdown_table([*keys, "format", *methods], cells)
