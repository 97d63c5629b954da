"""Snapshot of the texts that users read: tests check classes and fields, `golden/sentences.json` contains the wording.

    with sentences.raises(RecipeError):  # class and full message
        ...
    with sentences.raises(OutputError, repeated=True):  # faults at many places: one of the texts of this test
        ...
    sentences(error, report.problems, caplog.messages)  # exceptions, strings, or sequences of strings

Each text is compared with the entry `module::test[parameters]`; further texts of the same test are numbered from 2.
`pytest --update-sentences` rewrites the entries of the tests that passed, and removes the entries that they no longer make.
In tests of ComfyUI hosts, the entry of the oldest host applies to all hosts that have no entry of their own.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from learned_rounding.hosts.server import HOST_DEVICE

__all__ = ["GOLDEN", "Sentences", "entry_name", "function_of", "load_golden", "merge_entries", "save_golden"]

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden" / "sentences.json"
OLDEST, ANY_HOST = "oldest", "host"
HINT = "If the new wording is intended, run this test with --update-sentences."

# Values that depend on the machine, the run, or the versions of Python and its libraries. The folders of tests are
# replaced first, by `Sentences`.
VARYING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (re.escape(str(TESTS.parent)), "REPOSITORY"),
        (r"0x[0-9a-f]{6,}", "ADDRESS"),
        (r"127\.0\.0\.1:\d+", "SERVER"),
        (r"\.[0-9a-f]{8}\.partial\b", ".ID.partial"),
        (r"\b\d[\d,.]* (s|ms)\b", r"N \1"),
        (r"learned_rounding \d+\.\d+[\w.]*", "learned_rounding VERSION"),
        (r"\blearned_rounding_[0-9a-f]{12}\b", "learned_rounding_ID"),
        (r"\btmp[a-z0-9_]{8}\b", "TMPNAME"),
        (r"(cannot be used here: ).*", r"\1TORCH_ERROR"),
        (r"\(choose from [^)]*\)", "(choose from CHOICES)"),
        (r"\b(posix|nt)\.mkdir", "os.mkdir"),
        (r"[A-Z][\w' ]+: line \d+ column \d+ \(char \d+\)", "JSON_ERROR"),
        (r"maximum recursion depth exceeded[^.;)]*", "JSON_ERROR"),
        (r"(not valid TOML: ).*", r"\1TOML_ERROR"),
        (r"'utf-[\w-]+' codec can't decode [^)]*", "DECODE_ERROR"),
        (r"embedded null \w+", "VALUE_ERROR"),
        (r"(too many|not enough) values to unpack \([^)]*\)", "VALUE_ERROR"),
        (r"dictionary update sequence [\w #;]* required", "VALUE_ERROR"),
        (r"'\w+' object is not \w+|object of type '\w+' has no len\(\)|unhashable type: '\w+'", "TYPE_ERROR"),
        (r"'\w+' object has no attribute '\w+'|cannot unpack non-iterable \w+ object", "TYPE_ERROR"),
        (r"shape '\[[\d, ]+\]' is invalid for input of size \d+", "TORCH_ERROR"),
        (r"list indices must be [\w ,]* str\b", "TYPE_ERROR"),
    )
]
# In texts with measured values: what depends on the device. Ignored where the hosts use a GPU.
MEASURED = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"\bon (cpu|cuda)(:N)?(?!\S)", "on DEVICE"),
        (r"\b(joint_blocks|encoder\.block)\.[\w.]+", "LAYER"),
        (r"(best solver: )[^|\n]*", r"\1SOLVERS"),
        (r"^(format  ).*: N layers\b", r"\1FORMATS"),
        (r"^(size and error  ).*", r"\1CURVE"),
        (r"\b(ran )\w+ per \w+.*?(?=\.( |$))", r"\1FORMATS"),
        (r"(has a relative error of )\d\S*?(?=\.?$)", r"\1N"),
    )
]
# Not the digits of names such as float8_e4m3fn.
NUMBER = re.compile(r"(?<![A-Za-z_\d])\d+(,\d{3})*(\.\d+)?(e[+-]?\d+)?(?![A-Za-z_\d])")


def _leave_out_measured(text: str) -> str:
    for pattern, replacement in MEASURED:
        text = pattern.sub(replacement, text)
    return text


def load_golden() -> dict[str, str]:
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}


def save_golden(entries: dict[str, str]) -> None:
    """Replace the golden file in one step, so that an interrupted run leaves a valid file."""
    temporary = GOLDEN.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(entries, indent=0, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(GOLDEN)


def entry_name(node_id: str, version: str | None = None, host: str = ANY_HOST) -> str:
    """`tests/run/test_x.py::test_y[0.3.75-a]` → `test_x::test_y[host-a]`, for the host of that version."""
    file, _, test = node_id.partition("::")
    if version is not None:
        test = re.sub(rf"(?<=[\[-]){re.escape(version)}(?=[\]-])", ANY_HOST if host == OLDEST else host, test)
    return f"{Path(file).stem}::{test}"


def function_of(entry: str) -> str:
    """`test_x::test_y[a] 2` → `test_x::test_y`."""
    return re.split(r"[\[ ]", entry, maxsplit=1)[0]


def _test_of(entry: str) -> str:
    return re.sub(r" \d+$", "", entry)


def merge_entries(
    entries: dict[str, str], passed: dict[tuple[str, str], list[str]], collected: Iterable[str] = ()
) -> dict[str, str]:
    """Golden entries after a run with --update-sentences.

    entries    the golden file before the run
    passed     (entry name of the test, the same for the oldest host) → texts, for each test that passed
    collected  entry names of all tests with the fixture, for whole modules that were collected: other entries of their
               test functions are stale
    """
    collected = set(collected)
    functions = {function_of(test) for test in collected}
    tests = {test for test, _ in passed}
    merged = {
        entry: text
        for entry, text in entries.items()
        if _test_of(entry) not in tests and (function_of(entry) not in functions or _test_of(entry) in collected)
    }
    for (test, shared), texts in sorted(passed.items(), key=lambda item: item[0][0] != item[0][1]):  # oldest host first
        for entry, same, text in zip(_numbered(test, texts), _numbered(shared, texts), texts, strict=True):
            if merged.get(same) != text:
                merged[entry] = text
    return merged


def _numbered(test: str, texts: list[str]) -> list[str]:
    return [test if number == 1 else f"{test} {number}" for number, _ in enumerate(texts, 1)]


class Sentences:
    """The fixture `sentences`.

    test, shared  entry names of the test, on its host and on the oldest host
    folders       regular expression of the folders that pytest makes for tests
    golden        entries to compare with, or None to record only
    """

    def __init__(self, test: str, shared: str, folders: str, golden: dict[str, str] | None):
        self.test, self.shared, self.golden = test, shared, golden
        self.texts: list[str] = []
        self._varying = [(re.compile(folders), "TMP"), *VARYING]

    @contextmanager
    def raises(self, expected, *, repeated: bool = False) -> Iterator[pytest.ExceptionInfo]:
        """`pytest.raises` that also checks the full message."""
        __tracebackhide__ = True
        with pytest.raises(expected) as error:
            yield error
        self(error, repeated=repeated)

    def __call__(self, *values, repeated: bool = False, numbers: bool = True, measured: bool = False) -> None:
        """Check exceptions, strings, and sequences of strings (one text, a line each).

        repeated  the number and order of the texts vary, as does the place of the fault: each must be one of the
                  texts of this test, compared without numbers
                  and names of tensors
        numbers   False for texts whose numbers are measured: all numbers are compared as N; implies ``measured``
        measured  True for texts with measured values: on a GPU neither the device is compared nor what the device or the
                  values decide, such as the recommended format and the names of the worst layers
        """
        __tracebackhide__ = True
        for value in values:
            if isinstance(value, pytest.ExceptionInfo):
                value = value.value
            text = str(value) if isinstance(value, str | BaseException) else "\n".join(map(str, value))
            text = self._normalize(text)
            if repeated:
                text = re.sub(r"\b(tensor|layer) [^\s:,;]+", r"\1 NAME", text)
            if repeated or not numbers:
                text = re.sub(r" {2,}", "  ", NUMBER.sub("N", text))  # columns are as wide as their numbers
            if repeated:
                self._check_repeated(text)
            else:
                self._check(text, measured=measured or not numbers)

    def _check_repeated(self, text: str) -> None:
        __tracebackhide__ = True
        if text not in self.texts:
            self.texts.append(text)
        if self.golden is not None:
            known = [entry for name, entry in self.golden.items() if _test_of(name) in (self.test, self.shared)]
            if text not in known:
                pytest.fail(f"{GOLDEN.name} has no such text of {self.test}\nnow:    {text}\n{HINT}")

    def _normalize(self, text: str) -> str:
        for pattern, replacement in self._varying:
            text = pattern.sub(replacement, text)
        return text if os.sep == "/" else re.sub(r"TMP\S*", lambda path: path[0].replace(os.sep, "/"), text)

    def _check(self, text: str, measured: bool) -> None:
        __tracebackhide__ = True
        self.texts.append(text)
        if self.golden is None:
            return
        own, shared = (_numbered(test, self.texts)[-1] for test in (self.test, self.shared))
        expected = self.golden.get(own, self.golden.get(shared))
        if expected is None:
            pytest.fail(f"{GOLDEN.name} has no entry {own}\nnow:    {text}\n{HINT}")
        if measured and HOST_DEVICE != "cpu":
            text, expected = _leave_out_measured(text), _leave_out_measured(expected)
        if text != expected:
            pytest.fail(f"{own} differs from {GOLDEN.name}\ngolden: {expected}\nnow:    {text}\n{HINT}")
