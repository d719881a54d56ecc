"""The plan of a sweep: a study, settings that are fixed, and axes along which settings vary.

A plan is a TOML file::

    study = "compare"
    title = "What guidance does to the gap"
    repeats = 3            # the same as seed = [0, 1, 2] among the axes

    [settings]             # of all cells
    pairs = 16

    [axes]                 # every combination of their values is a cell
    guidance = [1.0, 1.5]
    steps = [50, 250]

    [[points]]             # in place of, or beside, axes: combinations that are listed
    gate_kind = "joint"
    couplings = [0, 1]

Names and values are those of the study's options, with underscores. This module imports nothing heavy.
"""

import hashlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from experiments import studies

POINT = "point"  # the axis along which listed combinations lie
SHIPPED = Path(__file__).parents[1] / "plans"  # plans that come with the package
LONGEST = 120  # characters in the name of a cell's folder
_ENTRIES = ("study", "title", "question", "repeats", "settings", "axes", "points")


class PlanError(ValueError):
    """A plan that cannot be run as it is."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      place: its value on every axis, by name, and the settings of its point if points are listed: numbers, or words
        (the name of a network, the items of a list).
      settings: of the study.
    """

    name: str
    place: dict[str, float | str]
    settings: Any


@dataclass(frozen=True)
class Plan:
    """A study over the product of `axes` and `points`.

    Attributes:
      study: name of the study.
      settings: name -> value, the same in all cells.
      axes: name -> values, increasing or in the order in which they are shown.
      points: combinations of settings; each is crossed with the axes. None are one empty combination.
      title, question: shown on the page.
    """

    study: str
    settings: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    title: str = ""
    question: str = ""

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the result's axes, in order."""
        return (*((POINT,) if self.points else ()), *self.axes)

    def cells(self) -> list[Cell]:
        """All cells, the last axis fastest.

        Raises:
          PlanError: a setting that the study does not have, a value that it refuses, or two cells that are the same;
            the message names the cell.
        """
        config = _settings_type(self.study)
        hints = get_type_hints(config, include_extras=True)
        known = {each.name for each in fields(config)}
        varied = [*self.axes, *(name for point in self.points for name in point)]
        unknown = sorted({*self.settings, *varied} - known)
        if unknown:
            raise PlanError(f"{self.study} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        twice = sorted(set(self.axes) & (set(self.settings) | {n for p in self.points for n in p}))
        twice += sorted(set(self.settings) & {n for p in self.points for n in p})
        if twice:
            raise PlanError(f"{', '.join(twice)} is given more than once: as a setting, an axis or in a point")
        cells = []
        for place, given in self._places():
            try:
                typed = {name: typed_value(value, hints[name], name) for name, value in given.items()}
                settings = config(**typed)
            except ValueError as error:
                raise PlanError(f"{_worded(place) or 'the only cell'}: {error}") from error
            shown = {name: _scalar(name, typed[name]) for name in place}
            cells.append(Cell(_folder_name(shown), shown, settings))
        for what in ("settings", "name"):
            seen: dict[Any, Cell] = {}
            for cell in cells:
                other = seen.setdefault(getattr(cell, what), cell)
                if other is not cell:
                    raise PlanError(f"cells {other.name} and {cell.name} have the same {what}; leave one out")
        return cells

    def _places(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """What varies between cells, and all settings as they are given, of each cell."""
        for name, values in self.axes.items():
            if not values:
                raise PlanError(f"axis {name} has no values")
        for point in self.points or [{}]:
            for values in product(*self.axes.values()):
                varied = {**point, **dict(zip(self.axes, values, strict=True))}
                yield varied, {**self.settings, **varied}

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able entries, which `from_dict` reads."""
        return {name: getattr(self, name) for name in (each.name for each in fields(self))}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "Plan":
        """A plan of the entries of a TOML file.

        Raises:
          PlanError: unknown entries, or entries of another form.
        """
        unknown = sorted(set(entries) - set(_ENTRIES))
        if unknown:
            raise PlanError(f"a plan has no entry {', '.join(unknown)}; it has {', '.join(_ENTRIES)}")
        if not isinstance(entries.get("study"), str):
            raise PlanError(f"a plan needs study = NAME, one of {', '.join(studies.NAMES)}")
        forms: dict[str, type] = {"settings": dict, "axes": dict, "points": list, "title": str, "question": str}
        for name, form in forms.items():
            if not isinstance(entries.get(name, form()), form):
                raise PlanError(f"{name} of a plan must be a {'table' if form is dict else form.__name__}")
        axes = {}
        for name, values in entries.get("axes", {}).items():
            if not isinstance(values, list):
                raise PlanError(f"axis {name} must be a list of values; a single value belongs to [settings]")
            axes[name] = list(values)
        if not all(isinstance(point, dict) and point for point in entries.get("points", [])):
            raise PlanError("every [[points]] must name settings and their values")
        given: dict[str, Any] = {name: entries[name] for name in (*forms, "study") if name in entries}
        given["axes"] = axes
        return cls(**given).repeated(entries.get("repeats"))

    def repeated(self, repeats: int | None) -> "Plan":
        """The plan with an axis of so many seeds, from 0 on; unchanged for None."""
        if repeats is None:
            return self
        if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
            raise PlanError(f"repeats must be a whole number of at least 1, got {repeats!r}")
        if "seed" in self.axes:
            raise PlanError("a plan has repeats or an axis seed, not both")
        return replace(self, axes={**self.axes, "seed": list(range(repeats))})

    def with_values(self, options: Sequence[str]) -> "Plan":
        """The plan with settings of a command line: ``guidance=1,1.5`` is an axis, ``pairs=16`` fixes a setting. Items
        of a value that is a list are separated by spaces: ``couplings=0 0.5 1``. What is given here takes the place of
        the plan's own.

        Raises:
          PlanError: an option that is not of this form, or that takes all that one of several points sets.
        """
        settings, axes, given = dict(self.settings), dict(self.axes), set()
        for option in options:
            name, sign, text = option.partition("=")
            name, values = name.strip().replace("-", "_"), [part.strip() for part in text.split(",")]
            if not sign or not name or not all(values):
                raise PlanError(f"--set {option!r} is not of the form NAME=VALUE or NAME=VALUE,VALUE,...")
            given.add(name)
            settings.pop(name, None)
            found = [_literal(value) for value in values]
            if len(found) > 1:
                axes[name] = found
            else:
                axes.pop(name, None)
                settings[name] = found[0]
        points: list[dict[str, Any]] = []
        for point in self.points:
            left = {name: value for name, value in point.items() if name not in given}
            if left not in points:  # points that differed in nothing else are one
                points.append(left)
        if len(points) > 1 and {} in points:
            raise PlanError(
                f"--set {', '.join(sorted(given))} takes all that a point of the plan sets; change the plan"
            )
        return replace(self, settings=settings, axes=axes, points=[point for point in points if point])


def read_plan(source: str) -> Plan:
    """The plan of a TOML file, or a shipped one by name.

    Raises:
      PlanError: there is no such plan, or it cannot be read.
    """
    path = Path(source)
    if not path.is_file():
        shipped = {each.stem: each for each in sorted(SHIPPED.glob("*.toml"))}
        if source not in shipped:
            raise PlanError(f"there is no plan {source}; give a TOML file, or one of {', '.join(shipped)}")
        path = shipped[source]
    try:
        return Plan.from_dict(tomllib.loads(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{path} cannot be read as TOML ({error})") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def _settings_type(study: str) -> type[Any]:
    if study not in studies.NAMES:
        raise PlanError(f"there is no study {study!r}; studies are {', '.join(studies.NAMES)}")
    return studies.settings_of(study)


def _literal(text: str) -> Any:
    """A value of the command line, as TOML would have it; words need no quotes."""
    if " " in text:
        return [_literal(item) for item in text.split()]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def typed_value(value: Any, hint: Any, name: str) -> Any:
    """A plan's value as the type of a setting: lists become tuples, whole numbers become what a number or a text asks
    for, the word ``none`` becomes None.

    Raises:
      PlanError: the value is of another type.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return typed_value(value, options[0], name)
    if origin is Literal:
        if value in options:
            return value
        raise PlanError(f"{name} {value!r} is not one of {', '.join(map(str, options))}")
    if origin in (Union, UnionType):
        if NoneType in options and (value is None or value == "none"):
            return None
        reasons = []
        for option in options:
            try:
                return typed_value(value, option, name)
            except PlanError as error:
                reasons.append(str(error))
        raise PlanError(reasons[0])
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        kinds = [options[0]] * len(items) if options[-1] is Ellipsis else list(options)
        if len(kinds) != len(items):
            raise PlanError(f"{name} needs {len(kinds)} values, got {len(items)}")
        return tuple(typed_value(item, kind, name) for item, kind in zip(items, kinds, strict=True))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is NoneType:
        raise PlanError(f"{name} must be none, got {value!r}")
    if hint is float and is_number and (isinstance(value, float) or abs(value) < 2**1023):  # larger ones are no floats
        return float(value)
    if hint is int and is_number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and (isinstance(value, str) or (is_number and isinstance(value, int))):
        return str(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    kind = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", Path: "a path"}[hint]
    raise PlanError(f"{name} must be {kind}, got {value!r}")


def value_in_words(name: str, value: Any) -> str:
    """A value of a setting as cells and tables show it; weights by the name of their folder."""
    if isinstance(value, list | tuple):
        return "_".join(value_in_words(name, item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    if name == "weights":
        path = Path(str(value))
        return (path.parent if path.name == "model" and path.parent.name else path).name
    return "all" if value is None else str(value)


def _scalar(name: str, value: Any) -> float | str:
    """A typed value as a coordinate: a number, or words."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    words = value_in_words(name, value)
    return int(words) if words.isdecimal() else words


def _worded(place: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value_in_words(name, value)}" for name, value in place.items())


def _folder_name(place: Mapping[str, Any]) -> str:
    """A folder's name on any file system; long ones end with a digest."""
    name = re.sub(r"[^\w.,=+-]", "-", _worded(place)) or "only"
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name
