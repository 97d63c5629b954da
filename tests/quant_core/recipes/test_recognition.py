"""Models that nothing recognizes, presets and rules that match nothing, WAN's two models."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from learned_rounding.quant_core import PRESETS, Recipe, quantize_tensors
from learned_rounding.quant_core.errors import (
    AlreadyQuantizedError,
    NothingToQuantizeError,
    RecipeError,
    UnrecognizedModelError,
)
from learned_rounding.quant_core.recipes import make_plan
from learned_rounding.quant_core.recipes.layers import parse_rules
from learned_rounding.quant_core.recipes.presets import AUTO
from learned_rounding.quant_core.recipes.recognition import check_recognized, describe_expert
from learned_rounding.quant_core.sources import TensorInfo
from learned_rounding.tests.architectures import architectures
from learned_rounding.tests.architectures.table import examine
from learned_rounding.tests.architectures.table import source as header

UNKNOWN = {"blocks.0.attn.qkv.weight": (96, 32), "blocks.0.norm.weight": (32,)}

# Models that no preset is for, and the switch "general"


@pytest.mark.soak
def test_models_of_comfyui_with_a_preset_are_recognized(subtests):
    for found in map(examine, architectures()):
        if found.preset and found.quantized:
            with subtests.test(found.name):
                check_recognized(header(found.name), AUTO, found.plan.preset, list(found.quantized))


def test_models_of_comfyui_without_a_preset_are_refused(subtests):
    for found in map(examine, architectures()):
        if not found.preset:
            with subtests.test(found.name), pytest.raises(UnrecognizedModelError):
                make_plan(header(found.name), general=False)


def test_the_switch_allows_models_of_comfyui_without_a_preset(subtests):
    for found in map(examine, architectures()):
        if not found.preset:
            with subtests.test(found.name):
                assert make_plan(header(found.name), general=True).decisions == found.plan.decisions


def test_the_switch_changes_no_plan_of_a_recognized_model(subtests):
    for general in [False, True]:
        for name in ("flux", "wan_22_i2v", "t5", "sd15", "gpt_oss_20b"):
            with subtests.test(name, general=general):
                assert make_plan(header(name), general=general) == examine(name).plan


def test_the_switch_allows_no_text_encoder_that_is_read_in_full_precision(subtests, sentences):
    for general in [None, False, True]:
        with subtests.test(general=general), sentences.raises(NothingToQuantizeError):
            make_plan(header("clip_l"), general=general)


@pytest.fixture
def unknown(header_source):
    return header_source(UNKNOWN)


def test_an_unrecognized_model_is_refused_with_the_switch_that_allows_it(subtests, header_source, sentences):
    for prefix in ["", "model.diffusion_model."]:
        with subtests.test(prefix=prefix):
            source = header_source({prefix + name: shape for name, shape in UNKNOWN.items()})
            with sentences.raises(UnrecognizedModelError):
                make_plan(source, general=False)
            assert [*make_plan(source, general=True).names("quantize")] == [f"{prefix}blocks.0.attn.qkv.weight"]


def test_the_library_knows_its_tensors(unknown):
    assert make_plan(unknown).decisions == make_plan(unknown, general=True).decisions


def test_preset_none_asks_for_the_general_rule(unknown):
    assert make_plan(unknown, preset="none", general=False).decisions == make_plan(unknown).decisions


@pytest.fixture
def two_families(layer_names, header_source):
    return header_source({**layer_names("flux"), **layer_names("sd35_medium")})


def test_a_model_that_several_presets_match_is_refused(two_families, sentences):
    with sentences.raises(UnrecognizedModelError):
        make_plan(two_families, general=False)


def test_a_model_that_several_presets_match_takes_the_one_that_is_named(two_families):
    assert make_plan(two_families, preset="flux", general=False).preset is PRESETS["flux"]


def test_an_unrecognized_model_is_named_by_its_file(unknown):
    with pytest.raises(UnrecognizedModelError) as raised:
        make_plan(unknown, general=False)
    assert raised.value.file == unknown.name


def test_a_long_name_is_shortened(header_source):
    with pytest.raises(UnrecognizedModelError) as raised:
        make_plan(header_source({f"{'a' * 10_000}.weight": (32, 32)}), general=False)
    assert len(str(raised.value)) < 500


def test_a_quantized_source_is_refused_as_such_whatever_it_is(subtests, header_source):
    source = header_source({"conv_first.weight": (4, 4, 3, 3), "a.weight": TensorInfo(torch.float8_e4m3fn, (4, 4))})
    for general in (None, False, True):
        with subtests.test(general=general), pytest.raises(AlreadyQuantizedError):
            make_plan(source, general=general)


def test_nothing_to_quantize_is_said_before_that_nothing_recognizes_it(header_source):
    with pytest.raises(NothingToQuantizeError):
        make_plan(header_source({"a.bias": (8,)}), general=False)


def test_the_switch_is_no_part_of_the_recipe(model):
    plain, general = (quantize_tensors(model(), general=choice) for choice in (None, True))
    assert plain.metadata == general.metadata


def test_a_run_without_the_switch_refuses_an_unrecognized_model(model):
    with pytest.raises(UnrecognizedModelError):
        quantize_tensors(model(), general=False)


# Presets named by the user


def test_a_preset_that_covers_a_layer_vouches_for_the_model(unknown):
    plan = make_plan(unknown, preset="wan", general=False)
    assert plan.preset is PRESETS["wan"]
    assert not plan.warnings


def test_a_preset_of_another_family_is_refused_by_name(subtests, layer_names, header_source, sentences):
    for preset, name in [
        ("wan", "flux"),
        ("flux", "wan_t2v"),
        ("clip", "flux"),
        ("t5xxl", "sdxl"),
        ("sdxl", "qwen_image"),
        ("zimage_l", "t5"),
    ]:
        with subtests.test(preset, model=name):
            with sentences.raises(RecipeError) as raised:
                make_plan(header_source(layer_names(name)), preset=preset)
            assert raised.value.option == "preset"


def test_the_switch_allows_no_preset_of_another_family(subtests):
    for general in [False, True]:
        with subtests.test(general=general), pytest.raises(RecipeError):
            make_plan(header("flux"), preset="wan", general=general)


def test_presets_of_related_families_are_accepted(subtests):
    for preset, name in [
        ("flux", "chroma"),
        ("chroma", "flux"),
        ("ltxv", "qwen_image"),
        ("nerf_small", "chroma_radiance"),
    ]:
        with subtests.test(preset, model=name):
            assert make_plan(header(name), preset=preset, general=False).preset is PRESETS[preset]


def test_a_preset_that_matches_no_layer_of_an_unrecognized_model(unknown, sentences):
    with sentences.raises(UnrecognizedModelError):
        make_plan(unknown, preset="flux", general=False)
    sentences(make_plan(unknown, preset="flux", general=True).warnings)


# Choices that match no layer


def test_rules_that_match_a_layer_are_no_warning(layer_names, header_source):
    used = parse_rules(("img_mlp",), '{"linear1": "int8"}')
    assert make_plan(header_source(layer_names("flux")), rules=used).warnings == ()


def test_rules_that_match_no_layer_are_a_warning(layer_names, header_source, sentences):
    unused = parse_rules(("img_mpl", "img_mlp"), '{"linear9": "int8", "linear1": "int8"}')
    plan = make_plan(header_source(layer_names("flux")), rules=unused)
    assert [rule.pattern for rule in plan.idle] == ["img_mpl", "linear9"]
    sentences(plan.warnings)


def test_warnings_are_bounded(unknown):
    rules = parse_rules([f"{'x' * 500}{index}" for index in range(40)], "")
    (warning,) = make_plan(unknown, rules=rules).warnings
    assert len(warning) < 1000
    assert " and 35 more" in warning


@pytest.fixture
def warned(model):
    """(output, events) of a run with a pattern that finds nothing."""
    events = []
    made = quantize_tensors(model(), Recipe(keep=("nothing",), rounding="nearest"), on_event=events.append)
    return made, events


def test_the_report_has_the_warnings_of_the_plan(warned):
    made, _ = warned
    (warning,) = made.report.warnings
    assert "keep pattern nothing" in warning
    assert f"warning           {warning}" in made.report.table()
    assert made.report.to_dict()["warnings"] == [warning]


def test_the_first_event_has_the_warnings_of_the_plan(warned):
    made, events = warned
    assert events[0].warnings == tuple(made.report.warnings)


# WAN's two models


def wan(name: str, architecture: str = "wan_22_i2v", folder: str = "", **metadata: str):
    """A source with the tensors of a WAN model."""
    tensors = header(architecture).tensors
    paths = {"paths": (Path("/models") / folder / name,)} if folder else {}
    return SimpleNamespace(name=name, tensors=tensors, metadata=metadata, **paths)


def test_an_expert_of_wan_is_told_by_its_name(subtests):
    for name, noise in [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "high"),
        ("wan2.2_i2v_low_noise_14B_fp16.safetensors", "low"),
        ("Wan2_2-I2V-A14B-HIGH_bf16.safetensors", "high"),
        ("Wan2.2-T2V-A14B-LowNoise-F16.gguf", "low"),
        ("wan22_i2v_highnoise.safetensors", "high"),
        ("DasiwaWAN22I2V14B_midnightflirtHigh_v8.safetensors", "high"),
    ]:
        with subtests.test(name):
            assert f"is the {noise}-noise model" in describe_expert(wan(name), PRESETS["wan"])


def test_a_model_of_wan_whose_name_does_not_tell_has_a_conditional_note(subtests):
    for name in ["wan_flow_highres_slow.safetensors", "wan22_high_and_low_merged.safetensors"]:
        with subtests.test(name=name):
            assert "-noise model" not in describe_expert(wan(name), PRESETS["wan"])


def test_an_expert_of_wan_is_told_by_its_folder_or_title(sentences):
    notes = [
        describe_expert(wan("diffusion_pytorch_model.safetensors", folder="low_noise_model"), PRESETS["wan"]),
        describe_expert(wan("model.safetensors", **{"modelspec.title": "WAN 2.2 I2V high noise"}), PRESETS["wan"]),
        describe_expert(wan("model.safetensors", folder="high_quality"), PRESETS["wan"]),
    ]
    gguf = wan("model.gguf")
    gguf.values = {"general.name": "WAN 2.2 low noise", "general.file_type": 7}
    notes.append(describe_expert(gguf, PRESETS["wan"]))
    sentences(*map(str, notes))


def test_the_plan_of_an_expert_of_wan_has_the_note():
    assert make_plan(wan("wan2.2_i2v_low_noise_14B_fp16.safetensors")).warnings


TWO_MODELS = ("wan_t2v", "wan_22_i2v", "wan_22_camera")  # by their tensors


def test_models_that_are_complete_have_no_note(subtests):
    for architecture, name in [
        ("wan_t2v", "wan2.1_t2v_14B_bf16.safetensors"),
        ("wan_t2v", "Wan2_1-T2V-14B_fp16.safetensors"),
        ("wan_t2v", "wan2.1_t2v_14B_low_vram.safetensors"),
        ("flux", "high_noise.safetensors"),
        *(
            (each, "model.safetensors")
            for each in architectures()
            if each.startswith("wan_") and each not in TWO_MODELS
        ),
    ]:
        with subtests.test(architecture, file=name):
            assert describe_expert(wan(name, architecture), examine(architecture).plan.preset) is None


# LTX-Video and LTX-2


def test_files_without_the_configuration_that_comfyui_reads_have_a_note(subtests, sentences):
    for architecture in ["ltxv", "ltxv_13b", "ltx2", "ltx23", "ltx25"]:
        with subtests.test(architecture=architecture):
            source = header(architecture)
            source.paths = (Path("model.safetensors"),)
            (note,) = make_plan(source, general=False).warnings
            sentences(note)


def test_files_with_the_configuration_have_no_note(subtests):
    for architecture in ["ltxv", "ltx2"]:
        with subtests.test(architecture=architecture):
            source = header(architecture)
            source.paths = (Path("model.safetensors"),)
            source.metadata = {"config": '{"transformer": {"causal_temporal_positioning": true}}'}
            assert make_plan(source).warnings == ()


def test_models_that_are_no_files_have_no_note_on_their_configuration(subtests):
    for architecture in ["ltxv", "ltx2"]:
        with subtests.test(architecture=architecture):
            assert examine(architecture).plan.warnings == ()
