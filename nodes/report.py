"""Quantization Report: the report of a run as markdown and as an image."""

import math

from comfy_api.latest import io, ui
from PIL import Image

from ..quant_core.display import human_bytes
from ..quant_core.run.report import Report
from .ui.drawing import draw_bar_chart, draw_named_bars, stack_images, to_image
from .ui.schema import QuantizedType, schema

__all__ = ["QuantizationReport"]

_BINS = 30


class QuantizationReport(io.ComfyNode):
    """Node; its inputs and outputs are described in the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingReport",
            display_name="Quantization Report",
            description="Errors, sizes and solvers of all layers, as tables in Markdown and as an image.",
            inputs=[QuantizedType.Input("quantized", tooltip="From Learned Round Quantize.")],
            outputs=[
                io.String.Output(display_name="report", tooltip="Totals and the worst layers, as tables in markdown."),
                io.Image.Output(display_name="picture", tooltip="Errors of the layers, and size before and after."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, quantized) -> io.NodeOutput:
        image = to_image(_draw_report(quantized.report))
        return io.NodeOutput(quantized.report.markdown(), image, ui=ui.PreviewImage(image, cls=cls))


def _draw_report(report: Report) -> Image.Image:
    """Histograms of the layers' errors above bars of the sizes before and after."""
    errors = {
        "relative error of the weight": [layer.weight_error for layer in report.layers],
        "relative error of the output": [
            layer.output_error for layer in report.layers if layer.output_error is not None
        ],
    }
    title = f"{report.format}, rounding {report.rounding}, {len(report.layers)} layers"
    charts = [_draw_histogram(title, label, values) for label, values in errors.items() if values]
    sizes = {"before": report.bytes_in, "after": report.bytes_out}
    title = ", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.items())
    return stack_images(
        [*charts, draw_named_bars(title, "", "size (MB)", {name: size / 1e6 for name, size in sizes.items()})]
    )


def _draw_histogram(title: str, label: str, values: list[float]) -> Image.Image:
    """Number of layers by error."""
    low, high = min(values), max(values)
    width = (high - low) / _BINS or math.ulp(max(high, 1.0))
    counts = [0] * _BINS
    for value in values:
        counts[min(int((value - low) / width), _BINS - 1)] += 1
    return draw_bar_chart(title, label, "layers", [low + index * width for index in range(_BINS + 1)], counts)
