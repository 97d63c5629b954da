"""Kernels on a GPU at the sizes of real models: every backend against float64, CUDA graphs, torch.compile, the cache."""

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import prepared, tuning

pytestmark = pytest.mark.gpu

INT8, FP8 = torch.int8, torch.float8_e4m3fn
LAYERS = {
    "int8_block_linear": (kernels.quantize_int8_block_weight, 128),
    "fp8_block_linear": (kernels.quantize_fp8_block_weight, 128),
    "int8_row_linear": (kernels.quantize_int8_row_weight, 0),
    "fp8_row_linear": (kernels.quantize_fp8_row_weight, 0),
}


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def layer(name, weight, block_size=None):
    quantize, usual = LAYERS[name]
    blocks = {"block_size": block_size or usual} if usual else {}
    qdata, scale = quantize(weight, *blocks.values())
    return lambda x, bias=None, **options: getattr(kernels, name)(x, qdata, scale, bias, **blocks, **options)


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    prepared._kept.clear()  # functions that were chosen by another test's measurements
    yield tuning.cache_file()
    tuning._load_cache.cache_clear()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "reference"])
@pytest.mark.parametrize(
    "tokens, out, inner", [(1, 3072, 3072), (40, 320, 640), (256, 3072, 12288), (1000, 1100, 720), (4096, 3072, 3072)]
)
def test_layers_match_float64(cache, name, backend, tokens, out, inner):
    x, weight, bias = random(tokens, inner), random(out, inner, seed=1), random(out, seed=2)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    with kernels.using(backend):
        got = layer(name, weight)(x, bias)
    assert got.dtype is torch.bfloat16
    assert relative(got, want) < (0.02 if "int8" in name else 0.05)


@pytest.mark.parametrize("name", ["int8_block_linear", "fp8_block_linear"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 1024])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_block_sizes_and_output_dtypes_match_float64(name, block_size, out_dtype):
    x, weight, bias = random(1024, 3072), random(3000, 3072, seed=1), random(3000, seed=2)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    with kernels.using("triton"):
        got = layer(name, weight, block_size)(x, bias, out_dtype=out_dtype)
    assert got.dtype is out_dtype and relative(got, want) < (0.02 if "int8" in name else 0.05)


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize(
    "tokens, out, inner",
    [(300, 700, 384), (4096, 3072, 3072), (2048, 12288, 1040), (4608, 3072, 1536), (513, 12200, 512)],
)
def test_hopper_kernel_is_bit_identical_to_the_generic_one(dtype, tokens, out, inner):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs SM 9.0")
    from learned_rounding.kernels.triton import hopper, linear, quantize

    qdata, scale = quantize.quantize_weight(random(out, inner, seed=1), dtype, 128)
    x = random(tokens, inner)
    activations, input_scale = quantize.prepare_quantizer(x, dtype, 128, 0)(x)
    for bias in (None, random(out, seed=2)):
        operands = linear.Operands(quantize.as_bits(activations), input_scale, quantize.as_bits(qdata), scale, bias)
        plain = linear.prepare_product(operands, 128, torch.bfloat16, linear.Launch(64, 128, 128, 4, 3, tma=True))
        special = hopper.prepare_product(operands, 128, torch.bfloat16, hopper.SHIPPED)
        assert torch.equal(special(operands), plain(operands))


def test_more_than_two_billion_elements_are_indexed():
    x = torch.zeros(2**31 // 2048 + 100, 2048, dtype=torch.bfloat16, device="cuda")
    x[-1] = random(2048)
    weight = random(128, 2048, seed=1)
    want = x[-1:].double() @ weight.double().t()
    with kernels.using("triton"):
        for name in ("int8_block_linear", "int8_row_linear"):
            got = layer(name, weight)(x)
            assert relative(got[-1:], want) < 0.02 and not got[:-1].any()


@pytest.mark.parametrize("name", LAYERS)
def test_layer_replays_in_a_cuda_graph(cache, name):
    weight, x = random(1024, 1024, seed=1), random(512, 1024)
    run = layer(name, weight)
    want = run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    x.copy_(random(512, 1024, seed=3))
    graph.replay()
    assert not torch.equal(out, want) and torch.equal(out, run(x))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_compiles_without_a_graph_break(cache, name):
    run = layer(name, random(1024, 1024, seed=1))
    block = torch.compile(lambda x: torch.nn.functional.gelu(run(x)) * 2, fullgraph=True)
    for tokens in (512, 384):
        x = random(tokens, 1024, seed=tokens)
        torch.testing.assert_close(block(x), torch.nn.functional.gelu(run(x)) * 2, rtol=0.02, atol=0.02)


def test_autotuning_caches_its_result_on_disk(cache):
    x, run = random(512, 1024), layer("int8_block_linear", random(1024, 1024, seed=1))
    with kernels.using("triton"):
        want = run(x)
    with kernels.using("autotuned"):
        first, again = run(x), run(x)
    assert torch.equal(first, again) and relative(first, want.double()) < 1e-2
    assert "launch; " in cache.read_text() and torch.cuda.get_device_name() in cache.read_text()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_repeated_calls_equal_the_first_one(cache, name, backend):
    """Later calls use kept launches, with tensors at other addresses and of another alignment."""
    run = layer(name, random(1024, 1024, seed=1))
    with kernels.using("reference"):
        want = [run(random(512, 1024, seed=seed)) for seed in range(4)]
    with kernels.using(backend):
        for seed, expected in enumerate(want):
            x = random(512, 1024, seed=seed)
            shifted = torch.empty(512 * 1024 + 1, dtype=x.dtype, device="cuda")[1:].view(512, 1024).copy_(x)
            first = run(x)
            assert relative(first, expected.double()) < 1e-2
            assert torch.equal(run(x.view(2, 256, 1024)).view(512, -1), first)
            assert relative(run(shifted), expected.double()) < 1e-2


@pytest.mark.parametrize("calibrated", [False, True])
def test_static_fp8_layer_matches_float64(calibrated):
    if not kernels.has_static_fp8(random(1, 16), random(16, 16), torch.ones((), device="cuda")):
        pytest.skip("needs SM 8.9")
    x, weight, bias = random(2, 500, 1024), random(720, 1024, seed=1), random(720, seed=2)
    scale = weight.abs().max().float() / 448
    input_scale = x.abs().max().float() / 448 if calibrated else None
    qdata = (weight.float() / scale).to(FP8)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    got = [kernels.fp8_static_linear(x, qdata, scale, input_scale, bias) for _ in range(2)]
    assert got[0].shape == (2, 500, 720) and got[0].dtype is torch.bfloat16
    assert torch.equal(*got) and relative(got[0], want) < 0.05


def test_results_are_deterministic():
    x, run = random(4096, 3072), layer("int8_block_linear", random(3072, 3072, seed=1))
    with kernels.using("triton"):
        first = run(x)
        assert all(torch.equal(run(x), first) for _ in range(20))


def w4a8_weight(out, inner, codebook, dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    qdata = torch.randint(-128, 128, (out, inner // 2), generator=generator, dtype=torch.int8, device="cuda")
    scale = (torch.rand(out, inner // 16, generator=generator, device="cuda") * 160).to(
        dtype
    )  # some levels are clamped
    channel = torch.rand(out, generator=generator, device="cuda") * 1e-3
    levels = torch.linspace(-0.98, 0.99, 16, device="cuda") if codebook else None
    return qdata, scale, channel, levels


@pytest.mark.parametrize("codebook", [True, False])
@pytest.mark.parametrize("dtype", [FP8, torch.float32])
def test_w4a8_weight_expands_to_the_values_of_plain_torch(codebook, dtype):
    from learned_rounding.kernels import reference

    qdata, scale, _, levels = w4a8_weight(3000, 3072, codebook, dtype)
    for group_scale in (scale, (scale.float() * 0.5).to(dtype)):  # with and without clamped levels
        want = reference.expand_weight(qdata, group_scale, levels)
        with kernels.using("triton"):
            assert torch.equal(kernels.expand_w4a8_weight(qdata, group_scale, levels), want)


@pytest.mark.parametrize("rotate_by", [0, 256])
@pytest.mark.parametrize(
    "tokens, out, inner", [(1, 3072, 12288), (2, 700, 512), (3, 3072, 3072), (5, 18432, 3072), (300, 1100, 768)]
)
def test_w4a8_layer_matches_the_int8_layer_of_its_values(cache, tokens, out, inner, rotate_by):
    qdata, scale, channel, levels = w4a8_weight(out, inner, True, FP8)
    x, bias = random(tokens, inner), random(out, seed=2)
    with kernels.using("triton"):
        values = kernels.expand_w4a8_weight(qdata, scale, levels)
        want = kernels.int8_row_linear(x, values, channel[:, None], bias, rotate_by=rotate_by, out_dtype=torch.float32)
        for _ in range(3):  # later calls use kept launches
            got = kernels.w4a8_linear(
                x, qdata, scale, channel, levels, bias, rotate_by=rotate_by, out_dtype=torch.float32
            )
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("tokens", [1, 512])
def test_w4a8_layer_replays_in_a_cuda_graph_and_compiles(cache, tokens):
    weight = w4a8_weight(1024, 1024, True, FP8)
    x = random(tokens, 1024)

    def run(x):
        return kernels.w4a8_linear(x, *weight, rotate_by=256)

    want = run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    x.copy_(random(tokens, 1024, seed=3))
    graph.replay()
    assert not torch.equal(out, want) and torch.equal(out, run(x))
    compiled = torch.compile(lambda x: torch.nn.functional.gelu(run(x)) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.nn.functional.gelu(run(x)) * 2, rtol=0.02, atol=0.02)
