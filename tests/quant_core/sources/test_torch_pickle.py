"""Pickle reader against ``torch.load(weights_only=True)``: the same tensors, bit for bit."""

from collections import OrderedDict

import pytest
import torch

from learned_rounding.quant_core.sources import open_source
from learned_rounding.quant_core.sources.dtypes import DTYPE_NAMES

FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
LEGACY_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool]
LEGACY_DTYPES += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES = {"zip": list(DTYPE_NAMES), "legacy": LEGACY_DTYPES}  # the legacy format has no untyped storages


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bit patterns, NaN payloads included."""
    generator = torch.Generator().manual_seed(len(str(dtype)))
    high = 2 if dtype is torch.bool else 256
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, high, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def check_same_as_torch(path, key: str | None = None) -> None:
    """Compare names, dtypes, shapes, bytes and samples with those of ``torch.load``; ``key``: of the nested state dict."""
    loaded = torch.load(path, weights_only=True)
    expected = {
        name: tensor for name, tensor in (loaded[key] if key else loaded).items() if isinstance(tensor, torch.Tensor)
    }
    with open_source(path) as source:
        assert list(source.tensors) == list(expected)
        for name, tensor in expected.items():
            read = source.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape) and read.is_contiguous()
            assert (source.tensors[name].dtype, source.tensors[name].shape) == (tensor.dtype, tuple(tensor.shape))
            raw = raw_bytes(tensor)
            assert torch.equal(raw_bytes(read), raw)
            start, length = len(raw) // 3, len(raw) // 2
            assert source.sample(name, start, length) == raw[start : start + length].numpy().tobytes()


@pytest.mark.parametrize("format, dtype", [(format, dtype) for format in FORMATS for dtype in DTYPES[format]])
def test_every_dtype(tmp_path, format, dtype):
    shapes = [(), (1,), (0,), (0, 4), (3, 5), (2, 1, 3)]
    torch.save({str(shape): random_bits(dtype, *shape) for shape in shapes}, tmp_path / "x.pt", **FORMATS[format])
    check_same_as_torch(tmp_path / "x.pt")


VIEWS = {
    "transposed": lambda base: base.t(),
    "columns": lambda base: base[:, 2:5],
    "rows": lambda base: base[3:5],
    "strided": lambda base: base[::2, ::3],
    "diagonal": lambda base: base.diagonal(),
    "scalar": lambda base: base[7, 11],
    "empty": lambda base: base[:0],
    "permuted": lambda base: base.view(2, 4, 3, 4).permute(2, 0, 3, 1),
    "channels last": lambda base: base.view(2, 4, 3, 4).to(memory_format=torch.channels_last),
    "parameter": lambda base: torch.nn.Parameter(base[1]),
    "buffer": lambda base: torch.nn.Buffer(base[2]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_views_of_one_storage(tmp_path, options, dtype):
    base = random_bits(dtype, 8, 12)
    torch.save({"base": base} | {name: view(base) for name, view in VIEWS.items()}, tmp_path / "x.pt", **options)
    check_same_as_torch(tmp_path / "x.pt")


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_tied_weights(tmp_path, options):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(6, 4))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "x.pt", **options)
    check_same_as_torch(tmp_path / "x.pt")


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_training_checkpoint(tmp_path, options, key):
    """The state dict is nested beside an optimizer state and plain Python values."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    values = {
        "epoch": 3,
        "losses": [0.5, -1e300, 2**40, -(2**70)],
        "names": ("a", None, True, {"b", 1}),
        "by number": {1: torch.ones(2), (2, 3): "x"},
        "betas": OrderedDict(first=0.9, second=complex(1, 2)),
        "raw": b"bytes",
        "array": bytearray(b"more"),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
    }
    checkpoint = {"optimizer": optimizer.state_dict(), key: model.state_dict(), **values}
    torch.save(checkpoint, tmp_path / "x.pt", **options)
    check_same_as_torch(tmp_path / "x.pt", key)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickle_protocols_that_torch_load_rejects(tmp_path, protocol):
    tensors = {"a": random_bits(torch.bfloat16, 5, 3), "b": random_bits(torch.float8_e4m3fn, 7)}
    torch.save(
        tensors | {"raw": bytearray(b"more"), "set": frozenset("ab")}, tmp_path / "x.pt", pickle_protocol=protocol
    )
    with open_source(tmp_path / "x.pt") as source:
        assert source.tensors.keys() == tensors.keys()
        assert all(torch.equal(raw_bytes(source.read(name)), raw_bytes(tensor)) for name, tensor in tensors.items())


def test_ordered_dict_of_python_2(tmp_path):
    """Python 2 pickles an OrderedDict as a call with a list of pairs."""

    class Python2Dict(OrderedDict):
        def __reduce__(self):
            return OrderedDict, ([list(pair) for pair in self.items()],)

    tensors = Python2Dict(a=random_bits(torch.float32, 4, 3), b=random_bits(torch.int64, 2))
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    check_same_as_torch(tmp_path / "x.pt")
