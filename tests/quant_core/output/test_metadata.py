"""What a quantized file says of itself."""

import json
from pathlib import Path

import pytest
import torch

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.formats.layer_json import layer_configs, quantization_metadata
from learned_rounding.quant_core.output import loading_note, provenance
from learned_rounding.quant_core.recipes.toml import tomllib
from learned_rounding.quant_core.sources import TensorSource

CONFIG = {"format": "int8_tensorwise", "per_row": True}


def config_tensor(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def test_layers_of_a_checkpoint_are_listed_under_both_names():
    """ComfyUI before 0.27 looks them up without the prefix, later releases with it."""
    layers = json.loads(quantization_metadata({"model.diffusion_model.a": CONFIG, "text_encoders.b": CONFIG}))["layers"]
    assert layers == {"model.diffusion_model.a": CONFIG, "a": CONFIG, "text_encoders.b": CONFIG}


def test_header_entry_names_its_version_and_is_one_line():
    text = quantization_metadata({"a": CONFIG})
    assert text == '{"format_version":"1.0","layers":{"a":{"format":"int8_tensorwise","per_row":true}}}'


NESTED = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64, "note": 1}}


@pytest.mark.parametrize(
    "more, expected",
    [
        ({}, {"convrot": True, "convrot_groupsize": 64}),
        ({"convrot_groupsize": 16}, {"convrot": True, "convrot_groupsize": 16}),
        ({"convrot": False}, {"convrot": False, "convrot_groupsize": 64}),
    ],
    ids=["only under params", "a size on top", "switched off on top"],
)
def test_params_are_read_as_comfyui_does(more, expected):
    """What stands beside ``params`` comes first, and what ComfyUI does not read there stays there."""
    config = NESTED | more
    header = {"_quantization_metadata": json.dumps({"layers": {"a": config}})}
    flat = {"format": "int8_tensorwise", "params": {"note": 1}} | expected
    assert (
        layer_configs(TensorSource({"a.comfy_quant": config_tensor(json.dumps(config).encode())}, header))
        == ({"a": flat},) * 2
    )


def test_params_that_are_no_options_stay():
    config = {"format": "int8_tensorwise", "params": [1]}
    assert layer_configs(TensorSource({"a.comfy_quant": config_tensor(json.dumps(config).encode())}))[0] == {
        "a": config
    }


def test_plain_weights_have_no_configs():
    assert layer_configs(TensorSource({"a.weight": torch.zeros(2, 2)})) == ({}, {})
    assert provenance(TensorSource({"a.weight": torch.zeros(2, 2)})) == {}


@pytest.mark.parametrize(
    "tensor",
    [
        config_tensor(b"{"),
        config_tensor(b"\xff\xfe\xfd"),
        config_tensor(b"[1]"),
        config_tensor(b""),
        torch.zeros(4),
    ],
)
def test_damaged_config_tensors(tensor, sentences):
    with sentences.raises(SourceError):
        layer_configs(TensorSource({"a.comfy_quant": tensor}, name="f.safetensors"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": []}', '{"layers": {"a": 1}}', '{"layers": null}'])
def test_damaged_header_entries(text, sentences):
    with sentences.raises(SourceError):
        layer_configs(TensorSource({}, {"_quantization_metadata": text}, name="f.safetensors"))


def test_damaged_provenance(sentences):
    with sentences.raises(SourceError):
        provenance(TensorSource({}, {"learned_rounding": "{"}))


def test_the_note_names_this_pack_for_formats_that_stock_comfyui_does_not_load(sentences):
    assert loading_note({"a": CONFIG, "b": {"format": "float8_e4m3fn"}}) == {}
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    note = loading_note({"a": CONFIG, "b": {"format": "int8_blockwise"}, "c": {"format": "float8_e4m3fn_rowwise"}})[
        "note"
    ]
    sentences(note)
    assert loading_note({"a": CONFIG}, [None]) == {}
    newer = loading_note({"a": CONFIG}, [None, "0.2.36", "0.2.4"])["note"]
    sentences(newer)
    assert "comfy-kitchen 0.2.36 or newer" in newer
    assert loading_note({"b": {"format": "int8_blockwise"}}, ["0.2.36"])["note"].startswith(
        "ComfyUI loads int8_blockwise layers with the node pack"
    )
    assert project["tool"]["comfy"]["DisplayName"] in note and project["project"]["urls"]["Repository"] in note
