"""Fixtures of tests in ComfyUI's process."""

import pytest


@pytest.fixture
def host_with_small_encoders(host):
    if host.version == "0.3.75":
        pytest.skip("ComfyUI 0.3.75 recognizes only T5 encoders of full width, and loads no quantized ones")
