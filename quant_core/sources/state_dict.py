"""State dicts in memory as a source."""

from collections.abc import Mapping

import torch

from .source import CPU, TensorInfo

__all__ = ["TensorSource"]


class TensorSource:
    """State dict as a :class:`~.source.SampledSource`. The tensors are not copied."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, name: str = "state dict"
    ):
        self._tensors = tensors
        self.name = name
        self.tensors = {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        self.metadata = dict(metadata or {})

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Move one tensor to ``device``; a tensor that is already there is returned itself."""
        return self._tensors[name].to(device)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of a tensor, starting at byte ``offset`` of its contiguous memory."""
        flat = self._tensors[name].detach().contiguous().flatten().view(torch.uint8)
        return flat[offset : offset + length].cpu().numpy().tobytes()
