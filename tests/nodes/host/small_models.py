"""Small models of ComfyUI with random weights. Imported by tests in ComfyUI's process."""

import comfy.controlnet
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.patcher_extension import WrappersMP

from learned_rounding.tests.nodes.host.tiny_model import DEVICE

__all__ = [
    "MODELS",
    "SAMPLING",
    "add_patches",
    "make_conditioning",
    "make_extra_conditioning",
    "make_model",
    "normal",
]

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


def make_extra_conditioning(kind: str) -> dict:
    """Hints of a ControlNet, or a reference image; nothing for WAN."""
    if kind == "flux2":
        return {"reference_latents": [normal(1, 128, 4, 4, seed=9).to(DEVICE)]}
    hints = {"unet": ((32, 16, 16), "output"), "flux": ((24, 128), "input")}
    return {"control": Hints(*hints[kind])} if kind in hints else {}
