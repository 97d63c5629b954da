"""Launch a Triton kernel again without Triton's analysis of its arguments, which takes 20 to 30 µs per call."""

from collections.abc import Mapping

import torch

__all__ = ["Launcher", "bind_descriptor"]


class Launcher:
    """A kernel with a fixed grid and fixed constants.

    The first call compiles the kernel for its arguments. Every later call must pass arguments of the same dtypes, integer
    values and 16-byte alignment, and then launches the compiled kernel.

    Args:
        kernel: Triton or Gluon kernel whose constexpr parameters come last.
        grid: number of programs in up to three dimensions.
        constants: values of the constexpr parameters.
        keep: False to analyze the arguments in every call, for tensors of unknown alignment.
        options: ``num_warps`` and other options of the compiler.
    """

    __slots__ = ("_constants", "_grid", "_keep", "_kernel", "_options", "_run", "_values")

    def __init__(self, kernel, grid: tuple[int, ...], constants: Mapping[str, object], *, keep: bool = True, **options):
        self._kernel, self._grid, self._constants, self._options = kernel, grid, constants, options
        self._keep = keep
        self._run = None

    def __call__(self, *arguments) -> None:
        if self._run is not None:
            self._run(*arguments, *self._values)
            return
        compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
        if self._keep and compiled is not None:  # the interpreter compiles nothing
            self._values = tuple(self._constants[name] for name in self._kernel.arg_names[len(arguments) :])
            self._run = compiled[(*self._grid, 1, 1)[:3]]


def bind_descriptor(descriptor, tensor: torch.Tensor):
    """Copy of a tensor descriptor for another tensor of the same shape, strides and alignment, which are not checked again."""
    bound = object.__new__(type(descriptor))
    bound.__dict__.update(descriptor.__dict__)
    bound.base = tensor
    return bound
