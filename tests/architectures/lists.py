"""Tensor lists as text: one line for all tensors whose names differ only in their numbers.

    linear+ double_blocks.{0-18}.img_attn.qkv.weight 9216x3072

A line is kind, name and shape (nothing for a single number); ``+`` says that the bias is there too, one number a row.
``{0-3,7}`` stands for each of these numbers, and several of them for every combination. The first line says what model
it is, from which ComfyUI, and how sure its sizes are.

    make architectures    collects all lists again, from the newest ComfyUI that `make hosts` prepared

Lists of models that this ComfyUI does not have stay; they are from ComfyUI's sources of a later date (``LATER``).
"""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["LATER", "Tensor", "architectures", "collapse", "expand", "read", "rebuild", "text", "title", "version"]

_FOLDER = Path(__file__).parent / "lists"
_VERSION = re.compile(r"ComfyUI ([\w.]+)")
LATER = "later"  # version of a list from sources that no release on this machine has


class Tensor(NamedTuple):
    """Kind of the module that holds a tensor (see `collect`), and its shape."""

    kind: str
    shape: tuple[int, ...]


def architectures() -> list[str]:
    """Names of all lists."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


@cache
def _lines(name: str) -> list[str]:
    return (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def title(name: str) -> str:
    """The model's own name."""
    return _lines(name)[0].removeprefix("# ").partition("; ")[0]


def version(name: str) -> str:
    """The ComfyUI that a list was made from, or :data:`LATER`."""
    return _VERSION.search(_lines(name)[0])[1]


@cache
def read(name: str) -> Mapping[str, Tensor]:
    """Tensor name → kind and shape."""
    return dict(expand(_lines(name)[1:]))


def expand(lines: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    """All tensors of lines as :func:`collapse` writes them."""
    for line in lines:
        kind, name, *shape = line.split()
        sides = tuple(int(side) for side in shape[0].split("x")) if shape else ()
        fixed, spans = re.split(r"\{[^}]*\}", name), re.findall(r"\{([^}]*)\}", name)
        for numbers in itertools.product(*map(_numbers, spans)):
            full = fixed[0] + "".join(number + after for number, after in zip(numbers, fixed[1:], strict=True))
            yield full, Tensor(kind.removesuffix("+"), sides)
            if kind.endswith("+"):
                yield _bias(full), Tensor(kind.removesuffix("+"), sides[:1])


def collapse(tensors: Mapping[str, Tensor]) -> list[str]:
    """Lines for these tensors, in the order of each line's first."""
    # A name is its constant parts with a set of numbers between each two. Names that differ in one set alone are merged,
    # from left to right, so each line stands for exactly the product of its sets.
    biased = {
        name
        for name, (kind, shape) in tensors.items()
        if tensors.get(_bias(name)) == (kind, shape[:1]) and _bias(name) != name
    }
    implied = set(map(_bias, biased))
    entries = [
        (Tensor(kind + "+" * (name in biased), shape), *_parts(name))
        for name, (kind, shape) in tensors.items()
        if name not in implied
    ]
    for place in range(max((len(sets) for *_, sets in entries), default=0)):
        merged = {}
        for tensor, fixed, sets in entries:
            others = sets[:place] + sets[place + 1 :]
            numbers = merged.setdefault((tensor, fixed, others), set())
            numbers.update(sets[place] if place < len(sets) else ())
        entries = [
            (tensor, fixed, (*others[:place], frozenset(numbers), *others[place:]) if numbers else others)
            for (tensor, fixed, others), numbers in merged.items()
        ]
    return [
        " ".join(filter(None, (tensor.kind, _joined(fixed, sets), "x".join(map(str, tensor.shape)))))
        for tensor, fixed, sets in entries
    ]


def _bias(weight: str) -> str:
    return re.sub(r"(^|\.)weight$", r"\1bias", weight)


def _parts(name: str) -> tuple[tuple[str, ...], tuple[frozenset[int], ...]]:
    pieces = re.split(r"(?<![^.])(\d+)(?![^.])", name)
    return tuple(pieces[::2]), tuple(frozenset([int(number)]) for number in pieces[1::2])


def _joined(fixed: tuple[str, ...], sets: tuple[frozenset[int], ...]) -> str:
    spans = (f"{{{span}}}" if re.search("[-,]", span) else span for span in map(_span, sets))
    return fixed[0] + "".join(span + after for span, after in zip(spans, fixed[1:], strict=True))


def _span(numbers: frozenset[int]) -> str:
    runs = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)


def _numbers(span: str) -> list[str]:
    ends = (run.split("-") for run in span.split(","))
    return [str(number) for run in ends for number in range(int(run[0]), int(run[-1]) + 1)]


def text(entry, comfyui: str, tensors: Mapping[str, Tensor]) -> str:
    """A whole list; ``entry`` is its line in the tables of `collect`."""
    head = f"# {entry.title}; ComfyUI {comfyui}, {entry.build}; {entry.sizes}"
    return "\n".join([head, *collapse(tensors)]) + "\n"


def rebuild(host) -> tuple[str, dict[str, dict[str, Tensor]], list[str]]:
    """(version, {name: tensors}, classes of models that have no list) as that ComfyUI's classes make them now."""
    script = Path(__file__).with_name("collect.py")
    done = subprocess.run(
        [str(host.python), str(script), str(host.path)], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    lists = {
        name: {tensor: Tensor(kind, tuple(shape)) for tensor, kind, shape in rows}
        for name, rows in found["lists"].items()
    }
    return found["version"], lists, found["missing"]


def main() -> None:
    from learned_rounding.hosts import available_hosts
    from learned_rounding.tests.architectures.collect import DIFFUSION, TEXT_ENCODERS

    hosts = available_hosts()
    if not hosts:
        sys.exit("no ComfyUI on this machine: make hosts")
    comfyui, lists, _ = rebuild(hosts[-1])
    _FOLDER.mkdir(exist_ok=True)
    entries = DIFFUSION | TEXT_ENCODERS
    for path in _FOLDER.glob("*.txt"):
        if path.stem in lists or path.stem not in entries:
            path.unlink()
    for name, tensors in lists.items():
        (_FOLDER / f"{name}.txt").write_text(text(entries[name], comfyui, tensors), encoding="utf-8")
    print(f"{len(lists)} lists from {hosts[-1]}")


if __name__ == "__main__":
    main()
