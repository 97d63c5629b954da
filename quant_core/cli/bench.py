"""The command ``lrq bench``: times of linear layers on this machine's card, for the target time of format measured."""

import argparse
import json

from ..display import escape_control
from ..errors import QuantizationError
from ..run.card_bench import FLUX_SHAPES, describe_card, find_shapes, measure_card, summarize_card
from ..run.card_times import CardTimes, add_card, find_card, present_card
from ..sources import open_source
from ..workers import usable_device
from .streams import print_line

__all__ = ["bench"]


def bench(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.add:
        times = add_card(args.add)
        print_line(f"Added {escape_control(times.card)}, SM {times.capability}: {len(times.times)} times of layers.")
        return 0
    times = _find_known(args.card, args.device) if args.card else _measure(args)
    text = json.dumps(summarize_card(times), indent=1, ensure_ascii=False) if args.json else describe_card(times)
    print_line(escape_control(text, allowed="\n"))
    return 0


def _find_known(card: str, device: str | None) -> CardTimes:
    """Facts of a card, and its times where it is this machine's or was added; nothing is measured."""
    known = find_card(card, usable_device(device), measure=False)
    return known or CardTimes(card="", capability=card, versions={})


def _measure(args: argparse.Namespace) -> CardTimes:
    device = usable_device(args.device)
    if device.type != "cuda":
        raise QuantizationError(
            "Layers are measured on a GPU, and there is none here; --card shows the facts of another card."
        )
    shapes = FLUX_SHAPES
    if args.input:
        with open_source(args.input) as source:
            shapes = find_shapes(source)
    times = present_card(device)
    measure_card(times, shapes)
    return times
