"""The true tensors of every model ComfyUI knows: names, shapes, and which are linear layers ComfyUI reads as quantized.

`collect` builds them from ComfyUI's classes, `lists` keeps them as text in `lists/`.
"""

from .lists import Tensor, architectures, read

__all__ = ["Tensor", "architectures", "read"]
