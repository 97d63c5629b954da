"""A MODEL or CLIP whose weights belong to another pack: dequantized by it, else refused by name.

Quantized values are never taken for weights. The stand-ins have the attributes that those packs' classes have.
"""

import pytest
import torch

from learned_rounding.quant_core import Recipe, quantize_tensors
from learned_rounding.quant_core.errors import QuantizationError
from learned_rounding.quant_core.sources import SafetensorsFile
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    import comfy.lora
    import comfy.sd
    import comfy.utils

    from learned_rounding.nodes import host as pack
    from learned_rounding.tests.nodes.host.tiny_model import TINY
    from learned_rounding.tests.nodes.host.tiny_t5 import encode, load_t5, save_t5

pytestmark = pytest.mark.usefixtures("in_comfyui")

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


@pytest.fixture
def model():
    return comfy.sd.load_diffusion_model(str(TINY))


# Who dequantizes → (weight of the stand-in, class of its layer).
DECODED = {"layer": (packed, PackingLayer), "class": (WrapperTensor, None), "parts": (WrapperTensor, SplitLayer)}


@pytest.fixture(params=DECODED)
def decoded(request, model):
    """A MODEL whose weights are dequantized by their class or their layer, and the state dict of the values."""
    return model, change(model, *DECODED[request.param])


def test_weights_are_the_dequantized_values(decoded):
    model, expected = decoded
    source = pack.sources.model_weights(model)
    assert source.tensors.keys() == expected.keys()
    assert {name: info.shape for name, info in source.tensors.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    different = [
        name for name, tensor in expected.items() if not torch.equal(source.read(name).float(), tensor.float())
    ]
    assert different == []  # each value is one of a 16-bit dtype


def test_file_equals_that_of_the_dequantized_values(decoded):
    model, expected = decoded
    quantized = pack.quantize(model, RECIPE, lambda event: None)
    with SafetensorsFile(quantized.files[""]) as file:
        made = {name: file.read(name) for name in file.tensors}
    same = quantize_tensors({name: tensor.bfloat16() for name, tensor in expected.items()}, RECIPE).tensors
    assert made.keys() == same.keys()
    assert [name for name in same if not torch.equal(made[name], same[name])] == []
    assert len(pack.quantized_layers(pack.build_model(model, quantized))) > 0


def test_loras_are_applied_once_also_while_another_clone_is_loaded_with_its_own(model, subtests):
    plain = change(model, packed, PackingLayer)[f"{LAYER}.weight"]
    up, down = torch.ones(plain.shape[0], 2) / 8, torch.ones(2, plain.shape[1]) / 8
    lora = {f"diffusion_model.{LAYER}.lora_{end}.weight": tensor for end, tensor in (("up", up), ("down", down))}
    ours = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    weight = comfy.utils.get_attr(model.model, KEY)

    def read(patcher) -> torch.Tensor:
        return pack.sources.model_weights(patcher).read(f"{LAYER}.weight")

    for state, patches in {"unloaded": [], "loaded": [(ours.patches[KEY], KEY)]}.items():
        weight.patches = patches
        with subtests.test(state):
            assert torch.allclose(read(ours), plain + up @ down, atol=1e-6)
            assert torch.equal(read(model).float(), plain)
    assert len(weight.patches) == 1


def failing(weight):
    raise KeyError("scale")


def with_wrong_shape(weight):
    return torch.zeros(3)


def broken(dequantize):
    members = {"dequantize": dequantize, "__module__": "quant_pack.tensors"}
    return lambda codes: type("BrokenTensor", (WrapperTensor,), members)(codes)


# Weights that cannot be dequantized, or that are not there.
REFUSED = {
    "no dequantization": (NoDequantization, None),
    "quantization state": (NoDequantization, StatefulLayer),
    "state dict alone": (lambda codes: codes.float(), ExtraLayer),
    "packed bytes": (lambda codes: codes, FourBitLayer),
    "meta": (lambda codes: torch.empty(codes.shape, device="meta"), None),
    "fails": (broken(failing), None),
    "wrong shape": (broken(with_wrong_shape), None),
}


def test_weights_that_cannot_be_dequantized_are_refused_by_name(sentences, subtests):
    for name, (weight, layer_class) in REFUSED.items():
        with subtests.test(name):
            model = comfy.sd.load_diffusion_model(str(TINY))
            change(model, weight, layer_class)
            with pytest.raises(QuantizationError) as error:
                pack.sources.model_weights(model).read(f"{LAYER}.weight")
            sentences(f"{type(error.value).__name__}: {error.value}")


def linear_layers(clip):
    return [
        module for module in clip.cond_stage_model.t5xxl.transformer.modules() if isinstance(module, torch.nn.Linear)
    ]


def test_packed_text_encoder_is_quantized_as_its_dequantized_values(host_with_small_encoders, tmp_path):
    """The quantized layers compute in a floating-point dtype."""
    path = save_t5(tmp_path)
    plain, packed_clip = load_t5(path), load_t5(path)
    for module in linear_layers(plain):
        codes = (module.weight.detach().float() * 16).round().clamp(-128, 127).to(torch.int8)
        module.weight.data.copy_(codes.float() / 16)
    for module in linear_layers(packed_clip):
        codes = (module.weight.detach().float() * 16).round().clamp(-128, 127).to(torch.int8)
        module.__class__ = type("Linear", (PackingLayer, type(module)), {})
        module.weight = torch.nn.Parameter(packed(codes), requires_grad=False)
    expected, ours = (
        pack.build_clip(clip, pack.quantize(clip, RECIPE, lambda event: None)) for clip in (plain, packed_clip)
    )
    assert len(pack.quantized_layers(ours.patcher)) == 168
    assert torch.equal(encode(ours), encode(expected))
