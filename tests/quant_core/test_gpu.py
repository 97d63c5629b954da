"""Calibration and runs on a GPU: statistics agree with those of a CPU, files are valid and the same every time."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS, Recipe, quantize_file
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
from learned_rounding.quant_core.calibration.accumulate import LowRankHessianAccumulator
from learned_rounding.quant_core.calibration.triangle import encode_triangle
from learned_rounding.quant_core.output import SafetensorsWriter, header_bytes, verify_file
from learned_rounding.quant_core.run.allocate import allocate_formats
from learned_rounding.quant_core.sources import SafetensorsFile, TensorSource
from learned_rounding.quant_core.workers import InProcess

pytestmark = pytest.mark.gpu

CASES = [(name, granularity) for name, entry in FORMATS.items() for granularity in entry.granularities]


def weights(seed: int, *shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator) + 0.1
    return (torch.randn(shape, generator=generator) * rows * 0.02).to(dtype)


@pytest.mark.parametrize("format, granularity", CASES)
def test_a_file_quantized_on_the_gpu_is_valid_and_repeatable(tmp_path, format, granularity):
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
        assert report.device.startswith("cuda")
        assert len(report.layers) == 6
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]
    verification = verify_file(tmp_path / "a")
    assert verification.layers == 6
    assert not verification.problems
    with SafetensorsFile(tmp_path / "a") as made:
        assert made.read("blocks.0.bias").equal(tensors["blocks.0.bias"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device_bytes", [1 << 30, 0], ids=["on the device", "in files"])
@pytest.mark.parametrize("bits, tolerance", [(16, 1e-3), (8, 1e-2)])
def test_hessians_are_accumulated_as_on_a_cpu(tmp_path, monkeypatch, dtype, device_bytes, bits, tolerance):
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


def test_low_rank_hessians_on_the_gpu_are_those_of_the_cpu():
    rows = torch.randn(800, 256, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 256)
    made = []
    for device in ("cpu", "cuda"):
        sketch = LowRankHessianAccumulator(256, 16, torch.device(device))
        for part in rows.to(device).split(200):
            sketch.add(part)
        made.append(dense_hessian(sketch.result(), 256, torch.device("cpu")))
    assert (made[0] - made[1]).norm() / made[0].norm() < 1e-4


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
            Recipe(format="measured", beam_width=1),  # a CPU searches no beam by default
            InMemoryCalibration(known),
            pool=InProcess(torch.device(device), print, lambda: None),
            device=torch.device(device),
            emit=lambda event: None,
            check=lambda: None,
        )
        for device in ("cpu", "cuda")
    ]
    assert plans[0].decisions == plans[1].decisions
    assert plans[0].choice.chosen == pytest.approx(plans[1].choice.chosen, rel=1e-3)
