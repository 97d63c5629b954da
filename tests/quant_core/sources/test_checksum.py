"""Checksum of tensors: additive over parts, equal on every device, different for different bytes."""

import io
import threading

import numpy
import pytest
import torch

from learned_rounding.quant_core.sources import checksum
from learned_rounding.quant_core.sources.checksum import BLOCK, FileChecksums, byte_checksum, tensor_checksum

SIZES = [0, 1, 7, 8, 9, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]


def reference(data: bytes) -> int:
    """The definition, in integers of numpy that wrap."""
    words = numpy.frombuffer(data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0"), numpy.uint64).reshape(-1, BLOCK // 8)
    words = words + (words.view(numpy.int64) >> 32).view(numpy.uint64)
    constants = numpy.empty(sum(words.shape), numpy.uint64)
    for index in range(len(constants)):
        mixed = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
        shifted = mixed >> 30 | (2**64 - 2**34 if mixed >> 63 else 0)  # of a signed number
        constants[index] = (mixed ^ shifted) * 0xBF58476D1CE4E5B9 % 2**64 | 1
    sums = (words * constants[: words.shape[1]]).sum(axis=1, dtype=numpy.uint64)
    return int((sums * constants[words.shape[1] :]).sum(dtype=numpy.uint64))


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def test_checksum_matches_its_definition(subtests):
    for size in SIZES:
        with subtests.test(size=size):
            data = random_bytes(size)
            assert byte_checksum(data) == reference(data.numpy().tobytes())


def test_checksums_of_parts_add_up():
    data = random_bytes(5 * BLOCK + 100)
    parts = [byte_checksum(part, index * 2 * BLOCK) for index, part in enumerate(data.split(2 * BLOCK))]
    assert sum(parts) % 2**64 == byte_checksum(data)


def test_launches_of_several_blocks_give_the_same_checksum(monkeypatch):
    data = random_bytes(7 * BLOCK + 3)
    expected = byte_checksum(data)
    monkeypatch.setattr(checksum, "_BLOCKS", {"cpu": 3})
    assert byte_checksum(data) == expected


@pytest.mark.gpu
def test_checksum_is_the_same_on_a_gpu(subtests):
    for size in SIZES:
        with subtests.test(size=size):
            data = random_bytes(size)
            assert byte_checksum(data.cuda()) == byte_checksum(data)


def test_changed_lost_and_exchanged_bytes_change_the_checksum():
    data = random_bytes(2 * BLOCK)
    pages = range(0, data.numel(), 5 * 4096)
    seen = {byte_checksum(data)}
    for page in pages:
        lost, bit = data.clone(), data.clone()
        lost[page : page + 4096] = 0
        bit[page + 7] ^= 0x80  # the highest bit of a word
        seen |= {byte_checksum(lost), byte_checksum(bit)}
    seen.add(byte_checksum(torch.cat([data[BLOCK:], data[:BLOCK]])))
    assert len(seen) == 2 + 2 * len(pages)


def test_exchanged_words_of_two_blocks_change_the_checksum():
    words = random_bytes(8 * BLOCK).view(torch.int64).view(8, -1)
    exchanged = words.clone()
    exchanged[2, 5], exchanged[5, 2] = words[5, 2], words[2, 5]
    assert tensor_checksum(exchanged) != tensor_checksum(words)


def test_tensor_checksum_is_that_of_its_bytes_in_row_major_order():
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = byte_checksum(tensor.t().contiguous().view(torch.uint8).flatten())
    assert tensor_checksum(tensor.t()) == expected


def test_tensor_checksum_does_not_depend_on_the_alignment():
    data = random_bytes(70)
    unaligned = torch.frombuffer(bytearray(b"x" + data.numpy().tobytes()), dtype=torch.uint8)[1:]
    assert tensor_checksum(unaligned) == tensor_checksum(data)


@pytest.fixture(params=["file", "memory"])
def open_bytes(request, tmp_path):
    """open_bytes(data) → file with a descriptor, or without one."""
    opened = []

    def open_data(data: bytes):
        (tmp_path / "data").write_bytes(data)
        opened.append(open(tmp_path / "data", "rb", buffering=0) if request.param == "file" else io.BytesIO(data))
        return opened[-1]

    yield open_data
    for file in opened:
        file.close()


PARTS = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 20 * BLOCK + 5, 8]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def chunks_of_one_block(request, monkeypatch):
    monkeypatch.setattr(checksum, "_CHUNK", {request.param: BLOCK})
    return torch.device(request.param)


@pytest.mark.parametrize("threads", [1, 4])
def test_checksums_of_parts_of_a_file_equal_those_of_their_bytes(monkeypatch, open_bytes, threads, chunks_of_one_block):
    monkeypatch.setattr(checksum, "_THREADS", threads)
    monkeypatch.setattr(checksum, "_AHEAD", 2 * threads)
    parts = [random_bytes(size) for size in PARTS]
    expected = [byte_checksum(part) for part in parts]
    file = open_bytes(torch.cat(parts).numpy().tobytes())
    with FileChecksums(lambda: None, chunks_of_one_block) as checksums:
        assert list(checksums.compute(file, PARTS)) == expected
        file.seek(0)
        assert [checksums.next(file, size) for size in PARTS] == expected


def test_each_chunk_of_a_file_asks_whether_to_go_on(open_bytes, chunks_of_one_block):
    checks: list[int] = []
    file = open_bytes(bytes(sum(PARTS)))
    with FileChecksums(lambda: checks.append(1), chunks_of_one_block) as checksums:
        list(checksums.compute(file, PARTS))
    assert len(checks) == 1 + 1 + 1 + 1 + 2 + 21 + 1


def test_a_part_beyond_the_end_of_a_file_has_no_checksum(open_bytes, chunks_of_one_block):
    data = random_bytes(2 * BLOCK)
    file = open_bytes(data.numpy().tobytes())
    with FileChecksums(lambda: None, chunks_of_one_block) as checksums:
        assert list(checksums.compute(file, [BLOCK, BLOCK + 1])) == [byte_checksum(data[:BLOCK].clone()), None]
        file.seek(0, io.SEEK_END)
        assert checksums.next(file, 1) is None


def test_position_of_a_file_without_positional_reads_is_moved_by_its_readers_only(monkeypatch):
    """Otherwise a thread could read another part than the one whose position it has just set."""

    class Watched(io.BytesIO):
        def seek(self, *args) -> int:
            movers.append(threading.current_thread())
            return super().seek(*args)

    movers, sizes = [], [BLOCK, 3 * BLOCK, 5]
    monkeypatch.setattr(checksum, "_CHUNK", {"cpu": BLOCK})
    with FileChecksums(lambda: None) as checksums:
        assert None not in list(checksums.compute(Watched(bytes(sum(sizes))), sizes))
    assert len(movers) == 5
    assert threading.current_thread() not in movers


def test_file_that_is_shorter_than_its_parts_is_not_read_on(open_bytes):
    checks: list[int] = []
    file = open_bytes(bytes(10))
    with FileChecksums(lambda: checks.append(1)) as checksums:
        assert list(checksums.compute(file, [2, 1 << 60, 3])) == [0, None]
    assert len(checks) < 100


def test_checksums_of_a_file_can_be_cancelled():
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), FileChecksums(stop) as checksums:
        checksums.next(io.BytesIO(bytes(10)), 10)
