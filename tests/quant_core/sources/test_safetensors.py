"""Reader against the writer of the safetensors library, and one error for each kind of invalid file."""

import errno
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, positional
from learned_rounding.quant_core.sources import tensor_file as reader
from learned_rounding.quant_core.sources.dtypes import DTYPE_NAMES, TORCH_DTYPES

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Same dtype, shape and bytes."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right)))


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    return (
        torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        .view(dtype)
        .view(shape)
    )


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_dtype_of_safetensors_own_files(tmp_path, name):
    tensors = {
        f"{name}.{shape}": random_bytes(TORCH_DTYPES[name], shape)
        for shape in [(), (1,), (3, 5), (0,), (0, 4), (2, 0, 3), (2, 1, 3)]
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as source:
        assert set(source.tensors) == set(tensors)
        for key, tensor in tensors.items():
            assert source.tensors[key] == TensorInfo(tensor.dtype, tuple(tensor.shape))
            assert source.tensors[key].nbytes == tensor.nbytes
            assert same(source.read(key), tensor)


def test_dtype_names_are_those_that_safetensors_writes(tmp_path):
    """Both directions of the table, against the header of a file that safetensors wrote."""
    for dtype, name in DTYPE_NAMES.items():
        save_file({"a": torch.zeros(2, dtype=dtype)}, tmp_path / "a.safetensors")
        assert f'"dtype":"{name}"'.encode() in (tmp_path / "a.safetensors").read_bytes()


def test_tensors_come_in_the_order_of_the_file(tmp_path):
    save_file(
        {"b": torch.zeros(2), "a": torch.zeros(3), "c": torch.zeros(4, dtype=torch.int64)}, tmp_path / "a.safetensors"
    )
    with SafetensorsFile(tmp_path / "a.safetensors") as source:
        offsets = [source._offsets[name] for name in source.tensors]
        assert offsets == sorted(offsets) and len(source.tensors) == 3


def test_metadata_size_and_name(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {"ß": 'long\nstory "quoted"', "format": "pt"})
    with SafetensorsFile(str(tmp_path / "a.safetensors")) as source:
        assert source.metadata == {"ß": 'long\nstory "quoted"', "format": "pt"}
        assert source.size == (tmp_path / "a.safetensors").stat().st_size
        assert source.name == "a.safetensors" and source.path == tmp_path / "a.safetensors"


def test_no_metadata_is_an_empty_mapping(raw_file):
    for header in ({"a": ENTRY}, {"__metadata__": None, "a": ENTRY}, {"__metadata__": {}, "a": ENTRY}):
        with SafetensorsFile(raw_file(header, bytes(8))) as source:
            assert source.metadata == {}


def test_padding_after_the_header_is_allowed(raw_file):
    with SafetensorsFile(
        raw_file('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}      ', struct.pack("<2f", 1.5, -2))
    ) as source:
        assert source.read("a").tolist() == [1.5, -2]


def test_a_file_without_tensors_is_a_file(raw_file):
    with SafetensorsFile(raw_file({})) as source:
        assert source.tensors == {}


def test_samples_are_bytes_of_the_tensor(model_file):
    with SafetensorsFile(model_file()) as source:
        name = "blocks.0.attn.qkv.weight"
        data = source.read(name).view(torch.uint8).numpy().tobytes()
        assert source.sample(name, 0, 16) == data[:16]
        assert source.sample(name, 100, 33) == data[100:133]


def test_what_is_read_can_be_written_to(model_file):
    """No map of the file: a tensor is the caller's own."""
    with SafetensorsFile(model_file()) as source:
        first = source.read("step")
        first += 1
        assert source.read("step") == 7
    assert first == 8  # and lives on after the file is closed


def test_reading_from_several_threads(tmp_path):
    tensors = {f"t{index}": torch.full((5000 + index,), index) for index in range(24)}
    save_file(tensors, tmp_path / "a.safetensors")
    wrong = []
    with SafetensorsFile(tmp_path / "a.safetensors") as source:

        def work(start):
            for index in range(start, start + 24):
                name = f"t{index % 24}"
                if not torch.equal(source.read(name), tensors[name]):
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "one at a time"])
def test_file_closed_while_threads_read_it_stays_open_until_they_end(tmp_path, monkeypatch, parallel):
    """``parallel``: False as on Windows, which has no read at a given position."""
    monkeypatch.setattr(positional, "_PARALLEL", parallel)
    save_file({"a": torch.arange(100.0), "b": torch.arange(50.0)}, tmp_path / "a.safetensors")
    source, started, closed = SafetensorsFile(tmp_path / "a.safetensors"), threading.Barrier(3), threading.Event()
    read_at = source._read_at

    def wait(view, offset):
        started.wait()
        closed.wait()
        return read_at(view, offset)

    monkeypatch.setattr(source, "_read_at", wait)
    with ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(source.read, name) for name in source.tensors]
        started.wait()
        source.close()
        assert not source._file.closed
        closed.set()
        assert {tuple(read.result().shape) for read in reads} == {(100,), (50,)}
    assert source._file.closed
    with pytest.raises(SourceError, match="was closed while tensor a was read"):
        source.read("a")


@pytest.fixture
def refused(sentences):
    """refused(path): opening the file is a SourceError of one sentence that names it."""

    def check(path) -> None:
        with sentences.raises(SourceError) as caught:
            SafetensorsFile(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    return check


def test_a_missing_file(tmp_path, refused):
    refused(tmp_path / "none.safetensors")


def test_a_folder(tmp_path, refused):
    refused(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\x00" * 8,
        b"\x00" * 100,
        b"hello, I am a text file, and a fairly long one",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"PK\x03\x04" + bytes(60),
        b"\x80\x02}q\x00." + bytes(60),
        b"GGUF\x03\x00\x00\x00" + bytes(60),
    ],
    ids=["empty", "one byte", "eight zeros", "zeros", "text", "web page", "zip", "pickle", "GGUF"],
)
def test_other_kinds_of_file(tmp_path, data, refused):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    refused(path)


def test_a_real_pickled_checkpoint(tmp_path, refused):
    for index, zipped in enumerate((True, False)):
        torch.save({"a": torch.zeros(2)}, tmp_path / f"{index}.pt", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / f"{index}.pt")


@pytest.mark.parametrize("end", [9, 30, 100])
def test_truncated_in_the_header(model_file, end, refused):
    path = model_file()
    path.write_bytes(path.read_bytes()[:end])
    refused(path)


def test_truncated_in_the_data(model_file, refused):
    path = model_file()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(path)


def test_a_header_larger_than_the_format_allows(raw_file, refused):
    refused(raw_file('{"a":1}', length=100_000_001))
    refused(raw_file('{"a":1}', length=2**64 - 1))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":',
        b'{"a"\xff\xfe:1}',
        b"{nonsense}",
        pytest.param(b'{"a":' + b"[" * 100_000, id="deep"),
        {"a": 5},
        {"a": {}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {**ENTRY, "shape": None}},
        {"a": {**ENTRY, "data_offsets": [0]}},
        {"a": {**ENTRY, "data_offsets": [0, 4, 8]}},
        {"a": ENTRY, "__metadata__": "text"},
        {"a": {**ENTRY, "dtype": "F4"}},
        {"a": {**ENTRY, "dtype": ["F32"]}},
        {"a": {**ENTRY, "shape": [-2]}},
        {"a": {**ENTRY, "shape": [2.0]}},
        {"a": {**ENTRY, "shape": [True, 2]}},
        {"a": {**ENTRY, "shape": ["2"]}},
        {"a": {**ENTRY, "shape": "2"}},
        {"a": {**ENTRY, "data_offsets": [-8, 0]}},
        {"a": {**ENTRY, "data_offsets": [0.0, 8.0]}},
        {"a": {**ENTRY, "data_offsets": [8, 0]}},
        {"a": {**ENTRY, "shape": [3]}},
        {"a": {**ENTRY, "shape": [2**62, 4]}},
        pytest.param('{"a":%s,"a":%s}' % (('{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',) * 2), id="key twice"),
        {"a": ENTRY, "b": ENTRY},
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}},
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}},
        {"a": {**ENTRY, "data_offsets": [8, 16]}},
    ],
)
def test_damaged_headers(raw_file, header, refused):
    refused(raw_file(header, bytes(64)))


def test_metadata_must_be_strings(raw_file, refused):
    """The format says so; copied into the output as they are, others would make a file that nothing loads."""
    path = raw_file({"__metadata__": {"a": 1}, "a": ENTRY}, bytes(8))
    with pytest.raises(SafetensorError):
        load_file(path)
    refused(path)


def test_data_behind_the_last_tensor_is_refused(raw_file, refused):
    """As by safetensors' own library: something is wrong with it, whatever it is."""
    path = raw_file({"a": ENTRY}, bytes(9))
    with pytest.raises(SafetensorError):
        load_file(path)
    refused(path)


@pytest.mark.parametrize("header", [b'{"a":[]}', b'{"a":1}'])
def test_a_refused_file_is_closed(raw_file, monkeypatch, header, refused):
    opened = []
    real = open
    monkeypatch.setattr(
        reader, "open", lambda *args, **options: opened.append(real(*args, **options)) or opened[-1], raising=False
    )
    refused(raw_file(header))
    assert opened and all(file.closed for file in opened)


def test_a_file_cut_while_it_is_read(model_file, sentences):
    path = model_file()
    with SafetensorsFile(path) as source:
        with open(path, "r+b") as file:
            file.truncate(source.size - source.tensors[list(source.tensors)[-1]].nbytes)
        with sentences.raises(SourceError):
            source.read(list(source.tensors)[-1])


def test_a_disk_that_fails_while_reading(model_file, monkeypatch, sentences):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with SafetensorsFile(model_file()) as source:
        monkeypatch.setattr(source, "_read_at", fail)
        with sentences.raises(SourceError):
            source.read("step")
