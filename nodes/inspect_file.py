"""Inspect: the contents of a model file, as ``lrq inspect`` prints them."""

from comfy_api.latest import io, ui

from ..quant_core.output import inspect_file
from . import host
from .ui.file_inputs import check_file, file_input
from .ui.schema import schema

__all__ = ["Inspect"]

_ADVICE = "put a .safetensors file into ComfyUI's model folders"


class Inspect(io.ComfyNode):
    """Node; its inputs and outputs are described in the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingInspect",
            display_name="Inspect Model File",
            description="What is in this file, which layers are quantized and how, and will stock ComfyUI load it? Reads the header only.",
            inputs=[
                file_input(
                    "model",
                    host.safetensors_files(),
                    tooltip="A diffusion model, checkpoint or text encoder (.safetensors) from ComfyUI's model folders.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The same text as lrq inspect.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, model=None):
        return check_file(host.choice_stamp, model, _ADVICE)

    @classmethod
    def fingerprint_inputs(cls, model):
        return (model, *host.choice_stamp(model))

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        text = str(inspect_file(host.FileSource.choose(model, "").path))
        return io.NodeOutput(text, ui=ui.PreviewText(text))
