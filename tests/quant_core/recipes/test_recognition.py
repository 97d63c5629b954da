"""Models that nothing recognizes, kinds of files without a quantized loader, presets and rules that match nothing, WAN's two models."""

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
from learned_rounding.quant_core.recipes.recognition import describe_expert
from learned_rounding.quant_core.recipes.refused import DIFFUSERS, GENERAL_SWITCH, REFUSED, find_refusal
from learned_rounding.quant_core.sources import TensorInfo
from learned_rounding.tests.architectures import architectures
from learned_rounding.tests.architectures.table import source as header

UNKNOWN = {"blocks.0.attn.qkv.weight": (96, 32), "blocks.0.norm.weight": (32,)}
# Models of ComfyUI that no preset is for.
GENERAL = {
    "depth_anything_3", "hunyuan3d", "hunyuan3d_2_1", "hunyuan3d_mini", "rt_detr", "sam3", "sam31", "trellis2", "triposplat",
}  # fmt: skip
PREFIXES = ["", "model.diffusion_model."]


@pytest.mark.parametrize("name", architectures())
def test_the_models_of_comfyui_are_planned_as_before_unless_no_preset_is_for_them(name):
    source = header(name)
    if name in GENERAL:
        with pytest.raises(UnrecognizedModelError):
            make_plan(source, general=False)
        assert make_plan(source, general=True).decisions == make_plan(source).decisions
        return
    plans = []
    for general in (None, False, True):
        try:
            plans.append(make_plan(source, general=general))
        except NothingToQuantizeError as error:  # text encoders that ComfyUI reads in full precision only
            plans.append(str(error))
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_unrecognized_model_is_refused_with_the_switch_that_allows_it(header_source, prefix, sentences):
    source = header_source({prefix + name: shape for name, shape in UNKNOWN.items()})
    with sentences.raises(UnrecognizedModelError):
        make_plan(source, general=False)
    assert [*make_plan(source, general=True).names("quantize")] == [f"{prefix}blocks.0.attn.qkv.weight"]
    # a program knows its tensors, and "none" asks for the general rule
    assert make_plan(source).decisions == make_plan(source, general=True).decisions
    assert make_plan(source, preset="none", general=False).decisions == make_plan(source).decisions


def test_a_preset_that_several_families_match_is_named_by_the_user(layer_names, header_source, sentences):
    source = header_source({**layer_names("flux"), **layer_names("sd35_medium")})
    with sentences.raises(UnrecognizedModelError):
        make_plan(source, general=False)
    assert make_plan(source, preset="flux", general=False).preset is PRESETS["flux"]


def test_a_long_name_is_shortened(header_source):
    with pytest.raises(UnrecognizedModelError) as raised:
        make_plan(header_source({f"{'a' * 10_000}.weight": (32, 32)}), general=False)
    assert len(str(raised.value)) < 500


def test_a_preset_named_by_the_user_that_covers_a_layer_vouches_for_the_model(header_source):
    plan = make_plan(header_source(UNKNOWN), preset="wan", general=False)
    assert plan.preset is PRESETS["wan"] and not plan.warnings


@pytest.mark.parametrize(
    "preset, name",
    [
        ("wan", "flux"),
        ("flux", "wan_t2v"),
        ("clip", "flux"),
        ("t5xxl", "sdxl"),
        ("sdxl", "qwen_image"),
        ("zimage_l", "t5"),
    ],
)
def test_a_preset_of_another_family_is_refused_by_name(layer_names, header_source, preset, name, sentences):
    for general in (None, False, True):
        with sentences.raises(RecipeError, repeated=True):
            make_plan(header_source(layer_names(name)), preset=preset, general=general)


def test_presets_of_related_families_are_accepted(layer_names, header_source):
    for preset, name in [
        ("flux", "chroma"),
        ("chroma", "flux"),
        ("ltxv", "qwen_image"),
        ("nerf_small", "chroma_radiance"),
    ]:
        assert make_plan(header_source(layer_names(name)), preset=preset, general=False).preset is PRESETS[preset]


def test_a_preset_that_matches_no_layer_of_an_unrecognized_model(header_source, sentences):
    source = header_source(UNKNOWN)
    with sentences.raises(UnrecognizedModelError):
        make_plan(source, preset="flux", general=False)
    sentences(make_plan(source, preset="flux", general=True).warnings)


def test_a_quantized_source_is_refused_as_such_whatever_it_is(header_source):
    source = header_source({"conv_first.weight": (4, 4, 3, 3), "a.weight": TensorInfo(torch.float8_e4m3fn, (4, 4))})
    for general in (None, False, True):
        with pytest.raises(AlreadyQuantizedError):
            make_plan(source, general=general)


def test_nothing_to_quantize_is_said_before_that_nothing_recognizes_it(header_source):
    with pytest.raises(NothingToQuantizeError):
        make_plan(header_source({"a.bias": (8,)}), general=False)


# Files as published: a few of their names.
KINDS = {
    "an audio encoder": {
        "wav2vec2": "masked_spec_embed feature_projection.projection.weight encoder.layer_norm.bias encoder.layers.0.attention.q_proj.weight",
        "wav2vec2, prefixed": "wav2vec2.feature_extractor.conv_layers.0.conv.weight wav2vec2.encoder.layers.0.feed_forward.output_dense.weight",
        "HuBERT": "hubert.feature_projection.projection.weight hubert.encoder.layers.0.attention.k_proj.weight",
        "Whisper": "model.encoder.conv1.weight model.encoder.embed_positions.weight model.encoder.layers.0.self_attn.q_proj.weight",
        "Whisper, the encoder alone": "encoder.conv1.weight encoder.embed_positions.weight encoder.layers.0.fc1.weight",
        "CLAP": "audio_branch.blocks.0.attn.qkv.weight text_branch.encoder.layer.0.attention.self.query.weight",
    },
    "an upscaler": {
        "ESRGAN": "model.0.weight model.1.sub.0.RDB1.conv1.0.weight",
        "Real-ESRGAN": "conv_first.weight body.0.rdb1.conv1.weight",
        "SwinIR": "conv_first.weight layers.0.residual_group.blocks.0.attn.qkv.weight",
        "HAT": "conv_first.weight conv_last.weight layers.0.residual_group.blocks.0.mlp.fc1.weight",
        "DAT": "params_ema.conv_first.weight params_ema.layers.0.blocks.0.attn.qkv.weight",
        "OmniSR": "residual_layer.0.residual_layer.0.layer.0.fn.fn.weight",
        "Restormer": "encoder_level1.0.attn.qkv.weight",
        "CodeFormer": "fuse_convs_dict.32.encode_enc.conv1.weight ft_layers.0.linear1.weight",
    },
    "a segmentation or background removal model": {
        "SAM": "image_encoder.blocks.0.attn.qkv.weight mask_decoder.iou_token.weight",
        "SAM 2": "image_encoder.trunk.blocks.0.attn.qkv.weight sam_mask_decoder.iou_token.weight",
        "BiRefNet": "bb.layers.1.blocks.0.attn.relative_position_index bb.layers.1.blocks.0.attn.qkv.weight",
        "RMBG": "stage1.rebnconvin.conv_s1.weight",
        "SegFormer": "segformer.encoder.block.0.0.attention.self.query.weight",
        "CLIPSeg": "clip.vision_model.encoder.layers.0.mlp.fc1.weight decoder.film_mul.weight",
        "Grounding DINO": "transformer.encoder.fusion_layers.0.attn.v_proj.weight backbone.0.patch_embed.proj.weight",
    },
    "a depth or geometry model": {
        "Depth Anything 2": "pretrained.blocks.0.attn.qkv.weight depth_head.projects.0.weight",
        "MoGe": "encoder.backbone.blocks.0.attn.qkv.weight points_head.input_blocks.0.weight",
    },
    "a ControlNet": {
        "SD1.5": "control_model.input_blocks.1.1.proj_in.weight control_model.zero_convs.0.0.weight",
        "Flux, InstantX": "controlnet_blocks.0.weight transformer_blocks.0.attn.to_q.weight",
        "Flux, XLabs": "controlnet_blocks.0.weight double_blocks.0.img_attn.qkv.weight",
        "SD3.5": "controlnet_blocks.0.weight transformer_blocks.0.attn.qkv.weight",
        "Hunyuan DiT": "after_proj_list.18.weight blocks.0.attn1.Wqkv.weight",
    },
    "a T2I adapter": {
        "SD1.5": "adapter.body.0.in_conv.weight",
        "SDXL": "conv_in.weight body.0.block1.weight",
        "diffusers": "adapter.body.0.resnets.0.block1.weight",
    },
    "a patch for a model": {
        "Z-Image Fun": "control_layers.0.attention.qkv.weight control_all_x_embedder.2-1.weight",
        "LLLite": "lllite_dit_blocks_0_mlp.down.0.weight",
        "MultiTalk": "blocks.0.audio_cross_attn.proj.weight audio_proj.proj1.weight",
        "FantasyTalking": "proj_model.proj.weight blocks.0.cross_attn.processor.k_proj.weight",
        "IP-Adapter": "image_proj.proj.weight ip_adapter.1.to_k_ip.weight",
        "IP-Adapter of Flux": "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight ip_adapter_proj_model.proj.weight",
        "PuLID": "pulid_ca.0.to_q.weight",
        "PhotoMaker": "id_encoder.visual_projection_2.weight",
        "GLIGEN": "position_net.linears.0.weight output_blocks.3.1.transformer_blocks.0.fuser.linear.weight",
    },
    "a style model": {"Redux": "redux_up.weight redux_down.weight", "T2I style": "style_embedding proj"},
    "a motion module": {
        "AnimateDiff": "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight",
        "AnimateDiff, diffusers": "mid_block.motion_modules.0.transformer_blocks.0.attn1.to_q.weight",
        "HotShot-XL": "up_blocks.1.temporal_attentions.0.transformer_blocks.0.attn1.to_q.weight",
    },
    "a textual inversion embedding": {
        "SD1.5": "emb_params",
        "A1111": "string_to_token.* string_to_param.*",
        "SDXL": "clip_l clip_g",
        "diffusers": "<cat-toy>",
    },
    "a LoRA": {
        "kohya": "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight",
        "XLabs": "double_blocks.0.processor.qkv_lora1.down.weight",
        "motion": "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        "attention processors": "transformer_blocks.0.attn1.processor.to_q_lora.up.weight",
    },
    "an image encoder": {
        "CLIP vision": "vision_model.encoder.layers.0.layer_norm1.weight visual_projection.weight",
        "OpenCLIP": "visual.transformer.resblocks.0.attn.in_proj_weight visual.transformer.resblocks.0.mlp.c_fc.weight",
        "DINOv2": "encoder.layer.0.layer_scale1.lambda1 encoder.layer.0.mlp.fc1.weight",
        "DINOv3": "layer.0.attention.o_proj.weight",
    },
    "a CLIP text encoder": {
        "OpenCLIP": "transformer.resblocks.0.mlp.c_fc.weight token_embedding.weight text_projection",
    },
    "a latent upscaler": {
        "LTX": "post_upsample_res_blocks.0.conv2.bias initial_conv.weight",
        "Hunyuan Video": "in_conv.conv.weight blocks.0.block.0.conv.weight",
        "Hunyuan Video, 1080p": "up.0.block.0.conv1.conv.weight",
    },
    "a VAE": {
        "SD": "decoder.conv_in.weight decoder.mid.attn_1.q.weight",
        "WAN": "encoder.middle.0.residual.0.gamma",
        "TAESD": "taesd_decoder.1.weight",
        "TAEHV": "decoder.1.weight decoder.22.bias",
        "TRELLIS.2": "shape_dec.blocks.1.16.to_subdiv.weight",
        "Hunyuan3D": "geo_decoder.cross_attn_decoder.ln_1.bias",
        "Stable Audio 3": "decoder.layers.3.transformers.0.pre_norm.alpha",
        "vocoder": "vocoder.backbone.channel_layers.0.0.bias",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind, names", [(kind, names) for kind, files in KINDS.items() for names in files.values()])
def test_kinds_of_files_without_a_quantized_loader_are_named_unless_the_switch_allows_them(header_source, kind, names):
    shapes = dict.fromkeys([*names.split(), "stages.9.fc.weight"], (64, 64))
    if kind == "a textual inversion embedding":
        shapes.pop("stages.9.fc.weight")
        assert str(find_refusal(shapes)).startswith(kind)
        return
    source = header_source(shapes)
    for general in (None, False):
        with pytest.raises(NothingToQuantizeError) as raised:
            make_plan(source, general=general)
        assert str(raised.value).startswith(f"{source.name} is {kind}") and GENERAL_SWITCH in str(raised.value)
    assert "stages.9.fc.weight" in make_plan(source, general=True).names("quantize")


def test_every_kind_is_tried_here(sentences):
    sentences(*(kind.description for kind in REFUSED))
    described = {kind.description for kind in REFUSED if not kind.always}
    assert {text for text in described if not text.startswith(tuple(KINDS))} == set()
    assert len(described) == len(KINDS)


def test_no_switch_allows_diffusers_names(header_source):
    """ComfyUI drops the tensors of such layers, whatever the user wants."""
    source = header_source({"joint_transformer_blocks.0.attn.add_k_proj.weight": (64, 64)})
    for general in (None, False, True):
        with pytest.raises(NothingToQuantizeError, match="diffusers"):
            make_plan(source, general=general)
    assert find_refusal(source.tensors, general=True) == DIFFUSERS.description


def test_a_checkpoint_with_a_vae_and_a_vocoder_is_no_vae(layer_names):
    names = [
        *layer_names("ltx2", "model.diffusion_model."),
        "vocoder.resblocks.0.convs1.0.weight",
        "vae.decoder.conv_in.conv.weight",
    ]
    assert find_refusal(names) is None


def test_the_vae_of_minimax_h3_is_unrecognized_since_comfyui_reads_it_quantized():
    """ComfyUI 0.33 gives it layers of mixed precision where the file has formats."""
    assert find_refusal(["decoder.transformer_blocks.0.scale1", "encoder.conv_in.weight"]) is None


# Choices that match no layer


def test_rules_that_match_no_layer_are_a_warning(layer_names, header_source, sentences):
    source = header_source(layer_names("flux"))
    used = parse_rules(("img_mlp",), '{"linear1": "int8"}')
    assert make_plan(source, rules=used).warnings == ()
    unused = parse_rules(("img_mpl", "img_mlp"), '{"linear9": "int8", "linear1": "int8"}')
    plan = make_plan(source, rules=unused)
    assert [rule.pattern for rule in plan.idle] == ["img_mpl", "linear9"]
    sentences(plan.warnings)


def test_warnings_are_bounded(header_source):
    rules = parse_rules([f"{'x' * 500}{index}" for index in range(40)], "")
    (warning,) = make_plan(header_source(UNKNOWN), rules=rules).warnings
    assert len(warning) < 1000 and " and 35 more" in warning


def test_the_report_has_the_warnings_of_the_plan(model):
    events = []
    made = quantize_tensors(model(), Recipe(keep=("nothing",), rounding="nearest"), on_event=events.append)
    (warning,) = made.report.warnings
    assert "keep pattern nothing" in warning and f"warning           {warning}" in made.report.table()
    assert events[0].warnings == (warning,)
    assert made.report.to_dict()["warnings"] == [warning]


def test_the_switch_is_no_part_of_the_recipe(model):
    plain, general = (quantize_tensors(model(), general=choice) for choice in (None, True))
    assert plain.metadata == general.metadata
    with pytest.raises(UnrecognizedModelError):
        quantize_tensors(model(), general=False)


# WAN's two models


def wan(name: str, architecture: str = "wan_22_i2v", folder: str = "", **metadata: str):
    """A source with the tensors of a WAN model."""
    tensors = header(architecture).tensors
    paths = {"paths": (Path("/models") / folder / name,)} if folder else {}
    return SimpleNamespace(name=name, tensors=tensors, metadata=metadata, **paths)


@pytest.mark.parametrize(
    "name, noise",
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "high"),
        ("wan2.2_i2v_low_noise_14B_fp16.safetensors", "low"),
        ("Wan2_2-I2V-A14B-HIGH_bf16.safetensors", "high"),
        ("Wan2.2-T2V-A14B-LowNoise-F16.gguf", "low"),
        ("wan22_i2v_highnoise.safetensors", "high"),
        ("DasiwaWAN22I2V14B_midnightflirtHigh_v8.safetensors", "high"),
        ("wan_flow_highres_slow.safetensors", None),
        ("wan22_high_and_low_merged.safetensors", None),
    ],
)
def test_an_expert_of_wan_is_told_by_its_name(name, noise):
    note = describe_expert(wan(name), PRESETS["wan"])
    assert note is not None and (f"is the {noise}-noise model" in note) is (noise is not None)


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
    assert make_plan(wan("wan2.2_i2v_low_noise_14B_fp16.safetensors")).warnings


@pytest.mark.parametrize(
    "architecture, name",
    [
        ("wan_t2v", "wan2.1_t2v_14B_bf16.safetensors"),
        ("wan_t2v", "Wan2_1-T2V-14B_fp16.safetensors"),
        ("wan_t2v", "wan2.1_t2v_14B_low_vram.safetensors"),
        *((name, "model.safetensors") for name in architectures() if name.startswith("wan_") and name not in ("wan_t2v", "wan_22_i2v", "wan_22_camera")),
        ("flux", "high_noise.safetensors"),
    ],
)  # fmt: skip
def test_models_that_are_complete_have_no_note(architecture, name):
    source = wan(name, architecture)
    assert make_plan(source, general=False).warnings == ()


# LTX-Video and LTX-2


@pytest.mark.parametrize("architecture", ["ltxv", "ltxv_13b", "ltx2", "ltx23", "ltx25"])
def test_files_without_the_configuration_that_comfyui_reads_have_a_note(architecture, sentences):
    source = header(architecture)
    assert make_plan(source).warnings == ()  # not a file
    source.paths = (Path("model.safetensors"),)
    (note,) = make_plan(source, general=False).warnings
    sentences(note)
    source.metadata = {"config": '{"transformer": {"causal_temporal_positioning": true}}'}
    assert make_plan(source).warnings == ()
