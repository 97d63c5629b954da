"""Presets as files, what tells families apart, and every preset against the true tensors of every model that ComfyUI knows."""

import math
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch

from learned_rounding.quant_core import PRESETS, Recipe
from learned_rounding.quant_core.errors import UnknownNameError
from learned_rounding.quant_core.recipes import find_preset, make_plan, presets, recognize_preset
from learned_rounding.quant_core.recipes.presets import ALIASES, COMMON, GENERAL, Mark, Preset, Rule
from learned_rounding.quant_core.recipes.toml import tomllib
from learned_rounding.quant_core.sources import TensorInfo
from learned_rounding.tests.architectures import architectures, read
from learned_rounding.tests.architectures.table import Found, examine
from learned_rounding.tests.architectures.table import source as header

FILES = sorted((Path(presets.__file__).parent / "presets").glob("*.toml"))
KEYS = {"title", "aliases", "include", "detect", "absent", "blocks", "encoders", "keep", "remove", "eight_bits"}
# The names of the published tool's keep lists, all of them.
VOCABULARY = """
    t5xxl mistral visual generic_text gemma4 qwen35 flux2 distillation_large distillation_small nerf_large nerf_small
    radiance wan hunyuan qwen zimage zimage_l zimage_s zimage_refiner lens anima krea2 ideogram4 boogu ltxv2
"""
BY_NAME_OF_FAMILY = "flux sdxl sd15 sd3 lumina2 hidream chroma auraflow pixart mochi cosmos ltxv ace_step umt5 clip_l clip_g llama gemma3"


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

# Models that no preset is for: none of them makes pictures, sound or text for them.
GENERAL_RULE_ALONE = {
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


# Preset files


def parsed_files() -> Iterable[tuple[Path, dict]]:
    return ((path, tomllib.loads(path.read_text(encoding="utf-8"))) for path in FILES)


def test_preset_files_have_known_keys(subtests):
    for path, data in parsed_files():
        with subtests.test(path.stem):
            assert set(data) <= KEYS


def test_preset_files_have_a_title(subtests):
    for path, data in parsed_files():
        with subtests.test(path.stem):
            assert data["title"]


def test_preset_files_have_rules_of_their_own_or_of_others(subtests):
    for path, data in parsed_files():
        with subtests.test(path.stem):
            assert {"keep", "include"} & set(data)


def test_lists_of_marks_are_strings(subtests):
    for path, data in parsed_files():
        with subtests.test(path.stem):
            for marks in data.get("detect", []):
                assert marks
                assert all(isinstance(mark, str) for mark in marks)


def test_included_presets_exist(subtests):
    for path, data in parsed_files():
        with subtests.test(path.stem):
            for other in data.get("include", []):
                assert (path.parent / f"{other}.toml").exists()


def test_rules_of_preset_files_have_a_pattern_and_a_reason(subtests):
    for path, data in parsed_files():
        with subtests.test(path.stem):
            for rule in (*data.get("keep", ()), *data.get("remove", ()), *data.get("eight_bits", ())):
                assert set(rule) <= {"pattern", "reason", "cannot", "table"}
                assert rule["reason"]
                re.compile(rule["pattern"])


# Names


def test_names_of_published_keep_lists_are_known():
    assert {*VOCABULARY.split(), *BY_NAME_OF_FAMILY.split()} <= {*PRESETS, *ALIASES}


def test_a_preset_is_found_by_its_name():
    assert [name for name, preset in PRESETS.items() if find_preset(name) is not preset or preset.name != name] == []


def test_a_preset_is_found_by_its_aliases():
    assert [alias for alias, preset in ALIASES.items() if find_preset(alias) is not preset] == []


def test_words_with_another_meaning_name_no_preset():
    """Parts of presets, and choices of a recipe."""
    assert {"common", "_common", "auto", "none"}.isdisjoint({*PRESETS, *ALIASES})


def test_no_alias_has_two_presets():
    assert len(ALIASES) == sum(len(preset.aliases) for preset in PRESETS.values())


def test_no_alias_is_the_name_of_a_preset():
    assert not set(ALIASES) & set(PRESETS)


def test_titles_are_different():
    assert len({preset.title for preset in PRESETS.values()}) == len(PRESETS)


def test_a_recipe_takes_every_name():
    names = (*PRESETS, *ALIASES, "auto", "none")
    assert [Recipe(preset=name).preset for name in names] == [*names]


def test_an_unknown_preset_suggests_the_nearest(sentences):
    with sentences.raises(UnknownNameError):
        find_preset("hunyuan_vidio")


# Recognition by marks


def test_marks(subtests):
    for text, shape, fits in [
        ("w", (3, 4), True),
        ("w 3x4", (3, 4), True),
        ("w 3x*", (3, 9), True),
        ("w *x4", (3, 4), True),
        ("w 3x4", (4, 3), False),
        ("w 3x*", (3,), False),
        ("w 3", (3, 1), False),
        ("v", (3, 4), False),
    ]:
        for prefix in ("", "model.diffusion_model.", "net.", "model."):
            with subtests.test(text, shape=shape, prefix=prefix):
                tensors = infos({f"{prefix}w": shape, f"{prefix}blocks.0.v": shape})
                assert Mark.parse(text).matches(tensors) is fits


def absent_marks() -> Iterable[tuple[Preset, Mark]]:
    return ((preset, gone) for preset in PRESETS.values() for gone in preset.absent)


def test_marks_that_must_be_absent_rule_a_family_out(subtests):
    for preset, gone in absent_marks():
        with subtests.test(preset.name, mark=gone.name):
            tensor = {gone.name: [side or 8 for side in gone.shape or (8, 8)]}
            assert not preset.matches({**marked(preset), **infos(tensor)})


def test_marks_that_must_be_absent_are_seen_in_a_checkpoint(subtests):
    for preset, gone in absent_marks():
        with subtests.test(preset.name, mark=gone.name):
            if any(mark.name == gone.name for mark in preset.detect[0]):
                continue  # the same tensor of another shape
            assert preset.matches(marked(preset))
            tensor = {f"model.diffusion_model.{gone.name}": [side or 8 for side in gone.shape or (8, 8)]}
            assert not preset.matches({**marked(preset), **infos(tensor)})


def test_relatives_of_flux_are_no_flux(subtests, layer_names):
    """Chroma and Flux.2, should a fine-tune of theirs carry every name that Flux.1 has."""
    for gone in ["distilled_guidance_layer.in_proj.weight", "double_stream_modulation_img.lin.weight"]:
        with subtests.test(gone=gone):
            found = recognize_preset(infos([*layer_names("flux"), gone]))
            assert found is None or found.name != "flux"


def test_newest_models_have_presets(subtests, layer_names):
    for name, preset in NEWEST.items():
        for prefix in ("", "model.diffusion_model."):
            with subtests.test(name, prefix=prefix):
                assert recognize_preset(infos(layer_names(name, prefix))) is PRESETS[preset]


def test_hunyuan_is_recognised_as_published(subtests, layer_names):
    for family in ["hunyuan", "hunyuan_1_5"]:
        with subtests.test(family=family):
            published = tencent_spelling(layer_names(family))
            assert "double_blocks.0.img_attn.qkv.weight" not in published
            assert recognize_preset(infos(published)).name == "hunyuan"


def test_norms_of_hunyuan_as_published_are_kept(subtests, layer_names):
    for family in ["hunyuan", "hunyuan_1_5"]:
        with subtests.test(family=family):
            norms = [name for name in tencent_spelling(layer_names(family)) if "_norm." in name]
            assert norms
            rules = find_preset("hunyuan").keep
            assert [name for name in norms if not any(rule.pattern.search(name) for rule in rules)] == []


@pytest.fixture
def whole_t5(layer_names):
    """Shapes of a T5 with its decoder, under the names of transformers."""
    more = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    return layer_names("t5") | dict.fromkeys(more, (32128, 4096))


def test_a_t5_with_the_names_of_transformers_is_recognised(whole_t5):
    assert recognize_preset(infos(whole_t5)).name == "t5xxl"


def test_a_t5_without_its_shared_embedding_is_recognised(whole_t5):
    del whole_t5["shared.weight"]
    assert recognize_preset(infos(whole_t5)).name == "t5xxl"


def test_too_few_names_are_recognised_as_nothing(subtests):
    for names in [[], ["blocks.0.attn.qkv.weight"], ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"]]:
        with subtests.test(names=names):
            assert recognize_preset(infos(names)) is None


# Patterns


def rules_of(preset: Preset) -> tuple[Rule, ...]:
    return (*preset.keep, *preset.remove)


@cache
def true_names() -> list[str]:
    return sorted({tensor for name in architectures() for tensor in read(name)})


@cache
def first_hit(pattern: re.Pattern) -> str | None:
    """A tensor of any model that the pattern finds."""
    return next(filter(pattern.search, true_names()), None)


def test_patterns_have_bounded_words():
    """Two unbounded words in a pattern take time quadratic in the length of a name."""
    everything = (COMMON, GENERAL, *PRESETS.values())
    patterns = [
        pattern for preset in everything for pattern in (preset.blocks, *(rule.pattern for rule in rules_of(preset)))
    ]
    assert [pattern.pattern for pattern in patterns if r"\w+" in pattern.pattern] == []


def test_patterns_begin_where_the_models_names_begin(subtests):
    """Deeper in another model the same words hit nothing, unless a pattern says that it holds anywhere."""
    for rule in {
        rule.text: rule for preset in (COMMON, GENERAL, *PRESETS.values()) for rule in rules_of(preset)
    }.values():
        if example := first_hit(rule.pattern):
            with subtests.test(rule.text):
                anywhere = rule.text.startswith((".*", "(.*"))
                assert bool(rule.pattern.search(f"other.0.deep.{example}")) is anywhere


def test_patterns_of_families_find_nothing_one_module_deep(subtests):
    """The general rule does, see its file."""
    for rule in {rule.text: rule for preset in (COMMON, *PRESETS.values()) for rule in rules_of(preset)}.values():
        if example := first_hit(rule.pattern):
            with subtests.test(rule.text):
                anywhere = rule.text.startswith((".*", "(.*"))
                assert bool(rule.pattern.search(f"other.{example}")) is anywhere


def test_rules_of_every_model_find_something():
    unused = [rule.text for rule in (*COMMON.keep, *GENERAL.keep) if not first_hit(rule.pattern)]
    assert set(unused) <= BESIDE


def test_every_pattern_finds_something_in_the_models_of_its_preset(subtests):
    for preset in PRESETS.values():
        with subtests.test(preset.name):
            detected = [name for name in architectures() if examine(name).preset == preset.name]
            models = detected if preset.detect else BY_NAME[preset.name][0]
            names = [tensor for name in models for tensor in read(name)]
            assert names
            for rule in rules_of(preset):
                assert (preset.name, rule.text) in ELSEWHERE or any(map(rule.pattern.search, names)), rule.text


@cache
def families_of_quantized() -> dict[str, set[str | None]]:
    """Layer that some model quantizes → presets of these models."""
    families: dict[str, set[str | None]] = {}
    for name in architectures():
        for layer in examine(name).quantized:
            families.setdefault(layer, set()).add(examine(name).preset)
    return families


@cache
def families_that_quantize(pattern: re.Pattern) -> set[str | None]:
    hits = filter(pattern.search, families_of_quantized())
    return set().union(*(families_of_quantized()[layer] for layer in hits))


def test_patterns_find_no_layer_that_another_family_quantizes(subtests):
    """What a pattern finds elsewhere has the same role there: its own preset keeps it too, but for these."""
    for preset in PRESETS.values():
        own = {preset.name, None} | ({"generic_text"} if preset.name == "visual" else set())
        for rule in rules_of(preset):
            if rule.cannot and rule.text == ".*":
                continue  # for models that have no other layers
            with subtests.test(preset.name, pattern=rule.text):
                elsewhere = families_that_quantize(rule.pattern) - own
                known = FOREIGN.get((preset.name, rule.text), set())
                assert elsewhere <= known
                assert known is ANY or known - own <= elsewhere  # none of the exceptions is idle


# Models


def quantized_models() -> Iterable[tuple[str, Found]]:
    """Names and plans of the models that a preset quantizes."""
    found = ((name, examine(name)) for name in architectures())
    return ((name, each) for name, each in found if each.quantized and each.preset)


def test_models_are_recognised_unless_no_preset_is_for_them():
    assert {name for name in architectures() if examine(name).preset is None} == GENERAL_RULE_ALONE


def test_only_linear_layers_and_banks_of_experts_are_quantized():
    quantized = {(name, layer) for name in architectures() for layer in examine(name).quantized}
    assert {read(name)[layer].kind for name, layer in quantized} == {"linear", "experts"}


def test_text_encoders_that_comfyui_reads_in_full_precision_are_kept(subtests):
    for name in architectures():
        if examine(name).preset in ("clip", "full_precision_text"):
            with subtests.test(name):
                assert not examine(name).quantized


def test_presets_cover_all_layers_to_quantize(subtests):
    for name, found in quantized_models():
        with subtests.test(name):
            assert found.sure


def test_most_parameters_are_in_quantized_layers(subtests):
    for name, found in quantized_models():
        with subtests.test(name):
            assert found.share >= ODD.get(name, LEAST.get(found.preset, 0.85))


def test_every_other_model_has_layers_to_quantize():
    unquantized = {examine(name).preset for name in architectures() if not examine(name).quantized}
    assert unquantized == {"clip", "full_precision_text"}


def whole(pattern: str | None) -> re.Pattern:
    """For tensors' names as the presets' patterns are; None finds nothing."""
    return re.compile(rf"^(?:model\.)?(?:{pattern})" if pattern else r"(?!)")


def test_every_linear_layer_of_the_blocks_is_quantized_but_those(subtests):
    for name, found in quantized_models():
        with subtests.test(name):
            preset = PRESETS[found.preset]
            layers = {
                tensor
                for tensor, entry in read(name).items()
                if entry.kind == "linear" and tensor.endswith(".weight") and preset.blocks.search(tensor)
            }
            kept = whole(KEPT.get(name) or KEPT.get(preset.name))
            assert layers - found.quantized.keys() == set(filter(kept.search, layers))


def test_quantized_layers_can_be_rotated(subtests):
    for name, found in quantized_models():
        with subtests.test(name):
            share = 0.24 if name == "omnigen2" else 0.9  # widths of 2520
            assert found.fitting(16, slice(1, 2)) >= share


def test_quantized_layers_can_be_cut_into_blocks_of_8(subtests):
    for name, found in quantized_models():
        with subtests.test(name):
            assert found.fitting(8) == 1 or name == "qwen25_7b"  # its vision layers of 3420


# Presets by name


def test_presets_without_marks_are_taken_by_name():
    assert {preset.name for preset in PRESETS.values() if not preset.detect} == BY_NAME.keys()


def test_presets_taken_by_name_differ_from_the_detected_one_by_what_they_say(subtests, sentences):
    for preset, (models, *patterns) in BY_NAME.items():
        more, less = map(whole, patterns)
        for name in sorted(models):
            named = make_plan(header(name), preset=preset)
            before, after = set(examine(name).quantized), set(named.names("quantize"))
            with subtests.test("keeps more", preset=preset, model=name):
                assert before - after == set(filter(more.search, before))
            with subtests.test("keeps less", preset=preset, model=name):
                assert after - before == {
                    layer
                    for layer, entry in read(name).items()
                    if entry.kind == "linear" and layer.endswith("weight") and less.search(layer)
                }
            with subtests.test("explanation", preset=preset, model=name):
                sentences(named.explanation)


# The general rule, as if no preset knew the model

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


def quantized_by_the_general_rule(name: str) -> set[str]:
    return set(make_plan(header(name), preset="none").names("quantize"))


@cache
def smallest_of_each_preset() -> list[str]:
    """Names of the models of fewest tensors."""
    models = sorted(quantized_models(), key=lambda model: -len(read(model[0])))
    return list({found.preset: name for name, found in models}.values())


def check_general_rule(name: str) -> None:
    own = examine(name)
    general = quantized_by_the_general_rule(name)
    wrong = {layer for layer in general - set(own.quantized) if not re.search(r"\.\d+\.", layer)}
    plain = {layer.removeprefix("model.").removesuffix(".weight") for layer in wrong}
    assert plain <= UNTOLD.get(own.preset, set())  # what the preset keeps outside numbered blocks is kept
    missed = sum(math.prod(own.quantized[layer]) for layer in set(own.quantized) - general)
    assert missed <= 0.025 * sum(map(math.prod, own.quantized.values()))


def test_the_general_rule_is_safe_for_a_model_that_nothing_recognises(subtests):
    for name in smallest_of_each_preset():
        with subtests.test(name):
            check_general_rule(name)


@pytest.mark.soak
def test_the_general_rule_is_safe_for_all_models(subtests):
    for name, _ in quantized_models():
        with subtests.test(name):
            check_general_rule(name)


# Linear layers with a table's name.
ODD_TABLES = re.compile(r"(lyric_encoder|timbre_encoder|attention_pooler|detokenizer)\.embed_tokens|embed_tokens_audio")


def test_tables_are_known_by_their_names():
    """Those that ComfyUI holds as embeddings, which it looks rows up in; no linear layer is taken for one."""
    tables = [rule.pattern for rule in COMMON.keep if rule.table]
    entries = {
        (tensor, entry.kind)
        for name in set(architectures()) - GENERAL_RULE_ALONE
        for tensor, entry in read(name).items()
        if tensor.endswith(".weight") and entry.kind in ("embedding", "linear") and not ODD_TABLES.search(tensor)
    }
    taken = {(tensor, kind) for tensor, kind in entries if any(pattern.search(tensor) for pattern in tables)}
    assert taken == {(tensor, kind) for tensor, kind in entries if kind == "embedding"}
