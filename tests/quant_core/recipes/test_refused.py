"""Kinds of files that ComfyUI does not load quantized, by their tensor names."""

import pytest

from learned_rounding.quant_core.errors import NothingToQuantizeError
from learned_rounding.quant_core.recipes import make_plan
from learned_rounding.quant_core.recipes.refused import DIFFUSERS, GENERAL_SWITCH, REFUSED, find_refusal
from learned_rounding.tests.architectures import architectures, read
from learned_rounding.tests.architectures.collect import DIFFUSION
from learned_rounding.tests.architectures.table import examine

PREFIXES = ["", "model.diffusion_model."]
OF_DIFFUSERS = {
    "auraflow": "joint_transformer_blocks.0.attn.add_k_proj.weight",
    "pixart": "adaln_single.emb.timestep_embedder.linear_1.bias pos_embed.proj.bias transformer_blocks.0.attn1.to_q.weight",
    "zimage": "noise_refiner.0.attention.norm_k.weight noise_refiner.0.attention.to_k.weight",
    "flux": "x_embedder.weight transformer_blocks.0.attn.add_k_proj.weight single_transformer_blocks.0.proj_mlp.weight",
    "sd3": "pos_embed.proj.weight transformer_blocks.0.attn.add_q_proj.weight",
    "unet": "conv_in.weight down_blocks.0.resnets.0.norm1.weight mid_block.attentions.0.proj_in.weight",
}


def test_diffusers_names_are_refused_because_comfyui_drops_their_scales(subtests, header_source, sentences):
    """ComfyUI's own converters make such names of real models in tests/nodes/host/test_opening.py."""
    for prefix in PREFIXES:
        for family, names in OF_DIFFUSERS.items():
            with subtests.test(family, prefix=prefix), sentences.raises(NothingToQuantizeError):
                make_plan(header_source({prefix + name: (64, 64) for name in names.split()}))


def test_no_switch_allows_diffusers_names(header_source):
    """ComfyUI drops the tensors of such layers, whatever the user wants."""
    source = header_source({"joint_transformer_blocks.0.attn.add_k_proj.weight": (64, 64)})
    for general in (None, False, True):
        with pytest.raises(NothingToQuantizeError, match="diffusers"):
            make_plan(source, general=general)


def test_advice_for_diffusers_names_does_not_mention_the_switch():
    names = ["joint_transformer_blocks.0.attn.add_k_proj.weight"]
    assert find_refusal(names, general=True) == find_refusal(names) == DIFFUSERS.description


# Names of diffusers' classes that open_source does not convert, or not without the rest of the model.
UNCONVERTED = {
    "wan": "condition_embedder.time_embedder.linear_1.weight blocks.0.attn1.to_q.weight",
    "ltx2": "audio_time_embed.emb.timestep_embedder.linear_1.weight time_embed.emb.timestep_embedder.linear_1.weight",
    "hunyuan image": "context_embedder.proj_in.weight transformer_blocks.0.attn.to_q.weight",
    "flux2": "double_stream_modulation_img.linear.weight x_embedder.weight transformer_blocks.0.attn.add_k_proj.weight",
    "chroma": "distilled_guidance_layer.layers.0.linear_1.weight x_embedder.weight transformer_blocks.0.attn.add_k_proj.weight",
    "mochi": "time_embed.timestep_embedder.linear_1.weight transformer_blocks.0.attn1.to_q.weight",
    "cosmos": "time_embed.t_embedder.linear_1.weight transformer_blocks.0.attn1.to_q.weight",
    "krea2": "time_embed.linear_1.weight transformer_blocks.0.attn.to_q.weight",
    "cogvideox": "transformer_blocks.0.norm1.norm.weight transformer_blocks.0.attn1.to_q.weight",
    "lumina2": "time_caption_embed.timestep_embedder.linear_1.weight noise_refiner.0.attn.to_q.weight layers.0.attn.to_q.weight",
}


def test_diffusers_names_without_a_conversion_are_refused(subtests, header_source, sentences):
    for prefix in PREFIXES:
        for family, names in UNCONVERTED.items():
            with subtests.test(family, prefix=prefix):
                with sentences.raises(NothingToQuantizeError) as error:
                    make_plan(header_source({prefix + name: (64, 64) for name in names.split()}))
                assert "no conversion" in str(error.value)


def test_no_model_under_comfyuis_names_is_refused(subtests):
    for name in architectures():
        with subtests.test(name):
            assert find_refusal(read(name)) is None


def test_no_checkpoint_under_comfyuis_names_is_refused(subtests):
    """One of each family: the names of its models differ little."""
    for name in {examine(name).preset: name for name in DIFFUSION if examine(name).quantized}.values():
        with subtests.test(name):
            assert find_refusal(f"model.diffusion_model.{tensor}" for tensor in read(name)) is None


OTHERS = {
    "a ControlNet": """
        controlnet_blocks.0.weight controlnet_cond_embedding.conv_in.weight control_model.input_hint_block.0.weight after_proj_list.18.weight
        model.control_model.input_hint_block.0.weight
    """,
    "a patch for a model": """
        control_layers.0.attention.qkv.weight control_all_x_embedder.2-1.weight lllite_conditioning1.conv1.weight redux_up.weight
        image_proj.proj.weight
    """,
    "a LoRA": """
        lora_unet_double_blocks_0_img_attn_proj.lora_up.weight transformer.blocks.0.attn.to_q.lora_A.weight unet.mid_block.to_q_lora.down.weight
        diffusion_model.blocks.0.ffn.0.lora_B.default.weight lycoris_blocks_0.lokr_w1 lora_te_text_model.hada_w1_a blocks.0.q.dora_scale
        diffusion_model.blocks.0.ffn.0.diff_b transformer.single_transformer_blocks.0.attn.to_k.lora.up.weight
    """,
    "an image encoder": """
        vision_model.encoder.layers.0.layer_norm1.weight visual.transformer.resblocks.0.attn.in_proj_weight encoder.layer.0.layer_scale1.lambda1
    """,
    "a VAE": """
        decoder.conv_in.weight encoder.middle.0.residual.0.gamma decoder.up_blocks.0.resnets.0.conv1.weight quant_conv.weight
        taesd_decoder.1.weight decoder.mid.attn_1.q.weight
    """,
}  # fmt: skip


def test_each_mark_of_what_is_no_model_is_enough(subtests, header_source, sentences):
    """Beside a layer that the general rule would quantize."""
    for kind, names in OTHERS.items():
        for name in names.split():
            with subtests.test(kind, name=name), sentences.raises(NothingToQuantizeError):
                make_plan(header_source({name: (64, 64), "blocks.0.attn.to_q.weight": (64, 64)}))


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
EMBEDDING = "a textual inversion embedding"  # has no layer
LAYER = "stages.9.fc.weight"


def published_files():
    """(kind, name of a model, shapes of its tensors and of a layer that the general rule quantizes)"""
    for kind, files in KINDS.items():
        for model, names in files.items() if kind != EMBEDDING else ():
            yield kind, model, dict.fromkeys([*names.split(), LAYER], (64, 64))


def test_kinds_of_files_without_a_quantized_loader_are_named(subtests, header_source):
    for kind, model, shapes in published_files():
        for general in (None, False):
            with subtests.test(kind, model=model, general=general):
                source = header_source(shapes)
                with pytest.raises(NothingToQuantizeError) as raised:
                    make_plan(source, general=general)
                assert str(raised.value).startswith(f"{source.name} is {kind}")
                assert GENERAL_SWITCH in str(raised.value)


def test_the_switch_allows_kinds_of_files_without_a_quantized_loader(subtests, header_source):
    for kind, model, shapes in published_files():
        with subtests.test(kind, model=model):
            assert LAYER in make_plan(header_source(shapes), general=True).names("quantize")


def test_textual_inversion_embeddings_are_named(subtests):
    for model, names in KINDS[EMBEDDING].items():
        with subtests.test(model):
            assert find_refusal(names.split()).startswith(EMBEDDING)


def test_descriptions_of_kinds(sentences):
    sentences(*(kind.description for kind in REFUSED))


def test_every_kind_is_tried_here():
    described = {kind.description for kind in REFUSED if not kind.always}
    assert {text for text in described if not text.startswith(tuple(KINDS))} == set()
    assert len(described) == len(KINDS)


def test_an_image_encoder_is_refused():
    assert find_refusal(["vision_model.encoder.layers.0.layer_norm1.weight"])


def test_an_image_encoder_beside_a_text_encoder_is_not_refused(layer_names):
    assert find_refusal([*layer_names("clip_l"), "vision_model.encoder.layers.0.layer_norm1.weight"]) is None


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


UMT5 = "token_embedding norm blocks.0.attn.q blocks.0.attn.o blocks.0.ffn.gate.0 blocks.0.ffn.fc1 blocks.0.ffn.fc2 blocks.0.pos_embedding.embedding"


def test_umt5_of_wans_repository_is_refused_with_the_file_to_take_instead(header_source, sentences):
    source = header_source({f"{name}.weight": (64, 64) for name in UMT5.split()})
    with sentences.raises(NothingToQuantizeError):
        make_plan(source)
