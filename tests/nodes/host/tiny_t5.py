"""A random T5-XXL of width 64 in ComfyUI's process. Imported by tests that run there."""

from pathlib import Path

import comfy.sd
import torch
from safetensors.torch import save_file

__all__ = ["LAYERS", "PROMPTS", "TINY_T5", "encode", "load_t5", "load_tiny", "save_t5", "t5_weights"]

TINY_T5 = {"t5xxl_model_config": {"d_model": 64, "d_kv": 32, "num_heads": 2}}
LAYERS = 24 * 7

WORDS = (
    ("a photo of a", "an oil painting of one", "many", "a sketch:", "close-up,", "the old", "no"),
    ("red", "deep blue", "golden", "pale green", "black and white"),
    ("apple", "owl", "castle", "bicycle", "wave", "dancer", "robot", "letter A", "fox", "train", "lamp"),
    ("by the sea", "at night", "in a crowded market", "under snow", "on a table", "from above"),
)
# Diverse prompts: a calibration with a few similar ones does not generalize.
PROMPTS = [" ".join(words[index % len(words)] for words in WORDS) for index in range(48)]


def t5_weights() -> dict[str, torch.Tensor]:
    """The weights in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)

    tensors = {"shared.weight": normal(32128, 64) * 8, "encoder.final_layer_norm.weight": torch.ones(64).bfloat16()}
    for block in range(24):
        layer = f"encoder.block.{block}.layer"
        for name in "qkvo":
            tensors[f"{layer}.0.SelfAttention.{name}.weight"] = normal(64, 64)
        for name, shape in {"wi_0": (10240, 64), "wi_1": (10240, 64), "wo": (64, 10240)}.items():
            tensors[f"{layer}.1.DenseReluDense.{name}.weight"] = normal(*shape)
        for part in (0, 1):
            tensors[f"{layer}.{part}.layer_norm.weight"] = torch.ones(64).bfloat16()
    tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = normal(32, 2)
    return tensors


def save_t5(folder: Path) -> Path:
    path = folder / "t5.safetensors"
    save_file(t5_weights(), path)
    return path


def load_t5(path, **options):
    """The CLIP of a file."""
    return comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.PIXART, model_options={**TINY_T5, **options})


def load_tiny(load_clip, *paths, model_options=None, **options):
    """ComfyUI's own loader with the small width, which it does not detect in the file."""
    return load_clip(*paths, model_options={**TINY_T5, **(model_options or {})}, **options)


def encode(clip) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize("a red apple on a table"), return_pooled=False)
