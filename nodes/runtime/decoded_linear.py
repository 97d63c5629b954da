"""A linear layer that holds codes and decodes them when it runs, for formats that this ComfyUI cannot run by itself.

Weights stay coded in memory; activations stay in full precision. Used through ComfyUI's ``custom_operations``;
``convert_weight`` and ``set_weight`` are what it patches LoRAs through.
"""

from collections.abc import Iterable

import torch

from ...quant_core.formats import find_format
from ...quant_core.output.metadata import read_config
from ...quant_core.output.verify import layer_encoding
from ...quant_core.sources import TensorInfo

__all__ = ["as_bytes", "decoding_operations"]

_KEYS = ("weight_scale", "comfy_quant")


def as_bytes(tensors: dict[str, torch.Tensor], layers: Iterable[str]) -> dict[str, torch.Tensor]:
    """The same tensors, with the codes of ``layers`` as plain bytes.

    ComfyUI 0.3.75 takes the dtype of most weights for the model's own: it would make biases and norms FP8 as well.
    """
    return tensors | {f"{layer}.weight": tensors[f"{layer}.weight"].view(torch.uint8) for layer in layers}


def decoding_operations(operations):
    """A subclass of ComfyUI's ``operations`` whose Linear also reads the coded layers of this pack."""

    class DecodingOperations(operations):
        class Linear(operations.Linear):
            encoding = None
            running = False

            def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
                names = [prefix + key for key in _KEYS]
                found = {name: state_dict.pop(name) for name in names if name in state_dict}
                codes = state_dict.get(prefix + "weight")
                if codes is not None and len(found) == len(names):
                    held = self._hold(prefix.removesuffix("."), codes, *(found[name] for name in names))
                    state_dict[prefix + "weight"] = held
                super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
                missing[:] = [name for name in missing if name not in names]

            def _hold(self, layer, codes, scale, config):
                """Become a layer of these codes, which are returned in their own dtype."""
                entries = read_config(config, f"{layer}: its comfy_quant tensor")
                codes = codes.view(find_format(entries["format"]).grid.dtype)
                tensors = {"weight": codes, "weight_scale": scale}
                infos = {
                    f"{layer}.{key}": TensorInfo(value.dtype, tuple(value.shape)) for key, value in tensors.items()
                }
                self.encoding = layer_encoding(layer, entries, infos)
                self.made_dtype = self.weight.dtype
                self.weight = torch.nn.Parameter(torch.empty_like(codes), requires_grad=False)
                self.register_buffer("weight_scale", scale.to(torch.float32))
                self.register_buffer("comfy_quant", config)
                self.comfy_cast_weights = True
                return codes

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
                # ComfyUI may have cast the codes to the dtype it computes patches in: they are codes all the same.
                # Only while the layer runs, its weight functions are given the decoded weight; 0.3.75 brings it here.
                if self.encoding is None or self.running or not (self.is_quantized or self._are_codes(weight)):
                    return weight
                return self.encoding.decode(weight, self.weight_scale.to(weight.device))

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                # A patched layer stays decoded, in the dtype it would have had without codes; the codes come back when
                # ComfyUI restores its backup.
                if return_weight:
                    return weight
                dtype = self.weight.dtype if self.encoding is None else self.made_dtype
                self.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)

    return DecodingOperations
