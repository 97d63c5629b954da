"""A server that dies in the middle of Learned Round Quantize: the next one goes on with what was finished."""

import os
import signal

import pytest

from learned_rounding.hosts import HostError
from learned_rounding.quant_core.checkpoints import verify_file
from learned_rounding.tests.conftest import LINKS
from learned_rounding.tests.nodes.probing import ProbedGraph, in_process

LAYERS = 10  # that are finished when the server is told to end


@pytest.mark.parametrize("kind", ["file", "model"])
def test_the_next_server_goes_on_where_the_last_one_died(host, tmp_path, tried, kind):
    assert in_process(host, tmp_path, f"resume_die_{kind}") == [".journal", ".partial"]
    found = in_process(host, tmp_path, f"resume_run_again_{kind}")
    assert 0 < found["made"] <= found["all"] - 18  # what was being written when it died may be lost
    assert found["same"] and found["told"]
    assert found["left"] == [".safetensors"]  # the last result, which connecting another output would need
    tried("server killed while a node quantizes, then the same run in the next server", 1, "goes on, same bytes")


def quantize(server, seed: int, on_event=None) -> tuple[int, bytes]:
    """How many layers were made, and the saved file."""
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], rounding="nearest", seed=seed), f"seed{seed}")
    server.post("/probe/gate", {"layers": LAYERS if on_event else None})
    server.queue(graph, on_event=on_event)
    made = server.post("/probe/gate", {"layers": None})["made"]
    saved = max(server.output_dir.rglob(f"seed{seed}_*.safetensors"))
    assert not verify_file(saved).problems
    return made, saved.read_bytes()


def test_a_server_that_is_told_to_end_in_the_middle_goes_on_when_it_is_started_again(server_factory, tiny_base, tried):
    server = server_factory(base=tiny_base, links=LINKS)
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    gone_on = {}
    for how in signals:

        def end(event, how=how):
            if event.type == "learned_rounding.progress" and event.data["state"] == "layer" and event.data["index"] == LAYERS - 1:
                os.kill(server.pid, how)

        with pytest.raises(HostError):
            quantize(server, how, on_event=end)
        assert not list(server.output_dir.rglob(f"seed{how}_*"))
        server.restart()
        gone_on[how] = quantize(server, how)
    server.restart()
    for how in signals:
        (some, resumed), (every, undisturbed) = gone_on[how], quantize(server, how)
        assert some <= every - LAYERS + 2  # what was being written when it died may be lost
        assert resumed == undisturbed
        tried(f"a running server gets {how.name} while a node quantizes, and is started again", 1, "goes on, same bytes")
