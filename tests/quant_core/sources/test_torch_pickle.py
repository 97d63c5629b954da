"""Pickle reader against ``torch.load(weights_only=True)``: the same tensors, bit for bit."""

import os
import sys
import types
import zipfile
from collections import OrderedDict

import pytest
import torch

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import TensorInfo, open_source
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
            assert source.tensors[name] == TensorInfo(tensor.dtype, tuple(tensor.shape))
            assert read.dtype is tensor.dtype
            assert read.shape == tensor.shape
            assert read.is_contiguous()
            raw = raw_bytes(tensor)
            assert torch.equal(raw_bytes(read), raw)
            start, length = len(raw) // 3, len(raw) // 2
            assert source.sample(name, start, length) == raw[start : start + length].numpy().tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_every_dtype(subtests, tmp_path, format):
    shapes = [(), (1,), (0,), (0, 4), (3, 5), (2, 1, 3)]
    for dtype in DTYPES[format]:
        with subtests.test(str(dtype)):
            tensors = {str(shape): random_bits(dtype, *shape) for shape in shapes}
            torch.save(tensors, tmp_path / "x.pt", **FORMATS[format])
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


def test_views_of_one_storage(subtests, tmp_path):
    for options in FORMATS.values():
        for dtype in [torch.float32, torch.bfloat16]:
            with subtests.test(options=options, dtype=dtype):
                base = random_bits(dtype, 8, 12)
                torch.save(
                    {"base": base} | {name: view(base) for name, view in VIEWS.items()}, tmp_path / "x.pt", **options
                )
                check_same_as_torch(tmp_path / "x.pt")


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_tied_weights(tmp_path, options):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(6, 4))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "x.pt", **options)
    check_same_as_torch(tmp_path / "x.pt")


def test_training_checkpoint(subtests, tmp_path):
    """The state dict is nested beside an optimizer state and plain Python values."""
    for key in ["state_dict", "model", "module"]:
        for options in FORMATS.values():
            with subtests.test(key=key, options=options):
                model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
                more = {
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
                checkpoint = {"optimizer": OPTIMIZER, key: model.state_dict(), **more}
                torch.save(checkpoint, tmp_path / "x.pt", **options)
                check_same_as_torch(tmp_path / "x.pt", key)


def stock_state_dict(path):
    """What ComfyUI's ``load_torch_file`` takes from a checkpoint."""
    loaded = torch.load(path, weights_only=True)
    if "state_dict" in loaded:
        return loaded["state_dict"]
    only = next(iter(loaded.values())) if len(loaded) == 1 else None
    return only if isinstance(only, dict) else loaded


WEIGHTS = {"blocks.0.weight": torch.eye(8)}
EMA = {"blocks.0.weight": torch.eye(8) * 2}
OPTIMIZER = {
    "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(8, 8)}},
    "param_groups": [{"lr": 1.0, "betas": (0.9, 0.999), "params": [0], "foreach": None}],
}
# checkpoints that ComfyUI reads
STOCK = {
    "plain": WEIGHTS,
    "state_dict": {"state_dict": WEIGHTS, "optimizer": OPTIMIZER, "epoch": 3},
    "state_dict and EMA": {"ema": EMA, "state_dict": WEIGHTS, "model_ema": EMA},
    "only EMA": {"ema": EMA},
    "only averaged parameters": {"params_ema": EMA},
    "only another key": {"net": WEIGHTS},
    "state dict with a table": WEIGHTS | {"config": {"depth": 1}},
    "one tensor": {"weight": torch.eye(3)},
}
# checkpoints that ComfyUI does not read: the key that is chosen
CHOSEN = {
    "model": ({"model": WEIGHTS, "optimizer": OPTIMIZER, "rng": torch.zeros(16, dtype=torch.uint8)}, WEIGHTS),
    "module in model": ({"model": {"module": WEIGHTS}, "epoch": 3}, WEIGHTS),
    "EMA and a step": ({"ema": EMA, "step": torch.tensor(3), "optimizer": OPTIMIZER}, EMA),
    "model with an empty EMA": ({"model": WEIGHTS, "ema": None, "ema_decay": 0.99, "ema_state": {"step": 3}}, WEIGHTS),
    "EMA with a table called model": ({"ema": EMA, "model": {"depth": 1}}, EMA),
    "loss beside the model": ({"model": WEIGHTS, "loss": {"logvar": torch.zeros(2)}}, WEIGHTS),
}
REFUSED = {
    "model and EMA": {"model": WEIGHTS, "ema": EMA, "epoch": 3},
    "module and EMA": {"module": WEIGHTS, "module_ema": EMA},
    "both parameters": {"params": WEIGHTS, "params_ema": EMA},
    "two networks": {"generator": WEIGHTS, "discriminator": EMA, "epoch": 3},
}


def values(tensors) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def read_values(path) -> dict[str, list]:
    with open_source(path) as source:
        return values({name: source.read(name) for name in source.tensors})


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_state_dict_is_the_one_that_comfyui_reads(subtests, tmp_path, options):
    for kind, checkpoint in STOCK.items():
        with subtests.test(kind):
            torch.save(checkpoint, tmp_path / "x.pt", **options)
            assert read_values(tmp_path / "x.pt") == values(stock_state_dict(tmp_path / "x.pt"))


def test_state_dict_of_other_training_checkpoints(subtests, tmp_path):
    for kind, (checkpoint, expected) in CHOSEN.items():
        with subtests.test(kind):
            torch.save(checkpoint, tmp_path / "x.pt")
            assert read_values(tmp_path / "x.pt") == values(expected)


def test_several_state_dicts_are_refused_by_name(subtests, tmp_path, sentences):
    for kind, checkpoint in REFUSED.items():
        with subtests.test(kind):
            torch.save(checkpoint, tmp_path / "x.pt")
            with sentences.raises(SourceError):
                open_source(tmp_path / "x.pt")


def test_a_checkpoint_without_weights_is_refused(tmp_path, sentences):
    torch.save([1, 2], tmp_path / "list.pt")
    with sentences.raises(SourceError):
        open_source(tmp_path / "list.pt")


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_checkpoint_with_a_callback_of_lightning(tmp_path, options, monkeypatch):
    """Checkpoints of Stable Diffusion 1 have one, which ComfyUI's loader accepts; it is not imported."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    vars(module)["ModelCheckpoint"] = callback
    with monkeypatch.context() as context:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            context.setitem(sys.modules, name, module)
        checkpoint = {"callbacks": {callback: {"best": "x"}}, "state_dict": WEIGHTS}
        torch.save(checkpoint, tmp_path / "x.ckpt", **options)
    assert read_values(tmp_path / "x.ckpt") == values(WEIGHTS)
    assert module.__name__ not in sys.modules


def test_pickle_protocols_that_torch_load_rejects(subtests, tmp_path):
    for protocol in [3, 4, 5]:
        with subtests.test(protocol=protocol):
            tensors = {"a": random_bits(torch.bfloat16, 5, 3), "b": random_bits(torch.float8_e4m3fn, 7)}
            more = {"raw": bytearray(b"more"), "set": frozenset("ab")}
            torch.save(tensors | more, tmp_path / "x.pt", pickle_protocol=protocol)
            with open_source(tmp_path / "x.pt") as source:
                assert source.tensors.keys() == tensors.keys()
                assert all(
                    torch.equal(raw_bytes(source.read(name)), raw_bytes(tensor)) for name, tensor in tensors.items()
                )


def test_ordered_dict_of_python_2(tmp_path):
    """Python 2 pickles an OrderedDict as a call with a list of pairs."""

    class Python2Dict(OrderedDict):
        def __reduce__(self):
            return OrderedDict, ([list(pair) for pair in self.items()],)

    tensors = Python2Dict(a=random_bits(torch.float32, 4, 3), b=random_bits(torch.int64, 2))
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    check_same_as_torch(tmp_path / "x.pt")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("was-here",)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_a_pickle_is_never_run(tmp_path, monkeypatch, sentences, options):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "evil.pt", **options)
    with sentences.raises(SourceError):
        open_source(tmp_path / "evil.pt")
    assert not (tmp_path / "was-here").exists()


def test_a_damaged_pickle_is_refused(subtests, tmp_path):
    for content in [b"PK\x03\x04 no zip", b"\x80\x02 no pickle", b"\x80\x02"]:
        with subtests.test(content=content):
            (tmp_path / "bad.pt").write_bytes(content)
            with pytest.raises(SourceError):
                open_source(tmp_path / "bad.pt")


def test_truncated_checkpoints_are_refused(subtests, tmp_path):
    for kind, options in FORMATS.items():
        with subtests.test(kind):
            torch.save({"a.weight": torch.zeros(64, 64)}, tmp_path / "x.pt", **options)
            whole = (tmp_path / "x.pt").read_bytes()
            for end in range(2, len(whole), len(whole) // 12):
                with subtests.test(end=end):
                    (tmp_path / "x.pt").write_bytes(whole[:end])
                    with pytest.raises(SourceError):
                        open_source(tmp_path / "x.pt")


def rewrite(path, change) -> None:
    """Write the archive again; ``change(name, content)`` → content, or None to leave the file out."""
    with zipfile.ZipFile(path) as archive:
        files = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if content is not None:
                archive.writestr(name, content)


CHANGES = {
    "big-endian": lambda name, content: b"big" if name.endswith("byteorder") else content,
    "a storage is missing": lambda name, content: None if name.endswith("/data/0") else content,
    "a short storage": lambda name, content: content[:-4] if name.endswith("/data/0") else content,
}


def test_damaged_archives_are_refused(subtests, tmp_path, sentences):
    for kind, change in CHANGES.items():
        with subtests.test(kind):
            torch.save({"a.weight": torch.zeros(8, 8)}, tmp_path / "x.pt")
            rewrite(tmp_path / "x.pt", change)
            with sentences.raises(SourceError):
                open_source(tmp_path / "x.pt")


def test_compressed_archives_are_refused(tmp_path, sentences):
    torch.save({"a.weight": torch.zeros(8, 8)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with sentences.raises(SourceError):
        open_source(tmp_path / "x.pt")
