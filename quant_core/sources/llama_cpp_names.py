"""llama.cpp's tensor names of text encoders in GGUF files, and the names of transformers, which ComfyUI reads.

Names: ``gguf-py/gguf/tensor_mapping.py`` of llama.cpp. Only text encoders are converted that ComfyUI has the tokenizer of and
whose weights are all in the file: ComfyUI's files of others hold a tokenizer or an image encoder too, which a GGUF file does not.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from ..errors import SourceError
from .renaming import Assembly
from .source import Source

__all__ = ["assemble_llama_cpp"]

_NAME = re.compile(r"(?:(?:enc\.)?blk\.(?P<block>\d+)\.)?(?P<layer>[\w.]+)\.(?P<suffix>weight|bias)")
_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class _Encoder:
    """Text encoders of one size.

    Attributes:
        architectures: names of the architecture in llama.cpp.
        embeddings: shapes (vocabulary, width) of the embedding.
        block: start of transformers' names in a block, ``#`` for its number.
        layers: llama.cpp's name in a block → that of transformers.
        others: llama.cpp's name outside of blocks → that of transformers.
        dropped: starts of the names that ComfyUI does not need.
        permuted: layers whose rows are permuted → key of their number of heads. Rotary embeddings rotate neighbours in
            llama.cpp, and halves of a head in transformers.
    """

    architectures: tuple[str, ...]
    embeddings: tuple[tuple[int, int], ...]
    block: str
    layers: Mapping[str, str]
    others: Mapping[str, str]
    dropped: tuple[str, ...]
    permuted: Mapping[str, str] = field(default_factory=dict)

    def rename(self, name: str) -> str | None:
        """Transformers' name of a tensor; None for an unknown one."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        number = found["block"]
        layer = (self.others if number is None else self.layers).get(found["layer"])
        start = "" if number is None else self.block.replace("#", number)
        return layer and f"{start}{layer}.{found['suffix']}"

    def heads_key(self, name: str) -> str | None:
        """Key of the number of heads by which the rows of a tensor are permuted; None where they are not."""
        found = _NAME.fullmatch(name)
        return found and self.permuted.get(found["layer"])


_T5_LAYERS = {
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "attn_norm": "0.layer_norm",
    "ffn_down": "1.DenseReluDense.wo",
    "ffn_norm": "1.layer_norm",
}
_t5 = partial(
    _Encoder,
    architectures=("t5", "t5encoder"),
    block="encoder.block.#.layer.",
    others={"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"},
    dropped=("dec.", "output."),
)
_decoder = partial(
    _Encoder,
    block="model.layers.#.",
    layers={
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_norm": "input_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_norm": "post_attention_layernorm",
    },
    others={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    dropped=("rope_freqs.",),  # ComfyUI computes the frequencies
)
_ENCODERS = (
    _t5(
        embeddings=((32128, 4096),),
        layers=_T5_LAYERS | {"ffn_gate": "1.DenseReluDense.wi_0", "ffn_up": "1.DenseReluDense.wi_1"},
    ),
    _t5(embeddings=((32128, 1024),), layers=_T5_LAYERS | {"ffn_up": "1.DenseReluDense.wi"}),  # T5 1.0
    _decoder(
        architectures=("llama",),
        embeddings=((128256, 4096), (128320, 4096)),  # Llama 3.1 8B
        permuted={"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"},
    ),
    _decoder(architectures=("qwen2", "qwen2vl"), embeddings=((151936, 2048),)),  # Qwen2.5 3B
    _decoder(architectures=("qwen3",), embeddings=tuple((151936, width) for width in (1024, 2048, 2560, 4096))),
)


def assemble_llama_cpp(source: Source) -> dict[str, Assembly] | None:
    """Transformers' tensor names of a text encoder in a GGUF file; None for other files and encoders without a conversion.

    Raises:
        SourceError: the file lacks the number of attention heads, which the order of its rows depends on.
    """
    values: Mapping[str, object] = getattr(source, "values", {})
    embedding = source.tensors.get(_EMBEDDING)
    encoder = next(
        (
            each
            for each in _ENCODERS
            if embedding
            and embedding.shape in each.embeddings
            and values.get("general.architecture") in each.architectures
        ),
        None,
    )
    if encoder is None:
        return None
    assemblies = {}
    for name in source.tensors:
        if name.startswith(encoder.dropped):
            continue
        renamed, key = encoder.rename(name), encoder.heads_key(name)
        if renamed is None:
            return None
        assemblies[renamed] = Assembly((name,), _undo_permutation(source, name, values, key) if key else None)
    return assemblies


def _undo_permutation(
    source: Source, name: str, values: Mapping[str, object], key: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inverse of ``LlamaModel.permute`` in llama.cpp's ``convert_hf_to_gguf.py``, for the tensor ``name``."""
    heads, rows = values.get(key), next(iter(source.tensors[name].shape), 1)
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise SourceError(
            f"{source.name}: {key} is {heads}, which does not divide the {rows} rows of {name}; download it again.",
            tensor=name,
        )
    return lambda tensor: tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
