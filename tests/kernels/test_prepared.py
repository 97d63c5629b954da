"""Prepared layers: the implementation is chosen once for everything on which the choice depends."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, prepared
from learned_rounding.tests.kernels.gpu_layers import LAYERS, make_layer, relative
from learned_rounding.tests.kernels.gpu_layers import random as on_gpu

WEIGHT = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(48, generator=torch.Generator().manual_seed(2))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def choices(monkeypatch):
    """List of the operations for which an implementation is chosen."""
    prepared._kept.clear()
    chosen, choose = [], backends.implementation

    def implementation(operation, *arguments):
        chosen.append(operation)
        return choose(operation, *arguments)

    monkeypatch.setattr(backends, "implementation", implementation)
    yield chosen
    prepared._kept.clear()


def test_implementation_is_chosen_once_per_shape(choices):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    want = [torch.nn.functional.linear(random(2, 5, 96, seed=seed), WEIGHT, BIAS) for seed in range(3)]
    for seed, expected in enumerate(want):
        got = kernels.int8_row_linear(random(2, 5, 96, seed=seed), qdata, scale, BIAS)
        assert (got - expected).norm() / expected.norm() < 0.02
    assert choices == ["scaled_linear"]


CHANGES = {
    "tokens": {"x": random(2, 6, 96)},
    "dimensions": {"x": random(10, 96)},
    "dtype": {"x": random(2, 5, 96, dtype=torch.bfloat16)},
    "bias": {"bias": None},
    "bias dtype": {"bias": BIAS.bfloat16()},
    "output dtype": {"out_dtype": torch.float16},
    "rotation": {"rotate_by": 16},
    "scale per tensor": {"scale": torch.tensor(0.02)},
    "alignment": {"x": torch.zeros(961)[1:].view(2, 5, 96)},
}


def test_other_arguments_are_chosen_again(subtests, choices):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    usual = {"x": random(2, 5, 96), "codes": qdata, "scale": scale, "bias": BIAS, "out_dtype": None, "rotate_by": 0}
    for name, change in CHANGES.items():
        prepared._kept.clear()
        choices.clear()
        kernels.scaled_linear(**usual)
        kernels.scaled_linear(**{**usual, **change})
        with subtests.test(name):
            assert choices == ["scaled_linear"] * 2


def test_alignment_of_the_weight_is_part_of_the_choice(choices):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    shifted = torch.empty(qdata.numel() + 1, dtype=torch.int8)[1:].view(qdata.shape).copy_(qdata)
    x = torch.zeros(961)[1:].view(10, 96).copy_(random(10, 96))
    want = kernels.int8_row_linear(x, qdata, scale)
    assert torch.equal(kernels.int8_row_linear(x, shifted, scale), want)
    assert len(choices) == 2  # a weight that is not aligned cannot be loaded by TMA


def test_bias_of_other_strides_gives_the_same_result(choices):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    seen = []
    want = kernels.int8_row_linear(random(5, 96), qdata, scale, BIAS)
    ((key, linear),) = prepared._kept.items()
    prepared._kept[key] = lambda x, qdata, scale, bias: seen.append(bias.stride()) or linear(x, qdata, scale, bias)
    strided = torch.stack([BIAS, BIAS], 1)[:, 0]
    assert torch.equal(kernels.int8_row_linear(random(5, 96), qdata, scale, strided), want)
    assert seen == [(1,)]  # kernels read consecutive values


@pytest.mark.parametrize("static", [False, True])
def test_layer_on_another_gpu_runs_while_that_gpu_is_the_current_one(monkeypatch, choices, static):
    events = []

    @contextlib.contextmanager
    def device(device):
        events.append(device)
        yield
        events.append("end")

    class Kept(prepared.KeptFunctions):
        def get(self, key):
            events.append("layer")
            return super().get(key)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(prepared, "_is_on_other_gpu", lambda x: not events)
    monkeypatch.setattr(prepared, "_kept", Kept())
    x = random(32, 96)
    if static:
        pytest.importorskip("triton")
        qdata = random(48, 96).to(torch.float8_e4m3fn)
        got = kernels.fp8_static_linear(x.bfloat16(), qdata, torch.ones(()))
        assert (got.float() - x @ qdata.float().T).norm() < 0.05 * got.float().norm()
    else:
        kernels.int8_row_linear(x, *kernels.quantize_int8_row_weight(WEIGHT))
    assert events == [x.device, "layer", "end"]


UNFIT = {
    "scale per row": {"scale": torch.ones(48, 1)},
    "dtype of the scale": {"scale": torch.ones((), dtype=torch.bfloat16)},
    "dtype of the input scale": {"input_scale": torch.ones((), dtype=torch.bfloat16)},
    "input scale per channel": {"input_scale": torch.ones(96)},
    "device of the input scale": {"input_scale": torch.ones((), device="meta")},
    "output channels": {"qdata": torch.empty(40, 96)},
}


def test_static_fp8_layer_needs_one_float32_scale(subtests, monkeypatch):
    monkeypatch.setattr(prepared, "_can_run_fp8", lambda device: True)
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cpu"))
    usual = {"qdata": torch.empty(48, 96), "scale": torch.ones(()), "input_scale": torch.ones(1)}
    assert kernels.has_static_fp8(x, **usual)
    assert kernels.has_static_fp8(x, **{**usual, "input_scale": None})
    for name, change in UNFIT.items():
        with subtests.test(name):
            assert not kernels.has_static_fp8(x, **{**usual, **change})


@pytest.mark.parametrize("fails", [False, True])
def test_static_fp8_layers_are_tested_before_they_are_used(monkeypatch, caplog, fails):
    def run(x, qdata, scale):
        if fails:
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(prepared.devices, "is_nvidia", lambda: True)
    monkeypatch.setattr(prepared.devices, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.setattr(prepared, "fp8_static_linear", run)
    assert prepared._can_run_fp8.__wrapped__(torch.device("cpu")) is not fails
    assert ("Failed to find C compiler." in caplog.text) is fails


def test_backend_is_part_of_the_choice(choices):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    for _ in range(2):
        kernels.int8_row_linear(random(5, 96), qdata, scale)
        with kernels.using("reference"):
            kernels.int8_row_linear(random(5, 96), qdata, scale)
    assert len(choices) == 2


def test_strided_tensors_and_scales_of_other_dtypes_give_the_same_result(choices):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    x = random(5, 96)
    want = kernels.int8_row_linear(x, qdata, scale)
    strided = torch.cat([x, x], 1)[:, :96], torch.cat([qdata, qdata], 1)[:, :96]
    assert torch.equal(kernels.int8_row_linear(*strided, scale), want)
    assert torch.equal(kernels.int8_row_linear(x, qdata, scale.double()), want)
    assert len(choices) == 1


def test_number_of_kept_shapes_is_limited(monkeypatch, choices):
    monkeypatch.setattr(prepared._kept, "limit", 3)
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    counts = []
    for tokens in range(1, 8):
        kernels.int8_row_linear(random(tokens, 96), qdata, scale)
        counts.append(len(prepared._kept))
    assert max(counts) == 3


def test_kept_layers_keep_no_tensor(choices):
    import gc
    import weakref

    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    kernels.int8_row_linear(random(5, 96), qdata, scale)
    freed = weakref.ref(qdata)
    del qdata
    gc.collect()
    assert prepared._kept
    assert freed() is None


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_repeated_calls_equal_the_first_one(empty_cache, name, backend):
    """Later calls use kept launches, with tensors at other addresses and of another alignment."""
    run = make_layer(name, on_gpu(1024, 1024, seed=1))
    with kernels.using("reference"):
        want = [run(on_gpu(512, 1024, seed=seed)) for seed in range(4)]
    with kernels.using(backend):
        for seed, expected in enumerate(want):
            x = on_gpu(512, 1024, seed=seed)
            shifted = torch.empty(512 * 1024 + 1, dtype=x.dtype, device="cuda")[1:].view(512, 1024).copy_(x)
            first = run(x)
            assert relative(first, expected.double()) < 1e-2
            assert torch.equal(run(x.view(2, 256, 1024)).view(512, -1), first)
            assert relative(run(shifted), expected.double()) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("calibrated", [False, True])
def test_static_fp8_layer_matches_float64(calibrated):
    if not kernels.has_static_fp8(on_gpu(1, 16), on_gpu(16, 16), torch.ones((), device="cuda")):
        pytest.skip("needs SM 8.9")
    x, weight, bias = on_gpu(2, 500, 1024), on_gpu(720, 1024, seed=1), on_gpu(720, seed=2)
    scale = weight.abs().max().float() / 448
    input_scale = x.abs().max().float() / 448 if calibrated else None
    qdata = (weight.float() / scale).to(torch.float8_e4m3fn)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    got, again = (kernels.fp8_static_linear(x, qdata, scale, input_scale, bias) for _ in range(2))
    assert got.shape == (2, 500, 720)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, again)
    assert relative(got, want) < 0.05
