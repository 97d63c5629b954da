"""Every preset against the true tensors of every model that ComfyUI knows."""

import functools
import math
import re

import pytest

from learned_rounding.quant_core import PRESETS
from learned_rounding.quant_core.recipes import make_plan
from learned_rounding.quant_core.recipes.presets import COMMON
from learned_rounding.tests.architectures import architectures, read
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
    "lens": 0.65,  # modulations
    "qwen35": 0.64,  # embedding
    "sd15": 0.28,  # convolutions
    "sdxl": 0.56,  # convolutions
    "svd": 0.43,  # convolutions
    "t5xxl": 0.81,  # embedding
}
ODD = {"gpt_oss_20b": 0.03}  # its experts are no linear layers
# Names that published files carry and ComfyUI's classes do not.
ELSEWHERE = {("t5xxl", r"(decoder|lm_head)\.")}

found = functools.cache(examine)


@pytest.mark.parametrize("name", architectures())
def test_models_are_recognised_and_only_linear_layers_quantized(name):
    plan, tensors = found(name), read(name)
    assert (plan.preset is None) == (name in GENERAL)
    assert {tensors[layer].kind for layer in plan.quantized} <= {"linear"}
    if plan.preset in ("clip", "full_precision_text"):
        assert not plan.quantized
    elif plan.preset:
        assert plan.sure  # no layer that the preset does not know
        assert ODD.get(name, LEAST.get(plan.preset, 0.85)) <= plan.share <= 1


@pytest.mark.parametrize("name", architectures())
def test_what_is_quantized_can_be_rotated_and_cut_into_blocks(name):
    plan = found(name)
    if plan.quantized and plan.preset:
        rotated = 0.24 if name == "omnigen2" else 0.9  # widths of 2520
        assert plan.fitting(16, slice(1, 2)) >= rotated
        assert plan.fitting(8) == 1 or name == "qwen25_7b"  # its vision layers of 3420


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_every_pattern_hits_something(preset):
    """Presets that are not detected are for models that others detect."""
    models = [name for name in architectures() if found(name).preset == preset.name] if preset.detect else architectures()
    names = [tensor for name in models for tensor in read(name)]
    assert models
    for rule in (*preset.keep, *preset.remove):
        assert (preset.name, rule.text) in ELSEWHERE or any(map(rule.pattern.search, names)), rule.text


# Layers at the edge of a model whose names do not tell: the general rule quantizes them.
UNTOLD = {
    "anima": {"llm_adapter.out_proj"},
    "gemma4": {"audio_model.subsample_conv_projection.input_proj_linear", "per_layer_model_projection", "vision_model.patch_dense"},
    "hidream_o1": {"visual.merger.linear_fc1", "visual.merger.linear_fc2"},
    "krea2": {"txtfusion.projector"},
    "minimax_music": {"diffusion_transformer.transformer.project_in", "diffusion_transformer.transformer.project_out", "audio_decoder.projection"},
    "mochi": {"t5_yproj"},
    "wan": {"casual_audio_encoder.encoder.final_linear", "face_encoder.out_proj", "motion_encoder.dec.direction", "trainable_cond_mask"},
    "ace_step": {"lyric_embs"},
    "ace_step_15": {"tokenizer.quantizer.project_in", "tokenizer.quantizer.project_out"},
    **dict.fromkeys(("generic_text", "qwen35"), {"visual.merger.linear_fc1", "visual.merger.linear_fc2", "audio_decoder.projection"}),
}


@pytest.mark.parametrize("name", [name for name in architectures() if found(name).quantized and found(name).preset])
def test_the_general_rule_is_safe_for_a_model_that_nothing_recognises(name):
    """As if no preset knew it: what its preset keeps outside numbered blocks is kept, and nearly all that it quantizes is quantized."""
    source = header(name)
    general, own = make_plan(source, preset="none"), make_plan(source)
    wrong = {layer for layer in set(general.names("quantize")) - set(own.names("quantize")) if not re.search(r"\.\d+\.", layer)}
    plain = {layer.removeprefix("model.").removesuffix(".weight") for layer in wrong}
    assert plain <= UNTOLD.get(own.preset.name, set())
    missed = sum(math.prod(source.tensors[layer].shape) for layer in set(own.names("quantize")) - set(general.names("quantize")))
    assert missed <= 0.025 * sum(math.prod(source.tensors[layer].shape) for layer in own.names("quantize"))


# Tables that no language model has, left to the general words; and linear layers with a table's name.
ODD_TABLES = re.compile(
    r"(lyric_encoder|timbre_encoder|attention_pooler|detokenizer)\.embed_tokens|style_embedder|embed_image_indicator|llm_adapter\.embed|addition_t_embedding|trainable_cond_mask|audio_extra_embedding|embed_tokens_audio"
)


def test_tables_are_known_by_their_names():
    """Those that ComfyUI holds as embeddings, which it looks rows up in; no linear layer is taken for one."""
    tables = [rule.pattern for rule in COMMON.keep if rule.table]
    for name in set(architectures()) - GENERAL:
        for tensor, entry in read(name).items():
            if tensor.endswith(".weight") and not ODD_TABLES.search(tensor) and entry.kind in ("embedding", "linear"):
                assert any(pattern.search(tensor) for pattern in tables) is (entry.kind == "embedding"), (name, tensor)


def test_the_document_is_what_these_lists_and_presets_make():
    assert DOCUMENT.read_text(encoding="utf-8") == document()


def test_lists_are_what_comfyui_makes(host):
    """Where the ComfyUI is here that the lists are from."""
    if host.version != version("flux"):
        pytest.skip(f"the lists are from ComfyUI {version('flux')}")
    _, made = rebuild(host)
    assert set(made) == set(architectures())
    assert [name for name, tensors in made.items() if tensors != read(name)] == []
