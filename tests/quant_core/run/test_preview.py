"""Previews of runs: sizes against the files that are written, layers, formats and times."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS, Recipe, quantize_file
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.run.preview import preview_run
from learned_rounding.quant_core.sources import SafetensorsFile

CPU = torch.device("cpu")
RECIPES = [{"format": name} for name in FORMATS if name != "int8_tensorwise"] + [
    {"format": "int8_tensorwise", "convrot": False},
    {"format": "int8_tensorwise", "convrot": 16, "keep": ("attn",)},
    {"format": "asym_w4a8_int8", "bits": 6, "rounding": "nearest"},
]


@pytest.fixture
def preview(model_file):
    """preview(calibrated=False, recipe fields) → the preview of the made-up model's file."""

    def make(calibrated: bool = False, **recipe):
        with SafetensorsFile(model_file(author="someone")) as source:
            return preview_run(source, Recipe(**recipe), CPU, calibrated=calibrated)

    return make


def test_preview_equals_the_written_file(preview, model_file, tmp_path, subtests):
    for recipe in RECIPES:
        with subtests.test(recipe):
            found = preview(**recipe)
            source = model_file(author="someone")
            report = quantize_file(source, tmp_path / "q.safetensors", Recipe(**recipe), overwrite=True)
            assert found.bytes_in == model_file(author="someone").stat().st_size
            assert found.bytes_out == report.bytes_out
            assert (tmp_path / "q.safetensors").stat().st_size == report.bytes_out
            assert found.layers == sum(count for _, count in found.formats.values())
            assert len(report.layers) == sum(count for _, count in found.formats.values())
            assert found.unquantized == sum(not kept.removed for kept in report.kept)
            assert next(codec.format.name for codec, _ in found.formats.values()) in {
                layer.format for layer in report.layers
            }


def test_preview_with_convrot_auto_assumes_that_all_layers_are_rotated(preview, model_file, tmp_path):
    found = preview(format="int8_tensorwise")
    quantize_file(model_file(author="someone"), tmp_path / "q.safetensors", Recipe(format="int8_tensorwise"))
    text = len(', "convrot": true, "convrot_groupsize": 16')  # in the JSON of a layer
    assert 0 <= found.bytes_out - (tmp_path / "q.safetensors").stat().st_size <= text * found.layers


def test_preview_reads_no_tensor(header_source, layer_names):
    source = header_source(layer_names("flux"))
    found = preview_run(source, Recipe(format="int8_tensorwise", convrot=True), CPU)
    assert found.bytes_out is not None
    assert 0.49 < found.bytes_out / found.bytes_in < 0.54
    assert list(found.formats) == ["int8_tensorwise per row, ConvRot 256"]


def test_seconds_follow_the_table(preview):
    fast, slow = preview(format="int8_tensorwise", rounding="nearest"), preview(format="int8_tensorwise")
    assert fast.seconds is not None
    assert slow.seconds is not None
    assert 0 < fast.seconds < slow.seconds
    assert preview(format="int8_tensorwise", calibrated=True).seconds > slow.seconds
    assert preview(format="int8_tensorwise", rounding="stochastic").seconds is None  # not in the table


@pytest.mark.parametrize("calibrated", [False, True])
def test_sequential_rounding_needs_a_calibration_before_the_run(preview, calibrated):
    recipe = {"format": "asym_w4a8_int8", "rounding": "sequential"}
    if calibrated:
        assert preview(calibrated=True, **recipe).seconds is None  # not measured on a CPU
        return
    with pytest.raises(RecipeError):
        preview(**recipe)


def test_mixed_precision_has_its_target_size(preview):
    assert preview(calibrated=True, format="measured", target_size=0.5).bytes_out == 500_000_000
    found = preview(calibrated=True, format="measured")
    assert found.bytes_out is None
    assert found.formats == {}
    assert found.seconds is None
    assert found.layers == 6
