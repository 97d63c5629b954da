"""lrq batch: files, progress lines, dry runs, reports, exit codes, interrupted and killed batches."""

import json
import signal

import pytest

from learned_rounding.quant_core.cli import batch as command
from learned_rounding.quant_core.events import LayerFinished
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.output.partial import PartialFile

PLAN = """
general = true
output = "out/"
sources = ["a.safetensors", "b.safetensors"]
[recipes.int8]
format = "int8"
convrot = false
rounding = "nearest"
[recipes.fp8]
format = "fp8"
rounding = "nearest"
"""
OUTPUTS = [f"out/{source}_{recipe}.safetensors" for source in "ab" for recipe in ("int8", "fp8")]
DEVICE = ("--device", "cpu")


@pytest.fixture
def plan(model, model_file, tmp_path):
    """plan(text=PLAN) writes plan.toml; the models a and b exist."""
    model_file("a.safetensors")
    model_file("b.safetensors", model(1))

    def make(text: str = PLAN) -> str:
        (tmp_path / "plan.toml").write_text(text, encoding="utf-8")
        return "plan.toml"

    return make


@pytest.fixture
def made(listing):
    """made() → the outputs that exist."""
    return lambda: [name for name in listing() if name.startswith("out/")]


def test_every_output_is_made(strict_lrq, plan, made):
    code, _, err = strict_lrq("batch", plan(), *DEVICE)
    assert (code, err) == (0, [])
    assert made() == sorted(OUTPUTS)
    assert [verify_file(name).problems for name in OUTPUTS] == [[]] * 4


def test_a_line_per_started_and_finished_output(strict_lrq, plan, sentences):
    sentences(strict_lrq("batch", plan(), *DEVICE)[1], numbers=False)


def test_the_same_command_again_is_done_already(strict_lrq, plan, sentences):
    strict_lrq("batch", plan(), *DEVICE)
    code, out, err = strict_lrq("batch", plan(), *DEVICE)
    assert (code, err) == (0, [])
    sentences(out)


def test_verbose_prints_a_line_per_tensor(strict_lrq, plan, model):
    out = strict_lrq("batch", plan(), *DEVICE, "--verbose")[1]
    assert all(sum(line.startswith(f"{name}  ") for line in out.splitlines()) == 4 for name in model())


def test_the_report_is_written(strict_lrq, plan, tmp_path):
    strict_lrq("batch", plan(), *DEVICE)
    entries = json.loads((tmp_path / "plan.json").read_text())["files"]
    assert [(entry["output"], entry["status"]) for entry in entries] == [(name, "done") for name in OUTPUTS]
    assert (tmp_path / "plan.md").read_text(encoding="utf-8").count("| done |") == 4


def test_json_is_the_list_of_the_report(strict_lrq, plan, tmp_path):
    code, out, _ = strict_lrq("batch", plan(), *DEVICE, "--json")
    document = json.loads(out)
    assert (code, document["command"], document["error"]) == (0, "batch", None)
    assert document["files"] == json.loads((tmp_path / "plan.json").read_text())["files"]


def test_a_failed_output_leaves_the_others(strict_lrq, plan, made, tmp_path, sentences):
    (tmp_path / "out").mkdir()
    (tmp_path / OUTPUTS[0]).write_text("in the way")
    code, _, err = strict_lrq("batch", plan(), *DEVICE)
    assert code == 1
    assert made() == sorted(OUTPUTS)
    assert (tmp_path / OUTPUTS[0]).read_text() == "in the way"
    sentences(err)


def test_overwrite_replaces_outputs(strict_lrq, plan, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / OUTPUTS[0]).write_text("in the way")
    assert strict_lrq("batch", plan(), *DEVICE, "--overwrite")[0] == 0
    assert verify_file(OUTPUTS[0]).problems == []


def test_debug_shows_the_traceback_of_an_output(strict_lrq, plan, tmp_path):
    plan()
    (tmp_path / "a.safetensors").write_text("damaged")
    err = strict_lrq("batch", "plan.toml", *DEVICE, "--debug")[2]
    assert sum(line.startswith("Traceback") for line in err) == 2


def test_a_dry_run_writes_nothing(strict_lrq, plan, listing, sentences):
    plan()
    before = listing()
    code, out, err = strict_lrq("batch", "plan.toml", "--dry-run")
    assert (code, err) == (0, [])
    assert listing() == before
    sentences(out)


def test_a_dry_run_shows_what_is_done(strict_lrq, plan, tmp_path, sentences):
    strict_lrq("batch", plan(), *DEVICE)
    (tmp_path / OUTPUTS[3]).unlink()
    sentences(strict_lrq("batch", plan(), "--dry-run")[1])


def test_a_dry_run_in_json(strict_lrq, plan):
    entries = json.loads(strict_lrq("batch", plan(), "--dry-run", "--json")[1])["files"]
    assert [(entry["status"], entry["layers"]) for entry in entries] == [("not run", 6)] * 4


def test_a_dry_run_shows_errors(strict_lrq, plan, sentences):
    code, out, err = strict_lrq("batch", plan(PLAN.replace("general = true", "")), "--dry-run")
    assert code == 1
    sentences(out, err)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu,cpu"])
def test_a_device_that_does_not_exist_is_refused_before_any_work(strict_lrq, plan, listing, device):
    plan()
    before = listing()
    code, out, err = strict_lrq("batch", "plan.toml", "--device", device)
    assert (code, out, len(err)) == (1, "", 1)
    assert listing() == before


def test_the_device_of_the_command_line_holds_before_that_of_the_plan(strict_lrq, plan):
    assert strict_lrq("batch", plan('device = "cuda:99"\n' + PLAN), *DEVICE)[0] == 0


def test_a_plan_with_a_mistake_is_refused_before_any_work(strict_lrq, plan, listing, sentences):
    plan(PLAN.replace("out/", "{recipe}.safetensors"))
    before = listing()
    code, out, err = strict_lrq("batch", "plan.toml", *DEVICE)
    assert (code, out) == (1, "")
    assert listing() == before
    sentences(err)


def test_a_kernel_backend_holds_for_the_command(strict_lrq, plan):
    assert strict_lrq("batch", plan(), *DEVICE, "--kernel-backend", "reference")[0] == 0


@pytest.fixture
def at_layer(monkeypatch):
    """at_layer(count, action) calls an action when so many layers of the batch are finished."""

    def arrange(count: int, action) -> None:
        done = []

        def receive(progress, event):
            inner = getattr(event, "event", None)
            if isinstance(inner, LayerFinished):
                done.append(inner)
                if len(done) == count:
                    action()
            return original(progress, event)

        original = command.BatchProgress.__call__
        monkeypatch.setattr(command.BatchProgress, "__call__", receive)

    return arrange


@pytest.fixture
def interrupted(strict_lrq, plan, at_layer):
    """Result of a batch that Ctrl-C ends during the second source."""
    at_layer(15, lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are without
    try:
        return strict_lrq("batch", plan(), *DEVICE)
    finally:
        signal.signal(signal.SIGINT, before)


def test_after_an_interrupt_complete_outputs_stay_and_nothing_else(interrupted, made, listing):
    assert interrupted[0] == 130
    assert made() == sorted(OUTPUTS[:2])
    assert [name for name in listing() if "/." in name] == []


def test_an_interrupt_leaves_the_report_of_what_was_done(interrupted, tmp_path):
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["error"]["type"] == "KeyboardInterrupt"
    assert [entry["status"] for entry in document["files"]] == ["done", "done", "not run", "not run"]


def test_the_same_command_continues_an_interrupted_batch(interrupted, strict_lrq, tmp_path):
    assert strict_lrq("batch", "plan.toml", *DEVICE)[0] == 0
    entries = json.loads((tmp_path / "plan.json").read_text())["files"]
    assert [entry["status"] for entry in entries] == ["already done", "already done", "done", "done"]
    assert None not in [entry["median_error"] for entry in entries]


class Killed(BaseException):
    """What no code handles, as none handles SIGKILL."""


@pytest.fixture
def killed(strict_lrq, plan, at_layer, monkeypatch):
    """The files of a batch that is killed near the end of the second source."""

    def kill():
        raise Killed

    at_layer(22, kill)
    abort = PartialFile.abort
    with monkeypatch.context() as dying:
        dying.setattr(PartialFile, "abort", lambda self, *, keep=False: abort(self, keep=True))
        with pytest.raises(Killed):
            strict_lrq("batch", plan(), *DEVICE)


def test_a_killed_batch_is_resumed_by_the_same_command(killed, strict_lrq, listing):
    code, out, _ = strict_lrq("batch", "plan.toml", *DEVICE)
    assert code == 0
    assert "resuming" in out
    assert [name for name in listing() if "/." in name] == []
