"""Shapes of tensors in GGUF files whose leading dimensions of 1 are lost: ggml counts dimensions up to the last that is not 1."""

import re

__all__ = ["restore_shape"]

_START = r"(?:(?:model\.)?diffusion_model\.)?"
# Pattern of a name, without the prefix of a checkpoint → number of dimensions in ComfyUI's model classes.
_RANKS = tuple(
    (re.compile(f"{_START}(?:{pattern})"), rank)
    for pattern, rank in (
        (r"(x|cap|siglip)_pad_token", 2),  # Z-Image
        (r"keyframes_abs_pos_embedding", 2),  # LTX-2.5
        (r"(vace_)?blocks\.\d+\.modulation|head(_global)?\.modulation|img_emb\.emb_pos", 3),  # WAN
        (r"(audio|video)_dit(_2)?\.(blocks\.\d+|head)\.modulation", 3),  # Prism
        (r"(fusion_blocks\.\d+\.(audio|video)_block|remaining_video_blocks\.\d+)\.modulation", 3),
        (r"(face_encoder|casual_audio_encoder\.encoder)\.padding_tokens|casual_audio_encoder\.weights", 4),  # WAN
        (r"motion_encoder\.enc\.net_app\.convs\.\d+\.(conv\d\.)?\d+\.bias", 4),  # WAN Animate
        (r"pos_embed|positional_encoding|register_tokens|patch_embed\.pos_embedding|(core\.)?y_pos_embedding", 3),
        (r"decoder\.(layers\.\d+\.)?scale_shift_table|null_condition_emb|(\w+\.)+special_tokens?", 3),  # ACE-Step 1.5
        (r"double_blocks\.\d+\.\w+_mod\.modulate_table", 3),  # JoyImage
        (r"(down|up)_blocks\.\d+\.\d+\.channelwise\.\d+\.(beta|gamma)", 4),  # Stable Cascade
        (r"(txtfusion\.projector|style_embedder)\.weight", 2),  # Krea 2, Hunyuan DiT
    )
)


def restore_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` of the tensor ``name`` with the leading dimensions of 1 that ComfyUI's models have."""
    rank = next((rank for pattern, rank in _RANKS if pattern.fullmatch(name)), 0)
    return (1,) * (rank - len(shape)) + shape
