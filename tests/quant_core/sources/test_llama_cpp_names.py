"""Text encoders under llama.cpp's names: those of ``gguf``'s own tables become transformers' names, rows in transformers' order."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy
import pytest
import torch

from learned_rounding.quant_core.errors import NothingToQuantizeError, SourceError
from learned_rounding.quant_core.recipes import make_plan
from learned_rounding.quant_core.recipes.refused import find_refusal
from learned_rounding.quant_core.sources import TensorInfo, TensorSource, open_source
from learned_rounding.quant_core.sources.llama_cpp_names import assemble_llama_cpp
from learned_rounding.quant_core.sources.renaming import RenamedSource
from learned_rounding.tests.architectures import read
from learned_rounding.tests.architectures.table import examine
from learned_rounding.tests.gguf_files import save_gguf

# List of ComfyUI's tensors → architecture in llama.cpp.
ENCODERS = {
    "t5": "t5encoder",
    "t5_old": "t5",
    "llama3_8b": "llama",
    "qwen25_3b": "qwen2vl",
    "qwen3_06b": "qwen3",
    "qwen3_2b": "qwen3",
    "qwen3_4b": "qwen3",
    "qwen3_8b": "qwen3",
}
HEADS = {"llama.attention.head_count": 32, "llama.attention.head_count_kv": 8}
MODEL_ARCH = {"t5encoder": gguf.MODEL_ARCH.T5, "t5": gguf.MODEL_ARCH.T5} | {
    name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name in ("llama", "qwen2vl", "qwen3")
}


@functools.cache
def name_map(arch: gguf.MODEL_ARCH) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(arch, 64)


@functools.cache
def llama_cpp_names(name: str) -> Mapping[str, str]:
    """llama.cpp's name, as its own converter chooses it → ComfyUI's name, of all tensors of a list."""
    table = name_map(MODEL_ARCH[ENCODERS[name]])
    return {
        table.get_name(key.removeprefix("model.") if "lm_head" in key else key, (".weight", ".bias")): key
        for key in read(name)
    }


def header(tensors: dict[str, tuple[int, ...]], architecture: str, **values) -> SimpleNamespace:
    infos = {key: TensorInfo(torch.bfloat16, shape) for key, shape in tensors.items()}
    return SimpleNamespace(
        name="model.gguf",
        path=Path("model.gguf"),
        paths=(),
        size=0,
        metadata={},
        tensors=infos,
        values={"general.architecture": architecture, **HEADS, **values},
    )


def whole(name: str) -> SimpleNamespace:
    """The header of a GGUF file of that encoder, with the tensors that ComfyUI does not need."""
    tensors = {theirs: read(name)[ours].shape for theirs, ours in llama_cpp_names(name).items()}
    more = {
        "llama3_8b": {"rope_freqs.weight": (64,)},
        "t5": {"dec.blk.0.attn_q.weight": (8, 8), "output.weight": (8, 8)},
    }.get(name, {})
    return header(tensors | more, ENCODERS[name])


def renamed(source) -> RenamedSource:
    return RenamedSource(source, assemble_llama_cpp(source))


def test_names_of_the_tests_are_llama_cpps(subtests):
    for name in ENCODERS:
        with subtests.test(name):
            names = whole(name).tensors
            assert all(re.match(r"((enc|dec)\.)?blk\.\d+\.|token_embd|(enc\.)?output|rope", key) for key in names)


def test_names_become_those_of_comfyuis_class(subtests):
    for name in ENCODERS:
        with subtests.test(name):
            tensors = renamed(whole(name)).tensors
            found = {
                key.replace("lm_head", "model.lm_head"): info.shape for key, info in tensors.items()
            }  # as ComfyUI does
            assert found == {key: tensor.shape for key, tensor in read(name).items()}


def test_converted_encoders_are_recognized(subtests):
    for name in ENCODERS:
        with subtests.test(name):
            assert make_plan(renamed(whole(name))).preset is examine(name).plan.preset


def test_embeddings_of_converted_encoders_are_kept(subtests):
    for name in ENCODERS:
        with subtests.test(name):
            quantized = make_plan(renamed(whole(name))).names("quantize")
            assert not any("embed_tokens" in key or "shared" in key for key in quantized)


def permute(weights: numpy.ndarray, heads: int) -> numpy.ndarray:
    """``LlamaModel.permute`` of llama.cpp's ``convert_hf_to_gguf.py``."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


ROWS = {"attn_q": 4096, "attn_k": 1024, "attn_v": 1024, "attn_output": 4096, "ffn_up": 512}
HEADS_OF = {"attn_q": 32, "attn_k": 8}


@pytest.fixture(scope="module")
def llama():
    """(tensors in transformers' order, the same in llama.cpp's)"""
    rng = numpy.random.default_rng(0)
    shapes = {f"blk.0.{layer}.weight": (rows, 6) for layer, rows in ROWS.items()}
    shapes |= {f"blk.0.{layer}.bias": (ROWS[layer],) for layer in HEADS_OF}
    original = {name: rng.standard_normal(shape, numpy.float32) for name, shape in shapes.items()}
    stored = {
        name: permute(value, HEADS_OF[layer]) if (layer := name.split(".")[2]) in HEADS_OF else value
        for name, value in original.items()
    }
    return original, stored


def test_llama_cpps_order_of_rows_is_another(llama):
    original, stored = llama
    assert not numpy.array_equal(stored["blk.0.attn_q.weight"], original["blk.0.attn_q.weight"])


def test_rows_of_llama_come_back(subtests, llama):
    """Queries and keys by their own number of heads, weights and biases; all other tensors as they are."""
    original, stored = llama
    tensors = {name: torch.from_numpy(value) for name, value in stored.items()}
    source = TensorSource({"token_embd.weight": torch.empty(128256, 4096, device="meta"), **tensors})
    source.values = {"general.architecture": "llama", **HEADS}
    made, names = renamed(source), llama_cpp_names("llama3_8b")
    for name, value in original.items():
        with subtests.test(name):
            target = names[name.replace("bias", "weight")].removesuffix("weight") + name.rpartition(".")[2]
            assert torch.equal(made.read(target), torch.from_numpy(value))


def test_a_wrong_number_of_heads_is_an_error(subtests, sentences):
    for heads in (None, 0, 7, True, "32", (32, 32)):
        with subtests.test(heads=heads):
            source = whole("llama3_8b")
            source.values["llama.attention.head_count"] = heads
            with sentences.raises(SourceError):
                assemble_llama_cpp(source)


OTHERS = "gemma2 gemma3 gemma4 qwen35 gpt-oss qwen2 qwen3moe qwen3vl mistral3 llama t5encoder clip".split()


def test_encoders_without_a_conversion_are_refused_by_their_names(subtests, tmp_path, sentences):
    """Whatever the architecture is called, also of sizes that ComfyUI's encoders of this architecture do not have."""
    for architecture in OTHERS:
        block = {"t5encoder": "enc.blk.0.", "clip": "v.blk.0."}.get(architecture, "blk.0.")
        names = {f"{block}attn_q.weight": (64, 32), f"{block}ffn_up.weight": (64, 32), "output_norm.weight": (32,)}
        if architecture != "clip":
            names["token_embd.weight"] = (100, 32)
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
        for name, shape in names.items():
            writer.add_tensor(name, numpy.ones(shape, numpy.float32))
        save_gguf(writer)
        with subtests.test(architecture), open_source(tmp_path / "model.gguf") as source:
            assert source.tensors.keys() == names.keys()
            with sentences.raises(NothingToQuantizeError):
                make_plan(source)


def test_each_of_llama_cpps_names_of_a_layer_is_refused_alone(subtests):
    for name in (*ENCODERS, "qwen25_7b", "gemma2_2b", "mistral3_24b"):
        with subtests.test(name):
            arch = MODEL_ARCH.get(ENCODERS.get(name, ""), gguf.MODEL_ARCH.LLAMA)
            table = name_map(arch)
            named = [table.get_name(key, try_suffixes=(".weight", ".bias")) for key in read(name)]
            layers = [each for each in named if each and "norm" not in each and each.endswith(".weight")]
            assert layers
            assert [layer for layer in layers if not find_refusal([layer])] == []


# Qwen3 with a tensor that transformers lacks; Flan-T5 large, whose layers ComfyUI would take for those of T5 1.0,
# which has no gate.
UNKNOWN = {
    "qwen3_4b": {"blk.0.attn_sinks.weight": (32,)},
    "t5_old": {"enc.blk.0.ffn_gate.weight": (2816, 1024)},
}


@pytest.fixture(params=UNKNOWN)
def with_unknown_tensor(request):
    source = whole(request.param)
    source.tensors |= {name: TensorInfo(torch.bfloat16, shape) for name, shape in UNKNOWN[request.param].items()}
    return source


def test_an_unknown_tensor_leaves_the_file_as_it_is(with_unknown_tensor):
    assert assemble_llama_cpp(with_unknown_tensor) is None


def test_a_file_that_is_left_as_it_is_is_refused(with_unknown_tensor):
    assert find_refusal(with_unknown_tensor.tensors)
