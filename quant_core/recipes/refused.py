"""Kinds of files that ComfyUI does not load quantized: a table of marks in their tensor names."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .presets import STARTS

__all__ = ["DIFFUSERS", "GENERAL_SWITCH", "REFUSED", "Refused", "find_refusal"]

# How a user asks to quantize what nothing recognizes, or what ComfyUI does not load quantized; end of a sentence.
GENERAL_SWITCH = "--general (in ComfyUI: general of Learned Round Quantize)"


@dataclass(frozen=True)
class Refused:
    """A kind of file that is not quantized.

    Attributes:
        description: the kind, and what to do instead; end of a sentence.
        marks: alternatives; each is a tuple of regular expressions for the beginning of names, all of which must match.
        absent: expression that must not match; empty for none.
        always: no switch allows it.
    """

    description: str
    marks: tuple[tuple[str, ...], ...]
    absent: str = ""
    always: bool = False

    def matches(self, marked: Collection[str], names: Iterable[str]) -> bool:
        """Whether these are the names of such a file; ``marked``: those that some expression of any kind matches."""
        if not any(all(_find(mark, marked) for mark in marks) for marks in self.marks):
            return False
        return not (self.absent and _find(self.absent, names))


def _find(mark: str, names: Iterable[str]) -> bool:
    """Whether the expression matches the beginning of one of the names."""
    pattern = re.compile(mark)
    return any(map(pattern.match, names))


_LOADER = "whose loader in ComfyUI does not read quantized layers; use it unquantized"
_PREFIX = f"(?:{'|'.join(map(re.escape, STARTS))})?"

DIFFUSERS = Refused(
    # ComfyUI's loader joins and renames such layers one by one, and drops the tensors of quantized ones.
    "under diffusers' layer names, which ComfyUI cannot read quantized; choose it in Load Model File for Quantization inside ComfyUI, which "
    "gives it ComfyUI's own names (SD1.5 to SDXL, SD3, Flux.1, AuraFlow, PixArt, Z-Image), or give a file that has those names",
    tuple(
        tuple(_PREFIX + mark for mark in marks)
        for marks in (
            (r"joint_transformer_blocks\.0\.attn\.add_k_proj\.weight$",),  # AuraFlow
            (r"adaln_single\.emb\.timestep_embedder\.linear_1\.bias$", r"pos_embed\.proj\.bias$"),  # PixArt
            (r"noise_refiner\.0\.attention\.norm_k\.weight$",),  # Z-Image
            (r"x_embedder\.weight$", r"transformer_blocks\.0\.attn\.add_k_proj\.weight$"),  # Flux.1
            (r"pos_embed\.proj\.weight$", r"transformer_blocks\.0\.attn\.add_q_proj\.weight$"),  # SD3
            (r"conv_in\.weight$", r"down_blocks\.0\.resnets\.0\.norm1\.weight$"),  # the U-Nets
        )
    ),
    always=True,
)

_OTHER_NAMES = (
    Refused(
        # What open_source converts (WAN, LTX-Video, Flux.2, Hunyuan Video) has other names by then.
        "under diffusers' layer names, which have no conversion to ComfyUI's; give a file with ComfyUI's names",
        tuple(
            tuple(_PREFIX + mark for mark in marks)
            for marks in (
                (r"condition_embedder\.time_embedder\.", r"blocks\.0\.attn1\.to_q\."),  # WAN
                (
                    r"time_embed\.(emb|timestep_embedder|t_embedder|linear_1)\.",
                ),  # LTX-Video and LTX-2, Mochi, Cosmos, Krea 2
                (r"context_embedder\.(proj_in|token_refiner)\.",),  # Hunyuan Video and Image
                (r"double_stream_modulation_img\.linear\.",),  # Flux.2
                (r"distilled_guidance_layer\.layers\.0\.linear_1\.",),  # Chroma
                (r"transformer_blocks\.0\.norm1\.norm\.",),  # CogVideoX
            )
        ),
        always=True,
    ),
    Refused(
        "Lumina 2 under diffusers' layer names, which have no conversion to ComfyUI's; give a file with ComfyUI's names",
        ((_PREFIX + r"time_caption_embed\.", _PREFIX + r"noise_refiner\.0\.attn\.to_q\."),),
        absent=_PREFIX + r"ref_image_(patch_embedder|refiner)\.",  # OmniGen2 and Boogu have these names in ComfyUI
        always=True,
    ),
    Refused(
        "a text or image encoder under llama.cpp's tensor names, and none of those that are converted (T5-XXL, Llama 3.1 8B, Qwen2.5 3B, Qwen3); "
        "give the original safetensors file",
        (
            (r"((enc|dec|v|a)\.)?blk\.\d+\.(attn|ffn|ssm|ln\d|cross_attn)_?",),
            (r"token_embd\.",),
        ),
        always=True,
    ),
    Refused(
        "UMT5 in the layout of WAN's own repository, which no CLIP loader of ComfyUI reads; give ComfyUI's file of it, such as "
        "umt5_xxl_fp16.safetensors, which has the tokenizer too",
        ((r"token_embedding\.weight$", r"blocks\.0\.attn\.q\.weight$", r"blocks\.0\.ffn\.fc1\.weight$"),),
        always=True,
    ),
)

# The first that matches is named: kinds with few marks of their own come before those whose marks others share.
REFUSED: tuple[Refused, ...] = (
    Refused(
        f"an audio encoder, {_LOADER}",
        (
            (r"(wav2vec2\.|hubert\.|wavlm\.)?(feature_projection\.projection|feature_extractor\.conv_layers\.\d+\.conv)\.weight$|masked_spec_embed$",),
            (r"(model\.)?encoder\.conv1\.weight$", r"(model\.)?encoder\.embed_positions\.weight$"),  # Whisper
            (r"(audio_model\.)?audio_(branch|encoder)\.", r"(text_(branch|model|transform)|audio_(projection|transform))\."),  # CLAP
        ),
    ),
    Refused(
        f"an upscaler or another image restoration model, {_LOADER}",
        (
            (r"(params(_ema)?\.)?conv_first\.weight$",),  # ESRGAN, SwinIR, HAT, DAT, SRFormer, ATD, RGT, GRL
            (r"model\.0\.weight$", r"model\.1\.sub\.\d+\."),  # ESRGAN under its first names
            (r"(encoder_level1|decoder_level1)\.0\.",),  # Restormer, MPRNet
            (r"residual_layer\.0\.residual_layer\.",),  # OmniSR
            (r"m_head\.0\.weight$", r"m_down1\."),  # SCUNet, DRUNet
            (r"feats\.0\.weight$", r"feats\.1\."),  # PLKSR, MoSR
            (r"stylegan_decoder\.|fuse_convs_dict\.",),  # GFPGAN, CodeFormer
        ),
    ),
    Refused(
        f"a segmentation or background removal model, {_LOADER}",
        (
            (r"(sam_)?mask_decoder\.(iou_token|mask_tokens|transformer)\.",),  # SAM, SAM 2
            (r"(module\.)?bb\.(layers|patch_embed)\.",),  # BiRefNet
            (r"stage1\.rebnconvin\.",),  # U²-Net, IS-Net, RMBG
            (r"(segformer\.encoder|pixel_level_module\.encoder|model\.pixel_level_module)\.",),  # SegFormer, Mask2Former
            (r"clip\.vision_model\.", r"decoder\.film_mul\."),  # CLIPSeg
            (r"(bert\.|transformer\.encoder\.(fusion|text)_layers\.)", r"(backbone\.0\.|input_proj\.0\.0\.)"),  # Grounding DINO
        ),
    ),
    Refused(
        f"a depth or geometry model, {_LOADER}",
        ((r"pretrained\.blocks\.0\.", r"depth_head\."), (r"(points|mask|normal)_head\.", r"(backbone|encoder)\.")),  # Depth Anything 1 and 2, MoGe
    ),
    Refused(
        f"a latent upscaler, {_LOADER}",
        (
            (r"post_upsample_res_blocks\.",),
            (r"up\.0\.block\.0\.conv1\.conv\.",),
            (r"in_conv\.conv\.", r"blocks\.0\.block\.0\.conv\."),
        ),
    ),
    Refused(
        f"a motion module (AnimateDiff), {_LOADER}",
        ((r"(module\.)?(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(motion_modules|temporal_attentions)\.",),),
        absent=r".*\.(lora|processor)\b",
    ),
    Refused(
        f"a textual inversion embedding, {_LOADER}",
        ((r"(emb_params|string_to_param(\.\*)?|string_to_token(\.\*)?|clip_[lgh]|<[^>]+>)$",),),
        absent=r".*\.weight$",
    ),
    Refused(
        f"a ControlNet, {_LOADER}",
        ((r"(model\.)?control_model\.|controlnet_|input_hint_block\.|zero_convs\.|after_proj_list\.|control_img_in\.|lora_controlnet$",),),
    ),
    Refused(
        f"a T2I adapter, {_LOADER}",
        (
            (r"(adapter\.)?body\.0\.(in_conv|block[12]|resnets\.0\.block[12])\.",),
            (r"backbone\.0\.0\.weight$|backbone\.10\.blocks\.0\.weight$", r"projections\."),  # ControlNets of Stable Cascade
        ),
    ),
    Refused(
        f"a style model, {_LOADER}", ((r"redux_(up|down)\.|style_embedding$",),),
    ),
    Refused(
        f"a patch for a model, {_LOADER}",
        (
            (r"control_(layers|all_x_embedder|noise_refiner|context_refiner)\.",),  # Z-Image
            (r"lllite_",),
            (r"feature_embedder\.mid_layer_norm\.",),
            (r"blocks\.\d+\.audio_cross_attn\.", r"audio_proj\.proj1\."),  # MultiTalk
            (r"(blocks|transformer_blocks)\.\d+\..*\bprocessor\.(?!\w*lora)",),  # FantasyTalking, FantasyPortrait
            (r"(.*\.)?attention_pooler\.query_tokens$", r"(.*\.)?duration_head\."),
            (r"(ip_adapter|image_proj|ip_adapter_proj_model|pulid_(ca|encoder)|id_encoder)\.",),  # IP-Adapter, PuLID, PhotoMaker
            (r"(double|single)_blocks\.\d+\.processor\.(?!\w*lora)",),  # IP-Adapter of Flux
            (r"position_net\.",),
        ),
    ),
    Refused(
        "a LoRA or another difference to a model, which ComfyUI applies to quantized models as well; to bake it in, connect a MODEL with it to "
        "Learned Round Quantize",
        (
            (r".*[._]lora\d?([._](A|B|up|down|mid|linear_layer)|_(embedding_)?(A|B))\b",),
            (r".*\.(lokr_[wt]\d|hada_[wt]\d|oft_(blocks|diag)|dora_scale|diff_b|set_weight)",),
        ),
    ),
    Refused(
        f"an image encoder, {_LOADER}",
        (
            (r"vision_model\.encoder\.layers\.0\.layer_norm1\.",),
            (r"visual\.transformer\.resblocks\.0\.",),
            (r"encoder\.layer\.0\.layer_scale1\.",),  # DINOv2
            (r"layer\.0\.attention\.o_proj\.",),  # DINOv3
        ),
        absent=r"(text_model|language_model|model|layers)\.",  # a text encoder that comes with one
    ),
    Refused(
        "a CLIP text encoder under OpenCLIP's layer names, which ComfyUI reads in full precision only; use it unquantized",
        ((r"(model\.)?transformer\.resblocks\.0\.",),),
    ),
    Refused(
        f"a VAE, {_LOADER}",
        (
            (r"(de|en)coder\.(conv_in|conv_out|conv1|mid|mid_block|middle|up_blocks|down_blocks|upsamples|downsamples|unpatcher3d)[._]",),
            (r"taesd_(de|en)coder\.|(post_)?quant_conv\.|decoder\.layers\.1\.layers\.0\.beta$|vquantizer\.",),
            (r"(shape_dec|txt_dec|geo_decoder|student\.dconv_encoder)\.|pixel_space_vae$|pre_block\.attn\.zero_k_bias$|gs\.base_offset_scale$",),
            (r"vocoder\.|decoder\.layers\.\d+\.transformers\.0\.pre_norm\.|(decoder\.)?blocks\.2\.blocks\.3\.stack\.|(encoder\.)?backbone\.1\.0\.block\.",),
            (r"decoder\.1\.weight$", r"decoder\.\d\d\.bias$"),  # TAEHV
        ),
        # a checkpoint, and the video VAE of MiniMax H3, which ComfyUI 0.33 reads quantized
        absent=r"(model\.)?diffusion_model\.|decoder\.transformer_blocks\.0\.scale1$",
    ),
    *_OTHER_NAMES,
    DIFFUSERS,
)  # fmt: skip


_ANY_MARK = re.compile("|".join(f"(?:{mark})" for kind in REFUSED for marks in kind.marks for mark in marks))


def find_refusal(names: Iterable[str], *, general: bool = False) -> str | None:
    """Description of the kind of file with these tensor names, and what to do; None for models that can be quantized.

    ``general``: the user asked to quantize any kind of file; then only kinds that no switch allows.
    """
    names = list(names)
    marked = list(filter(_ANY_MARK.match, names))  # few, so that each mark is tried on few names
    kind = next((kind for kind in REFUSED if (kind.always or not general) and kind.matches(marked, names)), None)
    if kind is None or kind.always:
        return kind and kind.description
    return f"{kind.description}, or quantize it anyway with {GENERAL_SWITCH}"
