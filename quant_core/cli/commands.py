"""The command ``lrq``, also ``python PATH/TO/CLONE``.

Exit codes: see :data:`EXIT_CODES`.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ... import kernels
from ..calibration import CalibrationFile
from ..convert.dequantize import DecodedSource
from ..convert.migrate import migrate_file
from ..display import escape_unprintable, human_bytes
from ..errors import OutputError, QuantizationError, RecipeError
from ..events import Event, LayerFinished, LayerKept, LayerMeasured, LayerStarted, RunStarted
from ..formats import FORMATS, GRANULARITIES, with_granularity
from ..formats.detect import quantized_formats
from ..formats.scales import BLOCK_SIZE
from ..output import inspect_file, keep_apart, verify_file
from ..recipes import MEASURED, PRESETS, Recipe, recommended_format
from ..recipes.layers import parse_layer_config
from ..recipes.presets import ALIASES, AUTO, NONE
from ..rounding import OPTIONS, ROUNDINGS
from ..rounding.options import Option
from ..run.estimate import estimate_seconds, estimate_size
from ..run.quantize import output_name, quantize_file, usable_device
from ..sources import Source, open_source
from .terminal import Printed

__all__ = ["EXIT_CODES", "main", "run"]

EXIT_CODES = {
    0: "done, or done already",
    1: "an error, in one sentence on stderr; verify: the file has problems",
    2: "wrong usage",
    130: "interrupted; nothing was left behind",
    141: "whoever read the output went away",
}


class _Parser(argparse.ArgumentParser):
    """Options may be spelt with dashes or underscores, and are never abbreviated."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        spelt = {option.replace("_", "-"): option for option in self._option_string_actions}

        def known(word: str) -> str:
            option, equals, value = word.partition("=")
            return spelt.get(option.replace("_", "-"), option) + equals + value if word.startswith("--") else word

        return super().parse_known_args([known(word) for word in (sys.argv[1:] if args is None else args)], namespace)


class _ExactFormat(argparse.Action):
    """A format by its own name is taken at its word; --fp8 and --int8 only name the numbers."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.format, namespace.exact_format = values, True


# Options of other tools that ask for what is done anyway, and why.
_ALWAYS = {
    "--comfy_quant": "write ComfyUI's per-layer format",
    "--save-quant-metadata": "name every layer's format in the header",
    "--low-memory": "stream the layers from disk to disk",
}
# Options of other tools that are refused, and what to do instead.
_REFUSED = {
    "--input_scale": "an input_scale that is not measured clips a layer's inputs; give a --calibration, which holds real ones",
    "--fallback": "name those layers in --layer-config, with the format that they are to get",
    "--convert-fp8-scaled": "that is the command lrq migrate",
}


class _Refusal(argparse.Action):
    """An option that is known, and says why it is not taken."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{self.option_strings[0]} is not taken: {_REFUSED[self.option_strings[0]]}")


def _parser() -> _Parser:
    parser = _Parser(
        prog="lrq",
        description="Quantize diffusion models and text encoders into files that ComfyUI loads.",
        epilog="exit codes: "
        + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
        + ". A run that was killed is taken up by the same command.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")

    quantize = commands.add_parser(
        "quantize", help="quantize a safetensors file", description="Quantize a safetensors file, one tensor at a time."
    )
    _add_source(quantize)
    _add_recipe(quantize)
    quantize.add_argument(
        "-o", "--output", type=Path, help="file to write (default: beside the input, named after the format)"
    )
    quantize.add_argument(
        "--overwrite", action="store_true", help="replace an output that was made from something else"
    )
    quantize.add_argument(
        "--device", help="where the arithmetic runs: cuda, cuda:1, cpu … (default: the first GPU, else the CPU)"
    )
    quantize.add_argument(
        "--kernel_backend",
        choices=[*kernels.BACKENDS],
        help="how a GPU computes: auto or triton for the Triton kernels, torch or reference for plain torch (default: auto)",
    )
    quantize.add_argument(
        "--calibration", type=Path, metavar="FILE", help="statistics of the layers' inputs, for calibrated rounding"
    )
    quantize.add_argument("--report", type=Path, metavar="FILE", help="also write the report, layer by layer, as JSON")
    quantize.add_argument("--verbose", action="store_true", help="print a line per tensor instead of a progress bar")
    quantize.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    quantize.set_defaults(run=_quantize)

    plan = commands.add_parser(
        "plan", help="what would become of each tensor, and the size of it all; reads the header only"
    )
    _add_source(plan)
    _add_recipe(plan)
    plan.add_argument(
        "--time", action="store_true", help="try a layer of each shape, and say how long rounding them all will take"
    )
    plan.add_argument("--device", help="of --time: cuda, cuda:1, cpu … (default: the first GPU, else the CPU)")
    plan.set_defaults(run=_plan)

    migrate = commands.add_parser(
        "migrate",
        help="relabel a quantized file as ComfyUI reads it today",
        description="Write a quantized file (old scaled FP8, scales under a wrong name, missing JSON, orphans) as ComfyUI reads it today. "
        "Codes stay as they are.",
    )
    migrate.add_argument(
        "-i",
        "--input",
        type=Path,
        required=True,
        help="quantized safetensors file, the index.json of shards, or a folder of either",
    )
    migrate.add_argument("-o", "--output", type=Path, help="file to write (default: beside the input, with _native)")
    migrate.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    migrate.add_argument(
        "--calibration", type=Path, metavar="FILE", help="gives FP8 layers input scales that were measured"
    )
    migrate.add_argument("--drop_input_scale", action="store_true", help="leave every input_scale out")
    migrate.set_defaults(run=_migrate)

    for name, run, text in (
        ("inspect", _inspect, "what is in a file, and what stock ComfyUI does with it"),
        ("verify", _verify, "check a quantized file layer by layer"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "file", type=Path, help="a safetensors file, the index.json of shards, or a folder of either"
        )
        command.set_defaults(run=run)
    for name, run, text in (
        ("formats", _formats, "the formats this version writes"),
        ("presets", _presets, "the keep lists by model family"),
    ):
        commands.add_parser(name, help=text, description=text).set_defaults(run=run)
    for command in (parser, *commands.choices.values()):
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the Python trace of an error"
        )
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i",
        "--input",
        type=Path,
        required=True,
        help="model with fp16, bf16 or fp32 weights: a safetensors file, the index.json of shards, a folder of either, "
        ".ckpt, .pt, .pth, .bin, or .gguf (needs the package gguf), which is decoded first",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="decode a source that is quantized already by its own scales first; its error stays, the original would be better",
    )


@contextlib.contextmanager
def _source(args: argparse.Namespace):
    """The source, decoded first where that is asked for, and GGUF always."""
    with open_source(args.input) as opened:
        source = DecodedSource(opened) if args.requantize and quantized_formats(opened) else opened
        decoded = getattr(source, "layers", {})
        if decoded:
            found = ", ".join(f"{count} layers of {name}" for name, count in decoded.items())
            print(f"Decoded first, with the error that quantizing has left in them: {found}.")
        yield source


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--format",
        choices=[*FORMATS, AUTO, MEASURED],
        action=_ExactFormat,
        metavar="NAME",
        help=f"format of the quantized layers: {', '.join(FORMATS)}; {AUTO} takes what suits the card: INT8 per row with "
        f"ConvRot, or FP8; {MEASURED} chooses for each layer with a calibration (default: {Recipe.format})",
    )
    form.add_argument(
        "--fp8",
        action="store_const",
        const="float8_e4m3fn",
        dest="format",
        help="FP8, as float8_e4m3fn or, per row or block, its sibling",
    )
    form.add_argument(
        "--int8",
        action="store_const",
        const="int8_tensorwise",
        dest="format",
        help="INT8, as int8_tensorwise per row or, per block, int8_blockwise",
    )
    parser.set_defaults(exact_format=False)
    parser.add_argument(
        "--scaling_mode",
        dest="granularity",
        metavar="PER",
        help=f"what shares a scale: {', '.join(GRANULARITIES)} (default: the format's own)",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--target_size", type=float, metavar="GB", help=f"--format {MEASURED}: how large the file may be, in 10⁹ bytes"
    )
    target.add_argument(
        "--target_error",
        type=float,
        metavar="E",
        help=f"--format {MEASURED}: how large the error of the model's output may be, relative (default of both: 5%% more "
        "bytes than with every layer in 8 bits, for what hurts most)",
    )
    parser.add_argument(
        "--block_formats",
        action="store_true",
        default=None,
        help=f"--format {MEASURED}: try the block-wise formats too, which need this node pack to load",
    )
    parser.add_argument("--block_size", type=int, metavar="N", help=f"side of a block (default: {BLOCK_SIZE})")
    parser.add_argument(
        "--convrot",
        nargs="?",
        const=True,
        type=_convrot,
        metavar="GROUP",
        help="INT8 per row: rotate the inputs by Hadamard groups of 256, 64 or 16 channels, the largest that divides; "
        "GROUP sets the largest allowed, auto tries all and none",
    )
    parser.add_argument(
        "--convrot-group-size", type=int, metavar="N", help="the largest group allowed, with or without --convrot"
    )
    for name, text in _ALWAYS.items():
        parser.add_argument(
            name, action="store_true", help=f"{text}; always on, accepted because other tools ask for it"
        )
    for name in _REFUSED:
        parser.add_argument(name, nargs="?", action=_Refusal, help=argparse.SUPPRESS)
    rounding = parser.add_mutually_exclusive_group()
    rounding.add_argument("--rounding", choices=list(ROUNDINGS), help="how codes are chosen (default: auto)")
    rounding.add_argument(
        "--simple", action="store_const", const="nearest", dest="rounding", help="short for --rounding nearest"
    )
    for name, option in OPTIONS.items():
        _add_option(parser, name, option)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument(
        "--preset", metavar="NAME", help=f"keep list, see lrq presets; {AUTO} or {NONE} (default: {AUTO})"
    )
    for name, entry in {**PRESETS, **ALIASES}.items():
        preset.add_argument(
            f"--{name}", action="store_const", const=name, dest="preset", help=f"keep list for {entry.title}"
        )
    parser.add_argument(
        "--exclude-layers",
        dest="keep",
        action="append",
        metavar="REGEX",
        help="also keep tensors whose name this finds; may be repeated",
    )
    parser.add_argument(
        "--custom-layers",
        action="append",
        default=[],
        metavar="REGEX",
        help="layers that get --custom-type; may be repeated",
    )
    parser.add_argument(
        "--custom-type", metavar="FORMAT", help="format of --custom-layers: fp8, int8 or a format's name"
    )
    parser.add_argument(
        "--layer-config",
        metavar="JSON",
        help='rules for single layers, as a file or as text: {"REGEX": {"format": "int8", "convrot": true}, "REGEX": "skip"}; '
        "the most specific rule decides",
    )
    parser.add_argument("--heur", action="store_true", default=None, help="also keep layers whose shape gains little")
    parser.add_argument(
        "--full_precision_matrix_mult",
        dest="full_precision_matmul",
        action="store_true",
        default=None,
        help="ask ComfyUI to decode weights instead of multiplying in FP8",
    )
    parser.add_argument("--manual_seed", "--seed", dest="seed", type=int, help="seed of all random draws (default: 0)")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="a recipe in TOML or JSON; other options override it"
    )


def _add_option(parser: argparse.ArgumentParser, name: str, option: Option) -> None:
    acts = "any rounding" if len(option.acts) > 2 else " or ".join(option.acts)
    text = f"{acts}: {option.help}" + ("" if option.default in (None, False) else f" (default: {option.default})")
    text = text.replace("%", "%%")  # argparse would take it for a placeholder
    if option.kind is bool:
        parser.add_argument(f"--{name}", action="store_true", default=None, help=text)
    else:
        parser.add_argument(f"--{name}", type=option.kind, choices=option.choices or None, help=text)


def _convrot(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _recipe(args: argparse.Namespace) -> Recipe:
    recipe = Recipe()
    if args.recipe:
        try:
            text = args.recipe.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"The recipe {args.recipe} cannot be read: {getattr(error, 'strerror', None) or error}."
            ) from None
        recipe = (Recipe.from_json if args.recipe.suffix == ".json" else Recipe.from_toml)(text)
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Recipe)}
    given["layer_config"] = _layer_config(args)
    given = {name: value for name, value in given.items() if value is not None}
    if args.convrot_group_size is not None:
        if args.convrot is not True and args.convrot not in (None, args.convrot_group_size):
            raise RecipeError(
                f"--convrot {args.convrot} and --convrot-group-size {args.convrot_group_size} contradict each other; leave one out."
            )
        given["convrot"] = args.convrot_group_size
    if given.get("format") == AUTO:
        suits = recommended_format()
        given = {**suits.options, **given, "format": suits.format}
    if "format" in given:
        # a recipe's choices within its own format
        given = {"granularity": None, "block_size": None, "convrot": None, **given}
    if "granularity" in given and not args.exact_format:
        given["format"] = with_granularity(given.get("format", recipe.format), given["granularity"])
    return Recipe.from_dict({**recipe.to_dict(), **given})


def _layer_config(args: argparse.Namespace) -> str | None:
    """--layer-config and --custom-layers as one text; None without either."""
    if bool(args.custom_layers) != bool(args.custom_type):
        raise RecipeError("--custom-layers and --custom-type go together: the layers, and the format they get.")
    text = args.layer_config
    if file := _layer_config_file(args):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise RecipeError(
                f"The layer config {text} cannot be read: {getattr(error, 'strerror', None) or error}."
            ) from None
    if not args.custom_layers:
        return text
    given = {rule.pattern: rule.format for rule in parse_layer_config(text or "")}
    custom = dict.fromkeys(args.custom_layers, args.custom_type)
    for rule in parse_layer_config(json.dumps(custom)):
        if given.get(rule.pattern, rule.format) != rule.format:
            raise RecipeError(
                f"--custom-layers and --layer-config say different things of '{rule.pattern}'; leave one out."
            )
    return json.dumps({**json.loads(text or "{}"), **custom})


def _layer_config_file(args: argparse.Namespace) -> Path | None:
    """The file that --layer-config names; None where it is the rules themselves."""
    text = args.layer_config
    return Path(text) if text is not None and not text.lstrip().startswith("{") else None


class _Progress:
    """A tqdm bar over the layers, or a line per tensor."""

    def __init__(self, verbose: bool):
        self._verbose = verbose
        self._bar = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerMeasured) and event.index == 0:
            self._start(event.total, "measuring")
        elif isinstance(event, LayerMeasured):
            self._bar.update()
        elif isinstance(event, RunStarted):
            self.close()
            self._start(event.layers)
        elif isinstance(event, LayerStarted):
            self._bar.set_postfix_str(escape_unprintable(event.name)[-48:], refresh=False)
        elif isinstance(event, LayerFinished):
            self._bar.update()
            output = "" if event.output_error is None else f"  output error {event.output_error:.5f}"
            self._line(
                f"{event.name}  {event.shape[0]}×{event.shape[1]}  {event.format}  {event.solver}"
                f"  error {event.weight_error:.5f}{output}  {event.seconds:.2f} s"
            )
        elif isinstance(event, LayerKept):
            self._line(f"{event.name}  {'removed' if event.removed else 'kept'}: {event.reason}")

    def _start(self, layers: int, what: str | None = None) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=layers, unit="layer", desc=what, dynamic_ncols=True, disable=self._verbose)

    def _line(self, text: str) -> None:
        if self._verbose:
            print(escape_unprintable(text))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _check_report(report: Path) -> None:
    """Refuse one that could not be written, before hours are spent on what it reports."""
    folder = report.absolute().parent
    try:
        there = folder.is_dir()
        report.exists()
    except OSError as error:  # a name that no disk takes
        raise OutputError(f"The report {report} cannot be written: {error.strerror}.") from error
    if not there:
        raise OutputError(f"The report {report} cannot be written: there is no folder {folder}.")


def _quantize(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    usable_device(args.device)
    if args.report:
        _check_report(args.report)
    statistics = CalibrationFile(args.calibration) if args.calibration else contextlib.nullcontext()
    with _source(args) as source, statistics as calibration:
        method = recipe.resolve(calibration is not None)
        if args.dry_run:
            return _print_plan(args, recipe, source)
        output = args.output or output_name(args.input, recipe.label)
        texts = {"recipe": [args.recipe], "layer config": [_layer_config_file(args)]}
        keep_apart(output, texts)
        if args.report:
            keep_apart(
                args.report,
                {"source": source.paths, "output": [output], "calibration": [args.calibration], **texts},
                "report",
            )
        print(
            f"{recipe.plan(source).explanation} {args.input} → {output}, {recipe.description}, rounding {method.rounding}."
        )
        progress = _Progress(args.verbose)
        options = {"device": args.device, "overwrite": args.overwrite, "on_event": progress}
        try:
            with kernels.using(args.kernel_backend or kernels.backend()):
                report = quantize_file(source, output, recipe, calibration=calibration, **options)
        finally:
            progress.close()
    print(report.table())
    if args.report and report.already_done and args.report.exists():
        print(f"{args.report} stays as it is: this run has nothing to report.")
    elif args.report:
        try:
            report.save(args.report)
        except OSError as error:
            raise OutputError(
                f"The report {args.report} cannot be written: {error.strerror}; {output} is complete."
            ) from error
    return 0


def _plan(args: argparse.Namespace) -> int:
    usable_device(args.device)
    with _source(args) as source:
        return _print_plan(args, _recipe(args), source)


def _print_plan(args: argparse.Namespace, recipe: Recipe, source: Source) -> int:
    plan = recipe.plan(source)
    print(plan.explanation)
    for name, decision in plan.decisions.items():
        own = f"  as {recipe.of(decision).description}" if decision.format else ""
        print(
            f"{decision.action:<8}  {escape_unprintable(name)}{own}"
            + (f"  ({decision.reason})" if decision.reason else "")
        )
    if recipe.measured:
        print("Formats are chosen when the layers are measured: neither size nor time can be told before.")
        return 0
    before = sum(info.nbytes for info in source.tensors.values())
    print(f"Size: {human_bytes(before)} → {human_bytes(estimate_size(source, recipe, plan))}.")
    if getattr(args, "time", False):
        device = usable_device(args.device)
        print(
            f"Rounding will take about {estimate_seconds(source, recipe, plan, device):.3g} s on {device}, without a calibration."
        )
    return 0


def _migrate(args: argparse.Namespace) -> int:
    output = args.output or output_name(args.input, "native")
    statistics = CalibrationFile(args.calibration) if args.calibration else contextlib.nullcontext()
    with statistics as calibration:
        options = {"drop_input_scale": args.drop_input_scale, "overwrite": args.overwrite}
        done = migrate_file(args.input, output, calibration=calibration, **options)
    print(f"{args.input} → {output}")
    for name, layers in done.layers.items():
        print(f"  {name}: {layers} layers")
    for change, count in done.changes.items():
        print(f"  {change}: {count}")
    for name in done.removed:
        print(f"  removed: {escape_unprintable(name)}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    print(inspect_file(args.file))
    return 0


def _verify(args: argparse.Namespace) -> int:
    result = verify_file(args.file)
    for problem in result.problems:
        print(escape_unprintable(problem), file=sys.stderr)
    if result.problems:
        print(f"{args.file}: {len(result.problems)} problem(s) in {result.layers} quantized layers.", file=sys.stderr)
        return 1
    print(f"{args.file}: sound, {result.layers} quantized layers.")
    return 0


def _formats(args: argparse.Namespace) -> int:
    for entry in FORMATS.values():
        stock = f"stock ComfyUI {entry.stock_since} and newer loads it" if entry.stock_since else "needs this node pack"
        print(f"{entry.name}  per {' or '.join(entry.granularities)}; {stock}; {entry.note}.")
    return 0


def _presets(args: argparse.Namespace) -> int:
    for preset in PRESETS.values():
        also = f" (also {', '.join(preset.aliases)})" if preset.aliases else ""
        print(f"{preset.name}: {preset.title}{also}")
        for kind in ("keep", "remove"):
            for rule in getattr(preset, kind):
                print(f"  {kind:<6}  {rule.text}  ({rule.reason})")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    out, err = (
        Printed(sys.stdout, raises=(BrokenPipeError,)),
        Printed(sys.stderr, allowed="\n\r"),
    )  # the bar returns to where its line begins
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            try:
                code = _run(_parser().parse_args(argv))
            finally:
                out.flush()
        except BrokenPipeError:
            with open(os.devnull, "w") as nowhere:  # or Python would complain of it once more when it ends
                os.dup2(nowhere.fileno(), out.fileno())
            return 141
        if code == 0 and out.failure:
            print(
                f"lrq: the work is done, but what lrq prints cannot be written ({out.failure.strerror}); free some space there.",
                file=err,
            )
            code = 1
        err.flush()
    return code


def run() -> NoReturn:
    """The process ``lrq``. It ends as soon as :func:`main` has: neither a disk that hangs nor torch's own end keeps it."""
    os._exit(main())


def _run(args: argparse.Namespace) -> int:
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"lrq: {EXIT_CODES[130]}.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if hasattr(args, "debug"):
            traceback.print_exc()
        known = isinstance(error, QuantizationError)
        print(f"lrq: {escape_unprintable(str(error) if known else _unexpected(error))}", file=sys.stderr)
        return 1


def _unexpected(error: Exception) -> str:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"something unexpected went wrong ({what}); run again with --debug for the trace, and report it."
