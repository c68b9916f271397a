"""Curves for TensorBoard: what is in the event files is what is in metrics.jsonl, whatever was stopped in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from typer.testing import CliRunner

from tests.test_refine import one_thread, student, write_inputs
from whyrank.cli import app
from whyrank.training.board import Board, scalars
from whyrank.training.distill import Step

__all__ = ["one_thread", "student"]  # fixtures


def told(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard would draw."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def step(number: int, loss: float) -> Step:
    return Step(number, loss, learning_rate=0.5, num_tokens=10, seconds=1.0)


def test_numbers_have_the_names_of_the_metrics() -> None:
    row = {"step": 3, "loss": 0.5, "dev": None, "rewards": {"agreement": 1, "step": 2.0}, "labels": (0.25, 0.75)}
    assert dict(scalars(row)) == {
        "loss": 0.5,
        "rewards/agreement": 1.0,
        "rewards/step": 2.0,
        "labels/0": 0.25,
        "labels/1": 0.75,
    }


def test_a_resumed_training_draws_no_step_twice(tmp_path: Path) -> None:
    """Killed behind step 3; its last state was that of step 1."""
    for steps in ([step(1, 8.0), step(2, 7.0), step(3, 6.0)], [step(2, 4.0), step(3, 2.0)]):
        board = Board(tmp_path)
        for found in steps:
            board.add(found)
        board.close()
    assert told(tmp_path, "loss") == [(1, 8.0), (2, 4.0), (3, 2.0)]


def test_the_command_writes_what_the_metrics_say(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*write_inputs(tmp_path, student), "-o", str(out), "--num-steps", "3", "--tensorboard"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rewards, best_labels = [row["reward"] for row in metrics], [row["labels"][2] for row in metrics]
    for name, values in (("reward", rewards), ("labels/2", best_labels)):
        steps, drawn = zip(*told(out / "tensorboard", name), strict=True)
        assert steps == (1, 2, 3)
        assert drawn == pytest.approx(values)
