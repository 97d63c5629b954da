"""A linear layer that dequantizes its weight in every forward pass, for formats that this ComfyUI cannot compute with.

The weight stays quantized in memory; activations stay in full precision. ComfyUI's loaders take the layer through their
option ``custom_operations``; ``convert_weight`` and ``set_weight`` are the methods by which ComfyUI applies LoRAs to it.
"""

from collections.abc import Iterable

import torch

from ...quant_core.formats import READABLE, Codec, detect_layer
from ...quant_core.formats.layer_json import CONFIG_KEY, read_config

__all__ = ["make_decoding_operations", "view_as_bytes"]


def view_as_bytes(tensors: dict[str, torch.Tensor], layers: Iterable[str]) -> dict[str, torch.Tensor]:
    """The same tensors, with the stored weights of ``layers`` viewed as uint8.

    ComfyUI 0.3.75 uses the dtype of most weights as the dtype of the model: it would load biases and norms as FP8 too.
    """
    return tensors | {f"{layer}.weight": tensors[f"{layer}.weight"].view(torch.uint8) for layer in layers}


def make_decoding_operations(operations):
    """A subclass of ComfyUI's ``operations`` whose Linear also loads and runs the quantized layers of READABLE formats."""

    class DecodingOperations(operations):
        class Linear(operations.Linear):
            """Linear layer with an optional quantized weight.

            Attributes:
                codec: how the weight is stored; None for an unquantized layer.
                original_shape: (out, in) of the weight before padding and packing.
                original_dtype: dtype of the weight of an unquantized layer.
                parts: suffixes of the layer's other tensors, each a buffer of that name.
                running: whether the forward pass applies ComfyUI's weight functions at the moment.
            """

            codec: Codec | None = None
            running = False

            def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
                loaded = []
                if prefix + CONFIG_KEY in state_dict and prefix + "weight" in state_dict:
                    loaded = self._load_parts(state_dict, prefix)
                super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
                missing[:] = [name for name in missing if name.removeprefix(prefix) not in loaded]

            def _load_parts(self, state_dict, prefix) -> list[str]:
                """Move the layer's tensors other than weight and bias into buffers; returns the names of the buffers.

                The weight stays in ``state_dict``, in its storage dtype.
                """
                layer = prefix.removesuffix(".")
                config = read_config(state_dict[prefix + CONFIG_KEY], f"{layer}: its {CONFIG_KEY} tensor")
                format = READABLE.get(str(config.get("format")))
                if format is not None:
                    state_dict[prefix + "weight"] = state_dict[prefix + "weight"].view(format.storage_dtype)
                qdata = state_dict[prefix + "weight"]
                self.codec = codec = detect_layer(layer, config, state_dict)
                self.original_shape = codec.weight_shape(tuple(qdata.shape), config)
                specs = {**codec.specs(self.original_shape), **codec.optional(self.original_shape)}
                self.parts = [suffix for suffix in specs if suffix != "weight" and prefix + suffix in state_dict]
                self.original_dtype = self.weight.dtype
                self.weight = torch.nn.Parameter(torch.empty_like(qdata), requires_grad=False)
                for suffix in (*self.parts, CONFIG_KEY):
                    self.register_buffer(suffix, state_dict.pop(prefix + suffix))
                self.comfy_cast_weights = True
                return [*self.parts, CONFIG_KEY]

            @property
            def is_quantized(self) -> bool:
                """Whether the weight is quantized at the moment: a LoRA replaces it by an unquantized one."""
                return self._is_stored(self.weight)

            def _is_stored(self, weight: torch.Tensor) -> bool:
                return self.codec is not None and weight.dtype is self.codec.format.storage_dtype

            def _dequantize(self, weight: torch.Tensor, device: torch.device) -> torch.Tensor:
                """The weight (out, in), float32, on ``device``.

                ``weight``: the stored one, in its storage dtype or in one that represents its values exactly.
                """
                assert self.codec is not None
                weight = weight.to(device, non_blocking=True)
                if not self._is_stored(weight):
                    weight = weight.to(self.codec.format.storage_dtype)
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
                # ComfyUI may have cast the stored weight to the dtype in which it computes patches. Weight functions get
                # the dequantized weight, and those of 0.3.75 call this method with it: ``running`` distinguishes the cases.
                if self.codec is None or self.running or not (self.is_quantized or self._is_stored(weight)):
                    return weight
                return self._dequantize(weight, weight.device)

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                # A patched layer stays dequantized, in the dtype of an unquantized layer, until ComfyUI restores its
                # backup of the stored weight.
                if return_weight:
                    return weight
                dtype = self.weight.dtype if self.codec is None else self.original_dtype
                self.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)

    return DecodingOperations
