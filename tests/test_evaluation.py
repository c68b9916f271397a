"""Measures: by hand, by another implementation, and against figures that others published."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import ir_measures
import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from whyrank.cli import app
from whyrank.datasets import read_excluded, read_qrels, read_queries, read_run, without_excluded
from whyrank.errors import InputError, TooManyUnparsed
from whyrank.evaluation import evaluate, judgments_beside, parse_measures, table, unparsed_rate
from whyrank.records import Judgment, Qrel, ScoredDocument, Status
from whyrank.stages.evaluate import evaluate_files
from whyrank.store import Manifest, write_jsonl

QRELS = [Qrel("q1", "a", 2), Qrel("q1", "b", 1), Qrel("q1", "c", 0), Qrel("q2", "a", 1), Qrel("q3", "z", 1)]


def ranked(query_id: str, doc_ids: str, score: float = 1.0) -> list[ScoredDocument]:
    """All with the same score, so that only the rank can tell them apart."""
    return [ScoredDocument(query_id, doc_id, rank, score) for rank, doc_id in enumerate(doc_ids, start=1)]


RUN = {"q1": ranked("q1", "cba"), "q2": ranked("q2", "ba"), "q9": ranked("q9", "a")}


def test_values_by_hand() -> None:
    evaluation = evaluate(QRELS, {"mine": RUN}, ["nDCG@10", "RR@10", "P@1"], ties="rank")
    # q1: gains 0, 1, 2 at ranks 1, 2, 3 against the ideal 2, 1; q2: gain 1 at rank 2; q3 is missing and counts 0.
    first = (1 / math.log2(3) + 2 / math.log2(4)) / (2 / math.log2(2) + 1 / math.log2(3))
    second = 1 / math.log2(3)
    result = evaluation.runs[0]
    assert result.per_query["nDCG@10"] == pytest.approx({"q1": first, "q2": second, "q3": 0.0})
    assert result.values == pytest.approx({"nDCG@10": (first + second) / 3, "RR@10": (1 / 2 + 1 / 2) / 3, "P@1": 0.0})
    assert (result.num_queries, result.num_missing, result.num_without_qrels) == (3, 1, 1)
    assert list(result.per_query["RR@10"]) == ["q1", "q2", "q3"]


def test_ties_follow_the_run_or_trec_eval() -> None:
    # trec_eval orders equal scores by descending id: "cba" stays, "abc" is turned round.
    qrels = [Qrel("q", "a", 1)]
    for order, by_rank in (("abc", 1.0), ("cba", 1 / 3)):
        run = {"run": {"q": ranked("q", order)}}
        assert evaluate(qrels, run, ["RR"], ties="rank").runs[0].values["RR"] == pytest.approx(by_rank)
        assert evaluate(qrels, run, ["RR"]).runs[0].values["RR"] == pytest.approx(1 / 3)


def test_json_is_exactly_this() -> None:
    evaluation = evaluate(QRELS, {"mine": RUN, "other": {"q2": ranked("q2", "a")}}, ["RR@10", "P@1"], ties="rank")
    assert evaluation.to_json() == {
        "measures": ["RR@10", "P@1"],
        "runs": [
            {
                "name": "mine",
                "queries": 3,
                "missing": 1,
                "without_qrels": 1,
                "values": {"RR@10": 1 / 3, "P@1": 0.0},
                "unparsed_rate": None,
            },
            {
                "name": "other",
                "queries": 3,
                "missing": 2,
                "without_qrels": 0,
                "values": {"RR@10": 1 / 3, "P@1": 1 / 3},
                "unparsed_rate": None,
            },
        ],
    }
    full = json.loads(json.dumps(evaluation.to_json(per_query=True)))
    assert full["runs"][1]["per_query"]["P@1"] == {"q1": 0.0, "q2": 1.0, "q3": 0.0}


def test_limit_leaves_queries_out_and_does_not_miss_their_qrels(tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("q1 0 a 1\nq2 0 a 1\nq3 0 a 1\n")
    path = tmp_path / "bm25.trec"
    path.write_text("".join(f"{query_id} Q0 a 1 1.0 t\n" for query_id in ("q1", "q2", "q3", "q9")))
    for limit, expected in ((1, (1, 0, 1)), (2, (2, 0, 1)), (None, (3, 0, 1))):  # q9 alone has no qrels
        found = evaluate_files([path], tmp_path / "qrels", ["RR"], limit=limit).runs[0]
        assert (found.num_queries, found.num_missing, found.num_without_qrels) == expected


def test_an_empty_list_is_a_missing_query() -> None:
    with_empty = evaluate(QRELS, {"r": {**RUN, "q3": []}}, ["nDCG@10"]).runs[0]
    assert with_empty == evaluate(QRELS, {"r": RUN}, ["nDCG@10"]).runs[0]
    assert with_empty.num_missing == 1


def test_measures_that_count_are_summed() -> None:
    # ir_measures adds up how many were retrieved: 3 + 2 documents.
    assert evaluate(QRELS, {"r": RUN}, ["NumRet"]).runs[0].values == {"NumRet": 5.0}


@pytest.mark.parametrize(
    "name",
    [
        "nDCG@10", "NDCG@10", "nDCG", "nDCG(dcg='log2')@5", "RR", "MRR@10", "RR(rel=2)@10", "AP", "AP(rel=2)@100",
        "P(rel=2)@5", "R@100", "Rprec", "Success@1", "Judged@10", "Bpref", "IPrec@0.1", "SetF(beta=2.0)", "infAP",
        "nDCG(gains={0:0,1:1,2:3})@10", "P(judged_only=True)@5",
    ],
)  # fmt: skip
def test_measures_are_read_as_ir_measures_reads_them(name: str) -> None:
    assert parse_measures([f" {name} "]) == [ir_measures.parse_measure(name)]


def test_all_measures_that_cannot_be_read_are_named() -> None:
    names = [
        "nDCG@10",
        "ndgc@10",
        "nDCG(cutof=3)",
        "P",
        "nDCG@'x'",
        "nDCG@",
        "1 + 1",
        "P(5)",
        "RR(rel=x)",
        "Bpref@3",
        "\0",
        # These would abort the process, or fail when it is too late.
        "nDCG@0",
        "nDCG@-1",
        "nDCG@1.5",
        "P@True",
        "R(cutoff=0)",
        "RR@99999999999999999999",
        "P(rel=0)@5",
        "Bpref(rel=-3)",
        "RR(rel=99999999999999)",
        "IPrec@-0.1",
        "IPrec@2",
    ]
    with pytest.raises(InputError) as refusal:
        parse_measures(names)
    message = str(refusal.value)
    assert all(repr(name) + ":" in message for name in names[1:])
    assert "'nDCG@10':" not in message
    with pytest.raises(InputError, match="expected at least one measure"):
        parse_measures([])
    assert list(map(str, parse_measures(["RR", "nDCG@10", "NDCG@10", "RR(rel=1)"]))) == ["RR", "nDCG@10"]


@pytest.mark.parametrize("measures", ["nDCG@x", "nDGC@10", "nDCG@10 P@0", "  "])
def test_a_wrong_measure_is_wrong_use(measures: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", "none", "--qrels", "none", "--measures", measures])
    assert result.exit_code == 2
    assert "expected" in result.stderr


def judgment(status: Status, number: int) -> Judgment:
    label, score = ("1", 1.0) if status in ("ok", "forced", "low_mass") else (None, None)
    return Judgment(
        f"key{number}", "q", f"d{number}", status, "explain", label, score, None, None, "why", (0, 1), False, False,
        1, 1, "template", "model",
    )  # fmt: skip


def test_unparsed_judgments(tmp_path: Path) -> None:
    assert judgments_beside(tmp_path / "run.trec") is None
    path = tmp_path / "judgments.jsonl"
    statuses: list[Status] = ["ok", "ok", "ok", "forced", "low_mass", "unparsed", "error", "ok"]
    write_jsonl(path, [judgment(status, number) for number, status in enumerate(statuses)])
    assert judgments_beside(tmp_path / "run.trec") == path
    assert unparsed_rate(path) == 0.25
    runs = {"mine": RUN, "other": RUN}
    with pytest.raises(TooManyUnparsed, match=r"expected at most 1.00% .* run 'mine' without a label, found 25.00%"):
        evaluate(QRELS, runs, ["RR"], judgments={"mine": path})
    with pytest.raises(TooManyUnparsed):
        evaluate(QRELS, runs, ["RR"], judgments={"mine": path}, allow_unparsed=0.2499)
    evaluation = evaluate(QRELS, runs, ["RR"], judgments={"mine": path}, allow_unparsed=0.25)
    assert [result.unparsed_rate for result in evaluation.runs] == [0.25, None]
    path.write_text("")
    assert unparsed_rate(path) is None
    path.write_text("{oops\n")
    with pytest.raises(InputError, match=r"judgments\.jsonl:1: expected a Judgment .* Remove the line; the command"):
        unparsed_rate(path)


def test_judgments_are_taken_only_for_the_run_made_from_them(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    write_jsonl(path, [judgment("error", 1)])
    for name in ("bm25.trec", "candidates.trec", "run.txt"):  # beside them, but not theirs
        assert judgments_beside(tmp_path / name) is None
    assert judgments_beside(tmp_path / "run.trec") == judgments_beside(tmp_path / "run.json") == path
    for stage, expected in (("rerank", path), ("label", None)):
        Manifest(stage, {}).write(tmp_path)
        assert judgments_beside(tmp_path / "run.trec") == expected
        assert judgments_beside(tmp_path / "bm25.trec") is None
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: expected one JSON value"):
        judgments_beside(tmp_path / "run.trec")


def test_what_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"expected run 'r' to rank queries of the qrels .'q1', 'q2', 'q3'., found only 'x'"
    ):
        evaluate(QRELS, {"r": {"x": ranked("x", "a")}}, ["RR"])
    with pytest.raises(InputError, match="expected qrels"):
        evaluate([], {"r": RUN}, ["RR"])
    with pytest.raises(InputError, match="at least one run"):
        evaluate(QRELS, {}, ["RR"])
    with pytest.raises(InputError, match="found 2 and 0"):
        evaluate([*QRELS, Qrel("q1", "a", 0)], {"r": RUN}, ["RR"])
    with pytest.raises(InputError, match=r"ranks 1, 2, 3, \.\.\. in order"):
        evaluate(QRELS, {"r": {"q1": RUN["q1"][::-1]}}, ["RR"])
    with pytest.raises(InputError, match="every document once"):
        evaluate(QRELS, {"r": {"q1": ranked("q1", "aa")}}, ["RR"])
    with pytest.raises(InputError, match="found judgments of s"):
        evaluate(QRELS, {"r": RUN}, ["RR"], judgments={"s": Path("x")})
    with pytest.raises(InputError, match="allow_unparsed from 0 to 1"):
        evaluate(QRELS, {"r": RUN}, ["RR"], allow_unparsed=1.1)


def test_table_shows_what_was_measured() -> None:
    evaluation = evaluate(QRELS, {"mine": RUN}, ["RR@10", "P@1"], ties="rank")
    text = printed(table(evaluation))
    assert re.search(r"mine\W+0\.3333\W+0\.0000\W+3\W+1\W+1\b", text)
    assert re.search(r"run\W+RR@10\W+P@1\W+queries\W+missing\W+without qrels", text)
    rated = replace(evaluation, runs=(replace(evaluation.runs[0], num_without_qrels=0, unparsed_rate=0.005),))
    text = printed(table(rated))
    assert re.search(r"missing\W+unparsed", text)
    assert "0.50%" in text


def printed(drawn: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(drawn)
    return capture.get()


# ---- real runs --------------------------------------------------------------------------------------------------


def ndcg(order: list[str], grades: dict[str, int], cutoff: int = 10) -> float:
    """nDCG with linear gains, written from its definition."""

    def dcg(gains: list[int]) -> float:
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:cutoff], start=1))

    ideal = dcg(sorted((grade for grade in grades.values() if grade > 0), reverse=True))
    return dcg([max(grades.get(doc_id, 0), 0) for doc_id in order]) / ideal if ideal else 0.0


# Published with the collection; RepLLaMA's scores have three decimals and many ties, which trec_eval ordered.
DL19 = {
    "BM25": ".5058",
    "BM25_RM3": ".5216",
    "D_BERT_KD_TASB": ".7210",
    "REP_LLAMA": ".7384",
    "SPLADE_P_P_ENSEMBLE_DISTIL": ".7308",
}


@pytest.mark.parametrize("name", DL19)
def test_dl19(name: str, shared_data: Path) -> None:
    folder = shared_data / "trec-dl"
    qrels, run = read_qrels(folder / "qrels.dl19-passage.txt"), read_run(folder / f"run.dl19.{name}.txt")
    assert len(qrels) == 9260  # wc -l
    published = evaluate(qrels, {name: run}, ["nDCG@10"], ties="trec_eval").runs[0]
    assert f"{published.values['nDCG@10']:.4f}".lstrip("0") == DL19[name]
    assert (published.num_queries, published.num_missing, published.num_without_qrels) == (43, 0, 0)
    # By rank: the file's own order, read and measured without any of our code.
    lines = [line.split() for line in (folder / f"run.dl19.{name}.txt").read_text().splitlines()]
    grades: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels.dl19-passage.txt").read_text().splitlines():
        query_id, _, doc_id, grade = line.split()
        grades.setdefault(query_id, {})[doc_id] = int(grade)
    orders = {query_id: [line[2] for line in lines if line[0] == query_id] for query_id in grades}
    by_rank = evaluate(qrels, {name: run}, ["nDCG@10"], ties="rank").runs[0].per_query["nDCG@10"]
    assert by_rank == pytest.approx(
        {query_id: ndcg(orders[query_id], grades[query_id]) for query_id in grades}, abs=1e-9
    )


def test_dl19_candidates_with_text_are_the_bm25_run(shared_data: Path) -> None:
    folder = shared_data / "trec-dl"
    candidates = read_run(folder / "dl19.bm25-top100.with-text.json")
    assert candidates == read_run(folder / "run.dl19.BM25.txt")
    topics = {query.query_id: query.text for query in read_queries(folder / "topics.dl19-passage.txt")}
    assert topics == {query.query_id: query.text for query in read_queries(folder / "dl19.bm25-top100.with-text.json")}


def xrr2_figures(folder: Path) -> dict[str, tuple[str, str]]:
    rows = re.findall(r"│\s+([a-z]\w+) │\s+(0\.\d{5}) │\s+(0\.\d{5}) │", (folder / "README.md").read_text())
    return {subset: (first, second) for subset, first, second in rows}


SUBSETS = (
    "biology", "earth_science", "economics", "psychology", "robotics", "stackoverflow", "sustainable_living",
    "leetcode", "pony", "aops", "theoremqa_theorems",
)  # fmt: skip


@pytest.mark.parametrize("subset", SUBSETS)
def test_xrr2(subset: str, shared_data: Path) -> None:
    """To all five digits: original qrels, no queries missing, ties as trec_eval orders them."""
    bright = shared_data / "bright"
    qrels = read_qrels(bright / "qrels" / f"qrels.bright-{subset.replace('_', '-')}.txt")
    runs = {name: read_run(bright / "runs/xrr2" / f"{subset}__{name}_results.json") for name in ("rr", "rr2")}
    results = evaluate(qrels, runs, ["nDCG@10"], ties="trec_eval").runs
    measured = tuple(f"{result.values['nDCG@10']:.5f}" for result in results)
    assert measured == xrr2_figures(bright / "runs/xrr2")[subset]
    assert [result.num_missing for result in results] == [0, 0]


# In hundredths, from the notes beside the runs.
REASONIR = dict(
    zip(
        SUBSETS,
        ("43.49", "43.00", "32.65", "39.57", "20.82", "30.96", "27.34", "31.68", "19.55", "7.37", "36.68"),
        strict=True,
    )
)


@pytest.mark.parametrize("subset", SUBSETS)
def test_reasonir_and_bright_examples(subset: str, shared_data: Path) -> None:
    bright = shared_data / "bright"
    examples = bright / "topics" / f"topics.bright-{subset.replace('_', '-')}-original.jsonl.gz"
    qrels = read_qrels(bright / "qrels" / f"qrels.bright-{subset.replace('_', '-')}.txt")
    assert set(read_qrels(examples)) == set(qrels)
    run = read_run(bright / "runs/reasonir-gpt4" / f"{subset}.reasonir_gpt4cot_top100.txt")
    result = evaluate(qrels, {"run": run}, ["nDCG@10"], ties="trec_eval").runs[0]
    assert f"{100 * result.values['nDCG@10']:.2f}" == REASONIR[subset]
    assert without_excluded(run, read_excluded(examples)) == (run, 0)  # whoever made the run left them out
