"""The curves of a training for TensorBoard, beside `metrics.jsonl`, which stays what counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whyrank.errors import require
from whyrank.training.alarms import RefineStep
from whyrank.training.distill import Step

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Board", "scalars"]


class Board:
    """Event files in a folder, one scalar for every number of a step.

    A training that resumes hides what an earlier process wrote of the same and later steps.

    Args:
        folder: for the event files.

    Raises:
        MissingExtra: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        require("tensorboard", "tensorboard")
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def add(self, step: Step | RefineStep) -> None:
        """Write a step's numbers; on disk within seconds."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step.step, flush_secs=10)
        for name, value in scalars(asdict(step)):
            self._writer.add_scalar(name, value, step.step)

    def close(self) -> None:
        """Put what is left on disk."""
        if self._writer is not None:
            self._writer.close()


def scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics by name, `rewards/agreement` for those in a mapping, `labels/0` for those in a
    sequence; the step itself and what is not there are left out."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{name}/")
        elif isinstance(value, list | tuple):
            yield from scalars({str(place): found for place, found in enumerate(value)}, f"{name}/")
        elif value is not None and (prefix or name != "step"):
            yield f"{prefix}{name}", float(value)
