"""A recipe: stages in order, each a verb with its options, in a TOML file; and which of them are done.

Every path in a recipe is relative to its work folder, which holds all that it makes. What lies elsewhere is named under
`[paths]`, relative to the recipe. `{name}` in a text stands for a value of `[paths]` or `[values]`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError

from whyrank.errors import InputError
from whyrank.estimates import STRICT, Expected, Hardware, Price
from whyrank.store import atomic_path, read_json, sha256_file

__all__ = [
    "DONE_NAME",
    "DoneStage",
    "Recipe",
    "Stage",
    "digest",
    "files_in",
    "is_done",
    "read_done",
    "read_recipe",
    "set_aside",
    "write_done",
]

DONE_NAME = "stages.json"
NAME = re.compile(r"\{([A-Za-z_]\w*)\}")
# What a stage writes beside its results: it tells how they came to be and changes from run to run.
ACCOUNTS = ("manifest.json", "metrics.jsonl", "curves.svg")


@dataclass(frozen=True, slots=True)
class Stage:
    """One verb with its options, as the command line names them; lists are options given several times."""

    name: str
    verb: str
    options: Mapping[str, JsonValue]
    expected: Expected


@dataclass(frozen=True, slots=True)
class Recipe:
    """A file that was read, with every name in its texts replaced. `parameters` are those of models by their names, for
    estimates."""

    path: Path
    about: str
    stages: tuple[Stage, ...]
    prices: Mapping[str, Price]
    parameters: Mapping[str, float]
    hardware: Hardware | None


@dataclass(frozen=True, slots=True)
class _File:
    """A recipe as it is written."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    stages: dict[str, dict[str, JsonValue]]
    about: str = ""
    paths: dict[str, str] = field(default_factory=dict)
    values: dict[str, str | int | float] = field(default_factory=dict)
    expected: Expected = field(default_factory=Expected)
    prices: dict[str, Price] = field(default_factory=dict)
    parameters: dict[str, float] = field(default_factory=dict)
    hardware: Hardware | None = None


def read_recipe(path: Path, given: Mapping[str, str] = {}) -> Recipe:
    """Read a recipe.

    Args:
        path: a TOML file.
        given: replaces values of `[paths]` (then relative to the current folder) and of `[values]`.

    Raises:
        InputError: it is not TOML, has an unknown key, a name without a value, or no stages; or `given` has a name that
            the recipe does not.
    """
    if not path.is_file():
        raise InputError(f"expected a recipe at {path}, found {'a folder' if path.is_dir() else 'nothing'}")
    try:
        found = TypeAdapter(_File).validate_python(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except ValidationError as cause:
        raise InputError(f"{path}: {_problem(cause)}") from cause
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise InputError(f"{path}: expected TOML, found: {cause}") from cause
    if not found.stages:
        raise InputError(f"{path}: expected at least one table such as [stages.distill], found none")
    names = _names(path, found, given)
    stages = tuple(_stage(path, name, table, found.expected, names) for name, table in found.stages.items())
    prices = {_filled(path, "prices", model, names): price for model, price in found.prices.items()}
    parameters = {_filled(path, "parameters", model, names): number for model, number in found.parameters.items()}
    return Recipe(path, found.about, stages, prices, parameters, found.hardware)


def _problem(cause: ValidationError) -> str:
    problem = cause.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _names(path: Path, found: _File, given: Mapping[str, str]) -> dict[str, str]:
    """What stands for each `{name}`; a path or value that is empty has to be given."""
    twice = found.paths.keys() & found.values.keys()
    if twice:
        raise InputError(f"{path}: expected each name once, found {min(twice)!r} in [paths] and in [values]")
    strange = given.keys() - found.paths.keys() - found.values.keys()
    if strange:
        known = ", ".join([*found.paths, *found.values]) or "no names"
        raise InputError(f"{path}: it has no path or value called {min(strange)!r}; it has {known}")
    names = {name: str(value) for name, value in found.values.items()}
    names |= {name: str((path.parent / value).resolve()) if value else "" for name, value in found.paths.items()}
    for name, value in given.items():
        names[name] = str(Path(value).resolve()) if name in found.paths else value
    return names


def _stage(
    path: Path, name: str, table: Mapping[str, JsonValue], expected: Expected, names: Mapping[str, str]
) -> Stage:
    options = {key.replace("-", "_"): value for key, value in table.items() if key not in ("verb", "expected")}
    verb, changed = table.get("verb", name), table.get("expected", {})
    if not isinstance(verb, str) or not isinstance(changed, dict):
        raise InputError(f"{path}: stages.{name}: expected a text as verb and a table as expected")
    try:
        more = TypeAdapter(Expected).validate_python({**asdict(expected), **changed})
    except ValidationError as cause:
        raise InputError(f"{path}: stages.{name}.expected: {_problem(cause)}") from cause
    return Stage(name, verb, {key: _fill(path, f"{name}.{key}", value, names) for key, value in options.items()}, more)


def _fill(path: Path, key: str, value: JsonValue, names: Mapping[str, str]) -> JsonValue:
    """The value with all names in its texts replaced."""
    if isinstance(value, str):
        return _filled(path, f"stages.{key}", value, names)
    if isinstance(value, list):
        return [_fill(path, key, item, names) for item in value]
    if isinstance(value, dict):
        return {inner: _fill(path, f"{key}.{inner}", item, names) for inner, item in value.items()}
    return value


def _filled(path: Path, key: str, text: str, names: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in names:
            raise InputError(f"{path}: {key}: {{{name}}} is in neither [paths] nor [values]")
        if not names[name]:
            raise InputError(f"{path}: {key}: {name} has no value of its own; give it with --set {name}=...")
        return names[name]

    return NAME.sub(value, text)


# ---- what is done ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DoneStage:
    """A stage that ended well: its command, the digests of what it read, and the files that it left."""

    command: tuple[str, ...]
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]


def read_done(work: Path) -> dict[str, DoneStage]:
    """The stages that ended well in a work folder, by name."""
    path = work / DONE_NAME
    if not path.is_file():
        return {}
    return TypeAdapter(dict[str, DoneStage]).validate_python(read_json(path))


def write_done(work: Path, done: Mapping[str, DoneStage]) -> None:
    """Keep them in `stages.json`, whole or not at all."""
    with atomic_path(work / DONE_NAME) as temporary:
        temporary.write_text(json.dumps({name: asdict(stage) for name, stage in done.items()}, indent=2) + "\n")


def is_done(known: DoneStage | None, command: Sequence[str], inputs: Iterable[str]) -> bool:
    """Whether a stage can be left out: the same command ended well, from the same inputs, and all it left is there.

    A stage that leaves nothing is always run again. Paths are relative to the current folder.
    """
    if known is None or known.command != tuple(command) or not known.outputs:
        return False
    if not all(Path(path).is_file() for path in known.outputs):
        return False
    return dict(known.inputs) == {path: digest(Path(path)) for path in inputs}


def files_in(out: Path) -> tuple[str, ...]:
    """The files that a stage left in its folder, or as its file; hidden ones and folders are not counted."""
    if not out.is_dir():
        return (str(out),) if out.is_file() else ()
    return tuple(str(path) for path in sorted(out.iterdir()) if path.is_file() and not path.name.startswith("."))


def set_aside(folder: Path) -> Path:
    """Rename a folder to itself and the first free number: nothing that was made is thrown away."""
    free = next(name for number in count(1) if not (name := folder.with_name(f"{folder.name}.{number}")).exists())
    return folder.rename(free)


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the files in a folder and their names without what only tells how they came to be."""
    if not path.is_dir():
        return sha256_file(path)
    parts = {found.name: sha256_file(found) for found in map(Path, files_in(path)) if found.name not in ACCOUNTS}
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
