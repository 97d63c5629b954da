"""Names of devices: one, several, all, and those that do not exist or do not go together."""

from types import SimpleNamespace

import pytest
import torch

from learned_rounding.quant_core.errors import QuantizationError
from learned_rounding.quant_core.workers import devices, parse_devices, same_model, usable_device

CPU = torch.device("cpu")


def gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


@pytest.fixture
def cards(monkeypatch):
    """cards("A", "A", "B"): as if the machine had these models of GPUs."""

    def pretend(*models: str) -> None:
        monkeypatch.setattr(devices, "usable_device", lambda name: torch.device(name))
        functions = {
            "is_available": lambda: bool(models),
            "device_count": lambda: len(models),
            "current_device": lambda: 0,
            "get_device_name": lambda device: models[torch.device(device).index or 0],
        }
        monkeypatch.setattr(devices, "torch", SimpleNamespace(device=torch.device, cuda=SimpleNamespace(**functions)))

    return pretend


def test_one_name_is_one_device():
    assert parse_devices("cpu") == (CPU,)


def test_a_device_is_itself():
    assert parse_devices(CPU) == (CPU,)


def test_names_are_separated_by_commas():
    assert parse_devices("cpu:0, cpu:1") == (torch.device("cpu", 0), torch.device("cpu", 1))


def test_a_sequence_of_devices_is_taken():
    assert parse_devices([torch.device("cpu", 0), "cpu:1"]) == parse_devices("cpu:0,cpu:1")


def test_without_a_name_it_is_the_first_gpu_or_the_cpu():
    assert parse_devices(None) == (torch.device("cuda") if torch.cuda.is_available() else CPU,)


def test_all_are_the_gpus_of_the_first_ones_model(cards):
    cards("A", "B", "A")
    assert parse_devices("all") == (gpu(0), gpu(2))


def test_the_given_card_comes_first(cards):
    cards("A", "A", "A")
    assert same_model(gpu(1)) == (gpu(1), gpu(0), gpu(2))


def test_cuda_without_a_number_is_the_first_of_several(cards):
    cards("A", "A")
    assert parse_devices("cuda,cuda:1") == (gpu(0), gpu(1))


def test_cards_of_different_models_are_refused(cards, sentences):
    cards("A", "B")
    with sentences.raises(QuantizationError):
        parse_devices("cuda:0,cuda:1")


@pytest.mark.parametrize("names", ["cuda:0,cuda:0", "cuda,cuda:0", "cuda:0,cpu"])
def test_devices_that_do_not_go_together_are_refused(cards, sentences, names):
    cards("A", "A")
    with sentences.raises(QuantizationError):
        parse_devices(names)


def test_all_without_a_gpu_is_refused(cards, sentences):
    cards()
    with sentences.raises(QuantizationError):
        parse_devices("all")


@pytest.mark.parametrize("names", ["", "cpu,", "gpu", "cpu:0,warp:1"])
def test_a_name_of_no_device_is_refused(names):
    with pytest.raises(QuantizationError, match="cannot be used here"):
        parse_devices(names)


def test_no_name_at_all_is_refused(sentences):
    with sentences.raises(QuantizationError):
        parse_devices([])


def test_a_device_that_does_not_work_is_refused():
    with pytest.raises(QuantizationError, match="cannot be used here"):
        usable_device("meta")
