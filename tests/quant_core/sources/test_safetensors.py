"""Reader against the writer of the safetensors library, and one error for each kind of invalid file."""

import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo
from learned_rounding.quant_core.sources.dtypes import TORCH_DTYPES
from learned_rounding.quant_core.sources.safetensors import parse_bounded_json

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    return (
        torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        .view(dtype)
        .view(shape)
    )


def test_every_dtype_of_safetensors_own_files(subtests, tmp_path):
    shapes = [(), (1,), (3, 5), (0,), (0, 4), (2, 0, 3), (2, 1, 3)]
    for name, dtype in TORCH_DTYPES.items():
        with subtests.test(name):
            tensors = {f"{name}.{shape}": random_bytes(dtype, shape) for shape in shapes}
            save_file(tensors, tmp_path / "a.safetensors")
            with SafetensorsFile(tmp_path / "a.safetensors") as source:
                assert set(source.tensors) == set(tensors)
                for key, tensor in tensors.items():
                    assert source.tensors[key] == TensorInfo(tensor.dtype, tuple(tensor.shape))
                    read = source.read(key)
                    assert read.dtype is tensor.dtype
                    assert read.shape == tensor.shape
                    assert torch.equal(raw(read), raw(tensor))


def test_tensors_come_in_the_order_of_the_file(raw_file):
    header = {name: {**ENTRY, "data_offsets": [begin, begin + 8]} for name, begin in (("b", 16), ("a", 0), ("c", 8))}
    with SafetensorsFile(raw_file(header, bytes(24))) as source:
        assert list(source.tensors) == ["a", "c", "b"]


def test_metadata_is_that_of_the_header(tmp_path):
    metadata = {"ß": 'long\nstory "quoted"', "format": "pt"}
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", metadata)
    with SafetensorsFile(str(tmp_path / "a.safetensors")) as source:
        assert source.metadata == metadata


def test_no_metadata_is_an_empty_mapping(subtests, raw_file):
    for metadata in [{}, {"__metadata__": None}, {"__metadata__": {}}]:
        with subtests.test(metadata=metadata), SafetensorsFile(raw_file({**metadata, "a": ENTRY}, bytes(8))) as source:
            assert source.metadata == {}


def test_padding_after_the_header_is_allowed(raw_file):
    header = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}      '
    with SafetensorsFile(raw_file(header, struct.pack("<2f", 1.5, -2))) as source:
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


@pytest.fixture
def refused(sentences):
    """refused(path): opening the file is a SourceError of one sentence that names it."""

    def check(path) -> None:
        with sentences.raises(SourceError) as caught:
            SafetensorsFile(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    return check


OTHERS = {
    "empty": b"",
    "one byte": b"x",
    "eight zeros": b"\x00" * 8,
    "zeros": b"\x00" * 100,
    "text": b"hello, I am a text file, and a fairly long one",
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "zip": b"PK\x03\x04" + bytes(60),
    "pickle": b"\x80\x02}q\x00." + bytes(60),
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(60),
}


def test_other_kinds_of_file(subtests, tmp_path, refused):
    path = tmp_path / "a.safetensors"
    for kind, data in OTHERS.items():
        with subtests.test(kind):
            path.write_bytes(data)
            refused(path)


def test_a_real_pickled_checkpoint(subtests, tmp_path, refused):
    for zipped in [True, False]:
        with subtests.test(zipped=zipped):
            torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
            refused(tmp_path / "a.pt")


def test_truncated_files(subtests, model_file, refused):
    """In the header, and in the data."""
    for end in [9, 30, 100, -1]:
        with subtests.test(end=end):
            path = model_file()
            path.write_bytes(path.read_bytes()[:end])
            refused(path)


def test_a_header_larger_than_the_format_allows(subtests, raw_file, refused):
    for length in [100_000_001, 2**64 - 1]:
        with subtests.test(length=length):
            refused(raw_file('{"a":1}', length=length))


DAMAGED = [
    b'{"a":',
    b'{"a"\xff\xfe:1}',
    b"{nonsense}",
    b'{"a":' + b"[" * 100_000,
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
    '{"a":%s,"a":%s}' % (('{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',) * 2),
    {"a": ENTRY, "b": ENTRY},
    {"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}},
    {"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}},
    {"a": {**ENTRY, "data_offsets": [8, 16]}},
]


def test_damaged_headers(subtests, raw_file, refused):
    for number, header in enumerate(DAMAGED):
        with subtests.test(str(header)[:100], number=number):
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


def test_entries_that_are_no_tables_are_refused(subtests, raw_file, refused):
    for header in [b'{"a":[]}', b'{"a":1}']:
        with subtests.test(header=header):
            refused(raw_file(header))


def test_dtypes_that_comfyui_does_not_load_are_refused_by_name(subtests, raw_file, sentences):
    for dtype in ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        with subtests.test(dtype):
            entry = {"dtype": dtype, "shape": [32, 32], "data_offsets": [0, 512]}
            with sentences.raises(SourceError) as caught:
                SafetensorsFile(raw_file({"blocks.0.a.weight": entry}, bytes(512)))
            assert caught.value.tensor == "blocks.0.a.weight"


def test_json_of_many_values_is_refused():
    with pytest.raises(ValueError, match="more than 2,500,000 JSON values"):
        parse_bounded_json(b"[" + b"0," * 2_500_001 + b"0]")


def test_json_is_that_of_the_standard_library():
    assert parse_bounded_json(b'{"a": [1, "b"]}') == {"a": [1, "b"]}
