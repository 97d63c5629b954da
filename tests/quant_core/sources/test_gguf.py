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
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.sources import open_source
from learned_rounding.tests.gguf_files import save_gguf
from learned_rounding.tests.quant_core.sources.model_files import save_as_gguf

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


def is_dequantized(kind: Type) -> bool:
    """Whether gguf can dequantize it."""
    try:
        dequantize(numpy.zeros(gguf.quant_shape_to_byte_shape((1, 256), kind), numpy.uint8), kind)
    except NotImplementedError:
        return False
    return True


DEQUANTIZED = [kind for kind in QUANTIZED if is_dequantized(kind)]


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
    return left.dtype is right.dtype and left.shape == right.shape and torch.equal(*raw)


def test_plain_types(subtests, tmp_path):
    rng = numpy.random.default_rng(0)
    for kind in PLAIN:
        with subtests.test(kind.name):
            tensors = {
                name: rng.integers(0, 256, gguf.quant_shape_to_byte_shape(shape, kind), dtype=numpy.uint8)
                for name, shape in SHAPES.items()
            }
            path = write_gguf(tmp_path / "x.gguf", tensors, kind)
            reference = gguf.GGUFReader(path)
            with open_source(path) as source:
                assert source.layers == {}
                assert list(source.tensors) == [tensor.name for tensor in reference.tensors]
                for tensor in reference.tensors:
                    expected = torch.from_numpy(tensor.data.copy()).view(torch.uint8).flatten().view(PLAIN[kind])
                    assert same_bits(source.read(tensor.name), expected.view(SHAPES[tensor.name]))


def test_quantized_types(subtests, tmp_path):
    """Values are those of ``gguf.dequantize``, rounded to bfloat16."""
    for kind in DEQUANTIZED:
        with subtests.test(kind.name):
            tensors = {name: random_blocks(kind, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
            path = write_gguf(tmp_path / "x.gguf", tensors, kind)
            with open_source(path) as source, numpy.errstate(all="ignore"):  # random scales of infinity and NaN
                assert source.layers == {kind.name: len(SHAPES)}
                for tensor in gguf.GGUFReader(path).tensors:
                    expected = torch.from_numpy(dequantize(tensor.data, kind)).reshape(SHAPES[tensor.name])
                    assert source.tensors[tensor.name].shape == SHAPES[tensor.name]
                    assert same_bits(source.read(tensor.name), expected.to(torch.bfloat16))


def test_types_that_gguf_cannot_dequantize_are_refused(subtests, tmp_path):
    for kind in [kind for kind in QUANTIZED if kind not in DEQUANTIZED]:
        with subtests.test(kind.name):
            tensors = {"a.weight": random_blocks(kind, SHAPES["a.weight"], 0)}
            path = write_gguf(tmp_path / "x.gguf", tensors, kind)
            refused = pytest.raises(SourceError, match=f"cannot dequantize {kind.name} of tensor")
            with open_source(path) as source, refused:
                source.read("a.weight")


def test_a_quantized_model_is_decoded(subtests, model, tmp_path):
    for code, error in [("Q8_0", 0.008), ("Q5_1", 0.05), ("Q4_0", 0.12)]:
        with subtests.test(code=code, error=error):
            tensors = {name: tensor.float() for name, tensor in model().items()}
            with open_source(save_as_gguf(tensors, tmp_path / "model.gguf", code)) as opened:
                coded = [name for name, info in opened.tensors.items() if info.dtype == torch.bfloat16]
                assert len(coded) == opened.layers[code] > 0
                for name in coded:
                    assert torch.dist(opened.read(name).float(), tensors[name]) < error * tensors[name].norm()


def test_a_quantized_model_is_quantized_again(model, tmp_path, capsys, sentences):
    path = save_as_gguf(model(), tmp_path / "model.gguf", "Q4_0")
    command = ["quantize", "-i", str(path), "-o", str(tmp_path / "out.safetensors"), "--int8", "--simple", "--general"]
    assert main(command) == 0
    sentences(capsys.readouterr().out.splitlines()[0])
    assert verify_file(tmp_path / "out.safetensors").layers > 0
    assert main(command) == 0
    sentences(capsys.readouterr().out)


def test_a_tensor_has_the_shape_that_the_header_gives(tmp_path):
    kernel = torch.randn(32, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    pair = ("add_array", "comfy.gguf.orig_shape.conv.weight", list(kernel.shape))
    path = save_as_gguf({"conv.weight": kernel.reshape(32, 36)}, tmp_path / "unet.gguf", pairs=[pair])
    with open_source(path) as opened:
        assert torch.equal(opened.read("conv.weight"), kernel)


DAMAGED = {
    "magic": b"GGUF",
    "zeros": b"GGUF" + bytes(20),
    "huge header": b"GGUF\x03\0\0\0" + b"\xff" * 64,
}


def test_a_damaged_file_is_refused(subtests, tmp_path, sentences):
    for kind, content in DAMAGED.items():
        with subtests.test(kind):
            (tmp_path / "bad.gguf").write_bytes(content)
            with sentences.raises(SourceError):
                open_source(tmp_path / "bad.gguf")


def test_a_truncated_file_is_refused(subtests, model, tmp_path, sentences):
    path = save_as_gguf(model(), tmp_path / "model.gguf", "Q8_0")
    whole = path.read_bytes()
    for end in range(0, len(whole) - 64, len(whole) // 16):
        with subtests.test(end=end):
            path.write_bytes(whole[:end])
            with sentences.raises(SourceError):
                open_source(path)


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


CONFIG = json.dumps({"transformer": {"num_layers": 48}, "name": "ß"})
FOR_COMFYUI = {"config": CONFIG, "modelspec.title": "x", "channels": "128", "is_512": "true", "is_1024": ""}


@pytest.fixture
def with_metadata(tmp_path):
    """A file with keys for ComfyUI and keys that describe the GGUF itself."""
    pairs = [
        ("add_string", "config", CONFIG),
        ("add_string", "modelspec.title", "x"),
        ("add_int32", "channels", 128),
        ("add_bool", "is_512", True),
        ("add_bool", "is_1024", False),
        ("add_array", "words", ["a"]),
        ("add_string", "general.name", "x"),
        ("add_string", "tokenizer.ggml.model", "t5"),
        ("add_string", "flux.extra", "x"),
        ("add_uint32", "split.count", 1),
        ("add_string", "_quantization_metadata", "{}"),
        ("add_array", "comfy.gguf.orig_shape.a.weight", [48, 256]),
    ]
    stored = {name: random_blocks(Type.Q8_0, shape, 0) for name, shape in SHAPES.items()}
    return write_gguf(tmp_path / "x.gguf", stored, Type.Q8_0, pairs)


def test_metadata_is_that_for_comfyui(with_metadata):
    """Keys that describe the GGUF itself are left out; flags are strings whose truth is that of the value."""
    with open_source(with_metadata) as source:
        assert source.metadata == FOR_COMFYUI


def test_metadata_for_comfyui_reaches_the_output(with_metadata, tmp_path):
    out = tmp_path / "out.safetensors"
    quantize_file(with_metadata, out, Recipe(format="int8_tensorwise", rounding="nearest", preset="none"))
    with safe_open(out, "pt") as file:
        assert FOR_COMFYUI.items() <= file.metadata().items()


def test_metadata_is_bounded(subtests, tmp_path):
    for count, characters in [(2, (1 << 21) + 1), (1, (1 << 22) + 1)]:
        with subtests.test(count=count, characters=characters):
            pairs = [("add_string", f"config{number}", "x" * characters) for number in range(count)]
            with pytest.raises(SourceError, match="the metadata exceeds 4,194,304 characters"):
                open_source(write_gguf(tmp_path / "x.gguf", {}, Type.F32, pairs))


def test_values_that_are_no_metadata_are_not_counted(tmp_path):
    pairs = [("add_string", "tokenizer.huggingface.json", "x" * ((1 << 22) + 1))]
    stored = {"a.weight": random_blocks(Type.Q8_0, SHAPES["a.weight"], 0)}
    with open_source(write_gguf(tmp_path / "x.gguf", stored, Type.Q8_0, pairs)) as source:
        assert source.metadata == {}


def test_strings_are_bounded(tmp_path):
    pairs = [("add_string", "config", "x" * ((1 << 26) + 1))]
    with pytest.raises(SourceError, match="a string of 67,108,865 bytes"):
        open_source(write_gguf(tmp_path / "x.gguf", {}, Type.F32, pairs))
