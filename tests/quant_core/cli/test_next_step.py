"""The sentence after a run names the folder and the loader of the file."""

import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.cli.next_step import ENCODERS, describe_next_step
from learned_rounding.quant_core.recipes import PRESETS

MODEL, CHECKPOINT = ["blocks.0.a.weight"], ["model.diffusion_model.a.weight", "first_stage_model.b.weight"]


CASES = [
    ("somewhere", MODEL, "none"),
    ("somewhere", ["model.diffusion_model.a.weight"], "flux"),
    ("somewhere", CHECKPOINT, "sdxl"),
    ("somewhere", MODEL, "t5xxl"),
    ("models/unet", MODEL, "flux"),
    ("output/diffusion_models/mine", MODEL, "flux"),
    ("output/clip", MODEL, "mistral"),
]


def test_the_next_step_depends_on_the_model_and_its_folder(tmp_path, sentences, subtests):
    tensors = quantize_weight(torch.ones(8, 8), "int8_tensorwise").tensors("a")
    for folder, names, preset in CASES:
        with subtests.test(folder, preset=preset):
            path = tmp_path / folder / "made.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
            sentences(describe_next_step(path, names, preset))


def test_text_encoders_are_presets():
    assert set(ENCODERS) <= set(PRESETS)
    titled = {name for name, preset in PRESETS.items() if "text encoder" in preset.title.lower()}
    assert titled <= set(ENCODERS)
