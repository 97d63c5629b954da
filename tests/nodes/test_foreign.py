"""Formats that ComfyUI writes and this pack reads: its decoders give what ComfyUI's own kernels give, inside the host's process."""

import pytest

from learned_rounding.quant_core.formats import FOREIGN
from learned_rounding.tests.nodes.probing import in_process


def test_decoders_do_what_comfyui_does(host, tmp_path):
    if "comfy_kitchen" not in (host.path / "comfy" / "quant_ops.py").read_text(encoding="utf-8"):
        pytest.skip(f"ComfyUI {host.version} knows none of them")
    found = in_process(host, tmp_path, "foreign_decoding")
    assert set(found) == set(FOREIGN)
    wrong = [
        (name, case, what)
        for name, cases in found.items()
        for case, holds in cases.items()
        for what, held in holds.items()
        if not held
    ]
    assert wrong == []
