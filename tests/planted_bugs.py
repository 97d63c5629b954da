"""Bugs that the tests must find: each is planted in a copy of the repository, and the tests of its package must fail.

    python tests/planted_bugs.py                     all bugs, and the table of docs/testing.md
    python tests/planted_bugs.py --only gptq bias    some of them; writes nothing

The tests of a bug pass without it, or its row says so. Bugs of nodes and pages need a ComfyUI (make hosts) and Chromium.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUGS", "Bug", "plant"]

_ROOT = Path(__file__).resolve().parents[1]
_DOCUMENT = _ROOT / "docs" / "testing.md"
_TABLE = re.compile(r"(?<=<!-- planted bugs -->\n).*?(?=<!-- end of planted bugs -->)", re.S)
_FAILED = re.compile(r"^(?:FAILED|ERROR|SUBFAILED.*?) (tests/[^\s\[]+)", re.M)
_TIMEOUT = 1200  # seconds for the tests of one bug


@dataclass(frozen=True)
class Bug:
    """A change of one place that makes the program wrong.

    Attributes:
        name: for ``--only``.
        file: of the repository.
        right, wrong: text that occurs once in the file, and what it becomes.
        tests: what pytest runs, files or folders of tests/: those of the package, or of the module where it needs a server.
        effect: what a user would see.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    effect: str


BUGS = (
    Bug(
        "bias",
        "quant_core/rounding/bias.py",
        "(corrected - shift)",
        "(corrected + shift)",
        ("quant_core/rounding",),
        "bias correction doubles the mean error",
    ),
    Bug(
        "gptq",
        "quant_core/rounding/gptq.py",
        ".tril(-1)",
        ".tril(-2)",
        ("quant_core/rounding",),
        "the error of a column does not reach its neighbour",
    ),
    Bug(
        "scale search",
        "quant_core/rounding/scale_search.py",
        ".view(-1, 1, 1)).square_())",
        ".view(-1, 1, 1)))",
        ("quant_core/rounding",),
        "candidates are compared in the wrong unit, the chosen scale is too large",
    ),
    Bug(
        "exponential schedule",
        "quant_core/rounding/optimizers.py",
        "0.5 ** (1 / 200)",
        "0.5 ** (1 / 20)",
        ("quant_core/rounding",),
        "learned rounding stops moving after a tenth of its steps",
    ),
    Bug(
        "six bits",
        "quant_core/formats/asym_w4a8.py",
        "_ZERO = {4: 8, 6: 32}",
        "_ZERO = {4: 8, 6: 31}",
        ("quant_core/formats",),
        "6-bit files decode with an offset",
    ),
    Bug(
        "exponents",
        "quant_core/formats/mxfp8.py",
        "tile_scales(exponents)}",
        "tile_scales(exponents + 1)}",
        ("quant_core/formats",),
        "mxfp8 weights are twice as large",
    ),
    Bug(
        "low rank",
        "quant_core/calibration/hessian.py",
        "        matrix.diagonal().add_(hessian.diagonal.to(device, torch.float32))\n",
        "",
        ("quant_core/calibration",),
        "calibrations kept small lose the energy outside of their directions",
    ),
    Bug(
        "zero channels",
        "quant_core/calibration/hessian.py",
        "torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt_()",
        "diagonal.sqrt()",
        ("quant_core/calibration",),
        "a channel that is always zero makes a layer NaN",
    ),
    Bug(
        "repeats",
        "quant_core/recipes/patterns.py",
        "if self.size > LARGEST:",
        "if False:",
        ("quant_core/recipes",),
        "a pattern from a workflow takes gigabytes",
    ),
    Bug(
        "kept layers",
        "quant_core/recipes/presets/flux.toml",
        "(img_in|txt_in)",
        "(txt_in)",
        ("quant_core/recipes",),
        "Flux's input projection is quantized",
    ),
    Bug(
        "trailing bytes",
        "quant_core/sources/safetensors.py",
        "if data + end < self.size:",
        "if False:",
        ("quant_core/sources",),
        "a damaged file is read",
    ),
    Bug(
        "gaps",
        "quant_core/sources/safetensors.py",
        "if begin != end:",
        "if begin < end:",
        ("quant_core/sources",),
        "bytes that no tensor has are accepted",
    ),
    Bug(
        "without hard links",
        "quant_core/output/publish.py",
        "if os.path.lexists(path):",
        "if False:",
        ("quant_core/output",),
        "a file is replaced unasked on a disk without hard links",
    ),
    Bug(
        "alignment",
        "quant_core/output/writer.py",
        "if self._layout.defers(info):",
        "if False:",
        ("quant_core/output",),
        "tensors after an odd one are misaligned",
    ),
    Bug(
        "calls that run a layer",
        "quant_core/sequential/block.py",
        "if calls.isdisjoint(self._streams.calibration) or calls.isdisjoint(self._streams.validation):",
        "if calls.isdisjoint(self._streams.calibration):",
        ("quant_core/sequential",),
        "a layer that no validation call runs ends the run",
    ),
    Bug(
        "parking",
        "quant_core/sequential/parking.py",
        "self._device_free += self._on_device.pop(call, 0)",
        "self._on_device.pop(call, 0)",
        ("quant_core/sequential",),
        "device memory counts as taken for good, and calls go to the disk",
    ),
    Bug(
        "largest first",
        "quant_core/workers/pool.py",
        "return max(fitting,",
        "return min(fitting,",
        ("quant_core/workers",),
        "the largest layer comes last, and one GPU works on it alone",
    ),
    Bug(
        "outputs of one name",
        "quant_core/batch/output_names.py",
        "key = path_key(output.path).casefold()",
        "key = path_key(output.path)",
        ("quant_core/batch",),
        "on Windows and macOS one output of a plan replaces another",
    ),
    Bug(
        "another run",
        "quant_core/run/resume.py",
        "if next(records, (None,))[0] != self._header(data_start):",
        "if next(records, None) is None:",
        ("quant_core/run",),
        "layers of a run with other options are restored",
    ),
    Bug(
        "price of time",
        "quant_core/run/allocation.py",
        "price = low * _GROWTH",
        "price = low",
        ("quant_core/run",),
        "target_time has no effect",
    ),
    Bug(
        "old metadata",
        "quant_core/convert/dequantize.py",
        "if key not in _OWN_METADATA}",
        "}",
        ("quant_core/convert",),
        "a file made from a quantized one claims to be quantized already",
    ),
    Bug(
        "abbreviations",
        "quant_core/cli/usage.py",
        "allow_abbrev=False",
        "allow_abbrev=True",
        ("quant_core/cli", "test_command_line.py"),
        "a mistyped option is taken for another one",
    ),
    Bug(
        "broken pipe",
        "quant_core/cli/progress.py",
        "except OSError:  # standard error is full or closed",
        "except ZeroDivisionError:",
        ("quant_core/cli",),
        "a closed terminal ends a run",
    ),
    Bug(
        "control characters",
        "quant_core/display.py",
        "char if char.isprintable() or char in allowed else",
        "char if True else",
        ("quant_core/test_display.py",),
        "names of tensors write escape sequences to the terminal",
    ),
    Bug(
        "NaN as zero",
        "quant_core/display.py",
        'if math.isnan(value):\n        return "–"\n',
        'if math.isnan(value):\n        return "0"\n',
        ("quant_core/test_display.py",),
        "an unknown error is shown as none",
    ),
    Bug(
        "empty group",
        "kernels/reference/quantize.py",
        ".clamp_min(SMALLEST_AMAX)",
        "",
        ("kernels",),
        "a group of zeros becomes NaN",
    ),
    Bug(
        "ties",
        "kernels/triton/quantize.py",
        "((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20)",
        "((bits + 0x80000) >> 20)",
        ("kernels",),
        "FP8 on older cards rounds ties up",
    ),
    Bug(
        "old cards",
        "kernels/backends.py",
        "(8, 0))",
        "(7, 5))",
        ("kernels",),
        "a kernel is launched that an RTX 20 cannot run",
    ),
    Bug(
        "large rotation",
        "kernels/hadamard.py",
        ".transpose(-1, -2).flatten(-3, -2)",
        ".flatten(-3, -2)",
        ("kernels",),
        "rotations above 256 are not their own inverse",
    ),
    Bug(
        "backslashes",
        "nodes/host/naming.py",
        'file.replace("\\\\", "/").rpartition',
        "file.rpartition",
        ("nodes/host/test_naming.py",),
        "on Windows a saved file is named after its folders",
    ),
    Bug(
        "lost bias",
        "nodes/runtime/decoded_linear.py",
        "bias = None if self.bias is None else",
        "bias = None if True else",
        ("nodes/runtime/test_decoded_linear.py",),
        "layers that ComfyUI cannot run lose their bias",
    ),
    Bug(
        "no verification",
        "nodes/save.py",
        "verified = host.verify_saved(quantized, saved)",
        'verified = "Verified."',
        ("nodes/test_save.py",),
        "a damaged file is reported as verified",
    ),
    Bug(
        "no file",
        "nodes/ui/file_inputs.py",
        "if file == NO_FILE:",
        "if False:",
        ("nodes/test_refusals.py",),
        "an empty folder gives a Python error instead of a sentence",
    ),
    Bug(
        "free place",
        "web/free_place.js",
        "distance(places[0]) < distance(places[1])",
        "distance(places[0]) > distance(places[1])",
        ("web/test_progress_state.py",),
        "nodes are inserted at the farther of two free places",
    ),
    Bug(
        "megabytes",
        "web/numbers.js",
        "count >= 999.5",
        "count >= 1024",
        ("web/test_progress_state.py",),
        "sizes of panel and report differ",
    ),
    Bug(
        "resumed time",
        "web/progress_state.js",
        "since: elapsed",
        "since: 0",
        ("web/test_progress_state.py",),
        "after a restart the time left is wrong",
    ),
    Bug(
        "dead server",
        "hosts/server.py",
        'kind="died"',
        'kind="http"',
        ("hosts/test_server.py",),
        "a server that died is taken for one that is slow",
    ),
    Bug(
        "missing text",
        "locales/zh/main.json",
        '    "previewSize": "大小",\n',
        "",
        ("web/test_progress_state.py",),
        "a Chinese panel shows an English word",
    ),
)


def copy_repository(folder: Path) -> Path:
    """The tracked files in a folder with the package's name; importable by PYTHONPATH=``folder``."""
    copy = folder / "learned_rounding"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=_ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(_ROOT / name, copy / name)
    return copy


@contextlib.contextmanager
def plant(copy: Path, bug: Bug) -> Iterator[None]:
    """Plant a bug in a copy for the time of a ``with`` block.

    Raises:
        ValueError: the text of the bug does not occur exactly once.
    """
    path = copy / bug.file
    text = path.read_text(encoding="utf-8")
    if text.count(bug.right) != 1:
        raise ValueError(f"{bug.name}: its text occurs {text.count(bug.right)} times in {bug.file}; update the table.")
    path.write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def run_tests(copy: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Run tests of a copy until the first failure; whether they pass, and the test that failed or the end of the output.

    Raises:
        RuntimeError: pytest did not run a single test.
    """
    paths = [f"tests/{name}" for name in tests]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not gpu and not compile",
        "-p",
        "no:cacheprovider",
        *paths,
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1", "CI": ""}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=_TIMEOUT)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"pytest {' '.join(paths)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    failed = _FAILED.search(done.stdout)
    return done.returncode == 0, failed[1].removeprefix("tests/") if failed else done.stdout[-300:]


def find_bugs(bugs: tuple[Bug, ...]) -> list[tuple[Bug, str | None]]:
    """Each bug, and the first test that finds it; None if none does."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_repository(Path(folder))
        for bug in bugs:
            with plant(copy, bug):
                passed, test = run_tests(copy, bug.tests)
            print(f"{'MISSED' if passed else 'found '}  {bug.name}: {'' if passed else test}", flush=True)
            found.append((bug, None if passed else test))
    return found


def format_table(found: list[tuple[Bug, str | None]]) -> str:
    """The table of docs/testing.md in Markdown."""
    rows = ["| bug | file | effect | first test that fails |", "|---|---|---|---|"]
    rows += [
        f"| {bug.name} | `{bug.file}` | {bug.effect} | {f'`{test}`' if test else '**none**'} |" for bug, test in found
    ]
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[bug.name for bug in BUGS])
    chosen = parser.parse_args().only
    found = find_bugs(tuple(bug for bug in BUGS if chosen is None or bug.name in chosen))
    if chosen is None:
        text = _DOCUMENT.read_text(encoding="utf-8")
        _DOCUMENT.write_text(_TABLE.sub(lambda _: f"\n{format_table(found)}\n", text), encoding="utf-8")
    missed = sum(test is None for _, test in found)
    print(f"{len(found) - missed} of {len(found)} bugs found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
