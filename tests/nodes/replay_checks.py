"""Checks of in_process.py: recorded calls of small models of ComfyUI, run again through the diffusion model or text encoder."""

import gc
import sys
from pathlib import Path

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import folder_paths
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.patcher_extension import WrappersMP
from pack.nodes import host
from pack.nodes.host.recording import live_arguments
from pack.quant_core.errors import CalibrationError, OutputError, SourceError

DEVICE = comfy.model_management.get_torch_device()
SAMPLING = {"steps": 3, "cfg": 5.0, "sampler_name": "euler", "scheduler": "simple"}
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 128, "num_heads": 2,
    "context_in_dim": 64, "vec_in_dim": 32, "mlp_ratio": 2.0, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 24, 24],
    "theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
FLUX2 = FLUX | {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None, "theta": 2000,
    "axes_dim": [16, 16, 16, 16], "qkv_bias": False, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True,
    "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
}  # fmt: skip
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "use_spatial_transformer": True,
    "legacy": False, "adm_in_channels": None, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 2,
    "num_head_channels": -1, "transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1],
    "use_linear_in_transformer": False, "context_dim": 64, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 128, "ffn_dim": 256, "num_layers": 2, "num_heads": 1, "in_dim": 16,
    "out_dim": 16, "patch_size": (1, 2, 2), "freq_dim": 64, "text_dim": 64, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
# Name → (class in comfy.supported_models, its configuration, shape of the latents).
MODELS = {
    "unet": ("SD15", UNET, (1, 4, 16, 16)),
    "flux": ("Flux", FLUX, (2, 16, 8, 12)),
    "flux2": ("Flux2", FLUX2, (1, 128, 6, 4)),
    "wan": ("WAN21_T2V", WAN, (1, 16, 3, 8, 8)),
}


class Hints(comfy.controlnet.ControlBase):
    """ControlNet whose results are random; an entry of a U-Net may be None."""

    def __init__(self, shape: tuple[int, ...], kind: str):
        super().__init__()
        self.shape, self.kind = shape, kind

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        generator = torch.Generator().manual_seed(int(t[0] * 1000))
        hint = torch.randn(len(x_noisy), *self.shape, generator=generator).to(x_noisy)
        return {"input": [], "middle": [], "output": [], self.kind: [None, hint]}

    def copy(self):
        return self

    def get_models(self):
        return []


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model(kind: str):
    """MODEL with random weights."""
    class_name, config, _ = MODELS[kind]
    if kind.startswith("flux"):  # ComfyUI 0.3.75 has no txt_ids_dims
        known = FluxParams.__dataclass_fields__.keys() | {"image_model"}
        config = {name: value for name, value in config.items() if name in known}
    described = getattr(comfy.supported_models, class_name)(dict(config))
    described.set_inference_dtype(torch.float32, None)
    model = described.get_model({}, "", device=torch.device("cpu"))
    for number, parameter in enumerate(model.diffusion_model.parameters()):
        parameter.requires_grad_(False).copy_(normal(*parameter.shape, seed=number) * 0.05)
    return comfy.model_patcher.ModelPatcher(model, load_device=DEVICE, offload_device=torch.device("cpu"))


def add_patches(model, kind: str):
    """A clone with objects that act in the call of the diffusion model."""
    model = model.clone()

    def wrap(executor, *args, **kwargs):
        return executor(*args, **kwargs) * 1.5

    def scale_query(q, k, v, extra):
        return q * (1 + extra["sigmas"][0] * 0.01), k, v

    def replace_block(args, extra):
        found = extra["original_block"](args)
        return found | {"img": found["img"] * 1.25}

    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, wrap)
    if kind == "unet":
        model.set_model_attn1_patch(scale_query)
    elif kind.startswith("flux"):
        model.set_model_patch_replace(replace_block, "dit", "double_block", 0)
    return model


def make_conditioning(kind: str, seed: int, **more) -> list:
    width = MODELS[kind][1].get("context_dim") or MODELS[kind][1].get("context_in_dim") or 64
    pooled = normal(1, 32, seed=seed + 1).to(DEVICE)
    return [[normal(1, 7, width, seed=seed).to(DEVICE), {"pooled_output": pooled, "guidance": 3.5} | more]]


def record(module: torch.nn.Module, outputs: list) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))


def replay(kind: str) -> dict:
    """Which calls of a small model, with a ControlNet or extra conditioning and with patches, give the same output again."""
    *_, shape = MODELS[kind]
    plain = make_model(kind)
    model = add_patches(plain, kind)
    more = {"unet": {"control": Hints((32, 16, 16), "output")}, "flux": {"control": Hints((24, 128), "input")}}.get(
        kind, {}
    )
    if kind == "flux2":
        more = {"reference_latents": [normal(1, 128, 4, 4, seed=9).to(DEVICE)]}
    negative = make_conditioning(kind, 5, **more)
    pairs = [(make_conditioning(kind, seed, **more), negative) for seed in (1, 2)]
    latents = [{"samples": torch.zeros(shape)}]
    options = {"seed": 3, "samples": 2, "keep": "compact", "tokens": 64, "on_event": lambda event: None, **SAMPLING}
    diffusion_model, outputs = model.model.diffusion_model, []
    handle = record(diffusion_model, outputs)
    first, *_, summary = host.calibrate_model(model, pairs, latents, replay_calls=100, **options)
    handle.remove()
    measured, *_ = host.calibrate_model(model, pairs[:1], latents, replay_calls=5, sensitivity=True, **options)
    continued, *_ = host.calibrate_model(model, pairs[:1], latents, earlier=first, **options)
    again, *_ = host.calibrate_model(model, pairs[:1], latents, earlier=first, replay_calls=3, **options)
    recorded, *_ = host.calibrate_model(model, pairs[:1], latents, replay_calls=4, **options)
    without, *_ = host.calibrate_model(model, pairs[:1], latents, **options)
    replays = first.replays[""]
    comfy.model_management.load_models_gpu([model])

    def equal(live) -> list[bool]:
        found = []
        for index, output in enumerate(outputs):
            args, kwargs = replays.arguments(index, DEVICE, live)
            found.append(torch.equal(diffusion_model(*args, **kwargs), output))
        return found

    live = live_arguments(model)
    try:
        replays.arguments(0, DEVICE, live_arguments(plain))
        refused = ""
    except CalibrationError as error:
        refused = str(error)
    batch = {len(replays.arguments(index, DEVICE, live)[0][0]) for index in range(len(replays))}
    return {
        "calls": [len(outputs), len(replays), len(measured.replays[""]), len(again.replays[""]), len(without.replays)],
        "equal": [*equal(live), *equal(live)],
        "varied": len({float(output.double().sum()) for output in outputs}),
        "finite": all(bool(output.isfinite().all()) for output in outputs),
        "batch": sorted(batch),
        "continued": continued.replays is first.replays,
        "validation": sum(replays.validation),
        "positions": sorted(set(replays.positions)),
        "same calibration": without.fingerprint == recorded.fingerprint,
        "hooks": sum(len(module._forward_pre_hooks) for module in model.model.modules()),
        "refused": refused,
        "summary": summary.splitlines()[-2],
    }


def encoder() -> dict:
    """Which calls of a T5 give the same output again."""
    import __main__ as checks

    path = Path(sys.argv[-1]) / "t5.safetensors"
    checks.save_file(checks.t5_weights(), path)
    clip, outputs = checks.load(path), []
    part = clip.cond_stage_model.t5xxl
    handle = part.register_forward_hook(lambda module, args, output: outputs.append(output[0].clone()))
    options = {"keep": "compact", "tokens": 64, "seed": 0, "on_event": lambda event: None}
    calibration, summary = host.calibrate_clip(clip, checks.PROMPTS[:6], replay_calls=10, **options)
    handle.remove()
    comfy.model_management.load_models_gpu([clip.patcher])
    ((name, replays),) = calibration.replays.items()
    calls = [replays.arguments(index, DEVICE) for index in range(len(replays))]
    return {
        "part": name,
        "equal": [
            torch.equal(part(*args, **kwargs)[0], output) for (args, kwargs), output in zip(calls, outputs, strict=True)
        ],
        "validation": sum(replays.validation),
        "summary": summary.splitlines()[-2],
    }


def released() -> dict[str, int]:
    """Number of files of recorded calls that memory has no room for, while the calibration is used and afterwards."""
    model = add_patches(make_model("unet"), "unet")
    pairs = [(make_conditioning("unet", 1), make_conditioning("unet", 2))]
    options = {"seed": 3, "samples": 1, "keep": "compact", "tokens": 64, "on_event": lambda event: None, **SAMPLING}
    sys.modules["pack.nodes.host.recording"]._RAM_BYTES = 0
    calibration, _, summary = host.calibrate_model(
        model, pairs, [{"samples": torch.zeros(1, 4, 16, 16)}], replay_calls=2, **options
    )
    temp = Path(folder_paths.get_temp_directory())
    during = len(list(temp.glob("learned_rounding_calls*")))
    del calibration
    gc.collect()
    return {"during": during, "after": len(list(temp.iterdir())), "summary": summary.splitlines()[-2]}


def saved() -> dict:
    """Calibrations saved with and without their calls, and loaded again."""
    model = make_model("unet")
    pairs = [(make_conditioning("unet", 1), make_conditioning("unet", 2))]
    options = {"seed": 3, "samples": 1, "keep": "compact", "tokens": 64, "on_event": lambda event: None, **SAMPLING}
    latents = [{"samples": torch.zeros(1, 4, 16, 16)}]
    calibration, *_ = host.calibrate_model(model, pairs, latents, replay_calls=2, **options)
    without, *_ = host.calibrate_model(model, pairs, latents, **options | {"seed": 4})
    path = host.save_calibration(calibration, "[a]", save_calls=True)
    name = path.name
    plain = host.save_calibration(calibration, "[a]")
    loaded, text = host.load_calibration(name)
    found = {
        "files": sorted(file.name for file in path.parent.iterdir()),
        "listed": host.calibration_files(),
        "same": loaded.replays[""].fingerprint == calibration.replays[""].fingerprint,
        "text": text.splitlines()[-1],
        "plain": len(host.load_calibration(plain.name)[0].replays),
    }
    state, calls = host.calibration_state(name), path.with_name("[a]_00001_.calls.safetensors")
    # The calls of a calibration that was removed are not those of a new one of the same name.
    path.unlink()
    again = host.save_calibration(without, "[a]")
    found["reused name"] = [again == path, len(host.load_calibration(name)[0].replays)]
    try:
        host.save_calibration(without, "none", save_calls=True)
    except CalibrationError as error:
        found["nothing to save"] = str(error)
    again.unlink()
    try:
        host.save_calibration(calibration.__class__(plain, "other", False, calibration.replays), "[a]", save_calls=True)
    except OutputError:
        found["existing calls"] = path.exists()
    path.write_bytes(plain.read_bytes())
    found["state"] = host.calibration_state(name) != state
    calls.write_bytes(calls.read_bytes()[:-5])
    try:
        host.load_calibration(name)
    except SourceError as error:
        found["damaged"] = calls.name in str(error)
    return found


CHECKS = {f"replay_{kind}": lambda kind=kind: replay(kind) for kind in MODELS} | {
    "replay_encoder": encoder,
    "replay_released": released,
    "replay_saved": saved,
}
