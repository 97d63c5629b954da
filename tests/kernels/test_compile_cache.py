"""Cache of compilations: an entry saves a compilation and never hides a failure."""

import json

import pytest

from learned_rounding.kernels import tuning
from learned_rounding.tests.kernels.compile_cache import CompileCache, compile_cache_file, make_key

RESULT = {"registers": 64, "spilled": 0, "shared": 1024, "products": ["mma.sync"]}


def must_not_compile() -> dict:
    raise AssertionError("compiled again")


def fail() -> dict:
    raise RuntimeError("ptxas failed")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "compiled" / "sm90.json"


def store(file, **results):
    cache = CompileCache(file)
    for key, result in results.items():
        cache.find(key, lambda result=result: result)
    cache.save()


def test_a_stored_result_is_not_compiled_again(file):
    store(file, a=RESULT)
    cache = CompileCache(file)
    assert cache.find("a", must_not_compile) == RESULT
    assert cache.hits == 1


def test_another_key_is_compiled(file):
    store(file, a=RESULT)
    cache = CompileCache(file)
    assert cache.find("b", lambda: {**RESULT, "registers": 7})["registers"] == 7
    assert cache.hits == 0


def test_a_failed_compilation_fails_in_every_run(file):
    for _ in range(2):
        cache = CompileCache(file)
        with pytest.raises(RuntimeError, match="ptxas failed"):
            cache.find("a", fail)
        cache.save()
    assert json.loads(file.read_text()) == {}


def test_spills_are_reported_from_the_entry_too(file):
    store(file, a={**RESULT, "spilled": 16})
    assert CompileCache(file).find("a", must_not_compile)["spilled"] == 16


def test_results_that_a_run_does_not_ask_for_are_dropped(file):
    store(file, a=RESULT, b=RESULT)
    cache = CompileCache(file)
    cache.find("b", must_not_compile)
    cache.save()
    assert json.loads(file.read_text()).keys() == {"b"}


def test_damaged_files_are_compiled_again(subtests, file):
    file.parent.mkdir()
    for content in ("", "{", "[]", "null", '{"a": 1}', '{"a": {}}', '{"a": {"registers": 64}}'):
        file.write_text(content)
        with subtests.test(content):
            assert CompileCache(file).find("a", lambda: RESULT) == RESULT


def test_entries_with_values_of_another_type_are_compiled_again(subtests, file):
    for change in ({"registers": "64"}, {"spilled": None}, {"shared": 1.5}, {"products": "mma.sync"}, {"more": 1}):
        store(file, a={**RESULT, **change})
        with subtests.test(**change):
            assert CompileCache(file).find("a", lambda: RESULT) == RESULT


def test_every_part_changes_the_key(subtests):
    parts = ["3.7.1", "source", {"ROWS": 16}, 4]
    for index, other in enumerate(("3.7.2", "sources", {"ROWS": 32}, 8)):
        changed = [*parts]
        changed[index] = other
        with subtests.test(other):
            assert make_key(*changed) != make_key(*parts)


def test_the_same_parts_have_the_same_key():
    assert make_key("3.7.1", {"ROWS": 16}) == make_key("3.7.1", {"ROWS": 16})


def test_results_are_beside_the_measurements(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    assert compile_cache_file(90) == tmp_path / "compiled" / "sm90.json"
