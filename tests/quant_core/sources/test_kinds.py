"""What a file is, by its first bytes: other kinds than models, and failed downloads, are named."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

import learned_rounding
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import SafetensorsFile, kinds, open_source, opening
from learned_rounding.quant_core.sources.kinds import (
    GGUF,
    HEAD,
    LEGACY_PICKLE,
    SAFETENSORS,
    ZIP,
    find_kind,
    read_head,
)
from learned_rounding.tests.quant_core.sources.model_files import SAVE

ROOT = Path(learned_rounding.__file__).parent


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


def test_other_kinds_are_named(subtests, tmp_path, sentences):
    path = tmp_path / "model.safetensors"
    for kind, (content, words) in KINDS.items():
        with subtests.test(kind):
            path.write_bytes(content)
            with sentences.raises(SourceError) as caught:
                open_source(path)
            assert str(path) in str(caught.value)
            assert words in str(caught.value)
            assert "\n" not in str(caught.value)


def test_other_kinds_are_named_under_other_suffixes(subtests, tmp_path):
    for suffix in [".pt", ".gguf"]:
        with subtests.test(suffix=suffix):
            path = tmp_path / f"model{suffix}"
            for kind, (content, words) in KINDS.items():
                with subtests.test(kind):
                    path.write_bytes(content)
                    with pytest.raises(SourceError) as caught:
                        open_source(path)
                    assert words in str(caught.value)


@pytest.mark.parametrize("command", ["quantize --int8 -i", "plan --int8 -i", "inspect", "verify", "migrate -i"])
def test_commands_name_other_kinds_in_one_line(subtests, tmp_path, capsys, command):
    path = tmp_path / "model.safetensors"
    for kind in ("empty", "web page", "error in JSON", "zip", "anything else"):
        with subtests.test(kind):
            path.write_bytes(KINDS[kind][0])
            assert main([*command.split(), str(path)]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"lrq: {path}")
            assert os.listdir(tmp_path) == [path.name]


def test_commands_for_safetensors_name_the_kind(subtests, tmp_path, capsys, sentences):
    for command in ["inspect", "verify", "migrate -i"]:
        for format in ["pickle", "GGUF"]:
            with subtests.test(command=command, format=format):
                SAVE[format]({"a.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
                assert main([*command.split(), str(tmp_path / "model.safetensors")]) == 1
                sentences(capsys.readouterr().err)


def test_kinds_of_models(subtests, tmp_path):
    for format, kind in [
        ("safetensors", SAFETENSORS),
        ("pickle", ZIP),
        ("legacy pickle", LEGACY_PICKLE),
        ("GGUF", GGUF),
    ]:
        with subtests.test(format=format, kind=kind):
            SAVE[format]({"a.weight": torch.zeros(4, 4)}, tmp_path / "model")
            assert find_kind(read_head(tmp_path / "model")) is kind


def test_length_of_a_header_that_looks_like_magic_bytes(subtests, tmp_path):
    for length in [0x7B, 0x0780, 0x120708, 0x88B1F, 0x5A425A, 0x0280]:
        with subtests.test(length=length):
            header = (
                json.dumps({"a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
            )
            path = tmp_path / "model.safetensors"
            path.write_bytes(struct.pack("<Q", length) + header[:length] + bytes(8))
            assert find_kind(read_head(path)) is SAFETENSORS
            with SafetensorsFile(path) as direct, open_source(path) as source:
                assert source.tensors == direct.tensors


def test_the_head_of_a_file_is_bounded(tmp_path):
    (tmp_path / "model").write_bytes(bytes(HEAD * 2))
    assert read_head(tmp_path / "model") == bytes(HEAD)


def test_text_in_a_message_is_bounded(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"word " * 10_000)
    with pytest.raises(SourceError) as caught:
        open_source(path)
    assert len(str(caught.value)) < len(str(path)) + 150


# Suffixes of the files of each kind that is read.
PICKLES = ("ckpt", "pt", "pth", "bin")
SUFFIXES = {SAFETENSORS: ("safetensors",), GGUF: ("gguf",), ZIP: PICKLES, LEGACY_PICKLE: PICKLES}
LISTS = (
    "nodes/host/folders.py",
    "nodes/load.py",
    "quant_core/cli/help/quantize.txt",
    "quant_core/cli/help/plan.txt",
    "docs/sources.md",
    "web/docs/LearnedRoundingLoadModel.md",
    *(f"web/docs/LearnedRoundingLoadModel/{language}.md" for language in ("en", "ja", "zh")),
)


def test_every_kind_that_is_read_has_a_reader_and_a_suffix():
    readable = {kind for kind in kinds._KINDS if kind is SAFETENSORS or kind.advice == kinds._CONVERTIBLE}
    assert opening._READERS.keys() == readable
    assert SUFFIXES.keys() == readable


def test_every_suffix_is_in_the_list_of_comfyuis_folders_and_in_the_texts(subtests):
    for name in LISTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        with subtests.test(name):
            words = set(re.findall(r"\w+", text))
            assert [suffix for suffixes in SUFFIXES.values() for suffix in suffixes if suffix not in words] == []
