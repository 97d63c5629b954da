"""Node Calibrate: sample with a MODEL in full precision and collect statistics of its input activations."""

from comfy_api.latest import io, ui

from . import host
from .ui.calibration_inputs import (
    earlier_input,
    keep_input,
    memory_input,
    replay_input,
    sensitivity_input,
    step_inputs,
    tokens_input,
)
from .ui.progress import NodeProgress
from .ui.sampling_inputs import pair_conditioning, sampling_inputs, single_value
from .ui.schema import CalibrationType, schema, widget

__all__ = ["Calibrate"]


class Calibrate(io.ComfyNode):
    """Node; its schema describes it."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="LearnedRoundingCalibrate",
            display_name="Calibrate for Quantization",
            description="Sample with the original MODEL as KSampler does and collect statistics of the input activations of its linear layers, "
            "for calibrated rounding. The MODEL stays as it is.",
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The full-precision MODEL that is going to be quantized, with its LoRAs."
                ),
                *sampling_inputs(
                    positive="Prompts like those the model is meant for: one, or a list of several, which is better.",
                    seed="Of the noise and of the choice of tokens; each further image takes the next.",
                    steps="As for KSampler; activations of all steps are collected.",
                ),
                widget(
                    io.Int,
                    id="samples",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Images for each prompt. With four or more in all, every fourth is for validation.",
                ),
                keep_input(),
                tokens_input(256),
                earlier_input(),
                io.Vae.Input(
                    "vae", optional=True, tooltip="To decode the images; without it they have the latents' colours."
                ),
                sensitivity_input(),
                memory_input(),
                replay_input(),
                *step_inputs(),
            ],
            outputs=[
                CalibrationType.Output(display_name="calibration", tooltip="For Learned Round Quantize, or to save."),
                io.Image.Output(display_name="pictures", tooltip="The sampled images."),
                io.String.Output(display_name="summary", tooltip="Size and coverage of the calibration, as text."),
                io.Latent.Output(
                    display_name="latents",
                    is_output_list=True,
                    tooltip="The sampled latents; for the Calibrate node of the last steps.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        samples,
        keep,
        tokens,
        calibration=None,
        vae=None,
        sensitivity=(False,),
        max_vram_gb=(0.0,),
        replay_calls=(0,),
        start_at_step=(0,),
        end_at_step=(10000,),
    ) -> io.NodeOutput:
        model = single_value("model", model)
        with NodeProgress(cls.hidden.unique_id) as progress:
            result, latents, text = host.calibrate_model(
                model,
                pair_conditioning(positive, negative),
                latent_image,
                samples=single_value("samples", samples),
                keep=single_value("keep", keep),
                tokens=single_value("tokens", tokens),
                on_event=progress,
                sensitivity=single_value("sensitivity", sensitivity),
                max_vram_gb=single_value("max_vram_gb", max_vram_gb),
                replay_calls=single_value("replay_calls", replay_calls),
                start_at_step=single_value("start_at_step", start_at_step),
                end_at_step=single_value("end_at_step", end_at_step),
                earlier=single_value("calibration", calibration),
                seed=single_value("seed", seed),
                steps=single_value("steps", steps),
                cfg=single_value("cfg", cfg),
                sampler_name=single_value("sampler_name", sampler_name),
                scheduler=single_value("scheduler", scheduler),
            )
        images = host.decode_images(model, latents, single_value("vae", vae))
        shown = ui.PreviewImage(images, cls=cls).as_dict() | progress.summarize(progress.finished)
        return io.NodeOutput(result, images, text, latents, ui=shown)
