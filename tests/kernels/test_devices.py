"""Capabilities of devices: FP8 tensor cores of NVIDIA GPUs, and AMD GPUs that torch calls "cuda" too."""

import torch

from learned_rounding.kernels import devices


def test_fp8_matmul_needs_an_nvidia_gpu_from_sm_89(subtests, monkeypatch):
    for hip, capability, expected in (
        (None, (8, 6), False),
        (None, (8, 9), True),
        (None, (12, 0), True),
        ("6.4", (11, 0), False),
    ):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(devices, "compute_capability", lambda device, capability=capability: capability)
        with subtests.test(hip=hip, capability=capability):
            assert devices.has_fp8_matmul(torch.device("cuda")) is expected


def test_a_cpu_emulates_fp8_matmul():
    assert devices.has_fp8_matmul(torch.device("cpu"))


def test_builds_for_rocm_are_not_nvidia(subtests, monkeypatch):
    for hip, expected in ((None, True), ("6.4", False)):
        monkeypatch.setattr(torch.version, "hip", hip)
        with subtests.test(hip=hip):
            assert devices.is_nvidia() is expected


def test_the_capability_of_a_device_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    devices.compute_capability.cache_clear()
    device = torch.device("cuda:7")
    assert devices.compute_capability(device) == (9, 0)
    assert devices.compute_capability(device) == (9, 0)
    assert asked == [device]
    devices.compute_capability.cache_clear()
