"""Benchmark of the rounding kernels at the block sizes of GPTQ: Triton against plain torch on the same device, times in µs.

Section ``rounding`` has the kernels of ``kernels/triton/rounding.py``, ``beam`` that of ``kernels/triton/beam.py``. Blocks have
128 columns of a weight with 3072 rows. On a CPU plain torch alone is measured.
"""

import functools

import torch

from learned_rounding import kernels
from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.benchmarks.kernels import CUDA, DEVICE, measure_microseconds
from learned_rounding.quant_core.formats import E2M1, E4M3, E5M2, INT4, INT8
from learned_rounding.quant_core.formats.elements import ElementFormat

SECTIONS = ("rounding", "beam")
ELEMENTS = {element.name: element for element in (E4M3, E5M2, E2M1, INT8, INT4)}
WIDTHS = (2, 4, 8)  # of the beam
CODES = torch.linspace(-0.98, 0.98, 16)  # of a codebook
GROUP = 16  # columns that share levels
RATIOS = torch.linspace(0.6, 1.0, 24)  # candidates of a scale search


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def measure(call, reference_call) -> dict[str, object]:
    """Columns of one kernel: both times and their ratio."""
    plain = measure_microseconds(reference_call)
    if not CUDA:
        return {"reference µs": plain}
    fast = measure_microseconds(call)
    return {"triton µs": fast, "reference µs": plain, "ratio": plain / fast}


def measure_operation(operation, *tensors) -> dict[str, object]:
    """Columns of a public function of the kernels, by the backend Triton and by plain torch."""

    def run(backend: str) -> None:
        with kernels.using(backend):
            operation(*tensors)

    return measure(functools.partial(run, "triton"), functools.partial(run, "reference"))


def make_block(columns: int, rows: int, element: ElementFormat) -> tuple:
    """Weight, shift, coupling and scale of a block with one scale per row."""
    weight, shift = random(columns, rows), random(columns, rows, seed=1)
    coupling = random(columns, columns, seed=2).tril(-1) * 0.1
    return weight, shift, coupling, 0.05 + random(1, rows, seed=3).abs() * 3 / element.max


def measure_rounding(columns: int, rows: int, inner: int) -> list[dict]:
    """Rows of ``round_block``, ``scale_errors`` and ``search_level_scales``."""
    made, shape = [], f"{columns}×{rows}"
    for name, element in ELEMENTS.items():
        weight, shift, coupling, scale = make_block(columns, rows, element)
        arguments = weight, shift, None, coupling, scale, 1, element.arithmetic
        made.append(
            {"kernel": "round_block", "elements": name, "shape": shape}
            | measure_operation(kernels.round_block, *arguments)
        )
        scales = torch.full((rows, 1), 0.02, device=DEVICE)
        arguments = random(rows, inner), scales, RATIOS.to(DEVICE), None, 1, inner, 1, element.arithmetic
        made.append(
            {"kernel": "scale_errors", "elements": name, "shape": f"{rows}×{inner}"}
            | measure_operation(kernels.scale_errors, *arguments)
        )
    bits = torch.full((rows, inner // GROUP), 40, dtype=torch.uint8, device=DEVICE)
    arguments = random(rows, inner) * 40, bits, CODES.to(DEVICE), None, 4, INT8.max
    made.append(
        {"kernel": "search_level_scales", "elements": "levels", "shape": f"{rows}×{inner}"}
        | measure_operation(kernels.search_level_scales, *arguments)
    )
    return [{"section": "rounding", **row} for row in made]


def measure_beam(columns: int, rows: int) -> list[dict]:
    """Rows of ``round_block_beam``, for each element format and width, and for levels."""
    made = []
    for name in (*ELEMENTS, "levels"):
        element = ELEMENTS.get(name, INT8)
        weight, shift, coupling, scale = make_block(columns, rows, element)
        levels = (CODES.to(DEVICE), random(columns, rows, seed=4).abs() * 60) if name == "levels" else (None, None)
        cost = 0.1 + random(columns, seed=5).square()
        for width in WIDTHS:
            arguments = weight, shift, coupling, cost, scale, 1, element.arithmetic, width, *levels
            row = {"section": "beam", "kernel": "round_block_beam", "elements": name, "width": width}
            made.append(row | {"shape": f"{columns}×{rows}"} | measure_operation(kernels.round_block_beam, *arguments))
    return made


def main() -> None:
    """Measure and report."""
    args = arguments(
        __doc__.partition("\n")[0],
        ("--only", {"nargs": "+", "choices": SECTIONS, "default": SECTIONS, "help": "sections to measure"}),
    )
    columns, rows, inner = (8, 32, 64) if args.quick else (128, 3072, 3072)
    measured = []
    if "rounding" in args.only:
        measured += measure_rounding(columns, rows, inner)
    if "beam" in args.only:
        measured += measure_beam(columns, rows)
    finish(args, measured, backend=kernels.backend())


if __name__ == "__main__":
    main()
