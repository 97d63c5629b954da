"""The same arithmetic on a GPU: codes agree with the CPU's but for rounding ties, and files come out sound."""

import pytest
import torch

from learned_rounding.quant_core import Recipe, quantize_file, quantize_weight
from learned_rounding.quant_core.checkpoints import SafetensorsFile, SafetensorsWriter, header_bytes, verify_file
from learned_rounding.quant_core.checkpoints.source import TensorSource

pytestmark = pytest.mark.gpu

CASES = [("float8_e4m3fn", "tensor"), ("int8_tensorwise", "row"), ("int8_tensorwise", "tensor")]


def weights(seed: int, *shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator) + 0.1
    return (torch.randn(shape, generator=generator) * rows * 0.02).to(dtype)


@pytest.mark.parametrize("format, granularity", CASES)
@pytest.mark.parametrize("rounding", ["nearest", "auto"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (1024, 3072), (4096, 257)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_and_cpu_agree_within_ties(format, granularity, rounding, shape, dtype):
    weight = weights(0, *shape, dtype=dtype)
    cpu = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
    gpu = quantize_weight(weight.cuda(), format, granularity=granularity, rounding=rounding)
    assert gpu.codes.is_cuda and gpu.scale.is_cuda
    same_scale = (gpu.scale.cpu() / cpu.scale - 1).abs() < 1e-6
    if rounding == "nearest":
        assert same_scale.all()
    else:  # two candidates may be equally good to the last bit
        assert same_scale.float().mean() > 0.99
    differ = (gpu.codes.cpu().float() != cpu.codes.float()) & same_scale.expand_as(weight)
    assert differ.sum() <= max(1, weight.numel() // 100_000)
    assert gpu.weight_error == pytest.approx(cpu.weight_error, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("format, granularity", CASES)
def test_gpu_codes_are_torch_casts(format, granularity):
    weight = weights(1, 512, 768).cuda()
    quantized = quantize_weight(weight, format, granularity=granularity, rounding="nearest")
    scaled = weight.double() / quantized.scale.double()
    assert (quantized.codes.double() - scaled).abs().max() <= (16 if format == "float8_e4m3fn" else 0.5001)


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
