"""The JSON of quantized layers, in tensors and in the header."""

import json
from types import SimpleNamespace

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.formats.layer_json import (
    QUANTIZATION_KEY,
    config_bytes,
    config_tensor,
    file_layers,
    header_layers,
    layer_configs,
    loaded_configs,
    parse_object,
    quantization_metadata,
    read_config,
)
from learned_rounding.quant_core.sources import TensorInfo, TensorSource

CONFIG = {"format": "int8_tensorwise", "per_row": True}
CHECKPOINT = "model.diffusion_model.blocks.0"


def source_of(tensors=(), header=None, **metadata) -> TensorSource:
    """A source with these layers in JSON tensors, and others in the header."""
    if header is not None:
        metadata[QUANTIZATION_KEY] = json.dumps({"layers": header})
    return TensorSource({f"{layer}.comfy_quant": config_tensor(c) for layer, c in dict(tensors).items()}, metadata)


def test_json_has_no_spaces():
    assert config_bytes(CONFIG) == b'{"format":"int8_tensorwise","per_row":true}'


def test_the_tensor_has_the_bytes_of_the_json():
    tensor = config_tensor(CONFIG)
    assert tensor.dtype is torch.uint8
    assert tensor.numpy().tobytes() == config_bytes(CONFIG)


def test_a_config_is_read_back_from_its_tensor():
    assert read_config(config_tensor(CONFIG), "here") == CONFIG


def test_keys_below_params_are_read_where_they_are_not_at_the_top():
    nested = {"group_size": 32, "convrot": True, "other": 1}
    read = read_config(config_tensor({"format": "x", "group_size": 64, "params": nested}), "here")
    assert read == {"format": "x", "group_size": 64, "convrot": True, "params": {"other": 1}}


def test_params_without_other_keys_vanish():
    assert read_config(config_tensor({"format": "x", "params": {"group_size": 32}}), "here") == {
        "format": "x",
        "group_size": 32,
    }


def test_layers_of_a_checkpoint_are_in_the_header_under_both_names():
    assert header_layers({CHECKPOINT: CONFIG, "other": CONFIG}).keys() == {CHECKPOINT, "blocks.0", "other"}


def test_a_file_without_json_tensors_has_the_layers_of_its_header_once():
    assert file_layers({}, header_layers({CHECKPOINT: CONFIG})) == {CHECKPOINT: CONFIG}


def test_json_tensors_name_the_layers_of_a_file():
    assert file_layers({"a": CONFIG}, {"b": CONFIG}) == {"a": CONFIG}


def test_the_header_entry_has_a_version_and_the_spelling_of_the_tensors():
    text = quantization_metadata({"fc": CONFIG})
    assert json.loads(text) == {"format_version": "1.0", "layers": {"fc": CONFIG}}
    assert config_bytes(CONFIG).decode() in text


def test_tensors_and_header_give_the_same_configs(subtests):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    for format, options in (
        ("float8_e4m3fn", {"full_precision_matmul": True}),
        ("int8_blockwise", {"block_size": 8}),
        ("int8_tensorwise", {"convrot": True}),
    ):
        made = quantize_weight(weight, format, **options)
        header = {QUANTIZATION_KEY: quantization_metadata({"fc": made.config})}
        from_tensors, from_header = layer_configs(TensorSource(made.tensors("fc"), header))
        with subtests.test(format):
            assert from_tensors == {"fc": made.config}
            assert from_header == {"fc": made.config}


def test_the_header_overrides_the_tensors():
    source = source_of({"a": CONFIG, "b": CONFIG}, {"a": {"format": "nvfp4"}})
    assert loaded_configs(source) == {"a": {"format": "nvfp4"}, "b": CONFIG}


def test_text_that_is_no_object_is_refused(subtests):
    for text, reason in (
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
    ):
        with subtests.test(text[:10]), pytest.raises(SourceError, match=f"^here is {reason}"):
            parse_object(text, "here")


def test_a_header_that_maps_no_layers_is_refused(subtests):
    for layers in ([], {"a": 1}, {"a": ["format"]}, "x"):
        with subtests.test(layers=layers), pytest.raises(SourceError, match="does not map layers to their formats"):
            layer_configs(source_of(header=layers))


def test_a_format_that_is_no_name_is_refused(subtests):
    for format in (8, ["nvfp4"], {}):
        with (
            subtests.test(format=format),
            pytest.raises(SourceError, match=r"the format of layer a is .* must be a name"),
        ):
            layer_configs(source_of({"a": {"format": format}}))


def test_a_json_tensor_of_another_dtype_is_refused():
    with pytest.raises(SourceError, match=r"tensor a\.comfy_quant must have dtype U8"):
        layer_configs(TensorSource({"a.comfy_quant": torch.ones(10)}))


def test_json_tensors_are_not_read_beyond_four_megabytes():
    read = []
    tensors = {f"{layer}.comfy_quant": TensorInfo(torch.uint8, (3 << 20,)) for layer in "ab"}
    source = SimpleNamespace(
        name="model", metadata={}, tensors=tensors, read=lambda name: read.append(name) or config_tensor(CONFIG)
    )
    with pytest.raises(SourceError, match="take more than 4,194,304 bytes"):
        layer_configs(source)
    assert read == ["a.comfy_quant"]


def test_a_json_tensor_without_a_layer_is_none():
    assert layer_configs(TensorSource({"comfy_quant": config_tensor(CONFIG)})) == ({}, {})
