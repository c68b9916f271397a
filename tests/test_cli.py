"""The command line as a whole: what a wrong call says, its exit codes, help, and what it may import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from tests.command_line import DOCUMENTS, LABEL, ONE, QUERIES, RERANK, TEXTS, order, run, run_json, whole
from whyrank.cli import app
from whyrank.generators.opening import ModelOptions
from whyrank.records import Document
from whyrank.store import write_jsonl


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rerank"], "give either --run and -o, or --query and --documents"),
        (["rerank", "--run", "run.trec"], "give either --run and -o"),
        (["rerank", "--query", "q"], "give either --run and -o"),
        ([*RERANK, *ONE[1:]], "give either --run and -o"),
        ([*ONE, "-o", "out"], "one --query is printed and writes nothing, leave -o out out (or redirect --json"),
        ([*RERANK, "--dtype", "auto"], "--dtype: without effect on overlap, leave it out"),
        ([*LABEL, "--batch-size", "16", "--timeout", "3"], "--batch-size, --timeout: without effect on overlap"),
        (
            [*ONE, "--model", "endpoint:http://x/v1#m", "--device", "cpu"],
            "of the kind endpoint takes --concurrency, --tim",
        ),
        ([*ONE, "--logprobs"], "--logprobs: without effect on the demo model"),
        (
            [*ONE, "--model", "a/folder", "--deadline", "9"],
            "a model of the kind hf takes --device, --dtype, --batch-size",
        ),
        ([*ONE, "--corpus", "docs.jsonl"], "go with --run"),
        ([*ONE, "--fuse", "zscore:0.5"], "needs the scores of a --run"),
        ([*RERANK, "--fuse", "zscore"], "--fuse: expected none, rrf, zscore:w or minmax:w"),
        ([*RERANK, "--fuse", "minmax:2"], "--fuse: expected none"),
        ([*RERANK, "--field", "name"], "--field: expected doc_id=NAME"),
        ([*RERANK, "--field", "body=text"], "--field: expected doc_id=NAME"),
        ([*RERANK, "--mode", "guess"], "--mode"),
        ([*RERANK, "--batch-size", "0"], "--batch-size"),
        ([*RERANK, "--limit", "0"], "--limit"),
        ([*RERANK, "--colour", "red"], "No such option"),
        (["distill", "--judgments", "x", *TEXTS, "-o", "y", "--modes", "think"], "--modes: expected explain"),
        (["distill", "--judgments", "x", *TEXTS, "-o", "y", "--num-steps", "0"], "expected num_steps of at least 1"),
        (["distill", "--judgments", "x", *TEXTS, "-o", "y", "--learning-rate", "-1"], "expected learning_rate above 0"),
        (["label", "--pairs", "pairs.jsonl"], "Missing option"),
        ([*RERANK, "--template", "none"], "no template 'none'"),
        ([*LABEL, "--template", "none"], "no template 'none'"),
        (["distill", "--judgments", "x", *TEXTS, "-o", "y", "--template", "none"], "no template 'none'"),
        (["evaluate", "--qrels", "qrels.txt"], "Missing argument"),
        (["evaluate", "--qrels", "qrels.txt", "run.trec", "--ties", "random"], "--ties"),
        (["evaluate", "--qrels", "qrels.txt", "run.trec", "--measures", "nDGC"], "expected measures like nDCG@10"),
        (["guess"], "No such command"),
    ],
)
def test_wrong_use_exits_with_2(words: Sequence[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        # Before the model is looked for.
        (["rerank", "--run", "none", *TEXTS, "--model", "no-such-model", "-o", "out"], "expected a file at none"),
        (["rerank", "--run", "run.trec", "--model", "overlap", "-o", "out"], "give --corpus and --queries"),
        (["rerank", "--run", "run.trec", *TEXTS[:2], "--model", "overlap", "-o", "out"], "go together"),
        (["rerank", "--run", "rankgpt.json", "--field", "text=t", "--model", "overlap", "-o", "out"], "--field names"),
        (["rerank", "--query", "q", "--documents", "qrels.txt", "--model", "overlap"], "qrels.txt: expected documents"),
        (["evaluate", "--qrels", "qrels.txt", "run.trec", "run.trec"], "expected each run once"),
        (["search", *TEXTS, "-o", "docs.jsonl/bm25.trec"], "docs.jsonl"),
        (
            ["mine", "--posts", "none.xml", "--site", "a.example", "-o", "out"],
            "expected a file at none.xml, found nothing",
        ),
        (
            ["distill", "--judgments", "none.jsonl", *TEXTS, "-o", "out"],
            "--judgments: expected a file at none.jsonl, found nothing; whyrank label writes a judgments.jsonl",
        ),
        (
            ["distill", "--judgments", "pairs.jsonl", "--queries", ".", *TEXTS[:2], "-o", "out"],
            "--queries: expected a file at ., found a directory; give those that the judgments were made from",
        ),
        (
            ["distill", "--judgments", "pairs.jsonl", *TEXTS, "-o", "out"],
            "pairs.jsonl:1: expected a Judgment as JSON, found a line with key: Field required. Remove the line: "
            "training on the others does without it.",
        ),
    ],
)
def test_wrong_input_exits_with_1_and_says_why(words: Sequence[str], message: str) -> None:
    code, out, err = whole(*words)
    assert (code, out) == (1, "")
    assert err.startswith("whyrank: ")
    assert message in err
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
def test_documents_without_text_are_named() -> None:
    write_jsonl("docs.jsonl", DOCUMENTS[:-1])
    advice = "give the file that the run was made from, or pass --skip-bad to drop and count such candidates"
    absent = f"whyrank: 1 of the 5 documents to be judged are not in docs.jsonl, the first is 'd5': {advice}\n"
    assert whole(*RERANK) == (1, "", absent)
    assert run_json(*RERANK, "--skip-bad")["without_text"] == 1
    assert order("out/run.trec") == {"q1": ["d2", "d1", "d3"], "q2": ["d4"]}
    assert "1 candidates without a text were dropped" in run(*RERANK, "--skip-bad").stdout
    write_jsonl("queries.jsonl", QUERIES[:1])
    absent = f"whyrank: 1 of the run's 2 queries are not in queries.jsonl, the first is 'q2': {advice}\n"
    assert whole(*RERANK) == (1, "", absent)
    # One of q2's lines is left, which is not to be judged.
    write_jsonl("queries.jsonl", QUERIES)
    write_jsonl("docs.jsonl", [document for document in DOCUMENTS if document.doc_id != "d4"])
    assert run_json(*RERANK[:-1], "few", "--skip-bad", "--top-k", "1")["without_text"] == 1
    assert order("few/run.trec") == {"q1": ["d1", "d3", "d2"], "q2": ["d5"]}
    write_jsonl("docs.jsonl", [Document("x", "another collection")])
    assert "is it of the same collection?" in whole(*RERANK, "--skip-bad")[2]
    write_jsonl("docs.jsonl", DOCUMENTS)
    write_jsonl("queries.jsonl", QUERIES[:1])
    # Both lines of q2.
    assert run_json(*RERANK, "--skip-bad")["without_text"] == 2
    assert order("out/run.trec") == {"q1": ["d2", "d1", "d3"]}


@pytest.mark.usefixtures("here")
def test_names_are_printed_as_they_are() -> None:
    done = run(*RERANK[:-1], "out[bold]:car:")
    assert "out[bold]:car:/run.trec" in done.stdout


@pytest.mark.parametrize("verb", ["label", "rerank"])
def test_every_setting_of_a_model_is_an_option(verb: str) -> None:
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert {option.name for option in fields(ModelOptions)} <= {parameter.name for parameter in command.params}


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("whyrank 0.")
    for verb in ("mine", "label", "distill", "search", "rerank", "evaluate", "demo"):
        assert "Example" in run(verb, "--help").stdout


def test_the_base_install_is_enough_for_help() -> None:
    """Neither torch nor transformers is imported before a model is asked for."""
    code = "import sys, whyrank.cli; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
