"""What a result records: the command that repeats it."""

from learned_rounding.benchmarks.harness import environment


def test_command_leaves_out_the_file_of_the_results(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["benchmarks/kernels.py", "--quick", "--json", "/somewhere/out.json", "--only", "a"]
    )
    assert environment()["command"] == "python benchmarks/kernels.py --quick --only a"


def test_command_quotes_words_with_spaces(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks/tiny_formats.py", "--sections", "weights only"])
    assert environment()["command"] == "python benchmarks/tiny_formats.py --sections 'weights only'"
