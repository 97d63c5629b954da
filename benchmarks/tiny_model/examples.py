"""Example workflows with the tiny model instead of the public models that they name.

Tests, demo and screenshots have no text encoder and no GPU. Everything else of an example is unchanged.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from learned_rounding.benchmarks.tiny_model.graph import CFG, LORA, MODEL, SIZE, STEPS
from learned_rounding.benchmarks.tiny_model.place import ASSETS, DATASET
from learned_rounding.hosts.workflows import widget_names
from learned_rounding.quant_core import Recipe, quantize_file

__all__ = ["EXAMPLES", "place_further", "with_tiny_model", "with_tiny_parts"]

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
CHECKPOINT, TEXT_ENCODER, QUANTIZED = "tiny_checkpoint.safetensors", "tiny_t5.safetensors", "tiny_int8.safetensors"

# File named by an example → replacement in the same folder of ComfyUI.
FILES = {
    "z_image_turbo_bf16.safetensors": MODEL,
    "z_image_turbo_int8.safetensors": QUANTIZED,
    "pixel_art_style_z_image_turbo.safetensors": LORA,
    "ae.safetensors": "taesd3",
    "sd_xl_base_1.0.safetensors": CHECKPOINT,
    "t5xxl_fp16.safetensors": TEXT_ENCODER,
}
_SAMPLING = {"steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "simple"}
# Node class → widget values.
VALUES = {
    "EmptySD3LatentImage": {"width": SIZE, "height": SIZE},
    "KSampler": _SAMPLING,
    "LearnedRoundingCalibrate": _SAMPLING | {"samples": 4},
    "LearnedRoundingCompare": _SAMPLING,
}
# Node class → largest widget values, where a user has more time.
LIMITS = {"LearnedRoundingCalibrate": {"replay_calls": 8}}
# Node class → replacement: class, widget values, outputs, and the output that replaces the only one of the original.
REPLACED = {
    "CLIPTextEncode": ("LoadTrainingDataset", [DATASET], {"latents": "LATENT", "conditioning": "CONDITIONING"}, 1),
}
# Nodes whose outputs are then unused.
DROPPED = ("CLIPLoader",)


def with_tiny_model(name: str, object_info: Mapping[str, Any]) -> dict:
    """Example in the frontend's format that runs with the files of `place` and :func:`place_further`."""
    return with_tiny_parts(json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8")), object_info)


def with_tiny_parts(workflow: dict, object_info: Mapping[str, Any]) -> dict:
    """Replace models, prompts and sampling settings of a workflow in the frontend's format, in place."""
    dropped = {node["id"] for node in workflow["nodes"] if node["type"] in DROPPED}
    workflow["links"] = [link for link in workflow["links"] if link[1] not in dropped]
    workflow["nodes"] = [node for node in workflow["nodes"] if node["id"] not in dropped]
    for node in workflow["nodes"]:
        node["properties"].pop("models", None)
        if node["type"] in REPLACED:
            _replace(node, workflow["links"])
        else:
            _set_values(node, object_info)
    return workflow


def _replace(node: dict, links: list[list]) -> None:
    node["type"], node["widgets_values"], outputs, slot = REPLACED[node["type"]]
    node["properties"]["Node name for S&R"] = node["type"]
    (old,) = node["outputs"]
    replaced = [{"name": name, "type": kind, "links": []} for name, kind in outputs.items()]
    replaced[slot]["links"] = old["links"]
    node["inputs"], node["outputs"] = [], replaced
    for link in links:
        if link[1] == node["id"]:
            link[2] = slot


def _set_values(node: dict, object_info: Mapping[str, Any]) -> None:
    overrides, limits = VALUES.get(node["type"], {}), LIMITS.get(node["type"], {})
    names = widget_names(object_info[node["type"]]) if overrides or limits else []
    values = node.get("widgets_values") or []
    for index, value in enumerate(values):
        if isinstance(value, str):
            folder, _, file = value.rpartition("/")
            values[index] = "/".join(filter(None, (folder, FILES.get(file, file))))
    for name, value in overrides.items():
        values[names.index(name)] = value
    for name, limit in limits.items():
        index = names.index(name)
        values[index : index + 1] = [min(value, limit) for value in values[index : index + 1]]


def place_further(base: Path) -> None:
    """Write further files below ComfyUI's base directory: a checkpoint and a quantized file of the tiny model, and a random
    T5-XXL of small width.
    """
    models = Path(base) / "models"
    model = load_file(ASSETS / MODEL)
    quantize_file(
        ASSETS / MODEL,
        models / "diffusion_models" / QUANTIZED,
        Recipe(format="int8_tensorwise", convrot=False, rounding="nearest"),
        device="cpu",
    )
    _save(models / "checkpoints" / CHECKPOINT, {f"model.diffusion_model.{key}": value for key, value in model.items()})
    generator = torch.Generator().manual_seed(0)
    wide = {"wi_0": (10240, 16), "wi_1": (10240, 16), "wo": (16, 10240)}  # ComfyUI detects T5-XXL by this width
    parts = {"0.SelfAttention": dict.fromkeys("qkvo", (16, 16)), "1.DenseReluDense": wide}
    encoder = {
        "shared.weight": torch.randn(1000, 16, generator=generator),
        "encoder.final_layer_norm.weight": torch.ones(16),
    }
    for block in range(24):
        for part, shapes in parts.items():
            for name, shape in shapes.items():
                encoder[f"encoder.block.{block}.layer.{part}.{name}.weight"] = torch.randn(shape, generator=generator)
    _save(models / "text_encoders" / TEXT_ENCODER, encoder)


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, path)
