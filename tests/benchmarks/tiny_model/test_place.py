"""Placement of the shipped tiny model in a ComfyUI folder."""

import pytest
import torch

from learned_rounding.benchmarks.tiny_model.place import ASSETS, place, read_conditioning

MODEL = "tiny_mmdit_emoji.safetensors"


def test_assets_are_small():
    files = [path for path in ASSETS.rglob("*") if path.suffix == ".safetensors"]
    assert len(files) == 5
    assert sum(path.stat().st_size for path in files) <= 32e6


def test_place_writes_files_for_stock_nodes(tmp_path):
    place(tmp_path, prompts=("owl", "rocket"))
    for path in (
        f"diffusion_models/{MODEL}",
        "loras/tiny_lora_red.safetensors",
        "vae_approx/taesd3_decoder.safetensors",
    ):
        assert (tmp_path / "models" / path).is_file()
    for folder in ("datasets/tiny_emoji", "output/tiny_emoji"):
        shard = torch.load(tmp_path / folder / "shard_0000.pkl", weights_only=True)
        assert len(shard["conditioning"]) == 2
        assert len(shard["latents"]) == 2
        cross, options = shard["conditioning"][0][0]
        assert cross.shape == (1, 16, 512)
        assert options["pooled_output"].shape == (1, 512)


def test_batched_dataset_has_one_entry_with_all_prompts(tmp_path):
    place(tmp_path, prompts=("owl", "rocket"), batch=2)
    shard = torch.load(tmp_path / "datasets/tiny_emoji/shard_0000.pkl", weights_only=True)
    ((cross, options),) = shard["conditioning"][0]
    expected = read_conditioning(("owl", "rocket"))
    assert len(shard["conditioning"]) == 1
    assert len(shard["latents"]) == 1
    assert torch.equal(cross, expected["context"])
    assert torch.equal(options["pooled_output"], expected["pooled"])


def test_unknown_prompt_is_reported(tmp_path):
    with pytest.raises(KeyError, match="zeppelin"):
        place(tmp_path, prompts=("zeppelin",))
