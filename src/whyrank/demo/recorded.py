"""What takes longer than a demo: recorded figures of students that were refined beyond their teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Self

from pydantic import JsonValue

__all__ = ["RECORDED_NAME", "Recorded", "RecordedRow", "read_recorded"]

RECORDED_NAME = "refining.json"
SHOWN = {"teacher": "teacher", "distilled": "distilled", "ppo": "refined (ppo)", "grpo": "refined (grpo)"}


@dataclass(frozen=True, slots=True)
class RecordedRow:
    """One system's figures, means over runs with different seeds; shown like the rows that were measured now.

    `interval` is that of nDCG@10 over seeds and queries (95 %).
    """

    system: str
    ndcg: float
    interval: tuple[float, float]
    seeds: tuple[float, ...]
    label_accuracy: float | None
    tokens_per_document: float
    documents_per_second: None = None

    def to_json(self) -> dict[str, JsonValue]:
        """As in `results.json`."""
        return {
            "system": self.system,
            "nDCG@10": self.ndcg,
            "nDCG@10_interval": list(self.interval),
            "seeds": list(self.seeds),
            "label_accuracy": self.label_accuracy,
            "tokens_per_document": self.tokens_per_document,
        }


@dataclass(frozen=True, slots=True)
class Recorded:
    """The rows, the command that they came from, and its date."""

    rows: tuple[RecordedRow, ...]
    command: str
    date: str

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Self:
        """What is shown out of the whole table: the usual teacher, its student, and that student refined."""
        rows = [
            RecordedRow(
                system=SHOWN[row["system"]],
                ndcg=row["nDCG@10"],
                interval=(row["interval"][0], row["interval"][1]),
                seeds=tuple(row["seeds"]),
                label_accuracy=row["label_accuracy"],
                tokens_per_document=row["tokens_per_document"] or 0.0,
            )
            for row in kept["rows"]
            if row["teacher_noise"] == "default" and row["system"] in SHOWN
        ]
        return cls(tuple(rows), kept["command"], kept["date"])


def read_recorded() -> Recorded:
    """What comes with the package."""
    return Recorded.of(json.loads((files("whyrank.demo") / RECORDED_NAME).read_text(encoding="utf-8")))
