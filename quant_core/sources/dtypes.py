"""Dtype names of the safetensors format."""

import torch

__all__ = ["DTYPE_NAMES", "SOURCE_DTYPES", "TORCH_DTYPES", "UNREADABLE_DTYPES"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
} | ({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {})

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

UNREADABLE_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
"""Other dtypes of the safetensors format, which ComfyUI does not load; the last one only where torch lacks it."""

SOURCE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of weights that can be quantized; tensors of any other dtype are copied unchanged."""
