"""Section ``minilm`` of ``rounding.py``: rounding methods on the weights and activations of a text encoder."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional

from learned_rounding.benchmarks.minilm import LAYERS, SAME_AS_QUERY, SPLITS, Linear, MiniLM
from learned_rounding.benchmarks.rounding_methods import (
    CASES,
    DEVICE,
    Case,
    LibraryMethod,
    RoundedWeight,
    RoundingMethod,
    norm,
    output_loss,
    peak,
    select_cases,
)
from learned_rounding.quant_core.calibration import LayerStatistics

__all__ = ["CARDS", "Sequential", "minilm", "quantize_activations"]

CARDS = {"SM 8.9": (8, 9), "SM 9.0": (9, 0), "SM 12.0": (12, 0)}  # column → compute capability
_BATCH = 32  # texts whose activations are in memory


def quantize_activations(case: Case, x: torch.Tensor, capability: tuple[int, int]) -> torch.Tensor:
    """Return activations (…, in) as ComfyUI quantizes them on a card, without an ``input_scale``."""
    return case.codec(x.shape[-1]).quantize_activations(x.flatten(0, -2), capability).view_as(x)


def _linear(weights: dict, biases: dict, quantize: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Linear:
    """Return linear layers whose activations are quantized, once where layers share them."""
    latest = quantized = torch.empty(0)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        nonlocal latest, quantized
        if x is not latest:
            latest, quantized = x, quantize(x)
        return functional.linear(quantized, weights[name], biases[name])

    return linear


def minilm(args, methods: list[RoundingMethod]) -> list[dict]:
    """Measure all 36 linear layers, calibrated on the activations of the unquantized model.

    ``embedding`` is ‖e − e₀‖/‖e₀‖ over the evaluation texts with quantized weights, ``bias`` the same with corrected biases,
    and ``SM …`` the same with activations as ComfyUI quantizes them on such a card. ``median`` and ``worst`` are output
    errors of layers relative to nearest, ``worse`` is the number of layers where this ratio is above 1.001. ``limit`` is the
    median of :func:`_noise_shaping_limit`.
    """
    model = MiniLM(args.tensors, DEVICE)
    texts = {split: model.tokens(split, count) for split, count in _count_texts(args).items()}
    exact = model.embed(texts["evaluation"])
    _check_embeddings(exact, model.topics("evaluation", len(exact)))
    statistics = {split: model.statistics(tokens) for split, tokens in texts.items()}
    evaluation = {name: statistics["evaluation"][name].hessian for name in LAYERS}
    calibration = {
        name: replace(statistics["calibration"][name], validation_hessian=statistics["validation"][name].hessian)
        for name in LAYERS
    }
    limits = torch.tensor([_noise_shaping_limit(calibration[name].hessian) for name in LAYERS])

    def embedding_error(linear: Linear) -> float:
        return norm(model.embed(texts["evaluation"], linear) - exact) / norm(exact)

    def card_errors(case: Case, weights: dict[str, torch.Tensor], error: float) -> Iterator[tuple[str, float]]:
        """Errors on each card; ``error``: that without quantized activations."""
        codec, errors = case.codec(model.weights[LAYERS[0]].shape[1]), {}
        for card, capability in CARDS.items():
            native = codec.quantizes_activations(capability)
            elements = codec.activation_elements(capability) if native else None
            if elements not in errors:
                quantize = partial(quantize_activations, case, capability=capability)
                linear = _linear(weights, model.biases, quantize)
                errors[elements] = embedding_error(linear) if native else error
            yield card, errors[elements]

    def round_layers(method: RoundingMethod | Sequential, case: Case) -> dict[str, RoundedWeight]:
        if isinstance(method, Sequential):
            return method.round_layers(case)
        return {name: method(model.weights[name], case, calibration[name], model.biases[name]) for name in LAYERS}

    rows = []
    rounded: dict[tuple[Case, str], dict[str, RoundedWeight]] = {}  # the dtype of activations does not change weights
    for case in select_cases(CASES, args.formats):
        rows.append(
            {
                "section": "minilm",
                **case.columns,
                "method": "exact weights",
                "embedding": 0.0,
                **dict(card_errors(case, model.weights, 0.0)),
                "limit": float(limits.median()),
            }
        )
        base: dict[str, float] = {}
        sequential = [Sequential(model, texts["calibration"])] if args.sequential else []
        for method in (*(method for method in methods if method.covers(case)), *sequential):
            if DEVICE.type == "cuda" and isinstance(method, LibraryMethod):  # kernels are compiled once per shape
                for name in LAYERS[: len(LAYERS) // 6]:
                    method(model.weights[name], case, calibration[name], model.biases[name])
            key = replace(case, linear_dtype=None), method.name
            results = rounded[key] = rounded.get(key) or round_layers(method, case)
            weights = {name: result.weight for name, result in results.items()}
            losses = {name: output_loss(weights[name] - model.weights[name], evaluation[name]) for name in LAYERS}
            base = base or losses
            ratios = torch.tensor([losses[name] / base[name] for name in LAYERS])
            error = embedding_error(_linear(weights, model.biases))
            row = {
                "section": "minilm",
                **case.columns,
                "method": method.name,
                "embedding": error,
                **dict(card_errors(case, weights, error)),
            }
            if isinstance(method, LibraryMethod):
                biases = {name: result.bias for name, result in results.items()}
                row["bias"] = embedding_error(_linear(weights, biases))
            solvers = Counter(result.solver for result in results.values())
            weight_errors = [norm(weights[name] - w) / norm(w) for name, w in model.weights.items()]
            rows.append(
                {
                    **row,
                    "median": float(ratios.median()),
                    "worst": float(ratios.max()),
                    "worse": int((ratios > 1.001).sum()),
                    "worst layer": LAYERS[int(ratios.argmax())].removeprefix("encoder.layer."),
                    "weight error": sum(weight_errors) / len(LAYERS),
                    "seconds": sum(result.seconds for result in results.values()),
                    **peak(results.values()),
                    "won by": ", ".join(f"{solver} {count}" for solver, count in solvers.most_common() if solver),
                }
            )
            print(f"{case.format} {case.columns['per']}, {method.name}", file=sys.stderr, flush=True)  # takes minutes
    return rows


class Sequential:
    """Calibrated rounding of each layer on the activations that the rounded layers before it produce.

    With X̂ these activations, quantized as on the newest card, and X those of the unquantized model for the same tokens, the
    rounded weight is W·(XᵀX̂ + λI)·(X̂ᵀX̂ + λI)⁻¹ under X̂ᵀX̂ (GPTAQ, arXiv 2504.02692), λ being 0.05 of the mean diagonal.
    Layers compensate the errors of those before them, so that their own output errors may be larger than by nearest.
    """

    name = "calibrated, sequential"
    _RIDGE = 0.05

    def __init__(self, model: MiniLM, tokens: torch.Tensor):
        self._model, self._tokens = model, tokens

    def round_layers(self, case: Case) -> dict[str, RoundedWeight]:
        """Round all layers in the order in which the model computes them."""
        results: dict[str, RoundedWeight] = {}
        for name in LAYERS:
            if not name.endswith(SAME_AS_QUERY):
                cross, hessian = self.products(name, case, {done: made.weight for done, made in results.items()})
            weight = self._model.weights[name]
            ridge = self._RIDGE * hessian.diagonal().mean() * torch.eye(len(hessian), device=weight.device)
            target = torch.linalg.solve((hessian + ridge).double(), ((cross + ridge).t() @ weight.t()).double())
            statistics = LayerStatistics(hessian.float())
            results[name] = LibraryMethod("", "calibrated")(target.t().float().contiguous(), case, statistics)
        return results

    def products(self, name: str, case: Case, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute XᵀX̂/n and X̂ᵀX̂/n of a layer, after the layers of ``weights``."""
        model, quantize = self._model, partial(quantize_activations, case, capability=max(CARDS.values()))
        rounded, products, tokens = _linear({**model.weights, **weights}, model.biases, quantize), [], 0
        for batch in self._tokens.split(_BATCH):
            exact, quantized = (
                self._capture(name, batch, linear).flatten(0, -2)
                for linear in (model.linear, lambda layer, x: (rounded if layer in weights else model.linear)(layer, x))
            )
            quantized = quantize(quantized)
            products.append(torch.stack([exact.t() @ quantized, quantized.t() @ quantized]))
            tokens += len(exact)
        cross, hessian = sum(products) / tokens
        return cross, hessian

    def _capture(self, name: str, tokens: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Return the activations of a layer."""
        captured = []

        def capture(layer: str, x: torch.Tensor) -> torch.Tensor:
            if layer == name:
                captured.append(x)
            return linear(layer, x)

        self._model.embed(tokens, capture)
        return captured[0]


def _count_texts(args) -> dict[str, int]:
    """Return the number of texts of each split."""
    calibration = args.texts or SPLITS["calibration"] // (4 if args.quick else 1)
    return {split: count * calibration // SPLITS["calibration"] for split, count in SPLITS.items()}


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
