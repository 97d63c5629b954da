"""Sequential rounding of the text encoder of section ``minilm``, as Learned Round Quantize does it with a MODEL or CLIP."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from learned_rounding.benchmarks.minilm import LAYERS, MiniLMModule
from learned_rounding.benchmarks.rounding_methods import DEVICE, Case, RoundedWeight
from learned_rounding.quant_core.calibration import LayerStatistics
from learned_rounding.quant_core.layer import Layer
from learned_rounding.quant_core.quantize_layer import quantize_layer
from learned_rounding.quant_core.rounding import RoundingConfig
from learned_rounding.quant_core.sequential import ModelWalk, PendingLayer, ReplayedModel

__all__ = ["SequentialMethod"]

_BATCH = 32  # texts of a call


class SequentialMethod:
    """Sequential or reconstructed rounding, with activations as a card quantizes them.

    Layers make up for the errors of those before them, so that their own output errors may be larger than by nearest.

    Args:
        name: the rounding.
        tensors: of the model.
        texts: split → token ids; texts of the validation split judge.
        statistics: layer → statistics of the calibration texts, for the layer-wise results.
        capability: compute capability of the card.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        texts: Mapping[str, torch.Tensor],
        statistics: Mapping[str, LayerStatistics],
        capability: tuple[int, int],
    ):
        self.name, self._statistics, self._capability = name, statistics, capability
        self._model = MiniLMModule(dict(tensors)).eval().requires_grad_(False).to(DEVICE)
        calls = {split: texts[split].split(_BATCH) for split in ("calibration", "validation")}
        self._calls = [*calls["calibration"], *calls["validation"]]
        self._validation = [False] * len(calls["calibration"]) + [True] * len(calls["validation"])

    def round_layers(self, case: Case) -> dict[str, RoundedWeight]:
        """Round all layers; their time is divided evenly."""
        modules = {name: module for name, module in self._model.named_modules() if name in LAYERS}
        began, made, plain = time.perf_counter(), {}, RoundingConfig("calibrated")
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            model = ReplayedModel(
                root=self._model,
                layers=modules,
                run=lambda index: self._model(self._calls[index]),
                validation=self._validation,
                positions=[0.0] * len(self._calls),
                device=DEVICE,
                device_bytes=8 << 30,
                ram_bytes=0,
                folder=Path(folder),
                fingerprint="",
            )
            options = {"rounding": RoundingConfig(self.name), "capability": self._capability, "weights_only": False}
            with ModelWalk(model, LAYERS, **options, seed=0, emit=lambda event: None, check=lambda: None) as walk:
                for block in walk.blocks:
                    layers = {}
                    for name in block.layers:
                        layer = Layer(modules[name].weight, modules[name].bias, self._statistics[name])
                        codecs = case.config.codecs(layer.weight.shape[1])
                        layers[name] = PendingLayer(layer, quantize_layer(layer, codecs, plain), plain, 0)
                    made |= walk.round_block(layers)
        seconds = (time.perf_counter() - began) / len(LAYERS)
        return {
            name: RoundedWeight(result.dequantize().clone(), seconds, None, result.solver, result.bias)
            for name, result in made.items()
        }
