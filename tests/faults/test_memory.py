"""Memory that runs out at a layer: the layer is made with less, or the run ends with one sentence and the whole file or none."""

import random

import pytest
import torch

from learned_rounding.quant_core import Recipe, pipeline, quantize_file
from learned_rounding.quant_core.cli import main
from learned_rounding.quant_core.errors import QuantizationError
from learned_rounding.tests.faults.conftest import make_case

LAYERS = 8


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError], ids=["GPU", "CPU"])
def test_memory_runs_out_at_a_random_layer(case, monkeypatch, error, often, tried):
    real = pipeline.quantize_weight
    points = random.Random(40).sample(range(LAYERS), often(3, LAYERS))
    for at in points:
        made = []

        def quantize(*args, at=at, made=made, **options):
            made.append(1)
            if len(made) > at:
                raise error("out of memory")
            return real(*args, **options)

        monkeypatch.setattr(pipeline, "quantize_weight", quantize)
        with pytest.raises(QuantizationError, match="too little memory for layer blocks.*; close other programs"):
            quantize_file(case.source, case.target, case.recipe, device="cpu")
        monkeypatch.undo()
        case.check(complete=False)
        case.again()
        case.clear()
    tried("out of memory at a random layer (simulated)", len(points), "whole or none")


def test_it_is_one_line_for_people(one_case, monkeypatch, capsys, tried):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pipeline, "quantize_weight", full)
    assert main(["quantize", "-i", str(one_case.source), "-o", str(one_case.target), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("lrq: cpu has too little memory for layer blocks.")
    one_case.check(complete=False)
    tried("out of memory on the command line", 1, "none, one sentence, next run works")


@pytest.mark.gpu
def test_a_capped_gpu_ends_whole_or_not_at_all(tmp_path, often, tried):
    """The allocator is given less and less; layers go on with fewer rows, then on the CPU, or the run ends with our sentence."""
    total = torch.cuda.get_device_properties(0).total_memory
    caps = torch.linspace(24e6, 1e6, often(6, 24)).tolist()
    case = make_case(tmp_path, Recipe(format="int8_tensorwise"))
    quantize_file(case.source, case.target, case.recipe, device="cuda")
    case.expected = case.target.read_bytes()
    case.clear()
    for cap in caps:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + cap) / total)
        try:
            quantize_file(case.source, case.target, case.recipe, device="cuda")
            assert case.target.exists()
        except QuantizationError as error:
            assert "too little memory" in str(error) or "cannot be used here" in str(error)
            assert not case.target.exists()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.cuda.memory_allocated() == held
        assert sorted({path.name for path in tmp_path.iterdir()} - {case.target.name}) == [case.source.name]
        case.clear()
    quantize_file(case.source, case.target, case.recipe, device="cuda")
    case.check(complete=True)
    tried("a GPU whose allocator is capped", len(caps), "whole or none, memory returned")
