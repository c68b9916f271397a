"""The documents of one query, from a file or from standard input."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from shutil import copyfileobj
from sys import stdin
from tempfile import NamedTemporaryFile

from whyrank.datasets import read_corpus
from whyrank.errors import InputError
from whyrank.records import Document
from whyrank.stages import warn_of_bad_lines
from whyrank.store import BadLines

__all__ = ["read_documents"]


def read_documents(path: Path, fields: Mapping[str, str], *, limit: int | None, skip_bad: bool) -> list[Document]:
    """The first `limit` documents; of standard input where `path` is `-`.

    Raises:
        InputError: it does not hold documents, or a line is malformed and `skip_bad` is not set.
    """
    if str(path) != "-":
        return _read(path, str(path), fields, limit=limit, skip_bad=skip_bad)
    with NamedTemporaryFile(prefix="whyrank-") as spool:  # readers look ahead
        copyfileobj(stdin.buffer, spool)
        spool.flush()
        return _read(Path(spool.name), "standard input", fields, limit=limit, skip_bad=skip_bad)


def _read(path: Path, name: str, fields: Mapping[str, str], *, limit: int | None, skip_bad: bool) -> list[Document]:
    bad = BadLines() if skip_bad else None
    try:
        found = list(islice(read_corpus(path, fields=fields, bad=bad), limit))
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from error
    if bad is not None:
        bad.examples = [example.replace(str(path), name) for example in bad.examples]
    warn_of_bad_lines(bad)
    return found
