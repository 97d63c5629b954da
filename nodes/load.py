"""Load Model: a model file of ComfyUI's folders as a source; its weights are not read yet."""

from comfy_api.latest import io, ui

from ..quant_core.display import human_bytes
from ..quant_core.errors import QuantizationError, SourceError
from ..quant_core.formats.kinds import quantized_formats
from ..quant_core.recipes import Recipe
from ..quant_core.sources import Source as Weights
from . import host
from .ui.file_inputs import check_file, file_input
from .ui.schema import Source, schema, widget

__all__ = ["LoadModel"]

_ADVICE = "put a model into ComfyUI's folder models/diffusion_models, models/checkpoints or models/text_encoders"


class LoadModel(io.ComfyNode):
    """Node; its inputs and outputs are described in the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingLoadModel",
            display_name="Load Model File for Quantization",
            description="Choose a full-precision model file to quantize. Nothing is loaded into memory: layers stream from disk when they are quantized.",
            inputs=[
                file_input(
                    "model",
                    host.model_files(),
                    tooltip="Diffusion models, checkpoints and text encoders from ComfyUI's model folders: .safetensors, shards by their index, "
                    ".gguf, .ckpt, .pt, .pth, .bin.",
                ),
                widget(
                    io.Combo,
                    id="clip_type",
                    options=host.clip_types(),
                    default=host.clip_types()[0],
                    optional=True,
                    advanced=True,
                    tooltip="For a text encoder whose CLIP output is used: the same choice as in ComfyUI's Load CLIP. Ignored for models.",
                ),
                widget(
                    io.Boolean,
                    id="requantize",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Decode a file that is quantized already by its own scales first. "
                    "Its error stays in the result; the full-precision original is better.",
                ),
            ],
            outputs=[Source.Output(display_name="source", tooltip="For Learned Round Quantize.")],
        )

    @classmethod
    def validate_inputs(cls, model=None):
        return check_file(host.choice_stamp, model, _ADVICE)

    @classmethod
    def fingerprint_inputs(cls, model, clip_type=None, requantize=False):
        return (model, clip_type, requantize, *host.choice_stamp(model))

    @classmethod
    def execute(cls, model, clip_type=None, requantize=False) -> io.NodeOutput:
        source = host.FileSource.choose(model, clip_type or host.clip_types()[0], requantize)
        with host.open_file(source) as weights:
            family, formats, decoded = (
                _describe_family(weights),
                quantized_formats(weights),
                getattr(weights, "layers", {}),
            )
            count, size = len(weights.tensors), human_bytes(sum(info.nbytes for info in weights.tensors.values()))
        if not count:
            raise SourceError(f"{source.path} contains no tensors; choose another file.")
        state = "full precision"
        if formats or decoded:
            state = f"already quantized: {', '.join(formats or decoded)}{'' if formats else ', to be decoded first'}"
        return io.NodeOutput(
            source, ui=ui.PreviewText(f"{source.path.name}: {size}, {count} tensors, {state}\n{family}")
        )


def _describe_family(weights: Weights) -> str:
    """The model family that was detected, with the evidence, or the reason why the model is not quantized."""
    try:
        plan = Recipe().plan(weights, general=False)
        return " ".join((plan.explanation, *plan.warnings))
    except QuantizationError as error:
        return str(error)
