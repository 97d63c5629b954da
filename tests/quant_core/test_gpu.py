"""The same arithmetic on a GPU: codes agree with the CPU's but for rounding ties, and files come out sound."""

import logging

import pytest
import torch

from learned_rounding.quant_core import FORMATS, Recipe, quantize_file, quantize_weight
from learned_rounding.quant_core.calibration import (
    CalibrationFile,
    Collector,
    InMemoryCalibration,
    LayerStatistics,
    LowRankHessian,
    TriangularHessian,
    dense_hessian,
)
from learned_rounding.quant_core.calibration import hooks as collect
from learned_rounding.quant_core.calibration.accumulate import LowRankHessianAccumulator, PairedHessianAccumulator
from learned_rounding.quant_core.calibration.panels import packed_size
from learned_rounding.quant_core.calibration.triangle import encode_triangle
from learned_rounding.quant_core.formats import FormatConfig, make_codec
from learned_rounding.quant_core.output import SafetensorsWriter, header_bytes, verify_file
from learned_rounding.quant_core.rounding import amax_scale, hessian_quadratic, round_gptq
from learned_rounding.quant_core.run.allocate import allocate_formats
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource

pytestmark = pytest.mark.gpu

CASES = [(name, granularity) for name, entry in FORMATS.items() for granularity in entry.granularities]


def weights(seed: int, *shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator) + 0.1
    return (torch.randn(shape, generator=generator) * rows * 0.02).to(dtype)


@pytest.mark.parametrize("format, granularity", CASES)
@pytest.mark.parametrize("rounding", ["nearest", "auto"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (1024, 3072), (4096, 257)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_and_cpu_agree_within_ties(format, granularity, rounding, shape, dtype):
    if FormatConfig(format, granularity).codecs(shape[1])[0].admits(shape):
        return  # tests/quant_core/formats shows the refusal
    weight = weights(0, *shape, dtype=dtype)
    cpu = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
    gpu = quantize_weight(weight.cuda(), format, granularity=granularity, rounding=rounding)
    assert gpu.qdata.is_cuda and gpu.scale.is_cuda
    same_scale = (gpu.scale.cpu() / cpu.scale - 1).abs() < 1e-6
    if rounding == "nearest":
        assert same_scale.all()
    else:  # two candidates may be equally good to the last bit
        assert same_scale.float().mean() > 0.99
    comparable = cpu.codec.groups(shape).spread(same_scale).expand_as(weight)
    differ = (gpu.qdata.cpu().float() != cpu.qdata.float()) & comparable
    assert differ.sum() <= max(1, weight.numel() // 100_000)
    assert gpu.weight_error == pytest.approx(cpu.weight_error, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("format, granularity", CASES)
def test_gpu_codes_are_torch_casts(format, granularity):
    weight = weights(1, 512, 768).cuda()
    quantized = quantize_weight(weight, format, granularity=granularity, rounding="nearest")
    scaled = weight.float() / quantized.codec.solve_space((512, 768)).divisor(quantized.scale)
    assert torch.equal(quantized.qdata.float(), quantized.format.elements.encode(scaled).float())


@pytest.mark.parametrize("format, granularity", CASES)
def test_a_file_quantized_on_the_gpu_is_sound_and_repeatable(tmp_path, format, granularity):
    tensors = {f"blocks.{i}.mlp.weight": weights(i, 768, 512 + i) for i in range(6)} | {"blocks.0.bias": torch.zeros(5)}
    source = TensorSource(tensors)
    with SafetensorsWriter(tmp_path / "in.safetensors", header_bytes(source.tensors.items(), {})) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish({})
    outputs = []
    for name in ("a", "b"):
        report = quantize_file(
            tmp_path / "in.safetensors", tmp_path / name, Recipe(format=format, granularity=granularity), device="cuda"
        )
        assert report.device.startswith("cuda") and len(report.layers) == 6
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]
    verification = verify_file(tmp_path / "a")
    assert verification.layers == 6 and not verification.problems
    with SafetensorsFile(tmp_path / "a") as made:
        assert made.read("blocks.0.bias").equal(tensors["blocks.0.bias"])


def anisotropic(inner: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * inner, inner, generator=generator) * torch.logspace(0, -2, inner)
    inputs = inputs @ torch.linalg.qr(torch.randn(inner, inner, generator=generator)).Q
    return inputs.t() @ inputs / len(inputs)


LEARNED = {
    "gptq": {"rounding": "calibrated", "beam_width": 1},
    "beam": {"rounding": "calibrated", "beam_width": 4},
    "descent": {"rounding": "calibrated", "beam_width": 1, "sweeps": 2},
    "principal": {"rounding": "principal"},
    "adamw": {"rounding": "calibrated", "optimizer": "adamw", "num_iter": 60},
    "original": {"rounding": "principal", "optimizer": "original", "num_iter": 60},
}


@pytest.mark.parametrize("options", LEARNED.values(), ids=LEARNED)
@pytest.mark.parametrize("format, granularity", CASES)
def test_learned_codes_are_as_good_on_either(format, granularity, options):
    """A tie that falls the other way moves what follows it: codes differ here and there, what they cost does not."""
    weight = weights(2, 300, 640)
    gram = anisotropic(640) if options["rounding"] == "calibrated" else None
    cpu = quantize_weight(weight, format, granularity=granularity, hessian=gram, **options)
    moved = None if gram is None else gram.cuda()
    gpu, again = (
        quantize_weight(weight.cuda(), format, granularity=granularity, hessian=moved, **options) for _ in range(2)
    )
    assert torch.equal(gpu.qdata.view(torch.uint8), again.qdata.view(torch.uint8)) and torch.equal(
        gpu.scale, again.scale
    )
    assert gpu.solution.solver == cpu.solution.solver
    # Gradient steps amplify last bits and find another local minimum; principal rounding may stop its search for the
    # damping one step sooner. What comes out is about as good.
    loose = "optimizer" in options or options["rounding"] == "principal"
    assert gpu.solution.gain == pytest.approx(cpu.solution.gain, rel=0.5 if loose else 0.03)
    assert gpu.weight_error == pytest.approx(cpu.weight_error, rel=0.02)


@pytest.fixture
def capped():
    """capped(bytes): what this process may use of the GPU's memory, until the test ends."""
    total = torch.cuda.get_device_properties(0).total_memory

    def cap(limit: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def memory_bytes(out: int, inner: int, parts: int, *, passes: int = 0) -> int:
    """Peak of what round_gptq may allocate, without the weight, its quantized values and the Hessian.

    8·in² while H + λI is put in order, to be factored in place; then 4·in², and 18·⌈out/parts⌉·in for the columns, their
    errors and values, and a copy of each while it is put in order. Coordinate descent needs 4·in² more.
    """
    more = 4 * inner**2 if passes else 0
    return more + max(8 * inner**2, 4 * inner**2 + 18 * -(-out // parts) * inner)


@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("shape, parts", [((512, 8192), 1), ((16384, 2048), 1), ((16384, 2048), 4)])
def test_gptq_needs_the_memory_it_states(shape, parts, passes):
    weight, hessian = weights(0, *shape).cuda(), torch.eye(shape[1], device="cuda")
    space = make_codec("int8_tensorwise", "row").solve_space(shape)
    scale, quadratic = amax_scale(weight, space)[0], hessian_quadratic(hessian, 0.01)
    for _ in range(2):  # the first run also loads libraries, whose workspace stays
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        round_gptq(weight, scale, space, quadratic, passes=passes, parts=parts)
        used = torch.cuda.max_memory_allocated() - before
    codes = weight.numel()
    assert used - codes <= 1.1 * memory_bytes(*shape, parts, passes=passes) + 2**26


def test_24576_input_channels_fit_a_12_gb_card(capped, caplog):
    weight, gram = weights(0, 3072, 24576).cuda(), torch.eye(24576, dtype=torch.bfloat16)
    capped(12e9)
    with caplog.at_level(logging.WARNING):
        result = quantize_weight(weight, "int8_tensorwise", hessian=gram)
    assert not caplog.records and result.qdata.is_cuda


def test_too_little_memory_changes_the_place_and_not_the_result(capped, caplog):
    weight, gram = weights(0, 16384, 2048), anisotropic(2048)
    roomy = quantize_weight(weight.cuda(), "int8_tensorwise", hessian=gram)
    places = []
    for limit in (560e6, 240e6):  # enough for fewer rows at a time, and for nothing
        capped(limit)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = quantize_weight(weight.cuda(), "int8_tensorwise", hessian=gram)
        places.append([record.name for record in caplog.records])
        assert made.qdata.is_cuda and made.solution.solver == roomy.solution.solver
        assert made.solution.gain == pytest.approx(roomy.solution.gain, rel=0.01)
    assert {name for names in places for name in names} == {quantize_weight.__module__}
    assert len(places[1]) == 3  # one part, 4, 16, and then the CPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device_bytes", [1 << 30, 0], ids=["on the device", "in files"])
@pytest.mark.parametrize("bits, tolerance", [(16, 1e-3), (8, 1e-2)])
def test_grams_are_gathered_as_on_a_cpu(tmp_path, monkeypatch, dtype, device_bytes, bits, tolerance):
    monkeypatch.setattr(collect, "ROTATION", 1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2500, 300), torch.nn.GELU(), torch.nn.Linear(300, 40)).to("cuda", dtype)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    batches = [
        torch.randn(3, 100, 2500, device="cuda").mul(torch.rand(2500, device="cuda")).to(dtype) for _ in range(4)
    ]
    path = tmp_path / "c"
    options = {"device": torch.device("cuda"), "device_bytes": device_bytes, "tokens": 300, "hessian_bits": bits}
    with Collector(layers, tmp_path, **options) as collector:
        for index, x in enumerate(batches):
            with collector.watching(model, validation=index == 3), torch.inference_mode():
                model(x)
        collector.save(path, {})
    assert not torch.backends.cuda.matmul.allow_tf32
    with CalibrationFile(path) as found:
        for known, held_out in (
            (found.layer_statistics("0").hessian, False),
            (found.layer_statistics("0").validation_hessian, True),
        ):
            rows = torch.cat(batches[3:] if held_out else batches[:3]).flatten(0, 1).double()
            expected = rows.t() @ rows / len(rows)
            made = dense_hessian(known, 2500, torch.device("cuda")).double()
            assert (made - expected).norm() / expected.norm() < (3e-3 if held_out else tolerance)
        assert found.layer_statistics("0").amax.equal(torch.cat(batches).abs().amax((0, 1)).float().cpu())


def test_8_bit_factors_are_expanded_as_on_a_cpu():
    """float16 holds a level times its scale with a relative error of 2e-4."""
    rows = torch.randn(1500, 700, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 700)
    rows[:, 5] += 4 * rows[:, 3]
    rms = rows.square().mean(dim=0).sqrt()
    parts = encode_triangle(rows.t() @ rows / len(rows) / rms / rms[:, None])
    cpu, gpu = (
        dense_hessian(TriangularHessian(*parts, rms), 700, torch.device(device)).cpu() for device in ("cpu", "cuda")
    )
    assert (gpu - cpu).norm() / cpu.norm() < 1e-3
    torch.linalg.cholesky(gpu + 1e-3 * gpu.diagonal().mean() * torch.eye(700))


def test_many_rows_are_rounded_as_on_a_cpu():
    """More rows than the dampening is chosen on, more columns than a panel."""
    weight = weights(0, 640, 1100)
    rows = torch.randn(3000, 1100, generator=torch.Generator().manual_seed(1)) * torch.linspace(2, 0.2, 1100)
    known = {
        "hessian": rows[:2500].t() @ rows[:2500] / 2500,
        "validation_hessian": LowRankHessian(rows[2500:].t() / 500**0.5, torch.zeros(1100)),
    }
    known["beam_width"] = 2
    errors = [quantize_weight(weight.to(device), "int8_tensorwise", **known).output_error for device in ("cpu", "cuda")]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("place", ["on the device", "in files", "in low rank"])
def test_capturing_is_the_same_every_time(tmp_path, place):
    """Many calls in one run, more inputs than turns: rows wait, and files are updated while the model goes on."""
    torch.manual_seed(0)
    width, calls, tokens = 2100, 17, 1200
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(10))).to("cuda", torch.bfloat16)
    layers = dict(model.named_children())
    batches = [torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(calls)]
    options = {
        "device_bytes": 1 << 30 if place == "on the device" else 0,
        "rank": 32 if place == "in low rank" else None,
    }
    files = []
    for name in "ab":
        with Collector(layers, tmp_path, device=torch.device("cuda"), **options) as collector:
            with collector.watching(model), torch.inference_mode():
                for x in batches:
                    model(x)
            collector.save(tmp_path / name, {})
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    with CalibrationFile(tmp_path / "a") as found:
        learned, held = found.tokens("0")
        assert learned + held == (3 * tokens if place == "in files" else calls * 256)


def test_low_rank_grams_on_the_gpu_are_those_of_the_cpu():
    rows = torch.randn(800, 256, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 256)
    made = []
    for device in ("cpu", "cuda"):
        sketch = LowRankHessianAccumulator(256, 16, torch.device(device))
        for part in rows.to(device).split(200):
            sketch.add(part)
        made.append(dense_hessian(sketch.result(), 256, torch.device("cpu")))
    assert (made[0] - made[1]).norm() / made[0].norm() < 1e-4


def test_weights_make_up_for_quantized_inputs_as_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, 256, generator=generator) * torch.logspace(0, -1.5, 256)
    rows = torch.randn(4512, 256, generator=generator) @ mixing
    rows[:, 3] *= 20
    weight = (torch.randn(320, 256, generator=generator) * 0.05).bfloat16()
    held_out = LowRankHessian(rows[4000:].t() / 512**0.5, torch.zeros(256))
    errors = []
    for device in ("cpu", "cuda"):
        grams = PairedHessianAccumulator(256, torch.zeros(packed_size(512), device=device), torch.device(device))
        grams.add(rows[:4000].to(device))
        made = quantize_weight(
            weight.to(device), "int8_tensorwise", hessian=grams.result(), validation_hessian=held_out
        )
        errors.append(made.output_error)
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_formats_are_measured_as_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    tensors, known = {}, {}
    for index in range(4):
        rows = torch.randn(300, 256, generator=generator)
        rows[:, 3] *= 1 + 100 * (index % 2)
        tensors[f"{index}.weight"] = torch.randn(256 + 64 * index, 256, generator=generator).bfloat16()
        held_out = LowRankHessian(rows.t() / 300**0.5, torch.zeros(256))
        known[str(index)] = LayerStatistics(rows.t() @ rows / 300, held_out, sensitivity=2.0**index)
    plans = [
        allocate_formats(
            TensorSource(tensors),
            Recipe(format="measured"),
            InMemoryCalibration(known),
            device=torch.device(device),
            emit=lambda event: None,
            check=lambda: None,
        )
        for device in ("cpu", "cuda")
    ]
    assert plans[0].decisions == plans[1].decisions
    assert plans[0].choice.chosen == pytest.approx(plans[1].choice.chosen, rel=1e-3)
