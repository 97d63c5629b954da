"""State dicts as sources."""

import torch

from learned_rounding.quant_core.sources import SafetensorsFile, TensorInfo, TensorSource


def test_tensors_are_described_in_their_order(model):
    tensors = model()
    described = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert list(TensorSource(tensors).tensors.items()) == list(described.items())


def test_tensors_are_not_copied(model):
    tensors = model()
    source = TensorSource(tensors)
    assert all(source.read(name) is tensor for name, tensor in tensors.items())


def test_metadata_is_a_copy():
    metadata = {"a": "b"}
    source = TensorSource({}, metadata)
    metadata.clear()
    assert source.metadata == {"a": "b"}


def test_a_source_without_metadata_has_none():
    assert TensorSource({}).metadata == {}


def test_the_name_is_that_of_a_state_dict_by_default():
    assert TensorSource({}).name == "state dict"
    assert TensorSource({}, name="unet").name == "unet"


def test_samples_are_those_of_its_file(subtests, model, model_file):
    tensors = model()
    with SafetensorsFile(model_file(tensors=tensors)) as file:
        for name, info in file.tensors.items():
            with subtests.test(name):
                half = info.nbytes // 2
                source = TensorSource(tensors)
                assert source.sample(name, 0, info.nbytes) == file.sample(name, 0, info.nbytes)
                assert source.sample(name, half, info.nbytes - half) == file.sample(name, half, info.nbytes - half)


def test_samples_are_those_of_the_contiguous_tensor(subtests):
    for view in [lambda tensor: tensor.t(), lambda tensor: torch.nn.Parameter(tensor.t())]:
        with subtests.test(view=view):
            tensor = view(torch.arange(12.0).view(3, 4))
            assert TensorSource({"a": tensor}).sample("a", 4, 8) == tensor.detach().contiguous().numpy().tobytes()[4:12]
