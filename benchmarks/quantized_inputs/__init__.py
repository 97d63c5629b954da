"""A custom node for benchmarks: exact weights with quantized inputs, the floor below which no rounding of weights gets."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # custom_nodes, where the pack itself lies

from learned_rounding.quant_core.formats.layer_json import layer_configs
from learned_rounding.quant_core.output.verify import layer_encoding
from learned_rounding.quant_core.sources import SafetensorsFile

__all__ = ["NODE_CLASS_MAPPINGS"]


def _quantize(encoding, module, args):
    return (encoding.quantize_activations(args[0]).to(args[0].dtype), *args[1:])


class QuantizeInputs:
    """Quantizes the inputs of a MODEL's layers as a quantized file has them, and nothing else."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "quantize"
    CATEGORY = "benchmarks"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "file": ("STRING", {})}}

    def quantize(self, model, file):
        with SafetensorsFile(file) as opened:
            configs, _ = layer_configs(opened)
            layers = {layer: layer_encoding(layer, config, opened.tensors) for layer, config in configs.items()}

        def call(apply_model, given):
            modules = model.model.diffusion_model
            handles = [
                modules.get_submodule(layer).register_forward_pre_hook(partial(_quantize, encoding))
                for layer, encoding in layers.items()
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
