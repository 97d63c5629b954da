"""The table of ``lrq bench``: what ComfyUI does with every format on a card, and how long layers of some shapes take there."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ..formats import FORMATS, Codec, FormatConfig, Smoothing
from ..formats.cards import describe_support, parse_card
from ..recipes import Recipe
from ..recipes.presets import COMMON
from ..sources import Source
from .candidates import BLOCKS, EIGHT_BITS, FEW_BITS, FEWER_ACTIVATION_BITS, MICROSCALING, find_codec
from .card_times import UNQUANTIZED, CardTimes

__all__ = ["FLUX_SHAPES", "describe_card", "find_shapes", "measure_card", "summarize_card"]

# (out, in) of the layers of Flux.1 that preset flux quantizes.
FLUX_SHAPES = ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360))
_FORMATS = tuple(
    dict.fromkeys(
        (
            *EIGHT_BITS,
            *FEW_BITS,
            FEWER_ACTIVATION_BITS,
            MICROSCALING,
            *BLOCKS,
            *map(FormatConfig, FORMATS),
            FormatConfig("asym_w4a8_int8", bits=6),
        )
    )
)


def find_shapes(source: Source) -> list[tuple[int, int]]:
    """Shapes (out, in) of the layers of a model that ComfyUI reads quantized, in order of the file."""
    plan = Recipe().plan(source, preset=COMMON, general=True)
    shapes = (source.tensors[name].shape for name in plan.names("quantize"))
    return list(dict.fromkeys((shape[0], shape[1]) for shape in shapes if len(shape) == 2))


def measure_card(times: CardTimes, shapes: Iterable[tuple[int, int]]) -> None:
    """Measure what is missing of layers of these shapes (out, in) in every format."""
    for shape in shapes:
        for codec in (None, *_find_codecs(shape)):
            times.find(codec, shape)


def _find_codecs(shape: tuple[int, int]) -> Iterator[Codec]:
    """The codecs of a layer, with and without smoothing."""
    for codec in filter(None, (find_codec(format, shape) for format in _FORMATS)):
        yield codec
        if codec.format.smoothed_since:
            yield replace(codec, smoothing=Smoothing(torch.ones(shape[1])))


def summarize_card(times: CardTimes) -> dict[str, object]:
    """The table as plain values: :meth:`CardTimes.to_dict`, and what ComfyUI does with each format, which is not measured."""
    return {**times.to_dict(), "formats": _find_support(times)}


def _find_support(times: CardTimes) -> dict[str, str]:
    capability = parse_card(times.capability)
    return {str(format): describe_support(format.codec, capability) for format in _FORMATS}


def describe_card(times: CardTimes) -> str:
    """The table as text."""
    software = ", ".join(f"{name} {text}" for name, text in times.versions.items())
    lines = [
        f"{times.card or 'card'}, SM {times.capability}; {software or 'not measured'}",
        "",
        "Stock ComfyUI 0.33, from its source, not measured:",
    ]
    support = _find_support(times)
    width = max(map(len, support))
    lines += [f"  {name:<{width}}  {text}" for name, text in support.items()]
    for shape in dict.fromkeys(shape for _, shape in times.times):
        whole = times.times.get((UNQUANTIZED, shape))
        lines += ["", f"{shape[0]}×{shape[1]}, {times.tokens} tokens:"]
        for (name, its), time in times.times.items():
            if its == shape:
                ratio = f"{time / whole:6.2f}×" if time and whole else ""
                lines.append(f"  {name:<{width}}  " + (f"{time:8.3f} ms {ratio}" if time else "not measured"))
    return "\n".join(lines)
