"""Restricted unpickler: descriptions of tensors, nothing that a pickle names is imported or called."""

import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import pytest
import torch

from learned_rounding.quant_core.sources import TensorInfo
from learned_rounding.quant_core.sources.unpickler import ForbiddenGlobal, Opaque, Storage, StridedTensor, Unpickler


def load(data: bytes) -> object:
    return Unpickler(io.BytesIO(data)).load()


class Name:
    """Pickled as a global of that module and name."""

    def __init__(self, module: str, name: str):
        self.text = f"c{module}\n{name}\n".encode()


def call(name: Name, arguments: bytes = b")") -> bytes:
    """A pickle that calls a global; ``arguments``: opcodes that make a tuple."""
    return b"\x80\x02" + name.text + arguments + b"R."


def saved(value: object) -> bytes:
    """The pickle in a file of torch.save."""
    stream = io.BytesIO()
    torch.save(value, stream)
    with zipfile.ZipFile(stream) as archive:
        return archive.read("archive/data.pkl")


# Plain values


PLAIN = {
    "numbers": [0, 1, 255, 70_000, 2**40, -(2**70), 0.5, -1e300],
    "texts": ["a", "ß" * 300, None, True, False],
    "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "nested": {"a": {"b": [1, {"c": ()}]}},
    "shared": [["a"]] * 3,
}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_are_read(subtests, protocol):
    for kind, value in PLAIN.items():
        with subtests.test(kind):
            assert load(pickle.dumps(value, protocol)) == value


def test_bytes_are_read():
    assert load(pickle.dumps(b"raw", 3)) == b"raw"


def test_keys_that_are_no_strings_are_dropped():
    """Hashing a nested tuple can take exponential time."""
    assert load(pickle.dumps({1: "x", (2, 3): "y", "a": "z"})) == {"a": "z"}


def test_sets_are_not_kept(subtests):
    for value in [{1, 2}, frozenset("ab")]:
        with subtests.test(value=value):
            assert isinstance(load(pickle.dumps(value, 4)), Opaque)


def test_bytearrays_are_read():
    assert load(pickle.dumps(bytearray(b"more"), 5)) == b"more"


def test_an_ordered_dict_is_a_table():
    assert load(pickle.dumps(OrderedDict(a=1, b=2), 2)) == {"a": 1, "b": 2}


def test_an_ordered_dict_of_python_2_is_a_table():
    """Python 2 pickles it as a call with a list of pairs."""

    class Python2Dict(OrderedDict):
        def __reduce__(self):
            return OrderedDict, ([list(pair) for pair in self.items()],)

    assert load(pickle.dumps(Python2Dict(a=1, b=2), 2)) == {"a": 1, "b": 2}


# Globals


class Evil:
    def __reduce__(self):
        return os.mkdir, ("was-here",)


def test_functions_of_other_modules_are_refused_by_name():
    with pytest.raises(ForbiddenGlobal, match=rf"{os.name}\.mkdir"):
        load(pickle.dumps(Evil(), 2))


def test_functions_of_other_modules_are_not_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForbiddenGlobal):
        load(pickle.dumps(Evil(), 2))
    assert os.listdir(tmp_path) == []


def test_builtins_that_execute_are_refused(subtests):
    for name in ["eval", "exec", "getattr", "__import__", "open"]:
        with subtests.test(name=name):
            for module in ("builtins", "__builtin__"):
                with pytest.raises(ForbiddenGlobal):
                    load(call(Name(module, name)))


def test_functions_of_plain_data_are_not_called(subtests):
    for name in ["numpy.core.multiarray\n_reconstruct", "torch\ndevice", "_codecs\nencode"]:
        with subtests.test(name=name):
            assert load(call(Name(*name.split("\n")))) == Opaque(name.replace("\n", "."))


def test_modules_are_not_imported():
    load(call(Name("torch.a_module_that_does_not_exist", "f")))
    assert "torch.a_module_that_does_not_exist" not in sys.modules


def test_the_callback_of_lightning_is_accepted():
    """Checkpoints of Stable Diffusion 1 have it, and ComfyUI's loader accepts it."""
    assert load(Name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint").text + b".")


def test_other_names_of_lightning_are_refused():
    with pytest.raises(ForbiddenGlobal):
        load(Name("pytorch_lightning.callbacks.model_checkpoint", "os").text + b".")


def test_long_names_of_globals_are_refused():
    with pytest.raises(ValueError, match="a global name of"):
        load(Name("torch", "x" * 300).text + b".")


def test_attributes_of_objects_are_dropped():
    value = types.SimpleNamespace(a=1)
    data = pickle.dumps(value, 2).replace(b"ctypes\nSimpleNamespace", b"ctorch\nSimpleNamespace")
    assert isinstance(load(data), Opaque)


# Limits


def test_opcodes_that_tensors_do_not_need_are_refused(subtests):
    for opcode in [pickle.PERSID, pickle.OBJ, pickle.INST, pickle.EXT1, pickle.NEWOBJ_EX, b"\x00"]:
        with subtests.test(opcode=opcode), pytest.raises(ValueError, match="opcode"):
            load(b"\x80\x02" + opcode + b".")


def test_calls_with_more_arguments_than_the_pickle_has_bytes_are_refused():
    """One long list could be passed to any number of calls."""
    long_list = b"](" + b"K\x01" * 200 + b"e" + b"q\x00" + b"0"
    calls = (b"ctorch\nf\n" + b"h\x00\x85R0") * 50
    with pytest.raises(ValueError, match="more arguments than the pickle has bytes"):
        load(b"\x80\x02" + long_list + calls + b"N.")


def test_arguments_that_are_no_tuple_are_refused():
    with pytest.raises(ValueError, match="are not a tuple"):
        load(call(Name("torch", "f"), b"]"))


# Tensors


BASE = torch.arange(96.0).view(8, 12)
VIEWS = {
    "whole": BASE,
    "transposed": BASE.t(),
    "columns": BASE[:, 2:5],
    "strided": BASE[::2, ::3],
    "scalar": BASE[7, 11],
    "empty": BASE[:0],
    "parameter": torch.nn.Parameter(BASE[1]),
}


def test_a_tensor_is_described_by_its_storage_shape_and_stride(subtests):
    for kind, view in VIEWS.items():
        with subtests.test(kind):
            found = load(saved(view))
            assert found.storage == Storage("0", torch.float32, 96)
            assert found.info == TensorInfo(torch.float32, tuple(view.shape))
            assert found.stride == view.stride()
            assert found.offset == 4 * view.storage_offset()


def test_contiguous_tensors_are_told_from_others(subtests):
    for kind, view in VIEWS.items():
        with subtests.test(kind):
            assert load(saved(view)).is_contiguous is (view.is_contiguous() or not view.numel())


def test_the_span_of_a_view_is_from_its_first_to_its_last_value():
    assert load(saved(VIEWS["columns"])).span == 4 * (7 * 12 + 3)
    assert load(saved(VIEWS["empty"])).span == 0


def test_a_tensor_of_a_dtype_without_a_storage_type_is_described():
    assert load(saved(torch.zeros(6, dtype=torch.float8_e4m3fn))).info == TensorInfo(torch.float8_e4m3fn, (6,))


def test_tensors_that_are_not_dense_are_opaque(subtests):
    for tensor in [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64).conj()]:
        with subtests.test(tensor=tensor):
            found = load(saved(tensor))
            assert isinstance(found, Opaque)
            assert found.is_tensor


def on_storage(offset: object, shape: object, stride: object, count: object = 8) -> bytes:
    class Rebuilt:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Persistent(), offset, shape, stride, False, OrderedDict())

    class Persistent:
        pass

    class Saver(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Persistent) else None

    stream = io.BytesIO()
    Saver(stream, 2).dump(Rebuilt())
    return stream.getvalue()


def test_a_tensor_within_its_storage_is_read():
    assert isinstance(load(on_storage(2, (2, 3), (3, 1))), StridedTensor)


INVALID = {
    "offset beyond the storage": (3, (2, 3), (3, 1)),
    "stride beyond the storage": (0, (2, 3), (6, 1)),
    "more values than the storage has": (0, (3, 3), (0, 0)),
    "negative offset": (-1, (2,), (1,)),
    "negative stride": (7, (2,), (-1,)),
    "boolean side": (0, (True,), (1,)),
    "fractional side": (0, (1.0,), (1,)),
    "huge side": (0, (2**63, 0), (1, 1)),
    "shape without stride": (0, (2, 3), (1,)),
    "many dimensions": (0, (1,) * 65, (1,) * 65),
}


def test_tensors_that_their_storage_cannot_hold_are_refused(subtests):
    for arguments in INVALID.values():
        with subtests.test(arguments=arguments), pytest.raises(ValueError):
            load(on_storage(*arguments))


def test_storages_of_other_counts_are_refused(subtests):
    for count in [-1, 2**63, 8.0, True, "8"]:
        with subtests.test(count=count), pytest.raises(ValueError, match="is not a storage"):
            load(on_storage(0, (1,), (1,), count))
