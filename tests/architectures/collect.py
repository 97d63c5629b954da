"""Lists the true tensors of every model that ComfyUI knows: its own classes, built at their true size on torch's meta device.

    PYTHON tests/architectures/collect.py COMFYUI > lists.json

PYTHON is a ComfyUI's own interpreter and COMFYUI the folder of its main.py; nothing of this package is imported. The
output is ``{"version": …, "missing": […], "lists": {name: [[tensor, kind, [sides]], …]}}``, missing being the classes of
diffusion models that ComfyUI knows and no list is of; models that this ComfyUI does not have are left out. A tensor's kind is that of the module that
holds it: ``linear`` (of ComfyUI's operations: the only ones read as quantized), ``embedding``, ``experts`` and ``conv`` (of
its operations too), ``norm``, or ``other`` (a parameter that a model uses by itself, a layer outside the operations, a
buffer). What a file calls differently than the module does is listed under the file's name.

A diffusion model counts only when ComfyUI's own detection, given the listed names and shapes, recognises the class that
was meant and builds the same model again.
"""

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["DIFFUSION", "TEXT_ENCODERS", "Architecture", "collect"]

# Where the sizes are from, if not ComfyUI's own constants and defaults.
RELEASE = "sizes of the released checkpoint"
UNSURE = "blocks as ComfyUI's class makes them; the number of blocks or their width is our assumption"
OWN = "sizes in ComfyUI's source"


@dataclass(frozen=True)
class Architecture:
    """One model to build.

    Attributes:
        title: the released model.
        build: diffusion model: name of the class in comfy.supported_models; text encoder: ``module:class``, within comfy.
        options: diffusion model: its ``unet_config``; text encoder: a JSON file beside its module, or values.
        sizes: where they are from.
        renamed: beginnings of names, in the module → in the file; the first that fits.
        beside: shapes of tensors that its checkpoint must have beside the model for ComfyUI to recognise it, each of the kind other.
        metadata: what the file's header must say for ComfyUI to recognise the model.
        device: where to build it; "cpu" for a class that computes while it is built (memory is reserved, not touched).
    """

    title: str
    build: str
    options: dict | str = field(default_factory=dict)
    sizes: str = OWN
    renamed: dict[str, str] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)
    beside: dict = field(default_factory=dict)
    device: str = "meta"


def _unet(**more) -> dict:
    base = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
        "legacy": False, "adm_in_channels": None, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_linear_in_transformer": True,
        "context_dim": 1024, "use_temporal_attention": False, "use_temporal_resblock": False,
    }  # fmt: skip
    return base | ({"num_classes": "sequential"} if more.get("adm_in_channels") else {}) | more


def _xl(depth: list, output: list, middle: int, blocks: int = 2, **more) -> dict:
    return _unet(
        adm_in_channels=2816, num_res_blocks=[blocks] * 3, channel_mult=[1, 2, 4], transformer_depth=depth,
        transformer_depth_middle=middle, transformer_depth_output=output, context_dim=2048, **more,
    )  # fmt: skip


_SDXL = ([0, 0, 2, 2, 10, 10], [0, 0, 0, 2, 2, 2, 10, 10, 10], 10)
_VIDEO = {
    "in_channels": 8, "use_temporal_attention": True, "use_temporal_resblock": True, "extra_ff_mix_layer": True,
    "use_spatial_context": True, "merge_strategy": "learned_with_images", "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1], "disable_temporal_crossattention": False,
}  # fmt: skip


def _sd3(depth: int, **more) -> dict:
    size = more.pop("grid", 192)
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": depth * 64}}
    return {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": depth, "input_size": None, "adm_in_channels": 2048,
        "context_embedder_config": context, "num_patches": size * size, "pos_embed_max_size": size,
        "pos_embed_scaling_factor": None, **more,
    }  # fmt: skip


def _flux(**more) -> dict:
    return {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 3072, "num_heads": 24,
        "context_in_dim": 4096, "vec_in_dim": 768, "mlp_ratio": 4.0, "depth": 19, "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], **more,
    }  # fmt: skip


def _flux2(hidden: int, depth: int, single: int, context: int, guidance: bool) -> dict:
    return _flux(
        image_model="flux2", in_channels=128, out_channels=128, patch_size=1, hidden_size=hidden, num_heads=hidden // 128,
        context_in_dim=context, vec_in_dim=None, mlp_ratio=3.0, depth=depth, depth_single_blocks=single,
        axes_dim=[32, 32, 32, 32], theta=2000, qkv_bias=False, guidance_embed=guidance, txt_ids_dims=[3],
        global_modulation=True, mlp_silu_act=True, ops_bias=False, default_ref_method="index", ref_index_scale=10.0,
    )  # fmt: skip


def _chroma(**more) -> dict:
    config = _flux(image_model="chroma", in_channels=64, out_channels=64, vec_in_dim=None)
    del config["guidance_embed"]
    return config | {"in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5, **more}


_RADIANCE = {
    "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 64,
    "nerf_mlp_ratio": 4, "nerf_depth": 4, "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_embedder_dtype": None,
    "use_sequential_txt_ids": False,
}  # fmt: skip


def _hunyuan(**more) -> dict:
    config = {
        "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 768,
        "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "depth": 20, "depth_single_blocks": 40,
        "axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False,
        "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False, **more,
    }  # fmt: skip
    return config | {"num_heads": config["hidden_size"] // 128}


_HUNYUAN15 = {
    "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None, "context_in_dim": 3584,
    "hidden_size": 2048, "depth": 54, "depth_single_blocks": 0, "guidance_embed": False, "byt5": True,
    "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True,
}  # fmt: skip
_HUNYUAN_IMAGE = {
    "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "vec_in_dim": None, "context_in_dim": 3584,
    "hidden_size": 3584, "axes_dim": [64, 64], "guidance_embed": False, "byt5": True,
}  # fmt: skip


def _wan(kind: str = "t2v", dim: int = 5120, **more) -> dict:
    ffn, layers = {1536: (8960, 30), 3072: (14336, 30), 5120: (13824, 40)}[dim]
    return {
        "image_model": "wan2.1", "model_type": kind, "dim": dim, "ffn_dim": ffn, "num_layers": layers, "num_heads": dim // 128,
        "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True,
        "cross_attn_norm": True, "eps": 1e-6, **more,
    }  # fmt: skip


def _cosmos(channels: int, in_channels: int = 16) -> dict:
    return {
        "image_model": "cosmos", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": in_channels,
        "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": channels, "block_config": "FA-CA-MLP",
        "concat_padding_mask": True, "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop",
        "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 256,
        "num_blocks": {4096: 28, 5120: 36}[channels], "num_heads": channels // 128, "extra_per_block_abs_pos_emb": True,
        "extra_per_block_abs_pos_emb_type": "learnable",
    }  # fmt: skip


def _predict2(channels: int, in_channels: int = 16, model: str = "cosmos_predict2") -> dict:
    return {
        "image_model": model, "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": in_channels,
        "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": channels, "concat_padding_mask": True,
        "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop",
        "min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 256,
        "num_blocks": {2048: 28, 5120: 36}[channels], "num_heads": channels // 128, "rope_enable_fps_modulation": False,
    }  # fmt: skip


def _lumina(dim: int, layers: int, text: int, **more) -> dict:
    shared = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "qk_norm": True}
    by_dim = {
        2304: {"n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512], "ffn_dim_multiplier": 4.0},
        3840: {
            "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
            "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
        },
    }  # fmt: skip
    return shared | {"dim": dim, "n_layers": layers, "cap_feat_dim": text} | by_dim[dim] | more


def _cog(heads: int, layers: int, **more) -> dict:
    return {
        "image_model": "cogvideox", "num_attention_heads": heads, "attention_head_dim": 64, "time_embed_dim": 512,
        "num_layers": layers, "in_channels": 16, "text_embed_dim": 4096, "use_learned_positional_embeddings": False,
        "use_rotary_positional_embeddings": True, **more,
    }  # fmt: skip


def _seed(layers: int, dim: int, **more) -> dict:
    return {
        "image_model": "seedvr2",
        "num_layers": layers,
        "vid_dim": dim,
        "heads": dim // 128,
        "norm_eps": 1e-5,
        **more,
    }


def _ltx(model: str, layers: int, head: int, **more) -> dict:
    return {
        "image_model": model,
        "num_layers": layers,
        "attention_head_dim": head,
        "cross_attention_dim": 32 * head,
        **more,
    }


_LTX23 = {"apply_gated_attention": True, "caption_proj_before_connector": True, "cross_attention_adaln": True}
_LTX25 = _LTX23 | {
    "caption_projection_first_linear": False, "ff_bias": False, "use_keyframes_abs_pos_embedding": True,
    "connector_apply_gated_attention": True, "connector_num_layers": 8, "connector_num_attention_heads": 32,
    "audio_connector_num_attention_heads": 32, "audio_connector_attention_head_dim": 64,
}  # fmt: skip
_MOCHI = {
    "image_model": "mochi_preview", "depth": 48, "patch_size": 2, "num_heads": 24, "hidden_size_x": 3072,
    "hidden_size_y": 1536, "mlp_ratio_x": 4.0, "mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True,
    "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True,
    "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 4096,
    "t5_token_length": 256,
}  # fmt: skip
_HIDREAM = {
    "image_model": "hidream", "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "caption_channels": [4096, 4096],
    "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [*range(32), *[31] * 16], "num_attention_heads": 20,
    "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 16, "num_single_layers": 32, "out_channels": 16,
    "patch_size": 2, "text_emb_dim": 2048,
}  # fmt: skip
_ACE = {
    "audio_model": "ace", "attention_head_dim": 128, "in_channels": 8, "inner_dim": 2560, "max_height": 16,
    "max_position": 32768, "max_width": 32768, "mlp_ratio": 2.5, "num_attention_heads": 20, "num_layers": 24,
    "out_channels": 8, "patch_size": [16, 1], "speaker_embedding_dim": 512, "text_embedding_dim": 768,
    "ssl_encoder_depths": [8, 8], "ssl_latent_dims": [1024, 768], "ssl_names": ["mert", "m-hubert"],
    "lyric_encoder_vocab_size": 6693, "lyric_hidden_size": 1024,
}  # fmt: skip
_OMNIGEN2 = {
    "image_model": "omnigen2", "axes_dim_rope": [40, 40, 40], "axes_lens": [1024, 1664, 1664], "ffn_dim_multiplier": None,
    "hidden_size": 2520, "in_channels": 16, "multiple_of": 256, "norm_eps": 1e-05, "num_attention_heads": 21,
    "num_kv_heads": 7, "num_layers": 32, "num_refiner_layers": 2, "out_channels": None, "patch_size": 2,
    "text_feat_dim": 2048, "timestep_scale": 1000.0,
}  # fmt: skip


def _kandinsky(dim: int, text: int, visual: int, **more) -> dict:
    return {
        "image_model": "kandinsky5", "model_dim": dim, "ff_dim": 4 * dim, "num_text_blocks": text, "num_visual_blocks": visual,
        "visual_embed_dim": 132, "axes_dims": (16, 24, 24) if dim == 1792 else (32, 48, 48), **more,
    }  # fmt: skip


_KANDINSKY6_LITE = {
    "time_dim": 512, "model_dim": 1792, "ff_dim": 7168, "num_text_blocks": 2, "num_visual_blocks": 32, "axes_dims": (16, 24, 24),
    "model_dim_a": 896, "time_dim_a": 512, "ff_dim_a": 3584, "head_dim_a": 64,
}  # fmt: skip


def _audio(**more) -> dict:
    return {
        "audio_model": "dit1.0", "global_cond_dim": 1536, "project_cond_tokens": False, "embed_dim": 1536, "depth": 24,
        "num_heads": 24, "timestep_features_type": "learned", "io_channels": 64, "input_concat_dim": 0, **more,
    }  # fmt: skip


A = Architecture
DIFFUSION: dict[str, Architecture] = {
    "sd15": A("Stable Diffusion 1.5", "SD15", _unet(context_dim=768, use_linear_in_transformer=False)),
    "sd15_inpaint": A("Stable Diffusion 1.5 Inpainting", "SD15", _unet(context_dim=768, use_linear_in_transformer=False, in_channels=9)),
    "sd15_instructpix2pix": A("InstructPix2Pix", "SD15_instructpix2pix", _unet(context_dim=768, use_linear_in_transformer=False, in_channels=8)),
    "sd20": A("Stable Diffusion 2.0 and 2.1", "SD20", _unet()),
    "sd21_unclip_l": A("Stable Diffusion 2.1 unCLIP-L", "SD21UnclipL", _unet(adm_in_channels=1536)),
    "sd21_unclip_h": A("Stable Diffusion 2.1 unCLIP-H", "SD21UnclipH", _unet(adm_in_channels=2048)),
    "lotus_d": A("Lotus D (depth)", "LotusD", _unet(adm_in_channels=4)),
    "stable_zero123": A(
        "Stable Zero123", "Stable_Zero123", _unet(context_dim=768, use_linear_in_transformer=False, in_channels=8), RELEASE,
        beside={"cc_projection.weight": [768, 772], "cc_projection.bias": [768]}),
    "sdxl": A("Stable Diffusion XL", "SDXL", _xl(*_SDXL)),
    "sdxl_instructpix2pix": A("SDXL InstructPix2Pix", "SDXL_instructpix2pix", _xl(*_SDXL, in_channels=8)),
    "sdxl_refiner": A("SDXL Refiner", "SDXLRefiner", _unet(
        adm_in_channels=2560, model_channels=384, context_dim=1280, transformer_depth=[0, 0, 4, 4, 4, 4, 0, 0],
        transformer_depth_middle=4, transformer_depth_output=[0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0])),
    "ssd_1b": A("SSD-1B", "SSD1B", _xl([0, 0, 2, 2, 4, 4], [0, 0, 0, 1, 1, 2, 10, 4, 4], -1)),
    "segmind_vega": A("Segmind Vega", "Segmind_Vega", _xl([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], -1)),
    "koala_700m": A("KOALA 700M", "KOALA_700M", _xl([0, 2, 5], [0, 0, 2, 2, 5, 5], -2, 1)),
    "koala_1b": A("KOALA 1B", "KOALA_1B", _xl([0, 2, 6], [0, 0, 2, 2, 6, 6], 6, 1)),
    "sd_x4_upscaler": A("Stable Diffusion x4 Upscaler", "SD_X4Upscaler", _unet(
        in_channels=7, model_channels=256, channel_mult=[1, 2, 2, 4], transformer_depth=[0, 0, 1, 1, 1, 1, 1, 1],
        transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]), RELEASE),
    "svd": A("Stable Video Diffusion", "SVD_img2vid", _unet(adm_in_channels=768, **_VIDEO)),
    "sv3d_u": A("Stable Video 3D (u)", "SV3D_u", _unet(adm_in_channels=256, **_VIDEO)),
    "sv3d_p": A("Stable Video 3D (p)", "SV3D_p", _unet(adm_in_channels=1280, **_VIDEO)),
    "stable_cascade_b": A("Stable Cascade, stage B", "Stable_Cascade_B", {"stable_cascade_stage": "b"}),
    "stable_cascade_b_lite": A("Stable Cascade, stage B lite", "Stable_Cascade_B", {
        "stable_cascade_stage": "b", "c_hidden": [320, 576, 1152, 1152], "nhead": [-1, 9, 18, 18],
        "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]], "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]]}),
    "stable_cascade_c": A("Stable Cascade, stage C", "Stable_Cascade_C", {"stable_cascade_stage": "c"}),
    "stable_cascade_c_lite": A("Stable Cascade, stage C lite", "Stable_Cascade_C", {
        "stable_cascade_stage": "c", "c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]}),
    "sd3_medium": A("Stable Diffusion 3 Medium", "SD3", _sd3(24), RELEASE),
    "sd35_medium": A("Stable Diffusion 3.5 Medium", "SD3", _sd3(24, grid=384, qk_norm="rms", x_block_self_attn_layers=list(range(13))), RELEASE),
    "sd35_large": A("Stable Diffusion 3.5 Large", "SD3", _sd3(38, qk_norm="rms"), RELEASE),
    "stable_audio": A("Stable Audio Open 1.0", "StableAudio", _audio(), RELEASE),
    "stable_audio_3": A("Stable Audio 3", "StableAudio3", _audio(
        global_cond_shared_embed=True, global_cond_type="adaLN", norm_type="rms_norm", num_memory_tokens=64,
        attn_kwargs={"qk_norm": "rms", "differential": True}, timestep_features_type="expo"), UNSURE),
    "auraflow": A("AuraFlow", "AuraFlow", {"max_seq": 2304, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36}),
    "pixart_alpha": A("PixArt Alpha", "PixArtAlpha", {
        "image_model": "pixart_alpha", "num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4, "depth": 28,
        "model_max_length": 120, "input_size": 128, "pe_interpolation": 2, "micro_condition": True}),
    "pixart_sigma": A("PixArt Sigma", "PixArtSigma", {
        "image_model": "pixart_sigma", "num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4, "depth": 28,
        "model_max_length": 300, "input_size": 128, "pe_interpolation": 2, "micro_condition": False}),
    "hunyuan_dit": A("Hunyuan DiT 1.2", "HunyuanDiT", {"image_model": "hydit", "depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637}),
    "hunyuan_dit_1": A("Hunyuan DiT 1.1", "HunyuanDiT1", {
        "image_model": "hydit1", "depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637, "size_cond": True, "use_style_cond": True}),
    "flux": A("Flux.1 dev, Kontext, Krea", "Flux", _flux()),
    "flux_schnell": A("Flux.1 schnell", "FluxSchnell", _flux(guidance_embed=False)),
    "flux_fill": A("Flux.1 Fill", "FluxInpaint", _flux(in_channels=96)),
    "ovis_image": A("Ovis-Image", "FluxSchnell", _flux(
        depth=6, depth_single_blocks=27, context_in_dim=2048, vec_in_dim=None, guidance_embed=False, yak_mlp=True,
        txt_norm=True, txt_ids_dims=[1, 2]), RELEASE),
    "longcat_image": A("LongCat-Image", "LongCatImage", _flux(
        depth=10, depth_single_blocks=20, context_in_dim=3584, vec_in_dim=None, guidance_embed=False, txt_ids_dims=[1, 2]), RELEASE),
    "flux2": A("Flux.2 dev", "Flux2", _flux2(6144, 8, 48, 15360, True), RELEASE),
    "flux2_klein_4b": A("Flux.2 Klein 4B", "Flux2", _flux2(3072, 5, 20, 7680, False), RELEASE),
    "flux2_klein_9b": A("Flux.2 Klein 9B", "Flux2", _flux2(4096, 8, 24, 12288, False), RELEASE),
    "chroma": A("Chroma1", "Chroma", _chroma()),
    "chroma_radiance": A("Chroma1-Radiance", "ChromaRadiance", _chroma(**_RADIANCE, nerf_final_head_type="conv", use_x0=False)),
    "chroma_radiance_x0": A("Chroma1-Radiance x0", "ChromaRadiance", _chroma(**_RADIANCE, nerf_final_head_type="conv", use_x0=True)),
    "lens": A("Lens", "Lens", {"image_model": "lens"}),
    "mochi": A("Mochi 1", "GenmoMochi", _MOCHI),
    "ltxv": A("LTX-Video 2B", "LTXV", _ltx("ltxv", 28, 64)),
    "ltxv_13b": A("LTX-Video 13B", "LTXV", _ltx("ltxv", 48, 128), RELEASE),
    "ltx2": A("LTX-2 19B", "LTXAV", _ltx("ltxav", 48, 128)),
    "ltx23": A("LTX-2.3 22B", "LTXAV", _ltx("ltxav", 48, 128, **_LTX23), UNSURE, metadata=_LTX23),
    "ltx25": A("LTX-2.5 22B", "LTXAV", _ltx("ltxav", 48, 128, **_LTX25), RELEASE, metadata=_LTX25),
    "minimax_h3": A("MiniMax H3", "MiniMaxH3", {"image_model": "minimax_h3"}),
    "minimax_h3_pruned": A("MiniMax H3, pruned", "MiniMaxH3", {"image_model": "minimax_h3", "adaln_curve_grid": 1025, "time_embed_dim": 8}, RELEASE),
    "prism": A("Prism", "Prism"),
    "hunyuan": A("Hunyuan Video", "HunyuanVideo", _hunyuan(), RELEASE),
    "hunyuan_i2v": A("Hunyuan Video I2V", "HunyuanVideoI2V", _hunyuan(in_channels=33), RELEASE),
    "hunyuan_skyreels": A("SkyReels I2V", "HunyuanVideoSkyreelsI2V", _hunyuan(in_channels=32), RELEASE),
    "hunyuan_1_5": A("Hunyuan Video 1.5", "HunyuanVideo15", _hunyuan(**_HUNYUAN15), RELEASE),
    "hunyuan_1_5_sr": A("Hunyuan Video 1.5 SR", "HunyuanVideo15_SR_Distilled", _hunyuan(**_HUNYUAN15 | {"in_channels": 98}), RELEASE),
    "hunyuan_image": A("Hunyuan Image 2.1", "HunyuanImage21", _hunyuan(**_HUNYUAN_IMAGE), RELEASE),
    "hunyuan_image_distilled": A("Hunyuan Image 2.1 distilled", "HunyuanImage21", _hunyuan(
        **_HUNYUAN_IMAGE | {"guidance_embed": True, "meanflow": True}), RELEASE),
    "hunyuan_image_refiner": A("Hunyuan Image 2.1 Refiner", "HunyuanImage21Refiner", _hunyuan(
        in_channels=128, out_channels=64, patch_size=[1, 1, 1], vec_in_dim=None, context_in_dim=3584, hidden_size=3328,
        guidance_embed=False, meanflow=True), UNSURE),
    "cosmos_7b": A("Cosmos 1 T2V 7B", "CosmosT2V", _cosmos(4096)),
    "cosmos_14b": A("Cosmos 1 T2V 14B", "CosmosT2V", _cosmos(5120)),
    "cosmos_7b_i2v": A("Cosmos 1 I2V 7B", "CosmosI2V", _cosmos(4096, 17)),
    "cosmos_predict2_2b": A("Cosmos Predict2 T2I 2B", "CosmosT2IPredict2", _predict2(2048)),
    "cosmos_predict2_14b": A("Cosmos Predict2 T2I 14B", "CosmosT2IPredict2", _predict2(5120)),
    "cosmos_predict2_2b_i2v": A("Cosmos Predict2 I2V 2B", "CosmosI2VPredict2", _predict2(2048, 17)),
    "anima": A("Anima", "Anima", _predict2(2048, model="anima")),
    "lumina2": A("Lumina Image 2.0", "Lumina2", _lumina(2304, 26, 2304), RELEASE),
    "newbie": A("NewBie Image", "Lumina2", _lumina(2304, 36, 2560, clip_text_dim=1024), UNSURE),
    "zimage": A("Z-Image, Z-Image Turbo", "ZImage", _lumina(3840, 30, 2560, pad_tokens_multiple=32), RELEASE),
    "zimage_omni": A("Z-Image Omni", "ZImage", _lumina(3840, 30, 2560, pad_tokens_multiple=32, siglip_feat_dim=1152), UNSURE),
    "zimage_pixel": A("Zeta-Chroma (Z-Image in pixel space)", "ZImagePixelSpace", _lumina(
        3840, 30, 2560, image_model="zimage_pixel", pad_tokens_multiple=32, patch_size=32, in_channels=3,
        decoder_in_channels=3072, use_x0=True), UNSURE),
    "pixeldit": A("PixelDiT", "PixelDiTT2I", {"image_model": "pixeldit_t2i"}, renamed={"": "core."}),
    "pid": A("PiD", "PiD", {"image_model": "pid"}),
    "wan_t2v": A("WAN 2.1 and 2.2 T2V 14B", "WAN21_T2V", _wan(), RELEASE),
    "wan_t2v_1_3b": A("WAN 2.1 T2V 1.3B", "WAN21_T2V", _wan(dim=1536), RELEASE),
    "wan_i2v": A("WAN 2.1 I2V 14B", "WAN21_I2V", _wan("i2v", in_dim=36), RELEASE),
    "wan_22_i2v": A("WAN 2.2 I2V 14B", "WAN21_T2V", _wan(in_dim=36), RELEASE),
    "wan_22_5b": A("WAN 2.2 TI2V 5B", "WAN22_T2V", _wan(dim=3072, in_dim=48, out_dim=48), RELEASE),
    "wan_flf2v": A("WAN 2.1 FLF2V 14B", "WAN21_I2V", _wan("i2v", in_dim=36, flf_pos_embed_token_number=514), RELEASE),
    "wan_fun_control": A("WAN 2.1 Fun Control 14B", "WAN21_FunControl2V", _wan("i2v", in_dim=48, in_dim_ref_conv=16), RELEASE),
    "wan_camera": A("WAN 2.1 Fun Camera 14B", "WAN21_Camera", _wan("camera", in_dim=32), RELEASE),
    "wan_22_camera": A("WAN 2.2 Fun Camera 14B", "WAN22_Camera", _wan("camera_2.2", in_dim=36), RELEASE),
    "wan_vace": A("WAN 2.1 VACE 14B", "WAN21_Vace", _wan("vace", vace_layers=8, vace_in_dim=96), RELEASE),
    "wan_vace_1_3b": A("WAN 2.1 VACE 1.3B", "WAN21_Vace", _wan("vace", 1536, vace_layers=15, vace_in_dim=96), RELEASE),
    "wan_s2v": A("WAN 2.2 S2V 14B", "WAN22_S2V", _wan("s2v"), RELEASE),
    "wan_humo": A("HuMo 17B", "WAN21_HuMo", _wan("humo", in_dim=36), RELEASE),
    "wan_animate": A("WAN 2.2 Animate 14B", "WAN22_Animate", _wan("animate", in_dim=36), RELEASE),
    "wan_animate2": A("WAN Animate 2", "WAN_Animate2", _wan("animate2", in_dim=36), UNSURE, metadata={"model_type": "animate2"}),
    "wan_scail": A("SCAIL 14B", "WAN21_SCAIL", _wan("scail", in_dim=20)),
    "wan_scail2": A("SCAIL 2 14B", "WAN21_SCAIL2", _wan("scail2", in_dim=20)),
    "wan_dancer": A("WanDancer 14B", "WAN22_WanDancer", _wan("wandancer", in_dim=36), UNSURE),
    "wan_flow_rvs": A("FlowRVS", "WAN21_FlowRVS", _wan("flow_rvs", dim=1536), UNSURE, metadata={"model_type": "flow_rvs"}),
    "wan_causal": A("WAN 2.1 T2V 1.3B, causal", "WAN21_CausalAR_T2V", _wan(dim=1536, causal_ar=True), RELEASE, metadata={"causal_ar": True}),
    "hunyuan3d": A("Hunyuan3D 2", "Hunyuan3Dv2", {
        "image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 1536, "hidden_size": 1024, "depth": 16, "depth_single_blocks": 32}),
    "hunyuan3d_mini": A("Hunyuan3D 2 mini", "Hunyuan3Dv2mini", {
        "image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 1536, "hidden_size": 1024, "depth": 8, "depth_single_blocks": 16}),
    "hunyuan3d_2_1": A("Hunyuan3D 2.1", "Hunyuan3Dv2_1", {"image_model": "hunyuan3d2_1", "guidance_cond_proj_dim": None}),
    "triposplat": A("TripoSplat", "TripoSplat", {"image_model": "triposplat"}),
    "trellis2": A("TRELLIS.2", "Trellis2", {"image_model": "trellis2", "resolution": 64, "init_txt_model": False, "txt_only": False}),
    "hidream": A("HiDream-I1, E1", "HiDream", _HIDREAM),
    "sensenova_u15": A("SenseNova U1.5", "SenseNovaU15", {"image_model": "sensenova_u15", "has_lm_head": True}),
    "hidream_o1": A("HiDream-O1", "HiDreamO1", {"image_model": "hidream_o1"}),
    "ace_step": A("ACE-Step 1", "ACEStep", _ACE),
    "ace_step_15": A("ACE-Step 1.5", "ACEStep15", {"audio_model": "ace1.5"}, device="cpu"),
    "yue2": A("YuE 2", "YuE2", {"audio_model": "yue2"}),
    "minimax_music": A("MiniMax Music 3", "MiniMaxMusic3", {"audio_model": "minimax_music3"}),
    "omnigen2": A("OmniGen2", "Omnigen2", _OMNIGEN2),
    "boogu": A("Boogu-Image", "Boogu", {"image_model": "boogu"}),
    "mage_flow": A("Mage-Flow", "MageFlow", {"image_model": "mage_flow"}),
    "qwen_image": A("Qwen-Image, -Edit, -2512", "QwenImage", {"image_model": "qwen_image"}),
    "qwen_image_layered": A("Qwen-Image-Layered", "QwenImage", {"image_model": "qwen_image", "use_additional_t_cond": True}),
    "qwen_image_21": A("Qwen-Image 2.1", "QwenImage21", {"image_model": "qwen_image21"}),
    "qwen_image_21_split": A(
        "Qwen-Image 2.1 (gate and up projections apart)", "QwenImage21", {"image_model": "qwen_image21", "fused_mlp": False}),
    "joyimage": A("JoyImage", "JoyImage", {"image_model": "joyimage"}),
    "ideogram4": A("Ideogram 4", "Ideogram4", {"image_model": "ideogram4"}),
    "krea2": A("Krea 2", "Krea2", {"image_model": "krea2"}),
    "kandinsky5_lite": A("Kandinsky 5 Lite (video)", "Kandinsky5", _kandinsky(1792, 2, 32, time_dim=512)),
    "kandinsky5_pro": A("Kandinsky 5 Pro (video)", "Kandinsky5", _kandinsky(4096, 4, 60, time_dim=1024), RELEASE),
    "kandinsky5_image": A("Kandinsky 5 Lite (image)", "Kandinsky5Image", _kandinsky(2560, 2, 50, time_dim=512, visual_embed_dim=64), RELEASE),
    "kandinsky6_pro": A("Kandinsky 6 Pro", "Kandinsky6", {"image_model": "kandinsky6"}),
    "kandinsky6_lite": A("Kandinsky 6 Lite", "Kandinsky6", {"image_model": "kandinsky6", **_KANDINSKY6_LITE}),
    "ernie_image": A("ERNIE-Image", "ErnieImage", {"image_model": "ernie"}),
    "cogvideox_2b": A("CogVideoX 2B", "CogVideoX_T2V", _cog(30, 30)),
    "cogvideox_5b": A("CogVideoX 5B", "CogVideoX_T2V", _cog(48, 42), RELEASE),
    "cogvideox_5b_i2v": A("CogVideoX 5B I2V", "CogVideoX_I2V", _cog(
        48, 42, in_channels=32, use_learned_positional_embeddings=True, use_rotary_positional_embeddings=False), RELEASE),
    "cogvideox_15_5b": A("CogVideoX 1.5 5B", "CogVideoX_T2V", _cog(48, 42, patch_size_t=2), RELEASE),
    "cogvideox_15_5b_inpaint": A("CogVideoX 1.5 5B Inpainting", "CogVideoX_Inpaint", _cog(48, 42, in_channels=48, patch_size_t=2), RELEASE),
    "seedvr2_3b": A("SeedVR2 3B", "SeedVR2", _seed(32, 2560, mlp_type="swiglu", vid_out_norm=True)),
    "seedvr2_7b": A("SeedVR2 7B", "SeedVR2", _seed(
        36, 3072, mlp_type="normal", mm_layers=36, rope_type="rope3d", rope_dim=64)),
    "rt_detr": A("RT-DETR v4", "RT_DETR_v4", {"image_model": "RT_DETR_v4"}),
    "sam3": A("SAM 3", "SAM3", {"image_model": "SAM3"}),
    "sam31": A("SAM 3.1", "SAM31", {"image_model": "SAM31"}),
    "depth_anything_3": A("Depth Anything 3 (metric, large)", "DepthAnything3", {"image_model": "DepthAnything3"}),
}  # fmt: skip

_VL = {"model.": "model.language_model.", "visual.": "model.visual."}
_LLAMA = "text_encoders.llama"
TEXT_ENCODERS: dict[str, Architecture] = {
    "clip_l": A("CLIP-L", "clip_model:CLIPTextModel", "../sd1_clip_config.json"),
    "clip_g": A("CLIP-G (bigG)", "clip_model:CLIPTextModel", "../clip_config_bigg.json"),
    "clip_h": A("CLIP-H", "clip_model:CLIPTextModel", "sd2_clip_config.json"),
    "t5": A("T5-XXL", "text_encoders.t5:T5", "t5_config_xxl.json"),
    "t5_old": A("T5-XXL 1.0 (Cosmos)", "text_encoders.t5:T5", "t5_old_config_xxl.json"),
    "t5_pile_xl": A("Pile-T5-XL (AuraFlow)", "text_encoders.t5:T5", "t5_pile_config_xl.json"),
    "t5_base": A("T5 base", "text_encoders.t5:T5", "t5_config_base.json"),
    "umt5": A("UMT5-XXL", "text_encoders.t5:T5", "umt5_config_xxl.json"),
    "umt5_base": A("UMT5 base", "text_encoders.t5:T5", "umt5_config_base.json"),
    "mt5_xl": A("mT5-XL (Hunyuan DiT)", "text_encoders.t5:T5", "mt5_config_xl.json"),
    "byt5_small": A("ByT5 small (Glyph)", "text_encoders.t5:T5", "byt5_config_small_glyph.json"),
    "t5gemma": A("T5Gemma (Stable Audio 3)", "text_encoders.sa3:T5GemmaModel"),
    "hydit_bert": A("Chinese CLIP (Hunyuan DiT)", "text_encoders.bert:BertModel", "hydit_clip.json"),
    "jina_clip_2": A("Jina CLIP v2", "text_encoders.jina_clip_2:XLMRobertaModel"),
    "gpt_oss_20b": A("GPT-OSS 20B", "text_encoders.gpt_oss:LensGptOssClipModel"),
    "llama3_8b": A("Llama 3.1 8B", _LLAMA + ":Llama2"),
    "mistral3_24b": A("Mistral Small 3 24B", _LLAMA + ":Mistral3Small24B"),
    "ministral3_3b": A("Ministral 3 3B", _LLAMA + ":Ministral3_3B"),
    "qwen25_3b": A("Qwen2.5 3B", _LLAMA + ":Qwen25_3B"),
    "qwen25_7b": A("Qwen2.5-VL 7B", _LLAMA + ":Qwen25_7BVLI"),
    "qwen3_06b": A("Qwen3 0.6B", _LLAMA + ":Qwen3_06B"),
    "qwen3_2b": A("Ovis2.5 2B (Qwen3)", _LLAMA + ":Ovis25_2B"),
    "qwen3_4b": A("Qwen3 4B", _LLAMA + ":Qwen3_4B"),
    "qwen3_8b": A("Qwen3 8B", _LLAMA + ":Qwen3_8B"),
    "ace15_lm_2b": A("ACE-Step 1.5 LM 1.7B", _LLAMA + ":Qwen3_2B_ACE15_lm"),
    "ace15_lm_4b": A("ACE-Step 1.5 LM 4B", _LLAMA + ":Qwen3_4B_ACE15_lm"),
    "yue2_lm": A("YuE 2 LM", "text_encoders.yue2:YuE2TEModel"),
    "minimax_music_lm": A("MiniMax Music 3 LM", "text_encoders.minimax_music:MiniMaxMusic3TEModel"),
    "qwen3vl_4b": A("Qwen3-VL 4B", "text_encoders.qwen3vl:Qwen3VL", {"model_type": "qwen3vl_4b"}, renamed=_VL),
    "qwen3vl_8b": A("Qwen3-VL 8B", "text_encoders.qwen3vl:Qwen3VL", {"model_type": "qwen3vl_8b"}, renamed=_VL),
    "qwen3vl_32b": A("Qwen3-VL 32B (MiniMax H3)", "text_encoders.minimax:MiniMaxQwen3VL"),
    "qwen35_08b": A("Qwen3.5 0.8B", "text_encoders.qwen35:Qwen35", {"model_type": "qwen35_08b"}, renamed=_VL),
    "qwen35_2b": A("Qwen3.5 2B", "text_encoders.qwen35:Qwen35", {"model_type": "qwen35_2b"}, renamed=_VL),
    "qwen35_4b": A("Qwen3.5 4B", "text_encoders.qwen35:Qwen35", {"model_type": "qwen35_4b"}, renamed=_VL),
    "qwen35_9b": A("Qwen3.5 9B", "text_encoders.qwen35:Qwen35", {"model_type": "qwen35_9b"}, renamed=_VL),
    "qwen35_27b": A("Qwen3.5 27B", "text_encoders.qwen35:Qwen35", {"model_type": "qwen35_27b"}, renamed=_VL),
    "gemma2_2b": A("Gemma 2 2B", _LLAMA + ":Gemma2_2B"),
    "gemma3_4b": A("Gemma 3 4B", _LLAMA + ":Gemma3_4B"),
    "gemma3_4b_vision": A("Gemma 3 4B with vision", _LLAMA + ":Gemma3_4B_Vision"),
    "gemma3_12b": A("Gemma 3 12B", _LLAMA + ":Gemma3_12B"),
    "gemma4_e2b": A("Gemma 4 E2B", "text_encoders.gemma4:Gemma4_E2B"),
    "gemma4_e4b": A("Gemma 4 E4B", "text_encoders.gemma4:Gemma4_E4B"),
    "gemma4_12b": A("Gemma 4 12B", "text_encoders.gemma4:Gemma4_12B"),
    "gemma4_31b": A("Gemma 4 31B", "text_encoders.gemma4:Gemma4_31B"),
}


def collect(comfyui: Path) -> dict:
    """All lists, from the ComfyUI in that folder; must run in a process of its own."""
    sys.argv = ["main.py", "--cpu"]
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.ops
    import comfyui_version
    import torch

    class Operations(comfy.ops.disable_weight_init):
        """ComfyUI's operations under names of their own, so that what bypasses them is told apart."""

        class Linear(comfy.ops.disable_weight_init.Linear):
            pass

        class Embedding(comfy.ops.disable_weight_init.Embedding):
            pass

        class MoEExperts(torch.nn.Module):
            def __init__(self, num_experts, in_features, out_features, bias=True, device=None, dtype=None):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device))
                self.bias = torch.nn.Parameter(torch.empty(num_experts, out_features, device=device)) if bias else None

    kinds = (
        ("linear", Operations.Linear),
        ("embedding", Operations.Embedding),
        ("experts", Operations.MoEExperts),
        ("conv", tuple(getattr(comfy.ops.disable_weight_init, f"Conv{n}d") for n in (1, 2, 3))),
        ("norm", (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm)),
    )

    def tensors(model: torch.nn.Module, entry: Architecture) -> list:
        found = [[name, "other", shape] for name, shape in entry.beside.items()]
        for name, tensor in model.state_dict().items():
            owner = model.get_submodule(name.rpartition(".")[0])
            kind = next((kind for kind, types in kinds if isinstance(owner, types)), "other")
            found.append([_file_name(name, entry.renamed), kind, list(tensor.shape)])
        return found

    known = {model.__name__ for model in importlib.import_module("comfy.supported_models").models}
    builders = ((DIFFUSION, _diffusion_model), (TEXT_ENCODERS, _text_encoder))
    lists = {
        name: tensors(build(entry, Operations, comfyui), entry)
        for entries, build in builders
        for name, entry in entries.items()
        if _has_class(entry, known)
    }
    missing = sorted(known - {entry.build for entry in DIFFUSION.values()})
    return {"version": comfyui_version.__version__, "missing": missing, "lists": lists}


def _has_class(entry: Architecture, known: set[str]) -> bool:
    """Whether this ComfyUI has the model; ``known``: names of its classes of diffusion models."""
    module, _, name = entry.build.rpartition(":")
    return importlib.util.find_spec(f"comfy.{module}") is not None if module else name in known


def _file_name(name: str, renamed: dict[str, str]) -> str:
    start = next((start for start in renamed if name.startswith(start)), "")
    return renamed.get(start, "") + name.removeprefix(start)


class _Built(Exception):
    """Carries a diffusion model out of the constructor that made it, before ComfyUI adds its samplers."""


def _diffusion_model(entry: Architecture, operations, comfyui: Path):
    import comfy.model_base
    import comfy.model_detection
    import comfy.supported_models
    import torch

    def stop(self, model_config, model_type=None, device=None, unet_model=comfy.model_base.UNetModel):
        raise _Built(unet_model(**model_config.unet_config, device=entry.device, operations=operations))

    beside = {name: torch.empty(shape, device="meta") for name, shape in entry.beside.items()}

    def build(config):
        original, comfy.model_base.BaseModel.__init__ = comfy.model_base.BaseModel.__init__, stop
        try:
            config.get_model(beside, device=entry.device)
        except _Built as built:
            return built.args[0]
        finally:
            comfy.model_base.BaseModel.__init__ = original

    def state(model):
        return beside | {_file_name(name, entry.renamed): tensor for name, tensor in model.state_dict().items()}

    model = build(getattr(comfy.supported_models, entry.build)(dict(entry.options)))
    metadata = {"config": json.dumps({"transformer": entry.metadata})}
    detected = comfy.model_detection.model_config_from_unet(state(model), "", metadata=metadata)
    if type(detected).__name__ != entry.build:
        raise SystemExit(f"{entry.title}: meant {entry.build}, ComfyUI takes it for {type(detected).__name__}")
    meant, again = ({(name, tensor.shape) for name, tensor in state(one).items()} for one in (model, build(detected)))
    if meant != again:
        raise SystemExit(
            f"{entry.title}: ComfyUI makes another model of these names and shapes: {sorted(meant ^ again)[:4]}"
        )
    return model


def _text_encoder(entry: Architecture, operations, comfyui: Path):
    module, _, name = entry.build.partition(":")
    cls = getattr(importlib.import_module(f"comfy.{module}"), name)
    if name.endswith(("ClipModel", "TEModel")):  # takes no configuration
        whole = cls(device="meta", model_options={"custom_operations": operations})
        return getattr(whole, "transformer", whole)
    if isinstance(entry.options, str):
        options = json.loads((comfyui / "comfy/text_encoders" / entry.options).read_text(encoding="utf-8"))
    else:
        options = dict(entry.options)
        if kind := options.pop("model_type", None):
            cls = type(name, (cls,), {"model_type": kind})
    return cls(options, None, "meta", operations)


if __name__ == "__main__":
    print(json.dumps(collect(Path(sys.argv[1]).resolve())))
