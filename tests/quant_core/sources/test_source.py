"""Fingerprints of sources, and what errors name."""

import pytest
import torch

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, TensorSource, open_source
from learned_rounding.quant_core.sources.renaming import Assembly, RenamedSource
from learned_rounding.quant_core.sources.source import fingerprint


def test_bytes_of_a_tensor():
    assert TensorInfo(torch.bfloat16, (3, 5)).nbytes == 30


def test_bytes_of_a_scalar():
    assert TensorInfo(torch.float32, ()).nbytes == 4


def test_fingerprints_of_equal_files_are_equal(model_file):
    with SafetensorsFile(model_file()) as one, SafetensorsFile(model_file("copy.safetensors")) as two:
        assert fingerprint(one, "a") == fingerprint(two, "a")


def test_fingerprints_of_equal_state_dicts_are_equal(model):
    assert fingerprint(TensorSource(model())) == fingerprint(TensorSource(model()))


def test_a_source_that_cannot_be_sampled_has_no_fingerprint(header_source):
    assert fingerprint(header_source({"a": (4, 4)})) is None


CHANGES = {
    "a value": lambda tensors: tensors["a"].view(-1)[-1].add_(1),
    "the first value": lambda tensors: tensors["a"].view(-1)[0].add_(1),
    "a small tensor": lambda tensors: tensors["step"].add_(1),
    "a name": lambda tensors: tensors.update(c=tensors.pop("b")),
    "a shape": lambda tensors: tensors.update(b=tensors["b"].view(2, 8)),
    "a dtype": lambda tensors: tensors.update(b=tensors["b"].view(torch.int32)),
    "one more tensor": lambda tensors: tensors.update(z=torch.zeros(0)),
}


def test_fingerprints_change_with_the_tensors(subtests):
    def tensors():
        return {"a": torch.ones(100, 300), "b": torch.ones(16), "step": torch.tensor(1)}

    before = fingerprint(TensorSource(tensors()))
    for what, change in CHANGES.items():
        with subtests.test(what):
            changed = tensors()
            change(changed)
            assert fingerprint(TensorSource(changed)) != before


def test_fingerprints_change_with_metadata_and_extra_strings():
    tensors = {"a": torch.ones(4)}
    sources = [TensorSource(tensors), TensorSource(tensors, {"a": "b"}), TensorSource(tensors, {"a": "c"})]
    marks = [fingerprint(source, *extra) for source in sources for extra in ((), ("ab", "c"), ("a", "bc"))]
    assert len(set(marks)) == len(marks)


def test_fingerprint_distinguishes_fine_tune_from_base():
    """A fine-tune differs slightly in all values; the fingerprint covers sixteen pages of each tensor."""
    base = torch.randn(600, 700, generator=torch.Generator().manual_seed(0))
    assert fingerprint(TensorSource({"a": base})) != fingerprint(TensorSource({"a": base * 1.001}))


def test_fingerprint_of_a_derived_source_is_that_of_its_origin_marked():
    origin = TensorSource({"a": torch.ones(4)})
    renamed = RenamedSource(origin, {"b": Assembly(("a",))})
    assert fingerprint(renamed) == fingerprint(origin, "decoded")
    assert fingerprint(renamed) != fingerprint(origin)


def test_errors_name_the_file(subtests, tmp_path):
    for name in ["x.safetensors", "missing.safetensors"]:
        with subtests.test(name=name):
            (tmp_path / "x.safetensors").write_bytes(b"text")
            with pytest.raises(SourceError) as caught:
                SafetensorsFile(tmp_path / name)
            assert caught.value.file == str(tmp_path / name)
            assert caught.value.tensor is None


def test_errors_name_the_tensor(tmp_path):
    torch.save({"a": torch.eye(4).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(SourceError) as caught:
        open_source(tmp_path / "x.pt")
    assert caught.value.file == str(tmp_path / "x.pt")
    assert caught.value.tensor == "a"
