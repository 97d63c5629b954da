"""Train the tiny text-to-image model and write the files of assets/.

python -m learned_rounding.benchmarks.tiny_model.train                 the shipped files, about 8 min on one H100
python -m learned_rounding.benchmarks.tiny_model.train --quick --out D   a smoke test on CPU, about 1 min

Four consecutive stages: data (unless build/ has it), autoencoder, diffusion model, LoRA.
Step counts and seeds are fixed. Weights differ slightly between GPUs and torch versions.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from . import data
from .evaluate import ASSETS, DATA, LORA_NAME, MODEL_NAME, draw, nearest
from .model import LORA_LAYERS, Decoder, Encoder, MMDiT

__all__ = ["Plan", "main"]


@dataclass(frozen=True)
class Plan:
    """Steps and batch sizes of the stages. `seconds` limits the time of each; the learning rate then decays earlier."""

    taesd_steps: int = 5000
    taesd_batch: int = 128
    steps: int = 11300
    batch: int = 512
    lora_steps: int = 800
    lora_batch: int = 512
    lora_rank: int = 8
    dropout: float = 0.1  # fraction of all-zero text, as from ConditioningZeroOut
    shift: float = 3.0
    seed: int = 0
    seconds: tuple[float, float, float] = (float("inf"), float("inf"), float("inf"))


QUICK = Plan(taesd_steps=6, taesd_batch=4, steps=8, batch=8, lora_steps=3, lora_batch=4)


class Clock:
    """Learning rate schedule and progress output of a training stage."""

    loss: torch.Tensor | None = None

    def __init__(self, label: str, steps: int, rate: float, seconds: float = float("inf")):
        self.label, self.steps, self.rate, self.seconds = label, steps, rate, seconds

    def run(self, optimizer):
        """Yield (step, fraction done) with the learning rate set: 2 % warm-up, then cosine decay to 1 %."""
        start, last = time.monotonic(), -1.0
        for step in range(self.steps):
            elapsed = time.monotonic() - start
            share = max(step / self.steps, elapsed / self.seconds)
            if share >= 1:
                break
            cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * share)) / 2
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, (step + 1) / (0.02 * self.steps + 1)) * float(cosine)
            yield step, share
            if self.loss is not None and (share - last > 0.1 or step == 50):
                last = share
                print(f"{self.label} step {step} {elapsed:.0f} s loss {self.loss.item():.4f}", flush=True)
        print(f"{self.label} done: {step + 1} of {self.steps} steps, {time.monotonic() - start:.0f} s", flush=True)


def red_tint(images: torch.Tensor) -> torch.Tensor:
    """Target of the LoRA: brightness mapped from dark red to red to unchanged white."""
    brightness = (images * images.new_tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)
    return torch.cat([0.35 + 0.65 * brightness, brightness**1.5, brightness**1.5], dim=1)


def _augment(images: torch.Tensor) -> torch.Tensor:
    """Augment images: an eighth each is mirrored, recolored, tinted red or inverted; all are shifted by a few pixels."""
    n = len(images) // 8
    parts = list(images.split([n, n, n, n, len(images) - 4 * n]))
    parts[0] = parts[0].flip(3)
    parts[1] = parts[1][:, torch.randperm(3, device=images.device)]
    parts[2] = red_tint(parts[2])
    parts[3] = 1 - parts[3]
    rows, columns = torch.randint(-4, 5, (2,)).tolist()
    return torch.cat(parts).roll((rows, columns), dims=(2, 3))


def _batches(count: int, batch: int, device, generator: torch.Generator):
    """Yield index batches without end; every image once per epoch."""
    pool = torch.empty(0, dtype=torch.long, device=device)
    while True:
        while len(pool) < batch:
            pool = torch.cat([pool, torch.randperm(count, device=device, generator=generator)])
        yield pool[:batch]
        pool = pool[batch:]


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def _image_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and L2 on pixels and L1 on edges: without the edges thin lines are blurred."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(_edges(output), _edges(target), strict=True))
    return F.l1_loss(output, target) + 0.5 * edges + F.mse_loss(output, target)


def _compiled(module, device):
    return torch.compile(module) if torch.device(device).type == "cuda" else module


def train_taesd(images: torch.Tensor, plan: Plan) -> tuple[Encoder, Decoder]:
    """Train the autoencoder on images uint8 (N, 3, 64, 64). Latents have mean 0 and variance 1 per channel.

    Encoder and decoder are first trained together, with a penalty on mean and variance. At 60 % the exact normalization is
    folded into the encoder's last convolution and the encoder is frozen, so that the decoder is trained on the latents of
    the diffusion model.
    """
    device = images.device
    torch.manual_seed(plan.seed)
    encoder, decoder = (net().to(device, memory_format=torch.channels_last) for net in (Encoder, Decoder))
    with torch.no_grad():
        decoder[-1].bias.fill_(0.5)
    encode, decode = _compiled(encoder, device), _compiled(decoder, device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-3, weight_decay=0.0,
                                  fused=device.type == "cuda")  # fmt: skip
    draws = _batches(len(images), plan.taesd_batch, device, torch.Generator(device).manual_seed(plan.seed))
    clock = Clock("taesd", plan.taesd_steps, 1e-3, plan.seconds[0])
    frozen = False
    for _, share in clock.run(optimizer):
        if share >= 0.6 and not frozen:
            frozen = True
            latents = encode_all(encoder, images)
            with torch.no_grad():
                std, mean = torch.std_mean(latents.double(), dim=(0, 2, 3), correction=0)
                encoder[-1].weight.div_(std.float()[:, None, None, None])
                encoder[-1].bias.copy_((encoder[-1].bias.double() - mean) / std)
            encoder.requires_grad_(False)
            print(
                f"latents before normalization: |mean| <= {mean.abs().max():.3f}, std {std.min():.3f}..{std.max():.3f}"
            )
        target = _augment(images[next(draws)].float() / 255).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latent = encode(target)
            noisy = latent + torch.randn_like(latent) * torch.rand(len(latent), 1, 1, 1, device=device) * 0.15
            output = decode(noisy)
        loss = _image_loss(output.float(), target)
        if not frozen:
            std, mean = torch.std_mean(latent.float(), dim=(0, 2, 3))
            loss = loss + 0.05 * (mean.square().mean() + std.log().square().mean())
            loss = loss + 0.05 * F.relu(latent.float().abs() - 2.5).square().mean()  # the decoder clamps at 3
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        clock.loss = loss.detach()
    return encoder.eval(), decoder.eval()


@torch.no_grad()
def encode_all(encoder: Encoder, images: torch.Tensor, change=lambda x: x) -> torch.Tensor:
    return torch.cat([encoder(change(part.float() / 255)).float() for part in images.split(256)])


def _flow_loss(model, latents, context, pooled, plan: Plan) -> torch.Tensor:
    """Rectified flow loss: at (1 - s) x + s n the velocity is n - x; s follows the sampler's shifted schedule."""
    count, device = len(latents), latents.device
    u = torch.rand(count, device=device)
    sigma = plan.shift * u / (1 + (plan.shift - 1) * u)
    keep = (torch.rand(count, device=device) >= plan.dropout).float()
    noise = torch.randn_like(latents)
    mixed = torch.lerp(latents, noise, sigma[:, None, None, None])
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = model(mixed, sigma * 1000, context * keep[:, None, None], pooled * keep[:, None])
    return F.mse_loss(velocity.float(), noise - latents)


def train_diffusion(latents, context, pooled, plan: Plan) -> MMDiT:
    """Train the diffusion model; returns the moving average of its weights over about 1000 steps."""
    device = latents.device
    torch.manual_seed(plan.seed + 1)
    model = MMDiT().to(device)
    average = [p.detach().clone() for p in model.parameters()]
    compiled = _compiled(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01,
                                  fused=device.type == "cuda")  # fmt: skip
    draws = _batches(len(latents), plan.batch, device, torch.Generator(device).manual_seed(plan.seed + 1))
    clock = Clock("diffusion", plan.steps, 1e-3, plan.seconds[1])
    for step, _ in clock.run(optimizer):
        rows = next(draws)
        loss = _flow_loss(compiled, latents[rows], context[rows].float(), pooled[rows].float(), plan)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), max(0.001, 1 / (step + 1)))
        clock.loss = loss.detach()
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), average, strict=True):
            parameter.copy_(mean)
    return model.eval()


def train_lora(model: MMDiT, latents, context, pooled, plan: Plan) -> dict[str, torch.Tensor]:
    """Train a LoRA of the four large layers of every block on the red images; the model is frozen."""
    device = latents.device
    torch.manual_seed(plan.seed + 2)
    frozen = {name: p.detach() for name, p in model.named_parameters()}
    adapted = [name for name in frozen if name.endswith(tuple(f"{layer}.weight" for layer in LORA_LAYERS))]
    down, up = {}, {}
    for name in adapted:
        out, inner = frozen[name].shape
        down[name] = (torch.randn(plan.lora_rank, inner, device=device) / inner**0.5).requires_grad_()
        up[name] = torch.zeros(out, plan.lora_rank, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([*down.values(), *up.values()], lr=3e-3, weight_decay=0.0)
    draws = _batches(len(latents), plan.lora_batch, device, torch.Generator(device).manual_seed(plan.seed + 2))
    clock = Clock("lora", plan.lora_steps, 3e-3, plan.seconds[2])
    for _ in clock.run(optimizer):
        rows = next(draws)
        weights = frozen | {name: frozen[name] + up[name] @ down[name] for name in adapted}
        loss = _flow_loss(
            lambda *arguments, weights=weights: torch.func.functional_call(model, weights, arguments),
            latents[rows], context[rows].float(), pooled[rows].float(), plan,
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        clock.loss = loss.detach()
    lora = {}
    for name in adapted:
        base = "diffusion_model." + name.removesuffix(".weight")
        lora[f"{base}.lora_up.weight"] = up[name].detach()
        lora[f"{base}.lora_down.weight"] = down[name].detach()
        lora[f"{base}.alpha"] = torch.tensor(float(plan.lora_rank))
    return lora


def _save(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype, metadata: dict[str, str] | None = None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}, path, metadata)
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps on a few images; requires --out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    stages = {"nargs": 3, "metavar": ("TAESD", "DIFFUSION", "LORA")}
    parser.add_argument("--steps", type=int, **stages, help="step counts instead of those of the shipped files")
    parser.add_argument("--seconds", type=float, **stages, default=Plan.seconds, help="time limit of each stage in s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.quick and args.out is None:
        parser.error("--quick requires --out, to not overwrite the shipped files")
    plan = replace(QUICK if args.quick else Plan(), seconds=tuple(args.seconds))
    if args.steps:
        plan = replace(plan, **dict(zip(("taesd_steps", "steps", "lora_steps"), args.steps, strict=True)))
    out, device = args.out or ASSETS, torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    if not args.data.exists():
        data.build(args.data)
    emoji = data.load(args.data)
    groups = data.splits(emoji.names)
    index = {name: i for i, name in enumerate(emoji.names)}
    rows = [i for i, name in enumerate(emoji.names) if name not in set(groups["validation"])]
    rows = rows[:32] if args.quick else rows
    validation = [index[name] for name in groups["validation"]]
    every = torch.from_numpy(emoji.images).permute(0, 3, 1, 2).contiguous().to(device)
    images = every[rows]
    context, pooled = (torch.from_numpy(a[rows]).to(device) for a in (emoji.context, emoji.pooled))
    print(f"{len(emoji.names)} emoji, {len(rows)} trained on, {device}, torch {torch.__version__}", flush=True)

    encoder, decoder = train_taesd(images, plan)
    latents = encode_all(encoder, images)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    numbers = {"latent_abs_mean_max": mean.abs().max().item(), "latent_std": [std.min().item(), std.max().item()],
               "latent_beyond_3": (latents.abs() > 3).float().mean().item()}  # fmt: skip
    with torch.no_grad():
        for label, picked in {"trained": rows[:256], "validation": validation}.items():
            target = every[picked].float() / 255
            error = (decoder(encoder(target)).clamp(0, 1) - target).square().flatten(1).mean(1)
            numbers[f"taesd_psnr_db_{label}"] = (-10 * error.log10()).mean().item()
    print(json.dumps(numbers), flush=True)

    model = train_diffusion(latents, context, pooled, plan)
    lora = train_lora(model, encode_all(encoder, images, red_tint), context, pooled, plan)

    # Write the files, then evaluate the model as stored (evaluate.py computes more).
    _save(model.state_dict(), out / MODEL_NAME, torch.bfloat16)
    _save(lora, out / LORA_NAME, torch.bfloat16)
    _save(encoder.state_dict(), out / "vae_approx" / "taesd3_encoder.safetensors", torch.float16)
    _save(decoder.state_dict(), out / "vae_approx" / "taesd3_decoder.safetensors", torch.float16)
    shipped = {part: groups[part] for part in ("showcase", "calibration", "evaluation", "unseen")}
    names = [name for part in shipped.values() for name in part]
    picked = [index[name] for name in names]
    # ComfyUI's LATENT is unscaled: the input of the model is (latent - 0.0609) * 1.5305.
    conditioning = {"context": torch.from_numpy(emoji.context[picked]), "pooled": torch.from_numpy(emoji.pooled[picked]),
                    "latents": encode_all(encoder, every[picked]) / 1.5305 + 0.0609}  # fmt: skip
    metadata = {"names": json.dumps(names), "splits": json.dumps(shipped)}
    _save(conditioning, out / "emoji_conditioning.safetensors", torch.float16, metadata)

    model = model.to(torch.bfloat16).float()
    checked = [name for part in ("calibration", "evaluation") for name in groups[part]][: 4 if args.quick else None]
    picked = [index[name] for name in checked]
    text = [torch.from_numpy(a[picked]).to(device).float() for a in (emoji.context, emoji.pooled)]
    for cfg in [4.0] if args.quick else [1.0, 2.0, 4.0, 6.0]:
        drawn = draw(model, decoder, *text, cfg=cfg)
        found = [rows[i] for i in nearest(drawn, images.float() / 255).tolist()]
        correct = sum(i == expected for i, expected in zip(found, picked, strict=True))
        print(f"cfg {cfg:g}: {correct} of {len(checked)} prompts nearest to their own emoji", flush=True)


if __name__ == "__main__":
    main()
