"""Smoothing: a change of basis of the input channels, written to a file only where it lowers the error."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file, quantize_weight
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics, LowRankHessian
from learned_rounding.quant_core.convert import migrate_file
from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import Rotation, Smoothing, detect_layer
from learned_rounding.quant_core.formats.layer_json import QUANTIZATION_KEY, quantization_metadata
from learned_rounding.quant_core.layer import output_error
from learned_rounding.quant_core.output import inspect_file, verify_file
from learned_rounding.quant_core.output.verify import verify_source
from learned_rounding.quant_core.sources import TensorSource
from learned_rounding.tests.quant_core.formats.weights import raw

kitchen = pytest.importorskip("comfy_kitchen.tensor")

CHANNELS = 96
CARDS = (10, 0), (9, 0)  # compute capability: multiplies NVFP4, dequantizes it


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(count: int, seed: int, outliers: bool = True) -> torch.Tensor:
    """Activations (count, 96); with outliers one channel in eight is 30 times as large."""
    x = random(count, CHANNELS, seed=seed) @ (random(CHANNELS, CHANNELS, seed=90) * 0.1 + torch.eye(CHANNELS))
    if outliers:
        x[:, ::8] *= 30
    return x


def statistics(outliers: bool = True) -> dict:
    known, others = activations(4096, 1, outliers), activations(512, 2, outliers)
    validation = LowRankHessian(others.t() / len(others) ** 0.5, torch.zeros(CHANNELS))
    return {"hessian": known.t() @ known / len(known), "validation_hessian": validation, "mean": known.mean(dim=0)}


WEIGHT, BIAS = random(80, CHANNELS, seed=5) * 0.05, random(80, seed=6)


@pytest.fixture(scope="module")
def smoothed():
    return quantize_weight(WEIGHT, "nvfp4", bias=BIAS, smoothing=True, **statistics())


def test_outputs_do_not_depend_on_the_basis(subtests):
    x = random(20, CHANNELS, seed=7)
    for basis in (Rotation(16), Smoothing.balance(WEIGHT, random(CHANNELS).abs(), 0.5)):
        with subtests.test(type(basis).__name__):
            torch.testing.assert_close(basis.apply(x) @ basis.apply_weight(WEIGHT).t(), x @ WEIGHT.t())
            torch.testing.assert_close(basis.restore(basis.apply(x)), x)
            torch.testing.assert_close(basis.restore_weight(basis.apply_weight(WEIGHT)), WEIGHT)
            torch.testing.assert_close(basis.apply_hessian(x.t() @ x), basis.apply(x).t() @ basis.apply(x))


def test_scales_balance_activations_and_weight():
    x = activations(2000, 3)
    spread = {}
    for exponent in (0.0, 0.5, 1.0):
        smoothing = Smoothing.balance(WEIGHT, x.square().mean(dim=0).sqrt(), exponent)
        assert smoothing.scale.log().mean().abs() < 0.01
        assert torch.equal(smoothing.scale, smoothing.scale.bfloat16())
        spread[exponent] = [
            float(values.square().mean(dim=0).log().std())
            for values in (smoothing.apply(x), smoothing.apply_weight(WEIGHT))
        ]
    assert spread[0.0][1] < 0.02  # of the weight
    assert spread[1.0][0] < 0.02  # of the activations
    assert spread[0.0][0] > spread[0.5][0] > spread[1.0][0]


def test_scales_of_channels_without_values_are_finite():
    weight, magnitude = WEIGHT.clone(), torch.rand(CHANNELS)
    weight[:, 3] = magnitude[5] = magnitude[8] = 0
    for smoothing in (Smoothing.balance(weight, magnitude, 0.5), Smoothing.balance(weight * 0, magnitude * 0, 0.5)):
        assert smoothing.scale.isfinite().all()
        assert (smoothing.scale > 0).all()


def test_smoothing_lowers_the_error_of_outlier_channels(smoothed):
    """On unseen activations, both on cards that multiply NVFP4 and on those that dequantize it."""
    unseen, plain = activations(2000, 9), quantize_weight(WEIGHT, "nvfp4", bias=BIAS, **statistics())
    before, after = ([output_error(WEIGHT, made, unseen, card) for card in CARDS] for made in (plain, smoothed))
    assert plain.codec.smoothing is None
    assert smoothed.codec.smoothing is not None
    assert after[0] < 0.85 * before[0]
    assert after[1] < before[1]


def test_reported_errors_are_those_of_the_original_basis(smoothed, sentences):
    error = smoothed.dequantize() - WEIGHT
    assert smoothed.weight_error == pytest.approx(float(error.norm() / WEIGHT.norm()), rel=1e-5)
    others = activations(512, 2)
    expected = (others @ error.t()).norm() / (others @ WEIGHT.t()).norm()
    assert smoothed.output_error == pytest.approx(float(expected), rel=1e-3)
    assert 0 < smoothed.solution.gain < 1
    sentences(smoothed.note)


def test_the_bias_is_corrected_for_the_mean_activation(smoothed):
    expected = BIAS - (smoothed.dequantize() - WEIGHT) @ statistics()["mean"]
    torch.testing.assert_close(smoothed.bias, expected, rtol=1e-4, atol=1e-4)


LEFT_OUT = {  # case: (options, statistics)
    "no outliers": ({"smoothing": True}, statistics(outliers=False)),
    "no validation activations": ({"smoothing": True}, {"hessian": statistics()["hessian"]}),
    "not asked for": ({}, statistics()),
    "nearest": ({"rounding": "nearest"}, statistics()),
    "no calibration": ({"rounding": "auto"}, {}),
}


def test_smoothing_is_left_out(subtests):
    for case, (options, known) in LEFT_OUT.items():
        made = quantize_weight(WEIGHT, "nvfp4", **{**known, **options})
        with subtests.test(case):
            assert made.codec.smoothing is None
            assert "a.pre_quant_scale" not in made.tensors("a")


def test_smoothing_that_has_no_effect_is_an_error(sentences):
    with sentences.raises(RecipeError):
        quantize_weight(WEIGHT, "int8_tensorwise", smoothing=True, **statistics())
    with sentences.raises(RecipeError):
        quantize_weight(WEIGHT, "nvfp4", rounding="nearest", smoothing=True, **statistics())
    with sentences.raises(RecipeError):
        Recipe(format="int8_tensorwise", smoothing=True)


def test_smoothing_may_act_on_some_layers_alone():
    assert Recipe(format="int8", smoothing=True, layer_config='{"blocks": {"format": "nvfp4"}}').rounding.smoothing


def test_the_same_seed_gives_the_same_bytes(smoothed):
    again = quantize_weight(WEIGHT, "nvfp4", bias=BIAS, smoothing=True, **statistics())
    tensors = again.tensors("a")
    assert [
        name for name, tensor in smoothed.tensors("a").items() if not torch.equal(raw(tensor), raw(tensors[name]))
    ] == []


def test_a_smoothed_file_is_valid_and_dequantizes_to_the_result(smoothed):
    tensors = smoothed.tensors("a")
    source = TensorSource(tensors, {QUANTIZATION_KEY: quantization_metadata({"a": smoothed.config})}, "model")
    assert verify_source(source, values=True).problems == []
    codec = detect_layer("a", smoothed.config, tensors)
    parts = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
    assert torch.equal(codec.dequantize(parts, tuple(WEIGHT.shape)), smoothed.dequantize())
    decoded = DecodedSource(source)
    assert torch.equal(decoded.read("a.weight"), smoothed.dequantize().bfloat16())
    assert set(decoded.tensors) == {"a.weight", "a.bias"}


def test_a_smoothed_file_names_the_release_that_reads_it(smoothed, tmp_path):
    metadata = {QUANTIZATION_KEY: quantization_metadata({"a": smoothed.config})}
    save_file(smoothed.tensors("a"), tmp_path / "a.safetensors", metadata)
    inspection = inspect_file(tmp_path / "a.safetensors")
    assert inspection.quantized == {str(smoothed.codec): 1}
    assert "smoothed" in str(smoothed.codec)
    assert "0.30 and newer" in inspection.stock


def test_a_run_writes_smoothed_layers_that_migrate_leaves_as_they_are(smoothed, tmp_path):
    source, out, moved = (tmp_path / f"{name}.safetensors" for name in ("source", "out", "moved"))
    save_file({"blocks.0.weight": WEIGHT, "blocks.0.bias": BIAS, "blocks.1.weight": WEIGHT.clone()}, source)
    calibration = InMemoryCalibration({"blocks.0": LayerStatistics(**statistics())})
    recipe = Recipe(
        format="nvfp4", smoothing=True, preset="none", layer_config='{"blocks.0": "nvfp4", "blocks.1": "int8"}'
    )
    report = quantize_file(source, out, recipe, calibration=calibration)
    assert verify_file(out).problems == []
    assert len(report.layers) == 2
    made, expected = load_file(out), smoothed.tensors("blocks.0")
    assert set(expected) <= set(made)
    assert "blocks.1.pre_quant_scale" not in made
    assert [name for name, tensor in expected.items() if not torch.equal(made[name].float(), tensor.float())] == []
    migrate_file(out, moved)
    assert torch.equal(load_file(moved)["blocks.0.pre_quant_scale"], made["blocks.0.pre_quant_scale"])


def test_activations_of_a_file_are_quantized_as_those_of_the_result(smoothed):
    tensors, x = smoothed.tensors("a"), activations(20, 12)
    codec = detect_layer("a", smoothed.config, tensors)
    read = codec.of_values({name.removeprefix("a."): tensor for name, tensor in tensors.items()})
    assert torch.equal(read.quantize_activations(x), smoothed.codec.quantize_activations(x))
    assert not torch.equal(codec.quantize_activations(x), smoothed.codec.quantize_activations(x))


def test_errors_are_those_of_comfyui(smoothed):
    """ComfyUI multiplies the activations by the scale, quantizes them and multiplies by the stored weight."""
    parts = {name.removeprefix("a."): tensor for name, tensor in smoothed.tensors("a").items()}
    x, layout = activations(64, 11), kitchen.TensorCoreNVFP4Layout
    quantized = layout.dequantize(*layout.quantize(x * parts["pre_quant_scale"]))
    params = layout.Params(
        scale=parts["weight_scale_2"],
        block_scale=parts["weight_scale"],
        orig_dtype=torch.float32,
        orig_shape=tuple(WEIGHT.shape),
    )
    output = quantized @ layout.dequantize(parts["weight"], params).t()
    expected = float((output - x @ WEIGHT.t()).norm() / (x @ WEIGHT.t()).norm())
    assert output_error(WEIGHT, smoothed, x, CARDS[0]) == pytest.approx(expected, rel=1e-4)
