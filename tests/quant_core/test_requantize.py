"""Quantized files as sources: what their codes mean is quantized again, and nothing of the old labels stays."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import FORMATS, Recipe, quantize_file
from learned_rounding.quant_core.checkpoints import SafetensorsFile, verify_file
from learned_rounding.quant_core.cli import main
from learned_rounding.quant_core.errors import AlreadyQuantizedError, SourceError
from learned_rounding.quant_core.formats.weight import config_tensor
from learned_rounding.quant_core.requantize import DecodedSource


def plain():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(64, 128, generator=generator).bfloat16() for name in ("a.weight", "b.weight")} | {"norm.weight": torch.ones(64)}


def error(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("convrot", [None, 16])
def test_decoded_weights_are_what_the_codes_mean(tmp_path, format, convrot):
    if convrot and format != "int8_tensorwise":
        pytest.skip("rotates nothing")
    save_file(plain(), tmp_path / "model.safetensors")
    recipe = Recipe(format=format, convrot=convrot, rounding="nearest")
    quantize_file(tmp_path / "model.safetensors", tmp_path / "q.safetensors", recipe)
    with SafetensorsFile(tmp_path / "q.safetensors") as opened:
        decoded = DecodedSource(opened)
        assert set(decoded.tensors) == set(plain()) and not set(decoded.metadata) & {"learned_rounding", "_quantization_metadata"}
        for name in ("a.weight", "b.weight"):
            assert decoded.tensors[name].dtype is torch.bfloat16
            assert error(decoded.read(name), plain()[name]) < (0.1 if "e5m2" in format else 0.05)
        assert decoded.layers.total() == 2


def test_old_scaled_fp8_becomes_int8(tmp_path, capsys):
    codes = (plain()["a.weight"].float() * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    old = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn), "a.weight": codes, "a.scale_weight": torch.tensor([0.02])}
    old |= {"a.scale_input": torch.ones(()), "b.weight": plain()["b.weight"], "b.bias": torch.ones(64)}
    save_file(old, tmp_path / "old.safetensors")
    with pytest.raises(AlreadyQuantizedError):
        quantize_file(tmp_path / "old.safetensors", tmp_path / "new.safetensors", Recipe())
    words = ["quantize", "-i", str(tmp_path / "old.safetensors"), "-o", str(tmp_path / "new.safetensors"), "--int8", "--requantize"]
    assert main(words) == 0
    assert "1 layers of float8_e4m3fn per tensor" in capsys.readouterr().out
    assert verify_file(tmp_path / "new.safetensors").layers == 2
    made = load_file(tmp_path / "new.safetensors")
    assert error(made["a.weight"].float() * made["a.weight_scale"], plain()["a.weight"]) < 0.05
    assert not [name for name in made if "scale_weight" in name or "scale_input" in name or "scaled" in name]
    assert main(words) == 0 and "already done" in capsys.readouterr().out.lower()


def test_what_cannot_be_decoded(tmp_path):
    tensors = {"a.weight": torch.zeros(4, 4, dtype=torch.uint8), "a.comfy_quant": config_tensor({"format": "nvfp4"})}
    save_file(tensors, tmp_path / "q.safetensors")
    with SafetensorsFile(tmp_path / "q.safetensors") as opened, pytest.raises(SourceError, match="nvfp4, which cannot be decoded"):
        DecodedSource(opened)


def test_a_plain_file_is_read_as_it_is(tmp_path, capsys):
    save_file(plain(), tmp_path / "model.safetensors")
    assert main(["plan", "-i", str(tmp_path / "model.safetensors"), "--requantize"]) == 0
    assert "Decoded" not in capsys.readouterr().out
