"""The package as others meet it: what it imports, what it needs, what it ships."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import learned_rounding
from learned_rounding.quant_core.recipes.toml import tomllib
from learned_rounding.quant_core.version import VERSION

ROOT = Path(learned_rounding.__file__).parent
CORE = ROOT / "quant_core"
MODULES = sorted(CORE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Each part may import those on lower floors, and itself. A part that is not listed here needs a place first.
FLOORS = [
    {"display", "file_system"},
    {"cancellation", "errors", "events", "version", "linalg", "deprecated"},
    {"formats", "comparison", "option"},
    {"rounding", "sources"},
    {"output"},
    {"calibration"},
    {"layer"},
    {"recipes", "quantize_layer"},
    {"quantize_bank", "sequential"},
    {"run", "convert"},
    {"checkpoints", "requantize"},
    {"cli"},
]
HOST = {"comfy", "comfy_api", "comfy_extras", "nodes", "folder_paths", "server", "execution", "web", "aiohttp"}
NEEDED = {"torch", "regex", "tqdm", "filelock", "tomli"}
# Imported where they are asked for, with a sentence of ours or without their number when they are missing: import name → package.
FOR_PAGES = {"comfyui-frontend-package"}  # ComfyUI's frontend, which runs the pack's pages
OPTIONAL = {"prodigyplus": "prodigy-plus-schedule-free", "gguf": "gguf", "lpips": "lpips"}
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


def part(name: str) -> str:
    """The floor's name of one of our own modules: ``.quant_core.formats.grids.Grid`` → ``formats``."""
    return name.split(".")[2] if name.count(".") > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CORE)))
def test_the_library_knows_no_host(path):
    for line, name in imports(path):
        if name.startswith("."):
            assert name.split(".")[1] in ("quant_core", "kernels"), f"{path}:{line} imports {name}"
        else:
            top = name.split(".")[0]
            assert top not in HOST and (
                top in sys.stdlib_module_names or top in NEEDED or top in OPTIONAL or top in TIMED
            ), f"{path}:{line} imports {name}"


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.parent != CORE or path.name != "__init__.py"],
    ids=lambda path: str(path.relative_to(CORE)),
)
def test_no_part_imports_from_its_own_floor_or_above(path):
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    own = dotted(path)[1]
    assert own in floor, f"give {own} a floor"
    for line, name in imports(path):
        if name.startswith(".quant_core"):
            other = part(name)
            assert other == own or floor[other] < floor[own], f"{path}:{line}: {own} imports {name}"


def test_no_circles_between_files():
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
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


WITHOUT_HOST = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hosts!r}:
            raise ImportError("the library asked for " + name)

sys.meta_path.insert(0, Refuse())
import learned_rounding
assert "torch" not in sys.modules, "the door alone loads nothing"
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


def test_front_doors():
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CORE)))
def test_public_names_exist_and_are_listed(path):
    module = import_module(".".join(["learned_rounding", *dotted(path)]))
    assert module.__doc__
    if path.name not in ("checkpoints.py", "requantize.py"):
        assert module.__all__ and all(hasattr(module, name) for name in module.__all__)
        assert len(set(module.__all__)) == len(module.__all__)


def test_requirements_are_those_of_the_project():
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert requirements == PROJECT["project"]["dependencies"]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}
    assert not any(name.startswith(("torch", "nvidia", "triton", "numpy")) for name in names)


def test_every_dependency_is_imported_and_every_import_is_declared():
    required = {re.match(r"[\w.-]+", line)[0].lower() for line in PROJECT["project"]["dependencies"]}
    used = {name.split(".")[0] for path in SHIPPED for _, name in imports(path) if not name.startswith(".")}
    own = {*sys.stdlib_module_names, "tomllib", "learned_rounding"}  # tomllib: not in Python 3.10, which gets tomli
    assert used - own - PROVIDED - set(OPTIONAL) == required - FOR_PAGES
    extras = PROJECT["project"]["optional-dependencies"]
    offered = {
        re.match(r"[\w.-]+", line)[0] for extra in extras.keys() - {"test", "lint", "fuzz"} for line in extras[extra]
    }
    assert offered == set(OPTIONAL.values())


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_know_nothing_above_them(path):
    for line, name in imports(path):
        own = name.startswith(".kernels") or name.split(".")[0] in ("torch", "triton")
        assert own or name.split(".")[0] in sys.stdlib_module_names, f"{path}:{line} imports {name}"
    assert "triton" in path.parts or not any(name.split(".")[0] == "triton" for _, name in imports(path))


def test_one_version():
    """Stated in pyproject.toml alone, and without another line there that the reader could take."""
    assert PROJECT["project"]["version"] == VERSION
    stated = re.compile(rf"""["']{re.escape(VERSION)}["']""")
    files = [*SHIPPED, ROOT / "pyproject.toml"]
    found = {path.name: len(stated.findall(path.read_text(encoding="utf-8"))) for path in files}
    assert {name: count for name, count in found.items() if count} == {"pyproject.toml": 1}


def test_every_package_and_every_preset_is_shipped():
    tools = PROJECT["tool"]["setuptools"]
    packages = {
        ".".join(["learned_rounding", *dotted(path)]) for path in MODULES + KERNELS if path.name == "__init__.py"
    }
    assert packages <= set(tools["packages"])
    shipped = {
        path
        for package, patterns in tools["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    data = {path for path in CORE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data and data <= shipped


def test_the_command_is_installed_under_its_name():
    module, _, function = PROJECT["project"]["scripts"]["lrq"].partition(":")
    assert callable(getattr(import_module(module), function))
