"""Layers that stay in full precision because of their role, which names and shapes show in models of any family.

Roles:

* modulation: a layer outside the blocks that maps a conditioning vector to several times the width of the blocks: the shifts,
  scales and gates of all of them;
* router: a layer beside experts with one output for each of them; the top k are selected;
* narrow: few inputs (a small basis) or few outputs (a gate per head or expert).

They are few of a model's parameters, and an error there affects all blocks, or whole heads or experts.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from ..sources import TensorInfo

__all__ = ["OUTSIDE", "find_roles", "find_sensitive"]

_INDEX = re.compile(r"\.(\d+)(?=\.)")  # of a module in a list
# Time and memory stay linear in the number of names: those of more parts have no role, and lists nested deeper count for none.
_DEEPEST, _LISTS = 16, 4
_NARROW, _WIDE = 64, 1024  # a narrow layer has a side shorter than the one and a side at least as long as the other
_MULTIPLES = range(2, 25)  # width of a modulation / width of the blocks
_BLOCK_MATRICES = 2  # of a block at least
_EXPERT_MATRICES = 3  # of an expert at most: gate, up and down projection
_EXPERT_SIDE = 64  # of the matrices in a tensor of experts at least: the kernels of convolutions are smaller

_MODULATION = "modulation outside the blocks: few parameters, steers every block"
_ROUTER = "router of {count} experts: few parameters, selects the experts of a token"
_FEW_INPUTS = "few inputs ({count}): few parameters, all outputs depend on each of them"
_LEAST_BLOCKS = 4  # of a list of blocks that has a first and a last one
_DOWN = 2  # inputs / outputs of a down-projection at least
OUTSIDE = "outside the blocks: few parameters, an error there reaches all blocks"
_ENDS = "first or last block: the rest of the model does not correct its error"
_DOWN_PROJECTION = "down-projection: its inputs have the largest outliers of a block"
_FEW_OUTPUTS = "few outputs ({count}), such as one gate per head or expert: few parameters"

Shape = tuple[int, ...]  # (outputs, inputs) of a matrix


@dataclass
class _Scope:
    """The part of a model in which blocks are: a whole model, or a text encoder in a checkpoint.

    Attributes:
        widths: of the activations between the layers of its blocks.
        writes: outputs of its matrices outside blocks that have no more inputs, such as those of a time embedding.
    """

    widths: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)

    def modulates(self, shape: Shape) -> bool:
        """Whether a matrix of this shape outside the blocks turns a conditioning vector into their modulation."""
        outputs, inputs = shape
        wide = any(outputs % several == 0 and outputs // several in self.widths for several in _MULTIPLES)
        return wide and (inputs in self.widths or inputs in self.writes)


def find_roles(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Name → reason to keep it, for the weights with one of the roles.

    Args:
        tensors: all tensors of a model or checkpoint; other parts of it, such as text encoders, may be among them.
    """
    shapes = {
        name: info.shape
        for name, info in tensors.items()
        if len(info.shape) in (2, 3) and 0 not in info.shape and name.count(".") < _DEEPEST
    }
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    lists = _find_lists(matrices)
    narrow = ((name, reason) for name, shape in matrices.items() if (reason := _describe_narrow(shape)))
    return dict((*narrow, *_find_modulations(matrices, lists), *_find_routers(shapes, matrices, lists)))


def find_sensitive(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Name → reason, for the weights of a model whose error weighs most in formats of few bits.

    These are layers outside the blocks, those of the first and the last block of each list, and the down-projections of MLPs,
    whose inputs have the largest outliers (SmoothQuant, arXiv 2211.10438, section 3; llama.cpp gives them more bits in its
    4-bit mixes).

    Args:
        tensors: all tensors of a model or checkpoint.
    """
    matrices = {
        name: info.shape
        for name, info in tensors.items()
        if len(info.shape) == 2 and name.endswith(".weight") and name.count(".") < _DEEPEST
    }
    lists = {
        path: members
        for path, members in _find_lists(matrices).items()
        if sum(len(shapes) >= _BLOCK_MATRICES for shapes in members.values()) > 1
    }
    ends = {
        f"{path}.{index}."
        for path, members in lists.items()
        if len(members) >= _LEAST_BLOCKS
        for index in (min(members, key=_by_number), max(members, key=_by_number))
    }
    found = {}
    for name, (outputs, inputs) in matrices.items():
        around = [(path, index) for path, index in _enclosing_lists(name) if path in lists]
        if not around:
            found[name] = OUTSIDE
        elif f"{'.'.join(around[0])}." in ends:
            found[name] = _ENDS
        elif inputs >= _DOWN * outputs:
            found[name] = _DOWN_PROJECTION
    return found


def _by_number(index: str) -> tuple[int, str]:
    """Sort key of an index, of any number of digits."""
    return len(index), index


def _describe_narrow(shape: Shape) -> str | None:
    outputs, inputs = shape
    if min(shape) >= _NARROW or max(shape) < _WIDE:
        return None
    return _FEW_INPUTS.format(count=inputs) if inputs < outputs else _FEW_OUTPUTS.format(count=outputs)


def _find_lists(matrices: Mapping[str, Shape]) -> dict[str, dict[str, list[Shape]]]:
    """Path of each list of modules → index of a module → shapes of its matrices."""
    lists: dict[str, dict[str, list[Shape]]] = defaultdict(lambda: defaultdict(list))
    for name, shape in matrices.items():
        for path, index in _enclosing_lists(name):
            lists[path][index].append(shape)
    return {path: members for path, members in lists.items() if len(members) > 1}


def _enclosing_lists(name: str) -> list[tuple[str, str]]:
    """(path, index) of the modules in lists that contain the tensor."""
    return [(name[: index.start()], index[1]) for index in islice(_INDEX.finditer(name), _LISTS)]


def _find_modulations(
    matrices: Mapping[str, Shape], lists: Mapping[str, Mapping[str, list[Shape]]]
) -> Iterable[tuple[str, str]]:
    scopes: dict[str, _Scope] = defaultdict(_Scope)
    for path, members in lists.items():
        blocks = [shapes for shapes in members.values() if len(shapes) >= _BLOCK_MATRICES]
        if len(blocks) > 1:
            scopes[_parent(path)].widths |= _find_widths(shape for shapes in blocks for shape in shapes)
    modules = {name: _find_module(name, scopes) for name in matrices}
    outside = {name: matrices[name] for name, module in modules.items() if not _INDEX.search(f"{module}.")}
    for name, (outputs, inputs) in outside.items():
        if outputs >= inputs:
            for scope in _enclosing_scopes(name, scopes):
                scope.writes.add(outputs)
    layers = Counter(modules.values())
    return (
        (name, _MODULATION)
        for name, shape in outside.items()
        if layers[modules[name]] == 1 and any(scope.modulates(shape) for scope in _enclosing_scopes(name, scopes))
    )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _ancestors(path: str, count: int) -> list[str]:
    """Paths of the modules around ``path``, from the inside."""
    return [path := _parent(path) for _ in range(count)]


def _find_module(name: str, scopes: Container[str]) -> str:
    """Path of the module around the layer of a matrix; the matrix itself if that is the whole scope."""
    path = _parent(_parent(name))
    return name if path in scopes else path


def _enclosing_scopes(name: str, scopes: Mapping[str, _Scope]) -> list[_Scope]:
    parts = name.split(".")
    paths = (".".join(parts[:place]) for place in range(len(parts)))
    return [scopes[path] for path in paths if path in scopes]


def _find_widths(shapes: Iterable[Shape]) -> set[int]:
    """Widths of the activations between the layers of blocks, one for each stream: inner widths of MLPs are rarer."""
    counts = Counter(side for shape in shapes for side in shape)
    most = max(counts.values())
    return {side for side, count in counts.items() if 2 * count >= most}


def _find_routers(
    shapes: Mapping[str, Shape], matrices: Mapping[str, Shape], lists: Mapping[str, Mapping[str, list[Shape]]]
) -> Iterable[tuple[str, str]]:
    banks: dict[str, set[Shape]] = defaultdict(set)  # module with experts → (outputs, inputs) of their router
    for path, members in lists.items():
        if max(map(len, members.values())) <= _EXPERT_MATRICES:
            outputs, inputs = (
                set.intersection(*({shape[side] for shape in member} for member in members.values())) for side in (0, 1)
            )
            banks[_parent(path)] |= {(len(members), width) for width in outputs & inputs}
    for name, (count, *sides) in shapes.items():
        if len(sides) == 2 and count > 1 and min(sides) >= _EXPERT_SIDE:
            for path in _ancestors(name, 3):
                banks[path] |= {(count, side) for side in sides}
    return (
        (name, _ROUTER.format(count=shape[0]))
        for name, shape in matrices.items()
        if any(shape in banks.get(path, ()) for path in _ancestors(_parent(name), 2))
    )
