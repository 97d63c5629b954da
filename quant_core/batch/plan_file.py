"""Plan files: sources × recipes × outputs in TOML, checked as a whole before any work.

All paths are relative to the folder of the plan file. ::

    output = "quantized/{source}_{recipe}.safetensors"   # or a folder, with / at its end
    calibration = "flux.calib.safetensors"
    sources = ["fine-tunes/*.safetensors", "flux1-dev.safetensors"]

    [recipes.int8]
    format = "int8"

    [recipes.w4a8]
    recipe = "my_recipe.toml"
    seed = 1
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..calibration import CalibrationFile
from ..errors import CalibrationError, OutputError, QuantizationError, RecipeError, SourceError
from ..file_system import find_special_kind
from ..recipes import Recipe
from ..recipes.aliases import find_format_name
from ..recipes.option_table import OPTION_TABLE
from ..recipes.overriding import override_recipe, read_recipe, read_text
from ..recipes.toml import parse_bounded_toml
from ..run.blocks import require_model
from .output_names import OutputNames, check_template, fill_template
from .plan import BatchPlan, Group, Output
from .problems import Problems, show
from .report import find_other_file
from .source_list import PlannedSource, count_bytes, expand_all, list_files, path_key, read_sources

__all__ = ["PLAN_KEYS", "RECIPE_KEYS", "read_plan"]

# Keys of a plan, and of a recipe in it beside those of a recipe file → type of the value.
PLAN_KEYS: Mapping[str, type] = {
    "sources": list,
    "recipes": dict,
    "output": str,
    "calibration": str,
    "overwrite": bool,
    "requantize": bool,
    "general": bool,
    "device": str,
    "report": str,
    "split": bool,
}
RECIPE_KEYS: Mapping[str, type] = {"recipe": str, "calibration": str, "output": str, "sources": list}
_OPTIONS = tuple(name for options in OPTION_TABLE.values() for name in options)


@dataclass(frozen=True)
class _PlannedRecipe:
    """A table of ``recipes``; ``calibration``: empty for none, None for that of the plan, ``sources``: None for all."""

    name: str
    recipe: Recipe
    output: str | None
    calibration: str | None
    sources: frozenset[str] | None


def read_plan(path: str | os.PathLike, *, overwrite: bool = False) -> BatchPlan:
    """Read and check a plan file; nothing is written.

    Args:
        path: of the file.
        overwrite: replace outputs that were made from something else, even where the plan does not say so.

    Raises:
        QuantizationError: the first problem of the plan, with the number of all.
    """
    path = Path(path)
    if kind := find_special_kind(path):
        raise RecipeError(f"The plan {path} is {kind}; give a regular file.", file=str(path))
    try:
        values = parse_bounded_toml(read_text(path, "plan"))
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise RecipeError(f"The plan {path} is not valid TOML: {error}.", file=str(path)) from None
    problems = Problems(path)
    plan = _PlanReader(problems, values, overwrite).read()
    problems.raise_first()
    return plan


class _PlanReader:
    """Reads the tables of a plan; the result is valid if there are no problems."""

    def __init__(self, problems: Problems, values: Mapping[str, Any], overwrite: bool):
        self._problems = problems
        self._folder = problems.path.parent
        self._given = values
        self._values = problems.check_table("the plan", values, PLAN_KEYS)
        self._overwrite = overwrite or self._values.get("overwrite", False)
        self._recipe_files: list[Path] = []

    def read(self) -> BatchPlan:
        check_template(self._problems, "the plan", self._values.get("output"))
        plan = BatchPlan(
            self._problems.path, (), self._find_report(), self._values.get("device"), self._values.get("split", False)
        )
        self._check_report(plan)
        recipes = self._read_recipes()
        sources = read_sources(self._problems, self._require("sources", SourceError, "list models or patterns in it"))
        for source in sources:
            check_template(self._problems, str(source.path), source.output)
        calibrations = self._check_calibrations(sources, recipes)
        if len(self._problems):
            return plan
        for recipe in recipes:
            if not any(_recipes_of(source, [recipe]) for source in sources):
                text = f"[recipes.{show(recipe.name)}] is for none of the sources; correct its sources."
                self._problems.add(RecipeError, text, "sources")
        sources = self._leave_out(sources, recipes, (*plan.report_files, *calibrations))
        groups = tuple(group for source in sources for group in self._make_groups(source, recipes))
        names = OutputNames(self._problems, plan.report_files)
        names.add_inputs("source", (file for source in sources for file in list_files(source.path)))
        names.add_inputs("calibration", calibrations)
        names.add_inputs("recipe", self._recipe_files)
        names.add_inputs("plan", [self._problems.path])
        names.check(groups)
        return replace(plan, groups=groups)

    def _require(self, key: str, kind: type[QuantizationError], advice: str) -> Any:
        """The value of a key that every plan has; an empty one is a problem."""
        if not self._given.get(key):
            self._problems.add(kind, f"the plan has no {key}; {advice}.", key)
        return self._values.get(key) or ()

    def _check_report(self, plan: BatchPlan) -> None:
        """Add a problem if the report would replace another file."""
        other = None if self._overwrite else find_other_file(*plan.report_files)
        if other is not None:
            text = f"{other} exists and is not the report of a batch; name the report otherwise, or overwrite it."
            self._problems.add(OutputError, text, "report")

    def _find_report(self) -> Path:
        """Path of the report without a suffix; by default that of the plan."""
        given = self._values.get("report")
        path = self._folder / given if given else self._problems.path
        if path.name in ("", ".."):
            self._problems.add(OutputError, f"the report '{show(given or '')}' is a folder; give a name.", "report")
            return self._problems.path
        return path.with_suffix("") if path.suffix in (".toml", ".json", ".md") else path

    def _read_recipes(self) -> list[_PlannedRecipe]:
        tables = self._require("recipes", RecipeError, "add a table [recipes.NAME] with a format") or {}
        read = (self._read_recipe(name, table) for name, table in tables.items())
        return [recipe for recipe in read if recipe]

    def _read_recipe(self, name: str, table: object) -> _PlannedRecipe | None:
        where = f"[recipes.{show(name)}]"
        if not isinstance(table, dict):
            self._problems.add(RecipeError, f"{where} must be a table with a format, not {show(table)}.", "recipes")
            return None
        self._problems.check_name("a recipe", name)
        values = self._problems.check_table(where, table, RECIPE_KEYS, _OPTIONS)
        check_template(self._problems, where, values.get("output"))
        sources = values.get("sources")
        limited = None if sources is None else expand_all(self._problems, f"sources of {where}", sources)
        options = {key: value for key, value in values.items() if key not in RECIPE_KEYS}
        if isinstance(options.get("format"), str):
            options["format"] = find_format_name(options["format"])
        try:
            recipe = override_recipe(self._read_base(values.get("recipe")), options)
            require_model(recipe)
        except QuantizationError as error:
            self._problems.add(RecipeError, f"{where}: {error}", error.option)
            return None
        return _PlannedRecipe(name, recipe, values.get("output"), values.get("calibration"), limited)

    def _read_base(self, file: str | None) -> Recipe:
        """The recipe file of a recipe, or the default recipe."""
        if file is None:
            return Recipe()
        path = self._folder / file
        self._recipe_files.append(path)
        if kind := find_special_kind(path):
            raise RecipeError(f"The recipe {path} is {kind}; give a regular file.")
        return read_recipe(path)

    def _check_calibrations(
        self, sources: Iterable[PlannedSource], recipes: Iterable[_PlannedRecipe]
    ) -> tuple[Path, ...]:
        """All calibration files of the plan; one that cannot be opened is a problem."""
        given = (self._values.get("calibration"), *(entry.calibration for entry in (*sources, *recipes)))
        paths = tuple(self._folder / name for name in sorted({name for name in given if name}))
        for path in paths:
            if kind := find_special_kind(path):
                self._problems.add(
                    CalibrationError, f"the calibration {path} is {kind}; give a regular file.", "calibration"
                )
                continue
            try:
                CalibrationFile(path).close()
            except QuantizationError as error:
                self._problems.add(CalibrationError, f"calibration: {error}", "calibration")
        return paths

    def _leave_out(
        self, sources: list[PlannedSource], recipes: Iterable[_PlannedRecipe], others: Iterable[Path]
    ) -> list[PlannedSource]:
        """The sources without those that a pattern found and that are outputs or other files of the plan."""
        makers: dict[str, set[Path]] = {path_key(path): set() for path in (*others, *self._recipe_files)}
        for source in sources:
            for entry in _recipes_of(source, recipes):
                makers.setdefault(path_key(self._output(source, entry)), set()).add(source.path)

        def is_other(source: PlannedSource) -> bool:
            made_by = makers.get(path_key(source.path))
            return source.found and made_by is not None and made_by != {source.path}

        kept = [source for source in sources if not is_other(source)]
        if not kept:
            text = "the sources of the plan are its own outputs or calibrations; name a model."
            self._problems.add(SourceError, text, "sources")
        return kept

    def _output(self, source: PlannedSource, entry: _PlannedRecipe) -> Path:
        given = (source.output, entry.output, self._values.get("output"))
        template = next((each for each in given if each), None)
        values = {"source": source.name, "recipe": entry.name, "format": entry.recipe.format.label}
        return fill_template(template, self._folder, source.path, values)

    def _make_groups(self, source: PlannedSource, recipes: list[_PlannedRecipe]) -> Iterator[Group]:
        """One group per calibration of a source; outputs without a calibration join the first."""
        outputs: dict[str | None, list[Output]] = {}
        for entry in _recipes_of(source, recipes):
            calibration = self._calibration(source, entry)
            calibrated = calibration is not None
            try:
                entry.recipe.resolve(calibrated)
            except QuantizationError as error:
                self._problems.add(
                    RecipeError, f"[recipes.{show(entry.name)}] for {source.path}: {error}", error.option
                )
            output = Output(entry.name, entry.recipe, self._output(source, entry), calibrated, self._overwrite)
            outputs.setdefault(calibration, []).append(output)
        plain = outputs.pop(None, [])
        first = next(iter(outputs), None)
        if plain:
            order = [entry.name for entry in recipes]
            joined = (*outputs.get(first, ()), *plain)
            outputs[first] = sorted(joined, key=lambda output: order.index(output.name))
        for calibration, members in outputs.items():
            yield Group(
                source=source.path,
                name=source.name,
                outputs=tuple(members),
                calibration=None if calibration is None else self._folder / calibration,
                requantize=self._values.get("requantize", False),
                general=self._values.get("general", False),
                size=count_bytes(source.path),
            )

    def _calibration(self, source: PlannedSource, entry: _PlannedRecipe) -> str | None:
        """That of the source, else of the recipe, else of the plan; an empty one of the recipe or source is none."""
        if entry.calibration == "":
            return None
        given = (source.calibration, entry.calibration, self._values.get("calibration"))
        return next((name for name in given if name is not None), None) or None


def _recipes_of(source: PlannedSource, recipes: Iterable[_PlannedRecipe]) -> list[_PlannedRecipe]:
    return [entry for entry in recipes if entry.sources is None or path_key(source.path) in entry.sources]
