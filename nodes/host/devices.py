"""Cards of a run: ComfyUI's own, or all of its model that this process sees."""

import comfy.model_management
import torch

from ...quant_core import Recipe
from ...quant_core.sources import Source
from ...quant_core.workers import same_model

__all__ = ["ALL_CARDS", "DEVICE_CHOICES", "THIS_CARD", "choose_devices"]

AUTO, THIS_CARD, ALL_CARDS = "auto", "this card", "all cards"
DEVICE_CHOICES = (AUTO, THIS_CARD, ALL_CARDS)
_QUICK = ("nearest", "stochastic", "auto")  # roundings that take as long as reading the weights
_LARGE = 2e9  # bytes of a source from which on the start of a process per card pays


def choose_devices(choice: str, recipe: Recipe, source: Source, *, calibrated: bool) -> tuple[torch.device, ...]:
    """The devices of a run, ComfyUI's own first; its models stay where they are.

    Args:
        choice: one of :data:`DEVICE_CHOICES`. "auto" is all cards where that is faster: for large models and roundings that
            take longer than reading the weights.
        recipe, source, calibrated: of the run.
    """
    own = comfy.model_management.get_torch_device()
    quick = recipe.resolve(calibrated).rounding in _QUICK and not recipe.format.measured
    small = sum(info.nbytes for info in source.tensors.values()) < _LARGE
    one = choice == THIS_CARD or (choice == AUTO and (quick or small or recipe.rounding.runs_model))
    return (own,) if one or own.type != "cuda" else same_model(own)
