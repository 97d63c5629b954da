"""Files are read by their content; other kinds, and failed downloads, are named."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import tarfile
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import SafetensorsFile, open_source
from learned_rounding.quant_core.sources.dtypes import DTYPE_NAMES
from learned_rounding.quant_core.sources.kinds import HEAD, SAFETENSORS, find_kind
from learned_rounding.tests.quant_core.sources.test_opening import gguf_file

RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")
SUFFIXES = [".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".GGUF", ""]


def save_safetensors(tensors, path):
    save_file(tensors, path)


def save_zip(tensors, path):
    torch.save(tensors, path)


def save_legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("save", [save_safetensors, save_zip, save_legacy, lambda t, path: gguf_file(path, t, "BF16")])
def test_suffix_does_not_matter(model, tmp_path, save, suffix):
    path = tmp_path / f"model{suffix}"
    tensors = {name: tensor for name, tensor in model().items() if tensor.dtype is torch.bfloat16 and tensor.ndim == 2}
    save(tensors, path)
    with open_source(path) as source:
        assert all(torch.equal(source.read(name).to(tensor.dtype), tensor) for name, tensor in tensors.items())
    quantize_file(path, tmp_path / "out.safetensors", RECIPE)
    original = tmp_path / "original"
    save_file(tensors, original)
    quantize_file(original, tmp_path / "expected.safetensors", RECIPE)
    made, expected = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "expected.safetensors")
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


def zip_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO(content))
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    numpy.savez(buffer, weight=numpy.zeros((4, 4)))
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.zeros((4, 4)))
    return buffer.getvalue()


def truncated_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a.weight": torch.zeros(64, 64)}, buffer)
    return buffer.getvalue()[:-200]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 23802932552\n"
PAGE = b"\n<!DOCTYPE html>\n<html lang='en'><head><title>Sign in</title></head><body></body></html>"
# content → words that the sentence contains
KINDS = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(5000), "not finished"),
    "pointer": (POINTER, "Git LFS pointer"),
    "web page": (PAGE, "a web page"),
    "web page, upper case": (b"\xef\xbb\xbf<HTML><BODY>404</BODY></HTML>", "a web page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    "text": (b"Access to model x/y is restricted. You must be authenticated.", "'Access to model x/y is restricted."),
    "text of one line": ("Entrée introuvable\r\n".encode(), "'Entrée introuvable'"),
    "error in JSON": (b'{"error":"Repository not found"}', "without a weight_map"),
    "configuration of diffusers": (
        json.dumps({"_class_name": "FluxTransformer2DModel"}).encode(),
        "without a weight_map",
    ),
    "list in JSON": (b"[1, 2]", "without a weight_map"),
    "damaged JSON": (b'{"weight_map": {"a": ', "not valid JSON"),
    "zip": (zip_of(**{"model.safetensors": b"x" * 99}), "a zip archive"),
    "empty zip": (zip_of(), "an empty zip archive"),
    "TorchScript": (
        zip_of(**{"net/data.pkl": b".", "net/constants.pkl": b".", "net/code/net.py": b""}),
        "a TorchScript program",
    ),
    "NumPy arrays": (arrays(), "a NumPy archive"),
    "truncated checkpoint": (truncated_checkpoint(), "at the end of the file, is missing"),
    "NumPy array": (array(), "a NumPy array"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(99), "a 7z archive"),
    "RAR": (b"Rar!\x1a\x07\x01\x00" + bytes(99), "a RAR archive"),
    "gzip": (gzip.compress(b"x" * 999), "a gzip archive"),
    "xz": (lzma.compress(b"x" * 999), "an xz archive"),
    "bzip2": (bz2.compress(b"x" * 999), "a bzip2 archive"),
    "Zstandard": (b"\x28\xb5\x2f\xfd\x24\x00" + bytes(99), "a Zstandard archive"),
    "tar": (tar_of(b""), "a tar archive"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\x81\x01\x0a", "an ONNX model"),
    "TensorRT": (b"ftrt\x00\x00\x00\x00\x01" + bytes(99), "a TensorRT engine"),
    "TensorFlow Lite": (b"\x1c\x00\x00\x00TFL3" + bytes(99), "a TensorFlow Lite model"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "GGML": (b"tjgg\x01\x00\x00\x00" + bytes(99), "a GGML file"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(99), "an image"),
    "anything else": (bytes(range(1, 255)) * 4, "another kind of file"),
    "GGUF of version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "a GGUF file of version 1"),
    "GGUF in big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "GGUF of a type of tomorrow": (
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<IQIQ", 1, 32, 99, 0) + bytes(64),
        "GGML type 99",
    ),
}
COMMANDS = ["quantize --int8 -i", "plan --int8 -i", "inspect", "verify", "migrate -i"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_named(tmp_path, capsys, sentences, kind, suffix):
    content, words = KINDS[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_source(path)
    if suffix == ".safetensors":
        sentences(caught.value)
    assert str(path) in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)
    for command in COMMANDS:
        assert main([*command.split(), str(path)]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"lrq: {path}")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("command", ["inspect", "verify", "migrate -i"])
@pytest.mark.parametrize("save", [save_zip, save_legacy, lambda t, path: gguf_file(path, t)])
def test_commands_for_safetensors_name_the_kind(model, tmp_path, capsys, save, command):
    save(model(), tmp_path / "model.safetensors")
    assert main([*command.split(), str(tmp_path / "model.safetensors")]) == 1
    kind = "a GGUF file" if save not in (save_zip, save_legacy) else "a pickled PyTorch checkpoint"
    error = f"lrq: {tmp_path}/model.safetensors is {kind}; quantize and plan read it, and other commands need a safetensors file.\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    "length", [0x7B, 0x0780, 0x120708, 0x88B1F, 0x5A425A, 0x0280], ids=["{", "80 07", "ONNX", "gzip", "BZ", "80 02"]
)
def test_length_of_a_header_that_looks_like_magic_bytes(tmp_path, length):
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header[:length] + bytes(8))
    with SafetensorsFile(path) as direct, open_source(path) as source:
        assert source.tensors == direct.tensors and find_kind(path.read_bytes()[:HEAD]) is SAFETENSORS


def test_text_in_a_message_is_bounded(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"word " * 10_000)
    with pytest.raises(SourceError) as caught:
        open_source(path)
    assert len(str(caught.value)) < len(str(path)) + 150


DTYPES = ["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_that_comfyui_does_not_load_are_refused_by_name(tmp_path, raw_file, capsys, sentences, dtype):
    entry = {"dtype": dtype, "shape": [32, 32], "data_offsets": [0, 512]}
    path = raw_file({"blocks.0.a.weight": entry}, bytes(512))
    with sentences.raises(SourceError) as caught:
        open_source(path)
    assert caught.value.tensor == "blocks.0.a.weight" and f"dtype {dtype}," in str(caught.value)
    for command in COMMANDS:
        assert main([*command.split(), str(path)]) == 1
        assert capsys.readouterr().err == f"lrq: {caught.value}\n"


def test_unquantized_tensors_of_every_dtype_are_copied_byte_for_byte(tmp_path, model):
    generator = torch.Generator().manual_seed(0)
    others = {
        f"table.{name}": torch.randint(
            0, 2 if dtype is torch.bool else 256, (3, 8, dtype.itemsize), dtype=torch.uint8, generator=generator
        )
        .view(dtype)
        .squeeze(-1)
        for dtype, name in DTYPE_NAMES.items()
    }
    save_file(model() | others, tmp_path / "model.safetensors")
    quantize_file(tmp_path / "model.safetensors", tmp_path / "out.safetensors", RECIPE)
    made = load_file(tmp_path / "out.safetensors")
    for name, tensor in others.items():
        assert made[name].dtype is tensor.dtype
        assert torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8))
