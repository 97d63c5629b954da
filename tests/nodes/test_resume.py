"""A server that dies in the middle of Learned Round Quantize: the next one goes on with what was finished."""

import pytest

from learned_rounding.tests.nodes.probing import in_process


@pytest.mark.parametrize("kind", ["file", "model"])
def test_the_next_server_goes_on_where_the_last_one_died(host, tmp_path, tried, kind):
    assert in_process(host, tmp_path, f"resume_die_{kind}") == [".journal", ".partial"]
    found = in_process(host, tmp_path, f"resume_run_again_{kind}")
    assert 0 < found["made"] <= found["all"] - 18  # what was being written when it died may be lost
    assert found["same"] and found["told"]
    assert found["left"] == [".safetensors"]  # the last result, which connecting another output would need
    tried("server killed while a node quantizes, then the same run in the next server", 1, "goes on, same bytes")
