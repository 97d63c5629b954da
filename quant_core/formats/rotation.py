"""ConvRot: rotate groups of input channels by a Hadamard matrix, so that outliers spread over the group.

The stored weight is W·R, the layer's input is rotated at run time: (x·R)(W·R)ᵀ = x·Wᵀ, since R is orthogonal.
R is block diagonal; each block is the regular Hadamard matrix H₄⊗H₄⊗… of ComfyUI's kernels, symmetric and so its own
inverse.
"""

from dataclasses import dataclass

import torch

from ...kernels.hadamard import rotate
from ..errors import RecipeError

__all__ = ["Rotation", "GROUP_SIZES", "rotation_groups"]

GROUP_SIZES = (256, 64, 16)


def rotation_groups(convrot: bool | int | str | None, inner: int) -> list[int | None]:
    """The ConvRot group sizes to try for ``inner`` input channels; None stands for no rotation.

    ``convrot``: None or False for none; True for the largest group that divides; a number for the largest up to it;
    "auto" for no rotation and every group that divides.
    """
    fitting = [size for size in GROUP_SIZES if inner % size == 0]
    if convrot == "auto":
        return [None, *fitting]
    if convrot is None or convrot is False:
        return [None]
    if convrot is not True and convrot not in GROUP_SIZES:
        raise RecipeError(f"ConvRot can be on, off, auto, 256, 64 or 16, not {convrot!r}.")
    return [size for size in fitting if convrot is True or size <= convrot][:1] or [None]


@dataclass(frozen=True)
class Rotation:
    """R for groups of ``size`` input channels."""

    size: int

    def __post_init__(self):
        if self.size not in GROUP_SIZES:
            raise RecipeError(f"A ConvRot group has 256, 64 or 16 channels, not {self.size}.")

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """values·R along the last dimension (in), as float32."""
        if values.shape[-1] % self.size:
            raise RecipeError(f"ConvRot groups of {self.size} do not divide {values.shape[-1]} input channels.")
        return rotate(values, self.size)

    def apply_gram(self, gram: torch.Tensor) -> torch.Tensor:
        """Rᵀ·H·R: the Gram (in, in) of rotated inputs."""
        return self.apply(self.apply(gram).t()).t()
