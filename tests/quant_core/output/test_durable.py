"""Flushes reach the disk itself, also on a system where os.fsync does not see to that."""

import errno
import os
import re
from pathlib import Path

import pytest

from learned_rounding.quant_core.output import durable

ROOT = Path(durable.__file__).parents[2]
FULL = 51  # fcntl.F_FULLFSYNC of macOS


@pytest.fixture
def calls(monkeypatch):
    """What is called on a macOS whose disk answers a full flush with ``calls.error``."""

    class Calls(list):
        error = 0

    made = Calls()

    def fcntl(descriptor, command):
        made.append(command)
        if made.error:
            raise OSError(made.error, os.strerror(made.error))

    monkeypatch.setattr(durable, "_FULL_FSYNC", FULL)
    monkeypatch.setattr(durable.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(os, "fsync", lambda descriptor: made.append("fsync"))
    return made


@pytest.mark.posix(reason="the full flush of macOS is in fcntl")
def test_a_full_flush_where_the_disk_has_one(calls, subtests):
    for error, expected in [(0, [FULL]), (errno.ENOTSUP, [FULL, "fsync"]), (errno.ENOTTY, [FULL, "fsync"])]:
        with subtests.test(error=error):
            calls.clear()
            calls.error = error
            durable.flush_to_disk(0)
            assert calls == expected


@pytest.mark.posix(reason="the full flush of macOS is in fcntl")
def test_a_full_flush_that_fails_is_told_of(calls):
    calls.error = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        durable.flush_to_disk(0)
    assert calls == [FULL]


def test_all_flushes_are_made_in_one_place():
    files = [path for folder in ("quant_core", "nodes", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if re.search(r"\bfsync\(", path.read_text(encoding="utf-8"))] == ["durable.py"]
