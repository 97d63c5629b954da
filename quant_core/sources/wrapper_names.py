"""Tensor names of models that were saved inside a wrapper: of torch (compiled, checkpointed, distributed) or of ComfyUI."""

import re

from ..errors import SourceError
from .renaming import Assembly
from .source import Source

__all__ = ["assemble_unwrapped"]

# torch.compile, torch.distributed's checkpoint_wrapper and FullyShardedDataParallel put these between the names of modules.
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_WHOLE = ("module.", "diffusion_model.")  # beginnings of every name: of DataParallel, and of ComfyUI's models in memory


def assemble_unwrapped(source: Source) -> dict[str, Assembly] | None:
    """The names of the tensors without those of wrappers; None where there are none.

    Raises:
        SourceError: two tensors would get the same name.
    """
    names = {name: _WRAPPER.sub("", name) for name in source.tensors}
    for prefix in _WHOLE:
        if names and all(name.startswith(prefix) for name in names.values()):
            names = {name: plain.removeprefix(prefix) for name, plain in names.items()}
    if all(name == plain for name, plain in names.items()):
        return None
    assemblies: dict[str, Assembly] = {}
    for name, plain in names.items():
        if plain in assemblies:
            raise SourceError(
                f"{source.name} contains {assemblies[plain].parts[0]} and {name}, which are one tensor to ComfyUI; "
                "save the model without the wrapper that was put around it."
            )
        assemblies[plain] = Assembly((name,))
    return assemblies
