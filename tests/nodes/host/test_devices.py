"""Cards of a run: ComfyUI's own, or all of its model."""

import pytest
import torch

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.sources import TensorInfo
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    import comfy.model_management

    from learned_rounding.nodes.host import DEVICE_CHOICES, devices

pytestmark = pytest.mark.usefixtures("in_comfyui")

NEAREST = Recipe(rounding="nearest")
CALIBRATED = Recipe(format="int8_tensorwise")
SEQUENTIAL = Recipe(format="int8_tensorwise", rounding="sequential")


class Source:
    """Knows its size only."""

    def __init__(self, gigabytes: float):
        self.tensors = {"a.weight": TensorInfo(torch.bfloat16, (int(gigabytes * 5e8), 1))}


@pytest.fixture
def two_cards(monkeypatch):
    """As if ComfyUI ran on the second of two equal cards."""
    own, other = torch.device("cuda", 1), torch.device("cuda", 0)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: own)
    monkeypatch.setattr(devices, "same_model", lambda device: (own, other))
    return own, other


def test_on_a_cpu_it_is_the_only_device(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cpu"))
    for choice in DEVICE_CHOICES:
        chosen = devices.choose_devices(choice, CALIBRATED, Source(10), calibrated=True)
        assert chosen == (torch.device("cpu"),)


def test_this_card_is_the_one_of_comfyui(two_cards):
    assert devices.choose_devices("this card", CALIBRATED, Source(10), calibrated=True) == two_cards[:1]


def test_all_cards_begin_with_the_one_of_comfyui(two_cards):
    assert devices.choose_devices("all cards", NEAREST, Source(0.1), calibrated=False) == two_cards


def test_auto_takes_all_for_a_large_model_that_takes_long(two_cards):
    assert devices.choose_devices("auto", CALIBRATED, Source(10), calibrated=True) == two_cards


@pytest.mark.parametrize(
    ("recipe", "size", "calibrated"),
    [(NEAREST, 10, False), (CALIBRATED, 0.1, True), (CALIBRATED, 10, False), (SEQUENTIAL, 10, True)],
    ids=["quick rounding", "small model", "no calibration", "sequential"],
)
def test_auto_takes_one_card_where_more_are_not_faster(two_cards, recipe, size, calibrated):
    assert devices.choose_devices("auto", recipe, Source(size), calibrated=calibrated) == two_cards[:1]
