"""docs/sources.md: every kind of file that can be quantized, into every format, tried.

python tests/quant_core/sources/source_table.py      writes it again
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import FORMATS, Recipe, quantize_file
from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.output.inspect import quantized_formats
from learned_rounding.quant_core.sources import SafetensorsFile, open_source

__all__ = ["DOCUMENT", "SOURCES", "errors", "document"]

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "sources.md"
MODEL = ROOT / "assets" / "tiny_mmdit_emoji.safetensors"
HEAD = """# Sources

What can be quantized, and into what. Each cell is an error that was measured: of the quantized weights of a small model of SD3's
architecture (`assets/`), root mean square, relative to its bfloat16 original, rounded to nearest. The same number as in the first row says that
the file came through unharmed; a higher one is what the source itself had lost. Written by `python tests/quant_core/sources/source_table.py`, which
makes and verifies every file; a test compares. Which layers of which model are quantized does not depend on the kind of file:
[models](models.md).

"""
TAIL = """
*--requantize* (in a graph, the switch of **Load Model**) has to be given for files that are quantized already: better take the original.
It decodes ComfyUI's `nvfp4`, `mxfp8`, `convrot_w4a4` and `asym_w4a8_int8` too, bit for bit as ComfyUI does (`tests/nodes/test_foreign.py`), but not
bitsandbytes.
GGUF needs `pip install gguf`; text encoders in GGUF are refused. Pickles are followed, not run, to where their tensors lie: nothing in
them is run. Diffusion models with diffusers' layer names, sharded or not, are taken by **Load Model** in a graph, where ComfyUI's own
converters turn the names into ComfyUI's (SD1.5 to SDXL, SD3, Flux.1, AuraFlow, PixArt; Z-Image not on 0.3.75). The command line has no ComfyUI to ask, and
refuses them: the scales of quantized layers would be lost when ComfyUI renames them.
"""

Weights = Mapping[str, torch.Tensor]
LINEAR = ".weight"


def _matrices(tensors: Weights) -> list[str]:
    return [name for name, tensor in tensors.items() if name.endswith(LINEAR) and tensor.ndim == 2]


def _safetensors(change: Callable[[Weights], Weights]) -> Callable[[Weights, Path], Path]:
    def write(tensors: Weights, folder: Path) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, folder / "model.safetensors")
        return folder / "model.safetensors"

    return write


def _islands(tensors: Weights) -> Weights:
    """Every third tensor in float32."""
    return {
        name: tensor.float() if number % 3 == 0 else tensor for number, (name, tensor) in enumerate(tensors.items())
    }


def _checkpoint(tensors: Weights) -> Weights:
    """The model with a text encoder and a VAE beside it."""
    others = {
        "first_stage_model.decoder.mid.attn_1.q.weight": torch.ones(64, 64),
        "text_encoders.clip_l.proj.weight": torch.ones(64, 64),
    }
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()} | others


def _scaled_fp8(tensors: Weights) -> Weights:
    """As it was before ComfyUI's format of today: a marker, and a scale beside each weight."""
    coded = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    names = set(_matrices(tensors))
    for name, tensor in tensors.items():
        if name in names:
            scale = tensor.float().abs().max() / 448
            coded[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            coded[name.removesuffix(LINEAR) + ".scale_weight"] = scale.reshape(1)
        else:
            coded[name] = tensor
    return coded


def _shards(tensors: Weights, folder: Path) -> Path:
    places = {}
    for number in (1, 2):
        half = dict(list(tensors.items())[number - 1 :: 2])
        save_file(half, folder / f"model-{number:05}-of-00002.safetensors")
        places |= dict.fromkeys(half, f"model-{number:05}-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


def _pickle(tensors: Weights, folder: Path) -> Path:
    torch.save({"state_dict": dict(tensors), "epoch": 3}, folder / "model.ckpt")
    return folder / "model.ckpt"


def _gguf(code: str) -> Callable[[Weights, Path], Path]:
    def write(tensors: Weights, folder: Path) -> Path:
        writer = gguf.GGUFWriter(folder / "model.gguf", "sd3")
        names = set(_matrices(tensors))
        for name, tensor in tensors.items():
            kind = gguf.GGMLQuantizationType[code if name in names and tensor.shape[-1] % 32 == 0 else "F32"]
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "model.gguf"

    return write


def _native(format: str) -> Callable[[Weights, Path], Path]:
    def write(tensors: Weights, folder: Path) -> Path:
        plain = _safetensors(dict)(tensors, folder)
        quantize_file(plain, folder / "coded.safetensors", Recipe(format=format, rounding="nearest"))
        return folder / "coded.safetensors"

    return write


# What it is → how the tests make one of the model's tensors.
SOURCES: Mapping[str, Callable[[Weights, Path], Path]] = {
    "safetensors, bfloat16": _safetensors(dict),
    "safetensors, float16": _safetensors(lambda tensors: {name: tensor.half() for name, tensor in tensors.items()}),
    "safetensors, float32": _safetensors(lambda tensors: {name: tensor.float() for name, tensor in tensors.items()}),
    "bfloat16 with float32 islands": _safetensors(_islands),
    "whole checkpoint (CLIP and VAE stay)": _safetensors(_checkpoint),
    "shards, by their index": _shards,
    "folder of shards": lambda tensors, folder: _shards(tensors, folder).parent,
    "`.ckpt`, `.pt`, `.pth`, `.bin`": _pickle,
    "GGUF, BF16": _gguf("BF16"),
    "GGUF, Q8_0": _gguf("Q8_0"),
    "GGUF, Q4_0": _gguf("Q4_0"),
    "old scaled FP8, `--requantize`": _safetensors(_scaled_fp8),
    "FP8 without scales, `--requantize`": _safetensors(
        lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    ),
    **{f"`{format}`, `--requantize`": _native(format) for format in FORMATS},
}


def errors(kind: str, folder: Path) -> dict[str, float]:
    """Format → relative error of the weights that a source of this kind is quantized to; every file is verified."""
    original = load_file(MODEL)
    found = {}
    with open_source(SOURCES[kind](original, folder)) as opened:
        source = DecodedSource(opened) if quantized_formats(opened) else opened
        for format in FORMATS:
            out = folder / f"{format}.out.safetensors"
            quantize_file(source, out, Recipe(format=format, rounding="nearest"))
            if verify_file(out).problems:
                raise ValueError(f"{kind} to {format}: {verify_file(out).problems}")
            found[format] = _error(out, original)
    return found


def _error(path: Path, original: Weights) -> float:
    with SafetensorsFile(path) as file:
        decoded = DecodedSource(file)
        off = energy = 0.0
        for name, info in file.tensors.items():
            plain = original.get(name.removeprefix("model.diffusion_model."))
            if plain is not None and info.dtype.itemsize == 1:
                off += float((decoded.read(name).double() - plain.double()).square().sum())
                energy += float(plain.double().square().sum())
    return (off / energy) ** 0.5


def document() -> str:
    """The whole document."""
    lines = [f"| source | {' | '.join(f'`{name}`' for name in FORMATS)} |", f"| --- |{' --- |' * len(FORMATS)}"]
    for kind in SOURCES:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            cells = [f"{100 * error:.1f} %" for error in errors(kind, folder).values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    DOCUMENT.write_text(document(), encoding="utf-8")
