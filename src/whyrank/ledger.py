"""What a growing file of judgments holds already."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from typing import Any

from whyrank.errors import InputError, OtherJob
from whyrank.records import Judgment
from whyrank.store import JsonlAppender, content_key

__all__ = ["Ledger"]


class Ledger:
    """Which pairs have come, and where in the growing file the judgments lie.

    Kept in a temporary database of SQLite's, which grows on disk and goes with the process: a dictionary over a million
    pairs takes hundreds of megabytes.
    """

    def __init__(self, appender: JsonlAppender[Judgment]) -> None:
        self._appender = appender
        self._has_failed = False
        self._tables = sqlite3.connect("", isolation_level=None)
        self._tables.execute("PRAGMA journal_mode = OFF")
        self._tables.execute("CREATE TABLE came (ids TEXT PRIMARY KEY, key TEXT) WITHOUT ROWID")
        self._tables.execute("CREATE TABLE held (ids TEXT PRIMARY KEY, key TEXT, place INTEGER) WITHOUT ROWID")
        self._tables.execute("CREATE INDEX by_key ON held (key)")
        self._read_places()

    def close(self) -> None:
        """Give the temporary database back."""
        self._tables.close()

    def is_first(self, ids: tuple[str, str], key: str) -> bool:
        """Note that a pair has come; whether it had not before.

        Raises:
            InputError: it had, with other texts.
        """
        before = self._one("SELECT key FROM came WHERE ids = ?", content_key(*ids))
        if before is None:
            self._tables.execute("INSERT INTO came VALUES (?, ?)", (content_key(*ids), key))
        elif before != key:
            raise InputError(f"the pair {ids} comes twice, with different texts")
        return before is None

    def holds(self, ids: tuple[str, str], key: str) -> bool:
        """Whether the file holds a judgment of the pair.

        Raises:
            OtherJob: it holds one that was made differently.
        """
        found = self._one("SELECT key FROM held WHERE ids = ?", content_key(*ids))
        if found is not None and found != key:
            here = self.read(ids)
            raise OtherJob(
                f"{self._appender.path} holds a judgment of ({here.query_id}, {here.doc_id}) by {here.model} with "
                f"{here.template} in mode {here.mode}, made from another text, model, template, mode, sampling or "
                "instruction; choose another output folder"
            )
        return found is not None

    def copy(self, ids: tuple[str, str], key: str) -> bool:
        """Append the judgment of another pair with the same texts under these ids; whether there is one."""
        place = self._one("SELECT place FROM held WHERE key = ? ORDER BY place DESC LIMIT 1", key)
        if place is not None:
            query_id, doc_id = ids
            self.append(replace(self._appender.record_at(place), query_id=query_id, doc_id=doc_id))
        return place is not None

    def append(self, judgment: Judgment) -> None:
        """Append to the file; the first time, failed judgments are dropped from it."""
        if self._has_failed:  # only now: a job that is refused must leave the file as it is
            self._appender.rewrite(kept for kept in self._appender.existing() if kept.error is None)
            self._read_places()
        self._add(judgment, self._appender.append(judgment))

    def read(self, ids: tuple[str, str]) -> Judgment:
        """The judgment of a pair, from the file."""
        return self._appender.record_at(self._one("SELECT place FROM held WHERE ids = ?", content_key(*ids)))

    def _read_places(self) -> None:
        self._has_failed = False
        self._tables.execute("DELETE FROM held")
        for place, judgment in self._appender.existing_places():
            if judgment.error is not None:
                self._has_failed = True
            else:
                self._add(judgment, place)

    def _add(self, judgment: Judgment, place: int) -> None:
        ids = content_key(judgment.query_id, judgment.doc_id)
        self._tables.execute("INSERT OR REPLACE INTO held VALUES (?, ?, ?)", (ids, judgment.key, place))

    def _one(self, question: str, value: str) -> Any:
        found = self._tables.execute(question, (value,)).fetchone()
        return None if found is None else found[0]
