"""Tensors renamed, joined along their rows, and reordered when they are read."""

import pytest
import torch

from learned_rounding.quant_core.errors import SourceError
from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, TensorSource
from learned_rounding.quant_core.sources.renaming import Assembly, RenamedSource

Q, K = torch.arange(12.0).view(3, 4), torch.arange(12.0, 20.0).view(2, 4)


@pytest.fixture
def origin():
    return TensorSource({"q": Q, "k": K, "wide": torch.ones(2, 5), "half": K.half(), "one": torch.ones(())}, {"a": "b"})


def test_a_tensor_has_its_new_name(origin):
    assert torch.equal(RenamedSource(origin, {"new": Assembly(("q",))}).read("new"), Q)


def test_tensors_are_joined_along_their_rows(origin):
    assert torch.equal(RenamedSource(origin, {"qk": Assembly(("q", "k"))}).read("qk"), torch.cat((Q, K)))


def test_a_joined_tensor_is_described(origin):
    renamed = RenamedSource(origin, {"qk": Assembly(("q", "k"))})
    assert renamed.tensors == {"qk": TensorInfo(torch.float32, (5, 4))}


def test_rows_are_reordered_after_joining(origin):
    renamed = RenamedSource(origin, {"qk": Assembly(("q", "k"), lambda tensor: tensor.flip(0))})
    assert torch.equal(renamed.read("qk"), torch.cat((Q, K)).flip(0))


def test_tensors_without_a_new_name_are_left_out(origin):
    assert RenamedSource(origin, {"new": Assembly(("q",))}).tensors.keys() == {"new"}


def test_dimensions_that_a_gguf_file_lacks_come_back():
    """Known by the new name."""
    source = TensorSource({"blocks.0.table": torch.arange(24.0).view(6, 4)})
    renamed = RenamedSource(source, {"blocks.0.modulation": Assembly(("blocks.0.table",))})
    assert renamed.tensors["blocks.0.modulation"].shape == (1, 6, 4)
    assert renamed.read("blocks.0.modulation").shape == (1, 6, 4)


def test_tensors_that_do_not_fit_together_are_refused(subtests, origin, sentences):
    for other in ["wide", "half", "one"]:
        with subtests.test(other=other), sentences.raises(SourceError):
            RenamedSource(origin, {"both": Assembly(("q", other))})


def test_scalars_do_not_fit_together(origin, sentences):
    with sentences.raises(SourceError):
        RenamedSource(origin, {"both": Assembly(("one", "one"))})


def test_metadata_is_that_of_the_file(origin):
    assert RenamedSource(origin, {}).metadata == {"a": "b"}


def test_files_are_those_of_the_file(model_file):
    path = model_file()
    with RenamedSource(SafetensorsFile(path), {"new": Assembly(("step",))}) as renamed:
        assert renamed.paths == (path,)
        assert renamed.name == path.name


def test_its_file_is_closed_with_it(model_file):
    with RenamedSource(SafetensorsFile(model_file()), {"new": Assembly(("step",))}) as renamed:
        pass
    with pytest.raises(SourceError, match="was closed"):
        renamed.read("new")
