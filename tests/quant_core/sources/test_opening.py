"""A model is opened by the content of its files: as one file, a folder, an index, in any format."""

import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.errors import MissingPackageError, SourceError
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource, open_safetensors, open_source
from learned_rounding.quant_core.sources.opening import convert_names, model_paths
from learned_rounding.tests.quant_core.sources.model_files import SAVE, save_as_gguf

RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")


@pytest.fixture
def matrices(model):
    return {name: tensor for name, tensor in model().items() if tensor.dtype is torch.bfloat16 and tensor.ndim == 2}


# Files of any suffix


def test_the_suffix_does_not_matter(subtests, matrices, tmp_path):
    for format in SAVE:
        for suffix in (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".GGUF", ""):
            with subtests.test(suffix, format=format):
                path = tmp_path / f"model{suffix}"
                SAVE[format](matrices, path)
                with open_source(path) as source:
                    for name, tensor in matrices.items():
                        assert torch.equal(source.read(name).to(tensor.dtype), tensor)


@pytest.mark.parametrize("format", SAVE)
def test_every_format_is_quantized_to_the_same_output(matrices, tmp_path, format):
    for name, save in (("model", SAVE[format]), ("expected", save_file)):
        save(matrices, tmp_path / name)
        quantize_file(tmp_path / name, tmp_path / f"{name}.safetensors", RECIPE)
    made, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("model", "expected"))
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)


def test_a_safetensors_file_is_opened_as_it_is(model_file):
    with open_source(model_file()) as opened:
        assert isinstance(opened, SafetensorsFile)


def test_other_formats_are_no_safetensors(subtests, matrices, tmp_path):
    for format in SAVE.keys() - {"safetensors"}:
        with subtests.test(format=format):
            SAVE[format](matrices, tmp_path / "model.safetensors")
            with pytest.raises(SourceError, match="quantize and plan read it"):
                open_safetensors(tmp_path / "model.safetensors")


def test_gguf_needs_its_package(matrices, tmp_path, monkeypatch, sentences):
    path = save_as_gguf(matrices, tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "learned_rounding.quant_core.sources.gguf", raising=False)
    with sentences.raises(MissingPackageError):
        open_source(path)


SUFFIXES = [".safetensors", ".pt", ".gguf", ".safetensors.index.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name")
def test_a_pipe_is_no_model(subtests, tmp_path, sentences):
    """Opening a pipe without a writer would block."""
    for suffix in SUFFIXES:
        with subtests.test(suffix):
            os.mkfifo(tmp_path / f"model{suffix}")
            with sentences.raises(SourceError):
                open_source(tmp_path / f"model{suffix}")


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"], ids=["long", "null"])
def test_names_that_no_disk_takes(subtests, tmp_path, name, sentences):
    for suffix in SUFFIXES:
        with subtests.test(suffix), sentences.raises(SourceError):
            open_source(tmp_path / f"{name}{suffix}")


# Folders


def test_a_folder_of_one_file_is_that_file(model_file, tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    os.link(model_file(), folder / "diffusion.safetensors")
    with open_source(folder) as source:
        assert source.path == folder / "diffusion.safetensors"


def test_files_that_macos_puts_beside_others_are_ignored(model_file, tmp_path):
    model_file()
    (tmp_path / "._model.safetensors").write_bytes(bytes((0, 5, 22, 7)))
    with open_source(tmp_path) as source:
        assert source.path == tmp_path / "model.safetensors"


def test_an_empty_folder_is_refused(tmp_path, sentences):
    with sentences.raises(SourceError):
        open_source(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_folder_of_several_models_is_refused(matrices, tmp_path, sentences, suffix):
    for name in ("a", "b"):
        (save_file if suffix == ".safetensors" else torch.save)(matrices, tmp_path / f"{name}{suffix}")
    with sentences.raises(SourceError):
        open_source(tmp_path)


@pytest.mark.parametrize("part, file", [("transformer", "x.safetensors"), ("unet", "diffusion_pytorch_model.bin")])
def test_a_pipeline_of_diffusers_is_refused_with_its_models(tmp_path, sentences, part, file):
    (tmp_path / part).mkdir(parents=True)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / part / file).write_bytes(b"any")
    with sentences.raises(SourceError):
        open_source(tmp_path)


def test_a_folder_prefers_safetensors(matrices, tmp_path):
    save_file(matrices, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with open_source(tmp_path) as source:
        assert source.tensors.keys() == matrices.keys()


@pytest.mark.parametrize("name", ["model.sft", "pytorch_model.bin", "model.gguf"])
def test_a_folder_without_safetensors_has_a_model_of_another_format(matrices, tmp_path, name):
    SAVE["GGUF" if name.endswith("gguf") else "pickle"](matrices, tmp_path / name)
    with open_source(tmp_path) as source:
        assert source.tensors.keys() == matrices.keys()


# Names


def test_names_without_a_conversion_leave_the_source_itself():
    source = TensorSource({"blocks.0.weight": torch.zeros(4, 4)})
    assert convert_names(source) is source


def test_names_of_wrappers_are_converted(tmp_path, matrices):
    save_file({f"_orig_mod.{name}": tensor for name, tensor in matrices.items()}, tmp_path / "model.safetensors")
    with open_source(tmp_path / "model.safetensors") as source:
        assert source.tensors.keys() == matrices.keys()


def test_a_file_whose_names_are_refused_is_closed(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(1), "_orig_mod.a": torch.zeros(1)}, tmp_path / "model.safetensors")
    closed = []
    close = SafetensorsFile.close
    monkeypatch.setattr(SafetensorsFile, "close", lambda self: closed.append(self.name) or close(self))
    with pytest.raises(SourceError):
        open_source(tmp_path / "model.safetensors")
    assert closed == ["model.safetensors"]


def test_files_of_a_single_file_are_that_file(tmp_path):
    """It need not exist."""
    assert model_paths(tmp_path / "model.safetensors") == (tmp_path / "model.safetensors",)
