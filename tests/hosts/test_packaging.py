"""Packaging metadata for pip and the ComfyUI registry matches the repository."""

import ast
import functools
import json
import operator
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from PIL import Image

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = {".ci", "assets", "attacks", "benchmarks", "hosts", "tests"}


def git(*words: str) -> set[str]:
    """File names printed by a git command."""
    return set(
        subprocess.run(["git", *words, "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    ) - {""}


@pytest.fixture(scope="module")
def shipped():
    """Files of the registry's package: those that git tracks, except those that .comfyignore matches (git syntax)."""
    return git("ls-files") - git("ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed(project):
    """The list is maintained by hand, because the root folder is the package."""
    folders = {Path(name).parent for name in git("ls-files", "*__init__.py")}
    expected = {".".join(("learned_rounding", *f.parts)) for f in folders if not NOT_SHIPPED & set(f.parts)}
    assert set(project["tool"]["setuptools"]["packages"]) == expected


def test_requirements_agree_in_both_files_and_exclude_torch(project):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert [line for line in lines if line] == project["project"]["dependencies"]
    extras = functools.reduce(operator.iadd, project["project"]["optional-dependencies"].values(), [])
    assert not [line for line in lines + extras if re.match(r"torch\b", line)]


@pytest.fixture(scope="module")
def data(project):
    """Data files that setuptools packages."""
    settings = project["tool"]["setuptools"]
    folders = {name: "/".join(name.split(".")[1:]) for name in settings["packages"]}
    patterns = [
        f":(glob){'/'.join(filter(None, (folders[package], pattern)))}"
        for package, some in settings["package-data"].items()
        for pattern in some
    ]
    return git("ls-files", *patterns)


@pytest.mark.soak
def test_pip_installs_a_clone(data, tmp_path):
    """Into a separate folder, with all data files and the command."""
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
        "--no-compile",
        "--target",
        target,
        clone,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    assert {name for name in data if not (target / "learned_rounding" / name).is_file()} == set()
    assert {"pyproject.toml"} <= data  # from which the package reads its version
    called = {
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": str(target)},
        "check": True,
        "capture_output": True,
        "text": True,
    }
    formats = subprocess.run([target / "bin" / "lrq", "formats"], **called).stdout
    assert "int8_tensorwise" in formats
    helps = [
        subprocess.run([*command, "--help"], **called).stdout
        for command in ([target / "bin" / "lrq"], [sys.executable, clone])
    ]
    assert helps[0] == helps[1]


def test_registry_package_contains_modules_data_and_documents(project, shipped, data):
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
    assert len(modules) > 80
    assert {Path(name).parts[0] for name in data} == {
        "py.typed",
        "pyproject.toml",
        "web",
        "locales",
        "example_workflows",
        "subgraphs",
        "quant_core",
    }
    assert git("ls-files", "web/docs", "docs") <= shipped  # the manual, with the images that it shows


def test_registry_package_contains_no_developer_files(shipped):
    assert {Path(name).parts[0] for name in shipped} & NOT_SHIPPED == set()
    assert sum((ROOT / name).stat().st_size for name in shipped) < 4e6


# Calls and imports that the registry rejects in a node pack, or that install something at run time.
_CALLS = re.compile(
    r"eval|exec|compile|__import__|os\.(system|popen|fork|exec\w+|spawn\w+|posix_spawn\w*)|(pickle|marshal)\.loads?|ctypes\.CDLL"
)
_IMPORTS = {"subprocess", "pip", "ensurepip", "marshal", "ctypes", "urllib", "requests", "socket", "http"}


# What modules may use all the same: they start only this package, read only what it sends, and install nothing.
_ALLOWED = {
    "quant_core/workers/process.py": {
        "subprocess"
    },  # worker processes, one per GPU: multiprocessing would run ComfyUI's main.py
    "quant_core/workers/messages.py": {
        "pickle.load",
        "pickle.loads",
    },  # of a worker process, over its own pipe, and of Ray
    "quant_core/workers/ray_cluster.py": {"socket"},  # whether the address that a user gave answers
}


def test_shipped_modules_use_no_subprocess_no_dynamic_code_and_no_network(shipped):
    modules = [name for name in shipped if name.endswith(".py")]
    assert len(modules) > 80
    for name in modules:
        path = ROOT / name
        tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        called = [ast.unparse(node.func) for node in tree if isinstance(node, ast.Call)]
        found = {call for call in called if _CALLS.fullmatch(call)}
        imported = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
        imported += [node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module]
        found |= {module.split(".")[0] for module in imported} & _IMPORTS
        assert found == _ALLOWED.get(name, set()), name


# Accelerators that the registry and ComfyUI accept after "Environment ::"; any other word there hides all of them.
_ACCELERATORS = {
    "GPU :: NVIDIA CUDA",
    "GPU :: AMD ROCm",
    "GPU :: Intel Arc",
    "NPU :: Huawei Ascend",
    "GPU :: Apple Metal",
}
_VERSIONS = r"(<|>|<=|>=|~=|<>|!=)\d+(\.\d+)*"
_FRONTEND = "comfyui-frontend-package"


def test_registry_metadata_follows_the_specification(project):
    """docs.comfy.org/registry/specifications. Icon and banner exist at their URLs, in the sizes that it requires."""
    about, registry = project["project"], project["tool"]["comfy"]
    name = about["name"]
    assert re.fullmatch(r"[a-z]+([-_.]?[a-z0-9]+)*", name)
    assert len(name) < 100
    assert "comfy" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"])
    assert "dynamic" not in about
    assert about["description"]
    assert about["license"] == "Apache-2.0"
    environments = {line.partition(" :: ")[2] for line in about["classifiers"] if line.startswith("Environment ::")}
    assert environments == {"GPU :: NVIDIA CUDA"} <= _ACCELERATORS
    assert "Operating System :: OS Independent" in about["classifiers"]
    assert registry["PublisherId"]
    assert registry["DisplayName"]
    assert registry["requires-comfyui"] == ">=0.3.75"
    frontends = [line.removeprefix(_FRONTEND) for line in about["dependencies"] if line.startswith(_FRONTEND)]
    assert frontends == [">=1.32.9"]
    assert all(re.fullmatch(_VERSIONS, bound) for bound in (*frontends, registry["requires-comfyui"]))
    repository = about["urls"]["Repository"]
    assert about["urls"]["Bug Tracker"] == f"{repository}/issues"
    documentation = about["urls"]["Documentation"].removeprefix(f"{repository}/blob/main/")
    assert (ROOT / documentation).is_file()
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    for key, fits in {
        "Icon": lambda width, height: width == height <= 400,
        "Banner": lambda width, height: 9 * width == 21 * height,
    }.items():
        assert registry[key].startswith(raw)
        with Image.open(ROOT / registry[key].removeprefix(raw)) as image:
            assert image.format == "PNG", key
            assert fits(*image.size), key


def test_comfyui_reads_the_metadata_and_its_frontend_suffices(host, project):
    """By ComfyUI's own parser, which is that of the registry's command line; pip has nothing to change for its frontend."""
    code = (
        f"from comfy_config.config_parser import *; print(extract_node_configuration({str(ROOT)!r}).model_dump_json())"
    )
    command = [host.python, "-c", code]
    read = subprocess.run(command, cwd=host.path, capture_output=True, text=True, check=True).stdout
    found, about = json.loads(read), project["project"]
    expected = {
        "name": about["name"],
        "version": about["version"],
        "supported_os": ["OS Independent"],
        "supported_accelerators": ["GPU :: NVIDIA CUDA"],
        "supported_comfyui_version": ">=0.3.75",
        "supported_comfyui_frontend_version": ">=1.32.9",
    }
    assert {key: found["project"][key] for key in expected} == expected
    assert found["project"]["license"]["text"] == about["license"]
    assert found["tool_comfy"]["publisher_id"] == project["tool"]["comfy"]["PublisherId"]
    requirements = (host.path / "requirements.txt").read_text(encoding="utf-8")
    (frontend,) = re.findall(rf"^{_FRONTEND}==(.+)$", requirements, re.M)
    assert SpecifierSet(expected["supported_comfyui_frontend_version"]).contains(frontend)
    assert SpecifierSet(expected["supported_comfyui_version"]).contains(host.version)
