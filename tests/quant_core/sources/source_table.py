"""Generate docs/sources.md: the error of every source format in every output format.

python tests/quant_core/sources/source_table.py
"""

import argparse
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
from learned_rounding.tests.gguf_files import save_gguf

__all__ = ["DOCUMENT", "SOURCES", "document", "errors"]

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "sources.md"
MODEL = ROOT / "assets" / "tiny_mmdit_emoji.safetensors"
HEAD = """# Sources

File formats that can be quantized, and their error in each output format. A cell is the relative root-mean-square error of the quantized
weights of a small MMDiT (`assets/`) against its bfloat16 original, rounded to nearest (RTN). A source with the error of the first row loses
nothing; a higher error is that of the source itself. `python tests/quant_core/sources/source_table.py` writes this file: it makes, quantizes
and verifies every source, and a test compares the result. The selection of layers does not depend on the file format: see
[models](models.md).

"""
TAIL = """
`--requantize` (in a graph, the switch of **Load Model**) is required for sources that are already quantized; use the original model where it
is available. It also decodes ComfyUI's `nvfp4`, `mxfp8`, `convrot_w4a4` and `asym_w4a8_int8`, bit for bit as ComfyUI does
(`tests/nodes/test_foreign.py`), and block FP8 of Hugging Face and DeepSeek, 8-bit layers of quanto and torchao, NF4, FP4 and INT8 of
bitsandbytes, and compressed-tensors, by their specifications (`tests/quant_core/formats/test_external.py`). SDNQ, GPTQ, AWQ, nunchaku and
quantized values beside tensors of unknown meaning are refused by name.

* Files are read by their content; the suffix does not matter. A shard, or a part of a split GGUF, is opened as the whole model, whose other
  files must be in the same folder.
* GGUF requires `pip install gguf`. Quantized tensors are dequantized to bfloat16. Keys that ComfyUI needs, such as `config` of LTX-2, become
  metadata of the output. Text encoders with the tensor names of llama.cpp get those of transformers, which ComfyUI reads: T5-XXL, Llama 3.1 8B,
  Qwen2.5 3B and Qwen3. Others are refused: ComfyUI's files of them also hold a tokenizer or an image encoder.
* Pickles (`.ckpt`, `.pt`, `.pth`, `.bin`) are parsed without executing them: only dense tensors are read, at their positions in the file. Of a
  training checkpoint the state dict is read that ComfyUI's loader takes. Averaged copies (`model_ema.` …) are left out of the output.
* Diffusion models with the layer names of diffusers, sharded or not, can be loaded with **Load Model** in a graph, where ComfyUI converts the
  names (SD1.5 to SDXL, SD3, Flux.1, AuraFlow, PixArt; Z-Image not on 0.3.75). The command line cannot convert names without ComfyUI and
  refuses these models, because ComfyUI would lose the scales of the quantized layers when it renames them. Names that ComfyUI has no converter
  for are converted everywhere (WAN 2.1 and 2.2 with VACE, LTX-Video, Flux.2, Hunyuan Video 1.0 and 1.5); other families are refused.
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


def _mixed_dtypes(tensors: Weights) -> Weights:
    """Convert every third tensor to float32."""
    return {
        name: tensor.float() if number % 3 == 0 else tensor for number, (name, tensor) in enumerate(tensors.items())
    }


def _checkpoint(tensors: Weights) -> Weights:
    """Add a text encoder and a VAE."""
    others = {
        "first_stage_model.decoder.mid.attn_1.q.weight": torch.ones(64, 64),
        "text_encoders.clip_l.proj.weight": torch.ones(64, 64),
    }
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()} | others


def _scaled_fp8(tensors: Weights) -> Weights:
    """Quantize to the former format of ComfyUI: a marker tensor, and ``scale_weight`` for each weight."""
    quantized = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    names = set(_matrices(tensors))
    for name, tensor in tensors.items():
        if name in names:
            scale = tensor.float().abs().max() / 448
            quantized[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            quantized[name.removesuffix(LINEAR) + ".scale_weight"] = scale.reshape(1)
        else:
            quantized[name] = tensor
    return quantized


def _shards(tensors: Weights, folder: Path) -> Path:
    weight_map = {}
    for number in (1, 2):
        half = dict(list(tensors.items())[number - 1 :: 2])
        save_file(half, folder / f"model-{number:05}-of-00002.safetensors")
        weight_map |= dict.fromkeys(half, f"model-{number:05}-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
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
        save_gguf(writer)
        return folder / "model.gguf"

    return write


def _native(format: str) -> Callable[[Weights, Path], Path]:
    def write(tensors: Weights, folder: Path) -> Path:
        plain = _safetensors(dict)(tensors, folder)
        quantize_file(plain, folder / "quantized.safetensors", Recipe(format=format, rounding="nearest"))
        return folder / "quantized.safetensors"

    return write


# row of the table → function that writes the source file
SOURCES: Mapping[str, Callable[[Weights, Path], Path]] = {
    "safetensors, bfloat16": _safetensors(dict),
    "safetensors, float16": _safetensors(lambda tensors: {name: tensor.half() for name, tensor in tensors.items()}),
    "safetensors, float32": _safetensors(lambda tensors: {name: tensor.float() for name, tensor in tensors.items()}),
    "safetensors, bfloat16, every third tensor float32": _safetensors(_mixed_dtypes),
    "checkpoint (CLIP and VAE unquantized)": _safetensors(_checkpoint),
    "sharded safetensors, index": _shards,
    "sharded safetensors, folder": lambda tensors, folder: _shards(tensors, folder).parent,
    "`.ckpt`, `.pt`, `.pth`, `.bin`": _pickle,
    "GGUF, BF16": _gguf("BF16"),
    "GGUF, Q8_0": _gguf("Q8_0"),
    "GGUF, Q4_0": _gguf("Q4_0"),
    "ComfyUI scaled FP8 (`scaled_fp8`), `--requantize`": _safetensors(_scaled_fp8),
    "FP8 without scales, `--requantize`": _safetensors(
        lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    ),
    **{f"`{format}`, `--requantize`": _native(format) for format in FORMATS},
}


def errors(kind: str, folder: Path) -> dict[str, float]:
    """Return {format: relative error of the quantized weights} for one source; verify every file."""
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
    """Return the document."""
    lines = [f"| source | {' | '.join(f'`{name}`' for name in FORMATS)} |", f"| --- |{' --- |' * len(FORMATS)}"]
    for kind in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            cells = [f"{100 * error:.1f} %" for error in errors(kind, Path(folder)).values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    DOCUMENT.write_text(document(), encoding="utf-8")
