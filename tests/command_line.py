"""Calling `whyrank` on tiny files, in this process or in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from whyrank.cli import app, main
from whyrank.datasets import read_run
from whyrank.generators.scripted import ScriptedAnswer
from whyrank.records import Document, Query
from whyrank.store import write_jsonl

__all__ = [
    "DOCUMENTS",
    "LABEL",
    "ONE",
    "QRELS",
    "QUERIES",
    "RERANK",
    "RERANKED",
    "RUN",
    "TEXTS",
    "order",
    "process",
    "run",
    "run_json",
    "script",
    "whole",
]

# Of "yellow leaves plant" the documents hold 1, 3 and 0 words; thirds give the labels 1, 2 and 0 by overlap.
QUERIES = [Query("q1", "yellow leaves plant"), Query("q2", "flat bread")]
DOCUMENTS = [
    Document("d1", "a plant in the shade"),
    Document("d2", "yellow leaves on a plant", title="Light"),
    Document("d3", "nothing of the kind"),
    Document("d4", "flat stones"),
    Document("d5", "bread that stays flat"),
]
RUN = ["q1 Q0 d1 1 3.5 bm25", "q1 Q0 d3 2 2.5 bm25", "q1 Q0 d2 3 1.5 bm25", "q2 Q0 d4 1 9 bm25", "q2 Q0 d5 2 8 bm25"]
# By overlap: d2 (2), d1 (1), d3 (0); for "flat bread" two halves: d4 holds 1 of 2 words, 1 * 3 // 2 = 1; d5 both, 2.
RERANKED = {"q1": ["d2", "d1", "d3"], "q2": ["d5", "d4"]}
QRELS = ["q1 0 d2 1", "q2 0 d5 1", "q3 0 d9 1"]

TEXTS = ("--corpus", "docs.jsonl", "--queries", "queries.jsonl")
RERANK = ("rerank", "--run", "run.trec", *TEXTS, "--model", "overlap", "-o", "out")
ONE = ("rerank", "--query", "q", "--documents", "docs.jsonl")
LABEL = ("label", "--pairs", "pairs.jsonl", *TEXTS, "--teacher", "overlap", "-o", "labelled")


def run(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, words, input=stdin)


def run_json(*words: str, code: int = 0) -> Any:
    """What `--json` prints on standard output, alone."""
    result = run(*words, "--json")
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    return json.loads(result.stdout)


def whole(*words: str) -> tuple[int | str | None, str, str]:
    """Exit code, standard output and error of `main`, which the installed command calls."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["whyrank", *words])
        with pytest.raises(SystemExit) as caught:
            main()
    return caught.value.code, out.getvalue(), err.getvalue()


def process(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, which begins without anything imported."""
    command = [sys.executable, "-c", "from whyrank.cli import main; main()", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)


def order(path: str) -> dict[str, list[str]]:
    return {query_id: [line.doc_id for line in lines] for query_id, lines in read_run(path).items()}


def script(*answers: ScriptedAnswer) -> str:
    write_jsonl("script.jsonl", answers)
    return "scripted:script.jsonl"
