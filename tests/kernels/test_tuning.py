"""Measurements are cached; a corrupt or read-only cache is not an error."""

import json
from types import SimpleNamespace

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import tuning
from learned_rounding.tests.kernels.gpu_layers import make_layer, relative
from learned_rounding.tests.kernels.gpu_layers import random as on_gpu


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "cache"))
    tuning._load_cache.cache_clear()
    yield tuning.cache_file()
    tuning._load_cache.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """Time of each name in ms, and the list of measured names."""
    times, measured = {"slow": 3.0, "quick": 1.0}, []

    def milliseconds(call):
        name = call()
        measured.append(name)
        if times[name] is None:
            raise RuntimeError("out of resources")
        return times[name]

    monkeypatch.setattr(tuning, "measure_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return times, measured


def choose(names=("slow", "quick"), key="a shape"):
    return tuning.fastest(key, names, lambda name: name)


def test_fastest_is_measured_once(cache, clock):
    assert choose() == "quick"
    assert choose() == "quick"
    assert clock[1] == ["slow", "quick"]


def test_another_process_takes_the_cached_result(cache, clock):
    choose()
    tuning._load_cache.cache_clear()  # as another process would
    assert choose() == "quick"
    assert len(clock[1]) == 2
    assert json.loads(cache.read_text()) == {"a shape": "quick"}


def test_failing_candidate_is_skipped(cache, clock):
    clock[0]["quick"] = None
    assert choose() == "slow"


def test_result_without_a_candidate_that_ran_out_of_memory_is_not_cached(cache, clock, monkeypatch):
    def milliseconds(call):
        if call() == "quick":
            raise torch.OutOfMemoryError
        return 3.0

    monkeypatch.setattr(tuning, "measure_milliseconds", milliseconds)
    assert choose() == "slow"
    assert not cache.exists()


def test_nothing_is_cached_if_every_candidate_fails(cache, clock):
    clock[0].update(quick=None, slow=None)
    assert choose() == "slow"
    assert not cache.exists()


def test_entries_of_other_processes_are_kept(cache, clock):
    choose(key="first")
    cache.write_text(json.dumps({"first": "quick", "of another": "slow"}))
    choose(key="second")
    assert set(json.loads(cache.read_text())) == {"first", "of another", "second"}


def test_corrupt_cache_is_replaced(subtests, cache, clock):
    cache.parent.mkdir(parents=True)
    for content in ("{", "[1, 2]", "\x00", '{"a shape": "gone"}', '{"a shape": 3}'):
        cache.write_text(content)
        tuning._load_cache.cache_clear()
        with subtests.test(content):
            assert choose() == "quick"
            assert json.loads(cache.read_text())["a shape"] == "quick"


def test_unwritable_cache_folder_is_logged(tmp_path, monkeypatch, clock, caplog, sentences):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "file"))
    tuning._load_cache.cache_clear()
    assert choose() == "quick"
    sentences(caplog.messages)
    assert choose() == "quick"
    assert len(clock[1]) == 2


def test_token_count_is_rounded_up_to_a_quarter_of_a_power_of_two():
    rows = 0, 1, 16, 17, 1000, 1025, 2100, 4096, 4097, 4608, 8193, 10**6
    assert [tuning.bucket(number) for number in rows] == [
        16, 16, 16, 32, 1024, 1280, 2560, 4096, 5120, 5120, 10240, 16384,
    ]  # fmt: skip


def test_nothing_is_measured_during_graph_capture(cache, clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == "slow"
    assert clock[1] == []


def test_a_single_candidate_is_not_measured(cache, clock):
    assert choose(("slow",)) == "slow"
    assert clock[1] == []


def test_autotuned_and_reference_are_no_candidates_of_the_fastest_backend(cache, clock, monkeypatch):
    monkeypatch.setattr(tuning, "shape_key", lambda *parts: "a shape")
    entries = {
        name: SimpleNamespace(load=lambda name=name: lambda *arguments: lambda *tensors: name) for name in clock[0]
    }
    names = ["autotuned", "slow", "quick", "reference"]
    assert tuning.fastest_backend(names, entries, (None,) * 7) == "quick"
    assert clock[1] == ["slow", "quick"]


def test_the_cache_is_in_the_folder_of_the_variable_or_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    assert tuning.cache_file() == tmp_path / "kernels.json"
    monkeypatch.delenv(tuning.CACHE_VARIABLE)
    monkeypatch.setattr(tuning.os, "name", "posix")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert tuning.cache_file() == tmp_path / "user" / "learned_rounding" / "kernels.json"


def test_the_version_of_a_missing_package_is_none():
    assert tuning.package_version("a-package-that-does-not-exist") == "none"


@pytest.mark.gpu
def test_autotuning_caches_its_result_on_disk(empty_cache):
    x, run = on_gpu(512, 1024), make_layer("int8_block_linear", on_gpu(1024, 1024, seed=1))
    with kernels.using("triton"):
        want = run(x)
    with kernels.using("autotuned"):
        first, again = run(x), run(x)
    assert torch.equal(first, again)
    assert relative(first, want.double()) < 1e-2
    assert "launch; " in empty_cache.read_text()
    assert torch.cuda.get_device_name() in empty_cache.read_text()
