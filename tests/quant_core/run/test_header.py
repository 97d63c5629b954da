"""The header of an output: metadata of the source, of ComfyUI and of this package; names that would collide."""

import json

import torch
from safetensors.torch import load, save_file

from learned_rounding.quant_core import Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.output import header_bytes
from learned_rounding.quant_core.run.header import file_metadata, header_bound, planned_configs
from learned_rounding.quant_core.sources import SafetensorsFile
from learned_rounding.quant_core.version import VERSION

from .made_files import LINEARS, RECIPES, metadata_of, raw


def test_a_file_that_stock_comfyui_does_not_load_says_what_does(model_file, tmp_path):
    quantize_file(model_file(), tmp_path / "out.safetensors", Recipe(format="int8_blockwise"))
    assert "int8_blockwise" in metadata_of(tmp_path / "out.safetensors")["note"]


def test_header_and_tensors_say_the_same(model, tmp_path):
    for prefix in ("", "model.diffusion_model."):
        save_file({prefix + name: tensor for name, tensor in model().items()}, tmp_path / "in.safetensors")
        quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", RECIPES["int8 row"], overwrite=True)
        header = json.loads(metadata_of(tmp_path / "out.safetensors")["_quantization_metadata"])
        tensors = load((tmp_path / "out.safetensors").read_bytes())  # not mapped: Windows replaces no mapped file
        beside = {
            name.removesuffix(".comfy_quant"): json.loads(raw(tensor))
            for name, tensor in tensors.items()
            if name.endswith(".comfy_quant")
        }
        assert beside == {prefix + layer: {"format": "int8_tensorwise", "per_row": True} for layer in LINEARS}
        assert header == {
            "format_version": "1.0",
            "layers": {**beside, **{layer: beside[prefix + layer] for layer in LINEARS}},
        }


def test_metadata_of_the_source_is_kept(model_file, tmp_path):
    own = {"format": "pt", "modelspec.title": "Ein Modell ß\U0001f600", "workflow": json.dumps({"a": [1, "\n"]})}
    quantize_file(model_file(**own), tmp_path / "out.safetensors")
    found = metadata_of(tmp_path / "out.safetensors")
    assert {key: found[key] for key in own} == own
    assert set(found) - set(own) == {"_quantization_metadata", "learned_rounding"}
    assert json.loads(found["learned_rounding"])["recipe"] == Recipe().to_dict()


def test_a_source_that_has_what_quantizing_makes_is_refused(tmp_path, listing, sentences, subtests):
    """The output would hold the name twice, or a scale that belongs to other codes."""
    for suffix in ["weight_scale", "comfy_quant", "input_scale"]:
        with subtests.test(suffix):
            save_file({"a.weight": torch.randn(16, 16), f"a.{suffix}": torch.ones(1)}, tmp_path / "model.safetensors")
            with sentences.raises(SourceError):
                quantize_file(
                    tmp_path / "model.safetensors",
                    tmp_path / "out.safetensors",
                    Recipe(preset="none", rounding="nearest"),
                )
            assert listing() == ["model.safetensors"]


def test_a_weight_that_was_cast_without_its_scale_is_refused(sentences, subtests):
    """Quantized values in bfloat16 beside their scale, as of a tool that casts all tensors of an FP8 file."""
    for suffix in [
        "scale_weight",
        "weight_scale_inv",
        "weight_scale_2",
        "weight_zero_point",
        "weight._scale",
        "wscales",
    ]:
        with subtests.test(suffix):
            tensors = {"a.weight": torch.randn(16, 16).bfloat16(), f"a.{suffix}": torch.full((1,), 0.5)}
            with sentences.raises(SourceError):
                quantize_tensors(tensors, Recipe(preset="none", rounding="nearest"))


def test_header_bound_holds_for_the_header_that_is_written(model_file, tmp_path, subtests):
    for kind, recipe in RECIPES.items():
        with subtests.test(kind), SafetensorsFile(model_file(author="me")) as source:
            plan = recipe.plan(source)
            configs = planned_configs(source, plan, recipe)
            metadata = file_metadata(source, plan, recipe, configs, "f" * 64)
            tensors = [(name, source.tensors[name]) for name in plan.output_names()]
            bound = header_bound(source, plan, recipe, calibrated=False, fingerprint="f" * 64)
            assert bound >= header_bytes(tensors, metadata)
            assert bound <= header_bound(source, plan, recipe, calibrated=True, fingerprint="f" * 64)


def test_provenance_names_version_fingerprint_and_recipe(model_file):
    recipe = RECIPES["int8 row"]
    with SafetensorsFile(model_file()) as source:
        metadata = file_metadata(source, recipe.plan(source), recipe, {}, "of the inputs")
    assert json.loads(metadata["learned_rounding"]) == {
        "version": VERSION,
        "fingerprint": "of the inputs",
        "recipe": recipe.to_dict(),
    }


def test_planned_configs_are_those_of_all_layers(model_file):
    recipe = RECIPES["int8 row"]
    with SafetensorsFile(model_file()) as source:
        configs = planned_configs(source, recipe.plan(source), recipe)
    assert configs == {layer: {"format": "int8_tensorwise", "per_row": True} for layer in LINEARS}
