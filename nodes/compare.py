"""Compare: sample two MODELs on the same, and see how far apart they are."""

import torch
from comfy_api.latest import io, ui

from . import host
from .ui.drawing import as_image, line_chart, picture_rows, stacked
from .ui.sampling_inputs import only, pairs, sampling_inputs
from .ui.schema import schema

__all__ = ["Compare"]

_ROWS = 4  # of pictures in the plot
_GAIN = 8  # of their difference


class Compare(io.ComfyNode):
    """See the schema."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingCompare",
            display_name="Compare",
            description="How far is this model from full precision? Samples both from the same noise and measures latents step by step, and pictures.",
            search_aliases=["psnr", "ssim", "lpips", "snr", "quality"],
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
                    tooltip="To decode the pictures and to measure them (PSNR, SSIM, and LPIPS where it is installed); "
                    "without it they have the latents' colours, and latents alone are measured.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="reference", tooltip="What the full-precision MODEL sampled."),
                io.Image.Output(display_name="compared", tooltip="What the quantized MODEL sampled."),
                io.Image.Output(display_name="plot", tooltip="SNR by step, and pictures side by side."),
                io.String.Output(display_name="report", tooltip="All numbers, as tables in markdown."),
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
        full, ours, measured = host.compare_models(
            only("reference", reference),
            only("compared", compared),
            pairs(positive, negative),
            latent_image,
            vae=only("vae", vae),
            seed=only("seed", seed),
            steps=only("steps", steps),
            cfg=only("cfg", cfg),
            sampler_name=only("sampler_name", sampler_name),
            scheduler=only("scheduler", scheduler),
        )
        plot = as_image(_plot(full, ours, measured))
        return io.NodeOutput(full, ours, plot, measured.markdown(), ui=ui.PreviewImage(plot, cls=cls))


def _plot(full: torch.Tensor, ours: torch.Tensor, measured):
    lines = {f"prompt {number}": line for number, line in enumerate(measured.steps, 1)}
    chart = line_chart(measured.summary, "step", "SNR of the prediction (dB)", lines)
    shown, made = full[:_ROWS].cpu(), ours[:_ROWS].cpu()
    columns = {"reference": shown, "compared": made, f"difference x{_GAIN}": (shown - made).abs() * _GAIN}
    return stacked([chart, picture_rows(columns)])
