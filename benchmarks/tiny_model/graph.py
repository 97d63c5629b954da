"""Workflows with the tiny model for demo, tests and benchmarks, and readers for their outputs."""

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from learned_rounding.benchmarks.tiny_model.model import Decoder
from learned_rounding.benchmarks.tiny_model.place import ASSETS, DATASET
from learned_rounding.hosts.workflows import Graph, Node
from learned_rounding.quant_core.rounding import OPTIONS

MODEL, LORA = "tiny_mmdit_emoji.safetensors", "tiny_lora_red.safetensors"
STEPS, CFG, SIZE = 20, 4.0, 64

__all__ = ["LORA", "MODEL", "TinyGraph", "decode_latents", "latents", "pictures", "psnr"]


class TinyGraph(Graph):
    """Graph with methods for the nodes that workflows of the tiny model use."""

    def load(self, name: str = MODEL) -> Node:
        return self.add("UNETLoader", unet_name=name, weight_dtype="default")

    def source(self, name: str = f"diffusion_models/{MODEL}") -> Node:
        return self.add("LearnedRoundingLoadModel", model=name)

    def load_quantized(self, name: str) -> Node:
        return self.add("LearnedRoundingLoadQuantized", model=f"diffusion_models/{name}")

    def lora(self, model: list, strength: float = 1.0, loader: str = "LoraLoaderModelOnly") -> Node:
        return self.add(loader, model=model, lora_name=LORA, strength_model=strength)

    def calibrate(
        self, model: list, seed: int = 101, steps: int = STEPS, dataset: str = DATASET, batch: int = 1, **options
    ) -> Node:
        """Calibrate with the prompts in ``dataset``, which was placed with this ``batch``."""
        settings = {
            "samples": 1,
            "keep": "full",
            "tokens": 512,
            "seed": seed,
            "steps": steps,
            **self._sampling(dataset, batch),
        }
        return self.add("LearnedRoundingCalibrate", model=model, **{**settings, **options})

    def compare(self, reference: list, compared: list, seed: int = 1, steps: int = STEPS, **options) -> Node:
        """Compare two models with the prompts in ``DATASET``, including decoded images."""
        settings = {
            "seed": seed,
            "steps": steps,
            "vae": self.add("VAELoader", vae_name="taesd3")[0],
            **self._sampling(),
        }
        return self.add("LearnedRoundingCompare", reference=reference, compared=compared, **{**settings, **options})

    def quantize(
        self,
        source: list,
        format: str = "float8_e4m3fn",
        granularity: str = "auto",
        calibration: list | None = None,
        general: bool = False,
        **options,
    ) -> Node:
        chosen = {name: options.pop(name) for name in list(options) if name in (*OPTIONS, "block_size")}
        if chosen:
            options["options"] = self.add("LearnedRoundingOptions", **chosen)[0]
        options = {"preset": "auto", "seed": 0, **options}
        recipe = self.add("LearnedRoundingConfigure", format=format, granularity=granularity, **options)
        optional = {"calibration": calibration} if calibration else {}
        optional |= {"general": True} if general else {}
        return self.add("LearnedRoundingQuantize", source=source, recipe=recipe[0], **optional)

    def save(self, quantized: Node, prefix: str, folder: str = "output") -> Node:
        return self.add("LearnedRoundingSave", quantized=quantized[2], filename_prefix=prefix, folder=folder)

    def sample(self, model: list, prefix: str, seed: int = 1, steps: int = STEPS) -> None:
        """Sample, decode, and save latents and images as ``prefix``."""
        samples = self.add("KSampler", model=model, seed=seed, steps=steps, denoise=1.0, **self._sampling())
        vae = self.add("VAELoader", vae_name="taesd3")
        image = self.add("VAEDecode", samples=samples[0], vae=vae[0])
        self.add("SaveLatent", samples=samples[0], filename_prefix=prefix)
        self.add("SaveImage", images=image[0], filename_prefix=prefix)

    def sample_together(self, model: list, prefix: str, count: int, seed: int = 1) -> None:
        """As :meth:`sample`, ``count`` prompts of a dataset placed with that ``batch`` at once, and without the latents."""
        settings = self._sampling(batch_size=count)
        samples = self.add("KSampler", model=model, seed=seed, steps=STEPS, denoise=1.0, **settings)
        image = self.add("VAEDecode", samples=samples[0], vae=self.add("VAELoader", vae_name="taesd3")[0])
        self.add("SaveImage", images=image[0], filename_prefix=prefix)

    def sample_in_parts(self, model: list, prefix: str, marks: list[int], seed: int = 1) -> None:
        """As :meth:`sample`, in parts that end after the steps ``marks``; their latents are saved as ``prefix-STEP``."""
        samples = self.sample_batch(model, prefix, 1, marks, seed)
        vae = self.add("VAELoader", vae_name="taesd3")
        self.add("SaveImage", images=self.add("VAEDecode", samples=samples, vae=vae[0])[0], filename_prefix=prefix)

    def sample_batch(self, model: list, prefix: str, count: int, marks: list[int], seed: int) -> list:
        """Sample ``count`` latents at once, for a dataset placed with this ``batch``; returns the final ones.

        Latents after each of the steps ``marks`` are saved as ``prefix-STEP``, a batch in one file.
        """
        settings = self._sampling(batch_size=count)
        samples, total = settings.pop("latent_image"), marks[-1]
        for start, stop in zip([0, *marks], marks, strict=False):
            part = self.add(
                "KSamplerAdvanced",
                model=model,
                latent_image=samples,
                add_noise="enable" if start == 0 else "disable",
                noise_seed=seed,
                steps=total,
                start_at_step=start,
                end_at_step=stop,
                return_with_leftover_noise="disable" if stop == total else "enable",
                **settings,
            )
            samples = part[0]
            self.add("SaveLatent", samples=samples, filename_prefix=f"{prefix}-{stop:02}")
        return samples

    def _sampling(self, dataset: str = DATASET, batch_size: int = 1) -> dict:
        """Sampling inputs that KSampler and Calibrate have in common."""
        data = self.add("LoadTrainingDataset", folder_name=dataset)
        negative = self.add("ConditioningZeroOut", conditioning=data[1])
        latent = self.add("EmptySD3LatentImage", width=SIZE, height=SIZE, batch_size=batch_size)
        return {
            "positive": data[1],
            "negative": negative[0],
            "latent_image": latent[0],
            "cfg": CFG,
            "sampler_name": "euler",
            "scheduler": "simple",
        }


def latents(folder: Path, prefix: str) -> np.ndarray:
    """Load the latents that :meth:`TinyGraph.sample` saved as ``prefix`` in the output folder, in the order of prompts."""
    return np.stack([load_file(file)["latent_tensor"].numpy() for file in _find_outputs(folder, f"{prefix}_*.latent")])


@functools.cache
def _load_decoder() -> Decoder:
    decoder = Decoder().eval()
    decoder.load_state_dict(load_file(ASSETS / "vae_approx" / "taesd3_decoder.safetensors"))
    return decoder


def decode_latents(sampled: np.ndarray) -> np.ndarray:
    """Decode latents (…, 16, h, w) to images (…, height, width, 3) as ComfyUI does, without rounding to 8 bits."""
    values = torch.from_numpy(sampled).float().reshape(-1, *sampled.shape[-3:])
    with torch.no_grad():
        images = _load_decoder()((values - 0.0609) * 1.5305).clamp(0, 1)  # SD3 latents → input of the decoder
    return images.movedim(1, -1).double().numpy().reshape(*sampled.shape[:-3], *images.shape[-2:], 3)


def pictures(folder: Path, prefix: str) -> np.ndarray:
    """Load the images saved as ``prefix``: (prompts, height, width, 3) in 0…1."""
    files = _find_outputs(folder, f"{prefix}_*.png")
    return np.stack([np.asarray(Image.open(file).convert("RGB"), dtype=np.float64) / 255 for file in files])


def _find_outputs(folder: Path, pattern: str) -> list[Path]:
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise FileNotFoundError(f"no output {pattern} in {folder}; check that the workflow has run")
    return files


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of images in 0…1; infinite if they are equal."""
    error = np.mean((a - b) ** 2)
    return float("inf") if error == 0 else float(-10 * np.log10(error))
