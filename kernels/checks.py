"""Checks of the arguments of the public functions."""

import torch

__all__ = [
    "ROTATIONS",
    "can_rotate",
    "check",
    "check_block_size",
    "check_linear",
    "check_rotation",
    "check_scale",
    "check_w4a8",
    "check_w4a8_weight",
]

ROTATIONS = (0, 16, 64, 256)  # group sizes of the Hadamard rotation; 0: none


def check(condition: bool, message: str, *values) -> None:
    if not condition:
        raise ValueError(message.format(*values))


def check_block_size(block_size: int) -> None:
    check(
        isinstance(block_size, int) and block_size > 0,
        "The block size must be a positive integer, not {!r}.",
        block_size,
    )


def can_rotate(inner: int, rotate_by: int) -> bool:
    """Whether the kernels rotate ``inner`` channels in groups of ``rotate_by``; 0 for none."""
    return rotate_by in ROTATIONS and inner % (rotate_by or 1) == 0


def check_rotation(inner: int, rotate_by: int, block_size: int = 0) -> None:
    check(
        not (rotate_by and block_size),
        "A rotated weight needs scales per row or per tensor; leave out rotate_by or block_size.",
    )
    check(rotate_by in ROTATIONS, "The rotation group size must be 16, 64 or 256, not {}.", rotate_by)
    check(
        not rotate_by or inner % rotate_by == 0,
        "Rotation groups of {} do not divide {} channels; choose a smaller group.",
        rotate_by,
        inner,
    )


def check_scale(qdata: torch.Tensor, scale: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the scale in the shape that kernels expect: (N, 1), (1, 1) or one per block.

    Raises:
        ValueError: the scale's shape does not match the quantized weight.
    """
    out, inner = qdata.shape
    if block_size:
        expected = -(-out // block_size), -(-inner // block_size)
        check(
            scale.shape == expected,
            "A quantized weight {} in blocks of {} needs a scale of shape {}, not {}.",
            tuple(qdata.shape),
            block_size,
            expected,
            tuple(scale.shape),
        )
        return scale
    check(
        scale.numel() in (1, out),
        "A quantized weight {} needs a scale with 1 or {} values, not of shape {}.",
        tuple(qdata.shape),
        out,
        tuple(scale.shape),
    )
    return scale.reshape(-1, 1)


def check_w4a8_weight(qdata, group_scale, codebook) -> None:
    """Check the tensors of a W4A8 weight: qdata (N, K/2) of one byte, group_scale (N, groups), codebook (16,) or None.

    Raises:
        ValueError: they do not match.
    """
    shape, groups = tuple(qdata.shape), tuple(group_scale.shape)
    check(
        len(shape) == len(groups) == 2 and groups[0] == shape[0] and groups[1] > 0 and shape[1] % groups[1] == 0,
        "A W4A8 weight of shape {} has no groups for scales of shape {}.",
        shape,
        groups,
    )
    check(
        group_scale.dtype in (torch.float8_e4m3fn, torch.float32),
        "Group scales must be float8_e4m3fn or float32, not {}.",
        group_scale.dtype,
    )
    check(
        codebook is None or (codebook.shape == (16,) and codebook.dtype is torch.float32),
        "A codebook must have 16 float32 values, not {}.",
        None if codebook is None else f"{codebook.dtype} {tuple(codebook.shape)}",
    )


def check_linear(x, qdata, scale, bias, block_size: int, rotate_by: int) -> None:
    """Check the shapes of a linear layer's tensors: x (…, K), qdata (N, K), its scale and its bias.

    Raises:
        ValueError: they do not match.
    """
    check(
        x.shape[-1] == qdata.shape[1],
        "Activations with {} channels do not match a quantized weight of shape {}.",
        x.shape[-1],
        tuple(qdata.shape),
    )
    check(
        bias is None or bias.shape == qdata.shape[:1],
        "The bias must have shape ({},) to match a quantized weight of shape {}.",
        qdata.shape[0],
        tuple(qdata.shape),
    )
    check_rotation(qdata.shape[1], rotate_by, block_size)
    check_scale(qdata, scale, block_size)


def check_w4a8(x, qdata, group_scale, scale, codebook, bias, rotate_by: int) -> None:
    """Check the tensors of a linear layer with a W4A8 weight: x (…, K), scale float32 (N,), bias (N,) or None.

    Raises:
        ValueError: they do not match.
    """
    check_w4a8_weight(qdata, group_scale, codebook)
    out, inner = qdata.shape[0], 2 * qdata.shape[1]
    check(
        x.shape[-1] == inner,
        "Activations with {} channels do not match a W4A8 weight with {}.",
        x.shape[-1],
        inner,
    )
    check(
        scale.shape == (out,) and scale.dtype is torch.float32,
        "A W4A8 weight with {} rows needs as many float32 scales, not {} {}.",
        out,
        scale.dtype,
        tuple(scale.shape),
    )
    check(
        bias is None or bias.shape == (out,),
        "The bias must have shape ({},) to match a W4A8 weight with {} rows.",
        out,
        out,
    )
    check_rotation(inner, rotate_by)
