"""One file of a model in several files is opened as the whole model, or refused with the names of the missing files."""

import json
import os
import shutil

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.errors import OutputError, SourceError
from learned_rounding.quant_core.output import inspect_file, verify_file
from learned_rounding.quant_core.run.quantize import output_name
from learned_rounding.quant_core.sources import model_paths, open_safetensors, open_source
from learned_rounding.quant_core.sources.shards import find_parts, model_stem
from learned_rounding.tests.gguf_files import save_gguf

RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")
COUNT = 3


def write_gguf(tensors, path, number=None, pairs=(), count=COUNT):
    """A part of a split GGUF; of the first one also ``pairs``."""
    writer = gguf.GGUFWriter(path, "flux")
    if number is not None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", 99)
    for write, *arguments in pairs:
        getattr(writer, write)(*arguments)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().numpy(), raw_dtype=Type.F32)
    save_gguf(writer)


SAVE = {
    "m-{:05}-of-{:05}.safetensors": lambda tensors, path, number: save_file(tensors, path),
    "m.fp16-{:05}-of-{:05}.safetensors": lambda tensors, path, number: save_file(tensors, path),
    "m-{:05}-of-{:05}.fp16.safetensors": lambda tensors, path, number: save_file(tensors, path),
    "m_{}_of_{}.sft": lambda tensors, path, number: save_file(tensors, path),
    "pytorch_model-{:05}-of-{:05}.bin": lambda tensors, path, number: torch.save(tensors, path),
    "m-Q8_0-{:05}-of-{:05}.gguf": write_gguf,
}


def write_parts(folder, tensors, pattern, first=1):
    """Write the tensors in COUNT parts; return their paths."""
    paths = [folder / pattern.format(number + first, COUNT) for number in range(COUNT)]
    for number, path in enumerate(paths):
        SAVE[pattern](dict(list(tensors.items())[number::COUNT]), path, number)
    return paths


def write_index(folder, paths, name="m.safetensors.index.json"):
    weight_map = {}
    for path in paths:
        with open_source_alone(path) as source:
            weight_map |= dict.fromkeys(source.tensors, path.name)
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / name


def open_source_alone(path):
    """Open a part under a name that does not show that it is one."""
    alone = path.parent / "alone"
    alone.mkdir(exist_ok=True)
    shutil.copy(path, alone / "whole")
    return open_source(alone / "whole")


def matrices(model):
    return {name: tensor.float() for name, tensor in model().items() if tensor.is_floating_point()}


@pytest.fixture
def check_whole(model, tmp_path):
    """check_whole(path): it is quantized to the same tensors as the whole model."""
    save_file(matrices(model), tmp_path / "whole.safetensors")
    quantize_file(tmp_path / "whole.safetensors", tmp_path / "expected.safetensors", RECIPE)
    expected = load_file(tmp_path / "expected.safetensors")

    def check(path) -> None:
        out = tmp_path / "out.safetensors"
        quantize_file(path, out, RECIPE)
        made = load_file(out)
        assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
        assert quantize_file(path, out, RECIPE).already_done
        out.unlink()

    return check


@pytest.mark.parametrize("pattern", SAVE)
def test_every_part_stands_for_the_model(model, tmp_path, check_whole, pattern):
    folder = tmp_path / "model"
    folder.mkdir()
    paths = write_parts(folder, matrices(model), pattern)
    for path in (*paths, folder):
        check_whole(path)
    for path in paths:
        with open_source(path) as source:
            assert source.paths == tuple(paths) == model_paths(path)
            assert source.size > 0 and source.name == path.name


@pytest.mark.parametrize("pattern", ["m-{:05}-of-{:05}.safetensors", "pytorch_model-{:05}-of-{:05}.bin"])
@pytest.mark.parametrize(
    "index", ["m.safetensors.index.json", "pytorch_model.bin.index.json", "m.safetensors.index.fp16.json"]
)
def test_every_part_with_an_index_stands_for_the_model(model, tmp_path, check_whole, pattern, index):
    folder = tmp_path / "model"
    folder.mkdir()
    paths = write_parts(folder, matrices(model), pattern)
    index = write_index(folder, paths, index)
    shutil.rmtree(folder / "alone")
    for path in (*paths, index, folder):
        check_whole(path)
    assert model_paths(paths[1]) == model_paths(index) == (index, *paths)


def test_index_that_lacks_a_shard_is_refused(model, tmp_path, sentences):
    paths = write_parts(tmp_path, matrices(model), "m-{:05}-of-{:05}.safetensors")
    index = write_index(tmp_path, paths[:2])
    for given in (index, paths[0]):
        with sentences.raises(SourceError):
            open_source(given)


def test_tensors_that_the_index_lacks_are_read(model, tmp_path, check_whole):
    """As by transformers and diffusers, which read all tensors of the shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    index = write_index(folder, write_parts(folder, matrices(model), "m-{:05}-of-{:05}.safetensors"))
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["blocks.1.mlp.0.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    shutil.rmtree(folder / "alone")
    check_whole(index)


def test_shard_whose_name_has_no_number_is_found_in_the_index(model, tmp_path, check_whole):
    folder = tmp_path / "model"
    folder.mkdir()
    paths = []
    for number, part in enumerate(("first", "second", "third")):
        paths.append(folder / f"{part}.safetensors")
        save_file(dict(list(matrices(model).items())[number::COUNT]), paths[-1])
    write_index(folder, paths)
    shutil.rmtree(folder / "alone")
    for path in paths:
        check_whole(path)
    paths[0].unlink()
    with pytest.raises(SourceError, match=r"first\.safetensors is missing"):
        open_source(paths[1])


def test_parts_numbered_from_zero(model, tmp_path, check_whole):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in write_parts(folder, matrices(model), "m-{:05}-of-{:05}.safetensors", first=0):
        check_whole(path)


COMMANDS = ["quantize --int8 -i", "plan --int8 -i", "inspect", "verify", "migrate -i"]


@pytest.mark.parametrize("with_index", [False, True], ids=["no index", "index"])
@pytest.mark.parametrize("pattern", ["m-{:05}-of-{:05}.safetensors", "pytorch_model-{:05}-of-{:05}.bin"])
def test_missing_parts_are_named(model, tmp_path, capsys, sentences, pattern, with_index):
    paths = write_parts(tmp_path, matrices(model), pattern)
    if with_index:
        write_index(tmp_path, paths)
        shutil.rmtree(tmp_path / "alone")
    for missing, given in ((paths[:1], paths[1]), (paths[:2], paths[2])):
        missing[-1].unlink()
        before = os.listdir(tmp_path)
        for command in COMMANDS:
            assert main([*command.split(), str(given)]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert all(path.name in line for path in (*missing, given))
            assert not any(path.name in line for path in paths if path not in (*missing, given))
        sentences(line)
        assert os.listdir(tmp_path) == before


def test_missing_parts_of_a_gguf_are_named(model, tmp_path, capsys, sentences):
    paths = write_parts(tmp_path, matrices(model), "m-Q8_0-{:05}-of-{:05}.gguf")
    paths[2].unlink()
    for command in ("quantize --int8 -i", "plan --int8 -i"):
        assert main([*command.split(), str(paths[0])]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert paths[2].name in line and paths[1].name not in line
    sentences(line)


def test_long_lists_of_missing_parts_are_shortened(model, tmp_path, sentences):
    save_file(matrices(model), tmp_path / "m-00007-of-99999.safetensors")
    with sentences.raises(SourceError):
        open_source(tmp_path / "m-00007-of-99999.safetensors")


def test_part_of_another_file_format_is_named(model, tmp_path, sentences):
    paths = write_parts(tmp_path, matrices(model), "m-{:05}-of-{:05}.safetensors")
    paths[1].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with sentences.raises(SourceError):
        open_source(paths[0])


def test_files_of_different_models_are_not_joined(model, tmp_path, sentences):
    paths = write_parts(tmp_path, matrices(model), "m-{:05}-of-{:05}.safetensors")
    save_file(matrices(model), paths[2])
    with sentences.raises(SourceError):
        open_source(paths[0])


@pytest.mark.parametrize(
    "name",
    [
        "m-00001-of-00001.safetensors",
        "m-00004-of-00003.safetensors",
        "m-00001-of-00003_int8.safetensors",
        "m-00001-of-00003.safetensors.out.safetensors",
        "m-00001-of-00003.int8.safetensors",
        "step-00010.safetensors",
        "1-of-3.safetensors",
    ],
)
def test_other_names_are_whole_models(model, tmp_path, check_whole, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(matrices(model), folder / name)
    check_whole(folder / name)


def test_index_of_another_model_has_no_effect(model, tmp_path, check_whole):
    """A merged file beside the index and the shards that it was made from, and damaged indexes."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_index(folder, write_parts(folder, matrices(model), "m-{:05}-of-{:05}.safetensors"))
    (folder / "other.safetensors.index.json").write_text('{"weight_map": {"merged.safetensors"')
    (folder / "small.safetensors.index.json").write_text('{"weight_map": {"a": "merged.safetensors"}}')
    save_file(matrices(model), folder / "merged.safetensors")
    check_whole(folder / "merged.safetensors")


def test_no_part_becomes_the_output(model, tmp_path):
    paths = write_parts(tmp_path, matrices(model), "m-{:05}-of-{:05}.safetensors")
    for path in paths:
        with pytest.raises(OutputError):
            quantize_file(paths[0], path, RECIPE, overwrite=True)


def test_output_is_named_after_the_model(tmp_path):
    names = {
        "m-00002-of-00003.safetensors": "m",
        "m.fp16-00002-of-00003.safetensors": "m.fp16",
        "m-Q8_0-00001-of-00002.gguf": "m-Q8_0",
        "pytorch_model.bin.index.json": "pytorch_model",
        "m.safetensors.index.fp16.json": "m",
        "m.v2.safetensors": "m.v2",
        "m": "m",
    }
    assert {name: model_stem(name) for name in names} == names
    assert output_name(tmp_path / "m-00002-of-00003.safetensors", "int8").name == "m_int8.safetensors"
    assert len(find_parts(tmp_path / "m-00002-of-00003.safetensors")) == 3


def test_quantized_shards_are_inspected_verified_and_migrated_whole(model, tmp_path):
    save_file(matrices(model), tmp_path / "whole.safetensors")
    quantize_file(tmp_path / "whole.safetensors", tmp_path / "one.safetensors", RECIPE)
    tensors = load_file(tmp_path / "one.safetensors")
    paths = write_parts(tmp_path, tensors, "m-{:05}-of-{:05}.safetensors")
    layers = verify_file(tmp_path / "one.safetensors").layers
    for path in paths:
        assert verify_file(path).layers == layers > 0
        assert inspect_file(path).tensors == len(tensors)
        with open_safetensors(path) as source:
            assert source.tensors.keys() == tensors.keys()
    assert main(["migrate", "-i", str(paths[1]), "-o", str(tmp_path / "joined.safetensors")]) == 0
    joined = load_file(tmp_path / "joined.safetensors")
    assert joined.keys() == tensors.keys() and all(torch.equal(joined[name], tensors[name]) for name in tensors)


def test_parts_of_a_gguf_share_the_keys_of_the_first(tmp_path):
    """gguf-split writes the key-value pairs, among them shapes of all tensors, into the first part only."""
    kernels = [torch.randn(32, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    paths = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    pairs = [("add_array", f"comfy.gguf.orig_shape.conv{number}.weight", [32, 4, 3, 3]) for number in range(2)]
    write_gguf({}, paths[0], 0, [*pairs, ("add_string", "config", '{"transformer": {}}')])
    for number, path in enumerate(paths[1:]):
        write_gguf({f"conv{number}.weight": kernels[number].reshape(32, 36)}, path, number + 1)
    with open_source(paths[2]) as source:
        assert source.metadata == {"config": '{"transformer": {}}'}
        assert all(torch.equal(source.read(f"conv{number}.weight"), kernels[number]) for number in range(2))


@pytest.mark.parametrize(
    "name, number, count",
    [
        ("renamed.gguf", 0, 3),
        ("m-00001-of-00003.gguf", 1, 3),
        ("m-00001-of-00003.gguf", 0, 2),
        ("m-00001-of-00001.gguf", 0, 2),
    ],
)
def test_gguf_part_whose_header_differs_from_its_name_is_refused(model, tmp_path, sentences, name, number, count):
    tensors = matrices(model)
    for part in (2, 3):
        write_gguf({f"x{part}": torch.zeros(32)}, tmp_path / f"m-{part:05}-of-00003.gguf", part - 1)
    write_gguf(tensors, tmp_path / name, number, count=count)
    with sentences.raises(SourceError):
        open_source(tmp_path / name)


def test_merged_gguf_is_whole(model, tmp_path):
    """llama-gguf-split --merge leaves a count of 0."""
    write_gguf(matrices(model), tmp_path / "merged.gguf", 0, count=0)
    with open_source(tmp_path / "merged.gguf") as source:
        assert source.tensors.keys() == matrices(model).keys()


def test_folder_prefers_safetensors(model, tmp_path, sentences):
    tensors = matrices(model)
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with open_source(tmp_path) as source:
        assert source.tensors.keys() == tensors.keys()
    (tmp_path / "model.safetensors").unlink()
    with open_source(tmp_path) as source:
        assert source.tensors.keys() == {"other"}
    torch.save({"other": torch.zeros(2)}, tmp_path / "training_args.bin")
    with sentences.raises(SourceError):
        open_source(tmp_path)
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    torch.save({"other": torch.zeros(2)}, pipeline / "unet" / "diffusion_pytorch_model.bin")
    with sentences.raises(SourceError):
        open_source(pipeline)
