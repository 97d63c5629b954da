"""A custom node for the tests: what a MODEL really holds, told from inside the server."""

import json

import torch

CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def _quantized_layers(model):
    """{module: dtype of its codes}; knows ComfyUI's tensor class and this pack's decoding layer by their attributes."""
    found = {}
    for name, module in model.model.named_modules():
        weight = getattr(module, "weight", None)
        codes = getattr(weight, "_qdata", weight)
        if isinstance(weight, torch.Tensor) and codes.dtype in CODES:
            found[name.removeprefix("diffusion_model.")] = str(codes.dtype).removeprefix("torch.")
    return found


class ProbeModel:
    """Shows the quantized layers, the sampling shift and the number of patches of a MODEL."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "probe"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def probe(self, model):
        sampling = model.get_model_object("model_sampling")
        text = json.dumps(
            {"layers": _quantized_layers(model), "shift": float(sampling.shift), "patches": len(model.patches)}
        )
        return {"ui": {"text": [text]}}


NODE_CLASS_MAPPINGS = {"ProbeModel": ProbeModel}
