"""What a person can watch while a student is trained: progress, the manifest, and TensorBoard where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from whyrank.progress import Progress
from whyrank.store import Manifest
from whyrank.training.alarms import RefineStep
from whyrank.training.board import Board
from whyrank.training.distill import Step
from whyrank.training.ranks import ranks

__all__ = ["followed"]

S = TypeVar("S", Step, RefineStep)
BOARD_NAME = "tensorboard"


@contextmanager
def followed(
    what: str, num_steps: int, out: Path, manifest: Manifest, note: Callable[[S], str], *, has_board: bool
) -> Iterator[Callable[[S], None] | None]:
    """Give what is to be called after every step; nothing in all but the first of several processes.

    The manifest is written at the first one, not earlier: a folder that is refused keeps that of its own checkpoint.

    Raises:
        MissingExtra: TensorBoard is asked for and not installed.
    """
    if not ranks().is_main:
        yield None
        return
    board = Board(out / BOARD_NAME) if has_board else None
    has_begun = False
    with Progress(what, num_steps) as progress:

        def on_step(step: S) -> None:
            nonlocal has_begun
            if not has_begun:
                manifest.write(out)
                progress.advance(step.step - 1, is_from_before=True)
                has_begun = True
            if board is not None:
                board.add(step)
            progress.advance(note=note(step))

        try:
            yield on_step
        finally:
            if board is not None:
                board.close()
