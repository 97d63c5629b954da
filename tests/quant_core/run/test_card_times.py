"""Times of a card: measured once, cached by card and versions, and taken from other machines."""

import json
import shutil

import pytest
import torch

from learned_rounding.kernels import tuning
from learned_rounding.quant_core.errors import QuantizationError, RecipeError
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.run import card_times
from learned_rounding.quant_core.run.card_times import CardTimes, add_card, cards_folder, find_card, present_card

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = (64, 128)
INT8, NVFP4 = (FormatConfig(name).codec for name in ("int8_tensorwise", "nvfp4"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "cache"))
    return cards_folder()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of SM 8.9 on which nothing runs NVFP4; returns the layers that were measured."""
    measured = []

    def measure(codec, shape, device, capability, timer):
        measured.append((str(codec), shape))
        return {"None": 2.0, str(INT8): 1.0}.get(str(codec))

    monkeypatch.setattr(card_times, "measure_layer", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4 (test)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    return measured


def test_each_layer_is_measured_once(gpu, folder):
    for _ in range(2):
        times = present_card(GPU)
        assert [times.find(codec, SHAPE) for codec in (None, INT8, NVFP4)] == [2.0, 1.0, None]
    assert len(gpu) == 3
    assert [path.name for path in folder.iterdir()] == ["nvidia-l4-test.json"]


def test_the_file_has_ratios_to_bfloat16(gpu, folder):
    times = present_card(GPU)
    for codec in (None, INT8, NVFP4):
        times.find(codec, SHAPE)
    content = json.loads((folder / "nvidia-l4-test.json").read_text())
    assert content["card"] == "NVIDIA L4 (test)"
    assert content["capability"] == "8.9"
    assert content["tokens"] == 4096
    assert {"learned_rounding", "torch", "triton", "comfy-kitchen"} == set(content["versions"])
    assert [(row["milliseconds"], row["ratio"]) for row in content["layers"]] == [(2.0, 1.0), (1.0, 0.5), (None, None)]
    assert CardTimes.from_dict(content).to_dict() == content


def test_other_versions_are_measured_again(gpu, folder, subtests):
    for key in ["torch", "triton", "comfy-kitchen", "learned_rounding"]:
        with subtests.test(key):
            shutil.rmtree(folder, ignore_errors=True)
            gpu.clear()
            times = present_card(GPU)
            times.versions[key] = "0.1"
            times.find(INT8, SHAPE)
            assert present_card(GPU).find(INT8, SHAPE) == 1.0
            assert len(gpu) == 2


def test_a_damaged_cache_is_measured_again(gpu, folder, caplog, subtests):
    for content in ["{", "[]", "{}", '{"card": "x"}']:
        with subtests.test(content):
            caplog.clear()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "nvidia-l4-test.json").write_text(content)
            assert present_card(GPU).find(INT8, SHAPE) == 1.0
            assert len(caplog.messages) == 1
            assert len(json.loads((folder / "nvidia-l4-test.json").read_text())["layers"]) == 1


def test_a_cache_that_cannot_be_written_is_no_error(gpu, folder, caplog, sentences):
    folder.parent.mkdir(parents=True)
    folder.write_text("a file in its place")
    assert present_card(GPU).find(INT8, SHAPE) == 1.0
    sentences(caplog.messages)


def other(card="NVIDIA A100", capability="8.0", **times):
    return CardTimes(card, capability, {"torch": "2.9"}, times={("bfloat16", SHAPE): 2.0, (str(INT8), SHAPE): 1.5})


def write(path, times):
    path.write_text(json.dumps(times.to_dict()))
    return path


def test_a_damaged_file_of_another_card_is_left_out(tmp_path, folder, caplog):
    add_card(write(tmp_path / "a100.json", other()))
    (folder / "damaged.json").write_text("{")
    assert find_card("8.0", CPU, measure=True).card == "NVIDIA A100"
    assert len(caplog.messages) == 1


def test_a_card_of_another_machine_is_added(tmp_path):
    add_card(write(tmp_path / "a100.json", other()))
    for device in (CPU, GPU if torch.cuda.is_available() else CPU):
        times = find_card("8.0", device, measure=True)
        assert times.card == "NVIDIA A100"
        assert times.find(INT8, SHAPE) == 1.5
        assert times.find(NVFP4, SHAPE) is None


def test_other_files_are_not_added(tmp_path, folder, subtests):
    for change in [
        {"capability": "new"},
        {"layers": 3},
        {"layers": [{"format": "x"}]},
        {"layers": [{"format": "x", "out": 1, "in": 1, "milliseconds": -1}]},
        {"tokens": "many"},
        {"versions": None},
    ]:
        with subtests.test(change=change):
            content = other().to_dict() | change
            (tmp_path / "a100.json").write_text(json.dumps(content))
            with pytest.raises(QuantizationError):
                add_card(tmp_path / "a100.json")
            assert not folder.exists()


def test_files_that_are_not_measurements_are_refused(tmp_path, sentences):
    (tmp_path / "model.json").write_text("{}")
    for name in ("model.json", "missing.json"):
        with sentences.raises(QuantizationError):
            add_card(tmp_path / name)


def test_the_card_that_is_present_is_measured(gpu, tmp_path):
    add_card(write(tmp_path / "l40.json", other("NVIDIA L40", "8.9")))
    for card in (None, "8.9"):
        times = find_card(card, GPU, measure=True)
        assert times.card == "NVIDIA L4 (test)"
        assert times.find(INT8, SHAPE) == 1.0


def test_without_a_target_time_nothing_is_measured(gpu):
    assert find_card(None, GPU, measure=False).find(INT8, SHAPE) is None
    assert not gpu
    assert find_card(None, CPU, measure=False) is None
    assert find_card("9.0", GPU, measure=False) is None


def test_a_target_time_is_refused_for_cards_without_times(gpu, tmp_path, sentences):
    with sentences.raises(RecipeError):
        find_card(None, CPU, measure=True)
    with sentences.raises(RecipeError):
        find_card("12.0", GPU, measure=True)
    for name in ("NVIDIA A100", "NVIDIA A30"):
        add_card(write(tmp_path / "card.json", other(name)))
    with sentences.raises(RecipeError):
        find_card("8.0", GPU, measure=True)
