"""Presets: every file parses, and each family is recognised by its real layer names, and by nothing else's."""

import re
from pathlib import Path

import pytest

from learned_rounding.quant_core import PRESETS, Recipe
from learned_rounding.quant_core.errors import UnknownNameError
from learned_rounding.quant_core.recipes import find_preset, presets, recognise
from learned_rounding.quant_core.recipes.toml import tomllib

FILES = sorted((Path(presets.__file__).parent / "presets").glob("*.toml"))
# What is recognised as what; a family of its own without a preset must be recognised as nothing.
FAMILIES = {
    "flux": "flux",
    "t5": "t5xxl",
    "umt5": "t5xxl",
    "hunyuan": "hunyuan",
    "hunyuan_1_5": "hunyuan",
    "wan_t2v": "wan",
    "wan_i2v": "wan",
    "wan_vace": "wan",
    "wan_s2v": "wan",
    "wan_animate": "wan",
}
OTHERS = {"flux2", "chroma", "chroma_radiance", "qwen_image"}
DIFFUSION = [name for name in FAMILIES if name not in ("t5", "umt5")]


def tencent_spelling(names):
    """Hunyuan Video as published, before ComfyUI renames its layers."""
    renames = (
        ("_attn.qkv.", "_attn_qkv."),
        ("_attn.proj.", "_attn_proj."),
        ("_mod.lin.", "_mod.linear."),
        ("mlp.0.", "mlp.fc1."),
        ("mlp.2.", "mlp.fc2."),
    )
    for new, old in renames:
        names = [name.replace(new, old) for name in names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_parses_and_uses_known_keys(path):
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    assert set(data) <= {"title", "detect", "absent", "include", "keep", "remove"} and data["title"]
    assert all(names and all(isinstance(name, str) for name in names) for names in data.get("detect", []))
    assert all((path.parent / f"{other}.toml").exists() for other in data.get("include", []))
    for rule in (*data.get("keep", ()), *data.get("remove", ())):
        assert set(rule) == {"pattern", "reason"} and rule["reason"]
        re.compile(rule["pattern"])


def test_names():
    assert {"flux", "t5xxl", "wan", "hunyuan"} <= set(PRESETS)
    assert all(find_preset(name) is preset and preset.name == name for name, preset in PRESETS.items())
    assert {"common", "avoid", "auto", "none"}.isdisjoint(PRESETS)  # parts of presets, and words with another meaning
    assert all(preset.title and preset.detect for preset in PRESETS.values())
    assert all(Recipe(preset=name).preset == name for name in (*PRESETS, "auto", "none"))


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="no preset 'hunyuan_video'.*did you mean 'hunyuan'"):
        find_preset("hunyuan_video")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("family", DIFFUSION)
def test_diffusion_models_are_recognised_with_and_without_a_prefix(layer_names, family, prefix):
    assert recognise(layer_names(family, prefix)).name == FAMILIES[family]


@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_text_encoders_are_recognised(layer_names, family):
    assert recognise(layer_names(family)).name == "t5xxl"


def test_a_t5_with_the_names_of_transformers_is_recognised(layer_names):
    names = [*layer_names("t5"), "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    assert recognise(names).name == "t5xxl"
    assert recognise(name for name in names if name != "shared.weight").name == "t5xxl"


@pytest.mark.parametrize("family", ["hunyuan", "hunyuan_1_5"])
def test_hunyuan_is_recognised_as_published(layer_names, family):
    names = tencent_spelling(layer_names(family))
    assert not set(names) & {"double_blocks.0.img_attn.qkv.weight"}
    assert recognise(names).name == "hunyuan"


def test_flux_schnell_is_recognised(layer_names):
    assert recognise(name for name in layer_names("flux") if "guidance_in" not in name).name == "flux"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", sorted(OTHERS))
def test_families_without_a_preset_are_not_taken_for_another(layer_names, family, prefix):
    found = recognise(layer_names(family, prefix))
    assert found is None or found.name not in FAMILIES.values()


@pytest.mark.parametrize("family", sorted({*FAMILIES, *OTHERS}))
def test_no_two_presets_fit_one_family(layer_names, family):
    assert len([preset for preset in PRESETS.values() if preset.fits(layer_names(family))]) <= 1


@pytest.mark.parametrize(
    "preset, gone",
    [(preset, gone) for preset in PRESETS.values() for gone in preset.absent],
    ids=lambda value: getattr(value, "name", value),
)
def test_names_that_must_be_absent_rule_a_family_out(preset, gone):
    assert preset.fits(preset.detect[0])
    for prefix in ("", "model.diffusion_model."):
        assert not preset.fits([*preset.detect[0], prefix + gone])


@pytest.mark.parametrize("gone", ["distilled_guidance_layer.in_proj.weight", "double_stream_modulation_img.lin.weight"])
def test_relatives_of_flux_are_no_flux(layer_names, gone):
    """Chroma and Flux.2, should a fine-tune of theirs carry every name that Flux.1 has."""
    assert recognise([*layer_names("flux"), gone]) is None


def test_a_whole_checkpoint_is_recognised_by_its_diffusion_model(layer_names):
    """Flux with its text encoders and VAE in one file, as ComfyUI's single-file checkpoints hold them."""
    names = {
        **layer_names("flux", "model.diffusion_model."),
        **layer_names("t5", "text_encoders.t5xxl.transformer."),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
        "vae.decoder.mid.attn_1.k.weight": (512, 512, 1, 1),
    }
    assert recognise(names).name == "flux"


@pytest.mark.parametrize(
    "names", [[], ["blocks.0.attn.qkv.weight"], ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"]]
)
def test_too_few_names_are_recognised_as_nothing(names):
    assert recognise(names) is None
