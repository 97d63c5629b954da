"""Diffusion transformer and autoencoder in the SD3 and TAESD layouts, which ComfyUI detects by tensor name and shape.

Both state dicts have ComfyUI's keys, so that the trained files load in stock nodes without conversion.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["LATENT_CHANNELS", "LORA_LAYERS", "Decoder", "Encoder", "MMDiT", "MMDiTConfig", "flow_sigmas", "sample"]

LATENT_CHANNELS = 16
HEAD_WIDTH = 64  # ComfyUI derives depth = heads = hidden / 64
LORA_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of the diffusion transformer."""

    depth: int = 4
    context_width: int = 512
    pooled_width: int = 512
    channels: int = LATENT_CHANNELS
    patch: int = 2  # not 1: ComfyUI computes (height + 1) // patch positions

    @property
    def hidden(self) -> int:
        return self.depth * HEAD_WIDTH


class Attention(nn.Module):
    """Projections of one stream; JointBlock computes attention over both streams."""

    def __init__(self, width: int, last_context: bool):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        if not last_context:
            self.proj = nn.Linear(width, width)
        self.ln_q = nn.RMSNorm(HEAD_WIDTH, eps=1e-6)
        self.ln_k = nn.RMSNorm(HEAD_WIDTH, eps=1e-6)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, C) -> three tensors (B, heads, T, 64)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        return self.ln_q(q).to(v.dtype), self.ln_k(k).to(v.dtype), v


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


class Stream(nn.Module):
    """Part of a block for one modality. In the last block the context has only keys and values, and ends at qkv."""

    def __init__(self, width: int, last_context: bool = False):
        super().__init__()
        self.last_context = last_context
        self.attn = Attention(width, last_context)
        if not last_context:
            self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if last_context else 6) * width))

    def before(self, x: torch.Tensor, c: torch.Tensor):
        modulation = self.adaLN_modulation(c).chunk(2 if self.last_context else 6, dim=-1)
        return self.attn.heads(_modulated_norm(x, *modulation[:2])), modulation[2:]

    def after(self, x: torch.Tensor, attended: torch.Tensor, modulation) -> torch.Tensor:
        gate_attention, shift, scale, gate_mlp = modulation
        x = x + gate_attention[:, None] * self.attn.proj(attended)
        return x + gate_mlp[:, None] * self.mlp(_modulated_norm(x, shift, scale))


class JointBlock(nn.Module):
    def __init__(self, width: int, last: bool):
        super().__init__()
        self.context_block = Stream(width, last_context=last)
        self.x_block = Stream(width)

    def forward(self, context: torch.Tensor, x: torch.Tensor, c: torch.Tensor):
        context_heads, context_modulation = self.context_block.before(context, c)
        x_heads, x_modulation = self.x_block.before(x, c)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(context_heads, x_heads, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = context.shape[1]
        if not self.context_block.last_context:
            context = self.context_block.after(context, attended[:, :tokens], context_modulation)
        return context, self.x_block.after(x, attended[:, tokens:], x_modulation)


class _Mlp2(nn.Module):
    """Embedder of the timestep or the pooled text: Linear, SiLU, Linear with the key `mlp`."""

    def __init__(self, in_features: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)


class _FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.linear(_modulated_norm(x, *self.adaLN_modulation(c).chunk(2, dim=-1)))


def _timestep_features(t: torch.Tensor, width: int = 256) -> torch.Tensor:
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _positions(width: int, rows: int, columns: int, device) -> torch.Tensor:
    """Sinusoidal positions (rows * columns, width). The short side of an image spans 0..15, independent of its size."""
    omega = 10000.0 ** (-torch.arange(width // 4, device=device, dtype=torch.float32) / (width / 4))
    short = min(rows, columns)

    def axis(n):
        reach = 7.5 * n / short
        angles = torch.linspace(7.5 - reach, 7.5 + reach, n, device=device)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    vertical = axis(rows)[:, None].expand(rows, columns, -1)
    horizontal = axis(columns)[None].expand(rows, columns, -1)
    return torch.cat([horizontal, vertical], dim=-1).flatten(0, 1)


class MMDiT(nn.Module):
    """SD3's diffusion transformer with width 64 * depth; predicts noise - image from a mixture of the two."""

    def __init__(self, config: MMDiTConfig | None = None):
        super().__init__()
        self.config = config = config or MMDiTConfig()
        width = config.hidden
        self.x_embedder = _PatchEmbed(config.channels, width, config.patch)
        self.t_embedder = _Mlp2(256, width)
        self.y_embedder = _Mlp2(config.pooled_width, width)
        self.context_embedder = nn.Linear(config.context_width, width)
        self.joint_blocks = nn.ModuleList(JointBlock(width, last=i == config.depth - 1) for i in range(config.depth))
        self.final_layer = _FinalLayer(width, config.patch**2 * config.channels)
        self._initialize()

    def _initialize(self):
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)  # every block starts as the identity (adaLN-zero)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x (B, 16, H, W); t = 1000 * sigma (B,); context (B, T, 512); y (B, 512) -> velocity like x."""
        p = self.config.patch
        rows, columns = x.shape[-2] // p, x.shape[-1] // p
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2)
        tokens = tokens + _positions(self.config.hidden, rows, columns, x.device)
        c = self.t_embedder(_timestep_features(t)) + self.y_embedder(y)
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, tokens = block(context, tokens, c)
        out = self.final_layer(tokens, c).unflatten(1, (rows, columns)).unflatten(-1, (p, p, -1))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def flow_sigmas(steps: int, shift: float = 3.0) -> torch.Tensor:
    """ComfyUI's scheduler "simple" on SD3's shifted schedule: (steps + 1,) from 1 down to 0."""
    t = torch.arange(1, 1001) / 1000
    table = shift * t / (1 + (shift - 1) * t)
    return torch.stack([table[-(1 + int(i * 1000 / steps))] for i in range(steps)] + [torch.zeros(())])


@torch.no_grad()
def sample(model, noise, context, y, *, steps: int = 20, cfg: float = 4.0, shift: float = 3.0) -> torch.Tensor:
    """Euler sampling as in KSampler (sampler "euler", scheduler "simple"), with all-zero text as the negative prompt."""
    sigmas = flow_sigmas(steps, shift).to(noise.device)
    both_context = torch.cat([context, torch.zeros_like(context)])
    both_y = torch.cat([y, torch.zeros_like(y)])
    x = noise * sigmas[0]
    for now, after in itertools.pairwise(sigmas):
        t = (now * 1000).expand(2 * len(x))
        positive, negative = model(torch.cat([x, x]), t, both_context, both_y).float().chunk(2)
        x = x + (negative + cfg * (positive - negative)) * (after - now)
    return x


class _Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(x / 3)


def _conv(inputs: int, outputs: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)


class _Block(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x) + x)


class Encoder(nn.Sequential):
    """Encode an image (B, 3, H, W) in [0, 1] to a latent (B, 16, H/8, W/8) in the space of the diffusion model."""

    def __init__(self, channels: int = LATENT_CHANNELS):
        layers = [_conv(3, 64), _Block()]
        for _ in range(3):
            layers += [_conv(64, 64, stride=2, bias=False), _Block(), _Block(), _Block()]
        super().__init__(*layers, _conv(64, channels))


class Decoder(nn.Sequential):
    """Decode a latent to an image in [0, 1]; the inverse of Encoder."""

    def __init__(self, channels: int = LATENT_CHANNELS):
        layers = [_Clamp(), _conv(channels, 64), nn.ReLU()]
        for _ in range(3):
            layers += [_Block(), _Block(), _Block(), nn.Upsample(scale_factor=2), _conv(64, 64, bias=False)]
        super().__init__(*layers, _Block(), _conv(64, 3))
