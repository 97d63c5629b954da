"""Times of GPTQ with a beam search on a GPU, relative to GPTQ without one, for layers of a large model.

Measured is ``round_gptq`` with one coordinate-descent pass, with and without the factorization, and the whole
``quantize_weight``: best of some runs after a warm-up.
"""

import time
from collections.abc import Callable

import torch

from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.benchmarks.rounding_methods import CASES, DEVICE, Case
from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.rounding import hessian_quadratic, round_gptq
from learned_rounding.quant_core.rounding.gptq import factorize
from learned_rounding.quant_core.rounding.scaling import start_scaling

__all__ = ["main"]

_FORMATS = ("int8_tensorwise", "asym_w4a8_int8", "nvfp4", "float8_e4m3fn", "convrot_w4a4")


def _cases() -> list[Case]:
    """One case per format, and for W6A8."""
    found = [next(case for case in CASES if case.format == name) for name in _FORMATS]
    return [*found, next(case for case in CASES if case.bits == 6)]


def _seconds(call: Callable[[], object], runs: int) -> float:
    """Shortest run time of ``call`` in s, after a warm-up."""
    times = []
    for _ in range(runs + 1):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _measure(case: Case, weight: torch.Tensor, hessian: torch.Tensor, width: int, runs: int) -> dict[str, float]:
    """Seconds of rounding a weight with a beam width: columns that start with "s "."""
    codec = case.codec(weight.shape[1])
    stored = codec.basis.apply_weight(weight) if codec.basis else weight
    scaling = start_scaling(stored, codec.solve_space((weight.shape[0], weight.shape[1])))
    quadratic = hessian_quadratic(hessian, 0.01)
    factorization = factorize(quadratic, weight.shape[1], weight.device, passes=1)

    def round_weight(known=None):
        options = {"passes": 1, "beam_width": width, "factorization": known}
        return round_gptq(stored, scaling.scale, scaling.space, quadratic, **options)

    choices = {name: getattr(case.config, name) for name in ("granularity", "bits", "linear_dtype")}
    options = {"rounding": "calibrated", "hessian": hessian, "validation_hessian": hessian, "beam_width": width}
    return {
        "s rounding": _seconds(lambda: round_weight(factorization), runs),
        "s round_gptq": _seconds(round_weight, runs),
        "s quantize_weight": _seconds(lambda: quantize_weight(weight, case.format, **choices, **options), runs),
    }


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        ("--widths", {"type": int, "nargs": "+", "default": [1, 4, 8], "help": "beam widths, the first is the base"}),
        ("--runs", {"type": int, "default": 3, "help": "runs of each measurement (default: 3)"}),
    )
    side = 64 if args.quick else 3072
    rows = []
    with torch.no_grad():
        for shape in ((side, side), (4 * side, side), (side, 4 * side)):
            generator = torch.Generator(DEVICE).manual_seed(0)
            weight = (0.02 * torch.randn(shape, generator=generator, device=DEVICE)).bfloat16()
            x = torch.randn(2 * shape[1], shape[1], generator=generator, device=DEVICE)
            x *= torch.rand(shape[1], generator=generator, device=DEVICE) + 0.1
            hessian = x.t() @ x / len(x)
            del x
            for case in _cases():
                base: dict[str, float] = {}
                for width in args.widths:
                    seconds = _measure(case, weight, hessian, width, args.runs)
                    base = base or seconds
                    ratios = {name.replace("s ", "× ", 1): seconds[name] / base[name] for name in seconds}
                    rows.append(
                        {"shape": f"{shape[0]}×{shape[1]}", **case.columns, "width": width, **seconds, **ratios}
                    )
    finish(args, rows)


if __name__ == "__main__":
    main()
