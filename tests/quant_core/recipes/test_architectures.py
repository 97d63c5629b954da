"""Every preset against the true tensors of every model that ComfyUI knows."""

import functools
import math
import re

import pytest

from learned_rounding.quant_core import FORMATS, PRESETS
from learned_rounding.quant_core.recipes import Recipe, make_plan
from learned_rounding.quant_core.recipes.presets import COMMON
from learned_rounding.quant_core.recipes.presets import GENERAL as GENERAL_RULE
from learned_rounding.tests.architectures import architectures, read
from learned_rounding.tests.architectures.collect import TEXT_ENCODERS
from learned_rounding.tests.architectures.lists import rebuild, version
from learned_rounding.tests.architectures.table import DOCUMENT, document, examine
from learned_rounding.tests.architectures.table import source as header

# Models that no preset is for: none of them makes pictures, sound or text for them.
GENERAL = {
    "depth_anything_3", "hunyuan3d", "hunyuan3d_2_1", "hunyuan3d_mini", "rt_detr", "sam3", "sam31", "trellis2", "triposplat",
}  # fmt: skip
# The least share of parameters that a family's models have in quantized layers, where it is not 0.85: what is kept
# there is large, or is no linear layer.
LEAST = {
    "ace_step": 0.55,  # lyric encoder
    "gemma4": 0.35,  # embeddings of every layer
    "generic_text": 0.73,  # embedding
    "kandinsky6": 0.82,  # modulations
    "lens": 0.65,  # modulations
    "qwen35": 0.64,  # embedding
    "sd15": 0.28,  # convolutions
    "sdxl": 0.56,  # convolutions
    "svd": 0.43,  # convolutions
    "t5xxl": 0.81,  # embedding
}
ODD = {
    "ltx25": 0.8,  # embeddings connectors of eight blocks
    "yue2_lm": 0.65,  # embedding and head
}
# Names that published files carry and ComfyUI's classes do not.
ELSEWHERE = {("t5xxl", r"(decoder|lm_head)\."), ("qwen35", r"mtp\.")}
# Beginnings of the parts of a checkpoint, which no list of one model has.
BESIDE = {
    r"(first_stage_model|vae|audio_vae|vocoder|pretransform)\.",
    r"(cond_stage_model|conditioner|text_encoders?|text_embedding_projection|clip_[lgh])\.",
}

# Preset or model → linear layers of its blocks that are kept; all others there are quantized.
KEPT = {
    "anima": r"blocks\.(0\.|1\.adaln_modulation)",
    "gemma4": r"layers\.\d+\.per_layer_(input_gate|projection)\.",
    "kandinsky6": r"\w+\.\d+\.(\w+T\.)?\w+_modulation\.",
    "ltxv2": r"transformer_blocks\.((0|1|46|47)\.|\d+\.\w+\.to_gate_logits)",
    "minimax_h3_pruned": r"blocks\.\d+\.adaln_proj\.",
    "qwen": r"transformer_blocks\.0\.img_mod\.",
    "qwen35": r"language_model\.layers\.((0|63)\.|\d+\.linear_attn\.in_proj_[ab]\.)|visual\.blocks\.0\.",
    "zimage": r"(layers|noise_refiner)\.\d+\.adaLN_modulation",
    **dict.fromkeys(("sd15", "sdxl", "svd"), r".*\.(emb_layers|time_pos_embed)\."),
}
# Presets that are taken only by name → models they are for; what they keep there beyond the preset that is detected; what less.
BY_NAME = {
    "visual": (
        {"qwen3vl_8b", "qwen25_7b", "gemma3_4b_vision", "minimax_music_lm"},
        r"(visual\.blocks|vision_model\.encoder\.layers)\.\d+\.mlp\.",
        None,
    ),
    "nerf_large": ({"chroma_radiance"}, r"double_blocks\.\d+\.(img|txt)_attn\.proj\.", None),
    "nerf_small": ({"chroma_radiance"}, None, r"txt_in\."),
    "zimage_s": ({"zimage"}, None, r"final_layer\.|(layers|noise_refiner)\.\d+\.adaLN_modulation\."),
    "zimage_refiner": (
        {"zimage"},
        r"(context|noise)_refiner\.\d+\.(attention|feed_forward)\.",
        r"final_layer\.|layers\.\d+\.adaLN_modulation\.",
    ),
    "distillation_small": ({"chroma"}, None, r"(img_in|txt_in|final_layer)\."),
}
# Patterns that find layers which another family's own preset quantizes: (preset, pattern) → those families.
ANY = set(PRESETS)  # single blocks, by their number
_TXT_IN = {"hunyuan"}  # a refiner of the text inside it
FOREIGN = {
    ("chroma", r"(img_in|txt_in)\."): _TXT_IN,
    ("flux", r"(img_in|txt_in)\."): _TXT_IN,
    ("flux2", r"(img_in|txt_in)\."): _TXT_IN,
    ("lens", r"(img_in|txt_in)\."): _TXT_IN,
    ("qwen", r"(img_in|txt_in)\."): _TXT_IN,
    ("qwen21", r"(img_in|txt_in)\."): _TXT_IN,
    ("nerf_large", r"txt_in\."): _TXT_IN,
    ("radiance", r"(img_in_patch|txt_in)\."): _TXT_IN,
    ("seedvr2", r"(vid_in|txt_in)\."): _TXT_IN,
    # parts of blocks that only this family keeps
    ("anima", r"blocks\.(0\.|1\.adaln_modulation)"): ANY,
    ("qwen35", r"(language_model\.)?layers\.(0|63)\."): ANY,
    ("ltxv2", r"transformer_blocks\.(0|1|46|47)\."): ANY,
    ("lens", r"transformer_blocks\.\d+\.(img|txt)_mod\.1\."): {"qwen"},
    ("nerf_large", r"double_blocks\.\d+\.(img|txt)_attn\.proj\."): {"chroma", "flux", "flux2", "hunyuan", "radiance"},
    ("zimage", r"(layers|noise_refiner)\.\d+\.adaLN_modulation\."): {"lumina2"},
    ("zimage_refiner", r"(context|noise)_refiner\."): {"boogu", "lumina2", "omnigen2", "zimage"},
    # image encoders of language models
    ("gemma4", r"(vision_model|multi_modal_projector)\."): {"generic_text"},
    ("hidream_o1", r"visual\."): {"generic_text", "qwen35"},
    ("qwen35", r"visual\.(pos_embed|patch_embed|merger|blocks\.0\.)"): {"generic_text"},
    ("visual", r"(visual\.blocks|vision_model\.encoder\.layers)\.\d+\.mlp\."): {"generic_text", "qwen35"},
    # what is left out of a T5: another model has a decoder that it runs
    ("t5xxl", r"(decoder|lm_head)\."): {"ace_step_15"},
}

found = functools.cache(examine)


def whole(pattern: str | None) -> re.Pattern:
    """For tensors' names as the presets' patterns are; None finds nothing."""
    return re.compile(rf"^(?:model\.)?(?:{pattern})" if pattern else r"(?!)")


@pytest.mark.parametrize("name", architectures())
def test_models_are_recognised_and_only_linear_layers_and_banks_of_experts_quantized(name):
    plan, tensors = found(name), read(name)
    assert (plan.preset is None) == (name in GENERAL)
    assert {tensors[layer].kind for layer in plan.quantized} <= {"linear", "experts"}
    if plan.preset in ("clip", "full_precision_text"):
        assert not plan.quantized
    elif plan.preset:
        assert plan.sure  # no layer that the preset does not know
        assert ODD.get(name, LEAST.get(plan.preset, 0.85)) <= plan.share <= 1


@pytest.mark.parametrize("name", [name for name in architectures() if found(name).quantized and found(name).preset])
def test_every_linear_layer_of_the_blocks_is_quantized_but_those(name):
    preset = PRESETS[found(name).preset]
    layers = {
        tensor
        for tensor, entry in read(name).items()
        if entry.kind == "linear" and tensor.endswith(".weight") and preset.blocks.search(tensor)
    }
    kept = whole(KEPT.get(name) or KEPT.get(preset.name))
    assert layers - found(name).quantized.keys() == {layer for layer in layers if kept.search(layer)}


@pytest.mark.parametrize(
    "preset, name", [(preset, name) for preset, (names, _, _) in BY_NAME.items() for name in sorted(names)]
)
def test_presets_taken_by_name_differ_from_the_detected_one_by_what_they_say(preset, name, sentences):
    detected, named = make_plan(header(name)), make_plan(header(name), preset=preset)
    before, after = set(detected.names("quantize")), set(named.names("quantize"))
    more, less = map(whole, BY_NAME[preset][1:])
    assert before - after == {layer for layer in before if more.search(layer)}
    assert after - before == {
        layer
        for layer, entry in read(name).items()
        if entry.kind == "linear" and layer.endswith("weight") and less.search(layer)
    }
    sentences(named.explanation)


def test_every_preset_is_detected_or_taken_by_name():
    assert {preset.name for preset in PRESETS.values() if not preset.detect} == BY_NAME.keys()
    for rule in (*COMMON.keep, *GENERAL_RULE.keep):
        hits = any(rule.pattern.search(tensor) for name in architectures() for tensor in read(name))
        assert hits or rule.text in BESIDE, rule.text


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_patterns_find_no_layer_that_another_family_quantizes(preset):
    """What a pattern finds elsewhere has the same role there: its own preset keeps it too, but for these."""
    for rule in (*preset.keep, *preset.remove):
        if rule.cannot and rule.text == ".*":
            continue  # for models that have no other layers
        elsewhere = {
            found(name).preset for name in architectures() if any(map(rule.pattern.search, found(name).quantized))
        }
        own = {preset.name, None} | ({"generic_text"} if preset.name == "visual" else set())
        known = FOREIGN.get((preset.name, rule.text), set())
        assert elsewhere - own <= known and (known is ANY or known - own <= elsewhere), rule.text


@pytest.mark.parametrize("name", architectures())
def test_what_is_quantized_can_be_rotated_and_cut_into_blocks(name):
    plan = found(name)
    if plan.quantized and plan.preset:
        rotated = 0.24 if name == "omnigen2" else 0.9  # widths of 2520
        assert plan.fitting(16, slice(1, 2)) >= rotated
        assert plan.fitting(8) == 1 or name == "qwen25_7b"  # its vision layers of 3420


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_every_pattern_hits_something(preset):
    """In the models that the preset is for."""
    models = (
        [name for name in architectures() if found(name).preset == preset.name]
        if preset.detect
        else BY_NAME[preset.name][0]
    )
    names = [tensor for name in models for tensor in read(name)]
    assert models
    for rule in (*preset.keep, *preset.remove):
        assert (preset.name, rule.text) in ELSEWHERE or any(map(rule.pattern.search, names)), rule.text


# Layers at the edge of a model whose names do not tell: the general rule quantizes them.
UNTOLD = {
    "anima": {"llm_adapter.out_proj"},
    "gemma4": {
        "audio_model.subsample_conv_projection.input_proj_linear",
        "per_layer_model_projection",
        "vision_model.patch_dense",
    },
    "hidream_o1": {"visual.merger.linear_fc1", "visual.merger.linear_fc2"},
    "krea2": {"txtfusion.projector"},
    "minimax_music": {
        "diffusion_transformer.transformer.project_in",
        "diffusion_transformer.transformer.project_out",
        "audio_decoder.projection",
    },
    "mochi": {"t5_yproj"},
    "yue2": {"llm2vae", "vae2llm"},
    "wan": {"casual_audio_encoder.encoder.final_linear", "face_encoder.out_proj"},
    "ace_step": {"lyric_embs"},
    "ace_step_15": {"tokenizer.quantizer.project_in", "tokenizer.quantizer.project_out"},
    **{
        key: {"visual.merger.linear_fc1", "visual.merger.linear_fc2", "audio_decoder.projection"}
        for key in ("generic_text", "qwen35")
    },
}


@pytest.mark.parametrize("name", [name for name in architectures() if found(name).quantized and found(name).preset])
def test_the_general_rule_is_safe_for_a_model_that_nothing_recognises(name):
    """As if no preset knew it: what its preset keeps outside numbered blocks is kept, and nearly all that it quantizes is quantized."""
    source = header(name)
    general, own = make_plan(source, preset="none"), make_plan(source)
    wrong = {
        layer
        for layer in set(general.names("quantize")) - set(own.names("quantize"))
        if not re.search(r"\.\d+\.", layer)
    }
    plain = {layer.removeprefix("model.").removesuffix(".weight") for layer in wrong}
    assert plain <= UNTOLD.get(own.preset.name, set())
    missed = sum(
        math.prod(source.tensors[layer].shape) for layer in set(own.names("quantize")) - set(general.names("quantize"))
    )
    assert missed <= 0.025 * sum(math.prod(source.tensors[layer].shape) for layer in own.names("quantize"))


# Linear layers with a table's name.
ODD_TABLES = re.compile(r"(lyric_encoder|timbre_encoder|attention_pooler|detokenizer)\.embed_tokens|embed_tokens_audio")


def test_tables_are_known_by_their_names():
    """Those that ComfyUI holds as embeddings, which it looks rows up in; no linear layer is taken for one."""
    tables = [rule.pattern for rule in COMMON.keep if rule.table]
    for name in set(architectures()) - GENERAL:
        for tensor, entry in read(name).items():
            if tensor.endswith(".weight") and not ODD_TABLES.search(tensor) and entry.kind in ("embedding", "linear"):
                assert any(pattern.search(tensor) for pattern in tables) is (entry.kind == "embedding"), (name, tensor)


@pytest.mark.parametrize("preset", ["auto", "none"])
@pytest.mark.parametrize(
    "format, kinds", [("float8_e4m3fn", {"linear", "embedding", "experts"}), ("int8_blockwise", {"linear", "experts"})]
)
@pytest.mark.parametrize("name", [name for name in architectures() if found(name).quantized])
def test_a_rule_for_everything_quantizes_only_what_comfyui_reads(name, format, kinds, preset):
    """The tables of models that no preset is for have any name."""
    decisions = Recipe(preset=preset, layer_config=f'{{".": "{format}"}}').plan(header(name)).decisions
    quantized = {read(name)[tensor].kind for tensor, decision in decisions.items() if decision.action == "quantize"}
    assert quantized <= (kinds | {"embedding"} if name in GENERAL else kinds)


_BYTES_PER_VALUE = {  # with the scales of groups
    "nvfp4": 1 / 2 + 1 / 16,
    "mxfp8": 1 + 1 / 32,
    "asym_w4a8_int8": 1 / 2 + 1 / 16,
    "convrot_w4a4": 1 / 2,
}


@pytest.mark.parametrize("name", [name for name in architectures() if found(name).quantized])
def test_every_format_takes_the_plan(name):
    """Sizes as `lrq plan` estimates them: quantized weights by their format, the rest in 16 bits, scales and padding."""
    plan = found(name)
    assert plan.sizes.keys() == FORMATS.keys()
    for format, size in plan.sizes.items():
        value = _BYTES_PER_VALUE.get(format, 1)
        expected = plan.parameters * (2 - plan.share * (2 - value))
        if value < 1:  # some layers take 8 bits, rotated, whose JSON is longer
            assert expected < size < plan.sizes["int8_tensorwise"] * 1.001, format
        else:
            assert expected < size < expected * 1.01, format
    assert plan.checkpoint or name in TEXT_ENCODERS or plan.preset is None


def test_the_document_is_what_these_lists_and_presets_make():
    assert DOCUMENT.read_text(encoding="utf-8") == document()


def test_lists_are_what_comfyui_makes(host):
    """Where the ComfyUI is here that the lists are from."""
    if host.version != version("flux"):
        pytest.skip(f"the lists are from ComfyUI {version('flux')}")
    _, made, missing = rebuild(host)
    assert missing == []
    assert set(made) == {name for name in architectures() if version(name) == host.version}
    assert [name for name, tensors in made.items() if tensors != read(name)] == []


@pytest.mark.parametrize("name", [name for name in architectures() if found(name).quantized])
def test_banks_of_experts_are_quantized_where_comfyui_reads_them(name):
    """Its class ``MoEExperts``, of which the lists have the kind; other tensors of three sides stay."""
    banks = {tensor for tensor, entry in read(name).items() if entry.kind == "experts" and tensor.endswith(".weight")}
    assert banks == {tensor for tensor, shape in found(name).quantized.items() if len(shape) == 3}
