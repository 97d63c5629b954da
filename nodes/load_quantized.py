"""Load Quantized Model: a quantized file in any readable format, also one that this ComfyUI cannot run itself."""

from comfy_api.latest import io, ui

from . import host
from .ui.file_inputs import check_file, file_input
from .ui.schema import schema, widget

__all__ = ["LoadQuantized"]

_ADVICE = "save one with Save Quantized, or put one into ComfyUI's model folders"


class LoadQuantized(io.ComfyNode):
    """Node; its inputs and outputs are described in the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingLoadQuantized",
            display_name="Load Quantized Model",
            description="Load a quantized file, also in a format that this ComfyUI cannot run by itself: its layers are then decoded as they run.",
            inputs=[
                file_input(
                    "model",
                    host.safetensors_files(),
                    tooltip="A quantized diffusion model, checkpoint or text encoder (.safetensors) from ComfyUI's model folders.",
                ),
                widget(
                    io.Combo,
                    id="clip_type",
                    options=host.clip_types(),
                    default=host.clip_types()[0],
                    optional=True,
                    advanced=True,
                    tooltip="For a text encoder: the same choice as in ComfyUI's Load CLIP. Ignored for models.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model of a diffusion model file or a checkpoint."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder of a text encoder file or a checkpoint."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model=None):
        return check_file(host.choice_stamp, model, _ADVICE)

    @classmethod
    def fingerprint_inputs(cls, model, clip_type=None):
        return (model, clip_type, *host.choice_stamp(model))

    @classmethod
    def execute(cls, model, clip_type=None) -> io.NodeOutput:
        source = host.FileSource.choose(model, clip_type or host.clip_types()[0])
        outputs = host.load_quantized(source)
        text = f"{source.path.name}: {host.describe_formats(source.path)}"
        return io.NodeOutput(*outputs, ui=ui.PreviewText(text))
