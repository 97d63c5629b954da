"""Run command lines of one source tree in one process.

    python driver.py TREE JOBS RESULTS    all jobs of the file JOBS
    python driver.py TREE JOB             one job with ``kill_after``, as JSON

JOBS is a JSON list of ``{"folder": …, "argv": […], "kill_after": N}``. Each job runs in its folder, and its output goes to
``log.txt`` there. One JSON line per job, with its exit code and seconds, is appended to RESULTS. A job with ``kill_after``
runs in a process of its own, which is killed when it has printed that many lines.

Of the tree only ``quant_core.cli.main`` is used, so that every commit can be driven.
"""

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGE = "learned_rounding"
LOG = "log.txt"
KILLED = -getattr(signal, "SIGKILL", signal.SIGTERM)


class _KillingStream(io.TextIOWrapper):
    """A text stream that kills its process after the given number of lines."""

    def __init__(self, path: Path, lines: int):
        super().__init__(open(path, "wb"), encoding="utf-8", write_through=True)
        self._left = lines

    def write(self, text: str) -> int:
        written = super().write(text)
        self._left -= text.count("\n")
        if self._left <= 0:
            os.kill(os.getpid(), -KILLED)
        return written


def load_main(tree: Path) -> Callable[[Sequence[str]], int]:
    """Import ``tree`` as the package, as its ``__main__.py`` does, and return ``quant_core.cli.main``."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (here, tree)]
    spec = importlib.util.spec_from_file_location(PACKAGE, tree / "__init__.py", submodule_search_locations=[str(tree)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{tree} is not a package.")
    sys.modules[PACKAGE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cli = importlib.import_module(f"{PACKAGE}.quant_core.cli")
    if not Path(cli.__file__ or "").resolve().is_relative_to(tree):
        raise ImportError(f"{cli.__name__} was imported from {cli.__file__}, not from {tree}.")
    return cli.main


def run_jobs(tree: Path, jobs: Sequence[dict], results: Path) -> None:
    """Run jobs in order, and append a line per job to ``results``."""
    main = load_main(tree)
    for job in jobs:
        began = time.perf_counter()
        if job["kill_after"]:
            command = [sys.executable, __file__, str(tree), json.dumps(job)]
            code = subprocess.run(command, check=False).returncode
        else:
            code = _run(main, job)
        with open(results, "a", encoding="utf-8") as file:
            print(json.dumps({"code": code, "seconds": time.perf_counter() - began}), file=file)


def _run(main: Callable[[Sequence[str]], int], job: dict) -> int:
    """Exit code of one job; -1 for an exception."""
    os.chdir(job["folder"])
    with open(LOG, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            return main(job["argv"])
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
            return -1


def run_killed(tree: Path, job: dict) -> None:
    """Run a job until it has printed ``kill_after`` lines, which ends this process."""
    main = load_main(tree)
    os.chdir(job["folder"])
    sys.stdout = _KillingStream(Path(LOG), job["kill_after"])
    sys.exit(main(job["argv"]))


if __name__ == "__main__":
    TREE = Path(sys.argv[1]).resolve()
    if len(sys.argv) == 3:
        run_killed(TREE, json.loads(sys.argv[2]))
    run_jobs(TREE, json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3]))
