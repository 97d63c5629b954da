"""Collector against statistics computed from the same activations; removal of hooks and files."""

import contextlib

import pytest
import torch
from torch import nn

from learned_rounding.quant_core.calibration import (
    CalibrationFile,
    Collector,
    LowRankHessian,
    PackedHessian,
    PairedHessian,
    TriangularHessian,
    dense_hessian,
    hessian,
    hooks,
    quantized_hessians,
)
from learned_rounding.quant_core.errors import CalibrationError, OutputError
from learned_rounding.quant_core.formats import make_codec

CPU = torch.device("cpu")
WIDTH, TOKENS = 48, 40


class Block(nn.Module):
    """q and k share a tensor, out has its own; ``late`` receives another tensor from the second call on."""

    def __init__(self):
        super().__init__()
        for name, inner in {"q": WIDTH, "k": WIDTH, "late": WIDTH, "out": 2 * WIDTH, "idle": WIDTH}.items():
            setattr(self, name, nn.Linear(inner, 2 * WIDTH if name in "qk" else WIDTH))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.out(self.q(x) * self.k(x).relu()) + self.late(x if self.calls == 1 else x.abs())


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


def linear_layers(block):
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def make_batches(count, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    return [
        (scale * torch.randn(2, TOKENS // 2, WIDTH, generator=generator) @ mixing + 1).to(dtype) for _ in range(count)
    ]


def flatten(batches):
    return torch.cat([x.flatten(0, 1) for x in batches])


def exact_hessian(activations):
    return activations.t() @ activations / len(activations)


def calibrate(block, batches, folder, validation=False, **options):
    options = {"device": CPU, "device_bytes": 1 << 30, "hessian_bits": 16, **options}
    path = folder / "c.calib.safetensors"
    with Collector(linear_layers(block), folder, **options) as collector:
        for x in batches:
            with collector.watching(block, validation), torch.inference_mode():
                block(x)
        collector.save(path, {"steps": 2})
    return CalibrationFile(path)


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


SIXTEEN, EIGHT = (16, PackedHessian, 1e-3), (8, TriangularHessian, 6e-3)


@pytest.mark.parametrize(
    "storage, dtype, device_bytes",
    [
        (SIXTEEN, torch.float32, 1 << 30),
        (SIXTEEN, torch.bfloat16, 0),
        (EIGHT, torch.float32, 0),
        (EIGHT, torch.bfloat16, 1 << 30),
    ],
    ids=["16 bits in memory", "16 bits in files", "8 bits in files", "8 bits in memory"],
)
def test_statistics_match_the_activations(block, tmp_path, monkeypatch, storage, dtype, device_bytes):
    bits, form, tolerance = storage
    monkeypatch.setattr(hooks, "ROTATION", 1)
    batches = make_batches(6, dtype)
    with calibrate(block.to(dtype), batches, tmp_path, device_bytes=device_bytes, hessian_bits=bits) as file:
        x = flatten(batches).float()
        statistics = file.layer_statistics("q")
        assert isinstance(statistics.hessian, form)
        assert statistics.validation_hessian is None
        assert relative_error(dense_hessian(statistics.hessian, WIDTH, CPU), exact_hessian(x)) < tolerance
        torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.amax, x.abs().amax(0))
        assert statistics.histogram.sum() == 2 * TOKENS * WIDTH
        assert file.tokens("q") == (len(x), 0)
        assert file.provenance == {"steps": 2}
        assert file.layers["out"] == (WIDTH, 2 * WIDTH)
    assert not list(tmp_path.glob("hessian_*"))


@pytest.mark.parametrize("interrupted", [False, True])
def test_pending_activations_are_added_at_the_end_of_watching(block, tmp_path, monkeypatch, interrupted):
    monkeypatch.setattr(hooks, "_PENDING_BYTES", 4 * 90)  # two and a half calls
    batches, path = make_batches(5), tmp_path / "c"
    with Collector(linear_layers(block), tmp_path, device=CPU, device_bytes=1 << 30, hessian_bits=16) as collector:
        with contextlib.suppress(InterruptedError), collector.watching(block, validation=False):
            for x in batches:
                block(x)
            if interrupted:
                raise InterruptedError
        assert collector.tokens == 4 * TOKENS  # "late" shared its first tensor
        collector.save(path, {})
    x = flatten(batches)
    with CalibrationFile(path) as file:
        statistics = file.layer_statistics("q")
        assert relative_error(dense_hessian(statistics.hessian, WIDTH, CPU), exact_hessian(x)) < 1e-3
        torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-4, atol=1e-4)
        assert statistics.histogram.sum() == 2 * TOKENS * WIDTH  # of the first of three batches


def test_layers_share_statistics_while_they_receive_the_same_tensor(block, tmp_path):
    batches = make_batches(3)
    with calibrate(block, batches, tmp_path) as file:
        assert file.layer_statistics("q") is file.layer_statistics("k")
        assert file.layer_statistics("idle") is None  # never called
        x = flatten(batches[1:]).abs()
        assert relative_error(dense_hessian(file.layer_statistics("late").hessian, WIDTH, CPU), exact_hessian(x)) < 1e-3
        assert file.tokens("late")[0] == len(x)


def test_hooks_are_removed_after_an_error(block, tmp_path):
    (x,) = make_batches(1)
    block.calls = 1
    before = block(x)
    with (
        Collector(linear_layers(block), tmp_path, device=CPU, device_bytes=1 << 30, hessian_bits=16) as collector,
        pytest.raises(ZeroDivisionError),
        collector.watching(block),
    ):
        block(x)
        raise ZeroDivisionError
    assert all(not module._forward_pre_hooks for module in block.modules())
    assert block(x).equal(before)


def test_a_complete_run_is_used_for_validation(block, tmp_path):
    calibration, validation = make_batches(2)
    path = tmp_path / "c"
    with Collector(linear_layers(block), tmp_path, device=CPU, device_bytes=1 << 30, hessian_bits=16) as collector:
        for x, is_validation in ((calibration, False), (validation, True)):
            with collector.watching(block, is_validation):
                block(x)
        collector.save(path, {})
    with CalibrationFile(path) as file:
        statistics = file.layer_statistics("q")
        for hessian, x in ((statistics.hessian, calibration), (statistics.validation_hessian, validation)):
            assert relative_error(dense_hessian(hessian, WIDTH, CPU), exact_hessian(x.flatten(0, 1))) < 2e-3
        assert file.tokens("q") == (TOKENS, TOKENS)


def test_a_hessian_without_a_factor_is_saved_in_16_bits(block, tmp_path, monkeypatch):
    batches = make_batches(2)

    def refuse(matrix):
        raise CalibrationError("The Hessian is not positive semi-definite; calibrate again.")

    monkeypatch.setattr(hessian, "encode_triangle", refuse)
    with calibrate(block, batches, tmp_path, hessian_bits=8) as file:
        found = file.layer_statistics("q").hessian
        assert isinstance(found, PackedHessian)
        assert relative_error(dense_hessian(found, WIDTH, CPU), exact_hessian(flatten(batches))) < 1e-3


def test_device_memory_is_what_was_stated_after_use(block, tmp_path):
    options = {"device": CPU, "device_bytes": 1 << 30}
    with Collector(linear_layers(block), tmp_path, **options) as collector:
        stated = collector.device_bytes, collector.disk_bytes
        with collector.watching(block):
            block(make_batches(1)[0])
        assert (collector.device_bytes, collector.disk_bytes) == stated
        assert stated[0] > 0


def test_validation_activations_are_those_of_the_validation_run(block, tmp_path):
    (x,) = make_batches(1)
    with calibrate(block, [x], tmp_path, validation=None, validation_size=TOKENS) as file:
        activations = file.layer_statistics("q").validation_activations
        count = file.tokens("q")[1]
    assert activations.dtype is torch.float32
    assert activations.shape == (count, WIDTH)
    distances = torch.cdist(activations, x.flatten(0, 1)).min(dim=1).values  # stored in bfloat16
    assert (distances < 0.01 * activations.norm(dim=1)).all()


def test_a_quarter_of_the_tokens_is_used_for_validation_by_default(block, tmp_path):
    with calibrate(block, make_batches(20), tmp_path, validation=None, validation_size=64) as file:
        calibration, validation = file.tokens("q")
        assert calibration + validation == 20 * TOKENS
        assert 0.15 < validation / (calibration + validation) < 0.35
        assert file.layer_statistics("q").validation_hessian.factor.shape == (WIDTH, 64)


def test_single_tokens_are_used_for_calibration_or_validation(block, tmp_path):
    batches = [x[:1, :1] for x in make_batches(30)]
    with calibrate(block, batches, tmp_path, validation=None, validation_size=1) as file:
        calibration, validation = file.tokens("q")
        assert calibration + validation == 30
        assert calibration
        assert validation


def test_tokens_per_call_are_limited_and_the_file_depends_on_the_seed_only(block, tmp_path):
    files = []
    for seed in (5, 5, 6):
        block.calls = 0
        with calibrate(block, make_batches(4), tmp_path, validation=None, tokens=10, seed=seed) as file:
            assert sum(file.tokens("q")) == 4 * 10
            files.append(file.path.read_bytes())
    assert files[0] == files[1] != files[2]


def test_hessians_in_files_are_updated_in_turn(block, tmp_path):
    with calibrate(block, make_batches(16), tmp_path, device_bytes=0, tokens=5) as file:
        assert file.tokens("q")[0] == 3 * TOKENS  # the first call and two more, up to 8 × 5 tokens each
        amax = flatten(make_batches(16)).abs().amax(0)
        torch.testing.assert_close(file.layer_statistics("q").amax, amax)  # of all tokens of all calls


def test_low_rank_hessian_has_the_diagonal_and_the_leading_directions(block, tmp_path):
    batches = make_batches(6)
    exact = exact_hessian(flatten(batches))
    with calibrate(block, batches, tmp_path, rank=4) as file:
        hessian = file.layer_statistics("q").hessian
        assert isinstance(hessian, LowRankHessian)
        assert hessian.factor.shape == (WIDTH, 16)
        dense = dense_hessian(hessian, WIDTH, CPU)
        torch.testing.assert_close(dense.diagonal(), exact.diagonal(), rtol=0.02, atol=0)
        _, vectors = torch.linalg.eigh(exact)
        assert torch.cosine_similarity(hessian.factor[:, -1].float(), vectors[:, -1], dim=0).abs() > 0.98
        assert relative_error(dense, exact) < 0.6 * relative_error(torch.diag(exact.diagonal()), exact)


@pytest.mark.parametrize(
    "rank, bits, tolerance", [(None, 16, 1e-3), (None, 8, 8e-3), (4, 16, 0.0)], ids=["full", "8 bits", "low rank"]
)
def test_a_continued_calibration_matches_a_single_one(block, tmp_path, rank, bits, tolerance):
    batches = make_batches(8)
    (tmp_path / "first").mkdir()
    block.calls = 1
    with calibrate(block, batches, tmp_path, rank=rank, hessian_bits=bits) as file:
        single = file.layer_statistics("q")
    with (
        calibrate(block, batches[:4], tmp_path / "first", rank=rank, hessian_bits=bits) as first,
        calibrate(block, batches[4:], tmp_path, rank=rank, hessian_bits=bits, earlier=first) as file,
    ):
        continued = file.layer_statistics("q")
        assert file.tokens("q")[0] == 8 * TOKENS
    actual, expected = (dense_hessian(statistics.hessian, WIDTH, CPU) for statistics in (continued, single))
    if rank:  # the first file is truncated to 16 directions
        exact = exact_hessian(flatten(batches))
        assert relative_error(actual, exact) < 1.3 * relative_error(expected, exact)
    else:
        assert relative_error(actual, expected) < tolerance
    torch.testing.assert_close(continued.mean, single.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(continued.amax, single.amax)
    assert continued.histogram.sum() == 2 * TOKENS * WIDTH
    assert single.histogram.sum() == 2 * TOKENS * WIDTH


def test_other_architectures_are_rejected_with_the_name_of_the_layer(block, tmp_path, sentences):
    with calibrate(block, make_batches(1), tmp_path) as file:
        shapes = dict(file.layers)
        file.check(shapes | {"more": (3, 3)})
        file.check({f"model.diffusion_model.{name}": shape for name, shape in shapes.items()})
        assert file.layer_statistics("model.diffusion_model.q") is file.layer_statistics("q")
        with sentences.raises(CalibrationError):
            file.check({name: shape for name, shape in shapes.items() if name != "q"})
        with sentences.raises(CalibrationError):
            file.check(shapes | {"out": (7, 7)})
        block.q = nn.Linear(WIDTH + 1, 2 * WIDTH)
        with sentences.raises(CalibrationError):
            Collector(linear_layers(block), tmp_path, device=CPU, device_bytes=0, earlier=file)


def test_saving_without_a_call_is_an_error(block, tmp_path, sentences):
    with (
        Collector(linear_layers(block), tmp_path, device=CPU, device_bytes=1 << 30, hessian_bits=16) as collector,
        sentences.raises(CalibrationError),
    ):
        collector.save(tmp_path / "c", {})


def test_saving_can_be_cancelled_between_layers(block, tmp_path, monkeypatch):
    packed, pack = [], hooks.pack_triangle
    monkeypatch.setattr(hooks, "pack_triangle", lambda *arguments: packed.append(arguments) or pack(*arguments))

    def cancel() -> None:
        if packed:
            raise KeyboardInterrupt

    with Collector(linear_layers(block), tmp_path, device=CPU, device_bytes=1 << 30) as collector:
        with collector.watching(block), torch.inference_mode():
            block(make_batches(1)[0])
        with pytest.raises(KeyboardInterrupt):
            collector.save(tmp_path / "c", {}, cancel)
    assert len(packed) == 1
    assert not list(tmp_path.iterdir())


def test_activations_that_are_not_finite_are_an_error(block, tmp_path, sentences):
    with Collector(linear_layers(block), tmp_path, device=CPU, device_bytes=1 << 30, hessian_bits=16) as collector:
        with collector.watching(block):
            block(torch.full((1, 2, WIDTH), float("nan")))
        with sentences.raises(CalibrationError):
            collector.save(tmp_path / "c", {})


def test_a_folder_that_cannot_be_written_is_an_error(block, tmp_path, sentences):
    collector = Collector(linear_layers(block), tmp_path / "missing", device=CPU, device_bytes=0)
    with sentences.raises(OutputError), collector.watching(block):
        block(make_batches(1)[0])


def test_a_low_rank_calibration_cannot_be_continued_in_full(block, tmp_path, sentences):
    with (
        calibrate(block, make_batches(2), tmp_path, rank=4) as low_rank,
        sentences.raises(CalibrationError),
    ):
        calibrate(block, make_batches(2), tmp_path, earlier=low_rank)


def test_required_disk_space_is_reported(block, tmp_path):
    collector = Collector(linear_layers(block), tmp_path, device=CPU, device_bytes=0)
    assert collector.disk_bytes == 2 * (4 * WIDTH**2 + (2 * WIDTH) ** 2)
    assert Collector(linear_layers(block), tmp_path, device=CPU, device_bytes=1 << 30).disk_bytes == 0
    assert Collector(linear_layers(block), tmp_path, device=CPU, device_bytes=0, rank=4).disk_bytes == 0


@pytest.mark.parametrize("device_bytes", [1 << 30, 0], ids=["in memory", "in files"])
def test_paired_hessian_matches_activations_and_their_quantization(
    block, tmp_path, monkeypatch, device_bytes, sentences
):
    """Collected in two calibrations, of which the second continues the first."""
    monkeypatch.setattr(hooks, "ROTATION", 1)
    batches, options = make_batches(6), {"device_bytes": device_bytes, "quantized_activations": True}
    (tmp_path / "first").mkdir()
    with calibrate(block, batches[:3], tmp_path / "first", **options) as earlier:
        file = calibrate(block, batches[3:], tmp_path, earlier=earlier, **options)
    x = flatten(batches)
    x_hat = make_codec("int8_tensorwise").quantize_activations(x)
    with file:
        hessian = file.layer_statistics("q").hessian
        assert isinstance(hessian, PairedHessian)
        assert relative_error(dense_hessian(hessian, WIDTH, CPU), exact_hessian(x)) < 1e-3
        for actual, product in zip(
            quantized_hessians(hessian, WIDTH, CPU), (x.t() @ x_hat, x_hat.t() @ x_hat), strict=True
        ):
            assert relative_error(actual, product / len(x)) < 1e-3
        torch.testing.assert_close(hessian.mean, torch.cat([x, x_hat], dim=1).mean(0), rtol=1e-3, atol=1e-3)
    with (
        CalibrationFile(file.path) as earlier,
        sentences.raises(CalibrationError),
    ):
        calibrate(block, batches, tmp_path / "first", earlier=earlier)


def test_every_layer_is_sampled_in_a_single_call(block, tmp_path):
    with calibrate(block, make_batches(1), tmp_path, device_bytes=0) as file:
        assert all(file.layer_statistics(layer).hessian is not None for layer in ("q", "k", "late", "out"))


@pytest.mark.parametrize(
    "options", [{}, {"rank": 4}, {"quantized_activations": True}], ids=["full", "low rank", "paired"]
)
def test_required_memory_is_reported(block, tmp_path, options):
    """These layers share no activations, so the upper bound is reached."""
    layers = {name: layer for name, layer in linear_layers(block).items() if name in ("q", "out")}
    for device_bytes in (1 << 30, 0):
        with Collector(layers, tmp_path, device=CPU, device_bytes=device_bytes, **options) as collector:
            on_device, on_disk = collector.device_bytes, collector.disk_bytes
            with collector.watching(block, False):
                block(make_batches(1)[0])
            files = sum(path.stat().st_size for path in tmp_path.glob("hessian_*"))
        assert files == on_disk
        assert (on_device > 0) == (files == 0)


class Bank(nn.Module):
    """A bank of experts as ComfyUI has it: it is not called itself. Each expert gets the tokens of one sign of a channel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 24, WIDTH))

    def expert_linear(self, x, i):
        return x @ self.weight[i].t()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.bank, self.out = Bank(), nn.Linear(24, WIDTH)

    def forward(self, x):
        routed = (x[x[:, 0] > 0], x[x[:, 0] <= 0])
        return self.out(torch.cat([self.bank.expert_linear(part, expert) for expert, part in enumerate(routed)]))


def test_experts_of_a_bank_share_statistics(tmp_path):
    torch.manual_seed(0)
    model, x = Experts(), flatten(make_batches(4))
    batches = x.split(TOKENS)
    before = [model(batch) for batch in batches]
    layers = {"bank": model.bank, "out": model.out}
    with Collector(layers, tmp_path, device=CPU, device_bytes=1 << 30, tokens=10**6) as collector:
        with collector.watching(model, validation=False):
            assert all(torch.equal(model(batch), output) for batch, output in zip(batches, before, strict=True))
        with pytest.raises(ValueError), collector.watching(model):
            raise ValueError
        assert "expert_linear" not in vars(model.bank)
        assert not model._forward_pre_hooks
        collector.save(tmp_path / "a.calib.safetensors", {})
    with CalibrationFile(tmp_path / "a.calib.safetensors") as file:
        assert file.layers == {"bank": (24, WIDTH), "out": (WIDTH, 24)}
        found = file.layer_statistics("bank")
        assert torch.allclose(found.mean, x.mean(dim=0), atol=1e-4)
        h = dense_hessian(found.hessian, WIDTH, CPU)
        assert (h - x.t() @ x / len(x)).norm() < 0.02 * h.norm()
