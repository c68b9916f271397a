"""Reads the almanac's TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from whyrank.almanac.laws import check
from whyrank.almanac.schema import Common, Domain, Knowledge
from whyrank.errors import InputError

__all__ = ["domain_names", "load_knowledge", "names_on", "read_toml", "shelf"]

COMMON = "common"
T = TypeVar("T")


def domain_names(folder: Path | None = None) -> tuple[str, ...]:
    """The domains that the folder holds (default: the shipped one), in alphabetical order.

    Raises:
        InputError: there is no such folder.
    """
    return tuple(name for name in names_on(shelf("knowledge", folder)) if name != COMMON)


def load_knowledge(domains: Sequence[str] | None = None, *, folder: Path | None = None) -> Knowledge:
    """Read and check the knowledge.

    Args:
        domains: names of the domains to read (all by default); their order does not matter.
        folder: where `common.toml` and one TOML file per domain lie; the shipped knowledge by default.

    Raises:
        InputError: a domain does not exist, a file is not of this shape, or a law is broken (see `laws`); the
            message names file and entry.
    """
    available = domain_names(folder)
    chosen = available if domains is None else tuple(sorted(set(domains)))
    unknown = [name for name in chosen if name not in available]
    if unknown or not chosen:
        raise InputError(f"expected domains among {', '.join(available)}, found {', '.join(unknown) or 'none'}")
    source = shelf("knowledge", folder)
    common = read_toml(source, COMMON, Common)
    knowledge = Knowledge(common, tuple(read_toml(source, name, Domain) for name in chosen))
    for name, domain in zip(chosen, knowledge.domains, strict=True):
        if domain.name != name:
            raise InputError(f"{name}.toml: expected name = {name!r}, like the file, found {domain.name!r}")
    check(knowledge)
    return knowledge


def shelf(shipped: str, folder: Path | None) -> Traversable:
    """Where TOML files lie: in `folder`, or by default among the shipped ones of this name.

    Raises:
        InputError: there is no such folder.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"expected a folder of TOML files at {folder}, found none")
    return folder if folder is not None else files("whyrank") / "almanac" / shipped


def names_on(source: Traversable) -> tuple[str, ...]:
    """The names of the TOML files of a shelf, without their endings, in alphabetical order."""
    names = (entry.name for entry in source.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def read_toml(source: Traversable, name: str, kind: type[T]) -> T:
    """Read one file of a shelf.

    Raises:
        InputError: it is not there, no TOML, or not of this shape; the message names file and entry.
    """
    entry = source / f"{name}.toml"
    if not entry.is_file():
        raise InputError(f"expected a file {name}.toml in {source}, found none")
    try:
        data = tomllib.loads(entry.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise InputError(f"{name}.toml: expected TOML in UTF-8, found: {cause}") from cause
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as cause:
        problem = cause.errors(include_url=False)[0]
        raise InputError(f"{name}.toml: {_place(data, problem['loc'])}: {problem['msg']}") from cause


def _place(data: Any, location: tuple[int | str, ...]) -> str:
    """The way to a value, with entries named by their id where they have one: `mechanisms.root-rot.names`.

    Others are counted from 0."""
    names: list[str] = []
    for part in location:
        if isinstance(data, list) and isinstance(part, int):
            data = data[part]
            names.append(str(data["id"]) if isinstance(data, dict) and "id" in data else str(part))
        else:
            data = data.get(part) if isinstance(data, dict) else None
            names.append(str(part))
    return ".".join(names)
