"""Draw charts and rows of images as one IMAGE, with Pillow, a dependency of ComfyUI."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_bar_chart", "draw_image_rows", "draw_line_chart", "draw_named_bars", "stack_images", "to_image"]

_WIDTH, _HEIGHT = 960, 560  # a node shows them at about half their size
_LEFT, _RIGHT, _TOP, _BOTTOM = 130, 28, 118, 96  # margins of the axes
_TEXT, _TITLE, _LEGEND = 26, 30, 22  # pixels
_CELL, _GAP, _MARGIN = 288, 16, 32
_INK, _FAINT, _GRID = "#1b1b1f", "#5c5c66", "#e3e3e8"
_COLOURS = ("#1f6fd6", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#0b7285")  # they differ in lightness too
_TICKS, _NAMES = 5, 10
# Labels of values that are ∞ (True), or −∞ and NaN (False).
_BAR_LABELS, _BAR_LABEL_LENGTH = {True: "equal", False: "NaN, Inf"}, 116  # pixels
_CHART_LABELS = {True: "equal, bit for bit", False: "NaN or Inf in what was compared"}


def _font(size: int):
    return ImageFont.load_default(size)


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers that include the range."""
    rough = (high - low) / _TICKS or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _name_ticks(names: Sequence[str]) -> Mapping[float, str]:
    """Ticks at 1, 2, 3, … with these names; at most _NAMES of them."""
    return dict(list(enumerate(names, 1))[:: -(-len(names) // _NAMES)])


class _Axes:
    """A drawing with labelled axes, and the mapping from values to its pixels."""

    def __init__(
        self, title: str, x_label: str, y_label: str, width: tuple[float, float], xs: Mapping, ys: Sequence[float]
    ):
        """``width``: range of the x axis; ``xs``: {position: label} of its ticks; ``ys``: ticks of the y axis."""
        self.image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
        self.draw = ImageDraw.Draw(self.image)
        self._width, self._ys = width, ys
        self.draw.text((_MARGIN, 16), title, fill=_INK, font=_font(_TITLE))
        for y in ys:
            self.draw.line([self.at(width[0], y), self.at(width[1], y)], fill=_GRID)
            self.draw.text(
                (_LEFT - 10, self.at(width[0], y)[1]), f"{y:.4g}", fill=_FAINT, font=_font(_TEXT), anchor="rm"
            )
        for x, label in xs.items():
            column = self.at(x, ys[0])
            self.draw.line([column, (column[0], column[1] + 5)], fill=_FAINT)
            self.draw.text((column[0], column[1] + 10), label, fill=_FAINT, font=_font(_TEXT), anchor="mt")
        self.draw.line([self.at(width[0], ys[0]), self.at(width[1], ys[0])], fill=_FAINT)
        middle = (_LEFT + _WIDTH - _RIGHT) // 2
        self.draw.text((middle, _HEIGHT - 10), x_label, fill=_INK, font=_font(_TEXT), anchor="ms")
        self._draw_vertical(y_label, _HEIGHT - _TOP - _BOTTOM, (6, _TOP))

    def _draw_vertical(self, text: str, length: int, corner: tuple[int, int]) -> None:
        """Draw text that reads upwards, centred in a white strip of that length."""
        across = Image.new("RGB", (length, _TEXT + 6), "white")
        ImageDraw.Draw(across).text(
            (across.width // 2, across.height // 2), text, fill=_INK, font=_font(_TEXT), anchor="mm"
        )
        self.image.paste(across.rotate(90, expand=True), corner)

    def label_bar(self, x: float, value: float) -> None:
        """Write a label in place of a bar of a value that is not finite."""
        column, row = self.at(x, 0)
        self._draw_vertical(
            _BAR_LABELS[value == math.inf],
            _BAR_LABEL_LENGTH,
            (round(column) - _TEXT // 2 - 3, max(_TOP, round(row) - _BAR_LABEL_LENGTH - 4)),
        )

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel (column, row) of a point."""
        right = (x - self._width[0]) / (self._width[1] - self._width[0])
        up = (y - self._ys[0]) / (self._ys[-1] - self._ys[0])
        return _LEFT + right * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)


def draw_line_chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[float]]) -> Image.Image:
    """Draw lines over 1, 2, 3, … with a legend. Values that are not finite are skipped; a label says so if there are no others."""
    count = max(map(len, lines.values()))
    finite = [value for line in lines.values() for value in line if math.isfinite(value)]
    ys = _ticks(min(finite, default=0), max(finite, default=1))
    axes = _Axes(title, x_label, y_label, (1, max(count, 2)), _name_ticks([str(x) for x in range(1, count + 1)]), ys)
    if not finite:
        equal = all(value == math.inf for line in lines.values() for value in line)
        axes.draw.text((_WIDTH // 2, _HEIGHT // 2), _CHART_LABELS[equal], fill=_INK, font=_font(_TITLE), anchor="mm")
    for index, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = [axes.at(x, y) for x, y in enumerate(line, 1) if math.isfinite(y)]
        axes.draw.line(points, fill=colour, width=4, joint="curve")
        for x, y in points:
            axes.draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)
        if index < len(_COLOURS):
            left, middle = _LEFT + (_WIDTH - _LEFT) // len(_COLOURS) * index, _TOP - 30
            axes.draw.line([(left, middle), (left + 20, middle)], fill=colour, width=5)
            axes.draw.text((left + 28, middle), name, fill=_INK, font=_font(_LEGEND), anchor="lm")
    return axes.image


def draw_bar_chart(
    title: str, x_label: str, y_label: str, edges: Sequence[float], heights: Sequence[float]
) -> Image.Image:
    """Draw a bar of each height between two adjacent edges."""
    xs = {x: f"{x:.4g}" for x in _ticks(edges[0], edges[-1]) if edges[0] <= x <= edges[-1]}
    return _draw_bars(title, x_label, y_label, edges, heights, xs)


def draw_named_bars(title: str, x_label: str, y_label: str, bars: Mapping[str, float]) -> Image.Image:
    """Draw a bar of each value above its name."""
    edges = [number + 0.5 for number in range(len(bars) + 1)]
    return _draw_bars(title, x_label, y_label, edges, list(bars.values()), _name_ticks(list(bars)), share=0.5)


def _draw_bars(
    title: str, x_label: str, y_label: str, edges, heights, xs: Mapping[float, str], share: float = 1.0
) -> Image.Image:
    """``share``: width of a bar as a fraction of the distance of its edges."""
    finite = [0.0, *(height for height in heights if math.isfinite(height))]
    low, high = min(finite), max(finite)
    axes = _Axes(title, x_label, y_label, (edges[0], edges[-1]), xs, _ticks(low, high if high > low else 1.0))
    for left, right, height in zip(edges, edges[1:], heights, strict=False):
        if not math.isfinite(height):
            axes.label_bar((left + right) / 2, height)
            continue
        margin = (right - left) * (1 - share) / 2
        (x0, y0), (x1, y1) = axes.at(left + margin, 0), axes.at(right - margin, height)
        if height:
            axes.draw.rectangle((x0 + 1, min(y0, y1), max(x1 - 1, x0 + 1), max(y0, y1)), fill=_COLOURS[0])
    return axes.image


def draw_image_rows(columns: Mapping[str, torch.Tensor]) -> Image.Image:
    """Draw columns of images (rows, height, width, 3) in 0…1 side by side under their names."""
    rows, height, width, _ = next(iter(columns.values())).shape
    scale = _CELL / max(height, width)
    cell = (round(width * scale), round(height * scale))
    sheet = Image.new("RGB", (_WIDTH, _TEXT + 24 + rows * (cell[1] + _GAP)), "white")
    for column, (name, images) in enumerate(columns.items()):
        left = _MARGIN + column * (_CELL + _GAP)
        ImageDraw.Draw(sheet).text((left, 8), name, fill=_INK, font=_font(_TEXT))
        for row, image in enumerate(images):
            drawn = Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy())
            sheet.paste(drawn.resize(cell, Image.Resampling.LANCZOS), (left, _TEXT + 24 + row * (cell[1] + _GAP)))
    return sheet


def stack_images(images: Sequence[Image.Image]) -> Image.Image:
    """Stack images vertically."""
    sheet = Image.new("RGB", (_WIDTH, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def to_image(image: Image.Image) -> torch.Tensor:
    """Convert to an IMAGE (1, height, width, 3) in 0…1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]
