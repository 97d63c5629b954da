"""Save Quantized Model: save the result under a name that ComfyUI's loaders find, and verify it."""

from comfy_api.latest import io

from ..quant_core.run.quality_card import make_quality_card
from . import host
from .ui.quality_image import draw_quality_card
from .ui.schema import ComparisonType, QuantizedType, check_inputs, schema, widget

__all__ = ["SaveQuantized"]


class SaveQuantized(io.ComfyNode):
    """Node; its inputs and outputs are described in the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingSave",
            display_name="Save Quantized Model",
            description="Keep a quantized model as a file that ComfyUI's own loaders find, and verify that they read it. Nothing is ever overwritten.",
            inputs=[
                QuantizedType.Input("quantized", tooltip="From Learned Round Quantize."),
                widget(
                    io.String,
                    id="filename_prefix",
                    default=host.MODEL_NAME,
                    tooltip=f"Start of the file name; may contain folders. {host.MODEL_NAME}: the name of the source model. The format is added, "
                    "and a number if the name is taken.",
                ),
                widget(
                    io.Combo,
                    id="folder",
                    options=list(host.SAVE_FOLDERS),
                    default="output",
                    tooltip="output: the output folder, where ComfyUI's loaders look too; models: the models folder itself.",
                ),
                widget(
                    io.Boolean,
                    id="quality_card",
                    default=False,
                    optional=True,
                    tooltip="Also write a quality card beside the file, as .png and .md, for a Hugging Face or Civitai page: model, format, "
                    "size, layers and errors, and the images of a connected comparison.",
                ),
                ComparisonType.Input(
                    "comparison", optional=True, tooltip="From Compare: images and metrics for the quality card."
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file, or the files one a line.")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return check_inputs(host.check_name, filename_prefix)

    @classmethod
    def execute(
        cls, quantized, filename_prefix, folder, quality_card=False, comparison: host.ModelComparison | None = None
    ) -> io.NodeOutput:
        prefix = host.insert_model_name(filename_prefix, cls.hidden.dynprompt, cls.hidden.unique_id)
        saved = host.save_files(quantized, prefix, folder)
        paths = "\n".join(str(path) for path in saved)
        verified = host.verify_saved(quantized, saved)
        host.remember_saved(quantized.key, dict(zip(quantized.files, saved, strict=True)), quantized.report)
        texts = [paths, verified]
        if quality_card:
            card = make_quality_card(quantized.report, saved, comparison and comparison.comparison)
            images = (comparison.reference, comparison.compared) if comparison else (None, None)
            written = host.save_card(saved[0], card.markdown, draw_quality_card(card, *images))
            texts.append(f"Quality card: {' and '.join(path.name for path in written)}")
        return io.NodeOutput(paths, ui={"text": texts})
