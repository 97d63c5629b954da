"""The reader against safetensors' own writer, and one sentence for each way in which a file can be bad."""

import errno
import struct
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo
from learned_rounding.quant_core.sources import safetensors as reader
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
        offsets = [source._begins[name] for name in source.tensors]
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


def refused(path, sentence: str, sentences) -> str:
    with sentences.raises(SourceError) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and text.endswith(".")
    return text


def test_a_missing_file(tmp_path):
    refused(tmp_path / "none.safetensors", "There is no file")


def test_a_folder(tmp_path):
    refused(tmp_path, "is a folder")


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"", "empty"),
        (b"x", "another kind of file"),
        (b"\x00" * 8, "another kind of file"),
        (b"\x00" * 100, "another kind of file"),
        (b"hello, I am a text file, and a fairly long one", "another kind of file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "another kind of file"),
        (b"PK\x03\x04" + bytes(60), "a pickled PyTorch checkpoint"),
        (b"\x80\x02}q\x00." + bytes(60), "a pickled PyTorch checkpoint"),
        (b"GGUF\x03\x00\x00\x00" + bytes(60), "a GGUF file"),
    ],
    ids=["empty", "one byte", "eight zeros", "zeros", "text", "web page", "zip", "pickle", "GGUF"],
)
def test_other_kinds_of_file(tmp_path, data, kind):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert "give a .safetensors file" in refused(path, f"is not a safetensors file but {kind}")


def test_a_real_pickled_checkpoint(tmp_path):
    for index, zipped in enumerate((True, False)):
        torch.save({"a": torch.zeros(2)}, tmp_path / f"{index}.pt", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / f"{index}.pt", "but a pickled PyTorch checkpoint")


@pytest.mark.parametrize("end", [9, 30, 100])
def test_truncated_in_the_header(model_file, end):
    path = model_file()
    path.write_bytes(path.read_bytes()[:end])
    assert f"the file has {end}" in refused(path, "is truncated: its header alone needs")


def test_truncated_in_the_data(model_file):
    path = model_file()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"should have {len(whole):,} bytes and has {len(whole) - 1:,}" in refused(path, "is truncated")


def test_a_header_larger_than_the_format_allows(raw_file):
    refused(raw_file('{"a":1}', length=100_000_001), "claims a header of 100,000,001 bytes")
    refused(raw_file('{"a":1}', length=2**64 - 1), "claims a header of")


@pytest.mark.parametrize(
    "header, what",
    [
        (b'{"a":', "Expecting value"),
        (b'{"a"\xff\xfe:1}', "codec"),
        (b"{nonsense}", "Expecting property name"),
        (b'{"a":' + b"[" * 100_000, ""),
        ({"a": 5}, ""),
        ({"a": {}}, "dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ({"a": {**ENTRY, "shape": None}}, ""),
        ({"a": {**ENTRY, "data_offsets": [0]}}, ""),
        ({"a": {**ENTRY, "data_offsets": [0, 4, 8]}}, ""),
        ({"a": ENTRY, "__metadata__": "text"}, ""),
        ({"a": {**ENTRY, "dtype": "F4"}}, "tensor a has the unknown dtype F4"),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, ""),
        ({"a": {**ENTRY, "shape": [-2]}}, "no whole numbers"),
        ({"a": {**ENTRY, "shape": [2.0]}}, "no whole numbers"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, "no whole numbers"),
        ({"a": {**ENTRY, "shape": ["2"]}}, ""),
        ({"a": {**ENTRY, "shape": "2"}}, ""),
        ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, "no whole numbers"),
        ({"a": {**ENTRY, "data_offsets": [0.0, 8.0]}}, "no whole numbers"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "tensor a needs 8 bytes and is given -8"),
        ({"a": {**ENTRY, "shape": [3]}}, "tensor a needs 12 bytes and is given 8"),
        ({"a": {**ENTRY, "shape": [2**62, 4]}}, "tensor a needs"),
        ('{"a":%s,"a":%s}' % (('{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',) * 2), "a name stands in it twice"),
        ({"a": ENTRY, "b": ENTRY}, "tensor [ab] begins at byte 0 instead of 8"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, "tensor b begins at byte 4 instead of 8"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, "tensor b begins at byte 12 instead of 8"),
        ({"a": {**ENTRY, "data_offsets": [8, 16]}}, "tensor a begins at byte 8 instead of 0"),
    ],
)
def test_damaged_headers(raw_file, header, what):
    assert "fetch the file again" in refused(raw_file(header, bytes(64)), f"has a damaged header.*{what}")


def test_metadata_must_be_strings(raw_file):
    """The format says so; copied into the output as they are, others would make a file that nothing loads."""
    path = raw_file({"__metadata__": {"a": 1}, "a": ENTRY}, bytes(8))
    with pytest.raises(SafetensorError):
        load_file(path)
    refused(path, "damaged header")


def test_data_behind_the_last_tensor_is_refused(raw_file):
    """As by safetensors' own library: something is wrong with it, whatever it is."""
    path = raw_file({"a": ENTRY}, bytes(9))
    with pytest.raises(SafetensorError):
        load_file(path)
    refused(path, "after its last tensor")


@pytest.mark.parametrize("header", [b'{"a":[]}', b'{"a":1}'])
def test_a_refused_file_is_closed(raw_file, monkeypatch, header):
    opened = []
    real = open
    monkeypatch.setattr(
        reader, "open", lambda *args, **options: opened.append(real(*args, **options)) or opened[-1], raising=False
    )
    refused(raw_file(header), "damaged")
    assert opened and all(file.closed for file in opened)


def test_a_file_cut_while_it_is_read(model_file, sentences):
    path = model_file()
    with SafetensorsFile(path) as source:
        with open(path, "r+b") as file:
            file.truncate(source.size - source.tensors[list(source.tensors)[-1]].nbytes)
        with sentences.raises(SourceError):
            source.read(list(source.tensors)[-1])


def test_a_disk_that_fails_while_reading(model_file, sentences):
    class Failing:
        def __init__(self, file):
            self._file = file

        def readinto(self, view):
            raise OSError(errno.EIO, "Input/output error")

        def __getattr__(self, name):
            return getattr(self._file, name)

    with SafetensorsFile(model_file()) as source:
        source._file = Failing(source._file)
        with sentences.raises(SourceError):
            source.read("step")
