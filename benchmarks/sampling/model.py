"""Model files of random weights in the shapes of Flux.1 and WAN 2.1 14B, and LoRAs for them.

ComfyUI reads width and depth from the tensors and takes 128 channels per head, so a narrow and shallow model of the same
family runs on a CPU.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from learned_rounding.quant_core.output import SafetensorsWriter, header_bytes
from learned_rounding.quant_core.sources import TensorInfo

__all__ = ["MODELS", "Architecture", "Spec", "lora_specs", "write_model"]

_TEXT, _POOLED, _FREQUENCIES, _LATENT, _HEAD = 4096, 768, 256, 16, 128  # channels
_MODULATION = 0.1  # gain of layers that compute gates: residual sums stay of the order of the first activations
_BIAS = 0.01  # standard deviation


@dataclass(frozen=True)
class Spec:
    """Shape of a tensor, and standard deviation and mean of its values."""

    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """Family of models that ComfyUI recognizes by its tensors.

    Attributes:
        specs: (hidden, blocks) → (tensor name, spec) of the whole model.
        hidden: channels of the full model.
        blocks: number of blocks of the full model, by kind.
        pooled: channels of the pooled text embedding; 0: none.
        latent_node: class of the node that makes the empty latent image.
        latent: inputs of that node.
        small: other inputs of that node for a small model on a CPU.
        text: channels of the text embedding.
    """

    specs: Callable[[int, tuple[int, ...]], Iterator[tuple[str, Spec]]]
    hidden: int
    blocks: tuple[int, ...]
    pooled: int
    latent_node: str
    latent: Mapping[str, int]
    small: Mapping[str, int] = field(repr=False)
    text: int = _TEXT


def _linear(name: str, out: int, inner: int, gain: float = 1.0) -> Iterator[tuple[str, Spec]]:
    """Weight and bias; activations of unit variance give outputs of variance ``gain``²."""
    yield f"{name}.weight", Spec((out, inner), gain * inner**-0.5)
    yield f"{name}.bias", Spec((out,), _BIAS)


def _linears(prefix: str, layers: Iterable[tuple]) -> Iterator[tuple[str, Spec]]:
    for name, *layer in layers:
        yield from _linear(prefix + name, *layer)


def _ones(name: str, size: int) -> tuple[str, Spec]:
    return name, Spec((size,), 0.0, 1.0)


def _flux_specs(hidden: int, blocks: tuple[int, ...]) -> Iterator[tuple[str, Spec]]:
    double, single = blocks
    yield from _linears("", [("img_in", hidden, 4 * _LATENT), ("txt_in", hidden, _TEXT)])
    for name, inner in (("time_in", _FREQUENCIES), ("guidance_in", _FREQUENCIES), ("vector_in", _POOLED)):
        yield from _linears(name, [(".in_layer", hidden, inner), (".out_layer", hidden, hidden)])
    for block in range(double):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{block}.{stream}_"
            layers = [("attn.qkv", 3 * hidden, hidden), ("attn.proj", hidden, hidden)]
            layers += [("mlp.0", 4 * hidden, hidden), ("mlp.2", hidden, 4 * hidden)]
            yield from _linears(prefix, [("mod.lin", 6 * hidden, hidden, _MODULATION), *layers])
            yield from (_ones(f"{prefix}attn.norm.{part}_norm.scale", _HEAD) for part in ("query", "key"))
    for block in range(single):
        prefix = f"single_blocks.{block}."
        layers = [("linear1", 7 * hidden, hidden), ("linear2", hidden, 5 * hidden)]
        yield from _linears(prefix, [("modulation.lin", 3 * hidden, hidden, _MODULATION), *layers])
        yield from (_ones(f"{prefix}norm.{part}_norm.scale", _HEAD) for part in ("query", "key"))
    yield from _linears("final_layer.", [("linear", 4 * _LATENT, hidden)])
    yield from _linears("final_layer.adaLN_modulation.", [("1", 2 * hidden, hidden, _MODULATION)])


def _wan_specs(hidden: int, blocks: tuple[int, ...]) -> Iterator[tuple[str, Spec]]:
    inner = hidden * 27 // 10  # 13,824 of 5,120
    yield "patch_embedding.weight", Spec((hidden, _LATENT, 1, 2, 2), (4 * _LATENT) ** -0.5)
    yield "patch_embedding.bias", Spec((hidden,), _BIAS)
    yield from _linears("text_embedding.", [("0", hidden, _TEXT), ("2", hidden, hidden)])
    yield from _linears("time_embedding.", [("0", hidden, _FREQUENCIES), ("2", hidden, hidden)])
    yield from _linears("time_projection.", [("1", 6 * hidden, hidden, _MODULATION)])
    for block in range(blocks[0]):
        prefix = f"blocks.{block}."
        yield f"{prefix}modulation", Spec((1, 6, hidden), _MODULATION)
        for attention in ("self_attn.", "cross_attn."):
            yield from _linears(prefix + attention, [(name, hidden, hidden) for name in "qkvo"])
            yield from (_ones(f"{prefix}{attention}norm_{name}.weight", hidden) for name in "qk")
        yield _ones(f"{prefix}norm3.weight", hidden)
        yield f"{prefix}norm3.bias", Spec((hidden,), _BIAS)
        yield from _linears(f"{prefix}ffn.", [("0", inner, hidden), ("2", hidden, inner)])
    yield "head.modulation", Spec((1, 2, hidden), _MODULATION)
    yield from _linears("head.", [("head", 4 * _LATENT, hidden)])


MODELS = {
    "flux": Architecture(
        specs=_flux_specs,
        hidden=3072,
        blocks=(19, 38),
        pooled=_POOLED,
        latent_node="EmptySD3LatentImage",
        latent={"width": 1024, "height": 1024, "batch_size": 1},
        small={"width": 128, "height": 128},
    ),
    "wan14b": Architecture(
        specs=_wan_specs,
        hidden=5120,
        blocks=(40,),
        pooled=0,
        latent_node="EmptyHunyuanLatentVideo",
        latent={"width": 832, "height": 480, "length": 33, "batch_size": 1},
        small={"width": 64, "height": 64, "length": 5},
    ),
}


def lora_specs(specs: Mapping[str, Spec], rank: int) -> Iterator[tuple[str, Spec]]:
    """Yield the tensors of a LoRA over all linear layers of the blocks, in the names that ComfyUI reads for every model."""
    for name, spec in specs.items():
        if "blocks." in name and name.endswith(".weight") and len(spec.shape) == 2:
            out, inner = spec.shape
            layer = "diffusion_model." + name.removesuffix(".weight")
            yield f"{layer}.lora_A.weight", Spec((rank, inner), inner**-0.5)
            yield f"{layer}.lora_B.weight", Spec((out, rank), 0.1 * spec.deviation)


def write_model(path: Path, specs: Mapping[str, Spec], device: torch.device, seed: int = 0) -> None:
    """Write a safetensors file of random bfloat16 tensors, one at a time; the same seed and device give the same file."""
    infos = {name: TensorInfo(torch.bfloat16, spec.shape) for name, spec in specs.items()}
    generator = torch.Generator(device).manual_seed(seed)
    with SafetensorsWriter(path, header_bytes(infos.items(), {})) as writer:
        for name, spec in specs.items():
            tensor = torch.randn(spec.shape, generator=generator, device=device, dtype=torch.bfloat16)
            writer.add(name, tensor.mul_(spec.deviation).add_(spec.mean))
        writer.finish({})
