"""One worker process: it runs tasks on its device, ends with the process that started it, and says why it ended."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from learned_rounding import kernels
from learned_rounding.quant_core.workers.process import WorkerProcess
from learned_rounding.tests.quant_core.workers.tasks import Add, Fail, Print, process_id

CPU = torch.device("cpu", 1)

pytestmark = pytest.mark.soak  # each starts processes


@pytest.fixture(scope="module")
def worker():
    process = WorkerProcess(CPU)
    assert process.receive() == ("started", None)
    yield process
    process.kill()


def reply(worker, task):
    worker.send(7, task, cpu_fallback=False)
    return worker.receive()


def test_a_result_has_the_number_of_its_task(worker):
    assert reply(worker, process_id) == ("done", (7, worker.pid))


def test_events_precede_the_result(worker):
    worker.send(1, Add(torch.ones(2)), cpu_fallback=False)
    assert worker.receive() == ("event", ("added", "cpu"))
    assert worker.receive()[1][1].tolist() == [2, 2]


def test_an_error_has_the_traceback_of_the_process(worker):
    kind, (_, error) = reply(worker, Fail())
    assert kind == "failed"
    assert "tasks.py" in str(error.__cause__)


def test_the_process_uses_the_kernels_of_this_one():
    with kernels.using("reference"):
        process = WorkerProcess(CPU)
    try:
        assert "reference" in psutil.Process(process.pid).cmdline()
    finally:
        process.kill()


def test_what_libraries_print_does_not_disturb_the_messages(worker):
    assert reply(worker, Print())[0] == "done"


def test_the_end_of_a_killed_process_is_described(sentences):
    process = WorkerProcess(CPU)
    psutil.Process(process.pid).kill()
    with pytest.raises(EOFError):
        while process.receive():
            pass
    sentences(process.describe_end())
    process.kill()


# Starts a worker process, prints its id, and ends without a word to it.
_STARTS = """
import torch
from learned_rounding.quant_core.workers.process import WorkerProcess
process = WorkerProcess(torch.device("cpu"))
tasks = __import__("learned_rounding.tests.quant_core.workers.tasks", fromlist=["process_id"])
process.send(0, tasks.process_id, cpu_fallback=False)
while process.receive()[0] != "done":
    pass
print(process.pid, flush=True)
__import__("os")._exit(0)
"""


def test_it_ends_with_the_process_that_started_it():
    found = subprocess.run([sys.executable, "-c", _STARTS], capture_output=True, text=True, timeout=120, check=True)
    pid = int(found.stdout)
    gone, _ = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=60)
    assert gone or not psutil.pid_exists(pid)


# Imports the package under a name that is no module path, as ComfyUI does, and quantizes on two processes.
_OTHER_NAME = """
import importlib, sys, types
name = "/custom_nodes/pack_x_1"
package = types.ModuleType(name)
package.__path__ = [sys.argv[1]]
sys.modules[name] = package
core = importlib.import_module(name + ".quant_core")
import torch
tensors = {f"blocks.{index}.proj.weight": torch.randn(32, 32).bfloat16() for index in range(3)}
recipe = core.Recipe(format="int8_tensorwise", preset="none")
made = [core.quantize_tensors(tensors, recipe, device=device) for device in ("cpu", "cpu:0,cpu:1")]
assert made[1].report.device == "cpu:0, cpu:1"
for name, tensor in made[0].tensors.items():
    assert tensor.numpy(force=True).tobytes() == made[1].tensors[name].numpy(force=True).tobytes(), name
"""


def test_the_package_may_have_any_name():
    import learned_rounding

    root = os.path.dirname(learned_rounding.__file__)
    subprocess.run([sys.executable, "-c", _OTHER_NAME, root], timeout=120, check=True)
