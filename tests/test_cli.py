"""The command line: every verb on tiny files, its exit codes, its JSON, and what a wrong call says."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from tests.fake_endpoint import FakeEndpoint, Reply
from whyrank.cli import app, main
from whyrank.datasets import read_run
from whyrank.errors import TemplateMismatch
from whyrank.generators.opening import ModelOptions
from whyrank.generators.scripted import ScriptedAnswer
from whyrank.records import Document, Judgment, Pair, Query
from whyrank.store import Manifest, read_jsonl, write_jsonl
from whyrank.template import Template
from whyrank.training.config import DistillConfig

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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one file of each kind, and the present one."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("docs.jsonl", DOCUMENTS)
    write_jsonl("queries.jsonl", QUERIES)
    Path("run.trec").write_text("\n".join(RUN) + "\n")
    Path("qrels.txt").write_text("\n".join(QRELS) + "\n")
    hits = [{"qid": "q1", "docid": d.doc_id, "content": d.full_text, "score": 9 - i} for i, d in enumerate(DOCUMENTS)]
    Path("rankgpt.json").write_text(json.dumps([{"query": QUERIES[0].text, "hits": hits[:3]}]))
    pairs = [Pair("q1", "d2", "linked", "17"), Pair("q1", "d3", "negative"), Pair("q2", "d4", "negative")]
    write_jsonl("pairs.jsonl", pairs)
    return tmp_path


TEXTS = ("--corpus", "docs.jsonl", "--queries", "queries.jsonl")
RERANK = ("rerank", "--run", "run.trec", *TEXTS, "--model", "overlap", "-o", "out")
ONE = ("rerank", "--query", "q", "--documents", "docs.jsonl")
LABEL = ("label", "--pairs", "pairs.jsonl", *TEXTS, "--teacher", "overlap", "-o", "labelled")


def run(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, words, input=stdin)


def run_json(*words: str, code: int = 0) -> Any:
    """What `--json` prints on standard output, alone."""
    result = run(*words, "--json")
    assert result.exit_code == code, result.output
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
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def order(path: str) -> dict[str, list[str]]:
    return {query_id: [line.doc_id for line in lines] for query_id, lines in read_run(path).items()}


def script(*answers: ScriptedAnswer) -> str:
    write_jsonl("script.jsonl", answers)
    return "scripted:script.jsonl"


# ---- rerank -------------------------------------------------------------------------------------------------


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
    chosen = ("--skip-bad", "--limit", "1", "--batch-size", "3", "--timeout", "7", "--max-explanation-tokens", "9")
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
        "options": {**asdict(ModelOptions()), "batch_size": 3, "timeout": 7.0},
        "limit": 1,
        "skip_bad": True,
    }
    more_chosen = {"top_k": 1, "field": {"text": "text"}, "fuse": "rrf", "on_unparsed": "first_stage"}
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
                "status": "ok",
                "error": None,
                "passage": "Light\nyellow leaves on a plant",
                "first_stage_rank": 2,
            }
        ],
    }


@pytest.mark.usefixtures("here")
def test_an_endpoint_is_called_as_it_wants() -> None:
    with FakeEndpoint(lambda document, attempt: Reply(text="Relevance Label: 2 ##")) as server:
        words = ("rerank", "--run", "run.trec", *TEXTS, "--model", f"endpoint:{server.url}#m", "-o", "out")
        run_json(*words, "--token-limit-field", "max_completion_tokens", "--mode", "direct")
    assert len(server.seen) == 5
    for seen in server.seen:
        assert "max_completion_tokens" in seen.payload
        assert not {"max_tokens", "seed"} & set(seen.payload)


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


# ---- the other verbs ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_search() -> None:
    found = run_json("search", *TEXTS, "--top-k", "2", "-o", "bm25.trec")
    assert found.pop("seconds") >= 0
    # q1's words stand in d1 (one) and d2 (three), q2's in d4 (one) and d5 (two).
    assert order("bm25.trec") == {"q1": ["d2", "d1"], "q2": ["d5", "d4"]}
    assert found == {
        "run": "bm25.trec",
        "num_documents": 5,
        "num_queries": 2,
        "num_empty_queries": 0,
        "num_lines": 4,
        "num_bad_lines": 0,
    }
    assert "5 documents, 2 queries" in run("search", *TEXTS, "-o", "bm25.trec").stdout


@pytest.mark.usefixtures("here")
def test_label() -> None:
    found = run_json(*LABEL)
    assert found.pop("seconds") >= 0
    assert found.pop("counts")["num_ok"] == 3
    labels = {"linked": {"2": 1}, "negative": {"0": 1, "1": 1}}
    assert found == {"out": "labelled", "labels": labels, "bad_lines": 0, "first_error": None}
    again = run(*LABEL).stdout
    assert "linked pairs: 2: 1" in again
    assert "3 judgments in labelled (3 were there already, 0 unreadable" in again
    assert json.loads(Path("labelled/manifest.json").read_text())["is_finished"]
    assert run_json(*LABEL[:-1], "first", "--limit", "1")["labels"] == {"linked": {"2": 1}}


@pytest.mark.usefixtures("here")
def test_label_with_unreadable_answers() -> None:
    texts = {document.doc_id: document.full_text for document in DOCUMENTS}
    answers = [ScriptedAnswer(QUERIES[0].text, texts[doc_id], answer="perhaps") for doc_id in ("d2", "d3")]
    teacher = script(*answers, ScriptedAnswer("flat bread", texts["d4"], label="1"))
    words = ("label", "--pairs", "pairs.jsonl", *TEXTS, "--teacher", teacher, "-o", "labelled")
    assert run_json(*words, code=7)["labels"] == {"linked": {"unparsed": 1}, "negative": {"unparsed": 1, "1": 1}}


@pytest.mark.usefixtures("here")
def test_evaluate_json_is_exactly_this() -> None:
    run(*RERANK)
    found = run_json("evaluate", "--qrels", "qrels.txt", "run.trec", "out/run.trec", "--measures", "RR@10 P@1")
    # q1 and q2 are at ranks 3 and 2, after reranking at 1 and 1; q3 is in neither and counts 0.
    assert found == {
        "measures": ["RR@10", "P@1"],
        "runs": [
            {
                "name": "run.trec",
                "queries": 3,
                "missing": 1,
                "without_qrels": 0,
                "values": {"RR@10": pytest.approx((1 / 3 + 1 / 2) / 3), "P@1": 0.0},
                "unparsed_rate": None,
            },
            {
                "name": "out/run.trec",
                "queries": 3,
                "missing": 1,
                "without_qrels": 0,
                "values": {"RR@10": pytest.approx(2 / 3), "P@1": pytest.approx(2 / 3)},
                "unparsed_rate": 0.0,
            },
        ],
    }
    words = ("evaluate", "--qrels", "qrels.txt", "run.trec", "--measures", "P@1")
    assert run_json(*words, "--per-query")["runs"][0]["per_query"] == {"P@1": {"q1": 0.0, "q2": 0.0, "q3": 0.0}}
    assert run_json(*words, "--limit", "1")["runs"][0]["queries"] == 1
    table = run(*words).stdout
    assert "run.trec" in table
    assert "missing" in table


@pytest.mark.usefixtures("here")
def test_evaluate_refuses_a_run_with_unreadable_judgments() -> None:
    write_jsonl("script.jsonl", [ScriptedAnswer("flat bread", "flat stones", answer="perhaps")])
    run("rerank", "--run", "run.trec", *TEXTS, "--model", "scripted:script.jsonl", "-o", "out")
    code, out, err = whole("evaluate", "--qrels", "qrels.txt", "out/run.trec")
    assert (code, out) == (1, "")
    assert "expected at most 1.00% of the judgments of run 'out/run.trec' without a label" in err
    allowed = run_json("evaluate", "--qrels", "qrels.txt", "out/run.trec", "--allow-unparsed", "1")
    assert allowed["runs"][0]["unparsed_rate"] == 1.0


POSTS = """<?xml version="1.0" encoding="utf-8"?>
<posts>
{rows}
</posts>
"""


@pytest.mark.usefixtures("here")
def test_mine() -> None:
    question = (
        '<row Id="{id}" PostTypeId="1" AcceptedAnswerId="{answer}" CreationDate="2020-01-01T00:00:00.000" Score="5" '
        'Title="Why do the leaves of plant {id} turn yellow?" Body="&lt;p&gt;The leaves of plant number {id} turn '
        'yellow at the edges and then fall.&lt;/p&gt;" OwnerUserId="1" Tags="&lt;plants&gt;" />'
    )
    answer = (
        '<row Id="{id}" PostTypeId="2" ParentId="{parent}" CreationDate="2020-01-02T00:00:00.000" Score="3" '
        'Body="&lt;p&gt;Plant {parent} lacks light, see &lt;a href=&quot;https://plants.botany.org/light/{parent}&quot;'
        '&gt;this page on light&lt;/a&gt; for the reason.&lt;/p&gt;" OwnerUserId="2" />'
    )
    rows = [question.format(id=i, answer=i + 100) for i in range(1, 9)]
    rows += [answer.format(id=i + 100, parent=i) for i in range(1, 9)]
    Path("Posts.xml").write_text(POSTS.format(rows="\n".join(rows)))
    pages = [
        {"url": f"https://plants.botany.org/light/{i}", "title": f"Light {i}", "text": f"Light feeds plant {i}. " * 20}
        for i in range(1, 9)
    ]
    Path("pages.jsonl").write_text("\n".join(map(json.dumps, pages)))
    words = ("mine", "--posts", "Posts.xml", "--site", "questions.example", "--pages", "pages.jsonl", "-o", "mined")
    found = run_json(*words, "--num-random", "1", "--num-negatives", "2")
    assert found["out"] == "mined"
    assert (found["counts"]["questions"], found["counts"]["pairs.linked"]) == (8, 8)
    assert Path("mined/corpus.jsonl").is_file()
    assert run_json(*words[:-1], "few", "--limit", "3")["counts"]["questions"] == 3


@pytest.mark.usefixtures("here")
def test_distill_then_rerank_with_the_student() -> None:
    import torch

    torch.set_num_threads(1)  # matrices this small only wait for each other
    run(*LABEL)
    words = ("distill", "--judgments", "labelled/judgments.jsonl", *TEXTS, "--template", "almanac", "-o", "student")
    small = ("--num-steps", "2", "--batch-size", "2", "--save-every", "1", "--device", "cpu")
    learn = (*words, *small, "--modes", "explain,direct")
    found = run_json(*learn)
    assert sorted(found) == ["checkpoint", "history", "num_examples", "num_left_out", "num_parameters"]
    assert (found["checkpoint"], found["num_examples"], found["num_left_out"]) == ("student", 6, 0)
    assert [step["step"] for step in found["history"]] == [1, 2]
    assert sorted(found["history"][0]) == ["learning_rate", "loss", "num_tokens", "seconds", "step"]
    manifest = json.loads(Path("student/manifest.json").read_text())
    template = Template.load("almanac")
    asked_for = replace(
        DistillConfig(), num_steps=2, batch_size=2, save_every=1, device="cpu", modes=("explain", "direct")
    )
    assert manifest["config"] == {
        **json.loads(json.dumps(asdict(asked_for))),
        "template": template.version,
        "limits": asdict(template.limits),
        "limit": None,
    }
    # Three judgments, each taught in two modes.
    assert manifest["counts"] == {"num_judgments": 3, "num_examples": 6, "num_left_out": 0}
    assert manifest["figures"] == {"num_parameters": found["num_parameters"]}
    again = run(*learn)
    assert "6 examples (0 judgments without a label left out)" in again.stdout
    asked = ("rerank", "--run", "run.trec", *TEXTS, "--model", "student", "--mode", "direct", "-o", "out")
    assert run(*asked).exit_code == 0
    assert sorted(order("out/run.trec")["q1"]) == ["d1", "d2", "d3"]
    refused = run(*asked, "--template", "explain-0-2").exception
    assert isinstance(refused, TemplateMismatch)
    absent = run("distill", "--judgments", "none.jsonl", *TEXTS, "-o", "other").exception
    assert isinstance(absent, FileNotFoundError)  # which becomes one line, see test_wrong_input


@pytest.mark.slow
def test_the_whole_road_on_a_real_dump(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mine, label, distil, search, rerank, evaluate: 421 questions of ai.stackexchange, 2016."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    posts = str(next((shared_data / "stackexchange" / "ai-2016").glob("Posts.xml*")))
    site = ("--site", "ai.stackexchange.com", "--without-page", "context", "--test-fraction", "0.2")
    mined = run_json("mine", "--posts", posts, *site, "-o", "mined")["counts"]
    assert (mined["questions"], mined["answers"]) == (421, 749)
    train = ("--queries", "mined/train/queries.jsonl", "--corpus", "mined/corpus.jsonl")
    pairs = ("--pairs", "mined/train/pairs.jsonl", *train)
    labelled = run_json("label", *pairs, "--teacher", "overlap", "--template", "almanac", "-o", "labelled")
    assert sum(sum(labels.values()) for labels in labelled["labels"].values()) == labelled["counts"]["num_ok"]
    learn = ("distill", "--judgments", "labelled/judgments.jsonl", *train, "--template", "almanac", "--device", "cpu")
    student = run_json(*learn, "--num-steps", "60", "--batch-size", "8", "-o", "student")
    losses = [step["loss"] for step in student["history"]]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    test = ("--queries", "mined/test/queries.jsonl", "--corpus", "mined/corpus.jsonl")
    found = run_json("search", *test, "--top-k", "20", "-o", "bm25.trec")
    asked = ("rerank", "--run", "bm25.trec", *test, "--model", "student", "--device", "cpu", "-o", "out")
    reranked = run_json(*asked, "--max-explanation-tokens", "24")
    assert reranked["counts"]["num_new"] == found["num_lines"]
    evaluated = run_json("evaluate", "--qrels", "mined/test/qrels.trec", "bm25.trec", "out/run.trec")
    first, second = (run["values"] for run in evaluated["runs"])
    # The same documents in another order; a student of 60 steps that compares words is no better than chance.
    assert first["R@100"] == pytest.approx(second["R@100"])
    assert 0 < second["nDCG@10"] <= first["R@100"]


# ---- wrong calls --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rerank"], "give either --run and -o, or --query and --documents"),
        (["rerank", "--run", "run.trec"], "give either --run and -o"),
        (["rerank", "--query", "q"], "give either --run and -o"),
        ([*RERANK, *ONE[1:]], "give either --run and -o"),
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
