"""Report of a result of ``kernels.py``: tables and sentences for the README, and the roofline time of a layer."""

from learned_rounding.quant_core.display import markdown_table

__all__ = ["floor", "markdown", "sentences", "tables"]

# Peak dense 8-bit operations per s and memory bytes per s, from the data sheets.
PEAKS = {"NVIDIA H100": (1979e12, 3.35e12), "NVIDIA H200": (1979e12, 4.8e12)}
# Name in a result → heading.
_FORMATS = {
    "int8 block": "INT8 block",
    "fp8 block": "FP8 block",
    "int8 row": "INT8 row",
    "int8 row ConvRot": "INT8 row ConvRot",
    "fp8 row": "FP8 row",
}
_EAGER = "int8 row ConvRot eager"  # results of version 0.1.0 do not have it
_KITCHEN = {"kitchen cuda": "kitchen CUDA INT8 row", "kitchen triton": "kitchen Triton INT8 row"}
_ALTERNATIVES = {**_KITCHEN, "_int_mm": "`_int_mm`", "_scaled_mm": "`_scaled_mm`"}
# Format → speedup over bf16 that is the goal for Flux's layers.
_LAYER_GOALS = {"int8 block": 1.25, "fp8 block": 1.45}
# Prefix of a name → fraction of the copy speed that is the goal, for at least _MANY_BYTES.
_MEMORY_GOALS = {"inputs": 0.80, "decode": 0.85}
_MANY_BYTES = 20e6
_NONE = "–"


def floor(device: str, tokens: int, out: int, inner: int) -> float | None:
    """Roofline time of an 8-bit linear layer in µs, including quantization of its activations; None for an unknown GPU.

    Memory traffic: read 16-bit activations, write and read their quantized values, read the quantized weight, write 16-bit
    outputs. Scales are neglected. INT8 and FP8 have the same roofline.
    """
    peak = next((peak for name, peak in PEAKS.items() if device.startswith(name)), None)
    if peak is None:
        return None
    moved = tokens * inner * (2 + 1 + 1) + out * inner + 2 * tokens * out
    return max(2 * tokens * out * inner / peak[0], moved / peak[1]) * 1e6


def tables(result: dict) -> dict[str, str]:
    """Markdown table of each section."""
    return {
        "linear": _layers(result),
        "memory": _ratios(_section(result, "memory"), "tokens × channels", "shape"),
        "block": _ratios(_section(result, "block"), "format", "format"),
    }


def sentences(result: dict) -> list[str]:
    """Comparison with the goals, and the errors, which the tables omit."""
    layers = _section(result, "linear")
    flux = [row for row in layers if row["model"].startswith("Flux")]
    spans = {heading: [row[f"{name} error"] for row in layers] for name, heading in _FORMATS.items()}
    errors = (f"{min(values):.4f}–{max(values):.4f} for {heading}" for heading, values in spans.items())
    return [
        f"Errors against float64, with normal inputs: {', '.join(errors)}.",
        *_compare_with_kitchen(layers),
        *(_goal(flux, name, least) for name, least in _LAYER_GOALS.items() if flux),
        *(_rotation_cost(rows, where) for rows, where in ((flux, "Flux's shapes"), (layers, "all shapes")) if rows),
        *_memory_goals(_section(result, "memory")),
    ]


def markdown(result: dict) -> str:
    """All tables and sentences."""
    return "\n\n".join((*tables(result).values(), *sentences(result))) + "\n"


def _section(result: dict, name: str) -> list[dict]:
    return [row for row in result["rows"] if row["section"] == name]


def _number(row: dict, name: str) -> float:
    """Speedup of a layer; 0 for an alternative that is missing or failed."""
    value = row.get(name, 0.0)
    return value if isinstance(value, float) else 0.0


def _name(row: dict) -> str:
    return f"{row['model']} {row['layer']}"


def _compare_with_kitchen(rows: list[dict]) -> list[str]:
    compared = [row for row in rows if any(_number(row, name) for name in _KITCHEN)]
    faster = [row for row in compared if all(_number(row, name) < row["int8 block"] for name in _KITCHEN)]
    return (
        [f"INT8 block is ahead of comfy-kitchen's INT8 row on {len(faster)} of {len(compared)} shapes."]
        if compared
        else []
    )


def _rotation_cost(rows: list[dict], where: str) -> str:
    """Largest relative increase of a layer's time by the rotation of its activations."""
    costs = {_name(row): row["int8 row"] / row["int8 row ConvRot"] - 1 for row in rows}
    most = max(costs, key=costs.get)
    return f"ConvRot costs up to {100 * costs[most]:.0f} % of a layer on {where} ({most})."


def _layers(result: dict) -> str:
    has_eager = all(_EAGER in row for row in _section(result, "linear"))

    def cells(row: dict) -> list[str]:
        plain = row["F.linear µs"]
        least = floor(result["device"], *map(int, row["shape"].split("×")))
        formats = (f"{row[name]:.2f}" + (f" ({row[name] * least / plain:.2f})" if least else "") for name in _FORMATS)
        eager = [f"{row[_EAGER]:.2f}"] if has_eager else []
        alternatives = (f"{_number(row, name):.2f}" if _number(row, name) else _NONE for name in _ALTERNATIVES)
        return [
            _name(row),
            row["shape"],
            f"{plain:.0f} ({row['F.linear TFLOP/s']:.0f})",
            f"{least:.0f}" if least else _NONE,
            *formats,
            *eager,
            *alternatives,
        ]

    headings = [
        "layer",
        "tokens × out × in",
        "bf16 µs (TFLOP/s)",
        "floor µs",
        *(f"{heading} (of floor)" for heading in _FORMATS.values()),
        *(["INT8 row ConvRot, eager"] if has_eager else []),
        *_ALTERNATIVES.values(),
    ]
    return markdown_table(headings, map(cells, _section(result, "linear")))


def _ratios(rows: list[dict], heading: str, key: str) -> str:
    """Table with one line per row; numbers from 100 on without decimals."""
    names = [name for name in rows[0] if name not in ("section", key)]
    lines = (
        [row[key], *(f"{row[name]:.0f}" if row[name] >= 100 else f"{row[name]:.2f}" for name in names)] for row in rows
    )
    return markdown_table([heading, *names], lines)


def _goal(rows: list[dict], name: str, least: float) -> str:
    met, missed = (
        ", ".join(f"{_name(row)} ({row[name]:.2f})" for row in rows if (row[name] >= least) == reached) or "none"
        for reached in (True, False)
    )
    return f"{_FORMATS[name]}, goal {least} on Flux's shapes: met by {met}; missed by {missed}."


def _memory_goals(rows: list[dict]) -> list[str]:
    """One sentence for each quantizer or dequantizer that misses its goal at a large size."""
    found = []
    for name in rows[0]:
        least = next((least for start, least in _MEMORY_GOALS.items() if name.startswith(start)), 0.0)
        large = [row for row in rows if 3 * _values(row) >= _MANY_BYTES]
        missed = ", ".join(f"{row['shape']} ({row[name]:.2f})" for row in large if least and row[name] < least)
        if missed:
            found.append(f"Of 20 MB and more, “{name}” misses {least:.2f} on {missed}.")
    return found


def _values(row: dict) -> int:
    tokens, channels = map(int, row["shape"].split("×"))
    return tokens * channels
