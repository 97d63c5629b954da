"""Files of extreme size: ten thousand layers, a hundred gigabytes."""

import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.sources.tensor_file import MAX_HEADER
from learned_rounding.tests.faults.disk import Disk

pytestmark = pytest.mark.soak

RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest", preset="none")


def quantized(folder, layers: int) -> tuple[int, int]:
    """Operations of the disk, and messages, of a run over that many layers."""
    source, target = folder / f"{layers}.safetensors", folder / f"{layers}_int8.safetensors"
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({f"blocks.{index}.weight": weight.roll(index) for index in range(layers)}, source)
    events = []
    with Disk().under() as disk:
        quantize_file(source, target, RECIPE, device="cpu", on_event=events.append)
    found = verify_file(target)
    assert found.layers == layers
    assert not found.problems
    return len(disk.operations), len(events)


def test_four_times_the_layers_take_four_times_the_work(tmp_path, often, tried):
    layers = often(2_000, 10_000)
    operations, events = quantized(tmp_path, layers // 4)
    all_operations, all_events = quantized(tmp_path, layers)
    assert all_operations == pytest.approx(4 * operations, rel=0.01)
    assert all_events == pytest.approx(4 * events, rel=0.01)
    tried(f"a file of {layers:,} layers", 1, "quantized, work in proportion to the layers")


def _filled(head: bytes, piece: bytes, tail: bytes) -> bytes:
    return head + piece * ((MAX_HEADER - len(head) - len(tail)) // len(piece)) + tail


def _counted(head: bytes, piece: bytes, tail: bytes, count: int) -> bytes:
    made = head + b",".join(piece % index for index in range(count)) + tail
    assert len(made) <= MAX_HEADER
    return made


TENSOR = b'"%x":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
HEADERS = {
    "lists": lambda: _filled(b'{"a":[', b"[],", b"0]}"),
    "objects": lambda: _filled(b'{"a":[', b'{"":0},', b"0]}"),
    "lists in lists": lambda: _filled(b'{"a":[', b"[" * 900 + b"]" * 900 + b",", b"0]}"),
    "empty objects": lambda: _filled(b'{"a":[', b"{},", b"0]}"),
    "numbers": lambda: _filled(b'{"a":[', b"9,", b"0]}"),
    "fractions": lambda: _filled(b'{"a":[', b".1e9,".replace(b".1", b"0.1"), b"0]}"),
    "texts": lambda: _filled(b'{"a":[', b'"ab",', b"0]}"),
    "one text": lambda: _filled(b'{"__metadata__":{"a":"' + "😀".encode(), b"a", b'"}}'),
    "names": lambda: _counted(b"{", b'"%x":0', b"}", 8_000_000),
    "metadata": lambda: _counted(b'{"__metadata__":{', b'"%x":""', b"}}", 7_500_000),
    "tensors": lambda: _counted(b"{", TENSOR, b"}", 1_700_000),
    "as many tensors as there may be": lambda: _counted(b"{", TENSOR, b"}", 600_000),
}
CEILING_OF_A_HEADER = 1e9
OPEN = """
import sys
from learned_rounding.benchmarks.memory import peak_memory
from learned_rounding.quant_core import output, sources
from learned_rounding.quant_core.errors import SourceError

open_it, file = sys.argv[1:]
before = peak_memory()
try:
    (output.inspect_file if open_it == "inspect_file" else getattr(sources, open_it))(file)
except SourceError:
    pass
print(peak_memory() - before)
"""


def memory_to(open_it: str, file) -> int:
    """Bytes that a process takes to open a file, or to refuse it."""
    done = subprocess.run([sys.executable, "-c", OPEN, open_it, file], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_for_an_index_is_bounded(tmp_path):
    file = tmp_path / "x.safetensors.index.json"
    file.write_bytes(_counted(b'{"weight_map":{', b'"%x":"a.safetensors"', b"}}", 2_400_000))
    assert memory_to("open_source", file) < CEILING_OF_A_HEADER


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system with holes")
@pytest.mark.parametrize("layers, size", [(1, 3_000_000_000), (1500, 65_536)], ids=["of one layer", "of many"])
def test_memory_for_the_json_of_layers_is_bounded(tmp_path, layers, size):
    header = {
        f"{index}.comfy_quant": {"dtype": "U8", "shape": [size], "data_offsets": [index * size, (index + 1) * size]}
        for index in range(layers)
    }
    text, file = json.dumps(header).encode(), tmp_path / "x.safetensors"
    with open(file, "wb") as written:
        written.write(struct.pack("<Q", len(text)) + text)
        if layers > 1:
            written.write((b'{"a":[' + b"{}," * 21_000 + b"0]}").ljust(size) * layers)
        written.truncate(8 + len(text) + layers * size)
    assert memory_to("inspect_file", file) < 3e8


def test_memory_for_a_header_is_bounded(tmp_path, often, tried):
    kinds, file = often(("objects", "one text"), tuple(HEADERS)), tmp_path / "header.safetensors"
    for kind in kinds:
        header = HEADERS[kind]()
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        assert memory_to("SafetensorsFile", file) < CEILING_OF_A_HEADER, kind
    tried("a header of 100 MB, the limit of the format, made to fill the memory", len(kinds), "at most 1 GB")


SIDES = 8192, 4096  # 64 MiB
COUNT = 1600
CEILING = 1e9
CHILD = """
import shutil
import sys
from learned_rounding.benchmarks.memory import peak_memory
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.events import LayerFinished

source, target, layers, rounding = sys.argv[1:]
usage = shutil.disk_usage(".")
shutil.disk_usage = lambda folder: usage._replace(free=1 << 60)  # the run ends after some layers
assert main(["plan", "-i", source, "--int8", "--general"]) == 0
assert main(["inspect", source]) == 0

class Enough(Exception):
    pass

finished = []
def listen(event):
    finished.extend([event.name] if isinstance(event, LayerFinished) else [])
    if len(finished) == int(layers):
        raise Enough

try:
    quantize_file(source, target, Recipe(format="int8_tensorwise", convrot=False, rounding=rounding), device="cpu", on_event=listen)
except Enough:
    pass
print("PEAK", peak_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system with holes")
def test_a_hundred_gigabytes_need_one_of_memory(tmp_path, often, tried):
    """Planned, inspected, and quantized, to the end where the disk has room; the source is a hole behind its header."""
    size = 2 * SIDES[0] * SIDES[1]
    header = {
        f"blocks.{index}.weight": {"dtype": "BF16", "shape": SIDES, "data_offsets": [index * size, (index + 1) * size]}
        for index in range(COUNT)
    }
    text = json.dumps(header).encode()
    source, target = tmp_path / "large.safetensors", tmp_path / "small.safetensors"
    with open(source, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + COUNT * size)
    assert source.stat().st_size > 100e9
    assert source.stat().st_blocks * 512 < 1e6
    room = int(shutil.disk_usage(tmp_path).free * 0.8) // (size // 2)
    layers = min(room, often(2, COUNT + 1))  # one more than there are: to the end
    words = [
        source,
        target,
        str(layers),
        often("auto", "nearest"),
    ]  # the search takes minutes for few, and hours for all
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("PEAK")[1])
    assert peak < CEILING, peak
    whole = layers > COUNT
    assert {path.name for path in tmp_path.iterdir()} == {source.name, *([target.name] if whole else [])}
    if whole:
        assert target.stat().st_size > COUNT * size // 2
        assert not verify_file(target).problems
        target.unlink()
    tried(
        f"a file of 107 GB, {'all' if whole else layers} layers of it quantized",
        1,
        f"memory at most {CEILING / 1e9:.0f} GB",
    )
