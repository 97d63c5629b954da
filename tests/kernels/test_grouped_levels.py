"""Linear layers with W4A8 weights: the Triton kernels against plain torch, which is checked against float64."""

from types import SimpleNamespace

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, prepared, reference
from learned_rounding.kernels.hadamard import rotate
from learned_rounding.tests.kernels.gpu_layers import random as on_gpu
from learned_rounding.tests.kernels.gpu_layers import replay_in_graph

CODEBOOK = torch.linspace(-0.98, 0.97, 16)
# Name → (out, in, group size, codebook, dtype of the group scales).
WEIGHTS = {
    "codebook": (18, 96, 16, CODEBOOK, torch.float8_e4m3fn),
    "uniform": (17, 64, 16, None, torch.float32),
    "long groups": (16, 128, 32, CODEBOOK, torch.float8_e4m3fn),
    "odd groups": (16, 96, 48, None, torch.float8_e4m3fn),
}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_weight(name, device="cpu"):
    """qdata, group scales, scales and codebook; among the group scales are zero, the smallest one and one that saturates."""
    out, inner, group, codebook, dtype = WEIGHTS[name]
    generator = torch.Generator().manual_seed(1)
    qdata = torch.randint(-128, 128, (out, inner // 2), generator=generator, dtype=torch.int8)
    scale = torch.rand(out, inner // group, generator=generator) * 128
    scale[:3, 0] = torch.tensor([0.0, 2.0**-9, 448.0])
    channel = torch.rand(out, generator=generator) * 0.01
    tensors = qdata, scale.to(dtype), channel, codebook
    return tuple(None if tensor is None else tensor.to(device) for tensor in tensors)


@pytest.fixture(scope="module")
def triton_levels(device):
    from learned_rounding.kernels.triton import grouped_levels

    return grouped_levels


@pytest.fixture
def small_gpu(device, monkeypatch, triton_levels):
    """Eight multiprocessors, and programs of few columns and units, for the interpreter."""
    if device.type == "cpu":
        found = SimpleNamespace(multi_processor_count=8, major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        few = {tokens: triton_levels.FewTokens(8, 4, 1) for tokens in triton_levels.FEW_TOKENS}
        monkeypatch.setattr(triton_levels, "FEW_TOKENS", few)


def test_expanded_weight_is_the_rounded_product_of_level_and_scale(subtests):
    for name in WEIGHTS:
        qdata, scale, _, codebook = make_weight(name)
        group = WEIGHTS[name][2]
        got = kernels.expand_w4a8_weight(qdata, scale, codebook)
        for row, column in ((0, 0), (1, 1), (2, 2), (2, 7), (7, 9), (15, group + 2)):
            byte = int(qdata[row, column // 2]) & 255
            index = byte >> 4 if column % 2 else byte & 15
            level = index - 8 if codebook is None else float(codebook[index])
            value = torch.tensor(level * float(scale[row, column // group]), dtype=torch.float64)
            with subtests.test(name, row=row, column=column):
                assert int(got[row, column]) == int(value.round().clamp(-127, 127))


def test_expansion_in_triton_is_bit_identical(subtests, triton_levels, device):
    for name in WEIGHTS:
        qdata, scale, _, codebook = make_weight(name, device)
        want = reference.expand_weight(qdata, scale, codebook)
        with subtests.test(name):
            assert torch.equal(triton_levels.expand_weight(qdata, scale, codebook), want)


@pytest.mark.parametrize("rotate_by", [0, 16])
def test_layer_matches_float64(subtests, rotate_by):
    for name in WEIGHTS:
        qdata, scale, channel, codebook = make_weight(name)
        weight = kernels.expand_w4a8_weight(qdata, scale, codebook).double() * channel[:, None].double()
        x, bias = random(3, 5, 2 * qdata.shape[1]), random(qdata.shape[0], seed=2)
        activations = rotate(x, rotate_by) if rotate_by else x
        want = activations.double() @ weight.t() + bias.double()
        got = kernels.w4a8_linear(x, qdata, scale, channel, codebook, bias, rotate_by=rotate_by)
        with subtests.test(name):
            assert got.dtype is torch.float32
            assert got.shape == (3, 5, qdata.shape[0])
            assert (got - want).norm() / want.norm() < 0.02


LAYERS = [  # weight, tokens, rotation, bias; each weight with few tokens and with an expanded weight
    ("codebook", 1, 16, True),
    ("codebook", 5, 0, False),
    ("uniform", 3, 0, True),
    ("uniform", 5, 16, True),
    ("long groups", 2, 16, False),
    ("long groups", 5, 0, True),
    ("odd groups", 1, 0, False),
    ("odd groups", 36, 16, False),
]


@pytest.mark.parametrize("name, tokens, rotate_by, with_bias", LAYERS)
def test_layer_in_triton_matches_plain_torch(triton_levels, small_gpu, device, name, tokens, rotate_by, with_bias):
    qdata, scale, channel, codebook = make_weight(name, device)
    x, bias = random(tokens, 2 * qdata.shape[1]).to(device), random(qdata.shape[0], seed=2).to(device)
    arguments = x, qdata, scale, channel, codebook, bias if with_bias else None
    options = rotate_by, torch.float32
    want = reference.prepare_w4a8_linear(*arguments, *options)(*arguments)
    got = triton_levels.prepare_w4a8_linear(*arguments, *options)(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-3 * float(want.abs().max()) if rotate_by else 1e-4)


@pytest.mark.parametrize("most_splits", [1, 16])
def test_sums_of_parts_are_those_of_the_whole(triton_levels, small_gpu, device, monkeypatch, most_splits):
    monkeypatch.setattr(triton_levels, "_MOST_SPLITS", most_splits)
    units = 20 if device.type == "cpu" else 520
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = triton_levels._count_splits(triton_levels.FEW_TOKENS[4], 10, units, processors)
    assert (splits > 1) == (most_splits > 1)
    qdata = torch.randint(-128, 128, (10, 8 * units), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    scale, channel = torch.full((10, units), 40.0, device=device), torch.full((10,), 0.01, device=device)
    arguments = random(3, 16 * units).to(device), qdata.to(device), scale, channel, CODEBOOK.to(device), None
    got = triton_levels.prepare_w4a8_linear(*arguments, 0, torch.float32)(*arguments)
    want = reference.prepare_w4a8_linear(*arguments, 0, torch.float32)(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_input_channels_are_split_until_all_multiprocessors_have_programs(subtests, triton_levels):
    launch = triton_levels.FewTokens(4, 64, 4)
    for columns, units, processors, splits in (
        (4, 64, 8, 1),  # one step
        (4, 64 * 5, 8, 4),  # the largest power of two with a step for each part
        (4, 64 * 100, 8, 16),  # the most
        (128, 64 * 100, 8, 1),  # 32 tiles are four for each of eight
        (64, 64 * 100, 8, 2),
    ):
        with subtests.test(columns=columns, units=units):
            assert triton_levels._count_splits(launch, columns, units, processors) == splits


def test_token_with_nan_or_infinity_is_not_finite_and_others_are_unchanged(triton_levels, small_gpu, device):
    qdata, scale, channel, codebook = make_weight("uniform", device)
    x = random(4, 64).to(device)
    arguments = [x, qdata, scale, channel, codebook, None]
    run = triton_levels.prepare_w4a8_linear(*arguments, 0, torch.float32)
    want = run(*arguments)
    arguments[0] = x.clone()
    arguments[0][1, 3], arguments[0][2, 4] = float("nan"), float("inf")
    got = run(*arguments)
    assert not got[1:3].isfinite().any()
    assert torch.equal(got[[0, 3]], want[[0, 3]])


def test_implementation_is_chosen_once_per_shape(monkeypatch):
    chosen, choose = [], backends.implementation
    prepared._kept.clear()
    monkeypatch.setattr(backends, "implementation", lambda name, *args: chosen.append(name) or choose(name, *args))
    qdata, scale, channel, codebook = make_weight("codebook")
    for seed in range(3):
        kernels.w4a8_linear(random(2, 96, seed=seed), qdata, scale, channel, codebook)
    assert chosen == ["w4a8_linear"]
    kernels.w4a8_linear(random(2, 96), qdata, scale, channel, None)
    kernels.w4a8_linear(random(3, 96), qdata, scale, channel, codebook)
    kernels.w4a8_linear(random(2, 96), qdata, scale.float(), channel, codebook)
    assert chosen == ["w4a8_linear"] * 4


def test_compiled_layer_is_one_operator_with_the_shape_of_the_result():
    qdata, scale, channel, codebook = make_weight("codebook")

    def run(x):
        return kernels.w4a8_linear(x, qdata, scale, channel, codebook, rotate_by=16) + 1

    x = random(2, 3, 96, dtype=torch.bfloat16)
    compiled = torch.compile(run, backend="eager", fullgraph=True)(x)
    assert torch.equal(compiled, run(x))


# On a GPU


def w4a8_weight(out, inner, codebook, dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    qdata = torch.randint(-128, 128, (out, inner // 2), generator=generator, dtype=torch.int8, device="cuda")
    scale = (torch.rand(out, inner // 16, generator=generator, device="cuda") * 160).to(
        dtype
    )  # some levels are clamped
    channel = torch.rand(out, generator=generator, device="cuda") * 1e-3
    levels = torch.linspace(-0.98, 0.99, 16, device="cuda") if codebook else None
    return qdata, scale, channel, levels


@pytest.mark.gpu
@pytest.mark.parametrize("codebook", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32])
def test_weight_of_real_size_expands_to_the_values_of_plain_torch(codebook, dtype):
    qdata, scale, _, levels = w4a8_weight(3000, 3072, codebook, dtype)
    for group_scale in (scale, (scale.float() * 0.5).to(dtype)):  # with and without clamped levels
        want = reference.expand_weight(qdata, group_scale, levels)
        with kernels.using("triton"):
            assert torch.equal(kernels.expand_w4a8_weight(qdata, group_scale, levels), want)


@pytest.mark.gpu
@pytest.mark.parametrize("rotate_by", [0, 256])
@pytest.mark.parametrize(
    "tokens, out, inner", [(1, 3072, 12288), (2, 700, 512), (3, 3072, 3072), (5, 18432, 3072), (300, 1100, 768)]
)
def test_layer_of_real_size_matches_the_int8_layer_of_its_values(empty_cache, tokens, out, inner, rotate_by):
    qdata, scale, channel, levels = w4a8_weight(out, inner, True, torch.float8_e4m3fn)
    x, bias = on_gpu(tokens, inner), on_gpu(out, seed=2)
    with kernels.using("triton"):
        values = kernels.expand_w4a8_weight(qdata, scale, levels)
        want = kernels.int8_row_linear(x, values, channel[:, None], bias, rotate_by=rotate_by, out_dtype=torch.float32)
        for _ in range(3):  # later calls use kept launches
            got = kernels.w4a8_linear(
                x, qdata, scale, channel, levels, bias, rotate_by=rotate_by, out_dtype=torch.float32
            )
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 512])
def test_layer_replays_in_a_cuda_graph(empty_cache, tokens):
    weight, x = w4a8_weight(1024, 1024, True, torch.float8_e4m3fn), on_gpu(tokens, 1024)

    def run(x):
        return kernels.w4a8_linear(x, *weight, rotate_by=256)

    want = run(x)
    out = replay_in_graph(run, x, on_gpu(tokens, 1024, seed=3))
    assert not torch.equal(out, want)
    assert torch.equal(out, run(x))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 512])
def test_layer_compiles_without_a_graph_break(empty_cache, tokens):
    weight, x = w4a8_weight(1024, 1024, True, torch.float8_e4m3fn), on_gpu(tokens, 1024)

    def block(x):
        return torch.nn.functional.gelu(kernels.w4a8_linear(x, *weight, rotate_by=256)) * 2

    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=0.02, atol=0.02)
