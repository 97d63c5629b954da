"""Node Calibrate Text Encoder: encode prompts with a CLIP in full precision and collect statistics."""

from comfy_api.latest import io

from . import host
from .prompts import prompt_lines
from .ui.calibration_inputs import (
    earlier_input,
    keep_input,
    memory_input,
    replay_input,
    sensitivity_input,
    tokens_input,
)
from .ui.progress import NodeProgress
from .ui.schema import CalibrationType, check_inputs, schema, widget

__all__ = ["CalibrateTextEncoder"]


class CalibrateTextEncoder(io.ComfyNode):
    """Node; its schema describes it."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingCalibrateText",
            display_name="Calibrate Text Encoder for Quantization",
            description="Encode prompts with the original CLIP and collect statistics of the input activations of its linear layers, "
            "for calibrated rounding. The CLIP stays as it is.",
            inputs=[
                io.Clip.Input("clip", tooltip="The full-precision CLIP that is going to be quantized."),
                widget(
                    io.String,
                    id="prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts like those you use, one a line. With four or more, every fourth is for validation; a few dozen are enough.",
                ),
                keep_input(),
                widget(
                    io.Int,
                    id="seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,
                    tooltip="Of the choice of tokens.",
                ),
                tokens_input(256),
                earlier_input(),
                sensitivity_input(),
                memory_input(),
                replay_input(),
            ],
            outputs=[
                CalibrationType.Output(display_name="calibration", tooltip="For Learned Round Quantize, or to save."),
                io.String.Output(display_name="summary", tooltip="Size and coverage of the calibration, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, prompts=None):
        return check_inputs(prompt_lines, prompts)

    @classmethod
    def execute(
        cls, clip, prompts, keep, seed, tokens=256, calibration=None, sensitivity=False, max_vram_gb=0.0, replay_calls=0
    ) -> io.NodeOutput:
        with NodeProgress(cls.hidden.unique_id) as progress:
            result, text = host.calibrate_clip(
                clip,
                prompt_lines(prompts),
                keep=keep,
                tokens=tokens,
                seed=seed,
                on_event=progress,
                sensitivity=sensitivity,
                max_vram_gb=max_vram_gb,
                replay_calls=replay_calls,
                earlier=calibration,
            )
        return io.NodeOutput(result, text, ui=progress.summarize(progress.finished))
