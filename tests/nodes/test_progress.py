"""Messages to pages, and the identity of runs and sources."""

import pytest

from learned_rounding.hosts import HostError, HostInterrupted
from learned_rounding.quant_core.output import verify_file
from learned_rounding.tests.nodes.probing import ProbedGraph, in_process, progress, saved_path, unique


def test_error_messages_to_pages_contain_no_folders(host, tmp_path):
    found = in_process(host, tmp_path, "progress_stopped")
    assert found["sent"] == found["wanted"]
    assert found["kept"] == found["wanted"][-1:]  # stored: the latest run of the node


def test_two_executions_in_one_prompt_are_one_run(host, tmp_path):
    assert in_process(host, tmp_path, "progress_twice") == {
        "sent": [0, 1, 2, 3, 0, 1],
        "kept": [["third", 0], ["third", 1]],
        "empty": [],
    }


def test_blocks_and_their_steps_are_sent_to_pages(host, tmp_path):
    found = in_process(host, tmp_path, "progress_blocks")
    block = {"state": "block", "index": 2, "total": 57, "name": "double_blocks.2"}
    assert [{key: message[key] for key in block} for message in found] == [block] * 3
    assert (found[1]["step"], found[1]["done"], found[1]["total_steps"]) == ("rounding", 1, 5)
    assert (found[2]["kept"], found[2]["error"], found[2]["calibrated_error"]) == ("sequential", 0.25, 0.5)


def test_the_report_of_a_clip_keeps_the_summary_of_every_encoder(host, tmp_path):
    found = in_process(host, tmp_path, "progress_parts")
    assert (found["errors"], found["resumed"]) == ([0.01, 0.02], 7)
    assert [line.split()[:5] for line in found["lines"]] == [
        ["model", "output,", "clip_l", "error", "0.01"],
        ["model", "output,", "t5xxl", "error", "0.02"],
    ]


def test_a_node_that_uses_an_earlier_result_has_the_messages_of_its_run(host, tmp_path):
    found = in_process(host, tmp_path, "progress_reused")
    assert found == {"nodes": [["3"], ["7"]], "same": True, "ids": ["1/3", "2/7"]}


def test_changed_shard_changes_the_source(host, tmp_path):
    found = in_process(host, tmp_path, "progress_shards")
    assert found["same"] and found["state changed"] and found["result changed"]
    assert found["without a shard"] == 4  # the index and the other shard; the missing one is reported when it is opened


def test_progress_reports_the_gain_of_learned_rounding(comfy, request):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], rounding="principal", seed=1005), unique(request))
    events = progress(comfy.queue(graph))
    layers = [event for event in events if event["state"] == "layer"]
    assert {event["solver"] for event in layers} <= {"gptq", "nearest"} and layers[0]["output_error"] is None
    assert all(event["gain"] <= 1 for event in layers)
    assert sum(events[-1]["solvers"].values()) == len(layers) and 0 < events[-1]["median_gain"] < 0.8
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
    assert payloads[0]["state"] == "start" and payloads[-1]["state"] == "done"
    assert [payload["seq"] for payload in payloads] == list(range(len(payloads)))
    assert {payload["prompt"] for payload in payloads} == {result.prompt_id}
    layers = [event for event in events if event.data["state"] == "layer"]
    assert [event.data["index"] for event in layers] == list(range(payloads[0]["total"]))
    assert len({event.data["name"] for event in layers}) == len(layers) == payloads[-1]["layers"]
    for payload in (event.data for event in layers):
        assert (
            0 < payload["error"] < 0.05
            and payload["seconds"] > 0
            and payload["eta"] >= 0
            and payload["total"] == len(layers)
        )
    bar = [event.data for event in result.of("progress") if event.data.get("node") == quantized.id]
    assert bar[-1]["value"] == bar[-1]["max"] == len(layers)


def test_missed_messages_are_requested_by_workflow(comfy, sentences):
    with sentences.raises(HostError) as error:
        comfy.get("/learned_rounding/progress")
    assert error.value.kind == "http" and "400" in str(error.value)
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
    assert last.data["state"] == "stopped" and last.data["reason"] == "interrupted"
    assert len(seen) < seen[0].data["total"] / 2
    assert not list((comfy.output_dir / "diffusion_models").glob(f"{name}*"))
    assert not {path for path in set((comfy.base / "temp").glob("*")) - before if "learned_rounding" in path.name}
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], seed=1004), name)
    assert verify_file(saved_path(comfy.queue(graph), saved)).layers > 30
