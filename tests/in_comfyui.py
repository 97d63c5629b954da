"""Tests that run in ComfyUI's process: all that use the fixture `in_comfyui`.

Modules of ComfyUI such as `comfy.sd`, and the modules of this pack that import them, exist only in a process of the host's
Python. A test module imports them under a condition, and its tests use them directly:

    from learned_rounding.tests.in_comfyui import IN_COMFYUI

    if IN_COMFYUI:
        import comfy.sd

        from learned_rounding.nodes import host

    @pytest.mark.usefixtures("in_comfyui")
    def test_layers_are_quantized():
        ...

pytest collects these tests as usual. To run one, it sends the test's id to a process that has imported ComfyUI. That process
forks; the child runs pytest with this id, and its result is reported here. So each test starts with an unchanged ComfyUI and does
not wait for its import. ComfyUI's folders (models, output, temp) are in the test's `tmp_path`.

    python in_comfyui.py COMFYUI                              the process that forks, see `ComfyProcess`
    python in_comfyui.py COMFYUI FOLDER MODULE FUNCTION JSON  one call of a function, see `call_in_new_process`
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

__all__ = [
    "IN_COMFYUI",
    "ON_CPU",
    "ComfyProcess",
    "ComfyTest",
    "Reports",
    "call_in_new_process",
    "change_base_directory",
]

IN_COMFYUI = "comfy" in sys.modules
PACK = Path(__file__).resolve().parents[1]
ON_CPU = os.environ.get("LEARNED_ROUNDING_HOST_DEVICE", "cpu") == "cpu"
FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")


# ------------------------------------------------------------------------------------------------ in pytest's process


class ComfyProcess:
    """Process of a host's Python that has imported ComfyUI and forks for each test.

    Args:
        host: the ComfyUI to import.
        options: further arguments of pytest in the child processes.
    """

    def __init__(self, host, options: list[str]):
        self._options, self._count = options, 0
        self._temporary = tempfile.TemporaryDirectory(prefix="in-comfyui-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name).resolve()
        removed = ("PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_PLUGINS")
        env = {name: value for name, value in os.environ.items() if name not in removed}
        if ON_CPU:
            env["OMP_NUM_THREADS"] = "1"  # the threads of a pool would be missing in a child process
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [host.python, __file__, host.path],
                cwd=self.folder,
                env=env | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def run(self, node_id: str) -> list[dict]:
        """Run a test; returns its reports as serialized by pytest.

        Raises:
            FailedInComfyUI: the test module cannot be imported, or the child process ended without reports.
        """
        self._count += 1
        folder = self.folder / str(self._count)
        reports = folder.with_suffix(".json")
        arguments = [str(PACK / node_id), f"--rootdir={PACK}", f"--basetemp={folder}", *self._options]
        print(json.dumps([arguments, str(reports)]), file=self._process.stdin, flush=True)
        self._process.stdout.readline()
        if not reports.exists():
            log = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
            raise FailedInComfyUI(f"the process of the test ended without a result\n{log[-8000:]}")
        found, errors = json.loads(reports.read_text(encoding="utf-8"))
        if errors:
            raise FailedInComfyUI("\n".join(errors))
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._temporary.cleanup()


class ComfyTest(pytest.Item):
    """A test function that was collected here and runs in ComfyUI's process."""

    def __init__(self, *, function: pytest.Function, process, **arguments):
        super().__init__(**arguments)
        self._function, self._process = function, process
        self.own_markers += function.own_markers

    def reportinfo(self):
        return self._function.reportinfo()

    def runtest(self) -> None:
        *subtests, last = self._load_reports(self._process(self._function.callspec.params["host"]))
        for report in subtests:
            self.ihook.pytest_runtest_logreport(report=report)
        self.user_properties += last.user_properties
        for title, content in last.sections:
            self.add_report_section("call", title, content)
        if last.skipped:
            pytest.skip(last.longrepr[2])
        if last.failed:
            raise FailedInComfyUI(last.longreprtext)

    def _load_reports(self, process: ComfyProcess) -> list[pytest.TestReport]:
        """Reports of the subtests, then the one of the test: the first that is not passed, else the one of its call."""
        load = self.config.hook.pytest_report_from_serializable
        reports = [load(config=self.config, data=data) for data in process.run(self.nodeid)]
        subtests = [report for report in reports if type(report) is not pytest.TestReport]
        when = {report.when: report for report in reports if type(report) is pytest.TestReport}
        last = next((report for report in when.values() if not report.passed), when.get("call"))
        return [*subtests, last]

    def repr_failure(self, excinfo, style=None):
        if isinstance(excinfo.value, FailedInComfyUI):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)


class FailedInComfyUI(Exception):
    """A test failed in ComfyUI's process; the message is the report that pytest wrote there."""


# ------------------------------------------------------------------------------------------------ in ComfyUI's process


def change_base_directory(folder: Path) -> None:
    """Let ComfyUI use the folders models, output, temp and so on of ``folder``, as its option --base-directory does."""
    import folder_paths
    from comfy.cli_args import args

    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    args.base_directory = str(folder)
    importlib.reload(folder_paths)


def call_in_new_process(function, *arguments) -> None:
    """Call a function of a test module in a new process of ComfyUI with the same folders.

    The function may end its process, as a kill does. Its arguments are values of JSON.
    """
    import folder_paths
    from comfy.cli_args import args

    source = Path(sys.modules["comfy"].__path__[0]).parent
    file = sys.modules[function.__module__].__file__
    command = [sys.executable, __file__, source, args.base_directory, file, function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, cwd=folder_paths.base_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def _import_comfyui(source: str) -> None:
    """Import ComfyUI as its main.py does, and this pack under its name."""
    sys.path.insert(0, source)
    sys.argv = ["main.py", *(["--cpu"] if ON_CPU else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.install_util  # noqa: F401 (ComfyUI's, before a dependency finds another one)

    # isort: split
    import comfy.sd

    place = PACK / "__init__.py"
    spec = importlib.util.spec_from_file_location("learned_rounding", place, submodule_search_locations=[str(PACK)])
    sys.modules["learned_rounding"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["learned_rounding"])
    importlib.import_module("learned_rounding.nodes.host")


class Reports:
    """Plugin of pytest that collects the serialized reports of a run, and errors of an import."""

    def __init__(self):
        self.found: list[dict] = []
        self.errors: list[str] = []

    def pytest_configure(self, config):
        self._config = config

    def pytest_runtest_logreport(self, report):
        self.found.append(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_collectreport(self, report):
        if report.failed:
            self.errors.append(report.longreprtext)


def _run_test(arguments: list[str], target: str) -> None:
    """Run pytest with these arguments, and write its reports."""
    reports = Reports()
    pytest.main([*arguments, "-p", "no:cacheprovider", "-p", "no:terminal"], plugins=[reports])
    Path(target).write_text(json.dumps([reports.found, reports.errors]), encoding="utf-8")


def _serve(source: str) -> None:
    """Run each test of the requests on stdin in a child process."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ComfyUI prints goes to the log
    if ON_CPU:  # a process that has initialized CUDA cannot fork
        _import_comfyui(source)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                if not ON_CPU:
                    _import_comfyui(source)
                _run_test(*json.loads(line))
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)
        print(file=replies, flush=True)


def _call(source: str, folder: str, file: str, function: str, arguments: str) -> None:
    import torch

    _import_comfyui(source)
    change_base_directory(Path(folder))
    spec = importlib.util.spec_from_file_location("called_tests", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.inference_mode():
        getattr(module, function)(*json.loads(arguments))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    _serve(*sys.argv[1:]) if len(sys.argv) == 2 else _call(*sys.argv[1:])
