"""Every attack is replayed against every door, and is told of in attacks/README.md."""

import time
from pathlib import Path

import pytest

from learned_rounding.attacks.cases import CANARY, CASES, PATTERNS
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.recipes import Recipe
from learned_rounding.quant_core.recipes.layers import find_rules
from learned_rounding.tests.fuzz.doors import TEXTS, bounded, refused, tried_all

README = Path(__file__).parents[2] / "attacks" / "README.md"
# What can be read all the same, and is harmless.
SOUND = {"name_path", "name_empty", "name_control", "name_long", "weights_nan", "weights_huge", "provenance_lies"}


@pytest.mark.parametrize("name", CASES)
def test_an_attack_is_refused_by_a_sentence(tmp_path, name, tried):
    file, content, _ = CASES[name]
    path = tmp_path / file
    path.write_bytes(content(tmp_path) if callable(content) else content)
    before = path.read_bytes()
    with bounded():
        said = tried_all(path)
    assert path.read_bytes() == before and not (tmp_path / CANARY).exists()
    assert any(said.values())
    if (
        name not in SOUND
        and "codes" not in name
        and "calibration" not in name
        and "scale" not in name
        and "metadata" not in name
    ):
        assert said["plan"] is not None and said["quantize"] is not None
    tried("a file from attacks/, through every door", len(said), "refused by a sentence, or harmless")


@pytest.mark.parametrize("command", ["plan -i", "inspect", "verify"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("name_")])
def test_what_is_printed_of_a_name_gives_a_terminal_no_orders(tmp_path, capsys, command, name):
    file, content, _ = CASES[name]
    path = tmp_path / file
    path.write_bytes(content(tmp_path) if callable(content) else content)
    main([*command.split(), str(path)])
    assert all(line.isprintable() for text in capsys.readouterr() for line in text.split("\n"))


@pytest.mark.parametrize("text", PATTERNS)
def test_a_pattern_cannot_hang(text, tried):
    door = TEXTS["keep pattern"]
    start = time.process_time()
    if refused(door, text) is None:
        refused(lambda rules: find_rules(rules, ["a" * 2000 + "!"]), Recipe(keep=(text,)).rules)
    assert time.process_time() - start < 2
    tried("a pattern from attacks/", 1, "refused by a sentence, or harmless")


def test_the_list_of_attacks_is_complete():
    lines = [f"* `{name}`: {what}." for name, (_, _, what) in CASES.items()]
    lines += [f"* pattern `{text if len(text) < 40 else text[:12] + '…'}`: {what}." for text, what in PATTERNS.items()]
    listed = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("* ")]
    assert listed == lines
