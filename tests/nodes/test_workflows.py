"""The shipped workflow files run as they are, given the tiny model."""

import json
from pathlib import Path

import pytest

from learned_rounding.benchmarks.tiny_model.graph import pictures, psnr
from learned_rounding.hosts.server import PACK
from learned_rounding.hosts.workflows import to_api
from learned_rounding.quant_core.checkpoints import verify_file

WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_runs_unchanged(comfy, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    result = comfy.queue(to_api(workflow, comfy.object_info()))
    texts = [entry["text"][0] for entry in result.outputs.values() if "text" in entry]
    saved = [Path(text) for text in texts if text.endswith(".safetensors")]
    assert len(saved) == 1 and verify_file(saved[0]).layers > 30
    assert any("layers quantized" in text for text in texts)
    if any(node["type"] == "SaveImage" for node in workflow["nodes"]):
        assert psnr(pictures(comfy.output_dir, "original"), pictures(comfy.output_dir, "quantized")) > 20


def test_the_examples_are_in_the_template_browser(comfy):
    listed = comfy.get("/workflow_templates")
    assert {path.stem for path in WORKFLOWS} == set(listed["learned_rounding"])
