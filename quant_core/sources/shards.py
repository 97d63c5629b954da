"""Models of several files: shards with or without a JSON index, and the parts of a split GGUF."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..errors import SourceError
from .safetensors import parse_bounded_json
from .source import CPU, TensorInfo
from .tensor_file import MAX_HEADER, Part, TensorFile, open_regular_file

__all__ = [
    "ShardedFiles",
    "find_index",
    "find_parts",
    "load_weight_map",
    "model_key",
    "model_stem",
    "part_number",
    "require_files",
]

_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")  # diffusers puts the variant before .json: .index.fp16.json
_PART = re.compile(
    r"(?P<stem>.+)(?P<before>[-_])(?P<number>\d{1,5})(?P<of>[-_]of[-_])(?P<count>\d{1,5})"
    r"(?P<suffix>(\.(fp16|bf16|fp32|ema|non_ema))?\.[A-Za-z]\w*)"  # the variant is after the number in old diffusers
)
_MAX_NEIGHBOUR = 1 << 24  # bytes of an index that is searched for the name of a file next to it
_NAMED = 3  # missing files in a message


def model_stem(name: str) -> str:
    """File name of a model without its suffix, the number of a part, and ``.index.json``."""
    part = _PART.fullmatch(name)
    return part["stem"] if part else _INDEX.sub("", name).rpartition(".")[0] or name


def model_key(name: str) -> tuple[str, ...]:
    """Key that is the same for the file names of all numbered parts of a model, and different for other files."""
    part = _PART.fullmatch(name)
    return (part["stem"], part["count"], part["suffix"]) if part else (name,)


def part_number(name: str) -> int | None:
    """The number in the file name of one of several parts of a model; None for other files."""
    part = _PART.fullmatch(name)
    return int(part["number"]) if part and int(part["count"]) > 1 else None


def load_weight_map(path: Path, limit: int = MAX_HEADER) -> dict[str, str]:
    """Load {tensor name: file name} from an index of at most ``limit`` bytes.

    Raises:
        SourceError: the file is not an index, is damaged, or refers to another folder.
    """
    try:
        with open_regular_file(path) as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise ValueError(f"more than {limit:,} bytes")
            index = parse_bounded_json(file.read())
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}; check the disk.", file=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({error}); download it again.", file=str(path)) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise SourceError(
            f"{path} is a JSON file without a weight_map of tensors to files; give the index of a sharded model, or the model itself.",
            file=str(path),
        )
    for file in weight_map.values():
        if file in ("", ".", "..") or Path(file).name != file or set("\\\0") & set(file):
            raise SourceError(
                f"{path} refers to the file '{file}' outside its folder; download the index again.", file=str(path)
            )
    return weight_map


def find_index(path: Path) -> Path | None:
    """The index next to a file that lists it as one of several shards; None if there is none."""
    for index in sorted(path.parent.glob("*.index*.json")):
        with contextlib.suppress(SourceError):  # an index of another model may be damaged
            files = set(load_weight_map(index, _MAX_NEIGHBOUR).values())
            if path.name in files and len(files) > 1:
                return index
    return None


def find_parts(path: Path) -> list[Path]:
    """All files of a model, by the numbers in the name of one of them; one file if the name has none.

    Parts are numbered from 1, or from 0 where that one exists.
    """
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]

    def name(number: int) -> Path:
        digits = f"{number:0{len(part['number'])}}"
        return path.with_name(f"{part['stem']}{part['before']}{digits}{part['of']}{part['count']}{part['suffix']}")

    first = 0 if os.path.exists(name(0)) else 1
    parts = [name(number) for number in range(first, first + int(part["count"]))]
    return parts if path in parts else [path]


def require_files(path: Path, files: Sequence[Path], what: str) -> None:
    """Raise SourceError unless all files of the model exist; ``what``: why they are needed, ``path`` being one of them."""
    missing = [file.name for file in files if not os.path.exists(file)]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        names = f"{', '.join(missing[:_NAMED])}{more}"
        verb = "is" if len(missing) == 1 else "are"
        raise SourceError(
            f"{path} {what}, and {names} {verb} missing next to it; put all files of the model into one folder.",
            file=str(path),
        )


class ShardedFiles:
    """The files of one model as one :class:`~.source.SampledSource`. A context manager.

    Args:
        path: the file that was given: the index or one of the files.
        files: path of each file, in the order of their tensors.
        open_file: opens a file, given its place in the model.
        weight_map: tensor name → file name, as in the index; None if each tensor is in one of the files.

    Attributes:
        paths: the index, where there is one, and all files.
        size: bytes of all files.
        layers: quantization type → number of tensors dequantized from it.
        values: key-value pairs of the first file, if it is a GGUF.

    Raises:
        SourceError: a file is damaged, a tensor is in two files, or is not in the file that the index assigns it to.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        open_file: Callable[[Path, Part], TensorFile],
        weight_map: Mapping[str, str] | None = None,
    ):
        self.path, self.name = path, _INDEX.sub("", path.name)
        self._stack = contextlib.ExitStack()
        self.files: list[TensorFile] = []
        try:
            for number, file in enumerate(files):
                part = Part(number, len(files), self.files[0] if self.files else None)
                self.files.append(self._stack.enter_context(open_file(file, part)))
            self._shards = self._assign(weight_map)
        except BaseException:
            self._stack.close()
            raise
        self.paths = (*([] if path in files else [path]), *files)
        self.size = sum(file.size for file in self.files)
        self.metadata = {key: value for file in self.files for key, value in file.metadata.items()}
        self.values: Mapping[str, object] = getattr(self.files[0], "values", {})
        self.layers = dict(sum((Counter(getattr(file, "layers", {})) for file in self.files), Counter()))
        self.tensors: dict[str, TensorInfo] = {
            name: info for file in self.files for name, info in file.tensors.items() if self._shards.get(name) is file
        }

    def _assign(self, weight_map: Mapping[str, str] | None) -> dict[str, TensorFile]:
        """Return {tensor name: file that contains it}."""
        found: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.tensors:
                if found.setdefault(name, file) is not file and weight_map is None:
                    raise SourceError(
                        f"{self.path}: tensor {name} is in {found[name].name} and in {file.name}, so they are not parts of one "
                        "model; give the files of one model.",
                        file=str(self.path),
                        tensor=name,
                    )
        shards = {file.path.name: file for file in self.files}
        for name, file in (weight_map or {}).items():
            if name not in shards[file].tensors:
                raise SourceError(
                    f"{self.path} assigns tensor {name} to {file}, which does not contain it; download both again.",
                    file=str(self.path),
                    tensor=name,
                )
            found[name] = shards[file]
        return found

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Load one tensor onto ``device``."""
        return self._shards[name].read(name, device)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of a tensor, starting at byte ``offset`` of its contiguous memory."""
        return self._shards[name].sample(name, offset, length)

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def __enter__(self) -> "ShardedFiles":
        return self

    def __exit__(self, *exc) -> None:
        self.close()
