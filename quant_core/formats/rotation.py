"""ConvRot: rotate groups of input channels by a Hadamard matrix, which spreads outliers over the group.

The stored weight is W·R, and the layer's activations are rotated at run time: (x·R)(W·R)ᵀ = x·Wᵀ, since R is orthogonal.
R is block diagonal; each block is the regular Hadamard matrix H₄⊗H₄⊗… of ComfyUI's kernels, symmetric and therefore its
own inverse (ConvRot, arXiv 2512.03673).
"""

from dataclasses import dataclass

import torch

from ...kernels.hadamard import rotate
from ..errors import RecipeError

__all__ = ["GROUP_SIZES", "LARGE_GROUP_SIZES", "Rotation", "rotation_groups"]

GROUP_SIZES = (256, 64, 16)  # that kernels rotate and quantize in one pass
LARGE_GROUP_SIZES = (4096, 1024)  # that ComfyUI rotates in a pass of its own


def rotation_groups(convrot: bool | int | str | None, inner: int) -> list[int | None]:
    """The ConvRot group sizes to try for ``inner`` input channels; None is no rotation.

    ``convrot``: None or False for none; True for the largest group that divides; a number for the largest up to it;
    "auto" for no rotation and every group that divides, the large ones last.
    """
    dividing = [size for size in GROUP_SIZES if inner % size == 0]
    if convrot == "auto":
        return [None, *dividing, *(size for size in LARGE_GROUP_SIZES if inner % size == 0)]
    if convrot is None or convrot is False:
        return [None]
    if convrot is not True and convrot not in GROUP_SIZES:
        raise RecipeError(f"ConvRot can be on, off, auto, 256, 64 or 16, not {convrot!r}.")
    largest = GROUP_SIZES[0] if convrot is True else convrot
    return [*(size for size in dividing if size <= largest), None][:1]


@dataclass(frozen=True)
class Rotation:
    """R for groups of ``size`` input channels, a power of four as ComfyUI reads them; files of other tools have 1024 and 4096."""

    size: int

    def __post_init__(self):
        if type(self.size) is not int or self.size < 4 or self.size.bit_count() != 1 or self.size.bit_length() % 2 == 0:
            raise RecipeError(f"The size of a ConvRot group must be a power of four such as 256, not {self.size}.")

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """values·R along the last dimension (in), as float32."""
        if values.shape[-1] % self.size:
            raise RecipeError(f"ConvRot groups of {self.size} do not divide {values.shape[-1]} input channels.")
        return rotate(values, self.size)

    restore = apply_weight = restore_weight = apply  # R is symmetric and its own inverse

    def apply_hessian(self, hessian: torch.Tensor) -> torch.Tensor:
        """Rᵀ·H·R: the Hessian (in, in) of rotated activations."""
        return self.apply(self.apply(hessian).t()).t()
