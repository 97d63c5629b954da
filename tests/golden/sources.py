"""Small input files for the golden cases, made without the code under test.

Weights are multiples of a power of two drawn from SHAKE-128, so their bytes are the same on every machine and with every
version of torch, and sums of a Hadamard transform over 256 of them are exact in float32.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

__all__ = ["SOURCES", "write_sources"]

Tensors = dict[str, torch.Tensor]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8

_NAMES = {
    torch.float64: "F64",
    F32: "F32",
    F16: "F16",
    BF16: "BF16",
    E4M3: "F8_E4M3",
    E5M2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    INT8: "I8",
    torch.uint8: "U8",
}
# Layer → factor of its activations: beyond the range of E4M3, where input scales matter.
_ACTIVATION_GAINS = {"blocks.0.attn.qkv": 512, "blocks.0.mlp.0": 2.0**-10}
_HISTOGRAM_BINS = 512  # eight to the octave from 2⁻³² to 2³²


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and metadata in the given order; the safetensors package orders metadata at random."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data = bytearray()
    for name, tensor in tensors.items():
        begin = len(data)
        data += _bytes(tensor)
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, len(data)]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _draw(name: str, count: int) -> np.ndarray:
    """``count`` bytes that depend on ``name`` alone, uint8."""
    return np.frombuffer(hashlib.shake_128(name.encode()).digest(count), dtype=np.uint8)


def _bell(name: str, *shape: int) -> np.ndarray:
    """Integers from -510 to 510, nearly normal with a standard deviation of 148, int64."""
    return _draw(name, 4 * math.prod(shape)).reshape(*shape, 4).astype(np.int64).sum(axis=-1) - 510


def _weight(name: str, out: int, inner: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A weight (out, in) of standard deviation 0.018, every 23rd channel four times as large."""
    values = _bell(name, out, inner)
    values[:, 5::23] *= 4
    if dtype is F32:  # with more bits than 16-bit formats hold
        values = values * 16 + _draw(f"{name} low bits", out * inner).reshape(out, inner) % 16
        return torch.from_numpy(values / 2.0**17).to(dtype)
    return torch.from_numpy(values / 2.0**13).to(dtype)


def _vector(name: str, size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.from_numpy(_bell(name, size) / 2.0**10).to(dtype)


# Layer → (out, in, dtype, whether it has a bias).
_LAYERS = {
    "blocks.0.attn.qkv": (96, 64, BF16, True),
    "blocks.0.attn.proj": (64, 96, BF16, True),
    "blocks.0.mlp.0": (128, 256, F16, True),
    "blocks.0.mlp.2": (256, 128, F32, False),
    "blocks.1.attn.qkv": (96, 64, BF16, False),
    "blocks.1.attn.proj": (37, 51, F32, True),
    "blocks.1.mlp.0": (256, 512, BF16, False),
    "blocks.1.mlp.2": (1, 33, F16, True),
    "blocks.2.adapter": (64, 96, F32, True),
}


def _model(layers: Mapping[str, tuple[int, int, torch.dtype, bool]] = _LAYERS, prefix: str = "") -> Tensors:
    """Linear layers, and tensors that stay unquantized: a norm, an embedding, a convolution, a number."""
    tensors: Tensors = {
        f"{prefix}embed_tokens.weight": _weight("embedding", 40, 32),
        f"{prefix}patch.weight": _weight("patch", 32, 16).reshape(32, 4, 2, 2),
        f"{prefix}step": torch.tensor(7),
    }
    for name, (out, inner, dtype, biased) in layers.items():
        tensors[f"{prefix}{name}.weight"] = _weight(name, out, inner, dtype)
        if biased:
            tensors[f"{prefix}{name}.bias"] = _vector(f"{name}.bias", out, dtype)
    tensors[f"{prefix}blocks.0.norm.weight"] = _vector("norm", 64, F32)
    return tensors


def _special() -> Tensors:
    """Layers of zeros, of NaN, of one outlier, of subnormal numbers, and without elements."""
    outlier = _weight("outlier", 64, 64, F32)
    outlier[3, 7] = 2.0**20
    broken = _weight("broken", 32, 32, F32)
    broken[1, 2] = math.nan
    return {
        "blocks.0.zero.weight": torch.zeros(32, 64, dtype=BF16),
        "blocks.0.negative_zero.weight": -torch.zeros(32, 64, dtype=F32),
        "blocks.0.zero_row.weight": torch.cat([torch.zeros(1, 64), _weight("zero row", 15, 64, F32)]),
        "blocks.0.broken.weight": broken,
        "blocks.0.outlier.weight": outlier,
        "blocks.0.subnormal.weight": (_weight("subnormal", 32, 64, F32).double() * 2.0**-130).to(F32),
        "blocks.0.empty.weight": torch.zeros(0, 64, dtype=BF16),
        "blocks.0.plain.weight": _weight("plain", 48, 80, F16),
    }


def _flux() -> Tensors:
    """The layers by which the preset of Flux.1 is recognised, small."""
    shapes = {
        "img_in": (64, 16),
        "txt_in": (64, 32),
        "time_in.in_layer": (64, 32),
        "double_blocks.0.img_attn.qkv": (192, 64),
        "double_blocks.0.img_mlp.0": (256, 64),
        "double_blocks.0.txt_mod.lin": (96, 64),
        "single_blocks.0.linear1": (448, 64),
        "single_blocks.0.linear2": (64, 320),
        "single_blocks.0.modulation.lin": (192, 64),
        "final_layer.linear": (16, 64),
    }
    tensors = {}
    for name, (out, inner) in shapes.items():
        tensors |= {f"{name}.weight": _weight(name, out, inner), f"{name}.bias": _vector(name, out)}
    return tensors


def _checkpoint() -> Tensors:
    """A whole checkpoint: diffusion model, VAE and text encoder."""
    return {
        **_model({name: _LAYERS[name] for name in list(_LAYERS)[:4]}, "model.diffusion_model."),
        "first_stage_model.decoder.mid.weight": _weight("vae", 32, 32, F16),
        "cond_stage_model.transformer.layers.0.fc.weight": _weight("encoder", 64, 32, F16),
    }


def _integers(name: str, out: int, inner: int) -> torch.Tensor:
    """INT8 values from -127 to 127, (out, in)."""
    return torch.from_numpy(_bell(name, out, inner).clip(-508, 508) // 4).to(INT8)


def _json_tensor(**config: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def _scaled_fp8(mark: int) -> Tensors:
    """FP8 with the tensor names that ComfyUI used before ``comfy_quant``; a mark of two elements asks for decoded weights."""
    tensors: Tensors = {"scaled_fp8": torch.zeros(mark, dtype=E4M3)}
    for name, (out, inner, _, biased) in list(_LAYERS.items())[:4]:
        tensors[f"{name}.weight"] = (_weight(name, out, inner, F32) * 2048).to(E4M3)
        tensors[f"{name}.scale_weight"] = torch.tensor(0.000490123)
        tensors[f"{name}.scale_input"] = torch.tensor([0.0371] if "attn" in name else 1.0)
        if biased:
            tensors[f"{name}.bias"] = _vector(name, out)
    tensors["norm.weight"] = _vector("norm", 64, F32)
    return tensors


def _mislabelled() -> Tensors:
    """Layers whose JSON names another format than their tensors have, or that lack it; an orphan; plain FP8."""
    scales = torch.from_numpy(_draw("scales", 96).astype(np.float32) + 1) / 2.0**16
    return {
        "a.weight": _integers("a", 96, 64),
        "a.weight_scale": scales.reshape(96, 1).clone(),
        "a.comfy_quant": _json_tensor(format="int8_blockwise"),
        "b.weight": (_weight("b", 96, 64, F32) * 1024).to(E4M3),
        "b.weight_scale": scales.clone(),
        "b.comfy_quant": _json_tensor(format="float8_e4m3fn"),
        "c.weight": _integers("c", 64, 96),
        "c.weight_scale": scales[:6].reshape(2, 3).clone(),
        "c.comfy_quant": _json_tensor(format="int8_tensorwise"),
        "d.weight": (_weight("d", 64, 96, F32) * 1024).to(E5M2),
        "d.weight_scale": torch.tensor(0.00115),
        "d.input_scale": torch.tensor(0.25),
        "e.weight_scale": torch.tensor(1.0),
        "f.weight": (_weight("f", 32, 32, F32) * 16).to(E4M3),
        "g.weight": _weight("g", 32, 32),
    }


def _external() -> tuple[Tensors, dict[str, str]]:
    """Layers in NVFP4 and MXFP8, whose scales are in the tiles of cuBLAS, and a plain one."""
    configs = {"fp4": {"format": "nvfp4"}, "mx": {"format": "mxfp8"}}
    exponents = torch.from_numpy(_draw("exponents", 128 * 4) % 7 + 112)
    tensors = {
        "fp4.weight": torch.from_numpy(_draw("fp4", 96 * 32).reshape(96, 32).copy()),
        "fp4.weight_scale": (exponents.float() / 128).to(E4M3).reshape(128, 4),
        "fp4.weight_scale_2": torch.tensor(0.0123),
        "mx.weight": (_weight("mx", 96, 128, F32) * 1024).to(E4M3),
        "mx.weight_scale": exponents.reshape(128, 4),
        "plain.weight": _weight("plain", 64, 96),
    }
    return tensors, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": configs})}


def _write_model(path: Path) -> None:
    write_safetensors(path, _model(), {"format": "pt", "modelspec.title": "golden", "author": "nobody"})


def _write_external(path: Path) -> None:
    write_safetensors(path, *_external())


def _write_shards(path: Path) -> None:
    tensors, places = _model(), {}
    for index, names in enumerate((list(tensors)[:9], list(tensors)[9:]), 1):
        shard = f"shards-0000{index}-of-00002.safetensors"
        write_safetensors(path.with_name(shard), {name: tensors[name] for name in names}, {"format": "pt"})
        places |= dict.fromkeys(names, shard)
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


def _write_pickle(path: Path) -> None:
    torch.save({"state_dict": _model(), "epoch": 3}, path)


def _write_gguf(path: Path) -> None:
    import gguf

    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "sd3")
    for name, tensor in _model().items():
        if name == "blocks.0.attn.qkv.weight":  # blocks of 32: a float16 scale and INT8 values
            scales = (_draw("Q8_0 scales", 96 * 2).reshape(96, 2, 1) / 2.0**20).astype(np.float16).view(np.uint8)
            values = _integers("Q8_0", 96, 64).numpy().view(np.uint8).reshape(96, 2, 32)
            blocks = np.concatenate([scales.reshape(96, 2, 2), values], axis=2).reshape(96, 68)
            writer.add_tensor(name, blocks, raw_dtype=kinds.Q8_0)
        else:
            writer.add_tensor(name, tensor.float().reshape(tensor.shape or (1,)).numpy(), raw_dtype=kinds.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _activations(layer: str, tokens: int, inner: int, purpose: str) -> np.ndarray:
    """Correlated activations (tokens, in) with a few large channels and a mean, float64."""
    rank = max(inner // 8, 1)
    common = _bell(f"{layer} {purpose} common", tokens, rank) @ _bell(f"{layer} mixing", rank, inner) / 148.0**2
    own = _bell(f"{layer} {purpose} own", tokens, inner) / 148
    values = common + 0.5 * own + _bell(f"{layer} mean", inner) / 600
    values[:, 2::19] *= 12
    return values * _ACTIVATION_GAINS.get(layer, 1)


def _packed(matrix: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlations of a Hessian as one float16 line, and the square roots of its diagonal; up to 2048 channels."""
    roots = np.sqrt(np.diagonal(matrix))
    return torch.from_numpy((matrix / np.outer(roots, roots)).astype(np.float16)).flatten(), torch.from_numpy(roots)


def _quantize_tokens(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.round(x / scale).clip(-127, 127) * scale


def _statistics(layer: str, inner: int, form: str) -> Tensors:
    """Statistics of one layer as a calibration file holds them.

    Args:
        form: of the Hessian: "full" (in, in), "packed" as float16 correlations, "low rank", or "paired" with that of the
            activations quantized to INT8 per token.
    """
    learned = _activations(layer, 768, inner, "learned")
    validation = _activations(layer, 96, inner, "validation")
    hessian = learned.T @ learned / len(learned)
    if form == "full":
        found = {"gram": torch.from_numpy(hessian)}
    elif form == "packed":
        panels, roots = _packed(hessian)
        found = {"gram.panels": panels, "gram.roots": roots}
    elif form == "low rank":
        factor = torch.from_numpy(learned[:48].T / math.sqrt(48)).to(BF16)
        left = np.diagonal(hessian) - factor.double().square().sum(dim=1).numpy()
        found = {"gram.factor": factor, "gram.diagonal": torch.from_numpy(left.clip(0))}
    else:
        both = np.concatenate([learned, _quantize_tokens(learned)], axis=1)
        panels, roots = _packed(both.T @ both / len(both))
        found = {"gram.panels": panels, "gram.roots": roots, "gram.mean": torch.from_numpy(both.mean(axis=0))}
    rows = torch.from_numpy(validation.T / math.sqrt(len(validation))).to(BF16)
    bins = np.floor((np.log2(np.abs(learned).clip(2.0**-32)) + 32) * 8).astype(np.int64)
    counts = np.bincount(bins.flatten().clip(0, _HISTOGRAM_BINS - 1), minlength=_HISTOGRAM_BINS)
    found |= {
        "holdout_gram.factor": rows,
        "holdout_gram.diagonal": torch.zeros(inner),
        "mean": torch.from_numpy(learned.mean(axis=0)),
        "amax": torch.from_numpy(np.abs(learned).max(axis=0)),
        "histogram": torch.from_numpy(counts),
    }
    narrow = ("panels", "factor")
    return {
        f"{layer}.{kind}": tensor if kind.endswith(narrow) else tensor.to(F32).contiguous()
        for kind, tensor in found.items()
    }


def _write_calibration(path: Path, forms: tuple[str, ...], sensitivities: bool = True) -> None:
    """A calibration of all layers of the model but the last, which has no statistics."""
    layers = {name: (out, inner) for name, (out, inner, _, _) in list(_LAYERS.items())[:-1]}
    tensors: Tensors = {}
    for index, (name, (_, inner)) in enumerate(layers.items()):
        tensors |= _statistics(name, inner, forms[index % len(forms)])
    header = {
        "version": 1,
        "architecture": "0" * 16,
        "layers": {name: [name, out, inner] for name, (out, inner) in layers.items()},
        "tokens": {name: [768, 96] for name in layers},
        "sensitivity": {name: 0.25 * (index + 1) ** 2 for index, name in enumerate(layers)} if sensitivities else {},
        "provenance": {"prompts": 2},
    }
    write_safetensors(path, tensors, {"learned_rounding_calibration": json.dumps(header, separators=(",", ":"))})


def _safetensors(make: Callable[[], Tensors]) -> Callable[[Path], None]:
    return lambda path: write_safetensors(path, make())


_RECIPE = """\
format = "int8_tensorwise"
rounding = "nearest"
convrot = 64
keep = ['mlp\\.2']
seed = 3
"""


def _write_recipe(path: Path) -> None:
    path.write_text(_RECIPE, encoding="utf-8")


# File name → function that writes it.
SOURCES: Mapping[str, Callable[[Path], None]] = {
    "model.safetensors": _write_model,
    "special.safetensors": _safetensors(_special),
    "flux.safetensors": _safetensors(_flux),
    "checkpoint.safetensors": _safetensors(_checkpoint),
    "wide.safetensors": _safetensors(lambda: {"blocks.0.wide.weight": _weight("wide", 1024, 4096), **_model()}),
    "scaled_fp8.safetensors": _safetensors(lambda: _scaled_fp8(mark=0)),
    "scaled_fp8_decoded.safetensors": _safetensors(lambda: _scaled_fp8(mark=2)),
    "mislabelled.safetensors": _safetensors(_mislabelled),
    "plain_fp8.safetensors": _safetensors(lambda: {name: tensor.to(E4M3) for name, tensor in _flux().items()}),
    "external.safetensors": _write_external,
    "shards.safetensors.index.json": _write_shards,
    "model.pt": _write_pickle,
    "model.gguf": _write_gguf,
    "full.calib.safetensors": lambda path: _write_calibration(path, ("full",)),
    "mixed.calib.safetensors": lambda path: _write_calibration(path, ("packed", "low rank"), sensitivities=False),
    "paired.calib.safetensors": lambda path: _write_calibration(path, ("paired",)),
    "recipe.toml": _write_recipe,
}


def write_sources(folder: Path, names: set[str]) -> None:
    """Write those of :data:`SOURCES` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in SOURCES.items():
        if name in names:
            write(folder / name)
