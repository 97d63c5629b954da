"""The shipped tiny model: small enough, complete, and it draws what the prompt names."""

import pytest
import torch
from safetensors.torch import load_file

from learned_rounding.benchmarks.tiny_model.evaluate import nearest, start_noise
from learned_rounding.benchmarks.tiny_model.model import MMDiT, sample
from learned_rounding.benchmarks.tiny_model.place import ASSETS, place, prompt_names, read_conditioning

MODEL = "tiny_mmdit_emoji.safetensors"


def test_the_assets_stay_small():
    files = [path for path in ASSETS.rglob("*") if path.suffix == ".safetensors"]
    assert len(files) == 5
    assert sum(path.stat().st_size for path in files) <= 32e6


def test_placing_writes_what_stock_nodes_read(tmp_path):
    place(tmp_path, prompts=("owl", "rocket"))
    for path in (
        f"diffusion_models/{MODEL}",
        "loras/tiny_lora_red.safetensors",
        "vae_approx/taesd3_decoder.safetensors",
    ):
        assert (tmp_path / "models" / path).is_file()
    for folder in ("datasets/tiny_emoji", "output/tiny_emoji"):
        shard = torch.load(tmp_path / folder / "shard_0000.pkl", weights_only=True)
        assert len(shard["conditioning"]) == len(shard["latents"]) == 2
        cross, options = shard["conditioning"][0][0]
        assert cross.shape == (1, 16, 512) and options["pooled_output"].shape == (1, 512)


def test_an_unknown_prompt_is_named(tmp_path):
    with pytest.raises(KeyError, match="zeppelin"):
        place(tmp_path, prompts=("zeppelin",))


def test_it_draws_the_emoji_that_the_prompt_names():
    model = MMDiT()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(ASSETS / MODEL).items()})
    known = read_conditioning()
    prompts = ["red apple", "owl", "rocket", "guitar", "flag: Japan", "lady beetle"]
    wanted = [prompt_names().index(name) for name in prompts]
    text = read_conditioning(prompts)
    latents = sample(model.eval(), start_noise(len(prompts), "cpu"), text["context"], text["pooled"])
    references = (known["latents"] - 0.0609) * 1.5305  # ComfyUI's SD3 latents → the model's own space
    assert nearest(latents.flatten(1), references.flatten(1)).tolist() == wanted
