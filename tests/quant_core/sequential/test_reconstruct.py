"""Reconstruction of a block: better on its validation calls or unchanged, the same bytes again, refused without a usable backward pass."""

import contextlib

import pytest
import torch
from torch.nn import functional

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.rounding import OPTIMIZERS, SCHEDULES, RoundingConfig
from learned_rounding.quant_core.sequential.calls import replaced_forward
from learned_rounding.quant_core.sequential.gradients import without_inference_tensors
from learned_rounding.quant_core.sequential.reconstruct import RoundedLayer, reconstruct_block

WIDTH, TOKENS, CARD = 64, 24, (12, 0)
FORMATS = {
    "W4A8": {"format": "asym_w4a8_int8"},
    "W6A8": {"format": "asym_w4a8_int8", "bits": 6},
    "nvfp4": {"format": "nvfp4"},
    "INT8": {"format": "int8_tensorwise", "granularity": "row", "convrot": True},
    "FP8": {"format": "float8_e4m3fn"},
}


class AttentionBlock(torch.nn.Module):
    """Attention with two linear layers and a norm."""

    def __init__(self, attention=functional.scaled_dot_product_attention):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        self.attention = attention

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attention(*heads).transpose(1, 2).flatten(2))


class Calls:
    """Calls of a block with random inputs; the last two are validation calls."""

    def __init__(self, block, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        mixing = torch.randn(WIDTH, WIDTH, generator=generator) / 8
        self.block, self.calibration, self.validation = block, [0, 1, 2, 3, 4, 5], [6, 7]
        self.inputs = [(torch.randn(1, TOKENS, WIDTH, generator=generator) @ mixing).to(dtype) for _ in range(8)]
        self.targets = [AttentionBlock.forward(block.float(), x.float()).detach() for x in self.inputs]
        self.ran = []
        block.to(dtype)

    def run(self, call, linears):
        self.ran.append(call)
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_inference_tensors(self.block, [self.block.qkv, self.block.out]))
            for name, linear in linears.items():
                stack.enter_context(replaced_forward(self.block.get_submodule(name), linear))
            return [self.block(self.inputs[call].clone())]

    def target(self, call):
        return [self.targets[call]]


def make_case(format="W4A8", **options):
    """Calls of a block, and its layers rounded to nearest."""
    torch.manual_seed(0)
    block = AttentionBlock(**options).requires_grad_(False)
    calls = Calls(block)
    layers = {}
    for name in ("qkv", "out"):
        layer = block.get_submodule(name)
        quantized = quantize_weight(layer.weight, **FORMATS[format], rounding="nearest", bias=layer.bias)
        weight = layer.weight.detach().clone()
        layers[name] = RoundedLayer(weight, weight, quantized)
    return calls, layers


def reconstruct(calls, layers, *, steps=40, seed=0, check=lambda: None, on_step=lambda step, total: None, **options):
    rounding = RoundingConfig("calibrated", num_iter=steps, **options)
    return reconstruct_block(calls, layers, rounding, capability=CARD, seed=seed, check=check, on_step=on_step)


def all_tensors(result):
    return {name: tensor for layer, made in result.quantized.items() for name, tensor in made.tensors(layer).items()}


def assert_start(result, layers):
    assert all(result.quantized[name] is layer.quantized for name, layer in layers.items())
    assert result.after == result.before


@pytest.mark.parametrize("format", FORMATS)
def test_block_error_falls_with_neighbouring_values_that_can_be_stored(format):
    calls, layers = make_case(format)
    result = reconstruct(calls, layers)
    assert result.refused is None
    assert result.after < 0.99 * result.before
    for name, layer in layers.items():
        made, start = result.quantized[name], layer.quantized
        space = made.codec.solve_space(made.shape)
        space = space.with_levels(start.solution.levels) if start.solution.levels else space
        weight = space.basis.apply_weight(layer.weight) if space.basis else layer.weight
        low, high = space.neighbours(weight / space.divisor(start.scale))
        values = made.qdata.float()
        assert ((values == low) | (values == high) | (values == start.qdata.float())).all()
        assert made.qdata.dtype is start.qdata.dtype
        assert made.solver == "reconstructed"
        parts = {key.rpartition(".")[2]: tensor for key, tensor in made.tensors(name).items()}
        torch.testing.assert_close(made.codec.dequantize(parts, made.shape), made.dequantize())
        error = (made.dequantize() - layer.weight).norm() / layer.weight.norm()
        assert made.weight_error == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("optimizer, schedule", list(zip(OPTIMIZERS, [*SCHEDULES, None], strict=True)))
def test_every_optimizer_and_schedule_lowers_the_error(optimizer, schedule):
    result = reconstruct(*make_case("nvfp4"), steps=120, optimizer=optimizer, lr_schedule=schedule)
    assert result.after < result.before


@pytest.mark.parametrize("format", ["W4A8", "nvfp4"])
def test_validation_error_is_that_of_the_stored_layers(format):
    calls, layers = make_case(format)
    result = reconstruct(calls, layers)
    kept = {
        name: RoundedLayer(layers[name].weight, layers[name].weight, made) for name, made in result.quantized.items()
    }
    assert reconstruct(calls, kept, steps=0).before == pytest.approx(result.after, rel=1e-5)


def test_same_seed_gives_the_same_bytes_and_another_order_others():
    first, again, other = (all_tensors(reconstruct(*make_case(), seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_random_state_and_settings_are_left_alone():
    before = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    calls, layers = make_case()
    state = torch.get_rng_state()
    start = all_tensors(reconstruct(calls, layers, steps=0))
    reconstruct(calls, layers)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()) == before[1:]
    assert all(
        torch.equal(tensor, start[name]) for name, tensor in all_tensors(reconstruct(calls, layers, steps=0)).items()
    )


def test_steps_that_are_too_long_keep_the_start():
    calls, layers = make_case("W6A8")
    assert_start(reconstruct(calls, layers, steps=10, lr=900.0), layers)


def test_inference_mode_outside_changes_nothing():
    expected = all_tensors(reconstruct(*make_case()))
    with torch.inference_mode():
        calls, layers = make_case()
        assert calls.block.norm.weight.is_inference()
        assert layers["qkv"].weight.is_inference()
        result = reconstruct(calls, layers)
        assert calls.block.norm.weight.is_inference()
    assert result.refused is None
    assert all(torch.equal(tensor, expected[name]) for name, tensor in all_tensors(result).items())


def test_validation_calls_are_never_learned_from():
    calls, layers = make_case()
    differentiated = []
    run = calls.run

    def watch(call, linears):
        if torch.is_grad_enabled():
            differentiated.append(call)
        return run(call, linears)

    calls.run = watch
    reconstruct(calls, layers, steps=12)
    assert set(differentiated) == set(calls.calibration)
    assert sorted(differentiated[2:8]) == sorted(calls.calibration)  # after the check of the backward pass


def test_cancelling_raises_and_restores_the_settings():
    steps = []

    def check():
        if len(steps) == 3:
            raise KeyboardInterrupt

    calls, layers = make_case()
    with pytest.raises(KeyboardInterrupt):
        reconstruct(calls, layers, check=check, on_step=lambda step, total: steps.append((step, total)))
    assert steps == [(1, 40), (2, 40), (3, 40)]
    assert not torch.are_deterministic_algorithms_enabled()


def test_early_stop_ends_the_steps():
    steps = []
    calls, layers = make_case("W6A8")
    reconstruct(calls, layers, steps=100, lr=900.0, early_stop=10, on_step=lambda step, total: steps.append(step))
    assert steps[-1] == 10


def detached_attention(*heads):
    return functional.scaled_dot_product_attention(*(head.detach() for head in heads))


def failing_attention(*heads):
    return Failing.apply(functional.scaled_dot_product_attention(*heads))


def noisy_attention(*heads):
    return Noisy.apply(functional.scaled_dot_product_attention(*heads))


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("this attention has no backward pass")


class Noisy(Failing):
    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.rand_like(gradient)


@pytest.mark.parametrize(
    "attention, reason",
    [
        (detached_attention, "no gradient reaches qkv"),
        (failing_attention, "this attention has no backward pass"),
        (noisy_attention, "different gradients"),
    ],
)
def test_attention_without_a_deterministic_backward_pass_is_refused(attention, reason):
    calls, layers = make_case(attention=attention)
    result = reconstruct(calls, layers)
    assert reason in result.refused
    assert_start(result, layers)


def test_too_little_memory_keeps_the_start():
    calls, layers = make_case()
    run = calls.run

    def exhaust(call, linears):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return run(call, linears)

    calls.run = exhaust
    result = reconstruct(calls, layers)
    assert "too little memory" in result.refused
    assert_start(result, layers)


def test_calls_are_weighted():
    calls, layers = make_case()
    rounding = RoundingConfig("calibrated", num_iter=0)
    alone = []
    for chosen in calls.validation:
        weights = {call: float(call == chosen) for call in range(8)}
        alone.append(reconstruct_block(calls, layers, rounding, capability=CARD, weights=weights).before)
    assert alone[0] != alone[1]
    assert min(alone) < reconstruct(calls, layers, steps=0).before < max(alone)


def test_half_precision_block_is_learned():
    torch.manual_seed(0)
    calls, layers = make_case("nvfp4")
    half = Calls(calls.block, torch.bfloat16)
    result = reconstruct(half, layers)
    assert result.refused is None
    assert result.after < result.before
