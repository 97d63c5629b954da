"""Lines about a long task."""

import threading

from learned_rounding.hosts.ticker import Ticker


def test_news_are_printed_at_once_and_again_without_news():
    lines, first, repeated = [], threading.Event(), threading.Event()

    def out(line):
        lines.append(line.split("s  ")[1])
        first.set()
        if lines.count("second") == 3:
            repeated.set()

    with Ticker(0.01, out) as ticker:
        ticker.tell("first")
        ticker.tell(None)
        assert first.wait(60)
        ticker.tell("second")
        assert repeated.wait(60)
    assert lines[0] == "first"
    assert lines[-1] == "second"


def test_nothing_is_printed_before_the_first_news():
    lines = []
    with Ticker(0.001, lines.append) as ticker:
        ticker.tell(None)
    assert lines == []
