"""Draw a quality card as one image: its facts, both sizes as bars, and sampled images before and after."""

import io
from collections.abc import Iterator

import torch
from PIL import Image, ImageDraw, ImageFont

from ...quant_core.display import human_bytes
from ...quant_core.run.quality_card import QualityCard

__all__ = ["draw_quality_card"]

_WIDTH, _MARGIN = 1200, 48
_LABEL = 280  # width of the labels of rows
_TITLE, _TEXT = 38, 26  # pixels
_LINE = 38
_BAR = 30
_IMAGE, _GAP, _PAIRS = (_WIDTH - 2 * _MARGIN - 16) // 2, 16, 2
_INK, _FAINT, _GRID, _BEFORE, _AFTER = "#1b1b1f", "#5c5c66", "#e3e3e8", "#a8a8b3", "#1f6fd6"
_GLYPHS = str.maketrans({"→": "to", "×": "x", "–": "-", "‖": "|"})  # what Pillow's font lacks


def draw_quality_card(card: QualityCard, reference: torch.Tensor | None, compared: torch.Tensor | None) -> bytes:
    """A PNG of the card; ``reference`` and ``compared``: images (n, height, width, 3) in 0…1 of which the first pairs are drawn."""
    parts = [_draw_head(card), _draw_rows(card)]
    if reference is not None and compared is not None:
        parts += _draw_pairs(reference, compared)
    sheet = Image.new("RGB", (_WIDTH, sum(part.height for part in parts) + _MARGIN), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _font(size: int):
    return ImageFont.load_default(size)


def _wrap(text: str, width: int, size: int) -> Iterator[str]:
    """Lines of ``text`` that fit ``width`` pixels; a word that does not is broken."""
    line, font = "", _font(size)
    for word in text.translate(_GLYPHS).split():
        while word:
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width:
                line, word = joined, ""
            elif line:
                yield line
                line = ""
            else:
                fitting = next((end for end in range(len(word), 1, -1) if font.getlength(word[:end]) <= width), 1)
                yield word[:fitting]
                word = word[fitting:]
    if line:
        yield line


def _draw_head(card: QualityCard) -> Image.Image:
    """Title and format on a dark ground, above a bar for each size."""
    inner = _WIDTH - 2 * _MARGIN
    titles, formats = list(_wrap(card.title, inner, _TITLE)), list(_wrap(card.format, inner, _TEXT))
    dark = _MARGIN + len(titles) * (_TITLE + 10) + len(formats) * _LINE + _MARGIN // 2
    head = Image.new("RGB", (_WIDTH, dark + 2 * _LINE + 2 * (_BAR + 8)), "white")
    draw = ImageDraw.Draw(head)
    draw.rectangle((0, 0, _WIDTH, dark), fill=_INK)
    top = _MARGIN
    for lines, size, step, colour in ((titles, _TITLE, _TITLE + 10, "white"), (formats, _TEXT, _LINE, _GRID)):
        for line in lines:
            draw.text((_MARGIN, top), line, fill=colour, font=_font(size))
            top += step
    top = dark + _LINE
    longest = max(card.bytes_in, card.bytes_out, 1)
    for name, size, colour in (("before", card.bytes_in, _BEFORE), ("after", card.bytes_out, _AFTER)):
        draw.text((_MARGIN, top + _BAR // 2), name, fill=_FAINT, font=_font(_TEXT), anchor="lm")
        right = _MARGIN + 110 + round((inner - 110 - 170) * size / longest)
        draw.rectangle((_MARGIN + 110, top, right, top + _BAR), fill=colour)
        draw.text((right + 12, top + _BAR // 2), human_bytes(size), fill=_INK, font=_font(_TEXT), anchor="lm")
        top += _BAR + 8
    return head


def _draw_rows(card: QualityCard) -> Image.Image:
    """A line for each fact, longer texts on several lines."""
    width = _WIDTH - 2 * _MARGIN - _LABEL
    rows = [("size", card.size), *card.rows]
    wrapped = [(list(_wrap(label, _LABEL - 16, _TEXT)), list(_wrap(text, width, _TEXT))) for label, text in rows]
    heights = [max(map(len, row)) * _LINE + 10 for row in wrapped]
    sheet = Image.new("RGB", (_WIDTH, sum(heights) + _GAP), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for (label, text), height in zip(wrapped, heights, strict=True):
        draw.line((_MARGIN, top, _WIDTH - _MARGIN, top), fill=_GRID)
        for left, lines, colour in ((_MARGIN, label, _FAINT), (_MARGIN + _LABEL, text, _INK)):
            for number, line in enumerate(lines):
                draw.text((left, top + 6 + number * _LINE), line, fill=colour, font=_font(_TEXT))
        top += height
    return sheet


def _draw_pairs(reference: torch.Tensor, compared: torch.Tensor) -> list[Image.Image]:
    """The first images before quantization beside those after it."""
    head = Image.new("RGB", (_WIDTH, 2 * _LINE), "white")
    columns = (_MARGIN, _MARGIN + _IMAGE + _GAP)
    for left, name in zip(columns, ("before", "after"), strict=True):
        ImageDraw.Draw(head).text((left, _LINE), name, fill=_FAINT, font=_font(_TEXT))
    rows = []
    for pair in list(zip(reference, compared, strict=True))[:_PAIRS]:
        height, width, _ = pair[0].shape
        row = Image.new("RGB", (_WIDTH, round(_IMAGE * height / width) + _GAP), "white")
        for left, image in zip(columns, pair, strict=True):
            drawn = Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy())
            row.paste(drawn.resize((_IMAGE, row.height - _GAP), Image.Resampling.LANCZOS), (left, 0))
        rows.append(row)
    return [head, *rows]
