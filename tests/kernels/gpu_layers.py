"""Linear layers at the sizes of real models on a GPU, by the name of their public function."""

import torch

from learned_rounding import kernels

LAYERS = {  # name → (weight quantizer, block size)
    "int8_block_linear": (kernels.quantize_int8_block_weight, 128),
    "fp8_block_linear": (kernels.quantize_fp8_block_weight, 128),
    "int8_row_linear": (kernels.quantize_int8_row_weight, 0),
    "fp8_row_linear": (kernels.quantize_fp8_row_weight, 0),
}


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def make_layer(name, weight, block_size=None):
    """Function (x, bias=None, **options) of a layer with that weight, quantized."""
    quantize, usual = LAYERS[name]
    blocks = {"block_size": block_size or usual} if usual else {}
    qdata, scale = quantize(weight, *blocks.values())
    return lambda x, bias=None, **options: getattr(kernels, name)(x, qdata, scale, bias, **blocks, **options)


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


def replay_in_graph(run, x, other):
    """Output of a call that a CUDA graph recorded for x, replayed after x has got the values of ``other``."""
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    x.copy_(other)
    graph.replay()
    return out
