"""`whyrank rerank` on tiny files: what it writes, prints and counts."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.command_line import (
    DOCUMENTS,
    LABEL,
    ONE,
    QUERIES,
    RERANK,
    RERANKED,
    TEXTS,
    order,
    process,
    run,
    run_json,
    script,
    whole,
)
from tests.fake_endpoint import FakeEndpoint, Reply
from whyrank.datasets import read_run
from whyrank.generators.opening import ModelOptions
from whyrank.generators.scripted import ScriptedAnswer
from whyrank.records import Judgment
from whyrank.store import Manifest, read_jsonl, write_jsonl
from whyrank.template import Template


@pytest.mark.usefixtures("here")
def test_rerank_a_run() -> None:
    found = run_json(*RERANK)
    assert order("out/run.trec") == RERANKED
    assert len(list(read_jsonl("out/judgments.jsonl", Judgment))) == 5
    seconds, counts = found.pop("seconds"), found.pop("counts")
    assert seconds >= 0
    assert found == {
        "out": "out",
        "run": "out/run.trec",
        "queries": 2,
        "excluded": 0,
        "bad_lines": 0,
        "without_text": 0,
        "first_error": None,
    }
    assert (counts["num_new"], counts["num_known"], counts["num_ok"]) == (5, 0, 5)
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert (manifest["stage"], manifest["is_finished"]) == ("rerank", True)
    assert set(manifest["inputs"]) == {"run.trec", "docs.jsonl", "queries.jsonl"}
    assert manifest["counts"]["num_queries"] == 2


@pytest.mark.usefixtures("here")
def test_rerank_again_judges_nothing_and_writes_the_same() -> None:
    run(*RERANK)
    before = Path("out/run.trec").read_bytes(), Path("out/judgments.jsonl").read_bytes()
    counts = run_json(*RERANK)["counts"]
    assert (counts["num_new"], counts["num_known"]) == (0, 5)
    assert (Path("out/run.trec").read_bytes(), Path("out/judgments.jsonl").read_bytes()) == before
    # The mixture is made from the same judgments; without any weight the first stage is left.
    again = run(*RERANK, "--fuse", "minmax:0")
    assert (again.exit_code, order("out/run.trec")) == (0, {"q1": ["d1", "d3", "d2"], "q2": ["d4", "d5"]})
    assert "5 were there already, 0 are new" in again.stdout


@pytest.mark.usefixtures("here")
def test_a_refused_folder_keeps_its_manifest() -> None:
    run(*RERANK)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    refused = process(*RERANK, "--mode", "direct")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 2)  # the count of judged pairs, and one line
    assert "choose another output folder" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


@pytest.mark.usefixtures("here")
def test_rankgpt_file_alone() -> None:
    assert run("rerank", "--run", "rankgpt.json", "--model", "overlap", "-o", "out").exit_code == 0
    assert order("out/run.trec") == {"q1": ["d2", "d1", "d3"]}


@pytest.mark.usefixtures("here")
def test_gzip_everywhere() -> None:
    for name in ("docs.jsonl", "queries.jsonl", "run.trec", "qrels.txt"):
        Path(f"{name}.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
    texts = ("--corpus", "docs.jsonl.gz", "--queries", "queries.jsonl.gz")
    assert run("rerank", "--run", "run.trec.gz", *texts, "--model", "overlap", "-o", "out").exit_code == 0
    assert order("out/run.trec") == RERANKED
    assert run_json("evaluate", "--qrels", "qrels.txt.gz", "run.trec.gz")["runs"][0]["queries"] == 3


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("query_id", "doc_id"), [("q1", "d 2"), ("q 1", "d2"), ("q 1", "d\t2")])
def test_ids_with_blanks_give_a_json_run(query_id: str, doc_id: str) -> None:
    hits = [
        {"qid": query_id, "docid": doc, "content": text} for doc, text in (("x", "a plant"), (doc_id, "yellow plant"))
    ]
    Path("rankgpt.json").write_text(json.dumps([{"query": QUERIES[0].text, "hits": hits}]))
    found = run_json("rerank", "--run", "rankgpt.json", "--model", "overlap", "-o", "out")
    assert found["run"] == "out/run.json"
    assert order("out/run.json") == {query_id: [doc_id, "x"]}


@pytest.mark.usefixtures("here")
def test_limit_top_k_excluded_and_fields() -> None:
    limited = run_json(*RERANK, "--limit", "1", "--top-k", "2")
    assert (limited["queries"], limited["counts"]["num_new"]) == (1, 2)
    assert order("out/run.trec") == {"q1": ["d1", "d3", "d2"]}
    Path("excluded.txt").write_text("q1 d1\nq2 d5\nq2 d4\n")
    excluded = run_json(*RERANK, "--excluded", "excluded.txt", "--top-k", "2")
    # The excluded document does not count among the first two.
    assert (excluded["excluded"], order("out/run.trec")) == (3, {"q1": ["d2", "d3"]})
    renamed = [{"pid": document.doc_id, "passage": document.full_text} for document in DOCUMENTS]
    Path("renamed.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    fields = ("--field", "doc_id=pid", "--field", "text=passage")
    words = ("--corpus", "renamed.jsonl", "--queries", "queries.jsonl", "--model", "overlap", "-o", "other")
    assert run("rerank", "--run", "run.trec", *words, *fields).exit_code == 0
    assert order("other/run.trec") == RERANKED


@pytest.mark.usefixtures("here")
def test_what_top_k_leaves_stays_below_as_it_stood() -> None:
    # d3 (0 words) stands above d2 and d1 (3 and 1), and is alone judged for q1; neither tail needs a text.
    Path("run.trec").write_text("q1 Q0 d3 1 9 x\nq1 Q0 d2 2 9 x\nq1 Q0 d1 3 8 x\nq2 Q0 d5 1 2 x\nq2 Q0 d4 2 1 x\n")
    write_jsonl("docs.jsonl", [DOCUMENTS[2], DOCUMENTS[4]])
    assert run_json(*RERANK, "--top-k", "1")["counts"]["num_new"] == 2
    found = read_run("out/run.trec")
    # Labels 0 and 2 are the judged scores; every line below has one less.
    assert [(line.doc_id, line.rank, line.score) for line in found["q1"]] == [
        ("d3", 1, 0),
        ("d2", 2, -1),
        ("d1", 3, -2),
    ]
    assert [(line.doc_id, line.rank, line.score) for line in found["q2"]] == [("d5", 1, 2), ("d4", 2, 1)]
    values = run_json("evaluate", "--qrels", "qrels.txt", "run.trec", "out/run.trec", "--measures", "R@3")["runs"]
    assert values[0]["values"] == values[1]["values"] == {"R@3": pytest.approx(2 / 3)}
    ids = [{"qid": "q1", "docid": doc_id, "content": "a plant", "score": 1} for doc_id in ("x", "d 2")]
    Path("rankgpt.json").write_text(json.dumps([{"query": QUERIES[0].text, "hits": ids}]))
    blank = ("rerank", "--run", "rankgpt.json", "--model", "overlap", "--top-k", "1", "-o", "other")
    assert run_json(*blank)["run"] == "other/run.json"


@pytest.mark.usefixtures("here")
def test_manifests_tell_everything_that_was_chosen_and_counted() -> None:
    Path("docs.jsonl").write_text("{broken\n" + Path("docs.jsonl").read_text())
    Path("excluded.txt").write_text("q1 d1\n")
    chosen = ("--skip-bad", "--limit", "1", "--max-explanation-tokens", "9")
    more = ("--excluded", "excluded.txt", "--top-k", "1", "--field", "text=text", "--fuse", "rrf")
    before = datetime.now(UTC).replace(microsecond=0)
    assert run(*RERANK, *chosen, *more, "--instruction", "Be strict.").exit_code == 0
    assert run(*LABEL, *chosen).exit_code == 0
    reranked, labelled = (json.loads(Path(f"{name}/manifest.json").read_text()) for name in ("out", "labelled"))
    template = Template.load("explain-0-2")
    template = replace(template, limits=replace(template.limits, max_explanation_tokens=9))
    shared = {
        "model": "overlap",
        "mode": "explain",
        "template": template.version,
        "limits": asdict(template.limits),
        "sampling": {"temperature": 0.0, "max_tokens": 9, "seed": 0},
        "options": asdict(ModelOptions()),
        "limit": 1,
        "skip_bad": True,
    }
    more_chosen = {"top_k": 1, "field": {"text": "text"}, "fuse": "rrf", "on_unparsed": "first_stage"}
    more_chosen |= {"num_samples": 1, "passages": None}
    assert labelled["config"] == {**shared, "instruction": None}
    assert reranked["config"] == {**labelled["config"], **more_chosen, "instruction": "Be strict."}
    names = ("num_queries", "num_excluded", "num_bad_lines", "num_without_text", "num_new")
    assert [reranked["counts"][name] for name in names] == [1, 1, 1, 0, 1]
    assert labelled["counts"]["num_bad_lines"] == 1
    assert before <= datetime.fromisoformat(reranked["started"]) <= datetime.now(UTC)


def test_a_manifest_names_the_gpu_where_torch_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for torch on another machine; what is under test only asks it.
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "GPU 9000")
    early = Manifest("x", {})
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert early.finished(0.0, counts={}).hardware["gpu"] == "GPU 9000"
    monkeypatch.delitem(sys.modules, "torch")
    assert "gpu" not in Manifest("x", {}).hardware
    assert "torch" not in sys.modules


@pytest.mark.usefixtures("here")
def test_skip_bad_counts_lines() -> None:
    with Path("docs.jsonl").open("a") as corpus:
        corpus.write("{broken\n")
    code, _, err = whole(*RERANK)
    assert (code, "docs.jsonl:6" in err, "--skip-bad" in err) == (1, True, True)
    assert run_json(*RERANK, "--skip-bad")["bad_lines"] == 1
    assert "1 malformed lines were passed over" in run(*RERANK, "--skip-bad").stdout
    assert run_json(*LABEL, "--skip-bad")["bad_lines"] == 1
    alone = process("rerank", "--query", "plant", "--documents", "docs.jsonl", "--model", "overlap", "--skip-bad")
    assert (alone.returncode, "whyrank: 1 malformed lines were passed over: docs.jsonl:6" in alone.stderr) == (0, True)


@pytest.mark.usefixtures("here")
def test_one_query_for_people() -> None:
    result = run("rerank", "--query", "yellow leaves plant", "--documents", "docs.jsonl", "--model", "overlap")
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert "1. d2 (score 2.000, label 2; was 2)" in shown
    # Whole, however narrow the screen is.
    assert (
        "the document shares 3 of the query's 3 words (yellow, leaves, plant). Light yellow leaves on a plant" in shown
    )


@pytest.mark.usefixtures("here")
def test_one_query_as_json_with_documents_from_standard_input() -> None:
    words = ("rerank", "--query", "yellow leaves plant", "--documents", "-", "--model", "overlap", "--top-k", "1")
    done = process(*words, "--json", stdin=Path("docs.jsonl").read_text())
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "query": "yellow leaves plant",
        "results": [
            {
                "id": "d2",
                "rank": 1,
                "score": 2.0,
                "rank_score": 2.0,
                "label": "2",
                "probs": [0.0, 0.0, 1.0],
                "explanation": "This is a comparison of words only, not of meaning: the document shares 3 of the "
                "query's 3 words (yellow, leaves, plant).",
                "is_explained": True,
                "status": "ok",
                "error": None,
                "passage": "Light\nyellow leaves on a plant",
                "passage_span": [0, 30],
                "num_passages": 1,
                "num_samples": 1,
                "num_unreadable": 0,
                "first_stage_rank": 2,
            }
        ],
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"doc_id": "d1", "text": "a plant"}\n{broken\n', "standard input:2: expected "),
        ("one two three\n", "standard input: expected documents"),
        ("", "standard input"),
    ],
)
def test_errors_about_standard_input_name_it(text: str, complaint: str) -> None:
    words = ("rerank", "--query", "plant", "--documents", "-", "--model", "overlap")
    done = process(*words, stdin=text)
    assert (done.returncode, done.stderr.startswith(f"whyrank: {complaint}")) == (1, True), done.stderr
    assert "whyrank-" not in done.stderr
    if "broken" in text:
        skipped = process(*words, "--skip-bad", stdin=text)
        assert (skipped.returncode, "passed over: standard input:2: " in skipped.stderr) == (0, True)
    labels = process("label", "--pairs", "-", *TEXTS, "--teacher", "overlap", "-o", "out", stdin="{broken\n")
    assert labels.stderr.startswith("whyrank: standard input:1: expected a Pair as JSON")


@pytest.mark.usefixtures("here")
def test_an_endpoint_is_called_as_it_wants() -> None:
    with FakeEndpoint(lambda document, attempt: Reply(text="Relevance Label: 2 ##")) as server:
        words = ("rerank", "--run", "run.trec", *TEXTS, "--model", f"endpoint:{server.url}#m", "-o", "out")
        run_json(*words, "--token-limit-field", "max_completion_tokens", "--mode", "direct", "--timeout", "7")
    assert len(server.seen) == 5
    for seen in server.seen:
        assert "max_completion_tokens" in seen.payload
        assert not {"max_tokens", "seed"} & set(seen.payload)
    chosen = json.loads(Path("out/manifest.json").read_text())["config"]["options"]
    assert chosen == {**asdict(ModelOptions()), "timeout": 7.0, "token_limit_field": "max_completion_tokens"}


@pytest.mark.usefixtures("here")
def test_gaps_end_with_exit_code_7() -> None:
    # Of five pairs the script knows two: the others are errors, whatever their share.
    some = [
        ScriptedAnswer(QUERIES[0].text, DOCUMENTS[0].text, label="2"),
        ScriptedAnswer("flat bread", "flat stones", label="0"),
    ]
    words = ("rerank", "--run", "run.trec", *TEXTS, "--model", script(*some), "-o", "out")
    found = run_json(*words, code=7)
    assert (found["counts"]["num_ok"], found["counts"]["num_error"]) == (2, 3)
    assert "no answer for the query 'yellow leaves plant'" in found["first_error"]
    assert f"3 requests failed, the first with: {found['first_error']}" in run(*words).stdout
    assert order("out/run.trec") == {"q1": ["d1", "d3", "d2"], "q2": ["d4", "d5"]}
    code, _, err = whole(*words, "--on-unparsed", "error")
    assert (code, "query q1: no readable judgment for 2 of 3" in err) == (1, True)
    one = ("rerank", "--query", "flat bread", "--documents", "docs.jsonl", "--model", "scripted:script.jsonl")
    assert run(*one).exit_code == 7
    assert "no label, error" in run(*one).stdout
    assert "GenerationError: scripted:script.jsonl" in run(*one).stdout


@pytest.mark.usefixtures("here")
def test_a_service_that_does_not_run_is_named_and_leaves_no_run() -> None:
    with FakeEndpoint(lambda document, attempt: Reply()) as server:
        address = server.url  # nobody listens there when the block has ended
    model = (f"endpoint:{address}#m", "--max-retries", "0")
    reason = f"requests failed, the first with: GenerationError: endpoint {address}: no answer: ConnectError"
    for num_pairs, words in (
        (5, ("rerank", "--run", "run.trec", *TEXTS, "-o", "out", "--model", *model)),
        (3, ("label", "--pairs", "pairs.jsonl", *TEXTS, "-o", "labelled", "--teacher", *model)),
        (5, (*ONE, "--model", *model)),
    ):
        code, out, err = whole(*words)
        assert (code, out) == (1, "")
        assert f"whyrank: no answer at all: {num_pairs} {reason}" in err
    assert not Path("out/run.trec").exists()
    assert json.loads(Path("out/manifest.json").read_text())["is_finished"] is False


@pytest.mark.usefixtures("here")
def test_a_memory_that_is_no_size_is_wrong_use() -> None:
    """Told before a model is looked for."""
    done = process("rerank", "--run", "run.trec", *TEXTS, "--model", "hf:nowhere", "--memory", "much", "-o", "out")
    assert done.returncode == 2
    assert "expected a size of memory such as 4GiB" in " ".join(done.stderr.split())
