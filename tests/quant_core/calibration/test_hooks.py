"""What the hooks find must be what one computes from the same inputs directly, and nothing may be left of them."""

import contextlib
import json

import pytest
import torch
from torch import nn

from learned_rounding.quant_core.calibration import (
    CalibrationFile,
    Collector,
    LowRankGram,
    PackedGram,
    PairedGram,
    dense_gram,
    quantized_grams,
)
from learned_rounding.quant_core.calibration import hooks as collecting
from learned_rounding.quant_core.calibration.accumulate import SketchedGram
from learned_rounding.quant_core.errors import CalibrationError, OutputError
from learned_rounding.quant_core.formats import make_encoding

CPU = torch.device("cpu")
WIDTH, TOKENS = 48, 40


class Block(nn.Module):
    """q and k share an input, out has its own; ``late`` is given another tensor from the second call on."""

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


def layers_of(block):
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def batches(count, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    colour = torch.randn(WIDTH, WIDTH, generator=generator)
    return [
        (scale * torch.randn(2, TOKENS // 2, WIDTH, generator=generator) @ colour + 1).to(dtype) for _ in range(count)
    ]


def gather(block, inputs, folder, hold_out=False, **options):
    options = {"device": CPU, "device_bytes": 1 << 30, **options}
    path = folder / "c.calib.safetensors"
    with Collector(layers_of(block), folder, **options) as collector:
        for x in inputs:
            with collector.watching(block, hold_out), torch.inference_mode():
                block(x)
        collector.save(path, {"steps": 2})
    return CalibrationFile(path)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("device_bytes", [1 << 30, 0], ids=["in memory", "in files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_statistics_are_those_of_the_inputs(block, tmp_path, monkeypatch, device_bytes, dtype):
    monkeypatch.setattr(collecting, "ROTATION", 1)
    inputs = batches(6, dtype)
    with gather(block.to(dtype), inputs, tmp_path, device_bytes=device_bytes) as found:
        rows = torch.cat([x.flatten(0, 1) for x in inputs]).float()
        known = found.inputs("q")
        assert isinstance(known.gram, PackedGram) and known.holdout_gram is None
        assert relative(dense_gram(known.gram, WIDTH, CPU), rows.t() @ rows / len(rows)) < 1e-3
        torch.testing.assert_close(known.mean, rows.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(known.amax, rows.abs().amax(0))
        assert known.histogram.sum() == 2 * TOKENS * WIDTH and found.tokens("q") == (len(rows), 0)
        assert found.provenance == {"steps": 2} and found.layers["out"] == (WIDTH, 2 * WIDTH)
    assert not list(tmp_path.glob("gram_*"))


@pytest.mark.parametrize("stopped", [False, True])
def test_rows_that_wait_are_learned_from_when_the_watching_ends(block, tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(collecting, "_WAITING_BYTES", 4 * 90)  # two calls and a half
    inputs, path = batches(5), tmp_path / "c"
    with Collector(layers_of(block), tmp_path, device=CPU, device_bytes=1 << 30) as collector:
        with contextlib.suppress(InterruptedError), collector.watching(block, hold_out=False):
            for x in inputs:
                block(x)
            if stopped:
                raise InterruptedError
        assert collector.tokens == 4 * TOKENS  # "late" shared its first input
        collector.save(path, {})
    rows = torch.cat([x.flatten(0, 1) for x in inputs])
    with CalibrationFile(path) as found:
        known = found.inputs("q")
        assert relative(dense_gram(known.gram, WIDTH, CPU), rows.t() @ rows / len(rows)) < 1e-3
        torch.testing.assert_close(known.mean, rows.mean(0), rtol=1e-4, atol=1e-4)
        assert known.histogram.sum() == 2 * TOKENS * WIDTH  # of the first of three additions


def test_low_rank_sees_past_an_outlier_channel():
    """One channel 1000 times as large as others, as transformers have them, takes no precision from the rest."""
    rows = torch.randn(600, 128, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 129) ** -0.7
    rows = rows @ torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(1)))[0]
    rows[:, 5] *= 1000
    sketch = SketchedGram(128, 16, CPU)
    for part in rows.split(200):
        sketch.add(part)
    others = torch.arange(128) != 5
    made, expected = (
        matrix[others][:, others] for matrix in (dense_gram(sketch.result(), 128, CPU), rows.t() @ rows / 600)
    )
    assert relative(made, expected) < 0.2


def test_layers_share_an_input_as_long_as_they_are_given_the_same_tensor(block, tmp_path):
    inputs = batches(3)
    with gather(block, inputs, tmp_path) as found:
        assert found.inputs("q") is found.inputs("k")
        assert found.inputs("idle") is None  # never called
        rows = torch.cat([x.abs().flatten(0, 1) for x in inputs[1:]])
        assert relative(dense_gram(found.inputs("late").gram, WIDTH, CPU), rows.t() @ rows / len(rows)) < 1e-3
        assert found.tokens("late")[0] == len(rows)


def test_hooks_leave_no_trace_even_after_an_error(block, tmp_path):
    (x,) = batches(1)
    block.calls = 1
    before = block(x)
    with Collector(layers_of(block), tmp_path, device=CPU, device_bytes=1 << 30) as collector:
        with pytest.raises(ZeroDivisionError), collector.watching(block):
            block(x)
            raise ZeroDivisionError
    assert all(not module._forward_pre_hooks for module in block.modules())
    assert block(x).equal(before)


def test_a_run_can_be_held_out(block, tmp_path):
    learned, held = batches(2)
    path = tmp_path / "c"
    with Collector(layers_of(block), tmp_path, device=CPU, device_bytes=1 << 30) as collector:
        for x, hold_out in ((learned, False), (held, True)):
            with collector.watching(block, hold_out):
                block(x)
        collector.save(path, {})
    with CalibrationFile(path) as found:
        known = found.inputs("q")
        for gram, x in ((known.gram, learned), (known.holdout_gram, held)):
            rows = x.flatten(0, 1)
            assert relative(dense_gram(gram, WIDTH, CPU), rows.t() @ rows / len(rows)) < 2e-3
        assert found.tokens("q") == (TOKENS, TOKENS)


def test_tokens_are_held_out_where_no_run_is(block, tmp_path):
    with gather(block, batches(20), tmp_path, hold_out=None, holdout_rows=64) as found:
        learned, held = found.tokens("q")
        assert learned + held == 20 * TOKENS and 0.15 < held / (learned + held) < 0.35
        assert found.inputs("q").holdout_gram.factor.shape == (WIDTH, 64)


def test_inputs_of_one_token_are_learned_from_or_held_out(block, tmp_path):
    inputs = [x[:1, :1] for x in batches(30)]
    with gather(block, inputs, tmp_path, hold_out=None, holdout_rows=1) as found:
        learned, held = found.tokens("q")
        assert learned + held == 30 and learned and held


def test_tokens_are_capped_and_the_same_seed_gives_the_same_file(block, tmp_path):
    files = []
    for seed in (5, 5, 6):
        block.calls = 0
        with gather(block, batches(4), tmp_path, hold_out=None, tokens=10, seed=seed) as found:
            assert sum(found.tokens("q")) == 4 * 10
            files.append(found.path.read_bytes())
    assert files[0] == files[1] != files[2]


def test_grams_in_files_take_turns(block, tmp_path):
    with gather(block, batches(16), tmp_path, device_bytes=0, tokens=5) as found:
        assert found.tokens("q")[0] == 3 * TOKENS  # in the first and two more calls, from up to eight times five tokens
        amax = torch.cat([x.flatten(0, 1) for x in batches(16)]).abs().amax(0)
        torch.testing.assert_close(found.inputs("q").amax, amax)  # of all tokens all the same


def test_low_rank_keeps_the_diagonal_and_the_leading_directions(block, tmp_path):
    inputs = batches(6)
    rows = torch.cat([x.flatten(0, 1) for x in inputs])
    expected = rows.t() @ rows / len(rows)
    with gather(block, inputs, tmp_path, rank=4) as found:
        gram = found.inputs("q").gram
        assert isinstance(gram, LowRankGram) and gram.factor.shape == (WIDTH, 16)
        made = dense_gram(gram, WIDTH, CPU)
        torch.testing.assert_close(made.diagonal(), expected.diagonal(), rtol=0.02, atol=0)
        values, vectors = torch.linalg.eigh(expected)
        assert torch.cosine_similarity(gram.factor[:, -1].float(), vectors[:, -1], dim=0).abs() > 0.98
        plain = torch.diag(expected.diagonal())
        assert relative(made, expected) < 0.6 * relative(plain, expected)


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "low rank"])
def test_a_calibration_is_continued(block, tmp_path, rank):
    inputs = batches(8)
    (tmp_path / "first").mkdir()
    block.calls = 1
    with gather(block, inputs, tmp_path, rank=rank) as found:
        at_once = found.inputs("q")
    with gather(block, inputs[:4], tmp_path / "first", rank=rank) as first:
        with gather(block, inputs[4:], tmp_path, rank=rank, earlier=first) as found:
            both = found.inputs("q")
            assert found.tokens("q")[0] == 8 * TOKENS
    continued, expected = (dense_gram(known.gram, WIDTH, CPU) for known in (both, at_once))
    if rank:  # what the first file left out is lost, so it comes a little less close
        rows = torch.cat([x.flatten(0, 1) for x in inputs])
        full = rows.t() @ rows / len(rows)
        assert relative(continued, full) < 1.3 * relative(expected, full)
    else:
        assert relative(continued, expected) < 1e-3
    torch.testing.assert_close(both.mean, at_once.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both.amax, at_once.amax)
    assert both.histogram.sum() == at_once.histogram.sum() == 2 * TOKENS * WIDTH


def test_what_does_not_fit_is_refused_by_layer_name(block, tmp_path, sentences):
    with gather(block, batches(1), tmp_path) as found:
        shapes = dict(found.layers)
        found.check(shapes | {"more": (3, 3)})
        found.check({f"model.diffusion_model.{name}": shape for name, shape in shapes.items()})
        assert found.inputs("model.diffusion_model.q") is found.inputs("q")
        with sentences.raises(CalibrationError):
            found.check({name: shape for name, shape in shapes.items() if name != "q"})
        with sentences.raises(CalibrationError):
            found.check(shapes | {"out": (7, 7)})
        block.q = nn.Linear(WIDTH + 1, 2 * WIDTH)
        with sentences.raises(CalibrationError):
            Collector(layers_of(block), tmp_path, device=CPU, device_bytes=0, earlier=found)


def test_errors_say_what_happened(block, tmp_path, sentences):
    collector = Collector(layers_of(block), tmp_path, device=CPU, device_bytes=1 << 30)
    with sentences.raises(CalibrationError):
        collector.save(tmp_path / "c", {})
    with collector.watching(block):
        block(torch.full((1, 2, WIDTH), float("nan")))
    with sentences.raises(CalibrationError):
        collector.save(tmp_path / "c", {})
    collector.close()
    missing = Collector(layers_of(block), tmp_path / "nowhere", device=CPU, device_bytes=0)
    with sentences.raises(OutputError), missing.watching(block):
        block(batches(1)[0])
    with gather(block, batches(2), tmp_path, rank=4) as low, sentences.raises(CalibrationError):
        gather(block, batches(2), tmp_path, earlier=low)


def test_the_disk_it_may_need_is_known_before(block, tmp_path):
    collector = Collector(layers_of(block), tmp_path, device=CPU, device_bytes=0)
    assert collector.disk_bytes == 2 * (4 * WIDTH**2 + (2 * WIDTH) ** 2)
    assert Collector(layers_of(block), tmp_path, device=CPU, device_bytes=1 << 30).disk_bytes == 0
    assert Collector(layers_of(block), tmp_path, device=CPU, device_bytes=0, rank=4).disk_bytes == 0


@pytest.mark.parametrize("header", ["{", '{"layers": 3}', '{"layers": {"q": 1}}', '{"version": 99}', "[]"])
def test_a_damaged_or_newer_header_is_refused(tmp_path, header, sentences):
    from safetensors.torch import save_file

    save_file({"q.gram": torch.eye(2)}, tmp_path / "c", metadata={"learned_rounding_calibration": header})
    with sentences.raises(CalibrationError):
        CalibrationFile(tmp_path / "c")


def test_a_plain_file_needs_no_header(tmp_path):
    from safetensors.torch import save_file

    save_file({"q.gram": 2 * torch.eye(3), "q.mean": torch.ones(3)}, tmp_path / "c")
    with CalibrationFile(tmp_path / "c") as found:
        assert found.inputs("q").gram.equal(2 * torch.eye(3)) and found.inputs("k") is None and found.layers == {}
        found.check({})
    assert json.dumps(found.provenance) == "{}"


@pytest.mark.parametrize("device_bytes", [1 << 30, 0], ids=["in memory", "in files"])
def test_quantized_inputs_are_kept_beside_the_inputs(block, tmp_path, monkeypatch, device_bytes, sentences):
    """Gathered in two calibrations, the second of which continues the first."""
    monkeypatch.setattr(collecting, "ROTATION", 1)
    inputs, options = batches(6), {"device_bytes": device_bytes, "quantized_inputs": True}
    (tmp_path / "first").mkdir()
    with gather(block, inputs[:3], tmp_path / "first", **options) as earlier:
        found = gather(block, inputs[3:], tmp_path, earlier=earlier, **options)
    x = torch.cat([x.flatten(0, 1) for x in inputs])
    seen = make_encoding("int8_tensorwise").quantize_inputs(x)
    with found:
        gram = found.inputs("q").gram
        assert isinstance(gram, PairedGram)
        assert relative(dense_gram(gram, WIDTH, CPU), x.t() @ x / len(x)) < 1e-3
        for got, expected in zip(quantized_grams(gram, WIDTH, CPU), (x.t() @ seen, seen.t() @ seen), strict=True):
            assert relative(got, expected / len(x)) < 1e-3
        torch.testing.assert_close(gram.mean, torch.cat([x, seen], dim=1).mean(0), rtol=1e-3, atol=1e-3)
    with (
        CalibrationFile(found.path) as earlier,
        sentences.raises(CalibrationError),
    ):
        gather(block, inputs, tmp_path / "first", earlier=earlier)


def test_every_input_has_a_turn_however_few_calls_there_are(block, tmp_path):
    with gather(block, batches(1), tmp_path, device_bytes=0) as found:
        assert all(found.inputs(layer).gram is not None for layer in ("q", "k", "late", "out"))


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"quantized_inputs": True}], ids=["full", "low rank", "paired"])
def test_the_memory_is_known_before_it_is_taken(block, tmp_path, options):
    """No layer shares an input here, so what is stated is what is taken."""
    layers = {name: layer for name, layer in layers_of(block).items() if name in ("q", "out")}
    for device_bytes in (1 << 30, 0):
        with Collector(layers, tmp_path, device=CPU, device_bytes=device_bytes, **options) as collector:
            stated = collector.device_bytes, collector.disk_bytes
            with collector.watching(block, False):
                block(batches(1)[0])
            files = sum(path.stat().st_size for path in tmp_path.glob("gram_*"))
        assert files == stated[1] and (stated[0] > 0) == (files == 0)
