"""What kind of file this is: the rules by which readers recognise a format from its content.

The first line that is not blank decides. It starts with `<`: TREC SGML. It starts with `[`: one JSON value. It
starts with `{`: JSON lines if the line, or the one after it, is a JSON object of its own, otherwise one JSON
value. Everything else is text in columns. Which records the file holds is then read off the keys of its first
objects or the columns of its first line. A file that fits none of the formats a reader accepts is refused with
the list of those formats, and so is a file without a single record.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from whyrank.errors import InputError
from whyrank.store import LONE_SURROGATE, MEND_OR_SKIP, BadLines, open_binary, read_lines

__all__ = [
    "NUM_LOOKED_AT",
    "Layout",
    "Located",
    "distinct",
    "excerpt",
    "field_of",
    "finite",
    "first_lines",
    "id_of",
    "layout_of",
    "listed",
    "load_json",
    "named",
    "parsed",
    "read_objects",
    "reject",
    "required",
    "text_of",
    "unrecognised",
    "with_peek",
]

A = TypeVar("A")
R = TypeVar("R")
Located = tuple[str, R]
"""`("runs/bm25.txt:12", record)`: where something stood, for messages, and what it is."""

Layout = Literal["sgml", "solr", "json", "jsonl", "columns"]
SOLR_BEGINNING = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"add"\s*:')
CSV_BEGINNING = re.compile(r"[^\s,<{\[]+,\S")
NUM_LOOKED_AT = 20  # objects or lines of which one must be recognised, so that `--skip-bad` survives a bad first line
EXCERPT_LENGTH = 80  # characters


def layout_of(path: Path | str) -> Layout:
    """How the file is laid out.

    Raises:
        InputError: the file is missing, holds only blank lines, or is standard input, which cannot be looked at
            first and read afterwards.
    """
    if str(path) == "-":
        raise InputError("expected a file, found '-': its format is recognised by looking ahead. Write it to a file")
    with open_binary(path) as stream:
        if SOLR_BEGINNING.match(stream.read(4096)):
            return "solr"
    lines = [line.strip() for line in first_lines(path)[:2]]
    if not lines:
        raise InputError(f"{path}: expected records, found no line that is not blank")
    if lines[0].startswith("<"):
        return "sgml"
    if lines[0].startswith("["):
        return "json"
    if lines[0].startswith("{"):
        return "jsonl" if any(_is_object(line) for line in lines) else "json"
    return "columns"


def first_lines(path: Path | str) -> list[str]:
    """The first few lines that are neither blank nor broken."""
    return [line for _, line in islice(read_lines(path, bad=BadLines()), NUM_LOOKED_AT)]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def reject(message: str, bad: BadLines | None, cause: Exception | None = None) -> None:
    """Raise `InputError`, or count the line where `bad` is given."""
    if bad is None:
        raise InputError(f"{message}. {MEND_OR_SKIP}.") from cause
    bad.add(message)


def parsed(items: Iterable[Located[A]], parse: Callable[[A], R], bad: BadLines | None) -> Iterator[Located[R]]:
    """Apply `parse`, which raises `InputError("expected ..., found ...")`, and add the place to its message."""
    for where, item in items:
        try:
            record = parse(item)
        except InputError as cause:
            reject(f"{where}: {cause}", bad, cause)
            continue
        yield where, record


def distinct(
    items: Iterable[Located[R]],
    key: Callable[[R], Hashable],
    content: Callable[[R], Hashable],
    noun: str,
    bad: BadLines | None,
) -> Iterator[R]:
    """Each record once: a repetition with equal content is passed over, one with other content is refused."""
    seen: dict[Hashable, int] = {}  # hashes, not texts: a corpus must not be held twice
    for where, record in items:
        name, digest = key(record), hash(content(record))
        if name not in seen:
            seen[name] = digest
            yield record
        elif seen[name] != digest:
            reject(f"{where}: expected every {noun} once, found {name!r} again with other content", bad)


def required(records: Iterable[R], path: Path | str, noun: str, bad: BadLines | None) -> Iterator[R]:
    """Pass the records on; none at all is an `InputError`."""
    is_empty = True
    for record in records:
        is_empty = False
        yield record
    if is_empty:
        skipped = f" ({bad.count} bad lines were skipped, the first: {bad.examples[0]})" if bad and bad.count else ""
        raise InputError(f"{path}: expected at least one {noun}, found none{skipped}")


def no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`, which by itself keeps the last of equal keys and drops the rest."""
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise InputError(f"expected every key of an object once, found {repeated!r} twice")
    return found


def load_json(path: Path | str, hook: Callable[[list[tuple[str, Any]]], Any] = no_repeated_keys) -> Any:
    """The file as one JSON value; `hook` makes the objects.

    Raises:
        InputError: the file is not UTF-8 JSON, or an object repeats a key.
    """
    with open_binary(path) as stream:
        raw = stream.read()
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=hook)
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise InputError(f"{path}: expected one JSON value, found: {cause}") from cause
    except InputError as cause:
        raise InputError(f"{path}: {cause}") from cause


def read_objects(path: Path | str, layout: Layout, bad: BadLines | None) -> Iterator[Located[dict[str, Any]]]:
    """The objects of a JSON-lines file, of a JSON list, or the one object that the file is."""
    if layout == "json":
        value = load_json(path)
        items: Iterable[Located[Any]] = (
            ((f"{path}, item {number}", item) for number, item in enumerate(value, start=1))
            if isinstance(value, list)
            else [(str(path), value)]
        )
        yield from parsed(items, _object, bad)
    else:
        lines = ((f"{path}:{number}", line) for number, line in read_lines(path, bad=bad))
        yield from parsed(lines, _object_in, bad)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {excerpt(value)}")
    return value


def _object_in(line: str) -> dict[str, Any]:
    try:
        return _object(json.loads(line, object_pairs_hook=no_repeated_keys))
    except json.JSONDecodeError as cause:
        raise InputError(f"expected a JSON object, found {excerpt(line)} ({cause})") from cause


def with_peek(items: Iterator[R]) -> tuple[list[R], Iterator[R]]:
    """The first few items, and an iterator over all of them."""
    first = list(islice(items, NUM_LOOKED_AT))
    return first, chain(first, items)


def field_of(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of these fields that the record has.

    Raises:
        InputError: it has none of them.
    """
    for name in names:
        if name in record:
            return record[name]
    raise InputError(f"expected a field {' or '.join(map(repr, names))}, found the fields {named(record)}")


def id_of(value: Any) -> str:
    """An id as text; whole numbers become their digits.

    Raises:
        InputError: the value is neither a text that is not blank nor a whole number; or see `text_of`.
    """
    if isinstance(value, str) and value.strip():
        return text_of(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"expected an id (text or a whole number), found {excerpt(value)}")


def text_of(value: Any) -> str:
    """A text, which may be empty.

    Raises:
        InputError: the value is not a text, or holds half of a surrogate pair: JSON's escapes can spell it, but no
            tokenizer takes it and no file can hold it.
    """
    if isinstance(value, str):
        lone = LONE_SURROGATE.search(value)
        if lone:
            around = value[max(0, lone.start() - 10) : lone.end() + 10]
            raise InputError(f"expected text that UTF-8 can hold, found the lone surrogate {lone[0]!r} in {around!r}")
        return value
    raise InputError(f"expected a text, found {excerpt(value)}")


def finite(value: Any) -> float:
    """A score as float64, from a number or its digits.

    Raises:
        InputError: the value is no number, NaN or infinite.
    """
    is_foreign = isinstance(value, bool) or (isinstance(value, str) and "_" in value)  # Python reads `1_5` as 15
    try:
        number = math.nan if is_foreign else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"expected a finite number as score, found {excerpt(value)}")
    return number


def listed(value: Any) -> list[Any]:
    """A JSON list.

    Raises:
        InputError: the value is not a list.
    """
    if isinstance(value, list):
        return value
    raise InputError(f"expected a list, found {excerpt(value)}")


def named(record: Mapping[str, Any]) -> str:
    """The names of a record's fields, at most eight, for messages."""
    names = [name if len(name) <= 30 else f"{name[:30]}..." for name in islice(record, 9)]
    return ", ".join([*names[:8], "..."] if len(names) > 8 else names) or "none"


def excerpt(value: Any) -> str:
    """The beginning of a value, for messages."""
    shown = repr(value)
    return shown if len(shown) <= EXCERPT_LENGTH else f"{shown[:EXCERPT_LENGTH]}..."


def unrecognised(path: Path | str, noun: str, formats: Sequence[tuple[str, str]], found: str = "") -> InputError:
    """The error for a file that fits none of `formats`, which are `(name, example)`."""
    if not found:
        first = first_lines(path)[0]
        advice = " (comma-separated values: put tabs in place of the commas)" if CSV_BEGINNING.match(first) else ""
        found = f"a file that begins with {excerpt(first)}{advice}"
    accepted = "\n".join(f"  {name}: {example}" for name, example in formats)
    return InputError(f"{path}: expected {noun}, found {found}. Accepted formats:\n{accepted}")
