"""Shards, folders, pickles and GGUF are quantized to the same output as one safetensors file."""

import json
import os
import sys
from collections import OrderedDict

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli import commands as cli
from learned_rounding.quant_core.errors import MissingPackageError, OutputError, SourceError
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.run.quantize import output_name
from learned_rounding.quant_core.sources import SafetensorsFile, open_source
from learned_rounding.quant_core.sources.dtypes import DTYPE_NAMES
from learned_rounding.tests.gguf_files import save_gguf

RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(model, tmp_path):
    """A folder of two shards and their index."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    tensors = model()
    halves = [dict(list(tensors.items())[half::2]) for half in range(2)]
    places = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(half, folder / file, {"format": "pt"})
        places |= dict.fromkeys(half, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


def same(path, model_file, tmp_path) -> bool:
    quantize_file(model_file(), tmp_path / "one.safetensors", RECIPE)
    quantize_file(path, tmp_path / "other.safetensors", RECIPE)
    one, other = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "other.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("given", ["folder", "index"])
def test_shards(sharded, model_file, tmp_path, given):
    path = sharded if given == "folder" else sharded / INDEX
    assert same(path, model_file, tmp_path)
    again = quantize_file(path, tmp_path / "other.safetensors", RECIPE)
    assert again.already_done
    assert (
        output_name(path, RECIPE.format.label).name
        == f"{'transformer' if given == 'folder' else 'model'}_int8.safetensors"
    )


def test_a_shard_is_no_output(sharded, sentences):
    with sentences.raises(OutputError):
        quantize_file(sharded, sharded / "model-00001-of-00002.safetensors", RECIPE, overwrite=True)


def test_a_folder_of_one_file(model_file, tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    os.link(model_file(), folder / "diffusion.safetensors")
    (folder / "._diffusion.safetensors").write_bytes(bytes((0, 5, 22, 7)))  # of macOS
    assert same(folder, model_file, tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": 3}], ids=["plain", "in a training's file"]
)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_pickles_of_weights(model, model_file, tmp_path, suffix, wrap, new):
    torch.save(wrap(model()), tmp_path / f"model{suffix}", _use_new_zipfile_serialization=new)
    assert same(tmp_path / f"model{suffix}", model_file, tmp_path)


UNTYPED = (
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
)  # no dtypes of torch 1.5


def views() -> dict[str, torch.Tensor]:
    """Return tensors of every dtype, and views of one storage."""
    base = torch.arange(96.0).view(8, 12)
    made = {
        "whole": base,
        "turned": base.t(),
        "columns": base[:, 2:5],
        "rows": base[3:5],
        "every other": base[::2, ::3],
        "none": base[:0],
    }
    made |= {
        "one": torch.tensor(7),
        "parameter": torch.nn.Parameter(base[1]),
        "conv": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    }
    return made | {str(dtype): torch.ones(6, dtype=dtype) for dtype in DTYPE_NAMES}


@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}],
    ids=["zip", "before 1.6", "protocol 4"],
)
def test_pickles_hold_what_torch_reads_from_them(tmp_path, options):
    path = tmp_path / "model.pt"
    old = not options.get("_use_new_zipfile_serialization", True)
    kept = {name: tensor for name, tensor in views().items() if not (old and tensor.dtype in UNTYPED)}
    torch.save(OrderedDict(kept) | {"epoch": 3, "names": ["a"], "when": {1: (2.5, None)}}, path, **options)
    with open_source(path) as opened:
        assert opened.tensors.keys() == kept.keys()
        for name, tensor in torch.load(path, weights_only=False).items():
            if isinstance(tensor, torch.Tensor):
                read = opened.read(name)
                assert read.dtype == tensor.dtype and read.shape == tensor.shape and read.is_contiguous()
                raw = tensor.detach().contiguous().flatten().view(torch.uint8)
                assert torch.equal(read.flatten().view(torch.uint8), raw)
                assert (
                    opened.sample(name, len(raw) // 3, len(raw) // 2)
                    == raw[len(raw) // 3 :][: len(raw) // 2].numpy().tobytes()
                )


class Evil:
    def __reduce__(self):
        return os.mkdir, ("was-here",)


def test_a_pickle_is_never_run(tmp_path, monkeypatch, sentences):
    monkeypatch.chdir(tmp_path)
    for new in (True, False):
        torch.save({"a": Evil()}, tmp_path / "evil.pt", _use_new_zipfile_serialization=new)
        with sentences.raises(SourceError):
            open_source(tmp_path / "evil.pt")
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x02 no pickle", b"nothing at all"])
def test_a_damaged_pickle(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(SourceError):
        open_source(tmp_path / "bad.pt")


def test_a_pickle_without_weights(tmp_path, sentences):
    torch.save([1, 2], tmp_path / "list.pt")
    with sentences.raises(SourceError):
        open_source(tmp_path / "list.pt")


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "gone.safetensors"}}',
        '{"weight_map": {"nobody": "model-00001-of-00002.safetensors"}}',
        '{"weight_map": {"nobody": "model-00001-of-00002.safetensors", "step": "model-00002-of-00002.safetensors"}}',
    ],
)
def test_an_index_that_is_wrong(sharded, index, sentences):
    (sharded / INDEX).write_text(index)
    with sentences.raises(SourceError):
        open_source(sharded)


def test_folders_that_hold_no_one_model(tmp_path, model, sentences):
    with sentences.raises(SourceError):
        open_source(tmp_path)
    for name in ("a", "b"):
        save_file(model(), tmp_path / f"{name}.safetensors")
    with sentences.raises(SourceError):
        open_source(tmp_path)
    pipeline = tmp_path / "pipeline"
    (pipeline / "transformer").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    save_file(model(), pipeline / "transformer" / "x.safetensors")
    with sentences.raises(SourceError):
        open_source(pipeline)


def test_a_file_is_a_file(model_file):
    with open_source(model_file()) as opened:
        assert isinstance(opened, SafetensorsFile)


def gguf_file(path, tensors, code="F32", shapes=None):
    """A GGUF with the matrices coded as ``code`` where whole blocks fit, the rest as float32."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[code]
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        kind = kind if tensor.ndim == 2 and tensor.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    save_gguf(writer)
    return path


@pytest.mark.parametrize("code, dtype", [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_an_unquantized_gguf_is_its_model(model, tmp_path, code, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in model().items()}
    with open_source(gguf_file(tmp_path / "model.gguf", tensors, code)) as opened:
        assert opened.layers == {} and list(opened.tensors) == list(tensors)
        for name, tensor in tensors.items():
            assert opened.tensors[name].shape == tuple(tensor.shape)
            assert torch.equal(opened.read(name).float(), tensor.float())


@pytest.mark.parametrize("code, error", [("Q8_0", 0.008), ("Q5_1", 0.05), ("Q4_0", 0.12)])
def test_a_quantized_gguf_is_decoded(model, tmp_path, code, error, capsys, sentences):
    tensors = {name: tensor.float() for name, tensor in model().items()}
    path = gguf_file(tmp_path / "model.gguf", tensors, code)
    with open_source(path) as opened:
        assert opened.layers[code] > 0
        coded = [name for name, info in opened.tensors.items() if info.dtype == torch.bfloat16]
        assert len(coded) == opened.layers[code]
        for name in coded:
            assert torch.dist(opened.read(name).float(), tensors[name]) < error * tensors[name].norm()
    out = tmp_path / "out.safetensors"
    assert cli.main(["quantize", "-i", str(path), "-o", str(out), "--int8", "--simple", "--general"]) == 0
    sentences(capsys.readouterr().out.splitlines()[0])
    assert verify_file(out).layers > 0
    assert cli.main(["quantize", "-i", str(path), "-o", str(out), "--int8", "--simple", "--general"]) == 0
    sentences(capsys.readouterr().out)


def test_a_gguf_gives_a_tensor_the_shape_it_had(tmp_path):
    kernel = torch.randn(32, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    path = gguf_file(
        tmp_path / "unet.gguf", {"conv.weight": kernel.flatten().reshape(32, 36)}, shapes={"conv.weight": kernel.shape}
    )
    with open_source(path) as opened:
        assert torch.equal(opened.read("conv.weight"), kernel)


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF" + bytes(20), b"nothing at all", b"GGUF\x03\0\0\0" + b"\xff" * 64],
    ids=["empty", "magic", "zeros", "text", "huge header"],
)
def test_a_damaged_gguf(tmp_path, content, sentences):
    (tmp_path / "bad.gguf").write_bytes(content)
    with sentences.raises(SourceError):
        open_source(tmp_path / "bad.gguf")


def test_a_truncated_gguf(model, tmp_path, sentences):
    path = gguf_file(tmp_path / "model.gguf", model(), "Q8_0")
    whole = path.read_bytes()
    for end in range(0, len(whole) - 64, len(whole) // 16):
        path.write_bytes(whole[:end])
        with sentences.raises(SourceError):
            open_source(path)


def test_gguf_needs_its_package(model, tmp_path, monkeypatch, sentences):
    path = gguf_file(tmp_path / "model.gguf", model())
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "learned_rounding.quant_core.sources.gguf", raising=False)
    with sentences.raises(MissingPackageError):
        open_source(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf", INDEX.removeprefix("model")])
def test_a_pipe_is_no_model(tmp_path, suffix, sentences):
    """Opening a pipe without a writer would block."""
    os.mkfifo(tmp_path / f"model{suffix}")
    with sentences.raises(SourceError):
        open_source(tmp_path / f"model{suffix}")


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"], ids=["long", "null"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf", INDEX.removeprefix("model")])
def test_names_that_no_disk_takes(tmp_path, name, suffix, sentences):
    with sentences.raises(SourceError):
        open_source(tmp_path / f"{name}{suffix}")
