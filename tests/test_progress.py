"""Progress without a terminal: how much is done, and how long the rest takes at the speed of what was done now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import DOCUMENTS, QUERIES, RERANK, process
from whyrank.generators.overlap import Overlap
from whyrank.judging import Judge
from whyrank.progress import Progress
from whyrank.records import Pair
from whyrank.stages.label import PairTexts, label_files
from whyrank.store import Manifest
from whyrank.template import Template
from whyrank.training.config import DistillConfig


class Clock:
    """Seconds as the test says."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("whyrank.progress.time", clock)
    return clock


def test_the_time_left_is_that_of_what_is_new(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("judging", 100) as progress:
        progress.advance(60, is_from_before=True)
        clock.now = 20.0
        progress.advance(10)
        # 10 new ones in 20 s: the other 30 take 60 s.
        assert capsys.readouterr().err == "judging: 70/100 in 20 s, 60 s left\n"
        clock.now = 40.0
        progress.advance(10, "loss 1.5")
        assert capsys.readouterr().err == "judging: 80/100 in 40 s, 40 s left  loss 1.5\n"
    assert capsys.readouterr().err == "judging: 80/100 in 40 s, 40 s left\n"


def test_without_anything_new_nothing_is_foretold(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("judging", 100) as progress:
        clock.now = 11.0
        progress.advance(60, is_from_before=True)
    assert capsys.readouterr().err == "judging: 60/100 in 11 s\n" * 2


def test_what_was_labelled_before_is_counted_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tuple(Pair("q1", document.doc_id, "negative") for document in DOCUMENTS)
    texts = PairTexts(pairs, {"q1": QUERIES[0]}, {document.doc_id: document for document in DOCUMENTS}, 0)
    judge = Judge(Template.load("explain-0-2"), Overlap())
    seen: list[bool] = []

    class Watched(Progress):
        def advance(self, count: int = 1, note: str = "", *, is_from_before: bool = False) -> None:
            seen.append(is_from_before)
            super().advance(count, note, is_from_before=is_from_before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whyrank.stages.label.Progress", Watched)
        label_files(PairTexts(pairs[:3], texts.queries, texts.documents, 0), judge, tmp_path, Manifest("label", {}))
        label_files(texts, judge, tmp_path, Manifest("label", {}))
    assert seen == [False] * 3 + [True] * 3 + [False] * 2
    assert "5/5" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_resumed_training_begins_at_its_step(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    from whyrank.stages import distill as stage
    from whyrank.training.distill import Distilled, Step

    # A stand-in for training, which resumed after 40 of 50 steps.
    def resumed(*_: object, on_step: Callable[[Step], None], **_more: object) -> Distilled:
        clock.now = 30.0
        steps = [Step(number, 1.5, 0.1, 9, 30.0) for number in (41, 42, 43)]
        for step in steps:
            on_step(step)
        return Distilled(Path("student"), 1, 0, 1, tuple(steps))

    Path("none.jsonl").write_text("")
    texts = (Path("queries.jsonl"),), (Path("docs.jsonl"),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "distill", resumed)
        template, config = Template.load("almanac"), DistillConfig(num_steps=50)
        stage.distill_files(
            [Path("none.jsonl")], *texts, template, Path("student"), config, Manifest("distill", {}, seed=0)
        )
    # Three steps in 30 s: the other seven take 70.
    assert capsys.readouterr().err.splitlines()[-1] == "distilling into student: 43/50 in 30 s, 70 s left"


@pytest.mark.usefixtures("here")
def test_a_job_with_nothing_new_tells_no_speed() -> None:
    assert "documents per second" in process(*RERANK).stdout
    again = process(*RERANK).stdout
    assert "5 were there already, 0 are new" in again
    assert "documents per second" not in again
