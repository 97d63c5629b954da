"""The shipped workflow files run as they are, given the tiny model."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from learned_rounding.benchmarks.tiny_model.graph import MODEL, pictures, psnr
from learned_rounding.hosts.server import PACK
from learned_rounding.hosts.workflows import to_api
from learned_rounding.quant_core.checkpoints import verify_file

WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def other_files(comfy):
    """The text encoder and the checkpoint that two of the examples name."""
    models = comfy.models_dir
    made = {f"model.diffusion_model.{key}": value for key, value in load_file(models / "diffusion_models" / MODEL).items()}
    _put(models / "checkpoints" / "tiny_checkpoint.safetensors", made)
    wide = {"wi_0": (10240, 16), "wi_1": (10240, 16), "wo": (16, 10240)}  # by its width T5-XXL is known
    shapes = {"0.SelfAttention": dict.fromkeys("qkvo", (16, 16)), "1.DenseReluDense": wide}
    made = {"shared.weight": torch.randn(1000, 16), "encoder.final_layer_norm.weight": torch.ones(16)}
    for block in range(24):
        for part, names in shapes.items():
            for name, shape in names.items():
                made[f"encoder.block.{block}.layer.{part}.{name}.weight"] = torch.randn(shape)
    _put(models / "text_encoders" / "tiny_t5.safetensors", made)


def _put(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, path)


@pytest.mark.usefixtures("other_files")
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_runs_unchanged(comfy, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    result = comfy.queue(to_api(workflow, comfy.object_info()))
    shown = [entry["text"] for entry in result.outputs.values() if "text" in entry]
    texts = [text[0] for text in shown]
    saved = [text for text in shown if text[0].endswith(".safetensors")]
    assert len(saved) == 1 and verify_file(saved[0][0]).layers > 30
    assert saved[0][1].startswith("Verified: ")
    assert any("layers quantized" in text for text in texts)
    if any(node["type"] == "LearnedRoundingCompare" for node in workflow["nodes"]):
        (means,) = (line for text in texts for line in text.splitlines() if line.startswith("| mean |"))
        assert float(means.split(" | ")[2]) > 30  # PSNR
    if any(node.get("widgets_values") == ["original"] for node in workflow["nodes"]):
        assert psnr(pictures(comfy.output_dir, "original"), pictures(comfy.output_dir, "quantized")) > 20


def test_the_examples_are_in_the_template_browser_with_a_picture_each(comfy):
    listed = comfy.get("/workflow_templates")
    assert {path.stem for path in WORKFLOWS} == set(listed["learned_rounding"])
    for path in WORKFLOWS:
        with Image.open(path.with_suffix(".jpg")) as picture:
            assert picture.format == "JPEG" and min(picture.size) >= 360
