"""Files that hold no model whose layers ComfyUI would read as quantized: a table, by the names of their tensors."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .presets import STARTS

__all__ = ["REFUSED", "Refused", "refusal"]


@dataclass(frozen=True)
class Refused:
    """A kind of file.

    Attributes:
        is_: what it is and what to do, the end of a sentence.
        marks: ways to know it; each is regular expressions for beginnings of names, all of which must be found.
    """

    is_: str
    marks: tuple[tuple[str, ...], ...]

    def there(self, names: str) -> bool:
        """Whether ``names``, one a line, are those of such a file."""
        return any(all(re.search(f"(?m)^(?:{mark})", names) for mark in marks) for marks in self.marks)


_LOADER = "whose loader in ComfyUI takes no quantized layers; leave it as it is"
_PREFIX = f"(?:{'|'.join(map(re.escape, STARTS))})?"

REFUSED: tuple[Refused, ...] = (
    Refused(
        f"a ControlNet, {_LOADER}",
        ((r"control_model\.|controlnet_|input_hint_block\.|zero_convs\.",),),
    ),
    Refused(
        # ComfyUI's loader joins and renames such layers one by one, and what belongs to quantized ones is lost on the way.
        "under diffusers' layer names, which ComfyUI cannot read quantized; choose it in Load Model (Learned Rounding) inside ComfyUI, which "
        "gives it ComfyUI's own names (SD1.5 to SDXL, SD3, Flux.1, AuraFlow, PixArt, Z-Image), or give a file that has those names",
        tuple(
            tuple(_PREFIX + mark for mark in marks)
            for marks in (
                (r"joint_transformer_blocks\.0\.attn\.add_k_proj\.weight$",),  # AuraFlow
                (r"adaln_single\.emb\.timestep_embedder\.linear_1\.bias$", r"pos_embed\.proj\.bias$"),  # PixArt
                (r"noise_refiner\.0\.attention\.norm_k\.weight$",),  # Z-Image
                (r"x_embedder\.weight$", r"transformer_blocks\.0\.attn\.add_k_proj\.weight$"),  # Flux
                (r"pos_embed\.proj\.weight$", r"transformer_blocks\.0\.attn\.add_q_proj\.weight$"),  # SD3
                (r"conv_in\.weight$", r"down_blocks\.0\.resnets\.0\.norm1\.weight$"),  # the U-Nets
            )
        ),
    ),
)  # fmt: skip


def refusal(names: Iterable[str]) -> str | None:
    """What a file with tensors of these names is, if it is one to leave as it is; None for models."""
    lines = "\n".join(names)
    return next((kind.is_ for kind in REFUSED if kind.there(lines)), None)
