"""GPU memory that another model occupies."""

import pytest

from learned_rounding.tests.nodes.probing import in_process


@pytest.mark.gpu
def test_run_frees_the_memory_of_another_model(host, tmp_path, tried):
    found = in_process(host, tmp_path, "memory_squeezed")
    assert found["same"] and found["came back"]
    assert found["gave way"] > 0 and not found["warned"], found
    assert found["stayed without"] and found["warned without"], found  # the run needs the memory of the other model
    tried("the GPU full with another model", 1, "that one gives way and comes back, same bytes")
