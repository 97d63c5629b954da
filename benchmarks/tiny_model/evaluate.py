"""Evaluate the model: sample prompts and find the training image nearest to each sample.

python -m learned_rounding.benchmarks.tiny_model.evaluate [--cfg 4] [--json FILE]     (files in assets/, data in build/)
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from .data import load, splits
from .model import Decoder, MMDiT, sample

__all__ = ["ASSETS", "DATA", "LORA_NAME", "MODEL_NAME", "draw", "draw_sheet", "merge_lora", "nearest", "start_noise"]

ROOT = Path(__file__).resolve().parents[2]
ASSETS, DATA = ROOT / "assets", ROOT / "build" / "tiny_model" / "emoji.npz"
MODEL_NAME, LORA_NAME = "tiny_mmdit_emoji.safetensors", "tiny_lora_red.safetensors"


def start_noise(count: int, device, seed: int = 0) -> torch.Tensor:
    """Initial noise (count, 16, 8, 8); each image has its own seed and does not depend on the batch size."""
    noise = [torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    return torch.stack(noise).to(device)


def draw(model, decoder, context, pooled, *, steps: int = 20, cfg: float = 4.0, seed: int = 0) -> torch.Tensor:
    """Sample images (B, 3, 64, 64) in [0, 1] for text features, in float32."""
    noise = start_noise(len(context), context.device, seed)
    with torch.no_grad():
        return decoder(sample(model, noise, context, pooled, steps=steps, cfg=cfg)).clamp(0, 1)


def nearest(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Index of the reference (R, 3, 64, 64) with the smallest pixel L2 distance to each image."""
    return torch.cdist(images.flatten(1), references.flatten(1)).argmin(1)


def merge_lora(weights: dict[str, torch.Tensor], lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict with W + up @ down * alpha / rank, as the stock LoRA loader computes it."""
    merged = dict(weights)
    for key in lora:
        if key.endswith(".lora_up.weight"):
            base = key.removesuffix(".lora_up.weight")
            up, down, alpha = lora[key], lora[f"{base}.lora_down.weight"], lora[f"{base}.alpha"]
            name = f"{base.removeprefix('diffusion_model.')}.weight"
            merged[name] = weights[name] + (up.float() @ down.float()) * (alpha.float() / down.shape[0])
    return merged


def draw_sheet(path: Path, columns: list[tuple[str, list[np.ndarray]]], rows: list[str], per_line: int = 8) -> None:
    """Write a PNG with one column per name: its images, labelled by ``rows``, and the name below."""
    from PIL import Image, ImageDraw

    tile, text, left = 80, 24, 62
    height = len(rows) * tile + text
    lines = -(-len(columns) // per_line)
    sheet = Image.new("RGB", (left + per_line * tile, lines * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, images) in enumerate(columns):
        x, y = left + (i % per_line) * tile, (i // per_line) * height
        for j, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((tile - 6, tile - 6), Image.Resampling.LANCZOS)
            sheet.paste(enlarged, (x + 3, y + j * tile + 3))
            if i % per_line == 0:
                pen.text((2, y + j * tile + tile // 2 - 6), rows[j], fill="gray")
        half = len(name) > 14 and (name.rfind(" ", 0, 14) if " " in name[:14] else 14)
        label = f"{name[:half]}\n{name[half:].strip()[:14]}" if half else name
        pen.multiline_text((x + 3, y + len(rows) * tile - 2), label, fill="black", font_size=9, spacing=1)
    sheet.save(path, optimize=True)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Convert images (B, 3, H, W) in [0, 1] to uint8 (B, H, W, 3)."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def main() -> None:
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 2.0, 4.0, 6.0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sheet", type=Path, help="write the sample sheet to this file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    device = args.device
    emoji = load(args.data)
    groups = splits(emoji.names)
    index = {name: i for i, name in enumerate(emoji.names)}
    trained = [i for i, name in enumerate(emoji.names) if name not in set(groups["validation"])]
    images = torch.from_numpy(emoji.images).permute(0, 3, 1, 2).to(device).float() / 255

    def features(names):
        rows = [index[name] for name in names]
        return (torch.from_numpy(a[rows]).to(device).float() for a in (emoji.context, emoji.pooled))

    weights = {k: v.to(device).float() for k, v in load_file(args.assets / MODEL_NAME).items()}
    model, decoder = MMDiT().to(device).eval(), Decoder().to(device).eval()
    model.load_state_dict(weights)
    decoder.load_state_dict(load_file(args.assets / "vae_approx" / "taesd3_decoder.safetensors"))

    checked = groups["calibration"] + groups["evaluation"]
    expected = torch.tensor([index[name] for name in checked], device=device)
    candidates = torch.tensor(trained, device=device)
    scores = {}
    for cfg in args.cfg:
        drawn = draw(model, decoder, *features(checked), steps=args.steps, cfg=cfg)
        found = candidates[nearest(drawn, images[candidates])]
        error = (drawn - images[expected]).pow(2).flatten(1).mean(1)
        scores[cfg] = {
            "found": int((found == expected).sum()),
            "of": len(checked),
            "median_psnr_db": round(float(-10 * error.median().log10()), 2),
            "missed": {checked[i]: emoji.names[found[i]] for i in (found != expected).nonzero().flatten().tolist()},
        }
        print(f"cfg {cfg:g}: {json.dumps(scores[cfg])}", flush=True)

    if args.sheet:
        shown = groups["showcase"] + checked[:16]
        plain = to_pixels(draw(model, decoder, *features(shown), steps=args.steps))
        model.load_state_dict(
            merge_lora(weights, {k: v.to(device) for k, v in load_file(args.assets / LORA_NAME).items()})
        )
        red = to_pixels(draw(model, decoder, *features(shown), steps=args.steps))
        columns = [(name, [emoji.images[index[name]], plain[i], red[i]]) for i, name in enumerate(shown)]
        draw_sheet(args.sheet, columns, ["training\nimage", "sampled", "with LoRA"])
    if args.json:
        result = {"scores": scores, "steps": args.steps, "device": str(device), "torch": torch.__version__}
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
