"""Kinds of files that ComfyUI does not load quantized: a table of marks in their tensor names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .presets import STARTS

__all__ = ["DIFFUSERS", "REFUSED", "Refused", "find_refusal"]


@dataclass(frozen=True)
class Refused:
    """A kind of file that is not quantized.

    Attributes:
        description: the kind, and what to do instead; end of a sentence.
        marks: alternatives; each is a tuple of regular expressions for the beginning of names, all of which must match.
        absent: expression that must not match; empty for none.
    """

    description: str
    marks: tuple[tuple[str, ...], ...]
    absent: str = ""

    def matches(self, names: str) -> bool:
        """Whether ``names``, one per line, are those of such a file."""

        def found(mark: str) -> bool:
            return re.search(f"(?m)^(?:{mark})", names) is not None

        return any(all(map(found, marks)) for marks in self.marks) and not (self.absent and found(self.absent))


_LOADER = "whose loader in ComfyUI does not read quantized layers; use it unquantized"
_PREFIX = f"(?:{'|'.join(map(re.escape, STARTS))})?"

DIFFUSERS = Refused(
    # ComfyUI's loader joins and renames such layers one by one, and drops the tensors of quantized ones.
    "under diffusers' layer names, which ComfyUI cannot read quantized; choose it in Load Model (Learned Rounding) inside ComfyUI, which "
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
    ),
    Refused(
        "Lumina 2 under diffusers' layer names, which have no conversion to ComfyUI's; give a file with ComfyUI's names",
        ((_PREFIX + r"time_caption_embed\.", _PREFIX + r"noise_refiner\.0\.attn\.to_q\."),),
        absent=_PREFIX + r"ref_image_(patch_embedder|refiner)\.",  # OmniGen2 and Boogu have these names in ComfyUI
    ),
    Refused(
        "a text or image encoder under llama.cpp's tensor names, and none of those that are converted (T5-XXL, Llama 3.1 8B, Qwen2.5 3B, Qwen3); "
        "give the original safetensors file",
        (
            (r"((enc|dec|v|a)\.)?blk\.\d+\.(attn|ffn|ssm|ln\d|cross_attn)_?",),
            (r"token_embd\.",),
        ),
    ),
    Refused(
        "UMT5 in the layout of WAN's own repository, which no CLIP loader of ComfyUI reads; give ComfyUI's file of it, such as "
        "umt5_xxl_fp16.safetensors, which has the tokenizer too",
        ((r"token_embedding\.weight$", r"blocks\.0\.attn\.q\.weight$", r"blocks\.0\.ffn\.fc1\.weight$"),),
    ),
)

REFUSED: tuple[Refused, ...] = (
    Refused(
        f"a ControlNet, {_LOADER}",
        ((r"(model\.)?control_model\.|controlnet_|input_hint_block\.|zero_convs\.|after_proj_list\.|control_img_in\.|lora_controlnet$",),),
    ),
    Refused(
        f"a patch for a model, {_LOADER}",
        (
            (r"control_(layers|all_x_embedder|noise_refiner|context_refiner)\.",),  # Z-Image
            (r"lllite_",),
            (r"feature_embedder\.mid_layer_norm\.",),
            (r"blocks\.\d+\.audio_cross_attn\.", r"audio_proj\.proj1\."),  # MultiTalk
            (r"(.*\.)?attention_pooler\.query_tokens$", r"(.*\.)?duration_head\."),
            (r"(ip_adapter|image_proj)\.",),
            (r"redux_(up|down)\.",),
            (r"position_net\.",),
        ),
    ),
    Refused(
        "a LoRA or another difference to a model; in ComfyUI it is baked in where a MODEL with it goes into Learned Round Quantize, and loads as "
        "usual after a quantized one",
        (
            (r".*[._]lora([._](A|B|up|down|mid|linear_layer)|_(embedding_)?(A|B))\b",),
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
        f"a VAE, {_LOADER}",
        (
            (r"(de|en)coder\.(conv_in|conv_out|conv1|mid|mid_block|middle|up_blocks|down_blocks|upsamples|downsamples|unpatcher3d)[._]",),
            (r"taesd_(de|en)coder\.|(post_)?quant_conv\.|decoder\.layers\.1\.layers\.0\.beta$|vquantizer\.",),
        ),
    ),
    *_OTHER_NAMES,
    DIFFUSERS,
)  # fmt: skip


def find_refusal(names: Iterable[str]) -> str | None:
    """Description of the kind of file with these tensor names; None for models that can be quantized."""
    lines = "\n".join(names)
    return next((kind.description for kind in REFUSED if kind.matches(lines)), None)
