"""lrq quantize and lrq plan: outputs, calibrations, reports, quality cards, several models, killed runs."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding import kernels
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.cli import runs
from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.events import LayerFinished
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.output.partial import PartialFile
from learned_rounding.quant_core.run import quantize as pipeline
from learned_rounding.quant_core.sources import SafetensorsFile
from learned_rounding.tests.system import needs_symlinks

from .reading import UNUSED, recipe_of

INT8 = ("--int8", "--simple")


def test_a_bare_name_is_quantized_beside_itself(lrq, model_file, tmp_path, listing, monkeypatch, sentences):
    model_file()
    monkeypatch.chdir(tmp_path)
    code, out, err = lrq("quantize", "-i", "model.safetensors")
    assert code == 0
    assert err == []
    assert listing() == ["model.safetensors", "model_float8_e4m3fn.safetensors"]
    assert verify_file("model_float8_e4m3fn.safetensors").problems == []
    assert recipe_of("model_float8_e4m3fn.safetensors") == Recipe().to_dict()
    sentences(out, numbers=False)


def test_the_output_is_named_beside_an_input_elsewhere(lrq, model_file, tmp_path, listing, monkeypatch):
    (tmp_path / "cwd").mkdir()
    source = model_file()
    monkeypatch.chdir(tmp_path / "cwd")
    assert lrq("quantize", "-i", source, "--int8")[0] == 0
    assert listing() == ["model.safetensors", "model_int8_convrot.safetensors"]


def test_an_output_in_a_new_folder(lrq, model_file, listing, tmp_path):
    assert lrq("quantize", "-i", model_file(), "-o", tmp_path / "new" / "q.safetensors")[0] == 0
    assert listing() == ["model.safetensors", "new/q.safetensors"]


@pytest.fixture
def two_models(model, model_file):
    model_file("a.safetensors")
    model_file("b.safetensors", model(1))


def test_several_models_are_named_after_their_inputs(lrq, two_models, listing):
    assert lrq("quantize", "a.safetensors", "b.safetensors", *INT8)[0] == 0
    assert listing() == ["a.safetensors", "a_int8_convrot.safetensors", "b.safetensors", "b_int8_convrot.safetensors"]


@pytest.mark.parametrize("output", ["new/", "there"])
def test_an_output_folder(lrq, two_models, listing, tmp_path, output):
    (tmp_path / "there").mkdir()
    words = ("-i", "a.safetensors", "-i", "b.safetensors", "-o", output, "--int8", "--no-convrot", "--general")
    assert lrq("quantize", *words)[0] == 0
    folder = output.rstrip("/")
    assert listing() == [
        "a.safetensors",
        "b.safetensors",
        f"{folder}/a_int8.safetensors",
        f"{folder}/b_int8.safetensors",
    ]


def test_two_models_with_one_output_are_refused_before_any_work(lrq, model_file, listing, tmp_path, sentences):
    (tmp_path / "sub").mkdir()
    shutil.copy(model_file(), tmp_path / "sub")
    code, out, err = lrq("quantize", "model.safetensors", "sub/model.safetensors", "-o", "out/", *INT8)
    assert code == 1
    assert out == ""
    assert listing() == ["model.safetensors", "sub/model.safetensors"]
    sentences(err)


def test_after_an_error_the_other_models_follow(lrq, two_models, listing, sentences):
    code, out, err = lrq(
        "quantize", "a.safetensors", "none.safetensors", "b.safetensors", "-o", "out/", *INT8, "--json"
    )
    assert code == 1
    assert [name for name in listing() if "out" in name] == [
        "out/a_int8_convrot.safetensors",
        "out/b_int8_convrot.safetensors",
    ]
    files = json.loads(out)["files"]
    assert [entry["input"] for entry in files] == ["a.safetensors", "none.safetensors", "b.safetensors"]
    assert [entry["error"] and entry["error"]["type"] for entry in files] == [None, "SourceError", None]
    sentences([line for line in err if line.startswith("lrq:")], files[1]["error"]["message"])


def test_overwrite(lrq, model_file, tmp_path):
    source, out = model_file(), tmp_path / "q.safetensors"
    lrq("quantize", "-i", source, "-o", out)
    assert lrq("quantize", "-i", source, "-o", out, "--int8")[0] == 1
    assert lrq("quantize", "-i", source, "-o", out, "--int8", "--overwrite")[0] == 0
    assert recipe_of(out)["format"] == "int8_tensorwise"


def test_the_same_command_again_is_done_already(lrq, model_file, sentences):
    source = model_file()
    lrq("quantize", "-i", source)
    code, out, _ = lrq("quantize", "-i", source)
    assert code == 0
    sentences(out)


def test_verbose_prints_a_line_per_tensor(lrq, model, model_file, tmp_path):
    code, out, err = lrq("quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--verbose")
    assert code == 0
    assert err == []
    assert all(sum(line.startswith(f"{name}  ") for line in out.splitlines()) == 1 for name in model())


def test_a_kernel_backend_holds_for_the_command(lrq, model_file, monkeypatch, sentences):
    seen = []
    monkeypatch.setattr(
        runs, "quantize_file", lambda *a, **k: seen.append(kernels.backend()) or pipeline.quantize_file(*a, **k)
    )
    before = kernels.backend()
    assert lrq("quantize", "-i", model_file(), *INT8, "--kernel_backend", "reference")[0] == 0
    assert seen == ["reference"]
    assert kernels.backend() == before
    code, _, err = lrq("quantize", "-i", model_file(), "--kernel-backend", "fast")
    assert code == 2
    sentences(err[-1])


def test_options_act(lrq, model_file, tmp_path):
    out = tmp_path / "q.safetensors"
    lrq("quantize", "-i", model_file(), "-o", out, "--int8", "--exclude-layers", "mlp")
    tensors = load_file(out)
    assert {name for name in tensors if name.endswith(".comfy_quant")} == {
        "blocks.0.attn.qkv.comfy_quant",
        "blocks.1.attn.qkv.comfy_quant",
    }
    assert tensors["blocks.0.attn.qkv.weight"].dtype == torch.int8
    assert tensors["blocks.0.attn.qkv.weight_scale"].shape == (96, 1)


def test_a_calibration_acts(lrq, model, model_file, tmp_path, sentences):
    """Layers that it knows are calibrated, the others searched; their biases are corrected, in their own dtype."""
    layer, inputs = "blocks.0.attn.qkv", torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    inputs = (
        inputs @ torch.diag(torch.logspace(0, -2, 32)) @ torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    )
    gram = inputs.t() @ inputs / len(inputs)
    statistics = {f"{layer}.gram": gram.bfloat16(), f"{layer}.mean": inputs.mean(dim=0)}
    save_file(statistics, tmp_path / "calibration.safetensors")
    words = ["quantize", "-i", model_file(), "--int8", "--report", tmp_path / "report.json", "--calibration"]
    code, out, err = lrq(*words, tmp_path / "calibration.safetensors", "-o", tmp_path / "q.safetensors")
    assert code == 0
    assert err == []
    sentences(out, numbers=False)
    made = {entry["name"]: entry for entry in json.loads((tmp_path / "report.json").read_text())["layers"]}
    assert [entry["solver"] for name, entry in made.items() if layer in name] == ["gptq"]
    assert all(entry["output_error"] is None for name, entry in made.items() if layer not in name)
    assert verify_file(tmp_path / "q.safetensors").problems == []
    tensors, bias = load_file(tmp_path / "q.safetensors"), model()[f"{layer}.bias"]
    assert tensors[f"{layer}.bias"].dtype is bias.dtype
    assert not torch.equal(tensors[f"{layer}.bias"], bias)
    assert torch.equal(tensors["blocks.1.attn.qkv.bias"], model()["blocks.1.attn.qkv.bias"])
    # Again with the same statistics it is done already; with others it is another run.
    sentences(lrq(*words, tmp_path / "calibration.safetensors", "-o", tmp_path / "q.safetensors")[1])
    save_file({**statistics, f"{layer}.gram": gram * 2}, tmp_path / "calibration.safetensors")
    assert lrq(*words, tmp_path / "calibration.safetensors", "-o", tmp_path / "q.safetensors")[0] == 1
    assert lrq("inspect", tmp_path / "q.safetensors")[0] == 0


@pytest.mark.parametrize("format", ["asym_w4a8_int8", "nvfp4", "mxfp8"])
def test_a_calibration_acts_in_formats_of_groups(lrq, model_file, tmp_path, format):
    """The layers that it knows have a smaller output error than with round to nearest, on activations of the same kind."""
    layer, generator = "blocks.0.attn.qkv", torch.Generator().manual_seed(0)
    mixed = torch.diag(torch.logspace(0, -2, 32)) @ torch.randn(32, 32, generator=generator)
    known, others = (torch.randn(200, 32, generator=generator) @ mixed for _ in range(2))
    statistics = {
        f"{layer}.gram": known.t() @ known / 200,
        f"{layer}.holdout_gram.factor": others.t().contiguous() / 200**0.5,
        f"{layer}.holdout_gram.diagonal": torch.zeros(32),
    }
    save_file(statistics, tmp_path / "c.safetensors")
    made, words = (
        {},
        ["quantize", "-i", model_file(), "--format", format, "--layer-config", json.dumps({"qkv": format})],
    )
    for rounding, options in {"nearest": [], "calibrated": ["--calibration", tmp_path / "c.safetensors"]}.items():
        out = tmp_path / f"{rounding}.safetensors"
        assert lrq(*words, "-o", out, "--rounding", rounding, *options)[0] == 0
        assert verify_file(out).problems == []
        with SafetensorsFile(out) as opened:
            made[rounding] = DecodedSource(opened).read(f"{layer}.weight").float()
    weight = load_file(model_file())[f"{layer}.weight"].float()
    error = {rounding: float((others @ (value - weight).t()).norm()) for rounding, value in made.items()}
    assert 0 < error["calibrated"] < 0.8 * error["nearest"]


def test_a_low_rank_calibration_acts_too(lrq, model_file, tmp_path, sentences):
    layer, generator = "blocks.0.mlp.2", torch.Generator().manual_seed(0)
    parts = {"factor": torch.randn(80, 8, generator=generator), "diagonal": torch.full((80,), 0.1)}
    save_file({f"{layer}.gram.{name}": part for name, part in parts.items()}, tmp_path / "c.safetensors")
    words = ["quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--verbose", "--calibration"]
    code, out, _ = lrq(*words, tmp_path / "c.safetensors")
    (line,) = [line for line in out.splitlines() if line.startswith(f"{layer}.weight")]
    assert code == 0
    sentences(line, numbers=False)
    save_file({f"{layer}.gram.factor": parts["factor"]}, tmp_path / "half.safetensors")
    code, _, err = lrq(*words, tmp_path / "half.safetensors", "--overwrite")
    assert code == 1
    sentences(err)
    save_file({f"{layer}.gram": torch.eye(7)}, tmp_path / "wrong.safetensors")
    code, _, err = lrq(*words, tmp_path / "wrong.safetensors", "--overwrite")
    assert code == 1
    sentences(err)


def test_formats_are_measured_with_a_calibration(lrq, model, model_file, tmp_path, sentences):
    names = [name.removesuffix(".weight") for name, tensor in model().items() if tensor.ndim == 2 and "blocks" in name]
    statistics = {}
    for index, layer in enumerate(names):
        inputs = torch.randn(64, model()[f"{layer}.weight"].shape[1], generator=torch.Generator().manual_seed(index))
        statistics |= {
            f"{layer}.gram": inputs.t() @ inputs / 64,
            f"{layer}.holdout_gram.factor": inputs.t().contiguous() / 8,
            f"{layer}.holdout_gram.diagonal": torch.zeros(inputs.shape[1]),
        }
    save_file(statistics, tmp_path / "c.safetensors")
    words = ["quantize", "-i", model_file(), "--format", "measured", "--calibration", tmp_path / "c.safetensors", "-o"]
    code, out, err = lrq(*words, tmp_path / "q.safetensors", "--target-error", "0.5")
    assert code == 0
    assert err == []
    sentences(out, numbers=False)
    assert lrq("verify", tmp_path / "q.safetensors")[0] == 0
    sentences(lrq(*words, tmp_path / "q.safetensors", "--target-error", "0.5")[1])
    code, _, err = lrq(*words, tmp_path / "r.safetensors", "--target-size", "1e-6")
    assert code == 1
    sentences(err)


@pytest.mark.parametrize("command", [["plan"], ["quantize"], ["quantize", "--dry-run"]], ids=" ".join)
def test_an_unrecognized_model_ends_before_any_work_unless_general_is_given(
    strict_lrq, model_file, listing, command, sentences
):
    source = model_file()
    code, out, err = strict_lrq(*command, "-i", source)
    assert code == 1
    assert out == ""
    assert listing() == ["model.safetensors"]
    sentences(err)
    assert strict_lrq(*command, "-i", source, "--general")[0] == 0
    none = ["--preset", "none", *(["--overwrite"] if command[0] == "quantize" else [])]
    assert strict_lrq(*command, "-i", source, *none)[0] == 0  # who names the general rule has asked for it


def test_a_choice_that_matches_no_layer_is_a_warning(lrq, model_file, tmp_path, sentences):
    custom = ["--custom-layers", "mpl", "--custom-type", "fp8", "--exclude-layers", "qvk", "--exclude-layers", "qkv"]
    for words in (["plan"], ["quantize", "-o", tmp_path / "q.safetensors", "--report", tmp_path / "r.json"]):
        code, out, err = lrq(*words, "-i", model_file(), "--preset", "flux", *custom)
        assert code == 0
        assert len(err) == 1
        assert err[0].startswith(UNUSED)
        sentences(err)
    (warning,) = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["warnings"]
    assert err == [f"lrq: warning: {warning}"]
    assert warning in out


def test_a_dry_run_looks_at_every_option(lrq, model_file, tmp_path, listing, monkeypatch, sentences, subtests):
    for words in [
        ["--device", "nonsense"],
        ["--calibration", "nofile"],
        ["--report", "no/such/folder/report.json"],
        ["--rounding", "calibrated"],
        ["--rounding", "sequential"],
    ]:
        with subtests.test(words=words), monkeypatch.context() as patch:
            source = model_file()
            patch.chdir(tmp_path)
            for more in (["--dry-run"], []):
                code, _, err = lrq("quantize", "-i", source, *words, *more)
                assert code == 1
                assert len(err) == 1
                sentences(err)
            assert listing() == ["model.safetensors"]
            assert lrq("plan", "-i", source, "--device", "nonsense")[0] == 1


def test_a_full_disk_is_reported_before_the_start(lrq, model_file, listing, monkeypatch, sentences):
    source = model_file()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    code, _, err = lrq("quantize", source, *INT8)
    assert code == 1
    assert listing() == ["model.safetensors"]
    sentences(err)
    code, _, _ = lrq("quantize", source, *INT8, "--dry-run")
    assert code == 0


@pytest.fixture
def killed_run(model_file, tmp_path, monkeypatch):
    """The files of a run that is killed after four layers."""

    class Killed(BaseException):
        pass

    def kill(event):
        if isinstance(event, LayerFinished) and event.index == 3:
            raise Killed

    abort = PartialFile.abort
    recipe = Recipe(format="int8", rounding="nearest")
    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "abort", lambda self, *, keep=False: abort(self, keep=True))
        with pytest.raises(Killed):
            quantize_file(model_file(), tmp_path / "out.safetensors", recipe, device="cpu", general=True, on_event=kill)


@pytest.mark.usefixtures("killed_run")
@pytest.mark.parametrize("verbose", [(), ("--verbose",)], ids=["bar", "verbose"])
def test_resuming_is_shown(lrq, verbose):
    words = ("model.safetensors", "-o", "out.safetensors", *INT8, "--device", "cpu", *verbose)
    code, text, _ = lrq("quantize", *words)
    (line,) = [line for line in text.splitlines() if line.startswith("Resuming: ")]
    resumed = int(line.split()[1])
    assert code == 0
    assert 0 < resumed <= 4
    assert line == f"Resuming: {resumed} of 6 layers already done."
    assert f"{resumed} of them resumed" in text


def test_the_report_file(lrq, model_file, tmp_path):
    code, _, _ = lrq(
        "quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--report", tmp_path / "report.json"
    )
    values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert code == 0
    assert len(values["layers"]) == 6
    assert values["output"] == str(tmp_path / "q.safetensors")
    assert values["bytes_out"] == (tmp_path / "q.safetensors").stat().st_size


@needs_symlinks
def test_a_report_replaces_no_file_of_its_run(lrq, model_file, tmp_path, sentences):
    source, out, calibration, recipe = (
        model_file(),
        tmp_path / "q.safetensors",
        tmp_path / "x.calib.safetensors",
        tmp_path / "recipe.json",
    )
    recipe.write_text(Recipe().to_json())
    save_file({"blocks.0.attn.qkv.gram": torch.eye(32)}, calibration)
    (tmp_path / "link.json").symlink_to(source)
    os.link(source, tmp_path / "same.json")
    files = {path: path.read_bytes() for path in (source, calibration, recipe)}
    for report in (source, out, calibration, recipe, tmp_path / "link.json", tmp_path / "same.json"):
        code, _, (line,) = lrq(
            "quantize", "-i", source, "-o", out, "--recipe", recipe, "--calibration", calibration, "--report", report
        )
        assert code == 1
        sentences(line)
        assert not out.exists()
        assert all(path.read_bytes() == content for path, content in files.items())


@pytest.mark.parametrize("read", ["--recipe", "--layer-config", "--calibration"])
def test_an_output_replaces_no_file_that_its_run_reads(lrq, model_file, tmp_path, read, sentences):
    files = {
        "--recipe": lambda path: path.write_text(Recipe().to_json()),
        "--layer-config": lambda path: path.write_text('{"attn": "skip"}'),
        "--calibration": lambda path: save_file({"blocks.0.attn.qkv.gram": torch.eye(32)}, path),
    }
    path, source = tmp_path / "read.json", model_file()
    files[read](path)
    before = path.read_bytes()
    code, _, (line,) = lrq("quantize", "-i", source, "-o", path, read, path, "--overwrite")
    assert code == 1
    sentences(line)
    assert path.read_bytes() == before


def test_a_run_that_was_done_already_keeps_its_report(lrq, model_file, tmp_path):
    words = "quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--report", tmp_path / "report.json"
    assert lrq(*words)[0] == 0
    before = (tmp_path / "report.json").read_bytes()
    assert lrq(*words)[0] == 0
    assert (tmp_path / "report.json").read_bytes() == before
    (tmp_path / "report.json").unlink()
    assert lrq(*words)[0] == 0
    assert json.loads((tmp_path / "report.json").read_text())["already_done"]


def test_a_report_stays_whole_on_a_full_disk(lrq, model_file, tmp_path, monkeypatch, sentences):
    (tmp_path / "report.json").write_text("the one before")
    monkeypatch.setattr(
        os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    )
    code, _, (line,) = lrq(
        "quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors", "--report", tmp_path / "report.json"
    )
    assert code == 1
    sentences(line)
    assert (tmp_path / "report.json").read_text() == "the one before"
    assert not list(tmp_path.glob(".*"))


def test_quality_card_is_written_beside_the_output(lrq, model_file, tmp_path, listing):
    model_file()
    words = ("quantize", "model.safetensors", "-o", "q.safetensors", *INT8, "--quality-card")
    assert lrq(*words)[0] == 0
    assert listing() == ["model.safetensors", "q.md", "q.safetensors"]
    assert (tmp_path / "q.md").read_text(encoding="utf-8").startswith("# q\n\n* **format**: int8_tensorwise per row")
    code, out, _ = lrq(*words)
    assert code == 0
    assert "q.md is not written" in out


def test_quality_card_replaces_no_other_file_unasked(lrq, model_file, tmp_path):
    model_file()
    (tmp_path / "q.md").write_text("of another model")
    words = ("quantize", "model.safetensors", "-o", "q.safetensors", *INT8, "--quality-card")
    code, _, (*_, error) = lrq(*words)
    assert code == 1
    assert "q.md exists" in error
    assert error.endswith("q.safetensors is complete.")
    assert (tmp_path / "q.md").read_text() == "of another model"
    (tmp_path / "q.safetensors").unlink()
    assert lrq(*words, "--overwrite")[0] == 0
    assert (tmp_path / "q.md").read_text(encoding="utf-8").startswith("# q\n")
