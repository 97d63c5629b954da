"""What a quantized file says of itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.formats.layer_json import layer_configs, quantization_metadata
from learned_rounding.quant_core.output import PROVENANCE_KEY, inspect_file, loading_note, provenance, verify_file
from learned_rounding.quant_core.output.metadata import describe_model_run
from learned_rounding.quant_core.recipes.toml import tomllib
from learned_rounding.quant_core.run.blocks import WalkSummary
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource

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


def test_params_are_read_as_comfyui_does(subtests):
    """What stands beside ``params`` comes first, and what ComfyUI does not read there stays there."""
    for label, (more, expected) in {
        "only under params": ({}, {"convrot": True, "convrot_groupsize": 64}),
        "a size on top": ({"convrot_groupsize": 16}, {"convrot": True, "convrot_groupsize": 16}),
        "switched off on top": ({"convrot": False}, {"convrot": False, "convrot_groupsize": 64}),
    }.items():
        with subtests.test(label):
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


def test_damaged_config_tensors(sentences, subtests):
    for tensor in [
        config_tensor(b"{"),
        config_tensor(b"\xff\xfe\xfd"),
        config_tensor(b"[1]"),
        config_tensor(b""),
        torch.zeros(4),
    ]:
        with subtests.test(tensor=tensor), sentences.raises(SourceError):
            layer_configs(TensorSource({"a.comfy_quant": tensor}, name="f.safetensors"))


def test_damaged_header_entries(sentences, subtests):
    for text in ["", "{", "[]", '{"layers": []}', '{"layers": {"a": 1}}', '{"layers": null}']:
        with subtests.test(text), sentences.raises(SourceError):
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
    assert project["tool"]["comfy"]["DisplayName"] in note
    assert project["project"]["urls"]["Repository"] in note


SUMMARIES = {
    "activations quantized": WalkSummary("10.0", 64, 0.1234, 0.0651, blocks={"calibrated": 17, "sequential": 40}),
    "none quantized": WalkSummary("8.9", 64, 0.0651),
    "any card that multiplies the format": WalkSummary("native", 64, 0.0684, 0.0651),
    "not followed": WalkSummary("9.0", 64, unfollowed="blocks.3 is called twice"),
    "not measured": WalkSummary("9.0", 64),
}


@pytest.fixture
def file_with(model_file, tmp_path):
    """Function: path of a quantized file whose header has these values of a run with the model."""

    def make(values):
        provenance = {**json.loads(metadata[PROVENANCE_KEY]), "sequential": values}
        save_file(tensors, path, {**metadata, PROVENANCE_KEY: json.dumps(provenance)})
        return path

    path = tmp_path / "q.safetensors"
    quantize_file(model_file(), path, Recipe(rounding="nearest"))
    tensors = load_file(path)
    with SafetensorsFile(path) as file:
        metadata = dict(file.metadata)
    return make


def test_inspect_and_verify_show_the_card_and_both_errors(file_with, sentences, capsys, subtests):
    for name, summary in SUMMARIES.items():
        with subtests.test(name):
            path = file_with(summary.to_dict())
            result = verify_file(path)
            assert result.problems == []
            assert result.model_run in str(inspect_file(path))
            assert result.model_run in str(summary)
            assert main(["verify", str(path)]) == 0
            assert result.model_run in capsys.readouterr().out
            sentences(result.model_run, str(summary))


def test_other_files_say_nothing_of_it(model_file, tmp_path):
    quantize_file(model_file(), tmp_path / "q.safetensors", Recipe(rounding="nearest"))
    assert verify_file(tmp_path / "q.safetensors").model_run == ""
    assert "running model" not in str(inspect_file(tmp_path / "q.safetensors"))


def test_values_of_unknown_origin_are_left_out(file_with, subtests):
    for values in [
        None,
        [],
        "text",
        {"output_error": 10**400, "card": {}},
        {"output_error": float("nan"), "unfollowed": ["x"]},
        {"output_error": 0.5, "weights_only_error": "0", "calls": 1e300, "card": "x" * 10000},
    ]:
        with subtests.test(values=values):
            path = file_with(values)
            assert verify_file(path).problems == []
            assert max(map(len, str(inspect_file(path)).splitlines())) <= 2000
            assert isinstance(describe_model_run(values), str)
