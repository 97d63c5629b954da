"""A ComfyUI server starts, runs a stock workflow, reports failures, stops and restarts."""

import socket

import pytest
from PIL import Image

from learned_rounding.hosts import HostError, HostInterrupted
from learned_rounding.hosts.server import _reserve_port


def test_server_reports_its_version_and_stock_nodes(comfy, host):
    assert comfy.get("/system_stats")["system"]["comfyui_version"] == host.version
    assert {"KSampler", "SaveImage", "UNETLoader"} <= set(comfy.object_info())
    assert list(comfy.object_info("KSampler")) == ["KSampler"]


def test_queue_records_events_in_order(comfy, image_workflow):
    received = []
    result = comfy.queue(image_workflow(color=0x0000FF), on_event=received.append)
    assert received == result.events
    assert result.executed == ["1", "2", "3"]
    kinds = [event.type for event in result.events]
    assert kinds.index("execution_start") < kinds.index("executing") < kinds.index("execution_success")
    times = [event.at for event in result.events]
    assert times == sorted(times)
    assert times[0] >= 0
    assert result.seconds == times[-1]
    (path,) = result.images
    assert path.parent == comfy.output_dir
    with Image.open(path) as image:
        assert image.size == (64, 32)
        assert image.convert("RGB").getpixel((5, 5)) == (255, 255, 0)


def test_repeated_workflow_is_served_from_the_cache(comfy, image_workflow):
    workflow = image_workflow()
    comfy.queue(workflow)
    again = comfy.queue(workflow)
    assert again.executed == []
    assert again.outputs["3"]["images"]


def test_error_of_a_failed_node_has_its_details(comfy, image_workflow):
    workflow = image_workflow()
    workflow["2"] = {"class_type": "LoadLatent", "inputs": {"latent": "not-a-latent.latent"}}
    workflow["3"] = {"class_type": "SaveLatent", "inputs": {"samples": ["2", 0], "filename_prefix": "latent"}}
    (comfy.input_dir / "not-a-latent.latent").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(HostError, match=r"node 2 \(LoadLatent\): .*[Hh]eader") as caught:
        comfy.queue(workflow)
    error = caught.value
    assert error.kind == "execution"
    assert error.node_id == "2"
    assert error.node_type == "LoadLatent"
    assert "load" in error.traceback
    assert [e.type for e in error.events if e.type == "execution_error"]


def test_validation_error_names_the_input(comfy, image_workflow):
    workflow = image_workflow()
    workflow["1"]["inputs"]["width"] = -5
    with pytest.raises(HostError, match=r"node 1 \(EmptyImage\): .*width") as caught:
        comfy.queue(workflow)
    assert caught.value.kind == "validation"
    assert list(caught.value.node_errors) == ["1"]


def test_unknown_node_class_is_rejected(comfy):
    with pytest.raises(HostError, match="NoSuchNode"):
        comfy.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})


SLOW_NODE = """
import comfy.model_management as management, time

class Wait:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "run", (), True
    INPUT_TYPES = classmethod(lambda cls: {"required": {"nonce": ("INT", {"default": 0, "max": 2**31})}})

    def run(self, nonce):
        for _ in range(6000):
            management.throw_exception_if_processing_interrupted()
            time.sleep(0.01)
        return ()

NODE_CLASS_MAPPINGS = {"TestWait": Wait}
"""


@pytest.fixture
def own_server(server_factory, tmp_path):
    """Server whose only node pack is SLOW_NODE."""
    (tmp_path / "__init__.py").write_text(SLOW_NODE)
    return server_factory(links={"slow": tmp_path})


def wait(nonce):
    return {"1": {"class_type": "TestWait", "inputs": {"nonce": nonce}}}


def test_interrupt_timeout_crash_and_restart(own_server, image_workflow):
    def interrupt(event):
        if event.type == "executing" and event.data["node"] == "1":
            own_server.interrupt()

    with pytest.raises(HostInterrupted, match="TestWait"):
        own_server.queue(wait(1), on_event=interrupt)

    with pytest.raises(HostError) as caught:
        own_server.queue(wait(2), timeout=1)
    assert caught.value.kind == "timeout"
    assert own_server.queue(image_workflow()).images  # the interrupted workflow does not block the queue

    def kill(event):
        if event.type == "executing" and event.data["node"] == "1":
            own_server._process.kill()

    with pytest.raises(HostError) as caught:
        own_server.queue(wait(3), on_event=kill)
    assert caught.value.kind == "died"

    assert own_server.restart().queue(image_workflow()).images
    own_server.free()
    assert own_server.queue(image_workflow()).images


def test_start_error_contains_the_log(server_factory):
    with pytest.raises(HostError, match="--no-such-option") as caught:
        server_factory(arguments=["--no-such-option"])
    assert caught.value.kind == "start"


def test_reserved_port_is_left_to_its_server(monkeypatch):
    with _reserve_port() as probe:
        first = probe.getsockname()[1]
    monkeypatch.setattr("random.sample", lambda ports, count: [first, *ports])
    with _reserve_port() as one, _reserve_port() as other, socket.create_server(("127.0.0.1", first)):
        assert one.getsockname()[1] == first != other.getsockname()[1]
