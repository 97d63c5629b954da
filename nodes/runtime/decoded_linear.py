"""A linear layer that dequantizes its weight when it runs, for formats that this ComfyUI cannot run itself.

The weight stays quantized in memory; activations stay in full precision. Used through ComfyUI's ``custom_operations``;
``convert_weight`` and ``set_weight`` are what it patches LoRAs through.
"""

from collections.abc import Iterable

import torch

from ...quant_core.formats import READABLE, detect_layer
from ...quant_core.formats.layer_json import CONFIG_KEY, read_config

__all__ = ["as_bytes", "decoding_operations"]


def as_bytes(tensors: dict[str, torch.Tensor], layers: Iterable[str]) -> dict[str, torch.Tensor]:
    """The same tensors, with the stored weights of ``layers`` as plain bytes.

    ComfyUI 0.3.75 takes the dtype of most weights for the model's own: it would make biases and norms FP8 as well.
    """
    return tensors | {f"{layer}.weight": tensors[f"{layer}.weight"].view(torch.uint8) for layer in layers}


def decoding_operations(operations):
    """A subclass of ComfyUI's ``operations`` whose Linear also reads the quantized layers of this node pack."""

    class DecodingOperations(operations):
        class Linear(operations.Linear):
            codec = None
            running = False

            def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
                held = []
                if prefix + CONFIG_KEY in state_dict and prefix + "weight" in state_dict:
                    held = self._hold(state_dict, prefix)
                super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
                missing[:] = [name for name in missing if name.removeprefix(prefix) not in held]

            def _hold(self, state_dict, prefix) -> list[str]:
                """Take the layer's tensors out of ``state_dict`` into buffers; returns the buffers' names.

                The weight stays there, in the dtype that it is stored in.
                """
                layer = prefix.removesuffix(".")
                config = read_config(state_dict[prefix + CONFIG_KEY], f"{layer}: its {CONFIG_KEY} tensor")
                format = READABLE.get(config.get("format"))
                if format is not None:
                    state_dict[prefix + "weight"] = state_dict[prefix + "weight"].view(format.storage_dtype)
                qdata = state_dict[prefix + "weight"]
                self.codec = detect_layer(layer, config, state_dict)
                self.original_shape = self.codec.weight_shape(tuple(qdata.shape), config)
                specs = {**self.codec.specs(self.original_shape), **self.codec.optional(self.original_shape)}
                self.parts = [suffix for suffix in specs if suffix != "weight" and prefix + suffix in state_dict]
                self.original_dtype = self.weight.dtype
                self.weight = torch.nn.Parameter(torch.empty_like(qdata), requires_grad=False)
                for suffix in (*self.parts, CONFIG_KEY):
                    self.register_buffer(suffix, state_dict.pop(prefix + suffix))
                self.comfy_cast_weights = True
                return [*self.parts, CONFIG_KEY]

            @property
            def is_quantized(self) -> bool:
                return self.codec is not None and self._is_stored(self.weight)

            def _is_stored(self, weight) -> bool:
                return weight.dtype is self.codec.format.storage_dtype

            def _dequantize(self, weight, device) -> torch.Tensor:
                """The weight (out, in), float32, on ``device``; ``weight``: the stored one, in any dtype that it is exact in."""
                weight = weight.to(device, non_blocking=True)
                weight = weight if self._is_stored(weight) else weight.to(self.codec.format.storage_dtype)
                parts = {suffix: getattr(self, suffix).to(device) for suffix in self.parts}
                return self.codec.dequantize({"weight": weight, **parts}, self.original_shape)

            def forward_comfy_cast_weights(self, input):
                if not self.is_quantized:
                    return super().forward_comfy_cast_weights(input)
                weight = self._dequantize(self.weight, input.device)
                bias = None if self.bias is None else self.bias.to(input.device, input.dtype)
                self.running = True
                try:
                    for function in self.weight_function:
                        weight = function(weight)
                finally:
                    self.running = False
                for function in self.bias_function:
                    bias = function(bias)
                return torch.nn.functional.linear(input, weight.to(input.dtype), bias)

            def convert_weight(self, weight, inplace=False, **kwargs):
                # ComfyUI may have cast the stored weight to the dtype it computes patches in. Only while the layer runs
                # are its weight functions given the dequantized weight; 0.3.75 calls this with it.
                if self.codec is None or self.running or not (self.is_quantized or self._is_stored(weight)):
                    return weight
                return self._dequantize(weight, weight.device)

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                # A patched layer stays dequantized, in the dtype of an unquantized layer; the stored weight comes back
                # when ComfyUI restores its backup.
                if return_weight:
                    return weight
                dtype = self.weight.dtype if self.codec is None else self.original_dtype
                self.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)

    return DecodingOperations
