"""The package as a whole: what it imports, what it needs, what it ships, and a test for each module."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import learned_rounding
from learned_rounding.quant_core.recipes.toml import tomllib
from learned_rounding.quant_core.version import VERSION

ROOT = Path(learned_rounding.__file__).parent
CORE = ROOT / "quant_core"
MODULES = sorted(CORE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Each part may import those of lower layers, and itself. A part that is not listed here needs a place first.
LAYERS = [
    {"display", "file_system"},
    {"cancellation", "errors", "events", "version", "linalg", "deprecated"},
    {"formats", "comparison", "option", "failures"},
    {"rounding", "sources"},
    {"output"},
    {"calibration"},
    {"layer"},
    {"recipes", "quantize_layer"},
    {"quantize_bank", "sequential"},
    {"workers"},
    {"run", "convert"},
    {"batch", "checkpoints", "requantize"},
    {"cli"},
]
HOST = {"comfy", "comfy_api", "comfy_extras", "nodes", "folder_paths", "server", "execution", "web", "aiohttp"}
# Of the host, outside of nodes/host: what declares nodes, and tensors whose layouts are ours to define.
OF_HOST = {"nodes": {"comfy_api.latest"}, "nodes/ui": {"comfy_api.latest"}, "nodes/runtime": {"comfy_kitchen.tensor"}}
DEPRECATED = {"quant_core/checkpoints.py", "quant_core/requantize.py"}  # names of version 0.1.0 for other modules
NEEDED = {"torch", "regex", "tqdm", "filelock", "tomli"}
# Imported where they are asked for, with a sentence of ours or without their number when they are missing: import name → package.
FOR_PAGES = {"comfyui-frontend-package"}  # ComfyUI's frontend, which runs the pack's pages
OPTIONAL = {"prodigyplus": "prodigy-plus-schedule-free", "gguf": "gguf", "lpips": "lpips", "ray": "ray"}
TIMED = {"comfy_kitchen"}  # comes with ComfyUI; its layers are timed where it is installed
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SHIPPED = [
    *MODULES,
    *KERNELS,
    *sorted((ROOT / "nodes").rglob("*.py")),
    ROOT / "__init__.py",
    ROOT / "__main__.py",
    ROOT / "command_line.py",
]
# Packages that ComfyUI or torch bring along.
PROVIDED = HOST | {
    "torch",
    "triton",
    "numpy",
    "PIL",
    "comfy_aimdo",
    "comfy_kitchen",
    "comfy_execution",
    "comfyui_version",
}


def dotted(path: Path) -> list[str]:
    """The parts of a module's name below ``learned_rounding``; a package's own file counts as the package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything a file imports, anywhere in it; our own names begin with a dot."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path)[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.lineno, node.module))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            found += [(node.lineno, "." + ".".join([*base, alias.name])) for alias in node.names]
    return found


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part(name: str) -> str:
    """The part of one of our own modules: ``.quant_core.formats.grids.Grid`` → ``formats``."""
    return name.split(".")[2] if name.count(".") > 1 else ""


def test_the_library_imports_its_own_packages(subtests):
    for path in MODULES:
        with subtests.test(short(path)):
            own = [(line, name) for line, name in imports(path) if name.startswith(".")]
            assert [each for each in own if each[1].split(".")[1] not in ("quant_core", "kernels")] == []


def test_the_library_imports_no_host(subtests):
    known = {*sys.stdlib_module_names, *NEEDED, *OPTIONAL, *TIMED} - HOST
    for path in MODULES:
        with subtests.test(short(path)):
            others = [(line, name) for line, name in imports(path) if not name.startswith(".")]
            assert [each for each in others if each[1].split(".")[0] not in known] == []


def test_only_one_package_of_the_nodes_imports_comfyuis_internals(subtests):
    of_host = PROVIDED - {"torch", "triton", "numpy", "PIL"}
    paths = [path for path in sorted((ROOT / "nodes").rglob("*.py")) if short(path.parent) != "nodes/host"]
    for path in paths:
        with subtests.test(short(path)):
            found = [(line, name) for line, name in imports(path) if name.split(".")[0] in of_host]
            assert [each for each in found if each[1] not in OF_HOST[short(path.parent)]] == []


LAYER = {name: height for height, names in enumerate(LAYERS) for name in names}


def test_every_part_has_a_layer():
    assert {dotted(path)[1] for path in MODULES if path != CORE / "__init__.py"} <= LAYER.keys()


def test_no_part_imports_from_its_own_layer_or_above(subtests):
    for path in MODULES:
        if path != CORE / "__init__.py":
            with subtests.test(short(path)):
                own = dotted(path)[1]
                parts = [(line, name) for line, name in imports(path) if name.startswith(".quant_core")]
                others = [each for each in parts if part(each[1]) != own]
                assert [each for each in others if LAYER[part(each[1])] >= LAYER[own]] == []


def test_files_import_each_other_without_cycles():
    known = {".".join(["", *dotted(path)]): path for path in MODULES}
    graph = {}
    for name, path in known.items():
        targets = set()
        for _, target in imports(path):
            while target and target not in known:  # a name inside a module
                target = target.rpartition(".")[0]
            if target and target != name:
                targets.add(target)
        graph[name] = targets
    assert any(graph.values())
    done = set()
    while len(done) < len(graph):
        ready = {name for name, targets in graph.items() if name not in done and targets <= done}
        assert ready, f"a cycle among {sorted(set(graph) - done)}"
        done |= ready


WITHOUT_HOST = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hosts!r}:
            raise ImportError("the library asked for " + name)

sys.meta_path.insert(0, Refuse())
import learned_rounding
assert "torch" not in sys.modules, "the entry point alone loads nothing"
assert learned_rounding.WEB_DIRECTORY and callable(learned_rounding.comfy_entrypoint)
import learned_rounding.quant_core, learned_rounding.quant_core.cli.commands
assert not [name for name in sys.modules if name.startswith("learned_rounding.nodes")]
"""


def test_importing_needs_no_comfyui(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_HOST.format(hosts=HOST)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_public_names_of_the_library():
    core = import_module("learned_rounding.quant_core")
    assert {
        "quantize_weight",
        "quantize_file",
        "quantize_tensors",
        "Recipe",
        "FORMATS",
        "PRESETS",
        "QuantizationError",
    } <= set(core.__all__)


def imported(path: Path) -> ModuleType:
    return import_module(".".join(["learned_rounding", *dotted(path)]))


def test_modules_have_a_docstring():
    assert [short(path) for path in MODULES if not imported(path).__doc__] == []


def test_public_names_exist_and_are_listed_once(subtests):
    for path in MODULES:
        if short(path) not in DEPRECATED:
            with subtests.test(short(path)):
                module = imported(path)
                assert module.__all__
                assert all(hasattr(module, name) for name in module.__all__)
                assert len(set(module.__all__)) == len(module.__all__)


def test_requirements_are_those_of_the_project():
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if line and not line.startswith("#")] == PROJECT["project"]["dependencies"]


def package_names(lines: Iterable[str]) -> set[str]:
    """Of requirements with versions."""
    return {re.match(r"[\w.-]+", line)[0].lower() for line in lines}


def test_packages_that_the_host_has_are_not_required():
    """pip must not replace them."""
    names = package_names(PROJECT["project"]["dependencies"])
    assert not any(name.startswith(("torch", "nvidia", "triton", "numpy")) for name in names)


def test_every_dependency_is_imported_and_every_import_is_declared():
    required = package_names(PROJECT["project"]["dependencies"])
    used = {name.split(".")[0] for path in SHIPPED for _, name in imports(path) if not name.startswith(".")}
    own = {*sys.stdlib_module_names, "tomllib", "learned_rounding"}  # tomllib: not in Python 3.10, which gets tomli
    assert used - own - PROVIDED - set(OPTIONAL) == required - FOR_PAGES


def test_every_optional_package_has_an_extra():
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [line for extra in extras.keys() - {"test", "lint", "fuzz"} for line in extras[extra]]
    assert package_names(lines) == set(OPTIONAL.values())


def test_kernels_import_nothing_above_them(subtests):
    known = {*sys.stdlib_module_names, "torch", "triton"}
    for path in KERNELS:
        with subtests.test(short(path)):
            others = [(line, name) for line, name in imports(path) if not name.startswith(".kernels")]
            assert [each for each in others if each[1].split(".")[0] not in known] == []


def test_only_kernels_of_triton_import_it():
    importing = {short(path) for path in KERNELS for _, name in imports(path) if name.split(".")[0] == "triton"}
    assert {name for name in importing if not name.startswith("kernels/triton/")} == set()


def test_the_version_is_that_of_the_project():
    assert PROJECT["project"]["version"] == VERSION


def test_the_version_is_stated_once():
    """In pyproject.toml, and without another line there that the reader could take."""
    stated = re.compile(rf"""["']{re.escape(VERSION)}["']""")
    files = [*SHIPPED, ROOT / "pyproject.toml"]
    found = {path.name: len(stated.findall(path.read_text(encoding="utf-8"))) for path in files}
    assert {name: count for name, count in found.items() if count} == {"pyproject.toml": 1}


def test_every_package_is_shipped():
    packages = {".".join(["learned_rounding", *dotted(path)]) for path in SHIPPED if path.name == "__init__.py"}
    assert packages <= set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_data_file_of_the_library_is_shipped():
    tools = PROJECT["tool"]["setuptools"]
    shipped = {
        path
        for package, patterns in tools["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    data = {path for path in CORE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data
    assert data <= shipped


def test_the_command_is_installed_under_its_name():
    module, _, function = PROJECT["project"]["scripts"]["lrq"].partition(":")
    assert callable(getattr(import_module(module), function))


# Modules without a test of their own stem, by the reason. A folder stands for its modules by their stems.
WITHOUT_TEST: dict[str, dict[str, str]] = {
    "declarations: names of version 0.1.0, see test_deprecated.py": {
        "quant_core": "checkpoints requantize",
    },
    "seen only in a workflow that runs: tests/nodes/test_graph.py, test_schema.py, test_refusals.py, test_workflows.py": {
        "nodes": """
            calibrate_text compare_text configure load load_calibration load_quantized options prompts report save_calibration
        """,
        "nodes/host": "calibrations decoding images running validating",
        "nodes/ui": "calibration_inputs drawing file_inputs option_widgets quality_image sampling_inputs schema",
    },
    "seen only in a page: tests/web/test_preview.py, tests/web/test_runs.py": {
        "nodes/host": "model_facts previewing",
        "nodes/ui": "preview runs",
    },
    "the main file of a process: tests/quant_core/workers/test_process.py": {"quant_core/workers": "start"},
    "a step of loading and verifying files: tests/nodes/host/test_loading.py, test_verifying.py, test_layouts.py": {
        "nodes/host": "expanding loaded_layers reusing",
    },
}
# kernels/triton and kernels/reference implement the operators of kernels/ under the same stems: tests/kernels.
MIRRORED = [
    path
    for folder in ("quant_core", "kernels", "nodes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py" and short(path.parent) not in ("kernels/triton", "kernels/reference")
]


def has_test(path: Path) -> bool:
    """Whether ``quant_core/run/loop.py`` has ``tests/quant_core/run/test_loop.py``."""
    return (ROOT / "tests" / path.relative_to(ROOT).with_name(f"test_{path.name}")).exists()


def exceptions() -> list[str]:
    return [
        f"{folder}/{stem}.py"
        for folders in WITHOUT_TEST.values()
        for folder, stems in folders.items()
        for stem in stems.split()
    ]


def test_every_module_has_a_test_of_its_stem():
    without = {short(path) for path in MIRRORED if not has_test(path)}
    assert without - set(exceptions()) == set()


def test_modules_without_a_test_exist_and_have_none():
    without = {short(path) for path in MIRRORED if not has_test(path)}
    assert set(exceptions()) - without == set(), "delete these from the table"


def test_no_module_is_excepted_twice():
    assert len(set(exceptions())) == len(exceptions())
