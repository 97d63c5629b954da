"""The commands besides quantize and plan, and the command as users start it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

import learned_rounding
from learned_rounding.quant_core import FORMATS, PRESETS
from learned_rounding.quant_core.output import verify_file
from learned_rounding.tests.system import needs_symlinks

from .reading import error_lines

ROOT = Path(learned_rounding.__file__).parent


def test_migrate_prints_the_changes_and_replaces_no_file_unasked(lrq, tmp_path, sentences):
    old = tmp_path / "old.safetensors"
    save_file({"a.weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "a.scale_weight": torch.tensor(0.5)}, old)
    code, out, _ = lrq("migrate", "-i", old)
    assert code == 0
    assert verify_file(tmp_path / "old_native.safetensors").layers == 1
    sentences(out)
    code, _, err = lrq("migrate", "-i", old)
    assert code == 1
    sentences(err)
    assert lrq("migrate", "-i", old, "--overwrite")[0] == 0


def test_migrate_refuses_a_file_whose_provenance_cannot_be_read(lrq, tmp_path, listing, sentences):
    """It would be copied, and neither inspect nor verify would read the new file."""
    old = {"a.weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "a.scale_weight": torch.tensor(0.5)}
    save_file(old, tmp_path / "old.safetensors", {"learned_rounding": "null"})
    code, _, err = lrq("migrate", "-i", "old.safetensors")
    assert code == 1
    sentences(err)
    assert listing() == ["old.safetensors"]


def test_shards_of_a_quantized_model(lrq, model_file, tmp_path, sentences):
    """inspect, verify and migrate take an index or a folder as plan does."""
    lrq("quantize", "-i", model_file(), "-o", tmp_path / "one.safetensors", "--int8", "--simple")
    tensors, folder = load_file(tmp_path / "one.safetensors"), tmp_path / "parts"
    folder.mkdir()
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        metadata = file.metadata()
    places = {}
    for number in (1, 2):
        half = dict(list(tensors.items())[number - 1 :: 2])
        save_file(half, folder / f"model-{number}.safetensors", metadata)
        places |= dict.fromkeys(half, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for given in (folder, folder / "model.safetensors.index.json"):
        assert lrq("verify", given)[1] == lrq("verify", tmp_path / "one.safetensors")[1].replace(
            str(tmp_path / "one.safetensors"), str(given)
        )
        sentences(lrq("inspect", given)[1])
        assert lrq("migrate", "-i", given, "-o", tmp_path / "new.safetensors", "--overwrite")[0] == 0
        assert lrq("verify", tmp_path / "new.safetensors")[0] == 0
        made = load((tmp_path / "new.safetensors").read_bytes())  # not mapped: Windows replaces no mapped file
        assert made.keys() == tensors.keys()
        assert all(torch.equal(made[name], tensors[name]) for name in tensors)
    assert lrq("migrate", "-i", folder)[0] == 0
    assert (tmp_path / "parts_native.safetensors").exists()


def test_inspect(lrq, model_file, tmp_path, sentences):
    source = model_file()
    code, out, err = lrq("inspect", source)
    assert code == 0
    assert err == []
    sentences(out)
    lrq("quantize", "-i", source, "-o", tmp_path / "q.safetensors", "--int8")
    sentences(lrq("inspect", tmp_path / "q.safetensors")[1])
    lrq("quantize", "-i", source, "-o", tmp_path / "r.safetensors", "--int8", "--convrot", "--scaling_mode", "row")
    sentences(lrq("inspect", tmp_path / "r.safetensors")[1])
    lrq("quantize", "-i", source, "-o", tmp_path / "b.safetensors", "--int8", "--scaling_mode", "block")
    sentences(lrq("inspect", tmp_path / "b.safetensors")[1])


def test_verify_prints_notes_on_a_valid_file(lrq, tmp_path, sentences):
    save_file({"a\x1b.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    code, out, err = lrq("verify", tmp_path / "a.safetensors")
    assert code == 0
    assert err == []
    sentences(out)


def test_verify(lrq, model_file, tmp_path, sentences):
    lrq("quantize", "-i", model_file(), "-o", tmp_path / "q.safetensors")
    code, out, err = lrq("verify", tmp_path / "q.safetensors")
    assert code == 0
    assert err == []
    sentences(out)
    tensors = load_file(tmp_path / "q.safetensors")
    tensors["blocks.0.mlp.0.weight_scale"] = torch.tensor(float("nan"))
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "bad.safetensors", file.metadata())
    code, out, err = lrq("verify", tmp_path / "bad.safetensors")
    assert code == 1
    assert out == ""
    sentences(err)


def test_formats_lists_all_formats(lrq):
    code, out, _ = lrq("formats")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(FORMATS)


def test_presets_lists_all_presets_with_their_titles(lrq):
    code, out, _ = lrq("presets")
    assert code == 0
    assert [name for name, preset in PRESETS.items() if f"{name}: {preset.title}" not in out] == []


# As users start it


def run(command: list, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.soak
def test_the_process_waits_for_no_thread_that_hangs(tmp_path):
    code = (
        "import sys, threading; from learned_rounding.quant_core import cli; "
        "threading.Thread(target=threading.Event().wait).start(); cli.run()"
    )
    result = run([sys.executable, "-c", code, "formats"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "int8_blockwise" in result.stdout


@pytest.mark.soak
def test_a_clone_under_another_name_runs_from_anywhere(model_file, tmp_path, listing):
    """A copy, with a version of its own: nothing of an installed package may answer in its place."""
    clone = tmp_path / "custom_nodes" / "ComfyUI-Learned-Rounding"
    clone.mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / name, clone / name)
    for name in ("quant_core", "kernels"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "quant_core" / "version.py").write_text('VERSION = "9.8.7"\n')
    (clone / "nodes").mkdir()
    (clone / "nodes" / "__init__.py").write_text("raise ImportError('the command line needs no nodes')")
    work = tmp_path / "work"
    work.mkdir()
    model_file().rename(work / "model.safetensors")
    result = run([sys.executable, clone, "quantize", "-i", "model.safetensors", "--int8", "--general"], work)
    assert result.returncode == 0, result.stderr
    assert error_lines(result.stderr) == []
    assert verify_file(work / "model_int8_convrot.safetensors").problems == []
    with safe_open(work / "model_int8_convrot.safetensors", "pt") as file:
        assert json.loads(file.metadata()["learned_rounding"])["version"] == "9.8.7"
    assert [name for name in listing() if name.startswith("work/")] == [
        "work/model.safetensors",
        "work/model_int8_convrot.safetensors",
    ]


@needs_symlinks
def test_a_link_to_the_folder_runs_and_an_error_has_no_trace(tmp_path, sentences):
    link = tmp_path / "ComfyUI-Learned-Rounding"
    link.symlink_to(ROOT, target_is_directory=True)
    result = run([sys.executable, link, "verify", "none.safetensors"], tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    sentences(result.stderr)


@pytest.mark.soak
def test_the_installed_command_runs(tmp_path):
    command = Path(sys.executable).with_name("lrq")
    if not command.exists():
        pytest.skip("the package is not installed beside this interpreter")
    result = run([command, "formats"], tmp_path)
    assert result.returncode == 0
    assert "float8_e4m3fn" in result.stdout
