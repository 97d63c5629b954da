"""Format "auto": INT8 on cards with INT8 tensor cores, else FP8."""

import pytest
import torch

from learned_rounding.quant_core.recipes import make_format, recommend_format


@pytest.fixture
def card(monkeypatch):
    """card(capability, hip=None): the properties of a card, as torch reports them."""

    def use(capability: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    return use


def test_cards_with_int8_tensor_cores_get_rotated_int8(subtests, card):
    for capability in [(7, 5), (8, 9), (12, 0)]:
        with subtests.test(capability=capability):
            card(capability)
            assert recommend_format() == make_format("int8")


def test_older_cards_get_fp8(card):
    card((7, 0))
    assert recommend_format() == make_format("fp8")


def test_cards_of_amd_get_fp8(card):
    card((11, 0), hip="6.4")
    assert recommend_format() == make_format("fp8")


def test_a_cpu_gets_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert recommend_format() == make_format("fp8")


def test_a_comfyui_that_does_not_read_int8_gets_fp8(card):
    card((8, 9))
    assert recommend_format(int8=False) == make_format("fp8")
