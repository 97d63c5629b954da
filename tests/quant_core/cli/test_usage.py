"""Wrong usage is one line that names what is wrong, and the closest known name."""

import pytest

from learned_rounding.quant_core.cli.usage import Parser

WRONG = [
    [],
    ["nonsense"],
    ["quantize"],
    ["quantize", "-i", "a", "--nonsense"],
    ["quantize", "-i", "a", "--manual_seed", "x"],
    ["quantize", "-i", "a", "--format", "nvfp9"],
    ["quantize", "-i", "a", "--int8", "--fp8"],
    ["quantize", "-i", "a", "--flux", "--wan"],
    ["quantize", "-i", "a", "--flux", "--preset", "none"],
    ["quantize", "-i", "a", "--simple", "--rounding", "auto"],
    ["quantize", "-i", "a", "--over"],
    ["quantize", "-i", "a", "--num_iter", "ten"],
    ["quantize", "-i", "a", "--optimizer", "adam"],
    ["quantize", "-i", "a", "--rounding", "learned"],
    ["verify"],
    ["formats", "extra"],
    ["quantise", "a"],
    ["quantize", "a", "b", "-o", "c.safetensors"],
    ["quantize", "a", "b", "-o", "c/", "--report", "r.json"],
    ["plan", "a", "--no-convrot", "--convrot", "64"],
    ["plan", "a", "--nonsense\nb"],
]


def test_wrong_usage_is_one_line_and_exits_with_2(strict_lrq, sentences, subtests):
    """Unknown options are refused, not ignored; abbreviations are unknown options."""
    for words in WRONG:
        with subtests.test(words=words):
            code, out, err = strict_lrq(*words)
            assert code == 2
            assert out == ""
            assert len(err) == 1
            sentences(err)


@pytest.fixture
def parser():
    """A parser with the command ``do`` and its options."""
    parser = Parser(prog="tool")
    commands = parser.add_subparsers(dest="command", parser_class=Parser)
    command = commands.add_parser("do")
    command.add_argument("-s", "--some_size", type=int, metavar="N")
    command.add_argument("--kind", choices=("one", "two"))
    command.add_argument("--hidden", help="==SUPPRESS==")
    return parser


def error_of(parser, capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["do", *words])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_dashes_and_underscores_are_the_same(parser):
    for option in ("--some_size", "--some-size"):
        assert parser.parse_args(["do", option, "3"]).some_size == 3
        assert parser.parse_args(["do", f"{option}=3"]).some_size == 3


def test_underscores_in_values_remain(parser):
    parser._find_command("do").add_argument("--text")
    assert parser.parse_args(["do", "--text=a_b-c"]).text == "a_b-c"


def test_closest_known_option_is_suggested(parser, capsys):
    assert "; did you mean --some_size?" in error_of(parser, capsys, "--some-sise=3")


def test_hidden_options_are_not_suggested(parser, capsys):
    assert "did you mean" not in error_of(parser, capsys, "--hiddn", "3")


def test_error_names_the_command_whose_help_to_read(parser, capsys):
    assert error_of(parser, capsys, "--kind", "three").endswith("(see tool do --help)\n")


def test_control_characters_are_escaped(parser, capsys):
    assert "--no\\nsuch\\x1b" in error_of(parser, capsys, "--no\nsuch\x1b")


def test_check_of_a_command_is_called_with_its_arguments():
    seen = []
    parser = Parser(prog="tool")
    commands = parser.add_subparsers(dest="command", parser_class=Parser)
    commands.add_parser("do", check=lambda checked, parsed: seen.append((checked.prog, parsed.command)))
    parser.parse_args(["do"])
    assert seen == [("tool do", "do")]


def test_help_shows_the_value_of_an_option_once(parser):
    assert "-s, --some_size N" in parser._find_command("do").format_help()
