"""A MiniLM with random weights."""

import torch

from learned_rounding.benchmarks.minilm import LAYERS

__all__ = ["make_text_encoder"]


def make_text_encoder(texts: int, length: int = 64) -> dict[str, torch.Tensor]:
    """Tensors of a MiniLM with random weights, and random evaluation texts of ``length`` tokens."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    embeddings = {"word_embeddings": 100, "position_embeddings": length, "token_type_embeddings": 2}
    tensors = {f"embeddings.{name}.weight": random(count, 384) for name, count in embeddings.items()}
    shapes = {"intermediate.dense": (1536, 384), "output.dense": (384, 1536)}
    norms = {"embeddings.LayerNorm"}
    for name in LAYERS:
        block, _, layer = name.removeprefix("encoder.layer.").partition(".")
        out, channels = shapes.get(layer, (384, 384))
        tensors |= {f"{name}.weight": random(out, channels), f"{name}.bias": random(out)}
        norms |= {f"encoder.layer.{block}.{part}.LayerNorm" for part in ("attention.output", "output")}
    for name in norms:
        tensors |= {f"{name}.weight": torch.ones(384), f"{name}.bias": torch.zeros(384)}
    return tensors | {"tokens.evaluation": torch.randint(100, (texts, length), generator=generator)}
