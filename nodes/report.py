"""Report: what Learned Round Quantize did, in markdown and as a picture."""

import math

from comfy_api.latest import io, ui

from ..quant_core.display import human_bytes
from ..quant_core.run.report import Report
from .ui.drawing import as_image, bar_chart, named_bars, stacked
from .ui.schema import QuantizedType, schema

__all__ = ["QuantizationReport"]

_BINS = 30


class QuantizationReport(io.ComfyNode):
    """See the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingReport",
            display_name="Quantization Report",
            description="What became of each layer: errors, sizes and solvers, as tables in markdown and as a picture.",
            search_aliases=["report", "histogram", "error", "size"],
            inputs=[QuantizedType.Input("quantized", tooltip="From Learned Round Quantize.")],
            outputs=[
                io.String.Output(display_name="report", tooltip="Totals and the worst layers, as tables in markdown."),
                io.Image.Output(display_name="picture", tooltip="Errors of the layers, and size before and after."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, quantized) -> io.NodeOutput:
        picture = as_image(_picture(quantized.report))
        return io.NodeOutput(quantized.report.markdown(), picture, ui=ui.PreviewImage(picture, cls=cls))


def _picture(report: Report):
    errors = {
        "relative error of the weight": [layer.weight_error for layer in report.layers],
        "relative error of the output": [
            layer.output_error for layer in report.layers if layer.output_error is not None
        ],
    }
    title = f"{report.format}, rounding {report.rounding}, {len(report.layers)} layers"
    charts = [_histogram(title, label, values) for label, values in errors.items() if values]
    sizes = {"before": report.bytes_in, "after": report.bytes_out}
    title = ", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.items())
    return stacked([*charts, named_bars(title, "", "size (MB)", {name: size / 1e6 for name, size in sizes.items()})])


def _histogram(title: str, label: str, values: list[float]):
    low, high = min(values), max(values)
    width = (high - low) / _BINS or math.ulp(max(high, 1.0))
    counts = [0] * _BINS
    for value in values:
        counts[min(int((value - low) / width), _BINS - 1)] += 1
    return bar_chart(title, label, "layers", [low + index * width for index in range(_BINS + 1)], counts)
