"""Model files in ComfyUI's folders."""

import json

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    from learned_rounding.nodes import host as pack

CHOICE = "diffusion_models/two.safetensors.index.json"
SHARDS = ("two-00001-of-00002.safetensors", "two-00002-of-00002.safetensors")


@pytest.fixture
def models(in_comfyui):
    """ComfyUI's folder of diffusion models, with a model of two shards."""
    folder = in_comfyui / "models" / "diffusion_models"
    folder.mkdir()
    for name in SHARDS:
        write_shard(folder, name, 0)
    places = {f"blocks.{name[4:9]}.weight": name for name in SHARDS}
    (folder / "two.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def write_shard(folder, name: str, seed: int) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    save_file({f"blocks.{name[4:9]}.weight": weight}, folder / name)


def quantize() -> bytes:
    source = pack.FileSource.choose(CHOICE, "sd3")
    return pack.quantize(source, Recipe(rounding="nearest", preset="none"), lambda event: None).files[""].read_bytes()


def test_changed_shard_changes_the_state_and_the_result(models):
    state, made = pack.choice_stamp(CHOICE), quantize()
    assert pack.choice_stamp(CHOICE) == state
    assert quantize() == made
    write_shard(models, SHARDS[1], 1)
    assert pack.choice_stamp(CHOICE) != state
    assert quantize() != made


def test_state_of_a_model_without_one_of_its_shards(models):
    """The missing file is reported when the model is opened."""
    (models / SHARDS[0]).unlink()
    assert len(pack.choice_stamp(CHOICE)) == 4  # the index and the other shard
