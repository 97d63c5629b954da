"""Several devices: the bytes of one, in the order of one, also when devices are lost, and when the run is cancelled or killed.

Worker processes on the CPU stand for cards.
"""

import contextlib
import hashlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import InMemoryCalibration, LayerStatistics, LowRankHessian
from learned_rounding.quant_core.convert.dequantize import decode_source
from learned_rounding.quant_core.errors import QuantizationError
from learned_rounding.quant_core.events import (
    DeviceFailed,
    LayerFinished,
    LayerKept,
    LayerMeasured,
    LayerStarted,
    RunResumed,
)
from learned_rounding.quant_core.run.quantize import Target, quantize_files
from learned_rounding.quant_core.sources import open_source
from learned_rounding.tests.quant_core.ray_nodes import wait_until

pytestmark = pytest.mark.soak

FOUR, TWO = "cpu:0,cpu:1,cpu:2,cpu:3", "cpu:0,cpu:1"
WIDTH, LAYERS, FEW = 64, 24, 8
MIDDLE = 12  # number of a layer that is sent to a device when others are finished
CALIBRATED = {
    "calibrated W4A8": Recipe(format="asym_w4a8_int8", preset="none"),
    "calibrated INT8 with ConvRot": Recipe(format="int8_tensorwise", convrot=64, preset="none"),
    "measured": Recipe(format="measured", preset="none"),
}
UNCALIBRATED = {
    "round to nearest": Recipe(rounding="nearest", preset="none"),
    "principal": Recipe(format="int8_tensorwise", convrot=False, rounding="principal", preset="none"),
    "stochastic": Recipe(rounding="stochastic", preset="none"),
    "gradient steps": Recipe(format="int8_tensorwise", convrot=False, optimizer="adamw", num_iter=5, preset="none"),
}
RTN = UNCALIBRATED["round to nearest"]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Layers of different sizes with biases, one with NaN, and tensors that are copied."""
    tensors: dict[str, torch.Tensor] = {"step": torch.tensor(7)}
    for index in range(LAYERS):
        rows = 32 + 32 * (index * 7 % 5)
        tensors[f"blocks.{index}.proj.weight"] = random(rows, WIDTH, seed=index).bfloat16()
        tensors[f"blocks.{index}.proj.bias"] = random(rows, seed=index).bfloat16()
        tensors[f"blocks.{index}.norm.weight"] = torch.ones(WIDTH + index % 3)
    tensors["blocks.5.proj.weight"][3, 4] = float("nan")
    path = tmp_path_factory.mktemp("devices") / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def few_layers(source) -> Path:
    """The first layers of the source."""
    path = source.with_name("few.safetensors")
    names = tuple(f"blocks.{index}." for index in range(FEW))
    save_file({name: tensor for name, tensor in load_file(source).items() if name.startswith(names)}, path)
    return path


@pytest.fixture(scope="module")
def calibration() -> InMemoryCalibration:
    layers = {}
    for index in range(FEW):
        rows, others = random(300, WIDTH, seed=100 + index), random(64, WIDTH, seed=200 + index)
        validation = LowRankHessian(others.t() / 8, torch.zeros(WIDTH))
        layers[f"blocks.{index}.proj"] = LayerStatistics(rows.t() @ rows / 300, validation, rows.mean(dim=0))
    calibration = InMemoryCalibration(layers)
    calibration.fingerprint = "of these tests"
    return calibration


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def quantized(source, folder: Path, recipe: Recipe, devices: str, **options) -> tuple[str, object]:
    """Digest of the file and report of a run."""
    out = folder / f"{devices.count(',')}.safetensors"
    report = quantize_file(source, out, recipe, device=devices, **options)
    return digest(out), report


def workers() -> list[psutil.Process]:
    """Worker processes of this one that have not ended."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ends meanwhile
            found += [child] if any(word.endswith("start.py") for word in child.cmdline()) else []
    return found


@pytest.fixture
def expected(source, tmp_path) -> str:
    """Digest of the file that one device makes by round to nearest."""
    (tmp_path / "one").mkdir()
    return quantized(source, tmp_path / "one", RTN, "cpu")[0]


@pytest.mark.parametrize("name", [*UNCALIBRATED, *CALIBRATED])
def test_the_file_has_the_bytes_of_one_device(few_layers, calibration, tmp_path, name):
    recipe, options = (UNCALIBRATED | CALIBRATED)[name], {"calibration": calibration} if name in CALIBRATED else {}
    one, _ = quantized(few_layers, tmp_path, recipe, "cpu", **options)
    several, _ = quantized(few_layers, tmp_path, recipe, TWO, **options)
    assert several == one


def test_banks_of_experts_have_the_bytes_of_one_device(tmp_path):
    bank = "layers.{}.mlp.experts.down_proj.weight"
    model = {bank.format(index): random(3, 64, 72, seed=index).bfloat16() for index in range(3)}
    save_file({**model, "layers.0.self_attn.sinks": torch.ones(4)}, tmp_path / "model.safetensors")
    recipe = Recipe(format="mxfp8", rounding="nearest")
    found = [quantized(tmp_path / "model.safetensors", tmp_path, recipe, devices)[0] for devices in ("cpu", TWO)]
    assert found[0] == found[1]


def test_a_quantized_source_has_the_bytes_of_one_device(source, tmp_path):
    quantize_file(source, tmp_path / "fp8.safetensors", RTN, device="cpu")
    recipe, found = Recipe(format="int8_tensorwise", preset="none"), []
    for devices in ("cpu", TWO):
        with open_source(tmp_path / "fp8.safetensors") as opened:
            found.append(quantized(decode_source(opened), tmp_path, recipe, devices)[0])
    assert found[0] == found[1]


def test_four_devices_share_the_layers_of_several_files(few_layers, calibration, tmp_path):
    recipes = {"w4a8": CALIBRATED["calibrated W4A8"], "fp8": RTN}
    found = {}
    for devices in ("cpu", FOUR):
        folder = tmp_path / str(devices.count(","))
        targets = [
            Target(folder / f"{name}.safetensors", recipe, calibration if name == "w4a8" else None)
            for name, recipe in recipes.items()
        ]
        reports = quantize_files(few_layers, targets, device=devices)
        assert {report.device for report in reports} == {devices.replace(",", ", ")}
        found[devices] = [digest(target.destination) for target in targets]
    assert found["cpu"] == found[FOUR]


def test_events_and_reports_are_in_the_order_of_the_file(source, tmp_path):
    kinds = (LayerFinished, LayerKept)
    orders = []
    for devices in ("cpu", TWO):
        events: list = []
        _, report = quantized(source, tmp_path, RTN, devices, on_event=events.append)
        orders.append([event.name for event in events if isinstance(event, kinds)])
        assert [layer.index for layer in report.layers] == sorted(layer.index for layer in report.layers)
        started = [event.name for event in events if isinstance(event, LayerStarted)]
        assert started == [name for name in orders[-1] if name.endswith("proj.weight")]
    assert orders[0] == orders[1]


def test_every_measured_layer_is_announced(few_layers, calibration, tmp_path):
    events: list = []
    quantized(few_layers, tmp_path, CALIBRATED["measured"], TWO, calibration=calibration, on_event=events.append)
    measured = [event.index for event in events if isinstance(event, LayerMeasured)]
    assert measured == list(range(FEW))


def test_time_left_is_that_of_the_bytes_that_are_left(source, tmp_path):
    events: list = []
    _, report = quantized(source, tmp_path, RTN, TWO, on_event=events.append)
    finished = [event for event in events if isinstance(event, LayerFinished)]
    assert all(event.eta > 0 for event in finished[:-1])
    assert all(event.eta <= report.seconds * report.bytes_in / event.bytes_in for event in finished)


def test_the_layers_of_a_killed_device_are_made_by_the_others(source, expected, tmp_path, tried):
    events: list = []

    def kill_one(event) -> None:
        events.append(event)
        if isinstance(event, LayerStarted) and event.index == MIDDLE:
            worker = workers()[1]
            worker.kill()
            wait_until(lambda: not psutil.pid_exists(worker.pid), "the pool asks why the process has ended")

    found, report = quantized(source, tmp_path, RTN, FOUR, on_event=kill_one)
    assert found == expected
    assert [event.lost for event in events if isinstance(event, DeviceFailed)] == [True]
    assert "cpu:1 was lost (its process was ended by SIGKILL)" in report.warnings[-1]
    tried("kill -9 of a device's process", 1, "the same bytes, reported")


def test_when_all_devices_are_killed_nothing_is_left(source, tmp_path, tried):
    def kill_all(event) -> None:
        if isinstance(event, LayerStarted) and event.index == MIDDLE:
            for worker in workers():
                worker.kill()

    with pytest.raises(QuantizationError, match="were lost"):
        quantized(source, tmp_path, RTN, TWO, on_event=kill_all)
    assert list(tmp_path.iterdir()) == []
    tried("kill -9 of the processes of all devices", 1, "none")


class Cancelled(Exception):
    """What the check raises."""


def test_a_cancelled_run_leaves_no_file_and_no_process(source, tmp_path):
    running: list[psutil.Process] = []

    def listen(event) -> None:
        if isinstance(event, LayerStarted) and event.index == MIDDLE:
            running[:] = workers()

    def check() -> None:
        if running:
            raise Cancelled

    with pytest.raises(Cancelled):
        quantized(source, tmp_path, RTN, TWO, on_event=listen, check=check)
    assert len(running) == 2
    assert workers() == []
    assert list(tmp_path.iterdir()) == []


# Quantizes on two devices, and ends as by kill -9 after some layers; prints the ids of its worker processes.
_KILLED = """
import os, sys, psutil
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.events import LayerFinished

def listen(event):
    if isinstance(event, LayerFinished) and event.index == 12:
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        os._exit(9)

quantize_file(sys.argv[1], sys.argv[2], Recipe.from_json(sys.argv[3]), device=sys.argv[4], on_event=listen)
"""


@pytest.mark.parametrize("devices", [(TWO, "cpu"), ("cpu", TWO), (TWO, FOUR)], ids=" then ".join)
def test_a_killed_run_is_resumed_with_any_number_of_devices(source, expected, tmp_path, devices, tried):
    killed, resumed = devices
    out = tmp_path / f"{resumed.count(',')}.safetensors"
    command = [sys.executable, "-c", _KILLED, source, out, RTN.to_json(), killed]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 9, found.stderr
    pids = [int(word) for word in found.stdout.split()]
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=60)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    events: list = []
    assert quantized(source, tmp_path, RTN, resumed, on_event=events.append)[0] == expected
    assert [event.layers > 0 for event in events if isinstance(event, RunResumed)] == [True]
    tried("kill -9 of a run on several devices", 1, "resumed")
