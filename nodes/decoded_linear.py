"""A linear layer that holds codes and decodes them when it runs, for formats that this ComfyUI cannot run by itself.

Weights stay coded in memory; activations stay in full precision. Used through ComfyUI's ``custom_operations``;
``convert_weight`` and ``set_weight`` are what it patches LoRAs through.
"""

import json

import torch

from ..quant_core.checkpoints import TensorInfo
from ..quant_core.checkpoints.verify import layer_encoding

__all__ = ["decoding_operations"]

_KEYS = ("weight_scale", "comfy_quant")


def decoding_operations(operations):
    """A subclass of ComfyUI's ``operations`` whose Linear also reads the coded layers of this pack."""

    class DecodingOperations(operations):
        class Linear(operations.Linear):
            encoding = None

            def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
                names = [prefix + key for key in _KEYS]
                found = {name: state_dict.pop(name) for name in names if name in state_dict}
                codes = state_dict.get(prefix + "weight")
                if codes is not None and len(found) == len(names):
                    self._hold(prefix.removesuffix("."), codes, *(found[name] for name in names))
                super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
                missing[:] = [name for name in missing if name not in names]

            def _hold(self, layer, codes, scale, config):
                tensors = {"weight": codes, "weight_scale": scale}
                infos = {f"{layer}.{key}": TensorInfo(value.dtype, tuple(value.shape)) for key, value in tensors.items()}
                self.encoding = layer_encoding(layer, json.loads(config.cpu().numpy().tobytes()), infos)
                self.weight = torch.nn.Parameter(torch.empty_like(codes), requires_grad=False)
                self.register_buffer("weight_scale", scale.to(torch.float32))
                self.register_buffer("comfy_quant", config)
                self.comfy_cast_weights = True

            @property
            def is_quantized(self) -> bool:
                return self.encoding is not None and self._are_codes(self.weight)

            def _are_codes(self, weight) -> bool:
                return weight.dtype is self.encoding.format.grid.dtype

            def forward_comfy_cast_weights(self, input):
                if not self.is_quantized:
                    return super().forward_comfy_cast_weights(input)
                weight = self.encoding.decode(
                    self.weight.to(input.device, non_blocking=True), self.weight_scale.to(input.device)
                )
                bias = None if self.bias is None else self.bias.to(input.device, input.dtype)
                for function in self.weight_function:
                    weight = function(weight)
                for function in self.bias_function:
                    bias = function(bias)
                return torch.nn.functional.linear(input, weight.to(input.dtype), bias)

            def convert_weight(self, weight, inplace=False, **kwargs):
                # ComfyUI may have cast the codes to the dtype it computes patches in: they are codes all the same.
                if self.encoding is not None and (self.is_quantized or self._are_codes(weight)):
                    return self.encoding.decode(weight, self.weight_scale.to(weight.device))
                return weight

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                # A patched layer stays decoded: exact, and the codes come back when ComfyUI restores its backup.
                if return_weight:
                    return weight
                self.weight = torch.nn.Parameter(weight, requires_grad=False)

    return DecodingOperations
