"""Text encoders under llama.cpp's names: those of ``gguf``'s own tables become transformers' names, rows in transformers' order."""

import re
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


def llama_cpp_names(name: str) -> dict[str, str]:
    """llama.cpp's name, as its own converter chooses it → ComfyUI's name, of all tensors of a list."""
    table = gguf.get_tensor_name_map(MODEL_ARCH[ENCODERS[name]], 64)
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


@pytest.mark.parametrize("name", ENCODERS)
def test_names_become_those_of_comfyuis_class(name):
    source = whole(name)
    assert all(re.match(r"((enc|dec)\.)?blk\.\d+\.|token_embd|(enc\.)?output|rope", key) for key in source.tensors)
    renamed = RenamedSource(source, assemble_llama_cpp(source))
    found = {
        key.replace("lm_head", "model.lm_head"): info.shape for key, info in renamed.tensors.items()
    }  # as ComfyUI does
    assert found == {key: tensor.shape for key, tensor in read(name).items()}
    plan = make_plan(renamed)
    assert plan.preset and not any("embed_tokens" in key or "shared" in key for key in plan.names("quantize"))


def permute(weights: numpy.ndarray, heads: int) -> numpy.ndarray:
    """``LlamaModel.permute`` of llama.cpp's ``convert_hf_to_gguf.py``."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def test_rows_of_llama_come_back():
    """Queries and keys by their own number of heads, weights and biases; all other tensors as they are."""
    rng = numpy.random.default_rng(0)
    rows = {"attn_q": 4096, "attn_k": 1024, "attn_v": 1024, "attn_output": 4096, "ffn_up": 512}
    original = {
        f"blk.0.{layer}.weight": rng.standard_normal((count, 6), numpy.float32) for layer, count in rows.items()
    }
    original |= {
        f"blk.0.{layer}.bias": rng.standard_normal(rows[layer], numpy.float32) for layer in ("attn_q", "attn_k")
    }
    heads = {"attn_q": 32, "attn_k": 8}
    stored = {
        name: permute(value, heads[layer]) if (layer := name.split(".")[2]) in heads else value
        for name, value in original.items()
    }
    assert not numpy.array_equal(stored["blk.0.attn_q.weight"], original["blk.0.attn_q.weight"])
    tensors = {name: torch.from_numpy(value) for name, value in stored.items()}
    source = TensorSource({"token_embd.weight": torch.empty(128256, 4096, device="meta"), **tensors})
    source.values = {"general.architecture": "llama", **HEADS}
    source.path, source.paths, source.size = None, (), 0
    renamed = RenamedSource(source, assemble_llama_cpp(source))
    ours = dict(llama_cpp_names("llama3_8b").items())
    for name, value in original.items():
        target = ours[name.replace("bias", "weight")].removesuffix("weight") + name.rpartition(".")[2]
        assert torch.equal(renamed.read(target), torch.from_numpy(value)), name


@pytest.mark.parametrize("heads", [None, 0, 7, True, "32", (32, 32)])
def test_a_wrong_number_of_heads_is_an_error(heads, sentences):
    source = whole("llama3_8b")
    source.values["llama.attention.head_count"] = heads
    with sentences.raises(SourceError):
        assemble_llama_cpp(source)


OTHERS = (
    "gemma2",
    "gemma3",
    "gemma4",
    "qwen35",
    "gpt-oss",
    "qwen2",
    "qwen3moe",
    "qwen3vl",
    "mistral3",
    "llama",
    "t5encoder",
    "clip",
)


@pytest.mark.parametrize("architecture", OTHERS)
def test_encoders_without_a_conversion_are_refused_by_their_names(tmp_path, architecture, sentences):
    """Whatever the architecture is called, also of sizes that ComfyUI's encoders of this architecture do not have."""
    block = {"t5encoder": "enc.blk.0.", "clip": "v.blk.0."}.get(architecture, "blk.0.")
    names = {f"{block}attn_q.weight": (64, 32), f"{block}ffn_up.weight": (64, 32), "output_norm.weight": (32,)}
    if architecture != "clip":
        names["token_embd.weight"] = (100, 32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    for name, shape in names.items():
        writer.add_tensor(name, numpy.ones(shape, numpy.float32))
    save_gguf(writer)
    with open_source(tmp_path / "model.gguf") as source:
        assert source.tensors.keys() == names.keys()
        with sentences.raises(NothingToQuantizeError):
            make_plan(source)


@pytest.mark.parametrize("name", [*ENCODERS, "qwen25_7b", "gemma2_2b", "mistral3_24b"])
def test_each_of_llama_cpps_names_of_a_layer_is_refused_alone(name):
    arch = MODEL_ARCH.get(ENCODERS.get(name, ""), gguf.MODEL_ARCH.LLAMA)
    table = gguf.get_tensor_name_map(arch, 64)
    named = {key: table.get_name(key, try_suffixes=(".weight", ".bias")) for key in read(name)}
    layers = [theirs for theirs in named.values() if theirs and "norm" not in theirs and theirs.endswith(".weight")]
    assert layers and all(find_refusal([layer]) for layer in layers)
    assert find_refusal(read(name)) is None


def test_an_unknown_tensor_leaves_the_file_as_it_is():
    source = whole("qwen3_4b")
    source.tensors["blk.0.attn_sinks.weight"] = TensorInfo(torch.bfloat16, (32,))
    assert assemble_llama_cpp(source) is None and find_refusal(source.tensors)


def test_gated_t5_of_the_width_of_t5_1_0_leaves_the_file_as_it_is():
    """Flan-T5 large: ComfyUI would take its layers for those of T5 1.0, which has no gate."""
    source = whole("t5_old")
    source.tensors["enc.blk.0.ffn_gate.weight"] = TensorInfo(torch.bfloat16, (2816, 1024))
    assert assemble_llama_cpp(source) is None and find_refusal(source.tensors)


UMT5 = "token_embedding norm blocks.0.attn.q blocks.0.attn.o blocks.0.ffn.gate.0 blocks.0.ffn.fc1 blocks.0.ffn.fc2 blocks.0.pos_embedding.embedding"


def test_umt5_of_wans_repository_is_refused_with_the_file_to_take_instead(header_source, sentences):
    source = header_source({f"{name}.weight": (64, 64) for name in UMT5.split()})
    with sentences.raises(NothingToQuantizeError):
        make_plan(source)
