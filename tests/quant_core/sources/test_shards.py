"""One file of a model in several files is opened as the whole model, or refused with the names of the missing files."""

import json
import os

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
from learned_rounding.quant_core.sources.shards import (
    find_index,
    find_parts,
    load_weight_map,
    model_key,
    model_stem,
    part_number,
)
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


SAFETENSORS, PICKLES, GGUF = (
    "m-{:05}-of-{:05}.safetensors",
    "pytorch_model-{:05}-of-{:05}.bin",
    "m-Q8_0-{:05}-of-{:05}.gguf",
)
SAVE = {
    SAFETENSORS: lambda tensors, path, number: save_file(tensors, path),
    "m.fp16-{:05}-of-{:05}.safetensors": lambda tensors, path, number: save_file(tensors, path),
    "m-{:05}-of-{:05}.fp16.safetensors": lambda tensors, path, number: save_file(tensors, path),
    "m_{}_of_{}.sft": lambda tensors, path, number: save_file(tensors, path),
    PICKLES: lambda tensors, path, number: torch.save(tensors, path),
    GGUF: write_gguf,
}


def write_parts(folder, tensors, pattern, first=1):
    """Write the tensors in COUNT parts; return their paths."""
    paths = [folder / pattern.format(number + first, COUNT) for number in range(COUNT)]
    for number, path in enumerate(paths):
        SAVE[pattern](dict(list(tensors.items())[number::COUNT]), path, number)
    return paths


def write_index(paths, name="m.safetensors.index.json"):
    """The index of these files."""
    weight_map = {tensor: path.name for path in paths for tensor in names_in(path)}
    (paths[0].parent / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths[0].parent / name


def names_in(path) -> list[str]:
    """Names of the tensors in a single file."""
    return list(torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path))


@pytest.fixture
def tensors(model):
    """Of the whole model."""
    return {name: tensor.float() for name, tensor in model().items() if tensor.is_floating_point()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture
def check_whole(tensors):
    """check_whole(path): it is opened as the whole model."""

    def check(path) -> None:
        with open_source(path) as source:
            assert source.tensors.keys() == tensors.keys()
            assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)

    return check


# Parts by their numbers


def test_every_part_stands_for_the_model(subtests, tensors, tmp_path, check_whole):
    for number, pattern in enumerate(SAVE):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in (*write_parts(folder, tensors, pattern), folder):
            with subtests.test(pattern, given=path.name):
                check_whole(path)


def test_a_model_of_parts_has_the_paths_of_all(tensors, folder):
    paths = write_parts(folder, tensors, SAFETENSORS)
    for path in paths:
        with open_source(path) as source:
            assert source.paths == tuple(paths)
            assert model_paths(path) == tuple(paths)


def test_a_model_of_parts_has_the_name_of_the_given_one(tensors, folder):
    paths = write_parts(folder, tensors, SAFETENSORS)
    with open_source(paths[1]) as source:
        assert source.name == paths[1].name


def test_a_model_of_parts_has_the_size_of_all(tensors, folder):
    paths = write_parts(folder, tensors, SAFETENSORS)
    with open_source(paths[1]) as source:
        assert source.size == sum(path.stat().st_size for path in paths)


def test_samples_are_those_of_the_part(tensors, folder):
    with open_source(write_parts(folder, tensors, SAFETENSORS)[1]) as source:
        for name, tensor in tensors.items():
            assert source.sample(name, 4, 8) == tensor.numpy().tobytes()[4:12]


def test_parts_numbered_from_zero(subtests, tensors, folder, check_whole):
    for path in write_parts(folder, tensors, SAFETENSORS, first=0):
        with subtests.test(path.name):
            check_whole(path)


OTHER_NAMES = [
    "m-00001-of-00001.safetensors",
    "m-00004-of-00003.safetensors",
    "m-00001-of-00003_int8.safetensors",
    "m-00001-of-00003.safetensors.out.safetensors",
    "m-00001-of-00003.int8.safetensors",
    "step-00010.safetensors",
    "1-of-3.safetensors",
]


def test_other_names_are_whole_models(subtests, tmp_path):
    for name in OTHER_NAMES:
        with subtests.test(name):
            assert find_parts(tmp_path / name) == [tmp_path / name]


def test_parts_of_a_name(tmp_path):
    names = [path.name for path in find_parts(tmp_path / "m-00002-of-00003.safetensors")]
    assert names == [f"m-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def test_number_of_a_part(subtests):
    for name, number in [("m-00002-of-00003.safetensors", 2), ("m-00001-of-00001.gguf", None), ("m.safetensors", None)]:
        with subtests.test(name=name, number=number):
            assert part_number(name) == number


def test_parts_of_a_model_have_one_key():
    assert model_key("m-00001-of-00003.safetensors") == model_key("m-00002-of-00003.safetensors")


def test_parts_of_other_models_have_other_keys(subtests):
    for other in ["m-00001-of-00002.safetensors", "m-00001-of-00003.gguf", "n-00001-of-00003.safetensors"]:
        with subtests.test(other=other):
            assert model_key(other) != model_key("m-00001-of-00003.safetensors")


def test_model_stems(subtests):
    for name, stem in {
        "m-00002-of-00003.safetensors": "m",
        "m.fp16-00002-of-00003.safetensors": "m.fp16",
        "m-Q8_0-00001-of-00002.gguf": "m-Q8_0",
        "pytorch_model.bin.index.json": "pytorch_model",
        "m.safetensors.index.fp16.json": "m",
        "m.v2.safetensors": "m.v2",
        "m": "m",
    }.items():
        with subtests.test(name):
            assert model_stem(name) == stem


# Indexes


@pytest.mark.parametrize("pattern", [SAFETENSORS, PICKLES])
@pytest.mark.parametrize(
    "index", ["m.safetensors.index.json", "pytorch_model.bin.index.json", "m.safetensors.index.fp16.json"]
)
def test_every_part_with_an_index_stands_for_the_model(subtests, tensors, folder, check_whole, pattern, index):
    paths = write_parts(folder, tensors, pattern)
    for path in (*paths, write_index(paths, index), folder):
        with subtests.test(path.name):
            check_whole(path)


def test_a_model_with_an_index_has_the_paths_of_all(tensors, folder):
    paths = write_parts(folder, tensors, SAFETENSORS)
    index = write_index(paths)
    assert model_paths(paths[1]) == (index, *paths)
    assert model_paths(index) == (index, *paths)


def test_index_that_lacks_a_shard_is_refused(tensors, folder, sentences):
    paths = write_parts(folder, tensors, SAFETENSORS)
    for given in (write_index(paths[:2]), paths[0]):
        with sentences.raises(SourceError):
            open_source(given)


def test_tensors_that_the_index_lacks_are_read(tensors, folder, check_whole):
    """As by transformers and diffusers, which read all tensors of the shards."""
    index = write_index(write_parts(folder, tensors, SAFETENSORS))
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["blocks.1.mlp.0.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    check_whole(index)


@pytest.fixture
def unnumbered(tensors, folder):
    """Shards whose names have no number, with their index."""
    paths = [folder / f"{part}.safetensors" for part in ("first", "second", "third")]
    for number, path in enumerate(paths):
        save_file(dict(list(tensors.items())[number::COUNT]), path)
    write_index(paths)
    return paths


def test_shard_whose_name_has_no_number_is_found_in_the_index(subtests, unnumbered, check_whole):
    for path in unnumbered:
        with subtests.test(path.name):
            check_whole(path)


def test_missing_shard_whose_name_has_no_number_is_named(unnumbered):
    unnumbered[0].unlink()
    with pytest.raises(SourceError, match=r"first\.safetensors is missing"):
        open_source(unnumbered[1])


WRONG = [
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
]


def test_an_index_that_is_wrong(subtests, tensors, folder, sentences):
    for number in (1, 2):
        half = dict(list(tensors.items())[number - 1 :: 2])
        save_file(
            half | ({"step": torch.tensor(7)} if number == 2 else {}),
            folder / f"model-0000{number}-of-00002.safetensors",
        )
    for index in WRONG:
        with subtests.test(index):
            (folder / "model.safetensors.index.json").write_text(index)
            with sentences.raises(SourceError):
                open_source(folder)


def test_index_of_another_model_has_no_effect(tensors, folder, check_whole):
    """A merged file beside the index and the shards that it was made from, and damaged indexes."""
    write_index(write_parts(folder, tensors, SAFETENSORS))
    (folder / "other.safetensors.index.json").write_text('{"weight_map": {"merged.safetensors"')
    (folder / "small.safetensors.index.json").write_text('{"weight_map": {"a": "merged.safetensors"}}')
    save_file(tensors, folder / "merged.safetensors")
    check_whole(folder / "merged.safetensors")


def test_the_index_of_a_file_is_found_next_to_it(tensors, folder):
    paths = write_parts(folder, tensors, SAFETENSORS)
    index = write_index(paths)
    assert find_index(paths[0]) == index


def test_an_index_of_many_bytes_is_refused(tensors, folder):
    index = write_index(write_parts(folder, tensors, SAFETENSORS))
    with pytest.raises(SourceError, match="more than 10 bytes"):
        load_weight_map(index, limit=10)


# Missing parts


@pytest.mark.parametrize("with_index", [False, True], ids=["no index", "index"])
@pytest.mark.parametrize("pattern", [SAFETENSORS, PICKLES], ids=["safetensors", "pickles"])
def test_missing_parts_are_named(subtests, tensors, tmp_path, sentences, pattern, with_index):
    for missing, given in (([0], 1), ([0, 1], 2)):
        paths = write_parts(tmp_path, tensors, pattern)
        if with_index:
            write_index(paths)
        for number in missing:
            paths[number].unlink()
        with subtests.test(missing=missing):
            with sentences.raises(SourceError) as error:
                open_source(paths[given])
            named = {path.name for path in paths if path.name in str(error.value)}
            assert named == {paths[number].name for number in (*missing, given)}


COMMANDS = ["quantize --int8 -i", "plan --int8 -i", "inspect", "verify", "migrate -i"]


def test_commands_name_missing_parts_in_one_line(subtests, tensors, tmp_path, capsys):
    for command in COMMANDS:
        with subtests.test(command=command):
            paths = write_parts(tmp_path, tensors, SAFETENSORS)
            paths[0].unlink()
            before = os.listdir(tmp_path)
            assert main([*command.split(), str(paths[1])]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert paths[0].name in line
            assert os.listdir(tmp_path) == before


def test_missing_parts_of_a_gguf_are_named(tensors, tmp_path, sentences):
    paths = write_parts(tmp_path, tensors, GGUF)
    paths[2].unlink()
    with sentences.raises(SourceError):
        open_source(paths[0])


def test_long_lists_of_missing_parts_are_shortened(tensors, tmp_path, sentences):
    save_file(tensors, tmp_path / "m-00007-of-00999.safetensors")
    with sentences.raises(SourceError):
        open_source(tmp_path / "m-00007-of-00999.safetensors")


def test_part_of_another_file_format_is_named(tensors, tmp_path, sentences):
    paths = write_parts(tmp_path, tensors, SAFETENSORS)
    paths[1].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with sentences.raises(SourceError):
        open_source(paths[0])


def test_files_of_different_models_are_not_joined(tensors, tmp_path, sentences):
    paths = write_parts(tmp_path, tensors, SAFETENSORS)
    save_file(tensors, paths[2])
    with sentences.raises(SourceError) as error:
        open_source(paths[0])
    assert error.value.tensor in tensors


# Parts of a GGUF


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
def test_gguf_part_whose_header_differs_from_its_name_is_refused(tensors, tmp_path, sentences, name, number, count):
    for part in (2, 3):
        write_gguf({f"x{part}": torch.zeros(32)}, tmp_path / f"m-{part:05}-of-00003.gguf", part - 1)
    write_gguf(tensors, tmp_path / name, number, count=count)
    with sentences.raises(SourceError):
        open_source(tmp_path / name)


def test_merged_gguf_is_whole(tensors, tmp_path, check_whole):
    """llama-gguf-split --merge leaves a count of 0."""
    write_gguf(tensors, tmp_path / "merged.gguf", 0, count=0)
    check_whole(tmp_path / "merged.gguf")


# Runs


@pytest.mark.parametrize("given", ["a part", "index", "folder"])
def test_shards_are_quantized_as_one_file(tensors, folder, tmp_path, given):
    save_file(tensors, tmp_path / "whole.safetensors")
    quantize_file(tmp_path / "whole.safetensors", tmp_path / "expected.safetensors", RECIPE)
    paths = write_parts(folder, tensors, SAFETENSORS)
    path = {"a part": paths[1], "index": write_index(paths), "folder": folder}[given]
    quantize_file(path, tmp_path / "out.safetensors", RECIPE)
    made, expected = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "expected.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    assert quantize_file(path, tmp_path / "out.safetensors", RECIPE).already_done


def test_no_part_becomes_the_output(subtests, tensors, tmp_path, sentences):
    for number in range(COUNT):
        with subtests.test(number=number):
            paths = write_parts(tmp_path, tensors, SAFETENSORS)
            with sentences.raises(OutputError):
                quantize_file(paths[0], paths[number], RECIPE, overwrite=True)


def test_output_is_named_after_the_model(tensors, folder):
    paths = write_parts(folder, tensors, SAFETENSORS)
    assert output_name(paths[1], "int8").name == "m_int8.safetensors"
    assert output_name(write_index(paths), "int8").name == "m_int8.safetensors"
    assert output_name(folder, "int8").name == "model_int8.safetensors"


@pytest.fixture
def quantized_parts(tensors, tmp_path):
    """(tensors of a quantized file, paths of its parts)"""
    save_file(tensors, tmp_path / "whole.safetensors")
    quantize_file(tmp_path / "whole.safetensors", tmp_path / "one.safetensors", RECIPE)
    quantized = load_file(tmp_path / "one.safetensors")
    return quantized, write_parts(tmp_path, quantized, SAFETENSORS)


def test_quantized_shards_are_verified_whole(quantized_parts, tmp_path):
    layers = verify_file(tmp_path / "one.safetensors").layers
    assert layers > 0
    assert [verify_file(path).layers for path in quantized_parts[1]] == [layers] * COUNT


def test_quantized_shards_are_inspected_whole(quantized_parts):
    quantized, paths = quantized_parts
    assert [inspect_file(path).tensors for path in paths] == [len(quantized)] * COUNT


def test_quantized_shards_are_opened_whole(quantized_parts):
    quantized, paths = quantized_parts
    with open_safetensors(paths[1]) as source:
        assert source.tensors.keys() == quantized.keys()


def test_quantized_shards_are_migrated_whole(quantized_parts, tmp_path):
    quantized, paths = quantized_parts
    assert main(["migrate", "-i", str(paths[1]), "-o", str(tmp_path / "joined.safetensors")]) == 0
    joined = load_file(tmp_path / "joined.safetensors")
    assert joined.keys() == quantized.keys()
    assert all(torch.equal(joined[name], quantized[name]) for name in quantized)
