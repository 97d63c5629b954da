"""Banks of experts in a run: quantized expert by expert, written and reported as one layer."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics
from learned_rounding.quant_core.errors import CalibrationError
from learned_rounding.quant_core.events import LayerStarted
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.quantize_bank import quantize_bank
from learned_rounding.quant_core.run.loop import read_device
from learned_rounding.quant_core.sources import TensorSource

CPU = torch.device("cpu")
BANKS = [f"layers.{block}.mlp.experts.{name}_proj" for block in range(6) for name in ("gate_up", "down")]
MXFP8 = Recipe(format="mxfp8")
NVFP4 = Recipe(format="nvfp4", layer_config='{"_proj": "nvfp4"}')  # the first and the last block too


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def statistics(channels: int = 64) -> LayerStatistics:
    x = torch.randn(256, channels, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -1, channels)
    return LayerStatistics(x.t() @ x / len(x), mean=x.mean(dim=0) + 1)


@pytest.mark.parametrize("recipe", [MXFP8, NVFP4], ids=["mxfp8", "nvfp4"])
def test_a_bank_is_one_layer_of_the_file(gpt_oss, tmp_path, recipe):
    tensors, events = gpt_oss(6), []
    save_file(tensors, tmp_path / "model.safetensors")
    report = quantize_file(tmp_path / "model.safetensors", tmp_path / "q.safetensors", recipe, on_event=events.append)
    made, codec = load_file(tmp_path / "q.safetensors"), make_codec(recipe.format.name)
    finished = {layer.name: layer for layer in report.layers}
    for layer in BANKS:
        weight, bias = tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
        alone = quantize_bank(weight, bias, LayerStatistics(), codec, recipe.rounding, device=CPU)
        assert all(torch.equal(raw(made[name]), raw(tensor)) for name, tensor in alone.tensors(layer).items())
        event = finished[f"{layer}.weight"]
        assert event.shape == weight.shape
        assert event.note == "bank of 3 experts"
        assert event.format == codec.format.name
        assert event.weight_error == alone.weight_error
        assert event.scale == alone.scale_range
    started = [event.name for event in events if isinstance(event, LayerStarted)]
    assert len(started) == 12 + 6
    assert len(set(started)) == 12 + 6
    assert len(report.layers) == 12 + 6
    assert verify_file(tmp_path / "q.safetensors").problems == []
    assert f"{BANKS[0]}.weight 3×144×64" in report.table(worst=30)


def test_one_expert_with_nan_leaves_the_bank_unquantized(gpt_oss):
    tensors = gpt_oss(6)
    tensors[f"{BANKS[2]}.weight"][1, 2, 3] = torch.nan
    made = quantize_tensors(tensors, MXFP8)
    assert made.tensors[f"{BANKS[2]}.weight"].dtype is torch.bfloat16
    (kept,) = made.report.unplanned
    assert kept.name == f"{BANKS[2]}.weight"
    assert f"{BANKS[2]}.comfy_quant" not in made.tensors


def test_a_calibration_without_the_experts_is_reported(gpt_oss, sentences):
    known = InMemoryCalibration({"layers.2.self_attn.q_proj": statistics()})
    report = quantize_tensors(gpt_oss(6), NVFP4, calibration=known).report
    notes = {layer.note for layer in report.layers if "experts" in layer.name}
    assert {layer.output_error for layer in report.layers if "experts" in layer.name} == {None}
    sentences(*notes)


def test_statistics_of_a_bank_are_those_of_all_its_experts(gpt_oss, sentences):
    tensors, layer = gpt_oss(6), BANKS[4]
    made = quantize_tensors(tensors, NVFP4, calibration=InMemoryCalibration({layer: statistics()}))
    (finished,) = [event for event in made.report.layers if event.name == f"{layer}.weight"]
    assert finished.solver != "nearest"
    assert finished.gain < 1
    assert finished.output_error is not None
    assert not torch.equal(made.tensors[f"{layer}.bias"], tensors[f"{layer}.bias"])
    assert made.tensors[f"{layer}.bias"].shape == (3, 144)
    with pytest.raises(CalibrationError) as error:
        quantize_tensors(tensors, NVFP4, calibration=InMemoryCalibration({layer: statistics(32)}))
    sentences(error.value)


def test_mixed_precision_leaves_banks_to_eight_bits(gpt_oss):
    layers = {f"layers.{block}.self_attn.q_proj": statistics() for block in range(6)}
    recipe = Recipe(format="measured", target_size=0.0004)
    made = quantize_tensors(gpt_oss(6), recipe, calibration=InMemoryCalibration(layers))
    formats = {layer.name: layer.format for layer in made.report.layers}
    assert {formats[f"{layer}.weight"] for layer in BANKS} == {"int8_tensorwise"}
    assert made.report.choice.chosen[0] == sum(tensor.nbytes for name, tensor in made.tensors.items())


def test_experts_go_to_the_device_one_by_one(gpt_oss):
    source = TensorSource(gpt_oss(6))
    plan, gpu = MXFP8.plan(source), torch.device("meta")
    assert read_device(source, plan, f"{BANKS[4]}.weight", gpu) == CPU
    assert read_device(source, plan, "layers.2.self_attn.q_proj.weight", gpu) == gpu
    assert read_device(source, plan, "norm.weight", gpu) == CPU
