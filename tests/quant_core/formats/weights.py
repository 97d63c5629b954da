"""Weights that quantizers find hard, and the bytes of the layers made of them."""

import torch

from learned_rounding.quant_core.formats import QuantizedWeight


def random(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def rows_of_all_sizes(shape) -> torch.Tensor:
    return random(shape) * torch.logspace(-5, 3, shape[0])[:, None]


def groups_of_all_sizes(shape) -> torch.Tensor:
    """Magnitudes of groups over 30 octaves in a row: scales are subnormal in E4M3, or round to zero."""
    exponents = torch.randint(-30, 1, (shape[0], shape[1] // 16), generator=torch.Generator().manual_seed(1))
    return torch.ldexp(random(shape), exponents.repeat_interleave(16, dim=1))


def heavy_tails(shape) -> torch.Tensor:
    return random(shape) ** 5 * 1e3


def with_zeros(shape) -> torch.Tensor:
    """A row and groups of zeros; of more, W4A8's codes would be fitted."""
    weight = random(shape)
    weight[3] = 0
    weight[7, : shape[1] // 2] = 0
    return weight


def with_outlier(shape) -> torch.Tensor:
    weight = random(shape)
    weight[-1, -1] = 3e4
    return weight


def values_of_all_sizes(shape) -> torch.Tensor:
    """Magnitudes over 60 octaves, so that group scales overflow, underflow and vanish."""
    exponents = torch.randint(-40, 20, shape, generator=torch.Generator().manual_seed(1))
    return torch.ldexp(random(shape), exponents)


def ties(shape) -> torch.Tensor:
    """Multiples of a quarter: many values halfway between two elements, and amax values that are powers of two."""
    return torch.randint(-32, 33, shape, generator=torch.Generator().manual_seed(2)) / 4


def with_negative_zeros(shape) -> torch.Tensor:
    weight = random(shape)
    weight[::3] = 0
    weight[1::3, : shape[1] // 2] = -0.0
    weight[0, 0] = 1.0
    return weight


def tiny(shape) -> torch.Tensor:
    """Groups of MXFP8 whose scale is 2^−126, the smallest one that comfy-kitchen dequantizes."""
    return random(shape).sign() * torch.finfo(torch.float32).tiny * 448


def powers(shape) -> torch.Tensor:
    """amax of each group is 448 or 6 times a power of two, or the float32 next to it."""
    weight = random(shape)
    exponents = torch.arange(shape[0]) % 20 - 10
    largest = torch.ldexp(torch.where(torch.arange(shape[0]) % 2 == 0, 448.0, 6.0), exponents)
    weight[:, 0] = torch.where(torch.arange(shape[0]) % 3 == 0, torch.nextafter(largest, largest * 2), largest)
    return weight


# For formats of groups or rows with at least eight rows and a multiple of 16 columns.
HARD = (random, rows_of_all_sizes, groups_of_all_sizes, heavy_tails, with_zeros, with_outlier)
# For any shape.
MICROSCALED = (random, values_of_all_sizes, ties, with_negative_zeros, with_outlier, tiny, powers)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, flat."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def parts_of(made: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors of a layer in a file, by the last part of their names."""
    return {key.removeprefix("a."): tensor for key, tensor in made.tensors("a").items()}


def stored_values(made: QuantizedWeight) -> torch.Tensor:
    """The dequantized weight before the rotation to the original basis."""
    return made.codec.solve_space(made.shape).decode(made.qdata, made.scale)


def hessian_of(channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2 * channels, channels, generator=generator) * torch.logspace(0, -1, channels)
    return x.t() @ x / len(x)


def correlated_hessian() -> torch.Tensor:
    """Of 64 channels whose activations have few strong directions."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)
    x = torch.randn(4096, 64, generator=generator) @ mixing
    return x.t() @ x / len(x)
