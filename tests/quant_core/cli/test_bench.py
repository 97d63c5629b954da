"""lrq bench: the table of this machine's card, of an added one, and of one that is not measured."""

import json

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.kernels import tuning
from learned_rounding.quant_core.cli import bench
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.run.card_times import CardTimes, find_card


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def lrq(capsys):
    """lrq(*words) → (exit code, stdout, stderr)."""

    def run(*words):
        code = main(["bench", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which every layer takes 1 ms."""
    monkeypatch.setattr(bench, "usable_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(
        bench, "present_card", lambda device: CardTimes("NVIDIA Test", "8.9", {}, measure=lambda codec, shape: 1.0)
    )


def test_without_a_gpu_one_sentence_and_an_error(lrq, monkeypatch, sentences):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = lrq("--json")
    assert code == 1
    assert out == ""
    sentences(err)


def test_what_is_known_of_a_card_needs_no_gpu(lrq):
    code, out, _ = lrq("--card", "12.0", "--json")
    summary = json.loads(out)
    assert code == 0
    assert summary["capability"] == "12.0"
    assert summary["layers"] == []
    assert summary["formats"]["nvfp4 per group of 16"] == "native, E2M1 activations"
    assert "not measured" in lrq("--card", "12.0")[1]


def test_json_of_one_machine_is_added_on_another(lrq, gpu, tmp_path, monkeypatch, sentences):
    code, out, _ = lrq("--json")
    assert code == 0
    assert json.loads(out)["card"] == "NVIDIA Test"
    (tmp_path / "card.json").write_text(out)
    monkeypatch.undo()
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "other machine"))
    code, out, _ = lrq("--add", tmp_path / "card.json")
    assert code == 0
    sentences(out)
    assert find_card("8.9", torch.device("cpu"), measure=True).find(None, (3072, 3072)) == 1.0
    assert "NVIDIA Test" in lrq("--card", "8.9", "--device", "cpu")[1]


def test_layers_of_a_model_are_measured(lrq, gpu, tmp_path):
    save_file({"blocks.0.weight": torch.randn(48, 64)}, tmp_path / "model.safetensors")
    code, out, _ = lrq(tmp_path / "model.safetensors")
    assert code == 0
    assert "48×64, 4096 tokens" in out
    assert "3072" not in out


def test_a_file_that_is_not_one_of_measurements_is_refused(lrq, tmp_path, sentences):
    (tmp_path / "card.json").write_text("[]")
    for path in (tmp_path / "card.json", tmp_path):
        code, _, err = lrq("--add", path)
        assert code == 1
        sentences(err)
