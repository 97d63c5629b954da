"""Section ``minilm`` of ``rounding.py``: rounding methods on the weights and activations of a text encoder."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional

from learned_rounding.benchmarks.minilm import LAYERS, SPLITS, Linear, MiniLM
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
from learned_rounding.benchmarks.rounding_sequential import SequentialMethod
from learned_rounding.quant_core.calibration import LayerStatistics

__all__ = ["CARDS", "minilm", "quantize_activations"]

CARDS = {"SM 8.9": (8, 9), "SM 9.0": (9, 0), "SM 12.0": (12, 0)}  # column → compute capability


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
    statistics = {split: model.statistics(tokens) for split, tokens in texts.items()}
    evaluation = _Evaluation(model, texts["evaluation"], statistics["evaluation"])
    calibration = {
        name: replace(statistics["calibration"][name], validation_hessian=statistics["validation"][name].hessian)
        for name in LAYERS
    }
    limit = float(torch.tensor([_noise_shaping_limit(calibration[name].hessian) for name in LAYERS]).median())
    names = ("sequential", "reconstructed") if args.sequential else ()
    sequential = [SequentialMethod(name, args.tensors, texts, calibration, max(CARDS.values())) for name in names]

    def round_layers(method: RoundingMethod | SequentialMethod, case: Case) -> dict[str, RoundedWeight]:
        if isinstance(method, SequentialMethod):
            return method.round_layers(case)
        if DEVICE.type == "cuda" and isinstance(method, LibraryMethod):  # kernels are compiled once per shape
            for name in LAYERS[: len(LAYERS) // 6]:
                method(model.weights[name], case, calibration[name], model.biases[name])
        return {name: method(model.weights[name], case, calibration[name], model.biases[name]) for name in LAYERS}

    rows = []
    rounded: dict[tuple[Case, str], dict[str, RoundedWeight]] = {}  # the dtype of activations does not change weights
    for case in select_cases(CASES, args.formats):
        columns = {"section": "minilm", **case.columns}
        exact = evaluation.embedding_errors(case, model.weights, model.biases)
        rows.append({**columns, "method": "exact weights", **exact, "limit": limit})
        base: dict[str, float] = {}
        for method in (*(method for method in methods if method.covers(case)), *sequential):
            key = replace(case, linear_dtype=None), method.name
            results = rounded[key] = rounded.get(key) or round_layers(method, case)
            weights = {name: result.weight for name, result in results.items()}
            losses = evaluation.output_losses(weights)
            base = base or losses
            biases = {name: made.bias for name, made in results.items()}
            own = biases if isinstance(method, SequentialMethod) else model.biases  # chosen with the weights
            row = {**columns, "method": method.name, **evaluation.embedding_errors(case, weights, own)}
            if isinstance(method, LibraryMethod):
                row["bias"] = evaluation.embedding_error(weights, biases)
            rows.append(row | _compare_layers(losses, base) | _sum_up(results, model))
            print(f"{case.format} {case.columns['per']}, {method.name}", file=sys.stderr, flush=True)  # takes minutes
    return rows


class _Evaluation:
    """Errors on the evaluation texts."""

    def __init__(self, model: MiniLM, tokens: torch.Tensor, statistics: dict[str, LayerStatistics]):
        self._model, self._tokens, self._statistics = model, tokens, statistics
        self._exact = model.embed(tokens)
        _check_embeddings(self._exact, model.topics("evaluation", len(tokens)))

    def embedding_error(
        self, weights: dict, biases: dict, quantize: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    ) -> float:
        """Relative error of the embeddings; ``quantize``: of the activations."""
        embedded = self._model.embed(self._tokens, _linear(weights, biases, quantize))
        return norm(embedded - self._exact) / norm(self._exact)

    def embedding_errors(
        self, case: Case, weights: dict[str, torch.Tensor], biases: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        """The same with unquantized activations, "embedding", and on each card."""
        codec = case.codec(self._model.weights[LAYERS[0]].shape[1])
        errors = {None: self.embedding_error(weights, biases)}  # by element format of the activations
        columns = {"embedding": errors[None]}
        for card, capability in CARDS.items():
            elements = codec.activation_elements(capability) if codec.quantizes_activations(capability) else None
            if elements not in errors:
                quantize = partial(quantize_activations, case, capability=capability)
                errors[elements] = self.embedding_error(weights, biases, quantize)
            columns[card] = errors[elements]
        return columns

    def output_losses(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """√tr(E·H·Eᵀ) of each layer."""
        return {
            name: output_loss(weights[name] - self._model.weights[name], self._statistics[name].hessian)
            for name in LAYERS
        }


def _compare_layers(losses: dict[str, float], base: dict[str, float]) -> dict[str, object]:
    """Columns of the layers' output errors relative to those of another method."""
    ratios = torch.tensor([losses[name] / base[name] for name in LAYERS])
    return {
        "median": float(ratios.median()),
        "worst": float(ratios.max()),
        "worse": int((ratios > 1.001).sum()),
        "worst layer": LAYERS[int(ratios.argmax())].removeprefix("encoder.layer."),
    }


def _sum_up(results: dict[str, RoundedWeight], model: MiniLM) -> dict[str, object]:
    """Columns of the weights' errors and of the cost."""
    errors = [norm(result.weight - model.weights[name]) / norm(model.weights[name]) for name, result in results.items()]
    solvers = Counter(result.solver for result in results.values())
    return {
        "weight error": sum(errors) / len(errors),
        "seconds": sum(result.seconds for result in results.values()),
        **peak(results.values()),
        "won by": ", ".join(f"{solver} {count}" for solver, count in solvers.most_common() if solver),
    }


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
