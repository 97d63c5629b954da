"""What pip and ComfyUI are told about this repository stays true."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = {".ci", "assets", "attacks", "benchmarks", "docs", "hosts", "tests"}


def git(*words: str) -> set[str]:
    """The file names that a git command prints."""
    return set(
        subprocess.run(["git", *words, "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    ) - {""}


@pytest.fixture(scope="module")
def shipped():
    """The registry's package: what git tracks, without what .comfyignore names. Its patterns are git's."""
    return git("ls-files") - git("ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed(project):
    """The list is by hand (the root folder is the package): a folder left out would be missing from wheels only."""
    folders = {Path(name).parent for name in git("ls-files", "*__init__.py")}
    expected = {".".join(("learned_rounding", *f.parts)) for f in folders if not NOT_SHIPPED & set(f.parts)}
    assert set(project["tool"]["setuptools"]["packages"]) == expected


def test_requirements_are_the_same_in_both_files_and_leave_torch_alone(project):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert [line for line in lines if line] == project["project"]["dependencies"]
    extras = sum(project["project"]["optional-dependencies"].values(), [])
    assert not [line for line in lines + extras if re.match(r"torch\b", line)]


@pytest.fixture(scope="module")
def data(project):
    """What ships beside modules, by what setuptools is told."""
    settings = project["tool"]["setuptools"]
    folders = {name: "/".join(name.split(".")[1:]) for name in settings["packages"]}
    patterns = [
        f":(glob){'/'.join(filter(None, (folders[package], pattern)))}"
        for package, some in settings["package-data"].items()
        for pattern in some
    ]
    return git("ls-files", *patterns)


def test_pip_installs_a_clone(data, tmp_path):
    """Into a folder of its own; with all that ships, and the command."""
    clone, target = tmp_path / "clone", tmp_path / "target"
    for name in git("ls-files"):
        if Path(name).parts[0] not in NOT_SHIPPED:
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        target,
        clone,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    assert {name for name in data if not (target / "learned_rounding" / name).is_file()} == set()
    called = {
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": str(target)},
        "check": True,
        "capture_output": True,
        "text": True,
    }
    formats = subprocess.run([target / "bin" / "lrq", "formats"], **called).stdout
    assert "int8_tensorwise" in formats
    assert (
        subprocess.run(
            [sys.executable, clone, "formats"], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout
        == formats
    )


def test_the_registry_gets_what_runs_and_what_users_read(project, shipped, data):
    folders = {"/".join(name.split(".")[1:]) for name in project["tool"]["setuptools"]["packages"]}
    modules = {name for name in git("ls-files", "*.py") if str(Path(name).parent).replace(".", "") in folders}
    assert {
        *modules,
        *data,
        "LICENSE",
        "README.md",
        "MANUAL.md",
        "CHANGELOG.md",
        "pyproject.toml",
        "requirements.txt",
    } <= shipped
    assert len(modules) > 80 and {Path(name).parts[0] for name in data} == {
        "web",
        "locales",
        "example_workflows",
        "subgraphs",
        "quant_core",
    }
    assert git("ls-files", "web/docs") <= shipped


def test_the_registry_gets_nothing_that_only_developers_need(shipped):
    assert {Path(name).parts[0] for name in shipped} & NOT_SHIPPED == set()
    assert sum((ROOT / name).stat().st_size for name in shipped) < 4e6


# What the registry refuses in a node pack, and what installs something while ComfyUI runs.
_CALLS = re.compile(
    r"eval|exec|compile|__import__|os\.(system|popen|fork|exec\w+|spawn\w+|posix_spawn\w*)|(pickle|marshal)\.loads?|ctypes\.CDLL"
)
_IMPORTS = {"subprocess", "pip", "ensurepip", "marshal", "ctypes", "urllib", "requests", "socket", "http"}


def test_shipped_python_runs_no_other_program_no_made_up_code_and_asks_no_network(shipped):
    modules = [ROOT / name for name in shipped if name.endswith(".py")]
    assert len(modules) > 80
    for path in modules:
        tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        called = [ast.unparse(node.func) for node in tree if isinstance(node, ast.Call)]
        assert [call for call in called if _CALLS.fullmatch(call)] == [], path
        imported = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
        imported += [node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module]
        assert not {name.split(".")[0] for name in imported} & _IMPORTS, path


def test_the_registry_finds_all_that_it_shows(project, shipped):
    """Icon and banner lie in the repository, where their addresses point; of the sizes that the registry shows."""
    about, registry = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9_-]{0,99}", about["name"]) and not about["name"].startswith("comfyui")
    assert (
        re.fullmatch(r"\d+\.\d+\.\d+", about["version"]) and about["description"] and about["license"] == "Apache-2.0"
    )
    assert {"Operating System :: OS Independent", "Environment :: GPU :: NVIDIA CUDA"} <= set(about["classifiers"])
    assert registry["PublisherId"] and registry["DisplayName"] and registry["requires-comfyui"] == ">=0.3.75"
    repository = about["urls"]["Repository"]
    assert about["urls"]["Bug Tracker"] == f"{repository}/issues" and about["urls"]["Documentation"].startswith(
        repository
    )
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    for key, fits in {
        "Icon": lambda width, height: width == height <= 400,
        "Banner": lambda width, height: 9 * width == 21 * height,
    }.items():
        assert registry[key].startswith(raw)
        with Image.open(ROOT / registry[key].removeprefix(raw)) as picture:
            assert picture.format == "PNG" and fits(*picture.size), key
