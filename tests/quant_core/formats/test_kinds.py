"""Quantizations of a source by name, and what ComfyUI makes of those that no layer JSON names."""

import torch

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.convert import DecodedSource
from learned_rounding.quant_core.errors import AlreadyQuantizedError
from learned_rounding.quant_core.formats.kinds import can_dequantize, find_kinds, quantized_formats
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.quant_core.output import inspect_file, verify_file
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource
from learned_rounding.tests.quant_core.formats.external_layers import (
    E4M3,
    E5M2,
    INNER,
    LAYER,
    OUT,
    PER_ROW,
    READ,
    REFUSED,
    below,
    integers,
    zeros,
)


def test_layers_of_other_quantizers_that_can_be_read_are_named(subtests):
    for name, case in READ.items():
        source = TensorSource(case.tensors, case.metadata)
        with subtests.test(name):
            assert quantized_formats(source) == [case.name]
            assert can_dequantize(source)


def test_layers_of_other_quantizers_that_cannot_be_read_are_named(subtests):
    for case, (tensors, name) in REFUSED.items():
        source = TensorSource(below(tensors))
        with subtests.test(case):
            assert quantized_formats(source) == [name]
            assert not can_dequantize(source)


def test_inspect_names_what_to_do_with_readable_layers(subtests, layer_file):
    for name, case in READ.items():
        found = inspect_file(layer_file(case.tensors, case.metadata))
        with subtests.test(name):
            assert found.quantized == {case.name: 1}
            assert found.layers == {case.name: {"blocks.*.mlp": 1}}
            assert case.name in found.stock
            assert "Stock ComfyUI loads" not in found.stock
            assert "requantize" in found.stock or "migrate" in found.stock


def test_verify_reports_readable_layers_as_one_problem(subtests, layer_file):
    for name, case in READ.items():
        problems = verify_file(layer_file(case.tensors, case.metadata)).problems
        with subtests.test(name):
            if name == "W8A8":  # in our names: the weight and its scale are reported each
                assert len(problems) == 2
            else:
                assert len(problems) == 1
                assert problems[0].startswith(f"Layers in {case.name}: 1. ")


def test_inspect_names_layers_that_cannot_be_read(subtests, layer_file, sentences):
    for case, (tensors, name) in REFUSED.items():
        found = inspect_file(layer_file(below(tensors)))
        with subtests.test(case):
            assert found.quantized[name] == 1
            assert "loads it as plain" not in found.stock
            assert "lrq migrate" not in found.stock
            sentences(found.stock)


def test_verify_finds_layers_that_cannot_be_read(subtests, layer_file):
    for case, (tensors, _) in REFUSED.items():
        with subtests.test(case):
            assert verify_file(layer_file(below(tensors))).problems


def test_json_without_a_format_points_to_migrate(layer_file, capsys, sentences):
    """INT8-Fast wrote ``{"convrot": true}`` before ComfyUI had the format int8_tensorwise."""
    path = layer_file(
        {
            f"{LAYER}.weight": integers(-127, 128, OUT, INNER).to(torch.int8),
            f"{LAYER}.weight_scale": torch.full((OUT, 1), 0.01),
            f"{LAYER}.comfy_quant": config_tensor({"convrot": True, "convrot_groupsize": 64}),
        }
    )
    new = path.with_name("new.safetensors")
    assert inspect_file(path).quantized == {"layer JSON without a format (INT8-Fast)": 1}
    sentences(inspect_file(path).stock, verify_file(path).problems[0])
    assert "lrq migrate" in inspect_file(path).stock
    assert "lrq migrate" in verify_file(path).problems[0]
    with sentences.raises(AlreadyQuantizedError):
        quantize_file(path, new, Recipe())
    assert main(["migrate", "-i", str(path), "-o", str(new)]) == 0
    sentences(capsys.readouterr().out)
    assert verify_file(new).problems == []


LOADED = {
    "plain": {"weight": zeros(E4M3, OUT, INNER)},
    # A parameter of a file cast as a whole.
    "cast as a whole": {"weight": zeros(E5M2, OUT, INNER), "scale": zeros(E5M2, OUT, 1)},
    "old": {"weight": zeros(E4M3, OUT, INNER), "scale_weight": torch.ones(()), "scale_input": torch.ones(())},
}


def test_fp8_that_comfyui_loads_is_not_refused(subtests, layer_file, sentences):
    for name, tensors in LOADED.items():
        path = layer_file(below(tensors) | ({"scaled_fp8": zeros(E4M3, 0)} if name == "old" else {}))
        with subtests.test(name):
            sentences(inspect_file(path).stock)
            assert "Stock ComfyUI loads" in inspect_file(path).stock
            with SafetensorsFile(path) as opened:
                assert can_dequantize(opened)
                assert DecodedSource(opened).layers.total() == 1


def test_old_fp8_without_its_marker_is_taken_for_a_plain_weight():
    (kind,) = find_kinds(TensorSource(below(LOADED["old"]))).values()
    assert not kind.loaded
    assert "scaled_fp8 is missing" in kind.support


def test_plain_weights_have_no_kinds():
    assert find_kinds(TensorSource({f"{LAYER}.weight": torch.ones(OUT, INNER)})) == {}


def test_plain_fp8_beside_quantized_layers_is_not_named():
    """A file whose other weights are FP8 without a scale is in the format of its quantized layers."""
    tensors = below(PER_ROW) | {"other.weight": zeros(E4M3, OUT, INNER)}
    tensors[f"{LAYER}.comfy_quant"] = config_tensor({"format": "int8_tensorwise", "per_row": True})
    assert quantized_formats(TensorSource(tensors)) == ["int8_tensorwise"]
