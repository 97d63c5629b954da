"""Weights of a MODEL are read from the file that ComfyUI loaded where they are its bytes, else from memory."""

import pytest

from learned_rounding.tests.nodes.probing import in_process


def test_weights_are_read_from_the_file_only_where_they_are_its_bytes(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "slices_readers")
    assert found.pop("memory")
    if host.version == "0.3.75":  # which does not keep the place of a weight in its file
        assert not found
        return
    sentences(found.pop("truncated"))
    assert found == {
        "file": True,
        "replaced": True,
        "read from memory": ["part", "transposed", "first rows", "changed"],
    }


@pytest.mark.gpu
def test_weights_arrive_on_the_gpu_unchanged(host, tmp_path):
    found = in_process(host, tmp_path, "slices_gpu")
    assert all(found.values()) and {"memory", "large", "transposed", "pinned", "GPU"} <= found.keys(), found
