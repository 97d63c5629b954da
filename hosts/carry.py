#!/usr/bin/env python3
"""Pack the repository, the hosts and their wheels for a machine without a network. Run it after make hosts.

    python hosts/carry.py OUT.tar --python 3.12 --torch 2.11.0

    learned_rounding/   the files of the working tree that git tracks
    cache/              the hosts' sources, for $LEARNED_ROUNDING_CACHE
    wheels/             wheels of the packages of both virtual environments, and their names in names.txt

torch and triton are not packed: the other machine has them. Packages that it has are not replaced, because names.txt names no
versions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

if __name__ == "__main__":  # run as a script: the package is the parent of this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from learned_rounding.hosts.install import (
    InstallError,
    available_hosts,
    companion_requirements,
    find_sources,
    run_command,
    run_pip,
)

__all__ = ["carried_requirements", "pack"]

_ROOT = Path(__file__).resolve().parents[1]
# Of the other machine, of this repository, or of the browser tests.
_NOT_CARRIED = re.compile(
    r"(torch|torchvision|torchaudio|triton|nvidia-.*|cuda-.*|pip|setuptools|learned.rounding|playwright|comfyui.frontend.package)$"
)
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64")
_NOT_PACKED = {".git", "__pycache__", "models", "output", "temp", "user"}


def carried_requirements(torch: str) -> list[str]:
    """Pinned requirements: the packages of the tests' and the hosts' environment, and those that depend on the version of torch."""
    pythons = {Path(sys.executable), *(host.python for host in available_hosts())}
    installed = {line for python in pythons for line in _list_packages(python)}
    kept = (line for line in installed if not _NOT_CARRIED.match(line.partition("==")[0].lower()))
    pinned = {line.partition("==")[0].lower(): line for line in sorted(kept)}  # one version of each package
    return [*pinned.values(), *companion_requirements(torch)]


def _list_packages(python: Path) -> list[str]:
    lines = run_command([str(python), "-m", "pip", "list", "--format=freeze"], f"pip list of {python}").splitlines()
    return [line for line in lines if "==" in line]


def pack(target: Path, python: str, torch: str) -> None:
    """Write the archive. Raises :class:`InstallError` if a wheel cannot be downloaded."""
    requirements = carried_requirements(torch)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(target, "w") as archive:
        options = [option for platform in _PLATFORMS for option in ("--platform", platform)]
        options += ["--python-version", python, "--only-binary=:all:", "--no-deps", "-d", folder]
        run_pip(Path(sys.executable), "download", *options, *requirements)
        names = "\n".join(line.partition("==")[0] for line in requirements)
        Path(folder, "names.txt").write_text(names + "\n", encoding="utf-8")
        archive.add(folder, "wheels")
        for name, source in find_sources():
            archive.add(source, f"cache/{source.name if name == 'oldest' else 'ComfyUI'}", filter=_leave_out)
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=_ROOT, check=True, capture_output=True, text=True)
        for path in filter(None, tracked.stdout.split("\0")):
            archive.add(_ROOT / path, f"learned_rounding/{path}")


def _leave_out(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Files of a host that its server does not need: those of git, of Python and of users."""
    parts = Path(entry.name).parts
    return None if "__pycache__" in parts or ".git" in parts or (parts[2:3] and parts[2] in _NOT_PACKED) else entry


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", type=Path, help="the archive to write")
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python")
    parser.add_argument("--torch", required=True, help="version of its torch, such as 2.11.0")
    arguments = parser.parse_args()
    try:
        pack(arguments.target, arguments.python, arguments.torch)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
