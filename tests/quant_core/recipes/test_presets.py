"""Presets as files: they parse, their names are those users know, and what tells families apart does.

That each family is recognised by its real tensors, and what its rules hit there: test_architectures.py.
"""

import re
from pathlib import Path

import pytest
import torch

from learned_rounding.quant_core import PRESETS, Recipe
from learned_rounding.quant_core.errors import UnknownNameError
from learned_rounding.quant_core.recipes import find_preset, presets, recognize_preset
from learned_rounding.quant_core.recipes.presets import ALIASES, COMMON, GENERAL, Mark
from learned_rounding.quant_core.recipes.toml import tomllib
from learned_rounding.quant_core.sources import TensorInfo
from learned_rounding.tests.architectures import architectures, read

FILES = sorted((Path(presets.__file__).parent / "presets").glob("*.toml"))
KEYS = {"title", "aliases", "include", "detect", "absent", "blocks", "encoders", "keep", "remove", "eight_bits"}
# The names of the published tool's keep lists, all of them.
VOCABULARY = """
    t5xxl mistral visual generic_text gemma4 qwen35 flux2 distillation_large distillation_small nerf_large nerf_small
    radiance wan hunyuan qwen zimage zimage_l zimage_s zimage_refiner lens anima krea2 ideogram4 boogu ltxv2
"""
BY_NAME = "flux sdxl sd15 sd3 lumina2 hidream chroma auraflow pixart mochi cosmos ltxv ace_step umt5 clip_l clip_g llama gemma3"


def infos(names, shape=(8, 8)):
    """{name: info}, from names or from {name: shape}."""
    shapes = names if isinstance(names, dict) else dict.fromkeys(names, shape)
    return {name: TensorInfo(torch.bfloat16, tuple(shape)) for name, shape in shapes.items()}


def marked(preset):
    """Tensors that just satisfy the first list of marks."""
    return infos({mark.name: [side or 8 for side in mark.shape or (8, 8)] for mark in preset.detect[0]})


def tencent_spelling(shapes):
    """Hunyuan Video as published, before ComfyUI renames its layers."""
    renames = (
        ("_attn.qkv.", "_attn_qkv."),
        ("_attn.proj.", "_attn_proj."),
        ("_attn.norm.query_norm.", "_attn_q_norm."),
        ("_attn.norm.key_norm.", "_attn_k_norm."),
        (".norm.query_norm.", ".q_norm."),
        (".norm.key_norm.", ".k_norm."),
        ("_mod.lin.", "_mod.linear."),
        ("mlp.0.", "mlp.fc1."),
        ("mlp.2.", "mlp.fc2."),
    )
    for new, old in renames:
        shapes = {name.replace(new, old): shape for name, shape in shapes.items()}
    return shapes


# List of a model of autumn 2026 → its preset.
NEWEST = {
    "kandinsky6_lite": "kandinsky6",
    "kandinsky6_pro": "kandinsky6",
    "ltx25": "ltxv2",
    "minimax_h3_pruned": "minimax_h3",
    "prism": "prism",
    "qwen_image_21": "qwen21",
    "qwen_image_21_split": "qwen21",
    "sensenova_u15": "sensenova",
    "yue2": "yue2",
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", NEWEST)
def test_newest_models_have_presets(layer_names, name, prefix):
    assert recognize_preset(infos(layer_names(name, prefix))) is PRESETS[NEWEST[name]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_parses_and_uses_known_keys(path):
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    assert set(data) <= KEYS and data["title"] and set(data) & {"keep", "include"}
    assert all(marks and all(isinstance(mark, str) for mark in marks) for marks in data.get("detect", []))
    assert all((path.parent / f"{other}.toml").exists() for other in data.get("include", []))
    for rule in (*data.get("keep", ()), *data.get("remove", ()), *data.get("eight_bits", ())):
        assert {"pattern", "reason"} <= set(rule) <= {"pattern", "reason", "cannot", "table"} and rule["reason"]
        re.compile(rule["pattern"])


def test_names():
    assert {*VOCABULARY.split(), *BY_NAME.split()} <= {*PRESETS, *ALIASES}
    assert all(find_preset(name) is preset and preset.name == name for name, preset in PRESETS.items())
    assert all(find_preset(alias) is preset for alias, preset in ALIASES.items())
    # parts of presets, and words with another meaning
    assert {"common", "_common", "auto", "none"}.isdisjoint({*PRESETS, *ALIASES})
    assert len(ALIASES) == sum(len(preset.aliases) for preset in PRESETS.values()) and not set(ALIASES) & set(PRESETS)
    assert len({preset.title for preset in PRESETS.values()}) == len(PRESETS)
    assert all(Recipe(preset=name).preset == name for name in (*PRESETS, *ALIASES, "auto", "none"))


def test_an_unknown_preset_suggests_the_nearest(sentences):
    with sentences.raises(UnknownNameError):
        find_preset("hunyuan_vidio")


@pytest.mark.parametrize("family", ["hunyuan", "hunyuan_1_5"])
def test_hunyuan_is_recognised_as_published_and_its_norms_are_known(layer_names, family):
    shapes = layer_names(family)
    published = tencent_spelling(shapes)
    assert not set(published) & {"double_blocks.0.img_attn.qkv.weight"} and len(published) == len(shapes)
    assert recognize_preset(infos(published)).name == "hunyuan"
    rules = find_preset("hunyuan").keep
    norms = [name for name in published if "_norm." in name]
    assert norms and all(any(rule.pattern.search(name) for rule in rules) for name in norms)


def test_a_t5_with_the_names_of_transformers_is_recognised(layer_names):
    shapes = layer_names("t5")
    shapes |= dict.fromkeys(
        ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"], (32128, 4096)
    )
    assert recognize_preset(infos(shapes)).name == "t5xxl"
    del shapes["shared.weight"]
    assert recognize_preset(infos(shapes)).name == "t5xxl"


@pytest.mark.parametrize("text, shape, fits", [
    ("w", (3, 4), True),
    ("w 3x4", (3, 4), True),
    ("w 3x*", (3, 9), True),
    ("w *x4", (3, 4), True),
    ("w 3x4", (4, 3), False),
    ("w 3x*", (3,), False),
    ("w 3", (3, 1), False),
    ("v", (3, 4), False),
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net.", "model."])
def test_marks(text, shape, fits, prefix):
    tensors = infos({f"{prefix}w": shape, f"{prefix}blocks.0.v": shape})
    assert Mark.parse(text).matches(tensors) is fits


@pytest.mark.parametrize(
    "preset, gone",
    [(preset, gone) for preset in PRESETS.values() for gone in preset.absent],
    ids=lambda value: value.name,
)
def test_marks_that_must_be_absent_rule_a_family_out(preset, gone):
    shape = [side or 8 for side in gone.shape or (8, 8)]
    if any(mark.name == gone.name for mark in preset.detect[0]):  # the same tensor of another shape
        assert not preset.matches({**marked(preset), **infos({gone.name: shape})})
        return
    assert preset.matches(marked(preset))
    for prefix in ("", "model.diffusion_model."):
        assert not preset.matches({**marked(preset), **infos({prefix + gone.name: shape})})


@pytest.mark.parametrize("gone", ["distilled_guidance_layer.in_proj.weight", "double_stream_modulation_img.lin.weight"])
def test_relatives_of_flux_are_no_flux(layer_names, gone):
    """Chroma and Flux.2, should a fine-tune of theirs carry every name that Flux.1 has."""
    found = recognize_preset(infos([*layer_names("flux"), gone]))
    assert found is None or found.name != "flux"


TRUE_NAMES = sorted({tensor for name in architectures() for tensor in read(name)})


@pytest.mark.parametrize("preset", [COMMON, GENERAL, *PRESETS.values()], ids=lambda preset: preset.name)
def test_patterns_have_bounded_words(preset):
    """Two unbounded words in a pattern take time quadratic in the length of a name."""
    patterns = [preset.blocks, *(rule.pattern for rule in (*preset.keep, *preset.remove))]
    assert not [pattern.pattern for pattern in patterns if r"\w+" in pattern.pattern]


@pytest.mark.parametrize("preset", [COMMON, GENERAL, *PRESETS.values()], ids=lambda preset: preset.name)
def test_patterns_begin_where_the_models_names_begin(preset):
    """Deeper in another model the same words hit nothing, unless a pattern says that it holds anywhere."""
    for rule in (*preset.keep, *preset.remove):
        anywhere = rule.text.startswith((".*", "(.*"))
        example = next((name for name in TRUE_NAMES if rule.pattern.search(name)), None)
        if example and preset is not GENERAL:  # one module deep, see the file
            assert bool(rule.pattern.search(f"other.{example}")) is anywhere, rule.text
        if example:
            assert bool(rule.pattern.search(f"other.0.deep.{example}")) is anywhere, rule.text


@pytest.mark.parametrize(
    "names", [[], ["blocks.0.attn.qkv.weight"], ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"]]
)
def test_too_few_names_are_recognised_as_nothing(names):
    assert recognize_preset(infos(names)) is None
