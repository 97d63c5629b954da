"""The cache of measurements where another process may have it open."""

import pytest

from learned_rounding.kernels.tuning import CACHE_VARIABLE, cache_file, replace_json


def test_cache_is_in_the_local_application_data(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_file() == tmp_path / "learned_rounding" / "kernels.json"


def test_cache_that_another_process_has_open_is_left_as_it_was(windows, tmp_path):
    cache = tmp_path / "kernels.json"
    cache.write_text("{}", encoding="utf-8")
    with open(cache, "rb"), pytest.raises(OSError):
        replace_json(cache, {"a": 1}, indent=0)
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["{}"]
