"""The argument parser of ``lrq``. Options of a recipe come from the option table."""

import argparse
import os
from pathlib import Path

from ... import kernels
from ..formats.cards import CARDS
from ..option import Option
from ..recipes.aliases import FORMAT_ALIASES, find_format_name
from ..recipes.option_table import CONVROT, OPTION_TABLE
from ..recipes.presets import ALIASES, PRESETS
from ..version import VERSION
from .usage import Parser

__all__ = ["EXIT_CODES", "SECTIONS", "is_folder", "make_parser"]

EXIT_CODES = {
    0: "done, or already done",
    1: "an error, in one sentence on stderr; verify: the file has problems",
    2: "wrong usage",
    130: "interrupted; no unfinished file remains",
    141: "the reader of the output has gone away",
}
SOURCE, RUN = "Source and target", "Run"
SECTIONS = (SOURCE, *OPTION_TABLE, RUN)  # titles of the option groups of quantize and plan

_SHORT = (*FORMAT_ALIASES, "nvfp4", "mxfp8")  # formats that are options of their own
_FILE = "a safetensors file, shards by their index.json or one of them, or a folder of either"
# Options of other tools that change nothing here, and what they ask for.
_ALWAYS = {
    "--comfy_quant": "write ComfyUI's per-layer format",
    "--save-quant-metadata": "write the format of every layer to the header",
    "--low-memory": "stream the layers from disk to disk",
}
# Options of other tools that are refused, and what to do instead.
_REFUSED = {
    "--input_scale": "an input_scale that is not measured clips activations; give a --calibration, which holds measured ones",
    "--fallback": "name those layers and their format in --layer-config",
    "--convert-fp8-scaled": "use the command lrq migrate",
}


class _Refusal(argparse.Action):
    """A known option that is refused with what to do instead."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{self.option_strings[0]} is not supported: {_REFUSED[self.option_strings[0]]}")


def make_parser() -> argparse.ArgumentParser:
    """The parser; the name of the command is in ``command``."""
    parser = Parser(
        prog="lrq",
        description="Quantize diffusion models and text encoders into files that ComfyUI loads.",
        epilog="exit codes: "
        + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
        + ". The same command resumes a run that was killed.",
    )
    parser.add_argument("--version", action="version", version=f"lrq {VERSION}", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")

    def add_command(name: str, text: str, **settings) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **settings)

    _add_quantize(
        add_command(
            "quantize",
            "quantize models, one tensor at a time",
            usage="lrq quantize FILE… [-o PATH] [OPTIONS]",
            check=_check_inputs,
        )
    )
    _add_batch(
        add_command(
            "batch", "quantize many models by many recipes, as a plan file in TOML describes; done ones are skipped"
        )
    )
    _add_plan(
        add_command(
            "plan",
            "show the decisions for the tensors of models and the sizes of the files; reads headers only",
            usage="lrq plan FILE… [OPTIONS]",
            check=_check_inputs,
        )
    )
    _add_migrate(
        add_command(
            "migrate",
            "rewrite a quantized file (old scaled FP8, misnamed scales, missing JSON, orphans) as ComfyUI reads it today; "
            "quantized values stay unchanged",
        )
    )
    for name, text in (
        ("inspect", "show the content of a file and which ComfyUI loads it"),
        ("verify", "check a quantized file layer by layer"),
    ):
        command = add_command(name, text)
        command.add_argument("file", type=Path, metavar="FILE", help=_FILE)
        _add_json(command)
    add_command("formats", "list the formats that this version writes")
    add_command("presets", "list the keep lists by model family")
    _add_bench(
        add_command("bench", "measure how long linear layers take in every format on this card, for --target_time")
    )
    for each in (parser, *commands.choices.values()):
        text = "show the Python traceback of an error"
        each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=text)
    return parser


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    groups = _add_shared(parser)
    source, run = groups[SOURCE], groups[RUN]
    source.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="file to write, or a folder, with / at its end or an existing one, for files named after their inputs; by "
        "default beside the input, named by format",
    )
    source.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an output that was made from another source or recipe; files that the run reads are never replaced",
    )
    source.add_argument(
        "--calibration", type=Path, metavar="FILE", help="activation statistics from Save Calibration, for GPTQ"
    )
    source.add_argument(
        "--report", type=Path, metavar="FILE", help="also write the report as JSON; replaces no other file of the run"
    )
    source.add_argument(
        "--quality-card",
        action="store_true",
        help="also write a quality card beside the output, named .md: model, format, size, layers and errors, for a model page",
    )
    _add_backend(run)
    run.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "plan",
        type=Path,
        metavar="PLAN",
        help="plan in TOML: sources, recipes and outputs; its paths are relative to it",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run and what is already done, and stop"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace outputs that were made from another source or recipe"
    )
    _add_verbose(parser)
    _add_json(parser)
    _add_backend(parser)
    parser.add_argument(
        "--device",
        help="cuda:1, cpu …, several with commas, or all for all GPUs, each with a process of its own; by default that of "
        "the plan, else the first GPU, else the CPU",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on a Ray cluster: auto, HOST:6379 or ray://HOST:10001; a GPU for each model, whose paths all nodes share",
    )
    parser.add_argument(
        "--split",
        action="store_true",
        help="with --ray: split the layers of one model at a time among the nodes; only this machine reads and writes",
    )


def _add_backend(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kernel_backend",
        metavar="NAME",
        choices=tuple(kernels.BACKENDS),
        help=f"kernels on a GPU: {', '.join(kernels.BACKENDS)}; torch and reference are plain PyTorch (default: auto)",
    )


def _add_verbose(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--verbose", action="store_true", help="print a line per tensor")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    run = _add_shared(parser)[RUN]
    run.add_argument("--time", action="store_true", help="also estimate the time by quantizing a layer of each shape")


def _add_json(parser: argparse._ActionsContainer) -> None:
    text = "print one JSON document to standard output, and messages to standard error"
    parser.add_argument("--json", action="store_true", help=text)


def _add_migrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--input", type=Path, required=True, help=_FILE)
    parser.add_argument("-o", "--output", type=Path, help="file to write; by default beside the input, with _native")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="source of measured input scales for FP8 layers"
    )
    parser.add_argument("--drop_input_scale", action="store_true", help="write no input_scale")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        type=Path,
        nargs="?",
        metavar="MODEL",
        help="model whose layers are measured; by default those of Flux.1",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, which --add takes on another machine")
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="add the card of another machine from its JSON, and stop"
    )
    parser.add_argument(
        "--card",
        choices=CARDS,
        metavar="SM",
        help=f"show the facts and the added times of a card, without measuring: {', '.join(CARDS)}",
    )
    parser.add_argument("--device", help="cuda, cuda:1 …; by default the first GPU")


def _add_shared(parser: argparse.ArgumentParser) -> dict[str, argparse._ArgumentGroup]:
    """Add the options that quantize and plan share; returns the groups by title."""
    groups = {title: parser.add_argument_group(title) for title in SECTIONS}
    groups[SOURCE].add_argument(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help=f"models with FP16, BF16 or FP32 weights: {_FILE}, .ckpt, .pt, .pth, .bin, or .gguf (needs the package gguf)",
    )
    groups[SOURCE].add_argument(
        "-i", "--input", type=Path, dest="inputs", action="append", metavar="FILE", help="a model; may be repeated"
    )
    groups[SOURCE].add_argument(
        "--requantize",
        action="store_true",
        help="dequantize a source that is quantized already; its error remains, a full-precision original is better",
    )
    groups[SOURCE].add_argument(
        "--general",
        action="store_true",
        help="quantize a model that no preset recognizes by the general rule, and kinds of files that ComfyUI does not load quantized",
    )
    groups[SOURCE].add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="recipe in TOML or JSON, as in the header of every file this pack wrote; other options override it",
    )
    targets = groups["Format"].add_mutually_exclusive_group()
    for title, options in OPTION_TABLE.items():
        for name, option in options.items():
            group = targets if name in ("target_size", "target_error") else groups[title]
            _ADD.get(name, _add_option)(group, name, option)
    for name in _REFUSED:
        parser.add_argument(name, nargs="?", action=_Refusal, help=argparse.SUPPRESS)
    for name, text in _ALWAYS.items():
        groups[RUN].add_argument(name, action="store_true", help=f"{text}; always on, for other tools' command lines")
    _add_verbose(groups[RUN])
    _add_json(groups[RUN])
    groups[RUN].add_argument(
        "--device",
        help="cuda, cuda:1, cpu …, several separated by commas, or all for all GPUs of one model; by default the first GPU, "
        "else the CPU",
    )
    return groups


def _add_option(group: argparse._ActionsContainer, name: str, option: Option, **settings) -> None:
    flags = option.flags or (f"--{name}",)
    settings = {"dest": name, "default": None, "help": _escape_percent(option.describe()), **settings}
    if option.kind is bool:
        group.add_argument(*flags, action="store_true", **settings)
    elif option.kind is tuple:
        settings["help"] += "; may be repeated"
        group.add_argument(*flags, action="append", metavar=option.metavar, **settings)
    else:
        choices = settings.pop("choices", None if option.metavar else option.choices or None)
        kind = settings.pop("type", option.kind)
        metavar = option.metavar or ("NAME" if choices else None)
        group.add_argument(*flags, type=kind, choices=choices, metavar=metavar, **settings)


def _add_format(group: argparse._ActionsContainer, name: str, option: Option) -> None:
    exclusive = group.add_mutually_exclusive_group()
    _add_option(exclusive, name, option, choices=option.choices, type=find_format_name)
    for alias in _SHORT:
        text = f"short for --format {alias}"
        exclusive.add_argument(f"--{alias}", action="store_const", const=alias, dest=name, help=text)


def _add_convrot(group: argparse._ActionsContainer, name: str, option: Option) -> None:
    exclusive = group.add_mutually_exclusive_group()
    _add_option(exclusive, name, option, nargs="?", const=True, type=_parse_convrot)
    exclusive.add_argument("--no-convrot", dest=name, action="store_const", const=False, help="short for --convrot off")
    group.add_argument(
        "--convrot-group-size", type=int, metavar="N", help="largest ConvRot group size, with or without --convrot"
    )


def _add_preset(group: argparse._ActionsContainer, name: str, option: Option) -> None:
    exclusive = group.add_mutually_exclusive_group()
    text = f"{option.describe()}; every preset is an option of its own too, see lrq presets"
    _add_option(exclusive, name, option, choices=None, help=text)
    for preset in {**PRESETS, **ALIASES}:
        exclusive.add_argument(f"--{preset}", action="store_const", const=preset, dest=name, help=argparse.SUPPRESS)


def _add_layer_config(group: argparse._ActionsContainer, name: str, option: Option) -> None:
    _add_option(group, name, option, help=_escape_percent(f"{option.describe()}; JSON text or a file"))
    group.add_argument(
        "--custom-layers",
        action="append",
        default=[],
        metavar="REGEX",
        help="layers that get --custom-type; may be repeated",
    )
    group.add_argument("--custom-type", metavar="FORMAT", help="format name or alias for --custom-layers")


def _add_rounding(group: argparse._ActionsContainer, name: str, option: Option) -> None:
    exclusive = group.add_mutually_exclusive_group()
    _add_option(exclusive, name, option)
    exclusive.add_argument(
        "--simple", action="store_const", const="nearest", dest=name, help="short for --rounding nearest"
    )


_ADD = {
    "format": _add_format,
    "convrot": _add_convrot,
    "preset": _add_preset,
    "layer_config": _add_layer_config,
    "rounding": _add_rounding,
}


def _escape_percent(text: str) -> str:
    return text.replace("%", "%%")  # argparse expands %(name)s


def _check_inputs(parser: Parser, parsed: argparse.Namespace) -> None:
    """Join the models of both spellings; refuse a command line without any, or with one output for several."""
    parsed.inputs = list(dict.fromkeys([*parsed.files, *(parsed.inputs or ())]))
    if not parsed.inputs:
        parser.error("name at least one FILE")
    several = len(parsed.inputs) > 1
    if several and getattr(parsed, "output", None) and not is_folder(parsed.output):
        parser.error(
            f"--output {parsed.output} is one file for {len(parsed.inputs)} models; end it with / for a folder"
        )
    if several and getattr(parsed, "report", None):
        parser.error(f"--report {parsed.report} is one file for {len(parsed.inputs)} models; use --json")


def is_folder(output: str) -> bool:
    """Whether an --output names a folder: it ends with a separator, or the folder exists."""
    return output.endswith(("/", os.sep)) or os.path.isdir(output)


def _parse_convrot(text: str) -> bool | int | str:
    return CONVROT.get(text, int(text) if text.isdecimal() else text)
