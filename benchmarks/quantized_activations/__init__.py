"""Custom node for benchmarks: quantize the activations of a model whose weights are unquantized.

Its error is the one that remains with exact weights.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # custom_nodes, which contains the node pack

from learned_rounding.quant_core.formats.detect import detect_layers
from learned_rounding.quant_core.sources import SafetensorsFile

__all__ = ["NODE_CLASS_MAPPINGS"]


def _quantize_first(codec, module, args):
    """Forward pre-hook: replace the activations by quantized activations X̂."""
    x = args[0]
    return (codec.quantize_activations(x.flatten(0, -2)).to(x.dtype).view_as(x), *args[1:])


class QuantizeActivations:
    """Quantize the activations of a MODEL's layers as ComfyUI does for a quantized file; weights are unchanged."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "quantize"
    CATEGORY = "benchmarks"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "file": ("STRING", {})}}

    def quantize(self, model, file):
        with SafetensorsFile(file) as opened:
            codecs = {layer.name: layer.codec for layer in detect_layers(opened)}

        def apply_quantized(apply_model, arguments):
            modules = model.model.diffusion_model
            handles = [
                modules.get_submodule(layer).register_forward_pre_hook(partial(_quantize_first, codec))
                for layer, codec in codecs.items()
            ]
            try:
                return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
            finally:
                for handle in handles:
                    handle.remove()

        patched = model.clone()
        patched.set_model_unet_function_wrapper(apply_quantized)
        return (patched,)


NODE_CLASS_MAPPINGS = {"QuantizeActivations": QuantizeActivations}
