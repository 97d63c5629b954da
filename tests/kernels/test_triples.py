"""Every kernel is a triple: the Triton kernel beside its reference in plain torch, its test, and rows of a benchmark."""

from pathlib import Path

from learned_rounding import kernels

FOLDER = Path(kernels.__file__).parent
BENCHMARKS = FOLDER.parent / "benchmarks"
ROWS = {  # stem → (script, the function that measures its rows)
    "beam": ("rounding_kernels.py", "measure_beam"),
    "grouped_levels": ("w4a8_kernels.py", "measure_layer"),
    "hopper": ("kernels.py", "measure_linear"),  # the products of linear on SM 9.0
    "linear": ("kernels.py", "measure_linear"),
    "quantize": ("kernels.py", "measure_memory"),
    "rounding": ("rounding_kernels.py", "measure_rounding"),
}
WITHOUT_REFERENCE = {"hopper"}  # compared with linear, bit for bit
NO_KERNELS = {"__init__", "launcher"}


def stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")}


def test_every_kernel_has_rows_of_a_benchmark(subtests):
    assert stems(FOLDER / "triton") - NO_KERNELS == ROWS.keys()
    for stem, (script, function) in ROWS.items():
        with subtests.test(stem):
            assert f"def {function}(" in (BENCHMARKS / script).read_text(encoding="utf-8")


def test_every_kernel_has_a_reference():
    assert stems(FOLDER / "reference") - NO_KERNELS == ROWS.keys() - WITHOUT_REFERENCE


def test_every_kernel_has_a_test():
    assert {stem for stem in ROWS if not Path(__file__).with_name(f"test_{stem}.py").exists()} == set()
