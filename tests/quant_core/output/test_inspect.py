"""What a look into a file says: counts, formats, and what stock ComfyUI makes of it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.formats.kinds import quantized_formats
from learned_rounding.quant_core.output import inspect_file
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource

INT8 = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")
INT8_TENSOR = Recipe(format="int8_tensorwise", granularity="tensor", rounding="nearest")
FP8 = Recipe(rounding="nearest")


def config(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_plain_weights(model, model_file, sentences):
    path = model_file()
    found = inspect_file(path)
    assert found.path == str(path)
    assert found.size == path.stat().st_size
    assert found.tensors == len(model())
    assert found.dtypes == {
        "BF16": (6, 2 * (40 * 32 + 32 * 16 + 2 * (96 * 32 + 96))),
        "F32": (4, 4 * 2 * (32 + 32 * 80)),
        "F16": (2, 2 * 2 * 80 * 32),
        "I64": (1, 8),
    }
    assert list(found.dtypes) == ["F32", "BF16", "F16", "I64"]  # by falling size
    assert found.quantized == {}
    assert found.made_by == {}
    sentences(found.stock)


def test_safetensors_files(model_file, tmp_path, sentences, subtests):
    for recipe, quantized, since in [
        (FP8, {"float8_e4m3fn per tensor": 6}, "0.3.75"),
        (INT8, {"int8_tensorwise per row": 6}, "0.27"),
        (INT8_TENSOR, {"int8_tensorwise per tensor": 6}, "0.27"),
    ]:
        with subtests.test(quantized=quantized):
            quantize_file(model_file(), tmp_path / "q.safetensors", recipe, overwrite=True)
            found = inspect_file(tmp_path / "q.safetensors")
            assert found.quantized == quantized
            sentences(found.stock)
            assert since in found.stock
            assert found.made_by["recipe"] == recipe.to_dict()
            assert found.made_by["version"]
            assert found.made_by["fingerprint"]
            assert found.dtypes["F8_E4M3" if recipe is FP8 else "I8"][0] == 6
            sentences(str(found).splitlines()[-1])


def test_a_file_of_both_formats_needs_the_newer_release(tmp_path, sentences):
    """0.27 is newer than 0.3.75, whatever the strings say."""
    tensors = {
        "a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.tensor(1.0),
        "a.comfy_quant": config('{"format":"float8_e4m3fn"}'),
        "b.weight": torch.zeros(4, 4, dtype=torch.int8),
        "b.weight_scale": torch.tensor(1.0),
        "b.comfy_quant": config('{"format":"int8_tensorwise"}'),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = inspect_file(tmp_path / "a.safetensors")
    sentences(found.stock)
    assert "0.27" in found.stock
    assert found.quantized == {"float8_e4m3fn per tensor": 1, "int8_tensorwise per tensor": 1}


@pytest.mark.parametrize("bits, kitchen", [(4, False), (6, True)])
def test_files_of_6_bits_need_a_newer_comfy_kitchen(model_file, tmp_path, bits, kitchen, sentences):
    recipe = Recipe(format="asym_w4a8_int8", bits=bits, rounding="nearest")
    quantize_file(model_file(), tmp_path / "q.safetensors", recipe)
    found = inspect_file(tmp_path / "q.safetensors")
    sentences(found.stock)
    assert "0.31" in found.stock
    assert ("comfy-kitchen 0.2.36" in found.stock) is kitchen
    with SafetensorsFile(tmp_path / "q.safetensors") as file:
        assert ("comfy-kitchen 0.2.36" in file.metadata.get("note", "")) is kitchen


def test_a_broken_layer_counts_as_broken(tmp_path):
    save_file(
        {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.comfy_quant": config('{"format":"int8_tensorwise"}')},
        tmp_path / "a.safetensors",
    )
    assert inspect_file(tmp_path / "a.safetensors").quantized == {"int8_tensorwise (broken)": 1}


def test_unknown_formats_are_named(tmp_path, sentences):
    save_file(
        {"a.weight": torch.zeros(4, 4, dtype=torch.uint8), "a.comfy_quant": config('{"format":"nvfp9"}')},
        tmp_path / "a.safetensors",
    )
    found = inspect_file(tmp_path / "a.safetensors")
    sentences(found.stock)
    assert found.quantized == {"nvfp9 (broken)": 1}


def test_layers_that_only_the_header_lists_are_counted(tmp_path):
    header = json.dumps({"format_version": "1.0", "layers": {"a": {"format": "float8_e4m3fn"}}})
    save_file(
        {"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "a.weight_scale": torch.tensor(1.0)},
        tmp_path / "a.safetensors",
        {"_quantization_metadata": header},
    )
    assert inspect_file(tmp_path / "a.safetensors").quantized == {"float8_e4m3fn per tensor": 1}


FP8_WEIGHT = torch.zeros(4, 4).to(torch.float8_e4m3fn)


def test_quantizations_a_source_may_carry(subtests):
    for label, (tensors, formats) in {
        "plain": ({"a.weight": torch.zeros(4, 4)}, []),
        "marker": (
            {"a.weight": torch.zeros(4, 4), "scaled_fp8": torch.zeros(2, dtype=torch.float32)},
            ["scaled fp8 (old)"],
        ),
        "prefixed marker": (
            {"model.diffusion_model.scaled_fp8": torch.zeros(0), "a.weight": FP8_WEIGHT},
            ["scaled fp8 (old)"],
        ),
        "scale_weight": ({"a.weight": FP8_WEIGHT, "a.scale_weight": torch.tensor(1.0)}, ["scaled fp8 (old)"]),
        "e4m3": ({"a.weight": FP8_WEIGHT}, ["plain E4M3 weights"]),
        "e5m2": ({"a.weight": torch.zeros(4, 4).to(torch.float8_e5m2)}, ["plain E5M2 weights"]),
        "two": (
            {"a.weight": FP8_WEIGHT, "b.weight": torch.zeros(4, 4, dtype=torch.int8)},
            ["plain E4M3 weights", "plain INT8 weights"],
        ),
        "bitsandbytes": (
            {"a.weight": torch.zeros(16, 1, dtype=torch.uint8), "a.weight.absmax": torch.zeros(1)},
            ["bitsandbytes"],
        ),
        "bitsandbytes 4 bit": (
            {"a.weight": torch.zeros(16, 1, dtype=torch.uint8), "a.weight.quant_map": torch.zeros(16)},
            ["bitsandbytes"],
        ),
        "int8": (
            {"a.comfy_quant": config('{"format":"int8_tensorwise"}'), "a.weight": torch.zeros(4, 4, dtype=torch.int8)},
            ["int8_tensorwise"],
        ),
        "others": (
            {"a.comfy_quant": config('{"format":"mxfp8"}'), "b.comfy_quant": config('{"format":"nvfp4"}')},
            ["mxfp8", "nvfp4"],
        ),
        "integers": (
            {"position_ids": torch.zeros(1, 4, dtype=torch.int8), "mask": torch.zeros(4, 4, dtype=torch.int8)},
            [],
        ),
    }.items():
        with subtests.test(label):
            assert quantized_formats(TensorSource(tensors)) == formats


def test_a_source_quantized_by_its_header_alone():
    header = json.dumps({"layers": {"a": {"format": "float8_e4m3fn"}}})
    assert quantized_formats(TensorSource({"a.weight": FP8_WEIGHT}, {"_quantization_metadata": header})) == [
        "float8_e4m3fn"
    ]


def test_our_own_output_is_recognised(model_file, tmp_path):
    quantize_file(model_file(), tmp_path / "q.safetensors", FP8)
    with SafetensorsFile(tmp_path / "q.safetensors") as source:
        assert quantized_formats(source) == ["float8_e4m3fn"]


def test_banks_of_experts_are_read_by_the_comfyui_that_has_them(gpt_oss, model_file, tmp_path, sentences):
    path = model_file(tensors=gpt_oss())
    quantize_file(path, tmp_path / "q.safetensors", Recipe(rounding="nearest", preset="none"))
    found = inspect_file(tmp_path / "q.safetensors")
    assert found.layers["float8_e4m3fn per tensor"]["layers.*.mlp.experts.down_proj"] == 1
    sentences(found.stock)
