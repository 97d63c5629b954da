"""Fixtures for all tests: real ComfyUI servers, tests in ComfyUI's process, and one line on what this run covers.

in_comfyui      runs the test in ComfyUI's process, with ComfyUI's folders in its `tmp_path` (in_comfyui.py)
comfy           a running server with this pack, the tiny model and a probe node; every test that asks for it runs once per host
server_factory  makes further servers of the same host, for tests that restart one or set it up differently
host            the host itself, without a server
comfy_page      the page of `comfy` in headless Chromium, as after its start
open_comfy_page open_comfy_page(vue_nodes=…, settings=…) → the same page, opened again with these settings
tried           tried(fault, count, outcome) adds a row to the fault table of docs/reliability.md (evidence.py)
sentences       checks texts for users against golden/sentences.json (sentences.py)
often           often(default, thorough) → how often to try, by --thorough

Tests that ask for these are marked `host` (and `browser`) by that alone.
"""

import functools
import logging
import os
import re
from pathlib import Path

import pytest

from learned_rounding.hosts import ComfyServer, available_hosts
from learned_rounding.hosts.browser import chromium_path, open_page, reopen
from learned_rounding.tests.evidence import DOCUMENT, collect_fault_patterns, format_table, update_document
from learned_rounding.tests.in_comfyui import IN_COMFYUI, ComfyProcess, ComfyTest, change_base_directory
from learned_rounding.tests.sentences import GOLDEN, Sentences, entry_name, load_golden, merge_entries, save_golden

HOSTS = available_hosts()
TESTS = Path(__file__).resolve().parent
BENCHMARKS = TESTS / "benchmarks"
LINKS = {"learned_rounding": TESTS.parent, "probe": TESTS / "nodes" / "probe"}
PROMPTS = ("red apple", "owl")  # each is one picture a run
NO_HOST = "no ComfyUI on this machine: make hosts"
NO_CHROMIUM = "no Chromium on this machine: make chromium"
# Where everything is installed on purpose, a missing part is a fault and not a reason to skip.
STRICT = bool(os.environ.get("CI"))
LOG_LINES = 60
PROCESSES = pytest.StashKey()  # function host → its ComfyProcess
COLLECTED = pytest.StashKey[set[str]]()  # entry names of the collected tests that use `sentences`


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="tests of faults, fuzz and load try more often")
    parser.addoption("--faults-table", action="store_true", help=f"write what was tried into {DOCUMENT.name}")
    parser.addoption("--update-sentences", action="store_true", help=f"write the texts of this run into {GOLDEN.name}")


def pytest_report_header():
    lines = ["ComfyUI hosts: " + (", ".join(f"{h.version} ({h.path})" for h in HOSTS) or f"none. {NO_HOST}")]
    if HOSTS and all(h.name != "newer" for h in HOSTS):
        lines.append("not covered: a newer ComfyUI (set COMFYUI_PATH to one and run make hosts)")
    lines.append(f"browser: {chromium_path() or NO_CHROMIUM}")
    return lines


@pytest.hookimpl(tryfirst=True)  # before -m picks by marker
def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = {
        name for item in items if "sentences" in getattr(item, "fixturenames", ()) for name in _entry_names(item.nodeid)
    }
    for item in items:
        fixtures = _fixtures(item)
        if "host" in fixtures:
            item.add_marker("host")
        if "comfy_tab" in fixtures:
            item.add_marker("browser")
        if BENCHMARKS in item.path.parents:  # each runs a whole benchmark
            item.add_marker("soak")
        if item.get_closest_marker("browser") and chromium_path() is None and not STRICT:
            item.add_marker(pytest.mark.skip(reason=NO_CHROMIUM))
    if not IN_COMFYUI:
        items[:] = [_make_comfy_test(config, item) if "in_comfyui" in _fixtures(item) else item for item in items]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish():
    """Let torch's loggers propagate: pytest adds its handlers to each of the fifty that do not, at every subtest."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger) and not IN_COMFYUI:
            logger.propagate = True


def pytest_sessionfinish(session):
    """Tell the process that controls the workers of pytest-xdist what was collected here."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["collected"] = sorted(session.config.stash.get(COLLECTED, ()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    found = getattr(node, "workeroutput", {}).get("collected", ())  # none from a worker that was killed
    node.config.stash.setdefault(COLLECTED, set()).update(found)


@pytest.fixture(scope="session", params=HOSTS or [None], ids=lambda host: host.version if host else "no-host")
def host(request):
    if request.param is None:
        (pytest.fail if STRICT else pytest.skip)(NO_HOST)
    return request.param


def _fixtures(item):
    return getattr(item, "fixturenames", ())


def _make_comfy_test(config, item):
    """The same test in ComfyUI's process, or the test itself without a host."""
    if item.callspec.params["host"] is None:
        return item
    return ComfyTest.from_parent(item.parent, name=item.name, function=item, process=_comfy_processes(config))


def _comfy_processes(config):
    """Function host → its process, which is started when it is first needed and closed at the end."""
    if PROCESSES not in config.stash:

        @functools.cache
        def start(host):
            options = [name for name in ("--thorough", "--update-sentences") if config.getoption(name)]
            process = ComfyProcess(host, options)
            config.add_cleanup(process.close)
            return process

        config.stash[PROCESSES] = start
    return config.stash[PROCESSES]


@pytest.fixture
def in_comfyui(host, tmp_path):
    """The test runs in ComfyUI's process; the value is its base directory."""
    import torch

    change_base_directory(tmp_path)
    with torch.inference_mode():  # as ComfyUI runs nodes
        yield tmp_path


@pytest.fixture(scope="session")
def comfy(host, tmp_path_factory):
    from learned_rounding.benchmarks.tiny_model.place import place

    base = tmp_path_factory.mktemp(f"comfyui-{host.version}-")
    place(base, prompts=PROMPTS)
    with ComfyServer(host, base=base, links=LINKS) as server:
        yield server


@pytest.fixture
def server_factory(host, tmp_path_factory):
    """server_factory(**options of ComfyServer) → a running server; all are stopped after the test."""
    servers = []

    def make(**options):
        options.setdefault("base", tmp_path_factory.mktemp(f"comfyui-{host.version}-own"))
        server = ComfyServer(host, **options)
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def comfy_tab(comfy):
    """One tab of one browser for all tests: a start of Chromium takes three times as long as a page."""
    problems = []
    with open_page(comfy, problems=problems, timeout=60) as page:
        page.problems = problems
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield page


@pytest.fixture(scope="session")
def open_comfy_page(comfy, comfy_tab):
    def open_again(**options):
        reopen(comfy_tab, comfy, **options)
        comfy_tab.problems.clear()
        return comfy_tab

    return open_again


@pytest.fixture
def comfy_page(open_comfy_page):
    return open_comfy_page()


@pytest.fixture
def often(request):
    return lambda default, thorough: thorough if request.config.getoption("--thorough") else default


def _entry_names(node_id):
    """Entry names of a test on any of the hosts, present or not."""
    versions = {host.version for host in HOSTS} | {"no-host"}
    return {entry_name(node_id, version, name) for version in versions for name in ("oldest", "newer")}


@pytest.fixture(scope="session")
def golden_sentences(request):
    return None if request.config.getoption("--update-sentences") else load_golden()


@pytest.fixture
def sentences(request, golden_sentences, tmp_path_factory):
    host = request.getfixturevalue("host") if "host" in request.fixturenames else None
    node_id = request.node.nodeid
    test = entry_name(node_id, host.version, host.name) if host else entry_name(node_id)
    shared = entry_name(node_id, host.version) if host else test
    folders = re.escape(str(tmp_path_factory.getbasetemp())) + r"[/\\][^/\\\s'\"]+"
    checker = Sentences(test, shared, folders, golden_sentences)
    request.node.user_properties.append(("sentences", (test, shared, checker.texts)))
    return checker


@pytest.fixture
def tried(request):
    if "host" in request.fixturenames:
        on = f"ComfyUI {request.getfixturevalue('host').version}"
    elif request.node.get_closest_marker("gpu"):
        import torch

        on = torch.cuda.get_device_name()
    else:
        on = "library"
    return lambda fault, times, outcome: request.node.user_properties.append(("fault", (fault, on, times, outcome)))


def pytest_terminal_summary(terminalreporter, config):
    tries = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "fault" and report.when == "call"
    ]
    if tries:
        terminalreporter.section("faults")
        terminalreporter.write(format_table(tries))
    if config.getoption("--faults-table"):
        text = update_document(DOCUMENT.read_text(encoding="utf-8"), tries, collect_fault_patterns())
        DOCUMENT.write_text(text, encoding="utf-8")
    if config.getoption("--update-sentences") and not IN_COMFYUI and not config.option.collectonly:
        _update_golden(terminalreporter, config)


def _update_golden(terminalreporter, config):
    passed = {
        (test, shared): list(texts)
        for report in terminalreporter.getreports("passed")
        for name, (test, shared, texts) in (p for p in report.user_properties if p[0] == "sentences")
        if report.when == "call"
    }
    # A run of single tests does not say which other entries of their functions are stale.
    whole_modules = not any("::" in argument for argument in config.args)
    collected = config.stash.get(COLLECTED, set()) if whole_modules else set()
    before = load_golden()
    after = merge_entries(before, passed, collected)
    save_golden(after)
    changed = sum(before.get(entry) != after.get(entry) for entry in before.keys() | after.keys())
    terminalreporter.write_line(f"{GOLDEN.name}: {changed} of {len(after)} entries changed")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows the end of its server's log."""
    report = (yield).get_result()
    server = getattr(item, "funcargs", {}).get("comfy")
    if report.failed and server is not None:
        report.sections.append((f"log of {server.host}", "\n".join(server.log_text().splitlines()[-LOG_LINES:])))
