"""Smoothed NVFP4 layers are computed by ComfyUI where it reads ``pre_quant_scale``, else by this pack."""

from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.calibration import LowRankHessian
from learned_rounding.quant_core.formats.layer_json import QUANTIZATION_KEY, quantization_metadata
from learned_rounding.tests.in_comfyui import IN_COMFYUI
from learned_rounding.tests.nodes.probing import stock_loads, takes_layouts

if IN_COMFYUI:
    import comfy.model_patcher
    import comfy.quant_ops

    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host.decoding import make_quantized_linear
    from learned_rounding.nodes.host.layouts import add_layouts
    from learned_rounding.tests.nodes.host.tiny_model import distance

pytestmark = pytest.mark.usefixtures("in_comfyui")

CHANNELS = 64


def activations(seed: int) -> torch.Tensor:
    x = torch.randn(1024, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[:, ::8] *= 30
    return x


def smoothed():
    """A smoothed layer, and the activations that it was validated on."""
    known, others = activations(0), activations(1)
    made = quantize_weight(
        torch.randn(48, CHANNELS, generator=torch.Generator().manual_seed(2)) * 0.05,
        "nvfp4",
        hessian=known.t() @ known / len(known),
        validation_hessian=LowRankHessian(others.t() / len(others) ** 0.5, torch.zeros(CHANNELS)),
        smoothing=True,
    )
    return made, others


def layer_of(made):
    parts = {name.removeprefix("a."): tensor.clone() for name, tensor in made.tensors("a").items()}
    return make_quantized_linear("a", parts, made.config)


@pytest.mark.parametrize("reads_scale", [True, False], ids=["this-comfyui", "older-comfyui"])
def test_smoothed_layer_is_decoded_only_where_comfyui_ignores_the_scale(_host_with_nvfp4, tmp_path, reads_scale):
    made, x = smoothed()
    tensors, path = made.tensors("a"), tmp_path / "smoothed.safetensors"
    assert "a.pre_quant_scale" in tensors
    save_file(tensors, path, {QUANTIZATION_KEY: quantization_metadata({"a": made.config})})
    entry = comfy.quant_ops.QUANT_ALGOS["nvfp4"]
    if not reads_scale:
        entry = {**entry, "parameters": entry["parameters"] - {"pre_quant_scale"}}
    with mock.patch.dict(comfy.quant_ops.QUANT_ALGOS, nvfp4=entry):
        assert bool(pack.decoding.layers_to_decode(path)) is not reads_scale
        assert distance(layer_of(made)(x), x @ made.dequantize().t()) < 1e-5


@pytest.fixture
def _host_with_nvfp4(host):
    if not stock_loads(host, "nvfp4"):
        pytest.skip("this ComfyUI has no NVFP4 layers")


# Way of applying a patch → largest relative error of the output; a merged weight is quantized again, others are exact.
WAYS = {"merged": 0.2, "saved": 0.2, "little memory": 1e-5, "dynamic VRAM": 1e-5}


def patch_layer(check) -> dict[str, float]:
    """Apply a patch ΔW in each way; returns the errors against x·(W + ΔW)ᵀ, and checks what must hold with any patches."""
    made, x = smoothed()
    difference = torch.randn(48, CHANNELS, generator=torch.Generator().manual_seed(3)) * 0.05
    expected = x @ (made.dequantize() + difference).t()
    key, cpu = "a.weight", torch.device("cpu")
    model = torch.nn.ModuleDict({"a": layer_of(made)})
    layer = model["a"]
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    before = layer(x)
    patcher.add_patches({key: ("diff", (difference,))})
    errors = {}
    for way, options in {"merged": {}, "little memory": {"lowvram_model_memory": 1}}.items():
        patcher.patch_model(device_to=cpu, **options)
        errors[way] = distance(layer(x), expected)
        with check(way):
            assert len(layer.weight_function) == ("lowvram_model_memory" in options)
            patcher.unpatch_model(device_to=cpu)
            assert torch.equal(layer(x), before)
    layer.weight_lowvram_function = comfy.model_patcher.LowVramPatch(key, patcher.patches)
    moved = layer.weight_lowvram_function(layer.weight.dequantize())
    layer.weight_lowvram_function = None
    assert layer.weight_lowvram_function is None
    errors["dynamic VRAM"] = distance(x @ (moved * layer.pre_quant_scale).t(), expected)
    saved = patcher.patch_weight_to_device(key, return_weight=True)
    errors["saved"] = distance(x @ (saved.dequantize() * layer.pre_quant_scale).t(), expected)
    return errors


def test_patches_of_smoothed_layers_apply_to_the_weight_before_smoothing(host, subtests):
    if not takes_layouts(host):
        pytest.skip(f"this pack decodes the smoothed layers of ComfyUI {host.version}, which get patches as they are")
    stock = patch_layer(subtests.test)
    add_layouts()
    ours = patch_layer(subtests.test)
    for way, bound in WAYS.items():
        with subtests.test(way):
            assert stock[way] >= bound  # ComfyUI alone adds the patch to the smoothed weight
            assert ours[way] < bound
