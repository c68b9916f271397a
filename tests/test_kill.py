"""SIGKILL at any moment: no judgment is lost, doubled or judged twice, and the end is the same as without it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.checkpoints import save_checkpoint
from tests.fake_endpoint import FakeEndpoint, Reply
from whyrank.cli import app
from whyrank.datasets import write_run
from whyrank.records import Document, Judgment, Query, ScoredDocument
from whyrank.store import read_jsonl, write_jsonl
from whyrank.training.distill import Step

CONCURRENCY = 4


def start(*words: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own, on one thread."""
    return subprocess.Popen(
        [sys.executable, "-c", "from whyrank.cli import main; main()", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> bool:
    """Kill as soon as `is_time`; whether the process was still alive then."""
    while process.poll() is None and not is_time():
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode in (0, -9), errors.decode()
    return process.returncode == -9


def finish(*words: str, timeout: float = 300) -> None:
    """Run to the end, in seconds at most `timeout`."""
    process = start(*words)
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors.decode()


def write_collection(folder: Path, num_queries: int, num_documents: int) -> tuple[str, ...]:
    """Queries that each rank all documents; returns the options that name the files."""
    words = ["why", "does", "the", "quick", "fox", "ask", "or", "judge", "a", "relevance", "label", "documents", "help"]
    rng = random.Random(5)
    documents = [Document(f"d{i}", f"{i} " + " ".join(rng.choices(words, k=9))) for i in range(num_documents)]
    queries = [Query(f"q{i}", f"{i} " + " ".join(rng.choices(words, k=5))) for i in range(num_queries)]
    write_jsonl(folder / "docs.jsonl", documents)
    write_jsonl(folder / "queries.jsonl", queries)
    lines = {
        query.query_id: [
            ScoredDocument(query.query_id, document.doc_id, rank, -float(rank))
            for rank, document in enumerate(documents, start=1)
        ]
        for query in queries
    }
    write_run(folder / "run.trec", lines, "first")
    names = {"--run": "run.trec", "--corpus": "docs.jsonl", "--queries": "queries.jsonl"}
    return tuple(word for flag, name in names.items() for word in (flag, str(folder / name)))


def num_lines(out: Path) -> int:
    path = out / "judgments.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def judgments(out: Path) -> Iterator[Judgment]:
    return read_jsonl(out / "judgments.jsonl", Judgment)


def kill_and_resume(words: tuple[str, ...], out: Path, num_pairs: int, num_kills: int, seed: int) -> int:
    """Kill at random places and moments, then let it finish; returns the number of kills that hit a living process."""
    rng = random.Random(seed)
    # Mostly while it works; sometimes at a moment that may lie in its start or at its end.
    places = sorted(rng.randrange(num_pairs) for _ in range(num_kills))
    num_hits = 0
    for place in places:
        before, begun = num_lines(out), time.monotonic()
        pause = rng.uniform(0.0, 2.0) if rng.random() < 0.2 else 60.0
        num_hits += kill_when(
            start(*words, "-o", str(out)),
            lambda place=place, begun=begun, pause=pause: (  # type: ignore[misc]  # bound per round
                num_lines(out) > place or time.monotonic() - begun > pause
            ),
        )
        assert num_lines(out) >= before
    num_known = num_lines(out)
    finish(*words, "-o", str(out))
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (counts["num_known"], counts["num_new"]) == (num_known, num_pairs - num_known)
    return num_hits


def assert_same_result(out: Path, whole: Path, num_pairs: int) -> None:
    found = [(judgment.query_id, judgment.doc_id) for judgment in judgments(out)]
    assert len(found) == len(set(found)) == num_pairs
    assert (out / "run.trec").read_bytes() == (whole / "run.trec").read_bytes()
    assert names(out) == names(whole)


def names(folder: Path) -> list[str]:
    """What lies there, but for temporary files: those of a killed process are nobody's any more."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".tmp")


def graded(document: str, attempt: int) -> Reply:
    """Always the same label for a document, after a moment."""
    label = sum(map(ord, document)) % 3
    return Reply(text=f"Explanation: it says {document[:9]}.\n\nRelevance Label: {label} ##", delay=0.01)


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint(graded) as running:
        yield running


@pytest.mark.parametrize(
    ("num_documents", "num_kills"), [(60, 3), pytest.param(200, 30, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_rerank_asks_nothing_twice_but_what_was_under_way(
    tmp_path: Path, endpoint: FakeEndpoint, num_documents: int, num_kills: int
) -> None:
    collection = write_collection(tmp_path, 2, num_documents)
    model = f"endpoint:{endpoint.url}#grader"
    words = ("rerank", *collection, "--model", model, "--concurrency", str(CONCURRENCY))
    whole = tmp_path / "whole"
    assert CliRunner().invoke(app, [*words, "-o", str(whole)]).exit_code == 0
    num_pairs = 2 * num_documents
    assert len(endpoint.seen) == num_pairs
    num_hits = kill_and_resume(words, tmp_path / "out", num_pairs, num_kills, seed=num_kills)
    assert num_hits >= num_kills // 2
    assert_same_result(tmp_path / "out", whole, num_pairs)
    assert len(endpoint.seen) - 2 * num_pairs <= num_hits * CONCURRENCY


@pytest.mark.slow
def test_rerank_with_a_local_model(tmp_path: Path) -> None:
    collection = write_collection(tmp_path, 3, 40)
    model = save_checkpoint("llama", tmp_path / "model")
    small = ("--batch-size", "4", "--max-explanation-tokens", "6", "--device", "cpu")
    words = ("rerank", *collection, "--model", str(model), *small)
    finish(*words, "-o", str(tmp_path / "whole"))
    num_hits = kill_and_resume(words, tmp_path / "out", 120, 8, seed=1)
    assert num_hits >= 4
    # Batches are made up differently after a kill, and floating point adds in another order.
    found, expected = (
        {(judgment.query_id, judgment.doc_id): judgment for judgment in judgments(tmp_path / name)}
        for name in ("out", "whole")
    )
    assert num_lines(tmp_path / "out") == len(found) == len(expected) == 120
    for pair, judgment in expected.items():
        assert (found[pair].explanation, found[pair].label) == (judgment.explanation, judgment.label)
        assert found[pair].probs == pytest.approx(judgment.probs, abs=1e-5)
        assert found[pair].score == pytest.approx(judgment.score, abs=1e-5)


def num_saved(out: Path) -> int:
    """Steps in the last saved state; between two renames there is none for a moment."""
    try:
        return len(json.loads((out / "state" / "state.json").read_text())["history"])
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("num_kills", [1, pytest.param(12, marks=pytest.mark.slow)], ids=["few", "many"])
def test_distill_ends_in_the_same_weights(tmp_path: Path, num_kills: int) -> None:
    write_collection(tmp_path, 2, 12)
    pairs = [
        {"query_id": f"q{q}", "doc_id": f"d{d}", "relation": "negative", "evidence": "", "relevance": None}
        for q in range(2)
        for d in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    texts = ("--queries", str(tmp_path / "queries.jsonl"), "--corpus", str(tmp_path / "docs.jsonl"))
    labels = ("label", "--pairs", str(tmp_path / "pairs.jsonl"), *texts, "--teacher", "overlap")
    assert CliRunner().invoke(app, [*labels, "-o", str(tmp_path / "labelled")]).exit_code == 0
    num_steps = 20 * num_kills
    learn = ["distill", "--judgments", str(tmp_path / "labelled" / "judgments.jsonl"), *texts, "--template", "almanac"]
    learn += ["--num-steps", str(num_steps), "--batch-size", "4", "--save-every", "2"]
    learn += ["--device", "cpu", "--precision", "float32"]
    rng, out = random.Random(num_kills), tmp_path / "out"
    for number in range(num_kills):
        place, delay = rng.randint(18 * number + 1, 18 * number + 14), rng.uniform(0.0, 0.05)

        def is_time(place: int = place, delay: float = delay) -> bool:
            is_there = num_saved(out) > place
            time.sleep(delay * is_there)
            return is_there

        assert kill_when(start(*learn, "-o", str(out)), is_time)
        assert not (out / "whyrank.json").exists()
    torch.set_num_threads(1)  # as in the other processes
    whole = tmp_path / "whole"
    for folder in (out, whole):
        assert CliRunner().invoke(app, [*learn, "-o", str(folder)]).exit_code == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert names(out) == names(whole)
    logs = [list(read_jsonl(folder / "metrics.jsonl", Step)) for folder in (out, whole)]
    assert [step.loss for step in logs[0]] == [step.loss for step in logs[1]]
    assert len(logs[0]) == num_steps


@pytest.mark.slow
def test_a_whole_real_run_killed_on_the_way(tmp_path: Path, shared_data: Path) -> None:
    """TREC DL 2019: 43 queries with 100 passages of BM25 each, 4,300 pairs."""
    source = shared_data / "trec-dl" / "dl19.bm25-top100.with-text.json"
    model = save_checkpoint("llama", tmp_path / "model")
    small = ("--batch-size", "32", "--max-explanation-tokens", "4", "--device", "cpu")
    words = ("rerank", "--run", str(source), "--model", str(model), *small, "-o", str(tmp_path / "out"))
    for place in (300, 900, 901):
        assert kill_when(start(*words), lambda place=place: num_lines(tmp_path / "out") > place)  # type: ignore[misc]
    num_known = num_lines(tmp_path / "out")
    finish(*words, timeout=3000)
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert (counts["num_known"], counts["num_new"], counts["num_queries"]) == (num_known, 4300 - num_known, 43)
    assert len({(judgment.query_id, judgment.doc_id) for judgment in judgments(tmp_path / "out")}) == 4300
    assert num_lines(tmp_path / "out") == 4300
    qrels = shared_data / "trec-dl" / "qrels.dl19-passage.txt"
    result = CliRunner().invoke(app, ["evaluate", "--qrels", str(qrels), str(tmp_path / "out" / "run.trec"), "--json"])
    (found,) = json.loads(result.stdout)["runs"]
    assert (found["queries"], found["missing"], found["unparsed_rate"]) == (43, 0, 0.0)
    # Chance: the same 100 passages per query, so recall is the first stage's, and the order means nothing.
    first = CliRunner().invoke(app, ["evaluate", "--qrels", str(qrels), str(source), "--json"])
    before = json.loads(first.stdout)["runs"][0]["values"]
    assert found["values"]["R@100"] == pytest.approx(before["R@100"])
    assert found["values"]["nDCG@10"] < before["nDCG@10"]
