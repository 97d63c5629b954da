"""What is measured once is remembered, and a broken or read-only cache harms nothing."""

import json

import pytest
import torch

from learned_rounding.kernels import tuning


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "cache"))
    tuning._remembered.cache_clear()
    yield tuning.cache_file()
    tuning._remembered.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds of each name, and the names that were measured."""
    times, measured = {"slow": 3.0, "quick": 1.0}, []

    def milliseconds(call):
        name = call()
        measured.append(name)
        if times[name] is None:
            raise RuntimeError("out of resources")
        return times[name]

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return times, measured


def choose(names=("slow", "quick"), key="a shape"):
    return tuning.fastest(key, names, lambda name: name)


def test_the_fastest_is_measured_once(cache, clock):
    assert choose() == "quick" and choose() == "quick"
    assert clock[1] == ["slow", "quick"]
    tuning._remembered.cache_clear()  # as another process would
    assert choose() == "quick" and len(clock[1]) == 2
    assert json.loads(cache.read_text()) == {"a shape": "quick"}


def test_what_cannot_run_drops_out(cache, clock):
    clock[0]["quick"] = None
    assert choose() == "slow"


def test_nothing_can_run_and_nothing_is_remembered(cache, clock):
    clock[0].update(quick=None, slow=None)
    assert choose() == "slow" and not cache.exists()


def test_another_process_keeps_what_it_wrote(cache, clock):
    choose(key="first")
    cache.write_text(json.dumps({"first": "quick", "of another": "slow"}))
    choose(key="second")
    assert set(json.loads(cache.read_text())) == {"first", "of another", "second"}


@pytest.mark.parametrize("content", ["{", "[1, 2]", "\x00", '{"a shape": "gone"}', '{"a shape": 3}'])
def test_a_broken_file_is_replaced(cache, clock, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    assert choose() == "quick" and json.loads(cache.read_text())["a shape"] == "quick"


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, monkeypatch, clock, caplog, sentences):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "file"))
    tuning._remembered.cache_clear()
    assert choose() == "quick"
    sentences(caplog.messages)
    assert choose() == "quick" and len(clock[1]) == 2


def test_tokens_count_as_the_next_power_of_two():
    assert [tuning.bucket(rows) for rows in (1, 16, 17, 4096, 4097, 10**6)] == [16, 16, 32, 4096, 8192, 16384]


def test_while_a_graph_is_captured_nothing_is_measured(cache, clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == "slow" and clock[1] == []
