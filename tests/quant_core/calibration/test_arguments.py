"""Arguments of a call as JSON values and tensors, and back."""

import json
import uuid

import pytest
import torch

from learned_rounding.quant_core.calibration.arguments import ArgumentEncoder, decode_arguments, find_live_object

CPU, META = torch.device("cpu"), torch.device("meta")
PLAIN = {
    "none": None,
    "bool": True,
    "int": 3,
    "float": 0.5,
    "str": "text",
    "bytes": b"\x00\xff",
    "dtype": torch.float16,
    "size": torch.Size([2, 3]),
    "uuid": uuid.UUID(int=7),
    "list": [1, [2, "a"]],
    "tuple": (1, (2.5, None)),
    "dict": {"a": 1, 2: [3], ("double_block", 3): {"b": ()}, None: 4},
}


def no_live(path):
    pytest.fail(f"{path} is not stored")


def test_plain_values_come_back_from_json(subtests):
    for kind, value in PLAIN.items():
        with subtests.test(kind):
            node = json.loads(json.dumps(ArgumentEncoder().encode(value)))
            found = decode_arguments(node, (), CPU, no_live)
            assert found == value
            assert type(found) is type(value)


def test_containers_come_back_as_new_ones():
    value = [{"a": []}]
    found = decode_arguments(ArgumentEncoder().encode(value), (), CPU, no_live)
    assert found is not value
    assert found[0]["a"] is not value[0]["a"]


def test_a_tensor_is_collected_once_and_comes_back_as_the_same_object():
    encoder, tensor, other = ArgumentEncoder(), torch.ones(2), torch.ones(2)
    node = encoder.encode({"a": tensor, "b": [tensor, other]})
    assert [id(found) for found in encoder.tensors] == [id(tensor), id(other)]
    found = decode_arguments(node, encoder.tensors, CPU, no_live)
    assert found["a"] is tensor
    assert found["b"][0] is tensor
    assert found["b"][1] is other


class Patch:
    """An object of a host."""


def test_other_objects_are_not_stored(subtests):
    endless = []
    endless.append(endless)
    cases = {
        "callable": print,
        "object": Patch(),
        "subclass of a dict": type("Options", (dict,), {})(a=1),
        "dict with an object as key": {Patch(): 1},
        "meta tensor": torch.ones(2, device="meta"),
        "sparse tensor": torch.eye(2).to_sparse(),
    }
    for kind, value in cases.items():
        with subtests.test(kind):
            assert ArgumentEncoder().encode(value) == ["live"]
    assert "live" in json.dumps(ArgumentEncoder().encode(endless))


def test_objects_that_are_not_stored_are_looked_up_by_their_path():
    node = ArgumentEncoder().encode({"patches": {"attn1": [print, 3]}})
    asked = []
    found = decode_arguments(node, (), CPU, lambda path: asked.append(path) or len)
    assert asked == [("patches", "attn1", 0)]
    assert found == {"patches": {"attn1": [len, 3]}}


def test_ignored_entries_are_left_out():
    encoder = ArgumentEncoder(ignored=[("options", "callbacks")])
    found = decode_arguments(encoder.encode({"options": {"callbacks": 1, "a": 2}, "callbacks": 3}), (), CPU, no_live)
    assert found == {"options": {"a": 2}, "callbacks": 3}


def test_device_of_the_model_is_that_of_the_replay():
    node = ArgumentEncoder().encode([torch.device("cpu")])
    assert decode_arguments(node, (), META, no_live) == [META]


def test_cpu_remains_where_the_tensors_of_the_call_were_on_another_device():
    encoder = ArgumentEncoder()
    encoder.tensors.append(torch.ones(1, device="meta"))
    assert encoder.on_host(CPU)
    assert not encoder.on_host(META)
    assert decode_arguments(encoder.encode(CPU), (), META, no_live) == CPU


def test_nodes_that_are_not_valid_are_errors(subtests):
    invalid = [
        ["eval", "1"],
        [],
        ["dict", [["live"], 1]],
        ["dict", [["list"], 1]],
        ["tensor", 5],
        ["tensor", -1],
        ["dtype", "x"],
        ["bytes", "x"],
        ["uuid", 3],
    ]
    for node in invalid:
        with subtests.test(node=node), pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
            decode_arguments(node, [], CPU, no_live)


def test_live_objects_are_found_in_nested_containers():
    live = {"options": {"patches": [print, (len,)]}}
    assert find_live_object(live, ("options", "patches", 1, 0)) is len
    assert find_live_object(live, ()) is live


def test_live_objects_that_are_gone_are_an_error(subtests):
    live = {"options": {"patches": [print], "text": "abc"}}
    for path in (("other",), ("options", "patches", 3), ("options", "patches", 0, "a"), ("options", "text", 0)):
        with subtests.test(path=path), pytest.raises(LookupError):
            find_live_object(live, path)
