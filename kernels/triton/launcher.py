"""Launch a Triton kernel again without Triton's analysis of its arguments, which takes 20 to 30 µs per call."""

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton

__all__ = ["Descriptors", "Launcher"]

# Releases whose launch of a compiled kernel takes all arguments, constants included. It is not part of Triton's API.
_CAN_KEEP = (3, 3) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 7)

_EXPAND = "make_tensordesc_arg"  # Triton's function (descriptor, metadata) → arguments of the compiled kernel
_MOST_ADDRESSES = 4096  # per shape


class Launcher:
    """A kernel with a fixed grid and fixed constants.

    The first call compiles the kernel for its arguments. Every later call must pass arguments of the same dtypes, integer
    values and 16-byte alignment, with the same current device, and then launches the compiled kernel; other releases of Triton
    than those of ``_CAN_KEEP`` analyze the arguments in every call.

    Args:
        kernel: Triton or Gluon kernel whose constexpr parameters come last.
        grid: number of programs in up to three dimensions.
        constants: values of the constexpr parameters.
        device: device of the tensors; launches use its current stream.
        keep: False to analyze the arguments in every call, for tensors of unknown alignment.
        options: ``num_warps`` and other options of the compiler.
    """

    __slots__ = (
        "_constants",
        "_device",
        "_grid",
        "_keep",
        "_kernel",
        "_options",
        "_prefix",
        "_run",
        "_stream",
        "_values",
    )

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        constants: Mapping[str, object],
        device: torch.device,
        *,
        keep: bool = True,
        **options,
    ):
        self._kernel, self._grid, self._constants, self._options = kernel, grid, constants, options
        self._device, self._keep = device.index, keep
        self._run = None

    def __call__(self, *arguments) -> None:
        if self._run is not None:
            self._run(*self._grid, self._stream(self._device), *self._prefix, *arguments, *self._values)
            return
        compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
        if self._keep and _CAN_KEEP and compiled is not None:  # the interpreter compiles nothing
            self._keep_launch(compiled, len(arguments))

    def _keep_launch(self, compiled, count: int) -> None:
        """Prepare the call by which Triton itself launches a compiled kernel, without the hooks of a profiler."""
        self._values = tuple(self._constants[name] for name in self._kernel.arg_names[count:])
        self._grid = (*self._grid, 1, 1)[:3]
        self._prefix = compiled.function, compiled.packed_metadata, None, None, None
        driver: Any = triton.runtime.driver.active
        self._stream = driver.get_current_stream
        if self._device is None:
            self._device = driver.get_current_device()
        self._run = _reuse_tensor_maps(compiled.run)


class Descriptors:
    """Tensor descriptors of matrices with one shape, strides, dtype and alignment, one per address.

    They contain addresses instead of tensors, so that they keep no tensor in memory.

    Args:
        descriptor: Triton's descriptor of one such matrix.
    """

    __slots__ = ("_bound", "_descriptor", "_dtype")

    def __init__(self, descriptor):
        self._dtype, descriptor.base = descriptor.base.dtype, None
        self._descriptor, self._bound = descriptor, {}

    def bind(self, tensor: torch.Tensor):
        """Descriptor of ``tensor``, whose shape, strides, dtype and alignment are not checked."""
        if not tensor.is_cuda:  # Triton's interpreter reads the tensor
            bound = copy.copy(self._descriptor)
            bound.base = tensor
            return bound
        address = tensor.data_ptr()
        bound = self._bound.get(address)
        if bound is None:
            if len(self._bound) >= _MOST_ADDRESSES:
                self._bound.clear()
            bound = self._bound[address] = copy.copy(self._descriptor)
            bound.base, bound.tensor_maps = _Base(address, self._dtype), {}
        return bound


class _Base(NamedTuple):
    """What Triton reads of the tensor of a descriptor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def _reuse_tensor_maps(run):
    """Copy of the launch of a compiled kernel that makes the tensor map of a bound descriptor once: it takes 5 µs."""
    launch = getattr(run, "launch", None)
    if not isinstance(launch, types.FunctionType) or _EXPAND not in launch.__globals__:
        return run  # no descriptors among its arguments
    expand: Callable[..., list] = launch.__globals__[_EXPAND]

    def expand_once(descriptor, metadata) -> list:
        known = descriptor.tensor_maps.get(id(metadata))
        if known is None:
            known = descriptor.tensor_maps[id(metadata)] = expand(descriptor, metadata)
        return known

    run = copy.copy(run)
    run.launch = types.FunctionType(
        launch.__code__, {**launch.__globals__, _EXPAND: expand_once}, closure=launch.__closure__
    )
    return run
