"""The tiny model in ComfyUI's process. Imported by tests that run there."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import comfy.utils
import torch

from learned_rounding.nodes import host
from learned_rounding.quant_core import Recipe

__all__ = ["ASSETS", "DEVICE", "TINY", "TinyModel", "distance"]

ASSETS = Path(__file__).resolve().parents[3] / "assets"
TINY = ASSETS / "tiny_mmdit_emoji.safetensors"
DEVICE = comfy.model_management.get_torch_device()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error of ``a``."""
    return float((a.float() - b.float()).norm() / b.float().norm())


class TinyModel:
    """The tiny model, a LoRA for it, and its predictions for fixed random inputs."""

    def __init__(self):
        self.original = comfy.sd.load_diffusion_model(str(TINY))
        self.lora = comfy.utils.load_torch_file(str(ASSETS / "tiny_lora_red.safetensors"))
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, 16, 8, 8), (1, 16, 512), (1, 512))
        self.x, context, pooled = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
        self.time = torch.tensor([500.0], device=DEVICE)
        self.context = {"c_crossattn": context, "y": pooled}

    def file(self, source=None, **recipe) -> host.Quantized:
        """Quantize the model, or another one, with a recipe of rounding to nearest."""
        recipe = Recipe(rounding="nearest", **{"convrot": None, **recipe})
        return host.quantize(source or self.original, recipe, lambda event: None)

    def with_lora(self, model):
        return comfy.sd.load_lora_for_models(model, None, self.lora, 1.0, 0.0)[0]

    def sampled(self, model) -> torch.Tensor:
        """Call the model as a sampler does, with its attachments."""
        model.pre_run()
        options = comfy.model_patcher.create_model_options_clone(model.model_options)
        options = comfy.patcher_extension.copy_nested_dicts(options["transformer_options"])
        options["wrappers"] = comfy.patcher_extension.copy_nested_dicts(model.wrappers)
        return self._applied(model, {}, transformer_options=options)

    def run(self, model, **patching) -> torch.Tensor:
        return self._applied(model, patching)

    def _applied(self, model, patching: dict, **options) -> torch.Tensor:
        model.patch_model(device_to=DEVICE, **patching)
        try:
            return model.model.apply_model(self.x, self.time, **self.context, **options)
        finally:
            model.unpatch_model(device_to=torch.device("cpu"))
