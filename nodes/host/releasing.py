"""Release memory and temporary files when the user asks ComfyUI to free memory.

ComfyUI has two requests. "Unload models" moves the models out of the VRAM and keeps the node cache. "Free model and node
cache" also drops the node cache, and with it the references to results. They arrive at POST /free, which sets flags of the
prompt queue; the thread that executes prompts takes the flags when it is idle.
"""

import functools
import gc

import torch
from server import PromptServer

from .quantizing import forget_last_result

__all__ = ["follow_free_requests"]

_MARK = (
    "releases_learned_rounding"  # attribute of our function, which functools.wraps copies to a wrapper of another pack
)


def follow_free_requests() -> None:
    """Release our memory when ComfyUI takes the flags of POST /free; later calls have no effect."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    take_flags = getattr(queue, "get_flags", None)
    if queue is None or take_flags is None or hasattr(take_flags, _MARK):
        return

    @functools.wraps(take_flags)
    def get_flags(*args, **options):
        flags = take_flags(*args, **options)
        if flags.get("free_memory"):
            forget_last_result()
        if flags.get("free_memory") or flags.get("unload_models"):
            _release_pinned_memory()
        return flags

    setattr(get_flags, _MARK, True)
    queue.get_flags = get_flags


def _release_pinned_memory() -> None:
    """Return the free pinned memory of torch's allocator to the system: it keeps the copy buffers of finished runs."""
    empty = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    empty = empty or getattr(torch._C, "_host_emptyCache", None)  # torch before 2.10
    if empty is not None and torch.cuda.is_initialized():
        gc.collect()
        empty()
