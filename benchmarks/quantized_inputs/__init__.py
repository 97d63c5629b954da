"""A custom node for benchmarks: exact weights with quantized activations, whose error remains with any rounding of the weights."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # custom_nodes, where the pack itself lies

from learned_rounding.quant_core.formats.detect import detect_layers
from learned_rounding.quant_core.sources import SafetensorsFile

__all__ = ["NODE_CLASS_MAPPINGS"]


def _quantize(codec, module, args):
    return (codec.quantize_activations(args[0]).to(args[0].dtype), *args[1:])


class QuantizeInputs:
    """Quantize the activations of a MODEL's layers as ComfyUI does for a quantized file, and nothing else."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "quantize"
    CATEGORY = "benchmarks"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "file": ("STRING", {})}}

    def quantize(self, model, file):
        with SafetensorsFile(file) as opened:
            codecs = {layer.name: layer.codec for layer in detect_layers(opened)}

        def call(apply_model, given):
            modules = model.model.diffusion_model
            handles = [
                modules.get_submodule(layer).register_forward_pre_hook(partial(_quantize, codec))
                for layer, codec in codecs.items()
            ]
            try:
                return apply_model(given["input"], given["timestep"], **given["c"])
            finally:
                for handle in handles:
                    handle.remove()

        made = model.clone()
        made.set_model_unet_function_wrapper(call)
        return (made,)


NODE_CLASS_MAPPINGS = {"QuantizeInputs": QuantizeInputs}
