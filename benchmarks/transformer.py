"""Transformer with the layer shapes of Flux.1 and random weights: double blocks, then single blocks."""

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Transformer"]


class _Mlp(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


def _attention(qkv: torch.Tensor) -> torch.Tensor:
    heads = [
        part.unflatten(-1, (-1, 64 if qkv.shape[-1] < 3 * 128 else 128)).transpose(1, 2)
        for part in qkv.chunk(3, dim=-1)
    ]
    return functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class _Double(nn.Module):
    """Double block: two streams with separate linear layers and joint attention."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlp = nn.ModuleList(_Mlp(width) for _ in range(2))

    def forward(self, streams: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        lengths = [x.shape[1] for x in streams]
        normed = [functional.layer_norm(x, x.shape[-1:]) for x in streams]
        attended = _attention(torch.cat([qkv(x) for qkv, x in zip(self.qkv, normed, strict=True)], dim=1)).split(
            lengths, dim=1
        )
        streams = [x + proj(y) for x, proj, y in zip(streams, self.proj, attended, strict=True)]
        return tuple(x + mlp(functional.layer_norm(x, x.shape[-1:])) for x, mlp in zip(streams, self.mlp, strict=True))


class _Single(nn.Module):
    """Single block: one stream, attention and MLP in parallel."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.linear1 = nn.Linear(width, 7 * width)
        self.linear2 = nn.Linear(5 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv, mlp = self.linear1(functional.layer_norm(x, x.shape[-1:])).split([3 * self.width, 4 * self.width], dim=-1)
        return x + self.linear2(torch.cat([_attention(qkv), functional.gelu(mlp, approximate="tanh")], dim=-1))


class Transformer(nn.Module):
    """Blocks with the layer shapes of Flux.1."""

    def __init__(self, width: int, double: int, single: int):
        super().__init__()
        self.double_blocks = nn.ModuleList(_Double(width) for _ in range(double))
        self.single_blocks = nn.ModuleList(_Single(width) for _ in range(single))

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        streams = (text, image)
        for block in self.double_blocks:
            streams = block(streams)
        x = torch.cat(streams, dim=1)
        for block in self.single_blocks:
            x = block(x)
        return x
