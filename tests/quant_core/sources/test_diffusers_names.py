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
from learned_rounding.tests.architectures.table import CONVERTED
from learned_rounding.tests.gguf_files import save_gguf
from learned_rounding.tests.quant_core.sources.diffusers_lists import DIFFUSERS_LISTS as LISTS
from learned_rounding.tests.quant_core.sources.diffusers_lists import read_diffusers as theirs
from learned_rounding.tests.quant_core.sources.test_gguf_shapes import without_leading_ones

PREFIX = "model.diffusion_model."


def header(shapes: dict[str, tuple[int, ...]], name: str = "model.safetensors") -> SimpleNamespace:
    infos = {key: TensorInfo(torch.bfloat16, shape) for key, shape in shapes.items()}
    return SimpleNamespace(name=name, metadata={}, tensors=infos)


def converted(shapes: dict[str, tuple[int, ...]]) -> RenamedSource:
    source = header(shapes)
    return RenamedSource(source, assemble_diffusers(source))


@pytest.mark.parametrize("name", LISTS)
def test_names_and_shapes_become_those_of_comfyuis_class(name):
    found = {
        key.replace("_norm.scale", "_norm.weight"): info.shape for key, info in converted(theirs(name)).tensors.items()
    }  # ComfyUI reads both names of these norms
    assert found == {key: tensor.shape for key, tensor in read(name).items()}


@pytest.mark.parametrize("name", LISTS)
def test_dimensions_that_a_gguf_file_lacks_come_back(name):
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


@pytest.mark.parametrize("name", LISTS)
def test_the_plan_is_that_of_comfyuis_names(name):
    plan = make_plan(converted(theirs(name)))
    expected = make_plan(header({key: tensor.shape for key, tensor in read(name).items()}))
    assert plan.explanation == expected.explanation and plan.preset is expected.preset is not None
    assert set(plan.names("quantize")) == set(expected.names("quantize"))


def test_the_second_time_embedding_of_hunyuan_video_15():
    """Models distilled with MeanFlow (``use_meanflow`` of diffusers' class)."""
    more = {f"time_embed.timestep_embedder_r.linear_{number}.weight": (2048, 256) for number in (1, 2)}
    names = converted(theirs("hunyuan_1_5") | more).tensors.keys() - converted(theirs("hunyuan_1_5")).tensors.keys()
    assert names == {"time_r_in.in_layer.weight", "time_r_in.out_layer.weight"}


@pytest.mark.parametrize("name", architectures())
def test_comfyuis_names_are_left_alone(name):
    shapes = {key: tensor.shape for key, tensor in read(name).items()}
    assert assemble_diffusers(header(shapes)) is None
    assert assemble_diffusers(header({PREFIX + key: shape for key, shape in shapes.items()})) is None


def test_every_family_has_a_list():
    assert set(LISTS) == CONVERTED
    refused = [family for family in FAMILIES if family.lacks]
    used = [family for family in FAMILIES for name in LISTS if set(family.marks) <= theirs(name).keys()]
    assert {family.title for family in (*used, *refused)} == {family.title for family in FAMILIES}
    assert all(sum(set(family.marks) <= theirs(name).keys() for family in FAMILIES) == 1 for name in LISTS)


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


def test_joined_and_swapped_values(tmp_path):
    """Queries, keys and values in this order; shift before scale in the output."""
    original = tiny_flux2()
    save_file(original, tmp_path / "flux2.safetensors")
    with open_source(tmp_path / "flux2.safetensors") as source:
        read = {name: source.read(name) for name in source.tensors}
        assert all(tuple(read[name].shape) == info.shape for name, info in source.tensors.items())
    block = "transformer_blocks.0.attn."
    joined = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
    for stream, parts in joined.items():
        expected = torch.cat([original[f"{block}{part}.weight"] for part in parts])
        assert torch.equal(read[f"double_blocks.0.{stream}_attn.qkv.weight"], expected)
    scale, shift = original["norm_out.linear.weight"].chunk(2)
    assert torch.equal(read["final_layer.adaLN_modulation.1.weight"], torch.cat((shift, scale)))
    assert torch.equal(
        read["single_blocks.0.linear1.weight"], original["single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"]
    )
    values = torch.cat([tensor.flatten() for tensor in read.values()])
    assert torch.equal(values.sort().values, torch.arange(values.numel(), dtype=torch.float32))


def test_a_quantized_file_has_comfyuis_names(tmp_path):
    """Two runs over the same file: the second one finds the output of the first."""
    save_file({key: tensor.bfloat16() for key, tensor in tiny_flux2().items()}, tmp_path / "flux2.safetensors")
    recipe = Recipe(rounding="nearest", preset="none")
    out = tmp_path / "out.safetensors"
    first = quantize_file(tmp_path / "flux2.safetensors", out, recipe)
    assert not first.already_done and quantize_file(tmp_path / "flux2.safetensors", out, recipe).already_done
    with SafetensorsFile(out) as made:
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


def test_layer_json_under_diffusers_names_is_for_no_loader(tmp_path, sentences):
    tensors = block_fp8(tiny_flux2(), "weight_scale")
    for layer in [name.removesuffix(".weight_scale") for name in tensors if name.endswith("weight_scale")]:
        tensors[f"{layer}.weight_scale"] = torch.tensor(0.5)
        tensors[f"{layer}.comfy_quant"] = config_tensor({"format": "float8_e4m3fn"})
    save_file(tensors, tmp_path / "flux2.safetensors")
    sentences(inspect_file(tmp_path / "flux2.safetensors").stock)
    with sentences.raises(SourceError):
        migrate_file(tmp_path / "flux2.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_quantized_files_get_comfyuis_names_when_they_are_dequantized(tmp_path):
    """Each part of a joined tensor has a scale of its own."""
    tensors = block_fp8(tiny_flux2(), "weight_scale_inv")
    block = "transformer_blocks.0.attn."
    tensors[f"{block}to_k.weight_scale_inv"] = torch.tensor([[4.0]])
    save_file(tensors, tmp_path / "flux2.safetensors")
    with open_source(tmp_path / "flux2.safetensors") as source:
        decoded = decode_source(source)
        assert (
            decoded.tensors.keys()
            == converted({key: tensor.shape for key, tensor in tiny_flux2().items()}).tensors.keys()
        )
        assert decoded.paths == (tmp_path / "flux2.safetensors",) and fingerprint(decoded) not in (
            None,
            fingerprint(source),
        )
        parts = [
            tensors[f"{block}{part}.weight"].float() * tensors[f"{block}{part}.weight_scale_inv"]
            for part in ("to_q", "to_k", "to_v")
        ]
        assert torch.equal(decoded.read("double_blocks.0.img_attn.qkv.weight").float(), torch.cat(parts))
    command = ["quantize", "--requantize", "--rounding", "nearest", "-i", str(tmp_path / "flux2.safetensors")]
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


@pytest.mark.parametrize("change", ["unknown", "missing", "scalar", "width"])
def test_files_that_are_not_whole_are_refused(change, sentences):
    with sentences.raises(SourceError):
        converted(changed(change))


LTX2 = "audio_proj_in.weight proj_in.weight time_embed.emb.timestep_embedder.linear_1.weight transformer_blocks.0.attn1.to_q.weight"


def test_ltx2_is_refused_by_what_it_lacks(tmp_path, sentences):
    save_file({name: torch.zeros(8, 8) for name in LTX2.split()}, tmp_path / "ltx2.safetensors")
    with sentences.raises(SourceError):
        open_source(tmp_path / "ltx2.safetensors")
