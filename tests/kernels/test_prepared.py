"""Prepared layers: the implementation is chosen once for everything on which the choice depends."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, prepared

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


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"x": random(2, 6, 96)}, id="tokens"),
        pytest.param({"x": random(10, 96)}, id="dimensions"),
        pytest.param({"x": random(2, 5, 96, dtype=torch.bfloat16)}, id="dtype"),
        pytest.param({"bias": None}, id="bias"),
        pytest.param({"bias": BIAS.bfloat16()}, id="bias dtype"),
        pytest.param({"out_dtype": torch.float16}, id="output dtype"),
        pytest.param({"rotate_by": 16}, id="rotation"),
        pytest.param({"scale": torch.tensor(0.02)}, id="scale per tensor"),
        pytest.param({"x": torch.zeros(961)[1:].view(2, 5, 96)}, id="alignment"),
    ],
)
def test_other_arguments_are_chosen_again(choices, change):
    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    usual = {"x": random(2, 5, 96), "codes": qdata, "scale": scale, "bias": BIAS, "out_dtype": None, "rotate_by": 0}
    kernels.scaled_linear(**usual)
    kernels.scaled_linear(**{**usual, **change})
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


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"scale": torch.ones(48, 1)}, id="scale per row"),
        pytest.param({"scale": torch.ones((), dtype=torch.bfloat16)}, id="dtype of the scale"),
        pytest.param({"input_scale": torch.ones((), dtype=torch.bfloat16)}, id="dtype of the input scale"),
        pytest.param({"input_scale": torch.ones(96)}, id="input scale per channel"),
        pytest.param({"input_scale": torch.ones((), device="meta")}, id="device of the input scale"),
        pytest.param({"qdata": torch.empty(40, 96)}, id="output channels"),
    ],
)
def test_static_fp8_layer_needs_one_float32_scale(monkeypatch, change):
    monkeypatch.setattr(prepared, "_can_run_fp8", lambda device: True)
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cpu"))
    usual = {"qdata": torch.empty(48, 96), "scale": torch.ones(()), "input_scale": torch.ones(1)}
    assert kernels.has_static_fp8(x, **usual) and kernels.has_static_fp8(x, **{**usual, "input_scale": None})
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
    for tokens in range(1, 8):
        kernels.int8_row_linear(random(tokens, 96), qdata, scale)
        assert len(prepared._kept) <= 3


def test_kept_layers_keep_no_tensor(choices):
    import gc
    import weakref

    qdata, scale = kernels.quantize_int8_row_weight(WEIGHT)
    kernels.int8_row_linear(random(5, 96), qdata, scale)
    freed = weakref.ref(qdata)
    del qdata
    gc.collect()
    assert prepared._kept and freed() is None
