"""Banks of experts (GPT-OSS) in ComfyUI: what this pack writes is what ComfyUI's ``MoEExperts`` computes with."""

import pytest

from learned_rounding.tests.nodes.probing import in_process


def test_banks(host, tmp_path):
    if "class MoEExperts" not in (host.path / "comfy" / "ops.py").read_text():
        pytest.skip("this ComfyUI has no banks of experts")
    found = in_process(host, tmp_path, "experts_banks")
    print(found)
    assert 0
