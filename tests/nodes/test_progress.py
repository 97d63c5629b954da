"""Progress of Learned Round Quantize in a workflow, as clients of the server get it."""

import pytest

from learned_rounding.hosts import HostError, HostInterrupted
from learned_rounding.quant_core.output import verify_file
from learned_rounding.tests.nodes.probing import ProbedGraph, progress, saved_path, unique


def test_progress_reports_the_gain_of_learned_rounding(comfy, request):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], rounding="principal", seed=1005), unique(request))
    events = progress(comfy.queue(graph))
    layers = [event for event in events if event["state"] == "layer"]
    assert {event["solver"] for event in layers} <= {"gptq", "nearest"}
    assert layers[0]["output_error"] is None
    assert all(event["gain"] <= 1 for event in layers)
    assert sum(events[-1]["solvers"].values()) == len(layers)
    assert 0 < events[-1]["median_gain"] < 0.8
    assert events[-1]["median_output_error"] is None


def test_client_receives_progress_layer_by_layer(comfy, request):
    """No layer starts before the client has the message of the previous one."""
    graph = ProbedGraph()
    quantized = graph.quantize(graph.source()[0], seed=1003)
    graph.save(quantized, unique(request))

    def let_on(event):
        if event.type == "learned_rounding.progress" and event.data["state"] == "layer":
            comfy.post("/probe/gate", {"layers": 1})

    comfy.post("/probe/gate", {"layers": 1})
    try:
        result = comfy.queue(graph, on_event=let_on)
    finally:
        comfy.post("/probe/gate", {"layers": None})
    events = result.of("learned_rounding.progress")
    payloads = [event.data for event in events]
    assert {payload["node"] for payload in payloads} == {quantized.id}
    assert payloads[0]["state"] == "start"
    assert payloads[-1]["state"] == "done"
    assert [payload["seq"] for payload in payloads] == list(range(len(payloads)))
    assert {payload["prompt"] for payload in payloads} == {result.prompt_id}
    layers = [event for event in events if event.data["state"] == "layer"]
    assert [event.data["index"] for event in layers] == list(range(payloads[0]["total"]))
    assert len({event.data["name"] for event in layers}) == len(layers) == payloads[-1]["layers"]
    for payload in (event.data for event in layers):
        assert 0 < payload["error"] < 0.05
        assert payload["seconds"] > 0
        assert payload["eta"] >= 0
        assert payload["total"] == len(layers)
    bar = [event.data for event in result.of("progress") if event.data.get("node") == quantized.id]
    assert bar[-1]["value"] == bar[-1]["max"] == len(layers)


def test_missed_messages_are_requested_by_workflow(comfy, sentences):
    with sentences.raises(HostError) as error:
        comfy.get("/learned_rounding/progress")
    assert error.value.kind == "http"
    assert "400" in str(error.value)
    assert comfy.get("/learned_rounding/progress?workflow=unknown") == []


def test_interrupt_stops_a_run_and_removes_its_files(comfy, request, slow_source):
    before = set((comfy.base / "temp").glob("*")) if (comfy.base / "temp").exists() else set()
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source(slow_source)[0], seed=1004, general=True), name := unique(request))
    seen = []

    def stop(event):
        if event.type == "learned_rounding.progress" and event.data["state"] == "layer":
            seen.append(event)
            if len(seen) == 1:
                comfy.interrupt()

    with pytest.raises(HostInterrupted) as stopped:
        comfy.queue(graph, on_event=stop)
    last = [event for event in stopped.value.events if event.type == "learned_rounding.progress"][-1]
    assert last.data["state"] == "stopped"
    assert last.data["reason"] == "interrupted"
    assert len(seen) < seen[0].data["total"] / 2
    assert not list((comfy.output_dir / "diffusion_models").glob(f"{name}*"))
    assert not {path for path in set((comfy.base / "temp").glob("*")) - before if "learned_rounding" in path.name}
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], seed=1004), name)
    assert verify_file(saved_path(comfy.queue(graph), saved)).layers > 30
