"""Diffusers' names to ComfyUI's: names and shapes of diffusers' own classes (``diffusers/*.txt``) become those of ComfyUI's classes."""

import math
from types import SimpleNamespace

import gguf
import numpy
import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.convert.dequantize import decode_source
from learned_rounding.quant_core.convert.migrate import migrate_file
from learned_rounding.quant_core.errors import AlreadyQuantizedError, SourceError
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.quant_core.output.inspect import inspect_file
from learned_rounding.quant_core.recipes import make_plan
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, open_source
from learned_rounding.quant_core.sources.diffusers_names import FAMILIES, assemble_diffusers
from learned_rounding.quant_core.sources.renaming import RenamedSource
from learned_rounding.quant_core.sources.source import fingerprint
from learned_rounding.tests.architectures import architectures, read
from learned_rounding.tests.architectures.table import CONVERTED, examine
from learned_rounding.tests.architectures.table import source as models_header
from learned_rounding.tests.gguf_files import save_gguf
from learned_rounding.tests.quant_core.sources.diffusers_lists import DIFFUSERS_LISTS as LISTS
from learned_rounding.tests.quant_core.sources.diffusers_lists import read_diffusers as theirs
from learned_rounding.tests.quant_core.sources.test_gguf_shapes import without_leading_ones


def header(shapes: dict[str, tuple[int, ...]], name: str = "model.safetensors") -> SimpleNamespace:
    infos = {key: TensorInfo(torch.bfloat16, shape) for key, shape in shapes.items()}
    return SimpleNamespace(name=name, metadata={}, tensors=infos)


def converted(shapes: dict[str, tuple[int, ...]]) -> RenamedSource:
    source = header(shapes)
    return RenamedSource(source, assemble_diffusers(source))


def test_names_and_shapes_become_those_of_comfyuis_class(subtests):
    for name in LISTS:
        with subtests.test(name):
            found = {
                key.replace("_norm.scale", "_norm.weight"): info.shape
                for key, info in converted(theirs(name)).tensors.items()
            }  # ComfyUI reads both names of these norms
            assert found == {key: tensor.shape for key, tensor in read(name).items()}


def test_dimensions_that_a_gguf_file_lacks_come_back(subtests):
    for name in LISTS:
        with subtests.test(name):
            stored = converted({key: without_leading_ones(shape) for key, shape in theirs(name).items()})
            assert stored.tensors == converted(theirs(name)).tensors


def test_modulation_of_wan_in_a_gguf_file(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "wan.gguf", "wan")
    values = numpy.arange(24, dtype=numpy.float32).reshape(6, 4)
    layers = ("condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight")
    for key, tensor in {
        "blocks.0.scale_shift_table": values,
        **dict.fromkeys(layers, numpy.ones((4, 4), "f4")),
    }.items():
        writer.add_tensor(key, tensor)
    save_gguf(writer)
    with open_source(tmp_path / "wan.gguf") as source:
        read = source.read("blocks.0.modulation")
        assert read.shape == source.tensors["blocks.0.modulation"].shape == (1, 6, 4)
        assert (read.numpy()[0] == values).all()


def test_the_plan_is_that_of_comfyuis_names(subtests):
    for name in LISTS:
        with subtests.test(name):
            plan, expected = make_plan(converted(theirs(name))), examine(name).plan
            assert plan.explanation == expected.explanation
            assert plan.preset is expected.preset
            assert set(plan.names("quantize")) == set(expected.names("quantize"))


def test_the_second_time_embedding_of_hunyuan_video_15():
    """Models distilled with MeanFlow (``use_meanflow`` of diffusers' class)."""
    more = {f"time_embed.timestep_embedder_r.linear_{number}.weight": (2048, 256) for number in (1, 2)}
    names = converted(theirs("hunyuan_1_5") | more).tensors.keys() - converted(theirs("hunyuan_1_5")).tensors.keys()
    assert names == {"time_r_in.in_layer.weight", "time_r_in.out_layer.weight"}


def test_comfyuis_names_are_left_alone(subtests):
    for name in architectures():
        with subtests.test(name):
            assert assemble_diffusers(models_header(name)) is None


def test_comfyuis_names_in_a_checkpoint_are_left_alone(subtests):
    for name in LISTS:
        with subtests.test(name):
            assert assemble_diffusers(models_header(name, "model.diffusion_model.")) is None


def test_lists_are_of_the_models_that_are_converted():
    assert set(LISTS) == CONVERTED


def families_of(name: str) -> list:
    return [family for family in FAMILIES if set(family.marks) <= theirs(name).keys()]


def test_every_family_has_a_list_or_is_refused():
    used = {family.title for name in LISTS for family in families_of(name)}
    refused = {family.title for family in FAMILIES if family.lacks}
    assert used | refused == {family.title for family in FAMILIES}


def test_every_list_is_of_one_family():
    assert [name for name in LISTS if len(families_of(name)) != 1] == []


def tiny_flux2() -> dict[str, torch.Tensor]:
    """Flux.2 of width 4 with one block of each kind; every value occurs once."""
    shapes = {
        key: tuple(max(1, side // 1536) for side in shape)
        for key, shape in theirs("flux2").items()
        if "blocks." not in key or "blocks.0." in key
    }
    start, tensors = 0, {}
    for key, shape in shapes.items():
        count = math.prod(shape)
        tensors[key] = torch.arange(start, start + count, dtype=torch.float32).reshape(shape)
        start += count
    return tensors


@pytest.fixture
def opened_flux2(tmp_path):
    """(tensors of the file, tensors that are read, source)"""
    original = tiny_flux2()
    save_file(original, tmp_path / "flux2.safetensors")
    with open_source(tmp_path / "flux2.safetensors") as source:
        yield original, {name: source.read(name) for name in source.tensors}, source


def test_tensors_are_read_in_the_shapes_that_are_described(opened_flux2):
    _, read, source = opened_flux2
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {
        name: info.shape for name, info in source.tensors.items()
    }


JOINED = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}


def test_queries_keys_and_values_are_joined_in_this_order(subtests, opened_flux2):
    for stream, parts in JOINED.items():
        with subtests.test(stream=stream, parts=parts):
            original, read, _ = opened_flux2
            expected = torch.cat([original[f"transformer_blocks.0.attn.{part}.weight"] for part in parts])
            assert torch.equal(read[f"double_blocks.0.{stream}_attn.qkv.weight"], expected)


def test_shift_comes_before_scale_in_the_output(opened_flux2):
    original, read, _ = opened_flux2
    scale, shift = original["norm_out.linear.weight"].chunk(2)
    assert torch.equal(read["final_layer.adaLN_modulation.1.weight"], torch.cat((shift, scale)))


def test_a_renamed_tensor_is_the_same(opened_flux2):
    original, read, _ = opened_flux2
    expected = original["single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"]
    assert torch.equal(read["single_blocks.0.linear1.weight"], expected)


def test_every_value_is_read_once(opened_flux2):
    values = torch.cat([tensor.flatten() for tensor in opened_flux2[1].values()])
    assert torch.equal(values.sort().values, torch.arange(values.numel(), dtype=torch.float32))


@pytest.fixture
def quantized_flux2(tmp_path):
    """run() quantizes the same file to the same output."""
    save_file({key: tensor.bfloat16() for key, tensor in tiny_flux2().items()}, tmp_path / "flux2.safetensors")
    recipe = Recipe(rounding="nearest", preset="none")
    return lambda: quantize_file(tmp_path / "flux2.safetensors", tmp_path / "out.safetensors", recipe)


def test_a_second_run_finds_the_output_of_the_first(quantized_flux2):
    assert not quantized_flux2().already_done
    assert quantized_flux2().already_done


def test_a_quantized_file_has_comfyuis_names(quantized_flux2, tmp_path):
    quantized_flux2()
    with SafetensorsFile(tmp_path / "out.safetensors") as made:
        assert {
            "double_blocks.0.img_attn.qkv.weight_scale",
            "single_blocks.0.norm.key_norm.scale",
        } <= made.tensors.keys()
        assert not any("transformer_blocks" in name for name in made.tensors)


def block_fp8(tensors: dict[str, torch.Tensor], scale: str) -> dict[str, torch.Tensor]:
    """The layers of the blocks in FP8 with scales under that name."""
    made = dict(tensors)
    for key in tensors:
        if "blocks." in key and "norm" not in key:
            values = torch.tensor(2.0) ** torch.arange(tensors[key].numel()).remainder(8)
            made[key] = values.reshape(tensors[key].shape).to(torch.float8_e4m3fn)
            made[f"{key.removesuffix('.weight')}.{scale}"] = torch.tensor([[0.5]])
    return made


def test_quantized_files_are_refused_by_the_name_of_the_format(tmp_path, sentences):
    save_file(block_fp8(tiny_flux2(), "weight_scale_inv"), tmp_path / "flux2.safetensors")
    with open_source(tmp_path / "flux2.safetensors") as source, sentences.raises(AlreadyQuantizedError):
        make_plan(source)


@pytest.fixture
def with_layer_json(tmp_path):
    """A file with FP8 layers and their JSON under diffusers' names."""
    tensors = block_fp8(tiny_flux2(), "weight_scale")
    for layer in [name.removesuffix(".weight_scale") for name in tensors if name.endswith("weight_scale")]:
        tensors[f"{layer}.weight_scale"] = torch.tensor(0.5)
        tensors[f"{layer}.comfy_quant"] = config_tensor({"format": "float8_e4m3fn"})
    save_file(tensors, tmp_path / "flux2.safetensors")
    return tmp_path / "flux2.safetensors"


def test_layer_json_under_diffusers_names_is_for_no_loader(with_layer_json, sentences):
    sentences(inspect_file(with_layer_json).stock)


def test_layer_json_under_diffusers_names_is_not_migrated(with_layer_json, tmp_path, sentences):
    with sentences.raises(SourceError):
        migrate_file(with_layer_json, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.fixture
def fp8_flux2(tmp_path):
    """(tensors, path) of FP8 layers; one part of a joined tensor has a scale of its own."""
    tensors = block_fp8(tiny_flux2(), "weight_scale_inv")
    tensors["transformer_blocks.0.attn.to_k.weight_scale_inv"] = torch.tensor([[4.0]])
    save_file(tensors, tmp_path / "flux2.safetensors")
    return tensors, tmp_path / "flux2.safetensors"


def test_dequantized_files_get_comfyuis_names(fp8_flux2):
    with open_source(fp8_flux2[1]) as source:
        expected = converted({key: tensor.shape for key, tensor in tiny_flux2().items()})
        assert decode_source(source).tensors.keys() == expected.tensors.keys()


def test_each_part_of_a_joined_tensor_is_dequantized_with_its_own_scale(fp8_flux2):
    tensors, path = fp8_flux2
    names = [f"transformer_blocks.0.attn.{part}.weight" for part in ("to_q", "to_k", "to_v")]
    expected = torch.cat([tensors[name].float() * tensors[f"{name}_scale_inv"] for name in names])
    with open_source(path) as source:
        assert torch.equal(decode_source(source).read("double_blocks.0.img_attn.qkv.weight").float(), expected)


def test_dequantized_files_are_those_of_their_paths(fp8_flux2):
    with open_source(fp8_flux2[1]) as source:
        assert decode_source(source).paths == (fp8_flux2[1],)


def test_dequantized_files_have_a_fingerprint_of_their_own(fp8_flux2):
    with open_source(fp8_flux2[1]) as source:
        assert fingerprint(decode_source(source)) not in (None, fingerprint(source))


def test_requantized_files_have_comfyuis_names(fp8_flux2, tmp_path):
    command = ["quantize", "--requantize", "--rounding", "nearest", "-i", str(fp8_flux2[1])]
    assert main([*command, "-o", str(tmp_path / "out.safetensors")]) == 0
    with SafetensorsFile(tmp_path / "out.safetensors") as made:
        assert "double_blocks.0.img_mlp.0.weight_scale" in made.tensors
        assert not any("transformer_blocks" in name for name in made.tensors)


def changed(change: str) -> dict[str, tuple[int, ...]]:
    shapes = theirs("flux2_klein_4b")
    query = "transformer_blocks.0.attn.to_q.weight"
    if change == "unknown":
        return shapes | {"extra.weight": (4, 4), "x_embedder.weight_scale": (1,)}
    if change == "missing":
        return {key: shape for key, shape in shapes.items() if key != query}
    if change == "scalar":
        return shapes | {"norm_out.linear.weight": ()}
    return shapes | {query: (3072, 3073)}


def test_files_that_are_not_whole_are_refused(subtests, sentences):
    for change in ("unknown", "missing", "scalar", "width"):
        with subtests.test(change), sentences.raises(SourceError):
            converted(changed(change))


LTX2 = "audio_proj_in.weight proj_in.weight time_embed.emb.timestep_embedder.linear_1.weight transformer_blocks.0.attn1.to_q.weight"


def test_ltx2_is_refused_by_what_it_lacks(tmp_path, sentences):
    save_file({name: torch.zeros(8, 8) for name in LTX2.split()}, tmp_path / "ltx2.safetensors")
    with sentences.raises(SourceError):
        open_source(tmp_path / "ltx2.safetensors")
