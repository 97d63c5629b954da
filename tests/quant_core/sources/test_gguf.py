"""GGUF reader against ``gguf.GGUFReader`` and ``gguf.dequantize``: the same tensors, bit for bit."""

import json

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors import safe_open

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import open_source
from learned_rounding.tests.gguf_files import save_gguf

PLAIN = {Type.F64: torch.float64, Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
PLAIN |= {Type.I8: torch.int8, Type.I16: torch.int16, Type.I32: torch.int32, Type.I64: torch.int64}
QUANTIZED = [kind for kind in Type if kind not in PLAIN]
SHAPES = {"a.weight": (48, 256), "b.weight": (3, 2, 512), "c.bias": (256,)}


def random_blocks(kind: Type, shape: tuple[int, ...], seed: int) -> numpy.ndarray:
    """Stored bytes of a tensor: quantized values where gguf can quantize, else random blocks."""
    rng = numpy.random.default_rng(seed)
    values = rng.standard_normal(shape, dtype=numpy.float32)
    try:
        return quantize(values, kind)
    except NotImplementedError:
        return rng.integers(0, 256, gguf.quant_shape_to_byte_shape(shape, kind), dtype=numpy.uint8)


def write_gguf(path, tensors: dict[str, numpy.ndarray], kind: Type, pairs=()):
    writer = gguf.GGUFWriter(path, "flux")
    for write, *arguments in pairs:
        getattr(writer, write)(*arguments)
    for name, stored in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    save_gguf(writer)
    return path


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtypes, shapes and bytes."""
    raw = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right)]
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(*raw)


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_plain_types(tmp_path, kind):
    rng = numpy.random.default_rng(0)
    tensors = {}
    for name, shape in SHAPES.items():
        raw = rng.integers(0, 256, gguf.quant_shape_to_byte_shape(shape, kind), dtype=numpy.uint8)
        tensors[name] = raw
    path = write_gguf(tmp_path / "x.gguf", tensors, kind)
    reference = gguf.GGUFReader(path)
    with open_source(path) as source:
        assert source.layers == {} and list(source.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            expected = torch.from_numpy(tensor.data.copy()).view(torch.uint8).flatten().view(PLAIN[kind])
            assert same_bits(source.read(tensor.name), expected.view(SHAPES[tensor.name]))


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_quantized_types(tmp_path, kind):
    """Values are those of ``gguf.dequantize``, rounded to bfloat16."""
    tensors = {name: random_blocks(kind, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    path = write_gguf(tmp_path / "x.gguf", tensors, kind)
    with open_source(path) as source:
        assert source.layers == {kind.name: len(SHAPES)}
        for tensor in gguf.GGUFReader(path).tensors:
            try:
                with numpy.errstate(all="ignore"):  # random blocks have scales of infinity and NaN
                    expected = dequantize(tensor.data, kind)
            except NotImplementedError:
                with pytest.raises(SourceError, match=f"cannot dequantize {kind.name} of tensor"):
                    source.read(tensor.name)
                continue
            with numpy.errstate(all="ignore"):
                read = source.read(tensor.name)
            expected = torch.from_numpy(expected).reshape(SHAPES[tensor.name]).to(torch.bfloat16)
            assert source.tensors[tensor.name].shape == SHAPES[tensor.name]
            assert same_bits(read, expected)


def test_header_with_every_kind_of_value(tmp_path):
    """Values before the tensors are skipped, and an alignment other than the default is applied."""
    pairs = [
        (f"add_{kind}", kind, 1) for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
    ]
    pairs += [("add_float32", "f", 0.5), ("add_float64", "d", 0.5), ("add_bool", "b", True), ("add_string", "s", "ß")]
    pairs += [("add_array", "words", ["a", "", "long " * 99]), ("add_array", "numbers", list(range(999)))]
    pairs += [("add_array", "flags", [True, False]), ("add_custom_alignment", 256)]
    stored = {name: random_blocks(Type.Q8_0, shape, 0) for name, shape in SHAPES.items()}
    path = write_gguf(tmp_path / "x.gguf", stored, Type.Q8_0, pairs)
    reference = gguf.GGUFReader(path)
    assert reference.alignment == 256
    with open_source(path) as source:
        for tensor in reference.tensors:
            expected = torch.from_numpy(dequantize(tensor.data, Type.Q8_0)).to(torch.bfloat16)
            assert same_bits(source.read(tensor.name), expected.reshape(SHAPES[tensor.name]))
            assert source.sample(tensor.name, 0, 64) == tensor.data.tobytes()[:64]


def test_metadata_for_comfyui_reaches_the_output(tmp_path):
    """Keys that describe the GGUF itself do not; flags are strings whose truth is that of the value."""
    config = json.dumps({"transformer": {"num_layers": 48}, "name": "ß"})
    pairs = [("add_string", "config", config), ("add_string", "modelspec.title", "x"), ("add_int32", "channels", 128)]
    pairs += [("add_bool", "is_512", True), ("add_bool", "is_1024", False), ("add_array", "words", ["a"])]
    pairs += [("add_string", "general.name", "x"), ("add_string", "tokenizer.ggml.model", "t5")]
    pairs += [
        ("add_string", "flux.extra", "x"),
        ("add_uint32", "split.count", 1),
        ("add_string", "_quantization_metadata", "{}"),
    ]
    pairs += [("add_array", "comfy.gguf.orig_shape.a.weight", [48, 256])]
    expected = {"config": config, "modelspec.title": "x", "channels": "128", "is_512": "true", "is_1024": ""}
    stored = {name: random_blocks(Type.Q8_0, shape, 0) for name, shape in SHAPES.items()}
    path = write_gguf(tmp_path / "x.gguf", stored, Type.Q8_0, pairs)
    with open_source(path) as source:
        assert source.metadata == expected
    out = tmp_path / "out.safetensors"
    quantize_file(path, out, Recipe(format="int8_tensorwise", convrot=False, rounding="nearest", preset="none"))
    with safe_open(out, "pt") as file:
        assert expected.items() <= file.metadata().items()


def test_metadata_is_bounded(tmp_path):
    pairs = [("add_string", f"config{number}", "x" * ((1 << 21) + 1)) for number in range(2)]
    pairs.append(("add_string", "tokenizer.huggingface.json", "x" * (1 << 25)))
    path = write_gguf(tmp_path / "x.gguf", {}, Type.F32, pairs)
    with pytest.raises(SourceError, match="the metadata exceeds 4,194,304 characters"):
        open_source(path)
    path = write_gguf(tmp_path / "x.gguf", {}, Type.F32, [("add_string", "config", "x" * ((1 << 26) + 1))])
    with pytest.raises(SourceError, match="a string of 67,108,865 bytes"):
        open_source(path)
