"""Tables of results of tiny_formats.py, and whether they suffice to tell roundings apart.

python benchmarks/tiny_formats_report.py FILE [FILE ...]

An interval of a paired difference becomes narrower with the square root of the number of prompts of the images. ``prompts needed``
is therefore n·(half of the interval / difference)²: with at most the n prompts that were measured, the interval excludes zero
and the images tell the two roundings apart. The interval contains the choice of the images, not that of the calibration. With
several files of the same images and other calibrations (``--calibration-prompts``, ``--calibration-seed``) a second table
has the same difference for each, and the change from the first file to the last: if its interval includes zero, more calibration
prompts change nothing that these images show.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from learned_rounding.benchmarks.calibration import mean_interval
from learned_rounding.quant_core.display import markdown_table

# Name of a base in a row → the same for readers.
BASES = {
    "gain": "nearest",
    "calibrated": "calibrated",
    "sequential": "sequential",
    "FP8": "FP8 nearest",
    "merged": "merged",
}

__all__ = ["main", "prompts_needed", "tables"]


def prompts_needed(difference: float, low: float, high: float, prompts: int) -> int | None:
    """Number of prompts with which the interval of a difference excludes zero, from that of ``prompts``; None for no difference."""
    if not difference:
        return None
    return math.ceil(prompts * ((high - low) / 2 / difference) ** 2)


def tables(rows: Sequence[dict]) -> str:
    """Markdown tables of every section: images, paired differences in dB, and latents by step."""
    parts = []
    for section in dict.fromkeys(row["section"] for row in rows):
        own = [row for row in rows if row["section"] == section]
        bases = [base for base in BASES if any(f"{base} dB" in row for row in own)]
        marks = list(own[0]["SNR dB"])
        parts += [
            f"{section}:",
            markdown_table(
                ["format", "rounding", "bits", "s", "model error", "latent error", "MSE ·10⁴", "PSNR, dB", "SSIM"],
                [
                    [
                        row["format"],
                        row["rounding"],
                        f"{row['bits']:.1f}",
                        f"{row['seconds']:.1f}",
                        f"{row['output error']:.4f}" if "output error" in row else "–",
                        f"{row['latent error']:.4f}",
                        _cell(row, "MSE", ".2f", 1e4),
                        _cell(row, "dB", ".1f"),
                        _cell(row, "SSIM", ".4f"),
                    ]
                    for row in own
                ],
            ),
            markdown_table(
                ["format", "rounding", *(f"− {BASES[base]}, dB" for base in bases)],
                [
                    [row["format"], row["rounding"], *(_cell(row, f"{base} dB", "+.2f") for base in bases)]
                    for row in own
                ],
            ),
            markdown_table(
                ["latent SNR in dB after step", "rounding", *map(str, marks), "last − calibrated"],
                [
                    [
                        row["format"],
                        row["rounding"],
                        *(f"{row['SNR dB'][mark][0]:.1f}" for mark in marks),
                        _range(row["calibrated SNR dB"][marks[-1]], "+.2f") if "calibrated SNR dB" in row else "–",
                    ]
                    for row in own
                ],
            ),
        ]
    return "\n\n".join(parts)


def _cell(row: dict, name: str, spec: str, factor: float = 1) -> str:
    """Mean and interval of a column; a dash without it."""
    if name not in row:
        return "–"
    return _range([factor * row[key] for key in (name, f"{name} low", f"{name} high")], spec)


def _range(values: Iterable[float], spec: str) -> str:
    mean, low, high = (format(value, spec).replace("-", "−") for value in values)
    return f"{mean} ({low}…{high})"


def _told_apart(result: dict) -> str:
    """Table of the differences to calibrated, sequential and FP8, with the number of prompts that each needs."""
    prompts = len(result["prompts"])
    lines = []
    for row in result["rows"]:
        for base in BASES:
            values = [row.get(key) for key in (f"{base} dB", f"{base} dB low", f"{base} dB high")]
            if None in values:
                continue
            needed = prompts_needed(*values, prompts)
            told = "yes" if needed is not None and needed <= prompts else "no"
            lines.append([row["section"], row["format"], f"{row['rounding']} − {BASES[base]}", _range(values, "+.2f")])
            lines[-1] += [f"{(values[2] - values[1]) / 2:.2f}", "–" if needed is None else str(needed), told]
    header = ["section", "format", "difference", "dB", "± dB", "prompts needed", f"{prompts} suffice"]
    return markdown_table(header, lines)


def _by_calibration(results: Sequence[dict]) -> str:
    """Table of each rounding minus calibrated of the same file, by calibration, and the change from the first to the last."""
    keys = [key for key in results[0]["dB_per_prompt"] if all(key in result["dB_per_prompt"] for result in results)]
    lines = []
    for key in keys:
        section, name, rounding = key.split(" / ")
        base = f"{section} / {name} / calibrated"
        if rounding == "nearest" or base not in keys:
            continue
        values = [np.array([result["dB_per_prompt"][key]]) for result in results]
        relative = [
            value - np.array([result["dB_per_prompt"][base]]) for value, result in zip(values, results, strict=True)
        ]
        gains = ["–" if key == base else _range(mean_interval(gain), "+.2f") for gain in relative]
        lines.append([section, name, rounding, *gains, _range(mean_interval(values[-1] - values[0]), "+.2f")])
    header = [f"{result['calibration_prompts']}, seed {result['calibration_seed']}" for result in results]
    return markdown_table(["section", "format", "rounding", *header, "last − first, PSNR"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON of tiny_formats.py")
    files = parser.parse_args().files
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for file, result in zip(files, results, strict=True):
        print(f"{file}: {result['device']}, {result['calibration_prompts']} calibration prompts", end="\n\n")
        print(tables(result["rows"]), _told_apart(result), sep="\n\n", end="\n\n")
    if len(results) > 1:
        for name in ("prompts", "seeds", "steps", "host_device"):
            if any(result[name] != results[0][name] for result in results):
                raise SystemExit(f"The files differ in {name}; compare results of the same images on the same device.")
        print("− calibrated, dB, by number and first seed of the calibration prompts:", end="\n\n")
        print(_by_calibration(results))


if __name__ == "__main__":
    main()
