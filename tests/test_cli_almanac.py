"""`whyrank almanac export` with a teacher: what is written, and how wrong rates are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from whyrank.almanac import build
from whyrank.almanac.links import LinksConfig, answer_links
from whyrank.almanac.teacher import TeacherConfig, teacher_judgments
from whyrank.cli import app
from whyrank.records import Judgment, Pair
from whyrank.store import read_jsonl
from whyrank.template import Template


def export(out: Path, *more: str) -> tuple[int, str]:
    arguments = ["almanac", "export", "--split", "train", "--num-queries", "6", "--domain", "bread", "-o", str(out)]
    done = CliRunner().invoke(app, [*arguments, *more])
    return done.exit_code, done.output


def test_the_teacher_and_the_links_are_those_of_the_library(tmp_path: Path) -> None:
    rates = ("--mistake", "overlap=0.9", "--mistake", "setting=0", "--link", "right=1", "--num-irrelevant", "5")
    code, output = export(tmp_path, "--teacher", "--seed", "3", "--teacher-seed", "4", *rates)
    assert code == 0, output
    collection = build("train", 6, seed=3, domains=["bread"])
    config = TeacherConfig(overlap=0.9, setting=0.0, seed=4)
    said = list(teacher_judgments(collection, Template.load("almanac"), config, num_irrelevant=5, seed=3))
    assert list(read_jsonl(tmp_path / "teacher.jsonl", Judgment)) == said
    assert list(read_jsonl(tmp_path / "pairs.jsonl", Pair)) == list(answer_links(collection, LinksConfig(right=1.0), 3))
    assert "60 teacher judgments" in output  # 6 queries x (2 + 3 relevant documents + 5 others)


def test_without_a_teacher_neither_file_is_written(tmp_path: Path) -> None:
    assert export(tmp_path)[0] == 0
    assert not (tmp_path / "teacher.jsonl").exists()
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mistake", "overlap=0.5"), "add --teacher"),
        (("--teacher", "--mistake", "foo=0.5"), "expected one of overlap, unquoted, confusion, setting"),
        (("--teacher", "--mistake", "overlap=much"), "expected a number after overlap="),
        (("--teacher", "--mistake", "overlap=3"), "overlap: expected a rate from 0 to 1"),
        (("--teacher", "--link", "right"), "expected a number after right="),
    ],
)
def test_rates_that_mean_nothing_are_refused(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    code, output = export(tmp_path, *options)
    assert code == 2
    assert message in " ".join(output.split())
    assert not (tmp_path / "judgments.jsonl").exists()
