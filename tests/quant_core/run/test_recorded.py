"""Checksums of the tensors of a source show that it is changed in place."""

import pytest
import torch

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.run.recorded import RecordedSource
from learned_rounding.quant_core.sources import TensorSource
from learned_rounding.quant_core.sources.checksum import tensor_checksum
from learned_rounding.quant_core.sources.source import CPU


def test_a_source_that_gives_other_bytes_when_it_is_read_again_is_refused(sentences):
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10)}
    source = RecordedSource(TensorSource(tensors))
    source.read("a"), source.read("b")
    source.check_unchanged(lambda: None)
    tensors["b"] += 1
    assert source.read("a").sum() == 0
    with sentences.raises(SourceError, repeated=True):
        source.read("b")
    with sentences.raises(SourceError, repeated=True):
        source.check_unchanged(lambda: None)


def test_checksum_is_that_of_the_tensor_and_reads_it_only_once(monkeypatch):
    tensors, read = {"a": torch.arange(10.0)}, []
    inner = TensorSource(tensors)
    monkeypatch.setattr(inner, "read", lambda name, device, real=inner.read: read.append(name) or real(name, device))
    source = RecordedSource(inner)
    assert source.checksum("a", CPU) == tensor_checksum(tensors["a"])
    assert source.checksum("a", CPU) == tensor_checksum(tensors["a"])
    assert read == ["a"]


def test_check_can_be_cancelled_before_each_tensor():
    source = RecordedSource(TensorSource({"a": torch.zeros(10), "b": torch.zeros(10)}))
    for name in ("a", "b"):
        source.read(name)
    checks = iter([None, StopIteration])
    with pytest.raises(StopIteration):
        source.check_unchanged(lambda: next(checks) and next(checks))


def test_other_attributes_are_those_of_the_source():
    inner = TensorSource({"a": torch.zeros(1)}, {"author": "me"}, name="model")
    inner.paths = ("model.safetensors",)
    source = RecordedSource(inner)
    assert source.name == "model"
    assert source.tensors == inner.tensors
    assert source.metadata == {"author": "me"}
    assert source.paths == ("model.safetensors",)
