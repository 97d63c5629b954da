"""Every attack through every entry point: refused with a QuantizationError, or harmless; each is listed in attacks/README.md."""

import shutil
import time
from pathlib import Path

import pytest

from learned_rounding.attacks.cases import CANARY, CASES, PATTERNS
from learned_rounding.attacks.cases import TEXTS as TEXT_ATTACKS
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.recipes import Recipe
from learned_rounding.quant_core.recipes.layers import find_rules
from learned_rounding.tests.fuzz.entry_points import TEXTS, limit_resources, refusal, try_all

pytestmark = pytest.mark.soak

README = Path(__file__).parents[2] / "attacks" / "README.md"
# Files that the reader accepts: the attack is on later steps.
READABLE = {"name_path", "name_empty", "name_control", "weights_nan", "weights_huge", "provenance_types"}
READABLE |= {name for name in CASES if name.startswith(("config", "calibration", "scale", "metadata"))}
READABLE |= {"name_longest", "provenance_large"}


def test_hostile_file_is_refused_or_harmless(tmp_path, tried, subtests):
    for name, case in CASES.items():
        with subtests.test(name):
            folder = tmp_path / name
            folder.mkdir()
            path = case.write(folder)
            before = path.read_bytes()
            with limit_resources():
                errors = try_all(path)
            assert path.read_bytes() == before
            assert not (folder / CANARY).exists()
            assert any(errors.values())
            if name not in READABLE:
                assert errors["plan"] is not None
                assert errors["quantize"] is not None
            tried(
                "a file from attacks/, through every entry point",
                len(errors),
                "refused with an error message, or harmless",
            )
            shutil.rmtree(folder)


@pytest.mark.parametrize("command", ["plan -i", "inspect", "verify"])
def test_control_characters_in_names_are_escaped(tmp_path, capsys, command, subtests):
    for name in (name for name in CASES if name.startswith("name_")):
        with subtests.test(name):
            main([*command.split(), str(CASES[name].write(tmp_path))])
            assert all(line.isprintable() for text in capsys.readouterr() for line in text.split("\n"))


@pytest.mark.parametrize("command", ["plan -i", "inspect", "verify"])
def test_printed_text_is_bounded(tmp_path, capsys, command, subtests):
    for name in ("name_long", "name_longest", "many_tensors", "metadata_layers_many", "provenance_large"):
        with subtests.test(name):
            main([*command.split(), str(CASES[name].write(tmp_path))])
            printed = "".join(capsys.readouterr())
            assert len(printed) < 4_000_000
            assert max(map(len, printed.split("\n"))) <= 2000


def test_pattern_cannot_hang(tried, subtests):
    for text in PATTERNS:
        with subtests.test(text):
            entry_point = TEXTS["keep pattern"]
            start = time.process_time()
            if refusal(entry_point, text) is None:
                refusal(lambda rules: find_rules(rules, ["a" * 2000 + "!"]), Recipe(keep=(text,)).rules)
            assert time.process_time() - start < 2
            tried("a pattern from attacks/", 1, "refused with an error message, or harmless")


def test_hostile_text_is_refused_or_harmless(tried, subtests):
    for name, attack in TEXT_ATTACKS.items():
        with subtests.test(name):
            text = attack.make()
            with limit_resources():
                refusal(TEXTS[attack.entry_point], text)
            tried("a text from attacks/", 1, "refused with an error message, or harmless")


def test_readme_lists_every_attack():
    lines = [f"* `{name}`: {attack.purpose}." for name, attack in (CASES | TEXT_ATTACKS).items()]
    lines += [f"* pattern `{text if len(text) < 40 else text[:12] + '…'}`: {what}." for text, what in PATTERNS.items()]
    listed = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("* ")]
    assert listed == lines
