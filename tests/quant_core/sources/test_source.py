"""State dicts as sources, and fingerprints."""

import pytest
import torch

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, TensorSource, open_source
from learned_rounding.quant_core.sources.source import fingerprint


def test_a_state_dict_is_a_source(model):
    tensors = model()
    source = TensorSource(tensors, {"a": "b"})
    assert list(source.tensors) == list(tensors) and source.metadata == {"a": "b"}
    assert all(
        source.tensors[name] == TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    )
    assert all(source.read(name) is tensor for name, tensor in tensors.items())


def test_samples_of_a_state_dict_are_those_of_its_file(model, model_file):
    tensors = model()
    with SafetensorsFile(model_file(tensors=tensors)) as file:
        for name, info in file.tensors.items():
            for offset, length in ((0, info.nbytes), (info.nbytes // 2, info.nbytes - info.nbytes // 2)):
                assert TensorSource(tensors).sample(name, offset, length) == file.sample(name, offset, length)


def test_fingerprints_repeat(model, model_file):
    with SafetensorsFile(model_file()) as one, SafetensorsFile(model_file("copy.safetensors")) as two:
        assert fingerprint(one, "a") == fingerprint(two, "a")
    assert fingerprint(TensorSource(model())) == fingerprint(TensorSource(model()))


CHANGES = {
    "a value": lambda tensors: tensors["a"].view(-1)[-1].add_(1),
    "the first value": lambda tensors: tensors["a"].view(-1)[0].add_(1),
    "a small tensor": lambda tensors: tensors["step"].add_(1),
    "a name": lambda tensors: tensors.update(c=tensors.pop("b")),
    "a shape": lambda tensors: tensors.update(b=tensors["b"].view(2, 8)),
    "a dtype": lambda tensors: tensors.update(b=tensors["b"].view(torch.int32)),
    "one more tensor": lambda tensors: tensors.update(z=torch.zeros(0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fingerprints_change_with_the_tensors(change):
    def tensors():
        return {"a": torch.ones(100, 300), "b": torch.ones(16), "step": torch.tensor(1)}

    changed = tensors()
    change(changed)
    assert fingerprint(TensorSource(changed)) != fingerprint(TensorSource(tensors()))


def test_fingerprints_change_with_metadata_and_extra_strings():
    tensors = {"a": torch.ones(4)}
    sources = [TensorSource(tensors), TensorSource(tensors, {"a": "b"}), TensorSource(tensors, {"a": "c"})]
    marks = [fingerprint(source, *extra) for source in sources for extra in ((), ("ab", "c"), ("a", "bc"))]
    assert len(set(marks)) == len(marks)


def test_fingerprint_distinguishes_fine_tune_from_base():
    """A fine-tune differs slightly in all values; the fingerprint covers sixteen pages of each tensor."""
    base = torch.randn(600, 700, generator=torch.Generator().manual_seed(0))
    assert fingerprint(TensorSource({"a": base})) != fingerprint(TensorSource({"a": base * 1.001}))


def test_errors_name_the_file_and_the_tensor(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"text")
    for name in ("x.safetensors", "missing.safetensors"):
        with pytest.raises(SourceError) as caught:
            SafetensorsFile(tmp_path / name)
        assert caught.value.file == str(tmp_path / name) and caught.value.tensor is None
    torch.save({"a": torch.eye(4).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(SourceError) as caught:
        open_source(tmp_path / "x.pt")
    assert (caught.value.file, caught.value.tensor) == (str(tmp_path / "x.pt"), "a")
