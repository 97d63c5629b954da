"""A model that recorded calls can be replayed on, and its blocks."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import QuantizationError

__all__ = ["Block", "ReplayedModel", "UnfollowedModelError", "find_blocks"]

_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential)


class UnfollowedModelError(QuantizationError):
    """The calls of the model do not pass through the same blocks in the same order."""


@dataclass(frozen=True)
class ReplayedModel:
    """A model in memory and the calls of it that were recorded.

    Attributes:
        root: the module that was called.
        layers: name of a layer in the source, without ``.weight`` → its module, for linear layers.
        run: calls ``root`` with the arguments of the recorded call of that index; they are new at every time.
        validation: for each call, whether it only judges.
        positions: for each call, its position in its run, from 0 to 1.
        device: where the model runs.
        device_bytes: device memory for the tensors of suspended calls.
        ram_bytes: main memory for those that do not fit there; the rest is in files in ``folder``.
        fingerprint: changes with the recorded calls.
    """

    root: torch.nn.Module
    layers: Mapping[str, torch.nn.Module]
    run: Callable[[int], object]
    validation: Sequence[bool]
    positions: Sequence[float]
    device: torch.device
    device_bytes: int
    ram_bytes: int
    folder: Path
    fingerprint: str


@dataclass(frozen=True)
class Block:
    """A module that the calls of a model pass through.

    Attributes:
        name: path of the module in the model.
        module: the module.
        groups: names of its layers in the order of their execution; layers that share an input are one group.
    """

    name: str
    module: torch.nn.Module
    groups: tuple[tuple[str, ...], ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers."""
        return tuple(name for group in self.groups for name in group)


def find_blocks(model: ReplayedModel, layers: Sequence[str]) -> list[Block]:
    """The blocks of a model in the order in which its first recorded call runs them.

    A block is a module in a ``ModuleList`` or ``Sequential`` that contains a layer of ``layers``, is called, and is not called
    by another block.

    Raises:
        UnfollowedModelError: a block is called twice, a layer by two blocks, or no block is called; or too few calls are recorded.
    """
    if len(set(model.validation)) < 2:
        raise UnfollowedModelError("fewer than two of its calls are recorded")
    modules = {model.layers[name]: name for name in layers if name in model.layers}
    candidates = dict(_find_candidates(model.root, modules))
    trace = _Trace(candidates, modules)
    with trace.hooks():
        model.run(0)
    twice = next((name for name in trace.names if trace.names.count(name) > 1), None)
    if twice:
        raise UnfollowedModelError(f"{twice} is called twice in one call of the model")
    blocks = [
        Block(name, module, tuple(map(tuple, trace.groups[module])))
        for module, name in candidates.items()
        if module in trace.groups
    ]
    blocks.sort(key=lambda block: trace.names.index(block.name))
    blocks = [block for block in blocks if block.groups]
    if not blocks:
        raise UnfollowedModelError("the model calls no block in a list of modules that has a layer to quantize")
    inside = [name for block in blocks for name in block.layers]
    shared = next((name for name in inside if inside.count(name) > 1), None)
    if shared:
        raise UnfollowedModelError(f"layer {shared} is called by two blocks")
    return blocks


def _find_candidates(
    root: torch.nn.Module, layers: Mapping[torch.nn.Module, str]
) -> Iterator[tuple[torch.nn.Module, str]]:
    """Modules with their names that may be blocks."""
    containers = {name for name, module in root.named_modules() if isinstance(module, _CONTAINERS)}
    for name, module in root.named_modules():
        parts = name.split(".")
        indexed = any(".".join(parts[:count]) in containers for count in range(1, len(parts)))
        if indexed and module not in layers and any(inner in layers for inner in module.modules()):
            yield module, name


class _Trace:
    """What one call of a model calls, in order.

    Attributes:
        names: names of the blocks.
        groups: block → names of its layers by shared input.
    """

    def __init__(self, candidates: Mapping[torch.nn.Module, str], layers: Mapping[torch.nn.Module, str]):
        self.names: list[str] = []
        self.groups: dict[torch.nn.Module, list[list[str]]] = {}
        self._candidates, self._layers = candidates, layers
        self._block: torch.nn.Module | None = None
        self._inputs: list[tuple[torch.Tensor, list[str]]] = []  # of the groups of the running block

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the model in this context."""
        with contextlib.ExitStack() as removals:
            for module in self._candidates:
                removals.callback(module.register_forward_pre_hook(self._enter).remove)
                removals.callback(module.register_forward_hook(self._leave).remove)
            for module in self._layers:
                removals.callback(module.register_forward_pre_hook(self._call_layer).remove)
            yield

    def _enter(self, module: torch.nn.Module, args: tuple) -> None:
        if self._block is None:
            self._block = module
            self.names.append(self._candidates[module])
            self.groups[module] = []

    def _leave(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        if module is self._block:
            self._block = None
            self._inputs.clear()

    def _call_layer(self, module: torch.nn.Module, args: tuple) -> None:
        name = self._layers[module]
        if self._block is None or not args or any(name in group for group in self.groups[self._block]):
            return
        for tensor, group in self._inputs:
            if tensor is args[0]:
                group.append(name)
                return
        self.groups[self._block].append([name])
        self._inputs.append((args[0], self.groups[self._block][-1]))
