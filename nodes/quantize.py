"""Learned Round Quantize: quantize a MODEL, CLIP or file; outputs the quantized MODEL or CLIP and its file."""

from comfy_api.latest import io

from ..quant_core import Recipe
from ..quant_core.events import RunFinished
from . import host
from .ui.progress import NodeProgress
from .ui.schema import CalibrationType, QuantizedType, RecipeType, Source, check_inputs, schema, widget

__all__ = ["LearnedRoundQuantize"]

_WORST = 5  # layers with the largest error in the report


class LearnedRoundQuantize(io.ComfyNode):
    """Node; its inputs and outputs are described in the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingQuantize",
            display_name="Learned Round Quantize (FP8 / INT8 / INT4)",
            description="Quantize a model layer by layer. LoRAs on the incoming MODEL or CLIP are baked in; the incoming one stays usable.",
            inputs=[
                io.MultiType.Input(
                    "source",
                    types=[io.Model, io.Clip, Source],
                    tooltip="A MODEL, a CLIP, or a file from Load Model File for Quantization.",
                ),
                RecipeType.Input(
                    "recipe", optional=True, tooltip="From Configure Quantization; without it FP8 with all defaults."
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip="From Calibrate or Load Calibration: rounds for the real inputs of each layer, which about halves the error of its output. "
                    "Rounding sequential and reconstructed need one with recorded calls (replay_calls).",
                ),
                widget(
                    io.Combo,
                    id="native_int8_kernels",
                    options=list(host.NATIVE_INT8_MODES),
                    default=host.NATIVE_INT8_MODES[0],
                    optional=True,
                    advanced=True,
                    tooltip="This pack's Triton kernels for the MODEL's INT8 (per row or tensor) and W4A8 layers. auto: as in the settings, by "
                    "default for every layer shape where they are faster than ComfyUI's own, measured once; on: always; off: never.",
                ),
                widget(
                    io.Boolean,
                    id="general",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Quantize a model that no preset recognizes by the general rule, and kinds of files that ComfyUI does not load "
                    "quantized. Off: they are refused.",
                ),
                widget(
                    io.Combo,
                    id="devices",
                    options=list(host.DEVICE_CHOICES),
                    default=host.DEVICE_CHOICES[0],
                    optional=True,
                    advanced=True,
                    tooltip="Cards that quantize; the file is the same. auto: all cards of this card's model where that is faster, which is for "
                    "large models and roundings longer than reading the weights; rounding sequential uses this card.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The quantized model, ready for a sampler."),
                io.Clip.Output(display_name="CLIP", tooltip="The quantized text encoder, ready for CLIP Text Encode."),
                QuantizedType.Output(display_name="quantized", tooltip="For Save Quantized Model."),
                io.String.Output(
                    display_name="report",
                    tooltip="What was done, as text; a table in Markdown where ComfyUI renders it.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        # MODEL and CLIP are built only for connected outputs, so connecting one later must run the node again.
        return host.outputs_in_use_of_running_prompt("LearnedRoundingQuantize")

    @classmethod
    def validate_inputs(cls, native_int8_kernels=host.NATIVE_INT8_MODES[0]):
        # ComfyUI then leaves the check of the value to us: workflows of version 0.1.0 hold true or false.
        return check_inputs(host.native_int8_mode, native_int8_kernels)

    @classmethod
    def execute(
        cls,
        source,
        recipe=None,
        calibration=None,
        native_int8_kernels=host.NATIVE_INT8_MODES[0],
        general=False,
        devices=host.DEVICE_CHOICES[0],
    ) -> io.NodeOutput:
        wanted = host.outputs_in_use(cls.hidden.dynprompt, cls.hidden.unique_id)
        with NodeProgress(cls.hidden.unique_id) as progress:
            quantized = host.quantize(
                source, recipe or Recipe(), progress, calibration, general=general, devices=devices
            )
            mode = host.native_int8_mode(native_int8_kernels)
            model = host.build_model(source, quantized, mode) if 0 in wanted else None
            clip = host.build_clip(source, quantized) if 1 in wanted else None
        report = quantized.report
        text = report.markdown(_WORST) if host.renders_markdown() else report.table(_WORST)
        return io.NodeOutput(model, clip, quantized, text, ui=progress.summarize(RunFinished(report)))
