"""Checks of in_process.py: weights in classes of other packs. The stand-ins have the attributes that those packs' classes have."""

from pathlib import Path

import comfy.lora
import comfy.sd
import comfy.utils
import folder_paths
import torch
from pack.nodes import host
from pack.quant_core import Recipe, quantize_tensors
from pack.quant_core.errors import QuantizationError
from pack.quant_core.sources import SafetensorsFile

TINY = Path(host.__file__).parents[2] / "assets" / "tiny_mmdit_emoji.safetensors"
RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")
LAYER = "joint_blocks.0.x_block.mlp.fc1"
KEY = f"diffusion_model.{LAYER}.weight"


class PackedTensor(torch.Tensor):
    """As ComfyUI-GGUF's GGMLTensor: packed bytes, and the shape of the weight. Here a byte holds round(16 w)."""

    tensor_type = "packed"

    def __new__(cls, data, shape):
        return data.as_subclass(cls)

    def __init__(self, data, shape):
        self.tensor_shape, self.patches = torch.Size(shape), []

    @property
    def shape(self):
        return self.tensor_shape

    def detach(self):
        return self

    def clone(self):
        return self

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        new.tensor_shape, new.patches = self.tensor_shape, list(self.patches)
        return new


def unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor).view(torch.int8).float() / 16


class PackingLayer(torch.nn.Module):
    """As ComfyUI-GGUF's GGMLLayer: its state dict has meta tensors, one more of them for the estimate of memory."""

    def get_weight(self, tensor, dtype):
        weight = unpack(tensor).reshape(tensor.tensor_shape).to(dtype)
        for patches, key in tensor.patches:
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return weight

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = torch.empty(self.weight.size(), device="meta")
        if self.bias is not None:
            destination[f"{prefix}bias"] = torch.empty(self.bias.size(), device="meta")
        destination[f"{prefix}temp.weight"] = torch.empty(4, device="meta")


class WrapperTensor(torch.Tensor):
    """As a tensor of torchao: a shape and dtype without memory, quantized values in an attribute."""

    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)

    def __init__(self, codes):
        self.codes = codes

    def dequantize(self):
        return self.codes.float() / 16

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(str(function))


class NoDequantization(WrapperTensor):
    """As a weight of bitsandbytes: its layer alone can use it."""

    dequantize = torch.Tensor.dequantize


class SplitLayer(torch.nn.Module):
    """As a layer of quanto: the state dict has the parts of its weight."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight.codes"] = self.weight.codes
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias


class StatefulLayer(torch.nn.Module):
    """As a layer of bitsandbytes: the state dict has the quantization state of its weight, of several levels."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight.quant_state.packed__nf4"] = torch.zeros(8, dtype=torch.uint8)
        destination[f"{prefix}weight"] = self.weight.codes


class ExtraLayer(torch.nn.Module):
    """The state dict has a tensor that is not in the layer."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}scale"] = torch.ones(1)


class FourBitLayer(torch.nn.Module):
    """As a layer of nunchaku: quantized values in tensors of its own."""


def load():
    return comfy.sd.load_diffusion_model(str(TINY))


def change(model, weight, layer_class=None) -> dict[str, torch.Tensor]:
    """Replace the weights of all linear layers by ``weight(round(16 w))``; returns the state dict of the replaced values."""
    root = model.model.diffusion_model
    expected = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    for name, module in root.named_modules():
        if isinstance(module, torch.nn.Linear):
            codes = (module.weight.detach().float() * 16).round().clamp(-128, 127).to(torch.int8)
            if layer_class:
                kind = type(module)
                module.__class__ = type(
                    "Linear", (layer_class, kind), {"__module__": "/comfy/custom_nodes/ComfyUI-Other.ops"}
                )
            module.weight = torch.nn.Parameter(weight(codes), requires_grad=False)
            expected[f"{name}.weight"] = codes.float() / 16
    return expected


def packed(codes: torch.Tensor) -> torch.Tensor:
    return PackedTensor(codes.view(torch.uint8).reshape(-1), codes.shape)


DECODED = {
    "layer": (packed, PackingLayer),
    "class": (WrapperTensor, None),
    "parts": (WrapperTensor, SplitLayer),
}


def agree(source, expected: dict[str, torch.Tensor]) -> bool:
    """Whether a source has exactly these tensors; each value is one of a 16-bit dtype."""
    return source.tensors.keys() == expected.keys() and all(
        torch.equal(source.read(name).float(), tensor.float()) and source.tensors[name].shape == tensor.shape
        for name, tensor in expected.items()
    )


def decoded(kind: str) -> dict:
    """A MODEL whose weights are dequantized by their class or their layer."""
    model = load()
    expected = change(model, *DECODED[kind])
    quantized = host.quantize(model, RECIPE, lambda event: None)
    with SafetensorsFile(quantized.files[""]) as file:
        made = {name: file.read(name) for name in file.tensors}
    state = {name: tensor.bfloat16() for name, tensor in expected.items()}
    same = quantize_tensors(state, RECIPE).tensors
    return {
        "values": agree(host.sources.model_weights(model), expected),
        "codes": made.keys() == same.keys() and all(torch.equal(made[name], same[name]) for name in same),
        "loaded": len(host.quantized_layers(host.build_model(model, quantized))) > 0,
    }


def patched() -> dict:
    """LoRAs are applied once, also while another clone of the model is loaded with its own."""
    model = load()
    plain = change(model, packed, PackingLayer)[f"{LAYER}.weight"]
    up, down = torch.ones(plain.shape[0], 2) / 8, torch.ones(2, plain.shape[1]) / 8
    lora = {f"diffusion_model.{LAYER}.lora_{end}.weight": tensor for end, tensor in (("up", up), ("down", down))}
    ours = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    name = f"{LAYER}.weight"

    def read(patcher) -> torch.Tensor:
        return host.sources.model_weights(patcher).read(name)

    def holds() -> dict[str, bool]:
        return {
            "patched": torch.allclose(read(ours), plain + up @ down, atol=1e-6),
            "plain": torch.equal(read(model).float(), plain),
        }

    before, weight = holds(), comfy.utils.get_attr(model.model, KEY)
    weight.patches = [(ours.patches[KEY], KEY)]
    return {"before": before, "loaded": holds(), "kept": len(weight.patches) == 1}


def refused() -> dict[str, str]:
    """Errors for weights that cannot be dequantized, or that are not there."""

    def fail(weight):
        raise KeyError("scale")

    def wrong(weight):
        return torch.zeros(3)

    def broken(dequantize):
        return lambda codes: type(
            "BrokenTensor", (WrapperTensor,), {"dequantize": dequantize, "__module__": "quant_pack.tensors"}
        )(codes)

    cases = {
        "no dequantization": (NoDequantization, None),
        "quantization state": (NoDequantization, StatefulLayer),
        "state dict alone": (lambda codes: codes.float(), ExtraLayer),
        "packed bytes": (lambda codes: codes, FourBitLayer),
        "meta": (lambda codes: torch.empty(codes.shape, device="meta"), None),
        "fails": (broken(fail), None),
        "wrong shape": (broken(wrong), None),
    }
    said = {}
    for name, (weight, layer_class) in cases.items():
        model = load()
        change(model, weight, layer_class)
        try:
            host.sources.model_weights(model).read(f"{LAYER}.weight")
        except QuantizationError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def encoder() -> dict:
    """A CLIP whose layers are packed: the quantized ones compute in a floating-point dtype."""
    from safetensors.torch import save_file

    from __main__ import encode, t5_weights
    from __main__ import load as load_clip

    path = Path(folder_paths.base_path) / "t5.safetensors"
    save_file(t5_weights(), path)
    clip = load_clip(path)
    part = clip.cond_stage_model.t5xxl.transformer
    for module in part.modules():
        if isinstance(module, torch.nn.Linear):
            codes = (module.weight.detach().float() * 16).round().clamp(-128, 127).to(torch.int8)
            module.weight.data.copy_(codes.float() / 16)
    plain = host.build_clip(clip, host.quantize(clip, RECIPE, lambda event: None))
    expected = encode(plain)
    packed_clip = load_clip(path)
    for module in packed_clip.cond_stage_model.t5xxl.transformer.modules():
        if isinstance(module, torch.nn.Linear):
            codes = (module.weight.detach().float() * 16).round().clamp(-128, 127).to(torch.int8)
            module.__class__ = type("Linear", (PackingLayer, type(module)), {})
            module.weight = torch.nn.Parameter(packed(codes), requires_grad=False)
    ours = host.build_clip(packed_clip, host.quantize(packed_clip, RECIPE, lambda event: None))
    return {"layers": len(host.quantized_layers(ours.patcher)), "same": torch.equal(encode(ours), expected)}


def check_all() -> dict:
    return {"decoded": {kind: decoded(kind) for kind in DECODED}, "patched": patched(), "refused": refused()}


CHECKS = {"held_weights": check_all, "held_encoder": encoder}
