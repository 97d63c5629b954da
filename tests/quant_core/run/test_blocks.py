"""Runs with a model: order of the layers, what the file and the report say, refusals, and killed runs."""

import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from learned_rounding.quant_core import Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.calibration import InMemoryCalibration
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.events import BlockFinished, BlockStarted, LayerFinished, LayerStarted
from learned_rounding.quant_core.output import PROVENANCE_KEY, verify_file
from learned_rounding.quant_core.output.partial import PartialFile
from learned_rounding.quant_core.run import quantize
from learned_rounding.quant_core.run.blocks import KEPT, WalkSummary
from learned_rounding.quant_core.run.resume import JournalFile
from learned_rounding.tests.quant_core.sequential.models import (
    WIDTH,
    Pairs,
    calibrate,
    make,
    make_arguments,
    outputs,
    replay,
)

FAST = {"damping": 0.1, "sweeps": 0}
RECIPE = Recipe("int8_tensorwise", convrot=False, rounding="sequential", preset="none", **FAST)
W4A8 = Recipe("asym_w4a8_int8", rounding="sequential", preset="none", **FAST)
LEARNED = Recipe("asym_w4a8_int8", rounding="reconstructed", preset="none", num_iter=4, **FAST)


class Mixed(nn.Module):
    """Two blocks with biases, and layers outside of them; the source has them in another order than they run in."""

    def __init__(self):
        super().__init__()
        self.after, self.pairs, self.before = nn.Linear(WIDTH, WIDTH), Pairs(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, time):
        made = self.pairs(self.before(x), time)
        return self.after(made["sample"]), made["extra"]


INSIDE = [f"pairs.blocks.{block}.{name}" for block in range(2) for name in ("image", "text")]
OUTSIDE = ["after", "before"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class Case:
    """A model with its recorded calls, its calibration, and the file of its weights."""

    def __init__(self, root: nn.Module, path: Path, extra: dict[str, torch.Tensor] | None = None, **options):
        self.root, self.path = root, path
        self.model = replay(root, path.parent, **options)
        self.calibration = InMemoryCalibration(calibrate(self.model)._layers)
        self.calibration.fingerprint = "calibration"
        self.tensors = dict(sorted(root.state_dict().items())) | (extra or {})
        save_file(self.tensors, path)

    def run(self, out: Path, recipe: Recipe = RECIPE, **options):
        options = {"calibration": self.calibration, "model": self.model, "device": "cpu", **options}
        return quantize_file(self.path, out, recipe, **options)


@pytest.fixture
def case(tmp_path):
    return Case(make(Mixed), tmp_path / "in.safetensors")


def provenance(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[PROVENANCE_KEY])


def weights(names) -> list[str]:
    return [f"{name}.weight" for name in names]


# What comes out


def test_layers_outside_of_blocks_come_first_and_blocks_in_their_order(case, tmp_path):
    events = []
    report = case.run(tmp_path / "out", on_event=events.append)
    order = weights([*OUTSIDE, *INSIDE])
    assert [layer.name for layer in report.layers] == order
    assert [layer.index for layer in report.layers] == list(range(6))
    assert {layer.total for layer in report.layers} == {6}
    assert [event.name for event in events if isinstance(event, LayerStarted)] == order
    kinds = [type(event) for event in events if isinstance(event, (BlockStarted, BlockFinished, LayerFinished))]
    block = [BlockStarted, BlockFinished, LayerFinished, LayerFinished]
    assert kinds == [LayerFinished, LayerFinished, *block, *block]


def test_file_is_complete_and_valid(case, tmp_path):
    report = case.run(tmp_path / "out")
    written = load_file(tmp_path / "out")
    assert verify_file(tmp_path / "out").problems == []
    assert written.keys() >= case.tensors.keys()
    assert all(written[name].dtype is torch.int8 for name in weights([*OUTSIDE, *INSIDE]))
    assert report.bytes_out == (tmp_path / "out").stat().st_size
    biases = {kept.name for kept in report.kept if "corrected" in kept.reason}
    assert biases == {f"{name}.bias" for name in [*OUTSIDE, *INSIDE]}


def test_metadata_and_report_name_the_card_the_calls_and_the_errors(case, tmp_path, sentences):
    report = case.run(tmp_path / "out", W4A8)
    summary = report.sequential
    assert summary.card == "native"
    assert summary.calls == 6
    assert summary.unfollowed == ""
    assert 0 < summary.weights_only_error <= summary.output_error < 0.2
    assert provenance(tmp_path / "out")["sequential"] == {
        "card": "native",
        "calls": 6,
        "blocks": {"sequential": 2},
        "output_error": summary.output_error,
        "weights_only_error": summary.weights_only_error,
    }
    notes = {layer.name: layer.note for layer in report.layers}
    assert all("sequential" in notes[name] for name in weights(INSIDE))
    assert not any("sequential" in notes[name] for name in weights(OUTSIDE))


def test_reported_error_is_that_of_the_file(case, tmp_path):
    """The weights and biases of the file in the model itself, with unquantized activations."""
    report = case.run(tmp_path / "out")
    written, calls = load_file(tmp_path / "out"), (4, 5)
    exact = [outputs(case.model.run(index)) for index in calls]
    for name in [*OUTSIDE, *INSIDE]:
        module = case.root.get_submodule(name)
        module.weight.copy_(written[f"{name}.weight"].float() * written[f"{name}.weight_scale"])
        module.bias.copy_(written[f"{name}.bias"])
    found = [outputs(case.model.run(index)) for index in calls]
    shares = [
        sum((one[output] - other[output]).square().sum() for one, other in zip(found, exact, strict=True))
        / sum(one[output].square().sum() for one in exact)
        for output in range(2)
    ]
    assert report.sequential.weights_only_error == pytest.approx(float(sum(shares) / 2) ** 0.5, rel=1e-3)


def test_card_decides_how_activations_are_quantized(case, tmp_path):
    errors = {}
    for card in ("8.9", "12.0"):
        recipe = Recipe("nvfp4", rounding="sequential", preset="none", card=card, **FAST)
        report = case.run(tmp_path / card, recipe)
        assert report.sequential.card == card
        assert provenance(tmp_path / card)["sequential"]["card"] == card
        errors[card] = report.sequential.output_error
    assert errors["8.9"] < errors["12.0"]


def test_state_dict_gives_what_its_file_gives(case, tmp_path):
    case.run(tmp_path / "out")
    made = quantize_tensors(case.tensors, RECIPE, calibration=case.calibration, model=case.model, device="cpu")
    written = load_file(tmp_path / "out")
    assert made.tensors.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in made.tensors.items())
    assert json.loads(made.metadata[PROVENANCE_KEY])["sequential"] == provenance(tmp_path / "out")["sequential"]


def test_same_bytes_twice(case, tmp_path):
    case.run(tmp_path / "one", W4A8)
    case.run(tmp_path / "two", W4A8)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_model_that_is_not_followed_gives_the_calibrated_file(case, tmp_path, sentences):
    """It calls a block twice."""
    case.root.pairs.blocks.append(case.root.pairs.blocks[0])
    report = case.run(tmp_path / "out")
    sentences(str(report.sequential))
    assert report.sequential.output_error is None
    assert report.sequential.unfollowed
    assert provenance(tmp_path / "out")["sequential"] == report.sequential.to_dict()
    calibrated = Recipe("int8_tensorwise", convrot=False, rounding="calibrated", preset="none", **FAST)
    quantize_file(case.path, tmp_path / "calibrated", calibrated, calibration=case.calibration, device="cpu")
    expected, written = load_file(tmp_path / "calibrated"), load_file(tmp_path / "out")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


class Leaving(Pairs):
    """Leaves out its second block where the time is negative."""

    def forward(self, x, time):
        text = time.expand(-1, 4, -1) + x[:, :4]
        for block in self.blocks[: 2 if time.sum() > 0 else 1]:
            x, text = block(x, text)
        return x


@pytest.fixture
def leaving(tmp_path):
    arguments = [(x, -time.abs() if index == 3 else time.abs()) for index, (x, time) in enumerate(make_arguments())]
    return Case(make(Leaving), tmp_path / "in.safetensors", arguments=arguments)


def test_model_that_is_left_midway_gives_a_complete_file(leaving, tmp_path):
    report = leaving.run(tmp_path / "out")
    assert "blocks.1" in report.sequential.unfollowed
    assert report.sequential.output_error is None
    assert [layer.name for layer in report.layers] == weights(name.removeprefix("pairs.") for name in INSIDE)
    notes = [layer.note for layer in report.layers]
    assert {*notes[:2]} <= {*KEPT.values()}
    assert notes[2:] == ["", ""]
    assert verify_file(tmp_path / "out").problems == []


def damage(case: Case, layer: str, value: float) -> None:
    """Put NaN or Inf into a weight of the model and of its file, but not into the calibration."""
    weight = case.root.get_submodule(layer).weight
    weight[3, 5] = value
    case.tensors[f"{layer}.weight"] = weight
    save_file(case.tensors, case.path)


@pytest.mark.parametrize(
    "layer, bad", [(INSIDE[0], math.nan), (INSIDE[2], math.inf), ("after", math.inf), ("before", math.nan)]
)
def test_layer_with_nan_stays_unquantized_and_the_file_is_complete(case, tmp_path, layer, bad):
    damage(case, layer, bad)
    events = []
    report = case.run(tmp_path / "out", on_event=events.append)
    written = load_file(tmp_path / "out")
    assert written[f"{layer}.weight"].dtype is torch.float32
    assert len(report.layers) == 5
    assert report.sequential.output_error is None
    assert verify_file(tmp_path / "out").problems == []
    for event in events:
        if isinstance(event, BlockFinished):
            assert math.isfinite(event.error)
            assert math.isfinite(event.weights_only_error)
    json.loads(json.dumps(provenance(tmp_path / "out")), parse_constant=pytest.fail)


BANK = "layers.0.mlp.experts.gate_up_proj.weight"


def make_bank() -> dict[str, torch.Tensor]:
    """A bank of experts as ComfyUI reads it."""
    bank = torch.randn(3, 32, WIDTH, generator=torch.Generator().manual_seed(3))
    return {BANK: bank, "layers.0.self_attn.sinks": torch.ones(4)}


def test_bank_of_experts_beside_the_blocks(tmp_path):
    case = Case(make(Mixed), tmp_path / "in.safetensors", make_bank())
    report = case.run(tmp_path / "out", Recipe("float8_e4m3fn", rounding="sequential", preset="none", **FAST))
    assert BANK in [layer.name for layer in report.layers]
    assert verify_file(tmp_path / "out").problems == []
    assert report.sequential.output_error < 0.1


# Refusals and repeated runs


def test_run_without_a_model_is_refused(case, tmp_path, listing, sentences):
    for rounding in ("sequential", "reconstructed"):
        with sentences.raises(RecipeError):
            case.run(
                tmp_path / "out", Recipe("int8_tensorwise", convrot=False, rounding=rounding, preset="none"), model=None
            )
    with sentences.raises(RecipeError):
        quantize_tensors(case.tensors, RECIPE, calibration=case.calibration)
    with sentences.raises(RecipeError):
        case.run(tmp_path / "out", calibration=None)
    assert listing() == ["in.safetensors"]


def test_model_is_not_run_by_other_roundings(case, tmp_path):
    def refuse(index):
        raise AssertionError("the model was called")

    model = replay(case.root, run=refuse)
    recipe = Recipe("int8_tensorwise", convrot=False, rounding="calibrated", preset="none", **FAST)
    report = case.run(tmp_path / "out", recipe, model=model)
    assert report.sequential is None
    assert "sequential" not in provenance(tmp_path / "out")


def test_finished_file_is_not_made_again(case, tmp_path):
    case.run(tmp_path / "out")
    assert case.run(tmp_path / "out").already_done


def test_fingerprint_depends_on_the_calls_and_the_card(case, tmp_path):
    found = []
    for number, (recipe, calls) in enumerate(
        [
            (RECIPE, "recorded calls"),
            (RECIPE, "other calls"),
            (
                Recipe("int8_tensorwise", convrot=False, rounding="sequential", preset="none", card="9.0", **FAST),
                "recorded calls",
            ),
        ]
    ):
        out = tmp_path / str(number)
        case.run(out, recipe, model=replay(case.root, fingerprint=calls))
        found.append(provenance(out)["fingerprint"])
    assert len(set(found)) == 3


def test_summary_fits_into_the_reserved_header(case, tmp_path, monkeypatch):
    """The longest reason, with characters that JSON escapes."""
    summary = WalkSummary("native", 10**6, 1 / 3, 1 / 7, '\N{SNAKE}"\\' * 500)
    finish = quantize.OutputRun.finish

    def execute(self):
        finish(self)
        self.report.sequential = summary

    monkeypatch.setattr(quantize.OutputRun, "finish", execute)
    case.run(tmp_path / "out")
    assert provenance(tmp_path / "out")["sequential"] == summary.to_dict()


# Killed runs


class Killed(BaseException):
    """Ends a run whose files stay as those of a killed process."""


@pytest.fixture
def kill(monkeypatch):
    """kill(case) → run it until only the header is missing."""

    def killed(case: Case, out: Path, recipe: Recipe = RECIPE) -> None:
        def stop(*args):
            if "execute" in called:
                raise Killed
            return metadata(*args)

        def execute(self):
            run(self)
            called.append("execute")

        called, abort = [], PartialFile.abort
        metadata, run = quantize.file_metadata, quantize.OutputRun.finish
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "file_metadata", stop)
            patch.setattr(quantize.OutputRun, "finish", execute)
            patch.setattr(PartialFile, "abort", lambda self, *, keep=False: abort(self, keep=True))
            with pytest.raises(Killed):
                case.run(out, recipe)

    return killed


def cut_journal(path: Path, layers: int) -> None:
    """Leave the records of the first layers of a journal."""
    with open(path, "r+b", buffering=0) as file:
        journal = JournalFile(file)
        end = 0
        for record, begin, size in journal.records():
            end = begin + size
            if "layer" in record:
                layers -= 1
                if not layers:
                    break
        journal.truncate(end)


def resume(case: Case, folder: Path, layers: int, recipe: Recipe = RECIPE):
    """Continue the killed run of ``folder`` from its first layers; returns the report and the bytes of the file."""
    copied = folder.with_name(f"{folder.name} {layers}")
    shutil.copytree(folder, copied)
    (journal,) = copied.glob("*.journal")
    cut_journal(journal, layers)
    report = case.run(copied / "out", recipe)
    assert [path.name for path in copied.iterdir()] == ["out"]
    return report, (copied / "out").read_bytes()


@pytest.mark.parametrize("recipe", [RECIPE, LEARNED], ids=["int8", "w4a8, reconstructed"])
def test_killed_run_is_resumed_at_some_layers_with_the_same_bytes(case, tmp_path, kill, recipe):
    """After the layers outside of blocks, within a block, and at the end."""
    case.run(tmp_path / "whole", recipe)
    whole = (tmp_path / "whole").read_bytes()
    folder = tmp_path / "killed"
    folder.mkdir()
    kill(case, folder / "out", recipe)
    for layers in (2, 3, 6):
        report, resumed = resume(case, folder, layers, recipe)
        assert resumed == whole, layers
        assert report.taken_up == layers
        assert [layer.name for layer in report.layers] == weights([*OUTSIDE, *INSIDE])
        assert provenance(tmp_path / "whole")["sequential"] == report.sequential.to_dict()


@pytest.mark.soak
def test_killed_run_is_resumed_at_every_layer_with_the_same_bytes(case, tmp_path, kill):
    case.run(tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    kill(case, folder / "out")
    for layers in range(1, 7):
        report, resumed = resume(case, folder, layers)
        assert resumed == (tmp_path / "whole").read_bytes(), layers
        assert report.taken_up == layers


def test_model_is_not_run_for_blocks_that_are_done(case, tmp_path, kill):
    """Only to measure the error of its output."""
    folder = tmp_path / "killed"
    folder.mkdir()
    kill(case, folder / "out")
    events = []
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    report = case.run(copied / "out", on_event=events.append)
    assert not any(isinstance(event, (BlockStarted, BlockFinished)) for event in events)
    assert report.sequential.output_error is not None
    assert report.taken_up == 6


@pytest.mark.soak
def test_killed_run_with_a_bank_and_a_damaged_layer_is_resumed(tmp_path, kill):
    """All activations after the damaged layer are NaN."""
    case = Case(make(Mixed), tmp_path / "in.safetensors", make_bank())
    damage(case, INSIDE[1], float("nan"))
    recipe = Recipe("float8_e4m3fn", rounding="sequential", preset="none", **FAST)
    case.run(tmp_path / "whole", recipe)
    folder = tmp_path / "killed"
    folder.mkdir()
    kill(case, folder / "out", recipe)
    for layers in range(1, 9):
        report, resumed = resume(case, folder, layers, recipe)
        assert resumed == (tmp_path / "whole").read_bytes(), layers
        assert [kept.name for kept in report.kept].count(f"{INSIDE[1]}.weight") == 1


def test_killed_run_whose_model_is_left_midway_is_resumed(leaving, tmp_path, kill):
    leaving.run(tmp_path / "whole", RECIPE)
    folder = tmp_path / "killed"
    folder.mkdir()
    kill(leaving, folder / "out")
    for layers in range(1, 5):
        report, resumed = resume(leaving, folder, layers)
        assert resumed == (tmp_path / "whole").read_bytes(), layers
        assert report.sequential.unfollowed


def test_run_with_other_calls_does_not_resume(case, tmp_path, kill):
    folder = tmp_path / "killed"
    folder.mkdir()
    kill(case, folder / "out")
    report = case.run(folder / "out", model=replay(case.root, fingerprint="other calls"))
    assert report.taken_up == 0


class Stop(BaseException):
    """What a host raises to cancel."""


@pytest.mark.soak
@pytest.mark.parametrize("recipe", [RECIPE, LEARNED], ids=["sequential", "reconstructed"])
def test_cancelling_at_any_check_leaves_nothing_behind(case, tmp_path, listing, recipe):
    state, total = {name: tensor.clone() for name, tensor in case.root.state_dict().items()}, 0

    def count():
        nonlocal total
        total += 1

    case.run(tmp_path / "out", recipe, check=count)
    (tmp_path / "out").unlink()
    for last in (1, *range(2, total, total // 6), total):
        left = last

        def stop():
            nonlocal left
            left -= 1
            if left <= 0:
                raise Stop

        with pytest.raises(Stop):
            case.run(tmp_path / "out", recipe, check=stop)
        assert listing() == ["in.safetensors"]
        assert not any("forward" in vars(module) for module in case.root.modules())
        assert all(torch.equal(tensor, state[name]) for name, tensor in case.root.state_dict().items())
    assert not [thread for thread in threading.enumerate() if thread.name == "learned-rounding-call"]


# With other parts of a recipe


def test_measured_format(case, tmp_path):
    recipe = Recipe("measured", rounding="sequential", preset="none", target_error=0.02)
    report = case.run(tmp_path / "out", recipe)
    assert {layer.name for layer in report.layers} <= set(weights([*OUTSIDE, *INSIDE]))
    assert report.sequential.output_error is not None
    assert verify_file(tmp_path / "out").problems == []


def test_reconstructed_is_no_worse_than_sequential(case, tmp_path):
    recipe = LEARNED
    events: list = []
    case.run(tmp_path / "out", recipe, on_event=events.append)
    learned = [event for event in events if isinstance(event, BlockFinished)]
    events.clear()
    case.run(tmp_path / "sequential", W4A8, on_event=events.append)
    sequential = [event for event in events if isinstance(event, BlockFinished)]
    assert learned[0].error <= sequential[0].error
    assert verify_file(tmp_path / "out").problems == []
