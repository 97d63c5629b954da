"""Formats of other quantizers: read with the right values, or refused by name."""

import pytest
import torch
from safetensors.torch import load_file

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.convert import DecodedSource, migrate_file
from learned_rounding.quant_core.errors import AlreadyQuantizedError, SourceError
from learned_rounding.quant_core.formats.external import EXTERNAL, find_external, plain_metadata
from learned_rounding.quant_core.formats.kinds import quantized_formats
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, TensorSource
from learned_rounding.tests.quant_core.formats.external_layers import (
    E4M3,
    INNER,
    LAYER,
    OUT,
    READ,
    REFUSED,
    TORCHAO,
    below,
    hugging_face,
    quanto,
    zeros,
)


def test_weights_are_those_of_the_specification(subtests, layer_file):
    for name, case in READ.items():
        with subtests.test(name), SafetensorsFile(layer_file(case.tensors, case.metadata)) as opened:
            decoded = DecodedSource(opened)
            assert set(decoded.tensors) == {f"{LAYER}.weight", f"{LAYER}.bias", "norm.weight"}
            assert not decoded.metadata
            assert decoded.tensors[f"{LAYER}.weight"] == TensorInfo(torch.bfloat16, (OUT, INNER))
            assert torch.equal(decoded.read(f"{LAYER}.weight"), case.weight.bfloat16())
            assert list(decoded.layers.values()) == [1]
            assert quantized_formats(decoded) == []


def test_requantize_from_the_command_line(subtests, layer_file, capsys):
    for name, case in READ.items():
        path = layer_file(case.tensors, case.metadata)
        new = path.with_name("new.safetensors")
        words = ["quantize", "-i", str(path), "-o", str(new), "--format", "int8_tensorwise"]
        words += ["--no-convrot", "--preset", "none"]
        with subtests.test(name):
            assert main(words) == 1
            assert case.name in capsys.readouterr().err
            assert main([*words, "--requantize"]) == 0
            made = load_file(new)
            weight = made[f"{LAYER}.weight"].float() * made[f"{LAYER}.weight_scale"]
            assert (weight - case.weight).norm() / case.weight.norm() < 0.02
            assert verify_file(new).problems == []
            assert [key for key in made if "_data" in key or "absmax" in key or "inv" in key] == []


def test_migrate_keeps_the_values(subtests, layer_file):
    for name, case in READ.items():
        if case.native is None:
            continue
        path = layer_file(case.tensors, case.metadata)
        new = path.with_name("new.safetensors")
        with subtests.test(name):
            migrate_file(path, new)
            assert verify_file(new).problems == []
            with SafetensorsFile(new) as opened:
                assert quantized_formats(opened) == [case.native]
                assert "tensor_names" not in opened.metadata
                assert torch.equal(DecodedSource(opened).read(f"{LAYER}.weight"), case.weight.bfloat16())
                assert (f"{LAYER}.input_scale" in opened.tensors) == (name == "Hugging Face, static")


def test_formats_that_comfyui_does_not_have_are_not_migrated(subtests, layer_file, sentences):
    for name, case in READ.items():
        if case.native is None:
            path = layer_file(case.tensors, case.metadata)
            with subtests.test(name), sentences.raises(SourceError):
                migrate_file(path, path.with_name("new.safetensors"))


def test_other_formats_are_not_quantized_again(subtests, layer_file, sentences):
    for case, (tensors, _) in REFUSED.items():
        with (
            subtests.test(case),
            SafetensorsFile(layer_file(below(tensors))) as opened,
            sentences.raises(AlreadyQuantizedError),
        ):
            Recipe().plan(opened)


def test_other_formats_are_not_dequantized(subtests, layer_file, sentences):
    for case, (tensors, _) in REFUSED.items():
        with subtests.test(case), SafetensorsFile(layer_file(below(tensors))) as opened, sentences.raises(SourceError):
            DecodedSource(opened).read(f"{LAYER}.weight")


def test_other_formats_are_not_migrated(subtests, layer_file, sentences):
    for case, (tensors, _) in REFUSED.items():
        path = layer_file(below(tensors))
        with subtests.test(case), sentences.raises(Exception):
            migrate_file(path, path.with_name("new.safetensors"))


def test_two_weights_of_one_layer_are_refused(layer_file, sentences):
    path = layer_file(quanto()[0] | {f"{LAYER}.weight": torch.ones(OUT, INNER)})
    with SafetensorsFile(path) as opened, sentences.raises(SourceError):
        DecodedSource(opened)
    with sentences.raises(SourceError):
        migrate_file(path, path.with_name("new.safetensors"))


def test_two_scales_of_one_layer_are_refused(subtests, layer_file, sentences):
    for ours in ("weight_scale", "scale_weight"):
        path = layer_file(hugging_face()[0] | {f"{LAYER}.{ours}": torch.ones(())})
        with subtests.test(ours), SafetensorsFile(path) as opened, sentences.raises(SourceError):
            DecodedSource(opened)


def test_a_layer_with_json_is_in_no_external_format(layer_file):
    """Its JSON decides, and a tensor of another name is a companion of unknown meaning."""
    tensors = {"weight": zeros(E4M3, OUT, INNER), "weight_scale": torch.ones(()), "weight_scale_inv": torch.ones(2, 2)}
    tensors["comfy_quant"] = config_tensor({"format": "float8_e4m3fn"})
    with (
        SafetensorsFile(layer_file(below(tensors))) as opened,
        pytest.raises(SourceError, match="weight_scale_inv belongs to"),
    ):
        DecodedSource(opened)


def test_layers_are_found_in_the_order_of_the_tensors():
    tensors = {}
    for layer in ("b", "a"):
        tensors |= {f"{layer}.weight": zeros(E4M3, 256, 256), f"{layer}.weight_scale_inv": torch.ones(2, 2)}
    assert [layer.name for layer in find_external(TensorSource(tensors))] == ["b", "a"]


def test_every_row_of_the_table_has_one_outcome(subtests):
    """Its layers are dequantized, renamed or refused, and only the first of these need a shape."""
    for entry in EXTERNAL:
        with subtests.test(entry.name, mark=entry.mark):
            assert bool(entry.refusal) + bool(entry.decode) + entry.renamed == 1
            assert (entry.read_shape is None) == (entry.decode is None)
            assert "weight" in entry.parts or entry.refusal
            assert not entry.refusal or "full-precision original" in entry.refusal


def test_metadata_of_torchao_is_left_out_and_other_metadata_kept():
    source = TensorSource({}, TORCHAO | {"modelspec.title": "x"})
    assert plain_metadata(source) == {"modelspec.title": "x"}


def test_damaged_metadata_of_torchao_is_kept():
    assert plain_metadata(TensorSource({}, {"tensor_names": "["})) == {"tensor_names": "["}
