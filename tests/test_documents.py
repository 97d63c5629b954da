"""What the documents say is there and runs: every command, every example, every option and node, every link."""

import io
import re
import shlex
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import cli
from learned_rounding.quant_core.calibration import Collector
from learned_rounding.quant_core.checkpoints import SafetensorsFile
from learned_rounding.quant_core.recipes.toml import tomllib
from learned_rounding.tests.nodes.probing import in_process, takes_layouts

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "docs" / "integration.md"]
MODEL = ROOT / "assets" / "tiny_mmdit_emoji.safetensors"
BLOCK = re.compile(r"^```(\w+)( host)?\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")


def blocks(document: Path, language: str, host: bool = False) -> list[str]:
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return [text for kind, of_host, text in found if kind == language and bool(of_host) == host]


class Layers(torch.nn.ModuleList):
    """Linear layers, each of which is given random inputs."""

    def forward(self, generator):
        for layer in self:
            layer(torch.randn(64, layer.in_features, generator=generator))


def calibrate(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    layers = {name: torch.nn.Linear(width, out, bias=False) for name, (out, width) in shapes.items()}
    model, generator = Layers(layers.values()), torch.Generator().manual_seed(0)
    options = {"device": torch.device("cpu"), "device_bytes": 1 << 30}
    with torch.inference_mode(), Collector(layers, path.parent, **options) as collector:
        for hold_out in (False, True):
            with collector.watching(model, hold_out):
                model(generator)
        collector.sensitivity = dict.fromkeys(layers, 1.0)
        collector.save(path, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the documents' examples name."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copy(MODEL, folder / "model.safetensors")
    shutil.copy(MODEL, folder / "in.safetensors")
    with SafetensorsFile(MODEL) as model:
        shapes = {
            name.removesuffix(".weight"): info.shape
            for name, info in model.tensors.items()
            if name.endswith(".weight") and "joint_blocks" in name and len(info.shape) == 2
        }
    calibrate(folder / "model.calib.safetensors", shapes)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator)
    old = {
        "blocks.0.mlp.weight": (weight * 100).to(torch.float8_e4m3fn),
        "blocks.0.mlp.scale_weight": torch.tensor(0.01),
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
    }
    save_file(old, folder / "old_fp8.safetensors")
    return folder


def lrq(words, _):
    assert cli.main(words) == 0


def make(words, _):
    """The targets exist; what they do is run by other tests and by everyone who runs the tests."""
    targets = [word for word in words if "=" not in word]
    result = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert targets and result.returncode == 0, result.stderr


def python(words, _):
    script = words[0]
    if script == "-m":
        assert words[1].startswith("learned_rounding.")
        script = words[1].removeprefix("learned_rounding.").replace(".", "/") + ".py"
    assert (ROOT / script).is_file()


def pip(words, _):
    """What is asked to be installed is the project, what it needs, or what it offers."""
    offered = {"PATH/TO/CLONE", "-e"} | {line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines}
    names = {re.match(r"[\w./-]+", line)[0] for line in offered}
    assert words[0] == "install"
    assert words[1:] == ["-r", "requirements.txt"] or {re.sub(r"\[\w+\]", "", word) for word in words[1:]} <= names


RUN = {"lrq": lrq, "make": make, "python": python, ".venv/bin/python": python, "pip": pip}
COMMANDS = [(path, line) for path in DOCUMENTS for block in blocks(path, "sh") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize(("path", "line"), COMMANDS, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_every_command_runs(folder, monkeypatch, capsys, path, line):
    monkeypatch.chdir(folder)
    if "by_hand.safetensors" in line:
        run_examples(ROOT / "docs" / "integration.md", limit=1)
    words = shlex.split(line, comments=True)
    RUN[words[0]](words[1:], path)


def run_examples(document: Path, limit: int | None = None, **names) -> dict:
    """The document's Python, one after the other, as a reader would paste it; returns the names it leaves."""
    names["__name__"] = "example"
    with redirect_stdout(io.StringIO()):
        for text in blocks(document, "python")[:limit]:
            exec(compile(text, document.name, "exec"), names)
    return names


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path, "python")], ids=lambda path: path.stem)
def test_every_example_runs(folder, monkeypatch, document):
    monkeypatch.chdir(folder)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    run_examples(document, weight=weight, H=torch.eye(64))  # a matrix and a Gram, as the reader of README has


def test_the_examples_for_comfyui_run_in_it(host, folder, monkeypatch, tmp_path):
    if not takes_layouts(host):
        pytest.skip("this ComfyUI keeps its quantized layers otherwise")
    monkeypatch.chdir(folder)
    layers = run_examples(ROOT / "docs" / "integration.md", limit=1)["layers"]
    (tmp_path / "example.py").write_text("\n".join(blocks(ROOT / "docs" / "integration.md", "python", host=True)))
    shutil.copy(folder / "by_hand.safetensors", tmp_path)
    assert in_process(host, tmp_path, "document") == {"layers": len(layers)}


def options(parser) -> set[str]:
    return {string for action in parser._actions for string in action.option_strings if string not in ("-h", "--help")}


def test_the_manual_names_every_option_and_command():
    text = (ROOT / "MANUAL.md").read_text(encoding="utf-8")
    (commands,) = (action.choices for action in cli._parser()._actions if getattr(action, "choices", None))
    presets = {f"--{name}" for name in (*cli.PRESETS, *cli.ALIASES)}
    for name, parser in commands.items():
        assert f"`lrq {name}" in text
        missing = {option for option in options(parser) - presets if f"`{option}`" not in text}
        assert not missing, f"lrq {name}: {missing}"


def test_the_manual_names_every_node():
    text = (ROOT / "MANUAL.md").read_text(encoding="utf-8")
    for path in (ROOT / "web" / "docs").glob("*.md"):
        assert f"[{path.read_text(encoding='utf-8').splitlines()[0][2:]}](web/docs/{path.name})" in text


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "benchmarks" / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_paths_in_the_documents_exist():
    """Names of files and folders of this repository, in backticks."""
    tops = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")))
    for path in DOCUMENTS:
        for name in re.findall(rf"`((?:{tops})/[\w./*-]+)`", path.read_text(encoding="utf-8")):
            assert any(ROOT.glob(name.rstrip("/"))), f"{path.name}: {name}"
