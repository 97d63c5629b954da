"""Copy the tiny model and its conditioning into a ComfyUI folder; no text encoder is needed.

python -m learned_rounding.benchmarks.tiny_model.place COMFYUI_BASE [--prompt NAME ...] [--dataset NAME] [--output DIR]

The conditioning is written for the stock node LoadTrainingDataset: to `datasets/NAME` in the base folder, and for ComfyUI
0.3.75 to `NAME` in the output folder. The node returns a list, and ComfyUI executes the following nodes once per entry. For
one image per run, write one prompt under a dataset name of its own.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

__all__ = ["ASSETS", "CONDITIONING_NAME", "DATASET", "place", "prompt_names", "prompt_splits", "read_conditioning"]

ASSETS = Path(__file__).resolve().parents[2] / "assets"
CONDITIONING_NAME = "emoji_conditioning.safetensors"
DATASET = "tiny_emoji"
FOLDERS = {
    "tiny_mmdit_emoji.safetensors": "diffusion_models",
    "tiny_lora_red.safetensors": "loras",
    "vae_approx/taesd3_encoder.safetensors": "vae_approx",
    "vae_approx/taesd3_decoder.safetensors": "vae_approx",
}


def _metadata(assets: Path, key: str):
    with safe_open(assets / CONDITIONING_NAME, framework="pt") as file:
        return json.loads(file.metadata()[key])


def prompt_names(assets: Path = ASSETS) -> list[str]:
    """All prompts of the conditioning file, in its order."""
    return _metadata(assets, "names")


def prompt_splits(assets: Path = ASSETS) -> dict[str, list[str]]:
    """Prompts by split: showcase, calibration and evaluation (trained on, disjoint), unseen (not trained on)."""
    return _metadata(assets, "splits")


def read_conditioning(prompts: Iterable[str] | None = None, assets: Path = ASSETS) -> dict[str, torch.Tensor]:
    """Read {"context" (N, 16, 512), "pooled" (N, 512), "latents" (N, 16, 8, 8)} in float32; None reads every prompt.

    `latents` are the encoded training images as ComfyUI's LATENT, without the model's latent scaling.

    Raises:
        KeyError: a prompt is not in the conditioning file.
    """
    names = prompt_names(assets)
    requested = names if prompts is None else list(prompts)
    unknown = [name for name in requested if name not in names]
    if unknown:
        raise KeyError(f"no conditioning for {unknown}; choose from the {len(names)} names of prompt_names()")
    rows = [names.index(name) for name in requested]
    with safe_open(assets / CONDITIONING_NAME, framework="pt") as file:
        return {key: file.get_tensor(key)[rows].float() for key in ("context", "pooled", "latents")}


def place(
    comfy_base_dir: str | Path,
    *,
    output_dir: str | Path | None = None,
    prompts: Iterable[str] | None = None,
    dataset: str = DATASET,
    batch: int = 1,
    assets: Path = ASSETS,
) -> list[Path]:
    """Copy the files into `comfy_base_dir` and write the conditioning of `prompts`; returns all written paths.

    `output_dir` is ComfyUI's output folder, `<base>/output` by default. Each entry of the dataset has `batch` prompts, for a
    batch of as many latents.
    """
    base = Path(comfy_base_dir)
    written = []
    for source, folder in FOLDERS.items():
        target = base / "models" / folder / Path(source).name
        target.parent.mkdir(parents=True, exist_ok=True)
        written.append(Path(shutil.copyfile(assets / source, target)))

    tensors = read_conditioning(prompts, assets)
    parts = {name: [part.clone() for part in tensor.split(batch)] for name, tensor in tensors.items()}
    shard = {
        "latents": [{"samples": part} for part in parts["latents"]],
        "conditioning": [
            [[context, {"pooled_output": pooled}]]
            for context, pooled in zip(parts["context"], parts["pooled"], strict=True)
        ],
    }
    count = len(shard["latents"])
    for folder in (base / "datasets" / dataset, Path(output_dir or base / "output") / dataset):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(shard, folder / "shard_0000.pkl")
        about = {"num_samples": count, "num_shards": 1, "shard_size": count}
        (folder / "metadata.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
        written += [folder / "shard_0000.pkl", folder / "metadata.json"]
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?", help="ComfyUI's folder, or its --base-directory")
    parser.add_argument(
        "--prompt", action="append", help="name of a prompt in the conditioning file; repeatable; default: all"
    )
    parser.add_argument("--dataset", default=DATASET, help="folder name in LoadTrainingDataset")
    parser.add_argument("--output", type=Path, help="ComfyUI's output folder, if not BASE/output")
    parser.add_argument("--list", action="store_true", help="print the prompts and exit")
    args = parser.parse_args()
    if args.list:
        print(json.dumps(prompt_splits(), indent=1))
        return
    if args.base is None:
        parser.error("the ComfyUI folder is missing; give it, or --list")
    for path in place(args.base, output_dir=args.output, prompts=args.prompt, dataset=args.dataset):
        print(path)


if __name__ == "__main__":
    main()
