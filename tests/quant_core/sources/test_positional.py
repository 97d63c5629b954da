"""Reads at a position of an open file: with the system call, and where there is none."""

import io
from concurrent.futures import ThreadPoolExecutor

import pytest

from learned_rounding.quant_core.sources import positional
from learned_rounding.quant_core.sources.positional import positional_reader

DATA = bytes(range(256)) * 64


@pytest.fixture(params=["system call", "one at a time", "memory"])
def read(request, tmp_path, monkeypatch):
    """read(position, length) → bytes. "one at a time": as on Windows, which has no read at a given position."""
    monkeypatch.setattr(positional, "_PARALLEL", positional._PARALLEL and request.param != "one at a time")
    (tmp_path / "data").write_bytes(DATA)
    file = io.BytesIO(DATA) if request.param == "memory" else open(tmp_path / "data", "rb", buffering=0)
    read_at = positional_reader(file)

    def read_bytes(position: int, length: int) -> bytes:
        buffer = bytearray(length)
        return bytes(buffer[: read_at(memoryview(buffer), position)])

    with file:
        yield read_bytes


def test_bytes_are_those_at_the_position(read):
    assert read(1000, 300) == DATA[1000:1300]


def test_reads_do_not_depend_on_the_reads_before(read):
    read(5000, 100)
    assert read(10, 20) == DATA[10:30]


def test_a_read_across_the_end_has_the_rest(read):
    assert read(len(DATA) - 5, 100) == DATA[-5:]


def test_a_read_at_the_end_has_nothing(read):
    assert read(len(DATA), 10) == b""


def test_threads_read_at_their_own_positions(read):
    positions = [index * 37 % (len(DATA) - 64) for index in range(400)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda position: read(position, 64), positions))
    assert found == [DATA[position : position + 64] for position in positions]


@pytest.mark.skipif(not positional._PARALLEL, reason="no read at a position on this system")
def test_the_system_call_does_not_move_the_position_of_the_file(tmp_path):
    (tmp_path / "data").write_bytes(DATA)
    with open(tmp_path / "data", "rb", buffering=0) as file:
        positional_reader(file)(memoryview(bytearray(8)), 100)
        assert file.tell() == 0
