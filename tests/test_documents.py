"""Tests of the documents: commands and examples run, options, nodes, paths and links exist, findings state their origin."""

import ast
import functools
import io
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import Collector
from learned_rounding.quant_core.cli import commands as cli
from learned_rounding.quant_core.cli.parser import make_parser
from learned_rounding.quant_core.recipes import FORMAT_ALIASES, PRESETS
from learned_rounding.quant_core.recipes.presets import ALIASES
from learned_rounding.quant_core.recipes.toml import tomllib
from learned_rounding.quant_core.sources import SafetensorsFile
from learned_rounding.quant_core.version import VERSION
from learned_rounding.tests.architectures import sizes
from learned_rounding.tests.nodes.probing import takes_layouts
from learned_rounding.tests.option_tables import COMMAND_LINE, HELP_PAGES, options_of, render_tables, replace_generated

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "assets", "attacks")),
]
MODEL = ROOT / "assets" / "tiny_mmdit_emoji.safetensors"
CLONE = "ComfyUI/custom_nodes/learned_rounding"  # where a clone belongs
BLOCK = re.compile(r"^```(\w+)( host)?\n(.*?)^```", re.M | re.S)
# A command in a sentence: a program and at least one argument.
INLINE = re.compile(r"`((?:lrq|python|\.venv/bin/python|make|pip|pytest)\s[^`]+)`")
CALL_PATH = re.compile(r"^\| `([\w.]+)` \| `([\w/]+\.py)` \| (\d+)–(\d+) \|", re.M)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")


def blocks(document: Path, language: str, host: bool = False) -> list[str]:
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return [text for kind, of_host, text in found if kind == language and bool(of_host) == host]


class Layers(torch.nn.ModuleList):
    """Linear layers, each applied to random activations."""

    def forward(self, generator):
        for layer in self:
            layer(torch.randn(64, layer.in_features, generator=generator))


def calibrate(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    layers = {name: torch.nn.Linear(width, out, bias=False) for name, (out, width) in shapes.items()}
    model, generator = Layers(layers.values()), torch.Generator().manual_seed(0)
    options = {"device": torch.device("cpu"), "device_bytes": 1 << 30}
    with torch.inference_mode(), Collector(layers, path.parent, **options) as collector:
        for validation in (False, True):
            with collector.watching(model, validation):
                model(generator)
        collector.sensitivities = dict.fromkeys(layers, 1.0)
        collector.save(path, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the examples of the documents use."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copy(MODEL, folder / "model.safetensors")
    shutil.copy(MODEL, folder / "in.safetensors")
    with SafetensorsFile(MODEL) as model:
        shapes = {
            name.removesuffix(".weight"): info.shape
            for name, info in model.tensors.items()
            if name.endswith(".weight") and "joint_blocks.0." in name and len(info.shape) == 2
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
    quantize_file(folder / "model.safetensors", folder / "quantized.safetensors", Recipe(format="float8_e4m3fn"))
    (folder / "plan.toml").write_text('sources = ["in.safetensors"]\n[recipes.int8]\nformat = "int8"\n')
    return folder


# Command of lrq → arguments that sentences omit.
INPUTS = {
    "quantize": ["-i", "model.safetensors"],
    "batch": ["plan.toml"],
    "plan": ["-i", "model.safetensors"],
    "migrate": ["-i", "old_fp8.safetensors"],
    "inspect": ["model.safetensors"],
    "verify": ["quantized.safetensors"],
    "formats": [],
    "presets": [],
    "bench": ["--card", "9.0"],
}
# Placeholder in a command → words that replace it.
ANY = {
    "FILE": ["model.safetensors"],
    "FILE…": ["model.safetensors"],
    "OUT": ["any.safetensors"],
    "OPTIONS": ["--int8"],
    "PLAN": ["plan.toml"],
    "PATH/TO/CLONE": [str(ROOT)],
    CLONE: [str(ROOT)],
    "COMFYUI_BASE": ["comfyui"],
    "BENCH=<name>": ["BENCH=rounding"],
}
# Scripts that run in seconds → further arguments. Others need ComfyUI, a GPU or minutes: only their options are checked.
SMALL = {
    "benchmarks/stream.py": ["--quick", "--rounds", "1", "--gb", "0.02", "--json", "stream.json"],
    "learned_rounding.benchmarks.tiny_model.place": [],
    str(ROOT): ["formats"],
}

NEEDS_HOST = {"--node"}  # options with which a script starts ComfyUI


def run(program, *words, cwd=ROOT) -> str:
    result = subprocess.run([program, *words], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def replace_placeholders(words: list[str]) -> list[str]:
    return [word for each in words for word in ANY.get(each, [each])]


def complete(words: list[str]) -> list[str]:
    """The command of lrq with the inputs that sentences omit."""
    command, *more = words
    more = [] if command == "verify" and "FILE" in more else replace_placeholders(more)
    named = any(word.endswith(".safetensors") or word in INPUTS["batch"] for word in more)
    return [command, *more, *([] if named else INPUTS[command])]


def split_script(words: list[str]) -> tuple[str, list[str]]:
    """The script or module of a command of Python, and its arguments."""
    words = replace_placeholders(words)
    return words[words[0] == "-m"], words[(words[0] == "-m") + 1 :]


def script_path(script: str) -> Path:
    if script.startswith("learned_rounding."):
        return ROOT.joinpath(*script.split(".")[1:]).with_suffix(".py")
    return ROOT / script


def targets_of_make() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


# Checks of the syntax of a command, which run nothing


def parse_lrq(words):
    if words[0] not in ("--help", "--version"):
        make_parser().parse_args(complete(words))


def parse_make(words):
    targets = [word for word in replace_placeholders(words) if "=" not in word]
    assert targets
    assert set(targets) <= targets_of_make()


def parse_python(words):
    if words[:2] == ["-m", "pip"]:
        return parse_pip(words[2:])
    script, given = split_script(words)
    if script == str(ROOT):
        return parse_lrq(given or ["formats"])
    options = {word for word in given if word.startswith("--")}
    path = script_path(script)
    assert path.exists()
    texts = [beside.read_text(encoding="utf-8") for beside in path.parent.glob("*.py")]  # some options are shared
    assert [option for option in options if not any(f'"{option}"' in text for text in texts)] == []


def parse_pip(words):
    """Check that the project, its requirements or its optional packages are installed.

    tests/hosts/test_packaging.py installs a clone, tests/nodes/test_installation.py the requirements into ComfyUI's environment.
    """
    extras = PROJECT["project"]["optional-dependencies"]
    packages = {re.match(r"[\w.-]+", line)[0] for lines in extras.values() for line in lines}
    assert words[0] == "install"
    assert {word.removeprefix(f"{CLONE}/") for word in words[1:]} <= {
        "-r",
        "requirements.txt",
        "PATH/TO/CLONE",
        "-e",
        *packages,
        *(f".[{name}]" for name in extras),
    }


def parse_git(words):
    """Check the address and the folder of a clone; tests/nodes/test_installation.py clones."""
    assert words == ["clone", PROJECT["project"]["urls"]["Repository"], CLONE]


def parse_pytest(words):
    for path in (word for word in words if word.startswith("tests/")):
        assert (ROOT / path).exists()


PARSE = {
    "lrq": parse_lrq,
    "make": parse_make,
    "python": parse_python,
    ".venv/bin/python": parse_python,
    "python_embeded/python.exe": parse_python,
    "pip": parse_pip,
    "git": parse_git,
    "pytest": parse_pytest,
}


# Runs of the commands


def run_lrq(words, _):
    if words[0] in ("--help", "--version"):
        with pytest.raises(SystemExit, match="0"):
            cli.main(words)
        return
    if "--ray" in words:  # on a cluster: tests/quant_core/batch/test_ray_run.py
        return
    assert cli.main(complete(words)) == 0


def run_make(words, _):
    """Dry run. The targets themselves run pytest, or scripts that are checked as commands of their own."""
    run("make", "--dry-run", *replace_placeholders(words))


@functools.cache
def help_of(script: str) -> str:
    module = ["-m"] if script.startswith("learned_rounding.") else []
    return run(sys.executable, *module, script if module else str(ROOT / script), "--help")


def run_python(words, folder):
    """Run the script in the folder of the examples if it is in SMALL; else check that its help lists every given option."""
    if words[:2] == ["-m", "pip"]:
        return
    script, given = split_script(words)
    if script == str(ROOT) and given:
        return run_lrq(given, folder)
    if script in SMALL and not NEEDS_HOST & set(given):
        module = ["-m", script] if script.startswith("learned_rounding.") else [str(ROOT / script)]
        run(sys.executable, *module, *given, *SMALL[script], cwd=folder)
    else:
        known = help_of(script)
        assert known.startswith("usage: ")
        assert [word for word in given if word.startswith("--") and word not in known] == []


def run_pytest(words, _):
    """Check that the command collects tests; without a path, those of one module."""
    paths = [] if any(word.startswith("tests/") for word in words) else ["tests/test_evidence.py"]
    collected = run(str(Path(sys.executable).with_name("pytest")), "--collect-only", "-q", *words, *paths)
    assert "no tests collected" not in collected


RUN = {
    "lrq": run_lrq,
    "make": run_make,
    "python": run_python,
    ".venv/bin/python": run_python,
    "python_embeded/python.exe": run_python,
    "pytest": run_pytest,
}


def commands(document: Path) -> list[str]:
    """Lines of the shell blocks (of Windows with slashes) and commands in the sentences of a document, without repetition."""
    text = document.read_text(encoding="utf-8")
    shell = blocks(document, "sh") + [block.replace("\\", "/") for block in blocks(document, "bat")]
    lines = [line for block in shell for line in block.splitlines() if line.strip()]
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return list(dict.fromkeys([*lines, *(" ".join(line.split()) for line in INLINE.findall(sentences))]))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_commands_are_understood(subtests):
    """Commands of lrq by the parser, targets of make, scripts and their options, addresses and packages."""
    for path in DOCUMENTS:
        for line in commands(path):
            with subtests.test(name_of(path), line=line):
                program, *words = shlex.split(line, comments=True)
                PARSE[program](words)


@pytest.mark.soak
@pytest.mark.parametrize("program", ["lrq", "make", "python", "pytest"])
def test_commands_run(folder, monkeypatch, capsys, program, subtests):
    """Each command once, in the order of the documents."""
    monkeypatch.chdir(folder)
    run_examples(ROOT / "docs" / "integration.md", limit=1)  # writes by_hand.safetensors
    for line in dict.fromkeys(line for path in DOCUMENTS for line in commands(path)):
        first, *words = shlex.split(line, comments=True)
        if RUN.get(first) is RUN[program]:
            with subtests.test(line):
                RUN[first](words, folder)


def run_examples(document: Path, limit: int | None = None, **names) -> dict:
    """Execute the Python blocks of a document in one namespace, and return it."""
    names["__name__"] = "example"
    with redirect_stdout(io.StringIO()):
        for text in blocks(document, "python")[:limit]:
            exec(compile(text, document.name, "exec"), names)
    return names


@pytest.mark.soak
@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path, "python")], ids=lambda path: path.stem)
def test_every_example_runs(folder, monkeypatch, document):
    monkeypatch.chdir(folder)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    run_examples(document, weight=weight, H=torch.eye(64))  # names that the example of the library uses


@pytest.mark.usefixtures("in_comfyui")
def test_host_examples_run_in_comfyui(host, folder, monkeypatch):
    if not takes_layouts(host):
        pytest.skip("this ComfyUI has no layouts of comfy-kitchen")
    monkeypatch.chdir(folder)
    document = ROOT / "docs" / "integration.md"
    layers = run_examples(document, limit=1)["layers"]
    file = folder / "by_hand.safetensors"
    with SafetensorsFile(file) as stored:
        count = sum(name.endswith(".comfy_quant") for name in stored.tensors)
    names = {"__name__": "example", "example_file": str(file), "example_layers": count}
    exec(compile("\n".join(blocks(document, "python", host=True)), document.name, "exec"), names)
    assert len(names["layers"]) == len(layers)


def test_the_manual_names_every_option_and_command():
    text = COMMAND_LINE.read_text(encoding="utf-8")
    (commands,) = (action.choices for action in make_parser()._actions if getattr(action, "choices", None))
    hidden = {f"--{name}" for name in (*PRESETS, *ALIASES, *FORMAT_ALIASES)} - {"--int8", "--fp8"}
    for name, parser in commands.items():
        assert f"`lrq {name}" in text
        missing = {option for option in set(options_of(parser)) - hidden if f"`{option}`" not in text}
        assert not missing, f"lrq {name}: {missing}"


def test_generated_parts_are_those_of_today(subtests):
    """Option tables and titles of nodes, by python tests/option_tables.py (make texts)."""
    for path in DOCUMENTS:
        with subtests.test(name_of(path)):
            text = path.read_text(encoding="utf-8")
            assert replace_generated(text) == text


def test_manual_has_the_option_tables():
    assert "`--rounding`" in render_tables()
    assert render_tables() in COMMAND_LINE.read_text(encoding="utf-8")


def test_sizes_of_models_are_those_of_today():
    """By python tests/architectures/sizes.py (make architectures)."""
    text = sizes.DOCUMENT.read_text(encoding="utf-8")
    assert "<!-- model sizes -->" in text
    assert sizes.replace_table(text) == text


def test_only_one_document_has_the_sizes_of_models():
    marked = [path for path in DOCUMENTS if "<!-- model sizes -->" in path.read_text(encoding="utf-8")]
    assert marked == [sizes.DOCUMENT]


def test_the_manual_says_which_options_one_command_lacks():
    text = " ".join(COMMAND_LINE.read_text(encoding="utf-8").split())
    (commands,) = (action.choices for action in make_parser()._actions if getattr(action, "choices", None))
    quantize, plan = (set(options_of(commands[name])) for name in ("quantize", "plan"))
    named = re.search(
        r"Both take all of them, but for (.*?), which only `lrq quantize` has, and (.*?), which only `lrq plan` has",
        text,
    ).groups()
    for lacking, said in zip((quantize - plan - {"-o"}, plan - quantize), named, strict=True):
        assert set(re.findall(r"`(--[\w-]+)`", said)) == lacking


def test_the_manual_names_every_node():
    text = (ROOT / "docs" / "quantize.md").read_text(encoding="utf-8")
    for path in HELP_PAGES.glob("*.md"):
        assert f"[{path.read_text(encoding='utf-8').splitlines()[0][2:]}](../web/docs/{path.name})" in text


def linked_files(document: Path) -> set[Path]:
    """Files and folders that a document links to or shows."""
    targets = (target for target, _ in LINK.findall(document.read_text(encoding="utf-8")))
    return {(document.parent / target).resolve() for target in targets if target and not target.startswith("http")}


def test_the_index_names_every_document_of_the_folder():
    index = ROOT / "docs" / "README.md"
    assert set((ROOT / "docs").glob("*.md")) <= linked_files(index) | {index}


def test_the_manual_of_version_0_1_0_leads_to_the_new_pages():
    """Its headings are linked from elsewhere."""
    manual = ROOT / "MANUAL.md"
    headings = """nodes command-line options-of-lrq-quantize-and-lrq-plan which-format-on-which-card recipes-by-model
    rules-for-single-layers when-something-is-wrong sequential-rounding"""
    assert set(headings.split()) <= anchors(manual)
    sections = re.split(r"^##+ .*$", manual.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert all("](docs/" in section for section in sections)


def test_the_changelog_starts_with_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d+\.\d+\.\d+)", changes, re.M)[0] == VERSION


def test_every_image_is_used():
    """Shown by a document or a help page, the thumbnail of an example, the icon or banner of the registry, or its drawing."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    images = {ROOT / name for name in listed.split("\0") if Path(name).suffix in (".png", ".jpg", ".svg")}
    pages = [*DOCUMENTS, *HELP_PAGES.rglob("*.md")]
    used = set().union(*map(linked_files, pages))
    used |= {path.with_suffix(".jpg") for path in (ROOT / "example_workflows").glob("*.json")}
    names = {Path(url).name for key, url in PROJECT["tool"]["comfy"].items() if key in ("Icon", "Banner")}
    used |= {ROOT / "assets" / name for name in names}
    used |= {path.with_suffix(".svg") for path in used if path.parent == ROOT / "assets"}
    assert {str(path.relative_to(ROOT)) for path in images - used} == set()


def test_findings_state_command_device_and_date():
    """Or refers to the finding above it, or states that it was measured by hand."""
    findings = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8").split("\n* ")[1:]
    assert len(findings) > 8
    for finding in findings:
        assert "(The same run.)" in finding or (
            re.search(r"\b2\d{3}-\d\d-\d\d", finding)
            and re.search(r"\bH[12]00\b|\bCPU\b", finding)
            and re.search("`python benchmarks/|by hand", finding)
        ), finding


def function_lines(path: Path) -> dict[str, tuple[int, int]]:
    """Qualified name → first and last line of every function and method of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners = [("", tree), *((f"{node.name}.", node) for node in tree.body if isinstance(node, ast.ClassDef))]
    return {
        prefix + node.name: (node.lineno, node.end_lineno or node.lineno)
        for prefix, owner in owners
        for node in owner.body
        if isinstance(node, ast.FunctionDef)
    }


def test_call_path_states_the_lines_of_its_functions():
    rows = CALL_PATH.findall((ROOT / "DEVELOPMENT.md").read_text(encoding="utf-8"))
    assert len(rows) > 5
    stated = [(function, path, int(first), int(last)) for function, path, first, last in rows]
    assert stated == [(function, path, *function_lines(ROOT / path)[function]) for function, path, *_ in rows]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_link_targets_exist(subtests):
    for path in DOCUMENTS:
        for target, anchor in LINK.findall(path.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            with subtests.test(name_of(path), target=target, anchor=anchor):
                file = path.parent / target if target else path
                assert file.exists()
                assert not anchor or anchor in anchors(file)


def test_paths_in_the_documents_exist():
    """Paths of files and folders of this repository, in backticks."""
    tops = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")))
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in DOCUMENTS
        for name in re.findall(rf"`((?:{tops})/[\w./*-]+)`", path.read_text(encoding="utf-8"))
        if not any(ROOT.glob(name.rstrip("/")))
    ]
    assert missing == []
