"""Layers in the formats of other quantizers, built by their specifications, with the weights that they mean."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OUT, INNER = 160, 192  # neither a multiple of 128, INNER one of 64
LAYER = "blocks.0.mlp"
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]  # of codes 0…7; the next eight are the negatives
FP4 += [-value for value in FP4]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def zeros(dtype, *shape):
    return torch.zeros(shape, dtype=dtype)


def below(layer_tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the layer under their whole names."""
    return {f"{LAYER}.{key}": tensor for key, tensor in layer_tensors.items()}


def js(value) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def hugging_face(dtype=torch.float32, name="weight_scale_inv"):
    """(tensors, weight): the value of every element times the scale of its block of 128 × 128."""
    q = (random(OUT, INNER) * 20).to(E4M3)
    scale = (random(2, 2, seed=1).abs() + 0.1).to(dtype)
    values, scales = q.float().tolist(), scale.float().tolist()
    weight = torch.tensor([[values[r][c] * scales[r // 128][c // 128] for c in range(INNER)] for r in range(OUT)])
    return {f"{LAYER}.weight": q, f"{LAYER}.{name}": scale}, weight


def hugging_face_static():
    """One scale per tensor and one for activations, as of Ministral 3."""
    q = (random(OUT, INNER) * 20).to(E4M3)
    scale = torch.tensor(0.25, dtype=torch.bfloat16)
    tensors = {f"{LAYER}.weight": q, f"{LAYER}.weight_scale_inv": scale, f"{LAYER}.activation_scale": torch.tensor(0.5)}
    return tensors, q.float() / 4


def quanto(dtype=torch.int8):
    q = (random(OUT, INNER) * 30).to(dtype)
    scale = (random(OUT, 1, seed=1).abs() + 0.1).bfloat16()
    tensors = {f"{LAYER}.weight._data": q, f"{LAYER}.weight._scale": scale}
    tensors |= {f"{LAYER}.input_scale": torch.ones(()), f"{LAYER}.output_scale": torch.ones(())}
    return tensors, q.float() * scale.float()


def bitsandbytes_4_bit(kind="nf4", nested=False, blocksize=64):
    """Blocks run over the flattened weight; the first of two values is in the high four bits."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    codes = integers(0, 16, OUT * INNER)
    blocks = OUT * INNER // blocksize
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16", "shape": [OUT, INNER]}
    name = f"{LAYER}.weight"
    tensors = {name: (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], f"{name}.quant_map": table}
    absmax = random(blocks, seed=1).abs() + 0.1
    if nested:
        indices, big, numbers = integers(0, 256, blocks), random(-(-blocks // 256), seed=2).abs(), random(256, seed=3)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.625}
        absmax = torch.tensor([float(numbers[i] * big[n // 256]) + 0.625 for n, i in enumerate(indices.tolist())])
        tensors |= {f"{name}.absmax": indices.to(torch.uint8)}
        tensors |= {f"{name}.nested_absmax": big, f"{name}.nested_quant_map": numbers}
    else:
        tensors[f"{name}.absmax"] = absmax
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = js(state)
    numbers, magnitudes = table.tolist(), absmax.tolist()
    weight = torch.tensor([numbers[code] * magnitudes[n // blocksize] for n, code in enumerate(codes.tolist())])
    return tensors, weight.reshape(OUT, INNER)


def bitsandbytes_int8():
    q, largest = integers(-127, 128, OUT, INNER).to(torch.int8), random(OUT, seed=1).abs() + 0.1
    tensors = {
        f"{LAYER}.weight": q,
        f"{LAYER}.SCB": largest,
        f"{LAYER}.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    return tensors, q.float() * (largest / 127)[:, None]


def packed(bits=4, groups=3):
    """Value 0 is 2^(bits - 1), and the first value of a word is in its lowest bits."""
    q = integers(-(2 ** (bits - 1)), 2 ** (bits - 1), OUT, INNER)
    words = torch.zeros(OUT, INNER * bits // 32, dtype=torch.int64)
    for column in range(INNER):
        words[:, column * bits // 32] |= (q[:, column] + 2 ** (bits - 1)) << column * bits % 32
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    scale = (random(OUT, groups, seed=1).abs() + 0.1).bfloat16()
    weight = q.float() * scale.float().repeat_interleave(INNER // groups, dim=1)
    tensors = {f"{LAYER}.weight_packed": words, f"{LAYER}.weight_scale": scale}
    return tensors | {f"{LAYER}.weight_shape": torch.tensor([OUT, INNER])}, weight


def packed_fp4():
    codes, scale = integers(0, 16, OUT, INNER), (random(OUT, INNER // 16, seed=1).abs() * 100 + 1).to(E4M3)
    level = torch.tensor([512.0])
    tensors = {f"{LAYER}.weight_packed": (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)}
    tensors |= {f"{LAYER}.weight_scale": scale, f"{LAYER}.weight_global_scale": level}
    tensors |= {f"{LAYER}.input_global_scale": torch.ones(1)}
    return tensors, torch.tensor(E2M1)[codes] * (scale.float() / 512).repeat_interleave(16, dim=1)


TORCHAO = {
    f"{LAYER}.weight": json.dumps({"_type": "Float8Tensor", "_data": {"block_size": [1, INNER]}}),
    "tensor_names": json.dumps([f"{LAYER}.weight", "norm.weight"]),
    "norm.weight": json.dumps({"_type": "Tensor"}),
}

TORCHAO_INT8 = TORCHAO | {f"{LAYER}.weight": json.dumps({"_type": "Int8Tensor"})}


def torchao():
    q, scale = (random(OUT, INNER) * 20).to(E4M3), random(OUT, 1, seed=1).abs() + 0.1
    return {f"{LAYER}._weight_qdata": q, f"{LAYER}._weight_scale": scale}, q.float() * scale


def torchao_int8():
    q, scale = integers(-127, 128, OUT, INNER).to(torch.int8), random(OUT, 1, seed=1).abs() + 0.1
    tensors = {f"{LAYER}._weight_qdata": q, f"{LAYER}._weight_scale": scale}
    return tensors | {f"{LAYER}._weight_zero_point": zeros(torch.int8, OUT, 1)}, q.float() * scale


def w8a8():
    """Unpacked 8-bit weights of compressed-tensors have the names of ComfyUI's formats, and no JSON."""
    q, scale = integers(-127, 128, OUT, INNER).to(torch.int8), (random(OUT, 1, seed=1).abs() + 0.1).bfloat16()
    return {f"{LAYER}.weight": q, f"{LAYER}.weight_scale": scale}, q.float() * scale.float()


@dataclass(frozen=True)
class ReadCase:
    """A layer that can be dequantized.

    Attributes:
        build: makes (tensors, weight).
        name: of the format, as inspect reports it.
        native: ComfyUI's format after migrate; None where there is none.
        metadata: of the file's header.
    """

    build: Callable[[], tuple[dict[str, torch.Tensor], torch.Tensor]]
    name: str
    native: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @cached_property
    def layer(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return self.build()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return self.layer[0]

    @property
    def weight(self) -> torch.Tensor:
        return self.layer[1]


BLOCKS, ROWS, INT8 = "float8_e4m3fn_blockwise", "float8_e4m3fn_rowwise", "int8_tensorwise"
READ = {
    "Hugging Face": ReadCase(hugging_face, "Hugging Face FP8", BLOCKS),
    "Hugging Face, bfloat16 scales": ReadCase(partial(hugging_face, torch.bfloat16), "Hugging Face FP8", BLOCKS),
    "Hugging Face, powers of two": ReadCase(partial(hugging_face, torch.float8_e8m0fnu), "Hugging Face FP8", BLOCKS),
    "Hugging Face, static": ReadCase(hugging_face_static, "Hugging Face FP8", "float8_e4m3fn"),
    "DeepSeek": ReadCase(partial(hugging_face, name="scale"), "DeepSeek FP8", BLOCKS),
    "quanto INT8": ReadCase(quanto, "quanto", INT8),
    "quanto FP8": ReadCase(partial(quanto, E4M3), "quanto", ROWS),
    "NF4": ReadCase(bitsandbytes_4_bit, "bitsandbytes NF4"),
    "NF4, nested": ReadCase(partial(bitsandbytes_4_bit, nested=True), "bitsandbytes NF4"),
    "FP4": ReadCase(partial(bitsandbytes_4_bit, "fp4", blocksize=128), "bitsandbytes FP4"),
    "INT8 of bitsandbytes": ReadCase(bitsandbytes_int8, "bitsandbytes INT8", INT8),
    "packed 4 bits": ReadCase(packed, "compressed-tensors packed INT"),
    "packed 8 bits, per row": ReadCase(partial(packed, 8, 1), "compressed-tensors packed INT"),
    "packed FP4": ReadCase(packed_fp4, "compressed-tensors NVFP4"),
    "torchao": ReadCase(torchao, "torchao", ROWS, TORCHAO),
    "torchao INT8": ReadCase(torchao_int8, "torchao", INT8, TORCHAO_INT8),
    "W8A8": ReadCase(w8a8, "INT8 without layer JSON", INT8),
}


SDNQ = {"weight": zeros(E4M3, OUT, INNER), "scale": torch.ones(OUT, 1)}
PER_ROW = {"weight": zeros(torch.int8, OUT, INNER), "weight_scale": torch.ones(OUT, 1)}
REFUSED = {  # case: (tensors by last part of the name, name of the format)
    "SDNQ": (SDNQ, "SDNQ"),
    "SDNQ, asymmetric": (
        {"weight": zeros(torch.uint8, OUT, INNER), "scale": torch.ones(OUT, 1), "zero_point": torch.ones(OUT, 1)},
        "SDNQ",
    ),
    "SDNQ, low rank": (SDNQ | {"svd_up": torch.ones(OUT, 8), "svd_down": torch.ones(8, INNER)}, "SDNQ"),
    "SDNQ, groups": ({"weight": zeros(torch.int8, OUT, 3, 64), "scale": torch.ones(OUT, 3, 1)}, "SDNQ"),
    "nunchaku": (
        {"qweight": zeros(torch.int8, OUT, INNER // 2), "wscales": torch.ones(INNER // 64, OUT)}
        | {"lora_down": torch.ones(INNER, 32), "lora_up": torch.ones(OUT, 32), "smooth_factor": torch.ones(INNER)},
        "nunchaku SVDQuant",
    ),
    "GPTQ": (
        {"qweight": zeros(torch.int32, INNER // 8, OUT), "qzeros": zeros(torch.int32, 2, OUT // 8)}
        | {"scales": torch.ones(2, OUT), "g_idx": zeros(torch.int32, INNER)},
        "GPTQ",
    ),
    "AWQ": (
        {"qweight": zeros(torch.int32, INNER, OUT // 8), "qzeros": zeros(torch.int32, 2, OUT // 8)}
        | {"scales": torch.ones(2, OUT)},
        "AWQ",
    ),
    "AWQ of TinyChat": (
        {"qweight": zeros(torch.int16, OUT // 4, INNER), "scales": torch.ones(2, OUT), "scaled_zeros": torch.ones(2, OUT)},
        "AWQ of TinyChat",
    ),
    "quanto INT4": (
        {"weight._data._data": zeros(torch.uint8, OUT, INNER // 2), "weight._scale": torch.ones(OUT, 1)}
        | {"weight._shift": torch.ones(OUT, 1)},
        "quanto",
    ),
    "torchao INT4": (
        {"_weight_qdata": zeros(torch.uint8, OUT, INNER // 2), "_weight_scale": torch.ones(2, OUT)},
        "torchao",
    ),
    "NVFP4 of ModelOpt": (
        {"weight": zeros(torch.uint8, OUT, INNER // 2), "weight_scale": torch.ones(OUT, INNER // 16).to(E4M3)}
        | {"weight_scale_2": torch.tensor(1.0), "input_scale": torch.tensor(1.0)},
        "NVFP4 without layer JSON",
    ),
    "bitsandbytes without state": (
        {"weight": zeros(torch.uint8, OUT * INNER // 2, 1), "weight.absmax": torch.ones(480)},
        "bitsandbytes",
    ),
    "bitsandbytes INT8, tiles": (
        {"weight": zeros(torch.int8, OUT, INNER), "SCB": torch.ones(OUT), "weight_format": torch.tensor(2)},
        "bitsandbytes",
    ),
    "compressed-tensors, sparse": ({"weight_packed": zeros(torch.int32, OUT, 12)}, "compressed-tensors"),
    "Hugging Face experts": (
        {"gate_up_proj": zeros(E4M3, 4, OUT, INNER), "gate_up_proj_scale_inv": torch.ones(4, 2, 2)},
        "Hugging Face FP8 experts",
    ),
    "MXFP4": (
        {"down_proj_blocks": zeros(torch.uint8, 4, OUT, 6, 16), "down_proj_scales": zeros(torch.uint8, 4, OUT, 6)},
        "MXFP4",
    ),
    "HQQ": ({"W_q": zeros(torch.uint8, OUT // 2, INNER), "scale": torch.ones(OUT, 1)}, "HQQ"),
    # Companions of quantized values in no known way.
    "zero points": (PER_ROW | {"weight_zero_point": torch.ones(OUT, 1, dtype=torch.int8)}, "an unknown quantization"),
    "smoothing": (PER_ROW | {"smooth_scale": torch.ones(INNER)}, "an unknown quantization"),
    "rotation": (PER_ROW | {"weight_rotation.matrix": torch.eye(16)}, "an unknown quantization"),
    "low rank": (PER_ROW | {"lora_A.weight": torch.ones(8, INNER)}, "an unknown quantization"),
    "FP8, another scale": (
        {"weight": zeros(E4M3, OUT, INNER), "weight_multiplier": torch.ones(OUT, 1)},
        "an unknown quantization",
    ),
    "FP8, scale below the layer": (
        {"weight": zeros(E4M3, OUT, INNER), "weight_quantizer._scale": torch.ones(())},
        "an unknown quantization",
    ),
    "FP8 by another name": (
        {"float8_data": zeros(E4M3, OUT, INNER), "scale": torch.ones(()), "scale_reciprocal": torch.ones(())},
        "an unknown quantization",
    ),
    "FP8, scale below the weight": (
        {"weight": zeros(E4M3, OUT, INNER), "weight.weight_scale": torch.full((), 0.5)},
        "an unknown quantization",
    ),
    "FP8, zero points": (
        {"weight": zeros(E4M3, OUT, INNER), "weight_scale": torch.ones(OUT, 1)}
        | {"weight_zero_point": torch.ones(OUT, 1).to(E4M3)},
        "an unknown quantization",
    ),
    "MXFP8 of ModelOpt": (
        {"weight": zeros(E4M3, OUT, INNER), "weight_scale": zeros(torch.uint8, OUT, INNER // 32)},
        "E4M3 without layer JSON",
    ),
    "INT8, groups": (
        {"weight": zeros(torch.int8, OUT, INNER), "weight_scale": torch.ones(OUT, 3)},
        "INT8 without layer JSON",
    ),
    "FP8, convolution": (
        {"weight": zeros(E4M3, OUT, INNER, 3, 3), "weight_scale": torch.full((), 0.5)},
        "E4M3 without layer JSON",
    ),
    "old FP8, convolution": (
        {"weight": zeros(E4M3, OUT, INNER, 3, 3), "scale_weight": torch.full((), 0.5)},
        "scaled fp8 (old)",
    ),
    "Hugging Face, E5M2": ({"weight": zeros(E5M2, OUT, INNER), "weight_scale_inv": torch.ones(2, 2)}, "Hugging Face FP8"),
    "packed, unknown": ({"qdata": zeros(torch.int32, OUT, 24), "scales": torch.ones(OUT)}, "an unknown quantization"),
    "Hugging Face, zero points": (
        {"weight": zeros(E4M3, OUT, INNER), "weight_scale_inv": torch.ones(2, 2), "zero_point": torch.ones(2, 2)},
        "an unknown quantization",
    ),
    "packed, order of activations": (
        {key.removeprefix(f"{LAYER}."): tensor for key, tensor in packed()[0].items()}
        | {"weight_g_idx": zeros(torch.int32, INNER)},
        "an unknown quantization",
    ),
    "integers": ({"weight": zeros(torch.int8, OUT, INNER)}, "plain INT8 weights"),
    "bytes": ({"weight": zeros(torch.uint8, OUT, INNER)}, "plain UINT8 weights"),
    "words": ({"weight": zeros(torch.int32, OUT, INNER)}, "plain INT32 weights"),
}  # fmt: skip
