"""GGUF files as a source: the package ``gguf`` reads and decodes them."""

import os
from collections import Counter
from pathlib import Path

import torch

from ..errors import MissingPackageError, SourceError
from .source import CPU, TensorInfo

__all__ = ["GGUFFile"]

_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PLAIN |= {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_DECODED = torch.bfloat16  # has the range of every scale; its rounding is a tenth of that of 8-bit codes
_SHAPE = "comfy.gguf.orig_shape."  # + name: of a tensor that was given another shape to be coded in whole blocks
_ENCODERS = ("t5", "t5encoder", "llama", "qwen2vl", "qwen3", "qwen3vl", "gemma2", "gemma3", "mistral3")


class GGUFFile:
    """A diffusion model in GGUF as a :class:`~.source.SampledSource`; codes are decoded, to bfloat16, when they are read. A context manager.

    Attributes:
        layers: type of code → how many tensors are decoded from it.

    Raises:
        MissingPackageError: ``gguf`` is not installed.
        SourceError: the file is damaged, or names its tensors as llama.cpp does.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            from gguf import GGUFReader
        except ImportError:
            raise MissingPackageError(
                "GGUF files need a package that is not installed here: run 'pip install gguf' in ComfyUI's Python, or give the "
                "original safetensors."
            ) from None
        self.path = Path(path)
        self.paths = (self.path,)
        self.name = self.path.name
        self.metadata: dict[str, str] = {}
        try:
            reader = GGUFReader(self.path)
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            shapes = {name: _shape(reader, tensor) for name, tensor in self._tensors.items()}
            architecture = reader.get_field("general.architecture")
            architecture = "" if architecture is None else architecture.contents()
        except OSError as error:
            raise SourceError(f"{self.path} cannot be opened: {error.strerror}.") from error
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise SourceError(f"{self.path} is no GGUF file or is damaged ({error}); fetch it again.") from None
        if architecture in _ENCODERS:
            raise SourceError(
                f"{self.path} is a text encoder ({architecture}) with the names that llama.cpp gives to its tensors; "
                "give the original safetensors."
            )
        self.tensors = {
            name: TensorInfo(_PLAIN.get(tensor.tensor_type.name, _DECODED), shapes[name]) for name, tensor in self._tensors.items()
        }
        self.layers = dict(Counter(tensor.tensor_type.name for tensor in self._tensors.values() if tensor.tensor_type.name not in _PLAIN))
        self.size = sum(tensor.n_bytes for tensor in self._tensors.values())

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor on ``device``, decoded."""
        from gguf import dequantize

        tensor, info = self._tensors[name], self.tensors[name]
        if tensor.tensor_type.name in _PLAIN:
            values = torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=info.dtype)
        else:
            try:
                values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
            except NotImplementedError:
                raise SourceError(
                    f"{self.path}: tensor {name} is coded as {tensor.tensor_type.name}, which cannot be decoded; give the original safetensors."
                ) from None
        return values.reshape(info.shape).to(device, info.dtype)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes of the stored codes, from where byte ``offset`` of the decoded tensor is."""
        tensor = self._tensors[name]
        codes = tensor.data.reshape(-1).view("uint8")
        start = offset * tensor.n_bytes // max(1, self.tensors[name].nbytes)
        return codes[start : start + length].tobytes()

    def close(self) -> None:
        """Let go of the file."""
        self._tensors = {}

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _shape(reader, tensor) -> tuple[int, ...]:
    """As torch has it: outermost first, and as it was before coding."""
    kept = reader.get_field(f"{_SHAPE}{tensor.name}")
    shape = tuple(reversed(tensor.shape.tolist())) if kept is None else tuple(int(kept.parts[index][0]) for index in kept.data)
    if torch.Size(shape).numel() != tensor.n_elements:
        raise ValueError(f"{tensor.name} has {tensor.n_elements} values and the shape {list(shape)}")
    return shape
