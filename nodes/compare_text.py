"""Node Compare Text Encoders: encode prompts with two CLIPs and compare the conditioning."""

from comfy_api.latest import io, ui

from . import host
from .prompts import prompt_lines
from .ui.drawing import draw_named_bars, to_image
from .ui.schema import check_inputs, schema, widget

__all__ = ["CompareTextEncoders"]


class CompareTextEncoders(io.ComfyNode):
    """Node; its schema describes it."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingCompareText",
            display_name="Compare Quantized Text Encoder",
            description="How far is this text encoder from full precision? Encodes prompts with both CLIPs and compares the conditioning.",
            inputs=[
                io.Clip.Input("reference", tooltip="The full-precision CLIP."),
                io.Clip.Input("compared", tooltip="The quantized CLIP."),
                widget(
                    io.String,
                    id="prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts like those you use, one a line.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="SNR of the conditioning by prompt."),
                io.String.Output(display_name="report", tooltip="All numbers, as a table in markdown."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, prompts=None):
        return check_inputs(prompt_lines, prompts)

    @classmethod
    def execute(cls, reference, compared, prompts) -> io.NodeOutput:
        comparison = host.compare_clips(reference, compared, prompt_lines(prompts))
        bars = {str(number): score["SNR (dB)"] for number, score in enumerate(comparison.scores, 1)}
        plot = to_image(draw_named_bars(comparison.summary, "prompt", "SNR of the conditioning (dB)", bars))
        return io.NodeOutput(plot, comparison.markdown(), ui=ui.PreviewImage(plot, cls=cls))
