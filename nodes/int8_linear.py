"""A linear layer with INT8 weights for ComfyUI releases that know no INT8.

Weights stay int8 in memory and are decoded when the layer runs; activations stay in full precision. Used through
ComfyUI's ``custom_operations``; ``convert_weight`` and ``set_weight`` are what it patches LoRAs through.
"""

import torch

__all__ = ["int8_operations"]

_KEYS = ("weight_scale", "comfy_quant")


def int8_operations(operations):
    """A subclass of ComfyUI's ``operations`` whose Linear also reads int8_tensorwise layers."""

    class Int8Operations(operations):
        class Linear(operations.Linear):
            def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
                scale, _ = (state_dict.pop(prefix + key, None) for key in _KEYS)
                codes = state_dict.get(prefix + "weight")
                if scale is not None and codes is not None and codes.dtype is torch.int8:
                    self.weight = torch.nn.Parameter(torch.empty_like(codes), requires_grad=False)
                    self.register_buffer("weight_scale", scale.to(torch.float32), persistent=True)
                    self.comfy_cast_weights = True
                super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
                if prefix + "weight_scale" in missing:
                    missing.remove(prefix + "weight_scale")

            @property
            def is_quantized(self) -> bool:
                return self.weight.dtype is torch.int8

            def forward_comfy_cast_weights(self, input):
                if not self.is_quantized:
                    return super().forward_comfy_cast_weights(input)
                weight = self.weight.to(input.device, non_blocking=True).to(torch.float32) * self.weight_scale.to(
                    input.device
                )
                bias = None if self.bias is None else self.bias.to(input.device, input.dtype)
                for function in self.weight_function:
                    weight = function(weight)
                for function in self.bias_function:
                    bias = function(bias)
                return torch.nn.functional.linear(input, weight.to(input.dtype), bias)

            def convert_weight(self, weight, inplace=False, **kwargs):
                # ComfyUI may have cast the codes to the dtype it computes patches in: they are codes all the same.
                if self.is_quantized or weight.dtype is torch.int8:
                    return weight.to(torch.float32) * self.weight_scale.to(weight.device)
                return weight

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                # A patched layer stays decoded: exact, and the codes come back when ComfyUI restores its backup.
                if return_weight:
                    return weight
                self.weight = torch.nn.Parameter(weight, requires_grad=False)

    return Int8Operations
