"""What the runs of these tests make: recipes of every kind, the layers of the made-up model, and comparisons of files."""

import threading

import torch
from safetensors import safe_open

from learned_rounding.quant_core import Recipe

LINEARS = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn.qkv", "mlp.0", "mlp.2")]


RECIPES = {
    "fp8": Recipe(),
    "fp8 nearest": Recipe(rounding="nearest", full_precision_matmul=True),
    "int8 row": Recipe(format="int8_tensorwise", convrot=False),
    "int8 tensor": Recipe(format="int8_tensorwise", granularity="tensor"),
    "int8 convrot": Recipe(format="int8_tensorwise", convrot="auto"),
    "int8 block": Recipe(format="int8_blockwise", block_size=16),
    "fp8 row, principal": Recipe(format="float8_e4m3fn_rowwise", rounding="principal"),
    "fp8 block, steps": Recipe(format="float8_e4m3fn_blockwise", optimizer="adamw", num_iter=5),
    "e5m2 stochastic, synthetic bias": Recipe(
        format="float8_e5m2", rounding="stochastic", bias_correction="synthetic", calib_samples=4
    ),
}


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes, shapes and bytes are the same."""
    return left.keys() == right.keys() and all(
        (left[name].dtype, left[name].shape, raw(left[name]))
        == (right[name].dtype, right[name].shape, raw(right[name]))
        for name in left
    )


def metadata_of(path) -> dict[str, str]:
    """The metadata in the header of a file."""
    with safe_open(path, "pt") as file:
        return file.metadata()


class Stop(Exception):
    """What a host raises to cancel."""


def working_threads() -> list[str]:
    """Our threads that do not end by themselves; one that is told to stop may need a moment."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("learned-rounding")]
    for thread in threads:
        thread.join(timeout=20)
    return [thread.name for thread in threads if thread.is_alive()]
