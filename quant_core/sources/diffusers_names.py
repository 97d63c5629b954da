"""Diffusers' tensor names of families that ComfyUI has no converter for, and ComfyUI's names for them.

Names of ComfyUI: the classes in its ``comfy/ldm``; of diffusers: its classes in ``models/transformers`` and its scripts
``convert_wan_to_diffusers.py``, ``convert_hunyuan_video1_5_to_diffusers.py`` and the like. Tensors of several linear layers
that ComfyUI runs as one are joined along their rows; the output modulation of diffusers has scale and shift the other way
round.
"""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ..errors import SourceError
from ..formats.kinds import quantized_formats
from .renaming import Assembly
from .source import Source

__all__ = ["FAMILIES", "Family", "assemble_diffusers", "find_family"]

_BLOCK = re.compile(r"(?<=blocks\.)(\d+)(?=\.)")
_SUFFIXES = (".weight", ".bias")
_EXAMPLES = 2  # names in an error message

Names = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """The layers of one family.

    Attributes:
        title: name of the family.
        marks: tensor names in diffusers' file that identify it.
        layers: (start of ComfyUI's names, start of diffusers' names) → ComfyUI's name → diffusers' name, or names to join. A
            name is that of a module, whose weight and bias keep theirs, or of a tensor. ``#`` is the number of a block.
        swapped: ComfyUI's modules whose halves, scale and shift, diffusers stores the other way round.
        lacks: what ComfyUI's model has and diffusers' file does not; such files are refused.
    """

    title: str
    marks: tuple[str, ...]
    layers: Mapping[tuple[str, str], Names]
    swapped: tuple[str, ...] = ()
    lacks: str = ""

    @cached_property
    def places(self) -> Mapping[str, tuple[str, int, int]]:
        """Diffusers' name → ComfyUI's name, and which of how many parts of it this is."""
        return {
            theirs + part: (ours + name, number, len(parts.split()))
            for (ours, theirs), names in self.layers.items()
            for name, parts in names.items()
            for number, part in enumerate(parts.split())
        }

    def find(self, name: str) -> tuple[str, int, int] | None:
        """As :attr:`places`, of a tensor of a file; None for an unknown one."""
        template, block = _BLOCK.sub("#", name, count=1), _BLOCK.search(name)
        for suffix in ("", *_SUFFIXES):
            place = self.places.get(template.removesuffix(suffix)) if template.endswith(suffix) else None
            if place:
                ours, number, count = place
                return ours.replace("#", block[0] if block else "#") + suffix, number, count
        return None


def _swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.shape[0] // 2
    return torch.cat((tensor[half:], tensor[:half]))


def find_family(names: Container[str]) -> "Family | None":
    """The family of :data:`FAMILIES` in which a file has diffusers' names, from the names of its tensors."""
    return next((family for family in FAMILIES if all(mark in names for mark in family.marks)), None)


def assemble_diffusers(source: Source) -> dict[str, Assembly] | None:
    """ComfyUI's tensor names of a diffusers file of one of :data:`FAMILIES`; None for any other file.

    None also for a quantized file whose scales have no such names: it is converted after it is dequantized.

    Raises:
        SourceError: the file has tensors that the family does not have, or lacks some that it needs.
    """
    family = find_family(source.tensors)
    if family is None:
        return None
    refused = f"{source.name} has diffusers' tensor names of {family.title}"
    if family.lacks:
        raise SourceError(f"{refused}, and not {family.lacks}; use a file with ComfyUI's tensor names.")
    parts: dict[str, list[str | None]] = {}
    unknown = []
    for name, info in source.tensors.items():
        place = family.find(name) if info.shape else None  # these families have no scalars
        if place is None:
            unknown.append(name)
        else:
            ours, number, count = place
            parts.setdefault(ours, [None] * count)[number] = name
    unknown += (found for found in _lone_parts(parts))
    if unknown and quantized_formats(source):
        return None
    if unknown:
        raise SourceError(
            f"{refused}: there is no conversion for {len(unknown)} of its {len(source.tensors)} tensors, for example "
            f"{' and '.join(sorted(unknown)[:_EXAMPLES])}; use a file with ComfyUI's tensor names."
        )
    swapped = {module + suffix for module in family.swapped for suffix in _SUFFIXES}
    return {
        ours: Assembly(tuple(filter(None, names)), _swap_halves if ours in swapped else None)
        for ours, names in parts.items()
    }


def _lone_parts(parts: Mapping[str, list[str | None]]) -> Iterator[str]:
    """Names of tensors that are to be joined with others that are missing."""
    for names in parts.values():
        if None in names:
            yield from filter(None, names)


_MLP = {"0": "net.0.proj", "2": "net.2"}  # place in torch's Sequential → name in diffusers' FeedForward


def _under(ours: str, theirs: str, names: Names) -> dict[str, str]:
    """The names below the modules ``ours`` and ``theirs``."""
    return {ours + name: " ".join(theirs + part for part in parts.split()) for name, parts in names.items()}


def _same(*names: str) -> dict[str, str]:
    """Names that both share."""
    return {name: name for name in names}


_WAN_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    **_under("self_attn.", "attn1.", {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}),
    **_under("self_attn.", "attn1.", _same("norm_q", "norm_k")),
    **_under("cross_attn.", "attn2.", {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}),
    **_under("cross_attn.", "attn2.", _same("norm_q", "norm_k")),
    **_under("cross_attn.", "attn2.", {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}),
    **_under("ffn.", "ffn.", _MLP),
}
_WAN = Family(
    "WAN",
    ("condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"),
    {
        ("", ""): {
            **_same("patch_embedding", "vace_patch_embedding"),
            "head.modulation": "scale_shift_table",
            "head.head": "proj_out",
        },
        ("", "condition_embedder."): {
            "text_embedding.0": "text_embedder.linear_1",
            "text_embedding.2": "text_embedder.linear_2",
            "time_embedding.0": "time_embedder.linear_1",
            "time_embedding.2": "time_embedder.linear_2",
            "time_projection.1": "time_proj",
        },
        ("img_emb.", "condition_embedder.image_embedder."): {
            "emb_pos": "pos_embed",
            "proj.0": "norm1",
            "proj.1": "ff.net.0.proj",
            "proj.3": "ff.net.2",
            "proj.4": "norm2",
        },
        ("blocks.#.", "blocks.#."): _WAN_BLOCK,
        ("vace_blocks.#.", "vace_blocks.#."): {
            **_WAN_BLOCK,
            "before_proj": "proj_in",
            "after_proj": "proj_out",
        },
    },
)

_LTX = Family(
    "LTX-Video",
    ("proj_in.weight", "time_embed.emb.timestep_embedder.linear_1.weight"),
    {
        ("", ""): {
            **_same("scale_shift_table", "caption_projection.linear_1", "caption_projection.linear_2", "proj_out"),
            "patchify_proj": "proj_in",
            "adaln_single.linear": "time_embed.linear",
            **_under(
                "adaln_single.emb.timestep_embedder.",
                "time_embed.emb.timestep_embedder.",
                _same("linear_1", "linear_2"),
            ),
        },
        ("transformer_blocks.#.", "transformer_blocks.#."): {
            **_same("scale_shift_table", "ff.net.0.proj", "ff.net.2"),
            **{
                f"{attention}.{ours}": f"{attention}.{theirs}"
                for attention in ("attn1", "attn2")
                for ours, theirs in {
                    "q_norm": "norm_q",
                    "k_norm": "norm_k",
                    **_same("to_q", "to_k", "to_v", "to_out.0"),
                }.items()
            },
        },
    },
)

_LTX2 = Family(
    "LTX-2",
    ("audio_proj_in.weight", "time_embed.emb.timestep_embedder.linear_1.weight"),
    {},
    lacks="the embeddings connectors, which diffusers stores in another folder and ComfyUI in the model",
)

_OUTPUT = {"final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear"}
_SWAPPED = ("final_layer.adaLN_modulation.1",)
_DOUBLE_ATTENTION = {
    "img_attn.qkv": "to_q to_k to_v",
    "img_attn.norm.query_norm.scale": "norm_q.weight",
    "img_attn.norm.key_norm.scale": "norm_k.weight",
    "img_attn.proj": "to_out.0",
    "txt_attn.qkv": "add_q_proj add_k_proj add_v_proj",
    "txt_attn.norm.query_norm.scale": "norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "norm_added_k.weight",
    "txt_attn.proj": "to_add_out",
}
_EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}

_FLUX2 = Family(
    "Flux.2",
    ("double_stream_modulation_img.linear.weight", "x_embedder.weight"),
    {
        ("", ""): {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            **_under("time_in.", "time_guidance_embed.timestep_embedder.", _EMBEDDER),
            **_under("guidance_in.", "time_guidance_embed.guidance_embedder.", _EMBEDDER),
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
            **_OUTPUT,
        },
        ("double_blocks.#.", "transformer_blocks.#."): {
            **_under("", "attn.", _DOUBLE_ATTENTION),
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
        ("single_blocks.#.", "single_transformer_blocks.#.attn."): {
            "linear1": "to_qkv_mlp_proj",
            "linear2": "to_out",
            "norm.query_norm.scale": "norm_q.weight",
            "norm.key_norm.scale": "norm_k.weight",
        },
    },
    _SWAPPED,
)

_HUNYUAN: Mapping[tuple[str, str], Names] = {
    ("", ""): {
        "img_in.proj": "x_embedder.proj",
        "txt_in.input_embedder": "context_embedder.proj_in",
        **_under("txt_in.t_embedder.", "context_embedder.time_text_embed.timestep_embedder.", _EMBEDDER),
        **_under("txt_in.c_embedder.", "context_embedder.time_text_embed.text_embedder.", _EMBEDDER),
        **_OUTPUT,
    },
    ("txt_in.individual_token_refiner.blocks.#.", "context_embedder.token_refiner.refiner_blocks.#."): {
        **_same("norm1", "norm2"),
        "adaLN_modulation.1": "norm_out.linear",
        "self_attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "self_attn.proj": "attn.to_out.0",
        **_under("mlp.", "ff.", _MLP),
    },
    ("double_blocks.#.", "transformer_blocks.#."): {
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        **_under("", "attn.", _DOUBLE_ATTENTION),
        **_under("img_mlp.", "ff.", _MLP),
        **_under("txt_mlp.", "ff_context.", _MLP),
    },
}
_HUNYUAN_VIDEO = Family(
    "Hunyuan Video",
    ("context_embedder.proj_in.weight", "time_text_embed.text_embedder.linear_1.weight"),
    {
        **_HUNYUAN,
        ("", "time_text_embed."): {
            **_under("time_in.", "timestep_embedder.", _EMBEDDER),
            **_under("vector_in.", "text_embedder.", _EMBEDDER),
            **_under("guidance_in.", "guidance_embedder.", _EMBEDDER),
        },
        ("single_blocks.#.", "single_transformer_blocks.#."): {
            "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
            "norm.query_norm.scale": "attn.norm_q.weight",
            "norm.key_norm.scale": "attn.norm_k.weight",
        },
    },
    _SWAPPED,
)
_HUNYUAN_VIDEO_15 = Family(
    "Hunyuan Video 1.5",
    ("context_embedder.proj_in.weight", "time_embed.timestep_embedder.linear_1.weight"),
    {
        **_HUNYUAN,
        ("time_in.", "time_embed.timestep_embedder."): _EMBEDDER,
        ("time_r_in.", "time_embed.timestep_embedder_r."): _EMBEDDER,
        ("byt5_in.", "context_embedder_2."): {
            "layernorm": "norm",
            "fc1": "linear_1",
            "fc2": "linear_2",
            "fc3": "linear_3",
        },
        ("vision_in.", "image_embedder."): {
            "proj.0": "norm_in",
            "proj.1": "linear_1",
            "proj.3": "linear_2",
            "proj.4": "norm_out",
        },
        ("", ""): {**_HUNYUAN["", ""], "cond_type_embedding": "cond_type_embed"},
    },
    _SWAPPED,
)

FAMILIES: tuple[Family, ...] = (_WAN, _LTX2, _LTX, _FLUX2, _HUNYUAN_VIDEO, _HUNYUAN_VIDEO_15)
