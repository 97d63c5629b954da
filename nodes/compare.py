"""Node Compare: sample with two MODELs from the same noise and compare latents and images."""

import dataclasses

from comfy_api.latest import io, ui

from ..quant_core.comparison import Comparison, format_value
from . import host
from .ui.drawing import draw_image_rows, draw_line_chart, stack_images, to_image
from .ui.progress import COMPARISON
from .ui.sampling_inputs import pair_conditioning, sampling_inputs, single_value
from .ui.schema import ComparisonType, schema

__all__ = ["Compare"]

_ROWS = 2  # images per column of the plot, which is readable on a node then
_GAIN = 8  # factor of the difference image


class Compare(io.ComfyNode):
    """Node; its schema describes it."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingCompare",
            display_name="Compare Quantized Model",
            description="How far is this model from full precision? Samples both from the same noise and measures latents step by step, and images.",
            is_input_list=True,
            inputs=[
                io.Model.Input("reference", tooltip="The full-precision MODEL."),
                io.Model.Input("compared", tooltip="The quantized MODEL."),
                *sampling_inputs(
                    positive="One prompt, or a list of several, which is better.",
                    seed="Of the noise, the same for both; each further prompt takes the next.",
                    steps="As for KSampler; both are compared after each.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="To decode the images and to measure them (PSNR, SSIM, and LPIPS where it is installed); "
                    "without it they have the latents' colours, and latents alone are measured.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="reference",
                    tooltip="What the full-precision MODEL sampled, an image per prompt; for image_a of ComfyUI's Compare Images.",
                ),
                io.Image.Output(
                    display_name="compared",
                    tooltip="What the quantized MODEL sampled, in the same order; for image_b of ComfyUI's Compare Images.",
                ),
                io.Image.Output(display_name="plot", tooltip="SNR by step, and images side by side."),
                io.String.Output(display_name="report", tooltip="All numbers, as tables in markdown."),
                ComparisonType.Output(
                    display_name="comparison", tooltip="Metrics and images, for the quality card of Save Quantized."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        reference,
        compared,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        vae=None,
    ) -> io.NodeOutput:
        found = host.compare_models(
            single_value("reference", reference),
            single_value("compared", compared),
            pair_conditioning(positive, negative),
            latent_image,
            vae=single_value("vae", vae),
            seed=single_value("seed", seed),
            steps=single_value("steps", steps),
            cfg=single_value("cfg", cfg),
            sampler_name=single_value("sampler_name", sampler_name),
            scheduler=single_value("scheduler", scheduler),
        )
        plot = to_image(_draw_plot(found))
        shown = {**ui.PreviewImage(plot, cls=cls).as_dict(), COMPARISON: [_summarize(found.comparison)]}
        return io.NodeOutput(found.reference, found.compared, plot, found.comparison.markdown(), found, ui=shown)


def _summarize(comparison: Comparison) -> dict:
    """What the node's panel shows, as JSON."""
    assert comparison.costs is not None
    return {
        "scores": {name: format_value(value, name) for name, value in comparison.means.items()},
        "models": [dataclasses.asdict(cost) for cost in comparison.costs],
        "notes": comparison.notes,
    }


def _draw_plot(found: host.ModelComparison):
    """Draw the SNR per step, and the first images with their difference."""
    lines = {f"prompt {number}": line for number, line in enumerate(found.comparison.steps, 1)}
    chart = draw_line_chart(found.comparison.summary, "step", "latent SNR (dB)", lines)
    reference, compared = found.reference[:_ROWS].cpu(), found.compared[:_ROWS].cpu()
    columns = {
        "reference": reference,
        "compared": compared,
        f"difference x{_GAIN}": (reference - compared).abs() * _GAIN,
    }
    return stack_images([chart, draw_image_rows(columns)])
