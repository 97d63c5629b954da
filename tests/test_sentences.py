"""The golden file of sentences: how it is compared, normalized and updated, and that no entry is without its test."""

import ast
import json
import re
from collections import Counter

import pytest

from learned_rounding.tests.sentences import (
    GOLDEN,
    TESTS,
    Sentences,
    entry_name,
    function_of,
    load_golden,
    merge_entries,
    save_golden,
)


def checker(golden, test="test_a::test_b", shared="test_a::test_b") -> Sentences:
    return Sentences(test, shared, r"/tmp/pytest/[^/\s]+", golden)


def test_the_same_text_passes_and_another_fails():
    checker({"test_a::test_b": "one", "test_a::test_b 2": "two"})("one", "two")
    with pytest.raises(pytest.fail.Exception, match="--update-sentences"):
        checker({"test_a::test_b": "one"})("two")


def test_a_missing_entry_fails_with_the_option_to_run():
    with pytest.raises(pytest.fail.Exception, match="--update-sentences"):
        checker({})("one")


def test_an_error_is_checked_by_class_and_message():
    with checker({"test_a::test_b": "wrong"}).raises(ValueError):
        raise ValueError("wrong")
    with pytest.raises(pytest.fail.Exception), checker({"test_a::test_b": "wrong"}).raises(ValueError):
        pass


def test_what_varies_is_replaced():
    recorded = checker(None)
    recorded("/tmp/pytest/test_x0/a.safetensors: 3.21 s", ["a", "b"])
    recorded("layer  12 of 1,024:    0.5", numbers=False)
    assert recorded.texts == ["TMP/a.safetensors: N s", "a\nb", "layer  N of N:  N"]


def test_repeated_texts_are_compared_without_number_and_order():
    golden = {"test_a::test_b": "tensor NAME of N", "test_a::test_b 2": "full"}
    compared = checker(golden)
    for text in ("full", "tensor a.1 of 7", "tensor b of 8", "full"):
        compared(text, repeated=True)
    assert compared.texts == ["full", "tensor NAME of N"]
    with pytest.raises(pytest.fail.Exception):
        compared("empty", repeated=True)


def test_hosts_share_entries():
    node_id = "tests/nodes/test_a.py::test_b[0.3.75-x]"
    assert entry_name(node_id, "0.3.75", "oldest") == "test_a::test_b[host-x]"
    assert entry_name(node_id.replace("0.3.75", "0.33.0"), "0.33.0", "newer") == "test_a::test_b[newer-x]"
    golden = {"t::f[host]": "one", "t::g[host]": "one", "t::g[newer]": "two"}
    checker(golden, "t::f[newer]", "t::f[host]")("one")
    checker(golden, "t::g[newer]", "t::g[host]")("two")


def test_an_update_replaces_what_ran_and_keeps_the_rest():
    before = {"t::f[a]": "1", "t::f[a] 2": "2", "t::f[b]": "3", "t::f[gone]": "4", "t::g": "5"}
    passed = {("t::f[a]", "t::f[a]"): ["new"]}
    assert merge_entries(before, passed) == {"t::f[a]": "new", "t::f[b]": "3", "t::f[gone]": "4", "t::g": "5"}
    assert merge_entries(before, passed, ["t::f[a]", "t::f[b]"]) == {"t::f[a]": "new", "t::f[b]": "3", "t::g": "5"}


def test_an_update_writes_an_entry_of_a_host_only_where_it_differs():
    passed = {("t::f[newer]", "t::f[host]"): ["a", "c"], ("t::f[host]", "t::f[host]"): ["a", "b"]}
    merged = {"t::f[host]": "a", "t::f[host] 2": "b", "t::f[newer] 2": "c"}
    assert merge_entries({"t::f[newer]": "x"}, passed) == merged
    assert merge_entries(merged, {("t::f[newer]", "t::f[host]"): ["a", "b"]}) == {
        "t::f[host]": "a",
        "t::f[host] 2": "b",
    }


def test_the_file_is_sorted_with_an_entry_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("learned_rounding.tests.sentences.GOLDEN", tmp_path / "sentences.json")
    save_golden({"b": "x\ny", "a": "×"})
    assert [path.name for path in tmp_path.iterdir()] == ["sentences.json"]
    assert (tmp_path / "sentences.json").read_text(encoding="utf-8") == '{\n"a": "×",\n"b": "x\\ny"\n}\n'
    assert load_golden() == {"b": "x\ny", "a": "×"}


def test_every_entry_has_one_test_and_no_trace_of_a_machine():
    functions = Counter(
        f"{path.stem}::{node.name}"
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    )
    entries = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert {name for name in map(function_of, entries) if functions[name] != 1} == set()
    assert [name for name, text in entries.items() if re.search(r"Traceback|pytest-of|/root/|/home/", text)] == []


def test_measured_values_are_left_out_on_a_gpu(monkeypatch):
    cpu = "most sensitive layers: joint_blocks.1.a, joint_blocks.2.b\ntime  N s on cpu\nbest solver: gptq N"
    gpu = (
        "most sensitive layers: joint_blocks.3.c, joint_blocks.1.a\ntime  2 s on cuda:0\nbest solver: gptq 3, nearest 1"
    )
    golden = {"test": re.sub(r"\d+", "N", cpu)}
    monkeypatch.setattr("learned_rounding.tests.sentences.HOST_DEVICE", "cpu")
    with pytest.raises(pytest.fail.Exception):
        Sentences("test", "test", "TMP", golden)(gpu, numbers=False)
    monkeypatch.setattr("learned_rounding.tests.sentences.HOST_DEVICE", "cuda")
    Sentences("test", "test", "TMP", golden)(gpu, numbers=False)


def test_what_a_card_decides_is_left_out_on_a_gpu(monkeypatch):
    golden = {"test": "Verified: 4 layers; ran float8_e4m3fn per tensor. Outside the model: 1 tensor (a.bias)."}
    said = "Verified: 4 layers; ran int8_tensorwise per row, ConvRot 256. Outside the model: 1 tensor (a.bias)."
    monkeypatch.setattr("learned_rounding.tests.sentences.HOST_DEVICE", "cuda")
    Sentences("test", "test", "TMP", golden)(said, measured=True)
    for text, measured in ((said, False), (said.replace("a.bias", "b.bias"), True)):
        with pytest.raises(pytest.fail.Exception):
            Sentences("test", "test", "TMP", golden)(text, measured=measured)
