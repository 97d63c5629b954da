"""Files of extreme size: ten thousand layers, a hundred gigabytes."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.checkpoints import verify_file
from learned_rounding.tests.faults.disk import Disk

RECIPE = Recipe(format="int8_tensorwise", rounding="nearest", preset="none")


def quantized(folder, layers: int) -> tuple[int, int]:
    """Operations of the disk, and messages, of a run over that many layers."""
    source, target = folder / f"{layers}.safetensors", folder / f"{layers}_int8.safetensors"
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({f"blocks.{index}.weight": weight.roll(index) for index in range(layers)}, source)
    events = []
    with Disk().under() as disk:
        quantize_file(source, target, RECIPE, device="cpu", on_event=events.append)
    found = verify_file(target)
    assert found.layers == layers and not found.problems
    return len(disk.operations), len(events)


def test_ten_thousand_layers_take_four_times_the_work_of_a_quarter(tmp_path, tried):
    operations, events = quantized(tmp_path, 2_500)
    assert quantized(tmp_path, 10_000) == (pytest.approx(4 * operations, rel=0.01), pytest.approx(4 * events, rel=0.01))
    tried("a file of 10,000 layers", 1, "quantized, work in proportion to the layers")


HEADERS = {
    "lists": b'{"a":[' + b"[]," * 3_000_000 + b"0]}",
    "objects": b'{"a":[' + b'{"":0},' * 1_300_000 + b"0]}",
    "names": b"{" + b",".join(b'"%x":0' % index for index in range(800_000)) + b"}",
    "metadata": b'{"__metadata__":{' + b",".join(b'"%x":""' % index for index in range(700_000)) + b"}}",
    "tensors": b"{" + b",".join(b'"%x":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}' % index for index in range(150_000)) + b"}",
}  # each of about 9 MB; the format ends at 100 MB
TIMES = 40  # bytes of memory for one of a header, at most: an empty object of Python has 64
OPEN = """
import resource, sys
from learned_rounding.quant_core.checkpoints import SafetensorsFile
from learned_rounding.quant_core.errors import SourceError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
try:
    SafetensorsFile(sys.argv[1])
except SourceError:
    pass
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage counts otherwise elsewhere")
@pytest.mark.parametrize("kind", HEADERS)
def test_memory_for_a_header_is_in_proportion_to_it(tmp_path, kind, tried):
    header, file = HEADERS[kind], tmp_path / "header.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    done = subprocess.run([sys.executable, "-c", OPEN, file], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < TIMES * len(header)
    tried("a header of 9 MB made to fill the memory", 1, f"at most {TIMES} bytes for one of it")


SIDES = 8192, 4096  # 64 MiB
COUNT = 1600
CEILING = 1e9
CHILD = """
import resource, sys
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli import main
from learned_rounding.quant_core.events import LayerFinished

source, target = sys.argv[1:]
assert main(["plan", "-i", source, "--int8"]) == 0
assert main(["inspect", source]) == 0

class Enough(Exception):
    pass

finished = []
def listen(event):
    finished.extend([event.name] if isinstance(event, LayerFinished) else [])
    if len(finished) == 4:
        raise Enough

try:
    quantize_file(source, target, Recipe(format="int8_tensorwise"), device="cpu", on_event=listen)
except Enough:
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system with holes")
def test_a_hundred_gigabytes_need_one_of_memory(tmp_path, tried):
    """Planned, inspected, and quantized until four layers are done; the file is a hole behind its header."""
    size = 2 * SIDES[0] * SIDES[1]
    header = {
        f"blocks.{index}.weight": {"dtype": "BF16", "shape": SIDES, "data_offsets": [index * size, (index + 1) * size]} for index in range(COUNT)
    }
    text = json.dumps(header).encode()
    source, target = tmp_path / "large.safetensors", tmp_path / "small.safetensors"
    with open(source, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + COUNT * size)
    assert source.stat().st_size > 100e9 and source.stat().st_blocks * 512 < 1e6
    done = subprocess.run(
        [sys.executable, "-c", CHILD, source, target], capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("PEAK")[1])
    assert peak < CEILING, peak
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    tried("a file of 107 GB, memory at most 1 GB", 1, "planned, inspected, quantized")
