"""The other verbs on tiny files, and all of them one after the other on a real dump."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.command_line import DOCUMENTS, LABEL, QUERIES, RERANK, TEXTS, order, run, run_json, script, whole
from whyrank.errors import TemplateMismatch
from whyrank.generators.scripted import ScriptedAnswer
from whyrank.store import write_jsonl
from whyrank.template import Template
from whyrank.training.config import DistillConfig


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
        "unreadable_expansions": 0,
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
    assert "Nothing was kept" not in run(*words).stdout
    assert run_json(*words[:-1], "few", "--limit", "3")["counts"]["questions"] == 3


ASKED = '<row Id="1" PostTypeId="1" CreationDate="2020-01-01T00:00:00.000" Score="5" Title="Why?" Body="Why so?" />'
LINKS = "".join(f'&lt;a href="https://plants.botany.org/{name}"&gt;this&lt;/a&gt;' for name in ("a.png", "b.png", "c"))
ANSWERED = (
    '<row Id="2" PostTypeId="2" ParentId="1" CreationDate="2020-01-02T00:00:00.000" Score="3" Body="'
    + LINKS.replace('"', "&quot;")
    + '" />'
)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("rows", "reasons"),
    [
        # Two links to images are dropped, the third leads to a page that was not given.
        ([ASKED, ANSWERED], ["2 links.dropped.image", "1 links.without_text", "1 questions.without_text"]),
        ([ASKED], ["1 questions.without_usable_link"]),
        ([ANSWERED], ["3 links.dropped.without_question", "1 answers.without_question"]),
        ([], ["nothing: the dump holds no questions"]),
    ],
)
def test_mining_that_keeps_nothing_says_why(rows: list[str], reasons: list[str]) -> None:
    Path("Posts.xml").write_text(POSTS.format(rows="\n".join(rows)))
    done = run("mine", "--posts", "Posts.xml", "--site", "questions.example", "-o", "mined")
    _, heading, *shown = done.stdout.splitlines()
    assert (done.exit_code, heading) == (0, "Nothing was kept. What was left out, as counted in manifest.json:")
    assert shown[: len(reasons)] == [f"  {reason}" for reason in reasons]
    assert not any(line.startswith("  ") for line in shown[len(reasons) :])


@pytest.mark.usefixtures("here")
def test_distill_then_rerank_with_the_student() -> None:
    import torch

    torch.set_num_threads(1)  # matrices this small only wait for each other
    run(*LABEL)
    words = ("distill", "--judgments", "labelled/judgments.jsonl", *TEXTS, "--template", "almanac", "-o", "student")
    small = ("--num-steps", "2", "--batch-size", "2", "--save-every", "1", "--device", "cpu")
    learn = (*words, *small, "--modes", "explain,direct")
    found = run_json(*learn)
    counted = ["num_examples", "num_left_out", "num_parameters", "num_search_examples"]
    counted += ["num_too_long", "num_trained_parameters"]
    assert sorted(found) == ["best_step", "checkpoint", "history", *counted]
    assert (found["checkpoint"], found["num_examples"], found["num_left_out"]) == ("student", 6, 0)
    assert [step["step"] for step in found["history"]] == [1, 2]
    columns = ["dev_ndcg", "dev_unparsed", "grad_norm", "learning_rate", "loss", "num_tokens", "seconds", "step"]
    assert sorted(found["history"][0]) == columns
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
        "source_weights": None,
        "dev_top_k": None,
    }
    # Three judgments, each taught in two modes.
    assert manifest["counts"] == {
        "num_judgments": 3,
        "num_examples": 6,
        "num_left_out": 0,
        "num_too_long": 0,
        "num_search_examples": 0,
        "best_step": 2,
    }
    assert manifest["figures"] == {"num_parameters": found["num_parameters"]}
    again = run(*learn)
    assert "6 examples (0 judgments without a label left out)" in again.stdout
    asked = ("rerank", "--run", "run.trec", *TEXTS, "--model", "student", "--mode", "direct", "-o", "out")
    assert run(*asked).exit_code == 0
    assert sorted(order("out/run.trec")["q1"]) == ["d1", "d2", "d3"]
    refused = run(*asked, "--template", "explain-0-2").exception
    assert isinstance(refused, TemplateMismatch)


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


@pytest.mark.usefixtures("here")
def test_distill_keeps_the_student_that_ranks_dev_queries_best() -> None:
    import torch

    torch.set_num_threads(1)
    run(*LABEL)
    words = ("distill", "--judgments", "labelled/judgments.jsonl", *TEXTS, "--template", "almanac", "-o", "student")
    small = ("--num-steps", "3", "--batch-size", "2", "--device", "cpu", "--eval-every", "2", "--balanced")
    weighted = ("--source-weight", "2", "--label-weight", "3", "--group-size", "2")
    dev = ("--dev-run", "run.trec", "--dev-queries", "queries.jsonl", "--dev-corpus", "docs.jsonl")
    Path("dev.txt").write_text("q1 0 d2 1\nq2 0 d5 1\n")
    found = run_json(*words, *small, *weighted, *dev, "--dev-qrels", "dev.txt")
    ranked = {step["step"]: step["dev_ndcg"] for step in found["history"]}
    assert ranked[1] is None  # after step 2, and after the last
    assert found["best_step"] == (2 if ranked[2] >= ranked[3] else 3)
    again = run(*words, *small, *weighted, *dev, "--dev-qrels", "dev.txt")
    assert f"after step {found['best_step']}, which is kept" in again.stdout
    for refused, reason in (
        (dev, "expected --dev-run and --dev-qrels together"),
        (("--source-weight", "1", "--source-weight", "2"), "for each of 1 files, found 2"),
        (("--quantize", "4bit"), "give a lora_rank above 0"),
    ):
        code, _, said = whole(*words, *small, *refused)
        assert code == 2
        assert reason in " ".join(said.replace("│", " ").split())
