"""Codecs of formats that ComfyUI has kernels for: they dequantize as these kernels do, inside the host's process."""

import pytest

from learned_rounding.quant_core.formats import READABLE
from learned_rounding.quant_core.formats.scaled import ScaledCodec
from learned_rounding.tests.nodes.probing import in_process


def test_codecs_dequantize_as_comfyui_does(host, tmp_path):
    if "comfy_kitchen" not in (host.path / "comfy" / "quant_ops.py").read_text(encoding="utf-8"):
        pytest.skip(f"ComfyUI {host.version} has none of these formats")
    found = in_process(host, tmp_path, "foreign_decoding")
    assert set(found) == {name for name, entry in READABLE.items() if not issubclass(entry.codec, ScaledCodec)}
    wrong = [
        (name, case, what)
        for name, cases in found.items()
        for case, checks in cases.items()
        for what, holds in checks.items()
        if not holds
    ]
    assert wrong == []
