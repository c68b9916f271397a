"""Progress that people can follow: a bar on a terminal, a plain line now and then elsewhere. Always on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

__all__ = ["Progress"]

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts items of one job. `total` may be unknown."""

    def __init__(self, description: str, total: int | None = None) -> None:
        self._description = description
        self._total = total
        self._console = Console(stderr=True, markup=False, emoji=False)
        self._num_done = self._num_before = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = [
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
            ]
            self._bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
            self._bar.add_task(self._description, total=self._total)
        return self

    def advance(self, count: int = 1, note: str = "", *, is_from_before: bool = False) -> None:
        """Count `count` more items; `note` is a short remark such as the present loss.

        Those that an earlier run has done (`is_from_before`) say nothing about the time that is left.
        """
        self._num_done += count
        self._num_before += count * is_from_before
        if self._bar is not None:
            description = f"{self._description} {note}".rstrip()
            self._bar.update(self._bar.task_ids[0], advance=count, description=description)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line(note)

    def _line(self, note: str) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._start
        of_total = f"/{self._total}" if self._total is not None else ""
        left = ""
        num_new = self._num_done - self._num_before
        if self._total is not None and num_new and self._num_done < self._total:
            left = f", {elapsed * (self._total - self._num_done) / num_new:.0f} s left"
        text = f"{self._description}: {self._num_done}{of_total} in {elapsed:.0f} s{left}{'  ' + note if note else ''}"
        self._console.print(text, highlight=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._line("")
