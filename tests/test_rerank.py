"""Reranking from Python: what may be given, what comes back, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import save_checkpoint
from whyrank import Reranker
from whyrank.errors import InputError, TooManyUnparsed
from whyrank.generators import Completion, Request
from whyrank.generators.opening import ModelOptions
from whyrank.generators.overlap import Overlap
from whyrank.generators.scripted import Scripted, ScriptedAnswer
from whyrank.records import Document, Query, ScoredDocument
from whyrank.rerank import DocumentLike, Ranking
from whyrank.store import write_jsonl
from whyrank.template import Template

TEMPLATE = Template.load("explain-0-2")
QUERY = "yellow leaves plant"
# Of the query's three words the documents hold 0, 3, 1 and 2. Thirds: 0 -> label 0, 1 -> 1, 2 -> 2, 3 -> 2.
TEXTS = ["nothing at all", "yellow leaves of a plant", "one plant", "yellow leaves"]


def overlap() -> Reranker:
    return Reranker.of(TEMPLATE, Overlap())


def test_texts_are_ranked_with_reasons() -> None:
    ranking = overlap().rank(QUERY, TEXTS)
    assert [(result.id, result.rank, result.label, result.score) for result in ranking] == [
        ("1", 1, "2", 2.0),
        ("3", 2, "2", 2.0),
        ("2", 3, "1", 1.0),
        ("0", 4, "0", 0.0),
    ]
    assert [result.first_stage_rank for result in ranking] == [2, 4, 3, 1]
    assert [result.rank_score for result in ranking] == [2.0, 2.0, 1.0, 0.0]
    assert "(yellow, leaves, plant)" in ranking[0].explanation
    assert ranking.num_unreadable == 0


def test_a_ranking_is_a_sequence() -> None:
    ranking = overlap().rank(QUERY, TEXTS)
    assert isinstance(ranking, Sequence)
    assert len(ranking) == 4
    assert [result.id for result in ranking[:2]] == ["1", "3"]
    assert ranking[-1].id == "0"
    assert ranking.index(ranking[2]) == 2
    assert ranking[2] in ranking
    assert [result.id for result in reversed(ranking)] == ["0", "2", "3", "1"]
    assert ranking == overlap().rank(QUERY, TEXTS)


def test_to_run() -> None:
    run = overlap().rank(Query("q7", QUERY), TEXTS[:2]).to_run()
    assert run == [ScoredDocument("q7", "1", 1, 2.0), ScoredDocument("q7", "0", 2, 0.0)]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("words", Document("0", "words")),
        (Document("x", "words", title="T", source="s"), Document("x", "words", title="T", source="s")),
        ({"doc_id": "x", "text": "words", "title": "T", "other": 1}, Document("x", "words", title="T")),
        ({"id": 7, "content": "words"}, Document("7", "words")),
        ({"_id": "x", "contents": "words", "title": None}, Document("x", "words")),
        ({"docid": "x", "body": "words"}, Document("x", "words")),
        ({"text": "words"}, Document("0", "words")),
    ],
)
def test_documents_may_be_given_in_many_shapes(document: DocumentLike, expected: Document) -> None:
    (result,) = overlap().rank("words", [document])
    assert (result.id, result.passage, result.label) == (expected.doc_id, expected.full_text, "2")


def test_fields_name_what_mappings_hold() -> None:
    fields = {"doc_id": "pid", "text": "passage", "title": "name"}
    documents = [{"pid": 3, "passage": "yellow", "text": "plant leaves", "name": "leaves"}]
    (result,) = overlap().rank(QUERY, documents, fields=fields)
    assert (result.id, result.passage) == ("3", "leaves\nyellow")


@pytest.mark.parametrize(
    ("documents", "fields", "message"),
    [
        ([], None, "expected at least one document"),
        ("one text", None, "expected a list of documents, found a single str"),
        ({"text": "words"}, None, "expected a list of documents, found a single dict"),
        (["a", {"title": "no text"}], None, r"document 1: expected a text under text, content.* found the fields"),
        (["a", {"text": 5}], None, "document 1: expected a text"),
        (["a", 5], None, "document 1: expected a text, a mapping or a Document, found int"),
        ([{"text": "a"}], {"doc_id": "pid"}, r"document 0: no field pid, found the fields \['text'\]"),
        ([{"text": "a"}], {"id": "pid"}, "expected fields among doc_id, text and title, found id"),
        ([{"id": "1", "text": "a"}, {"id": 1, "text": "b"}], None, "document id '1' is there twice"),
        (["a", {"id": "0", "text": "b"}], None, "document id '0' is there twice"),
    ],
)
def test_other_shapes_are_refused(documents: list[DocumentLike], fields: dict[str, str] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        overlap().rank(QUERY, documents, fields=fields)


def test_top_k_judges_all_and_returns_the_best() -> None:
    seen: list[str] = []
    ranking = overlap().rank(QUERY, TEXTS, top_k=2, on_judgment=lambda judgment: seen.append(judgment.doc_id))
    assert [result.id for result in ranking] == ["1", "3"]
    assert sorted(seen) == ["0", "1", "2", "3"]
    assert len(overlap().rank(QUERY, TEXTS, top_k=9)) == 4
    for top_k in (0, -1):
        with pytest.raises(InputError, match="expected top_k of at least 1"):
            overlap().rank(QUERY, TEXTS, top_k=top_k)


@pytest.mark.parametrize("scores", [[9.0, 0.0, 0.0, 0.0], np.array([9.0, 0.0, 0.0, 0.0])])
def test_first_stage_scores_are_mixed_in(scores: Sequence[float]) -> None:
    mixed = Reranker.of(TEMPLATE, Overlap(), fuse="minmax:0.25")
    # Model 0, 2, 1, 2 becomes 0, 1, .5, 1, weighing .25; the first stage becomes 1, 0, 0, 0, weighing .75.
    ranking = mixed.rank(QUERY, TEXTS, first_stage_scores=scores)
    assert [(result.id, result.rank_score) for result in ranking] == [
        ("0", 0.75),
        ("1", 0.25),
        ("3", 0.25),
        ("2", 0.125),
    ]
    assert [result.score for result in ranking] == [0.0, 2.0, 2.0, 1.0]
    assert type(ranking[0].rank_score) is float
    with pytest.raises(InputError, match="expected 4 first_stage_scores, one for each document, found 2"):
        mixed.rank(QUERY, TEXTS, first_stage_scores=scores[:2])
    with pytest.raises(InputError, match="pass first_stage_scores"):
        mixed.rank(QUERY, TEXTS)


def test_the_passage_is_what_the_model_was_shown() -> None:
    # The stand-in counts four characters as a token: two tokens are "Title\nwo".
    short = replace(TEMPLATE, limits=replace(TEMPLATE.limits, max_document_tokens=2))
    (result,) = Reranker.of(short, Overlap()).rank("words", [Document("x", "words and more", title="Title")])
    assert result.passage == "Title\nwo"
    assert result.judgment.is_document_cut


def test_on_unparsed_policies() -> None:
    answers = [
        ScriptedAnswer("q", "a", label="0"),
        ScriptedAnswer("q", "b", answer="?"),
        ScriptedAnswer("q", "c", label="2"),
    ]
    found = {}
    for policy in ("first_stage", "last"):
        ranking = Reranker.of(TEMPLATE, Scripted(answers), on_unparsed=policy).rank("q", ["a", "b", "c"])
        found[policy] = [(result.id, result.score) for result in ranking]
        assert ranking.num_unreadable == 1
    assert found == {
        "first_stage": [("2", 2.0), ("1", None), ("0", 0.0)],
        "last": [("2", 2.0), ("0", 0.0), ("1", None)],
    }
    with pytest.raises(TooManyUnparsed):
        Reranker.of(TEMPLATE, Scripted(answers), on_unparsed="error").rank("q", ["a", "b", "c"])


# ---- many queries in one stream -----------------------------------------------------------------------------


class Backwards(Overlap):
    """Answers windows of requests from the last to the first, and tells how far it has read."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.num_read = 0

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        waiting: list[tuple[int, Completion]] = []
        for numbered in super().generate(requests):
            self.num_read += 1
            waiting.append(numbered)
            if len(waiting) == self.window:
                yield from reversed(waiting)
                waiting.clear()
        yield from reversed(waiting)


Job = tuple[Query, list[Document], list[ScoredDocument]]


def job(number: int, texts: Sequence[str] = TEXTS) -> Job:
    """First-stage lines in the order of the texts."""
    documents = [Document(f"d{index}", text) for index, text in enumerate(texts)]
    lines = [ScoredDocument(f"q{number}", f"d{index}", index + 1, -float(index)) for index in range(len(texts))]
    return Query(f"q{number}", QUERY), documents, lines


@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_rank_many_keeps_the_order_of_jobs(window: int) -> None:
    jobs = [job(0), job(1, TEXTS[::-1]), job(2, TEXTS[:1]), job(3)]
    rankings = list(Reranker.of(TEMPLATE, Backwards(window)).rank_many(jobs))
    assert [ranking.query_id for ranking in rankings] == ["q0", "q1", "q2", "q3"]
    assert [result.id for result in rankings[0]] == ["d1", "d3", "d2", "d0"]
    assert [result.id for result in rankings[1]] == ["d0", "d2", "d1", "d3"]  # reversed texts: 2, 1, 2, 0
    alone = [overlap().rank(query, documents, fields=None) for query, documents, _ in jobs]
    assert [ranking.results for ranking in rankings] == [ranking.results for ranking in alone]


def test_rank_many_tells_pairs_of_the_same_ids_apart() -> None:
    """Two jobs with the same query id and document id, answered in reverse: each keeps its own judgment."""
    line = [ScoredDocument("q", "d", 1, 0.0)]
    jobs = [
        (Query("q", QUERY), [Document("d", TEXTS[1])], line),
        (Query("q", QUERY), [Document("d", TEXTS[0])], line),
    ]
    rankings = list(Reranker.of(TEMPLATE, Backwards(2)).rank_many(jobs))
    alone = [overlap().rank(query, documents) for query, documents, _ in jobs]
    assert alone[0][0].label != alone[1][0].label
    assert [ranking[0] for ranking in rankings] == [ranking[0] for ranking in alone]


def test_documents_that_the_query_excludes_are_left_out() -> None:
    query, documents, lines = job(0)
    banned = replace(query, excluded_doc_ids=("d1", "unheard of"))
    assert [result.id for result in overlap().rank(banned, documents)] == ["d3", "d2", "d0"]
    (ranking,) = overlap().rank_many([(banned, documents, lines)])
    assert [result.id for result in ranking] == ["d3", "d2", "d0"]


def test_words_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="expected on_unparsed among first_stage, last, error, found 'lasst'"):
        Reranker.of(TEMPLATE, Overlap(), on_unparsed="lasst")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected mode among explain, direct, found 'expalin'"):
        Reranker.of(TEMPLATE, Overlap(), mode="expalin")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected finite first-stage scores, found nan"):
        Reranker.of(TEMPLATE, Overlap(), fuse="zscore:0.5").rank(
            QUERY, TEXTS[:2], first_stage_scores=[1.0, float("nan")]
        )


def test_rank_many_yields_a_ranking_as_soon_as_it_is_complete() -> None:
    generator = Backwards(1)
    rankings = Reranker.of(TEMPLATE, generator).rank_many(job(number) for number in range(100))
    next(rankings)
    assert generator.num_read == 4
    next(rankings)
    assert generator.num_read == 8


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_rank_many_keeps_jobs_without_documents(empty: int) -> None:
    jobs = [job(number, [] if number == empty else TEXTS) for number in range(3)]
    rankings = list(overlap().rank_many(jobs))
    assert [(ranking.query_id, len(ranking)) for ranking in rankings] == [
        (f"q{number}", 0 if number == empty else 4) for number in range(3)
    ]
    assert list(overlap().rank_many([job(5, [])])) == [Ranking("q5", ())]


def test_rank_many_wants_one_line_for_each_document() -> None:
    query, documents, lines = job(0)
    with pytest.raises(InputError, match="query q0: candidates and documents must have the same ids"):
        list(overlap().rank_many([(query, documents, lines[:-1])]))
    with pytest.raises(InputError, match="query q0: document id 'd0' is there twice"):
        list(overlap().rank_many([(query, [*documents, documents[0]], lines)]))


# ---- loading ------------------------------------------------------------------------------------------------


def test_load_overlap() -> None:
    reranker = Reranker.load("overlap", max_explanation_tokens=3, fuse="rrf", mode="direct", instruction="Judge.")
    judge = reranker.judge
    assert (judge.generator.name, judge.mode, judge.instruction, str(reranker.fuse)) == (
        "overlap",
        "direct",
        "Judge.",
        "rrf",
    )
    assert judge.template == replace(TEMPLATE, limits=replace(TEMPLATE.limits, max_explanation_tokens=3))
    assert Reranker.load("overlap", template="explain-0-10").judge.template.labels == "0-10"


def test_load_script(tmp_path: Path) -> None:
    path = tmp_path / "script.jsonl"
    write_jsonl(path, [ScriptedAnswer("q", "a", "since", probs=(0.1, 0.2, 0.7)), ScriptedAnswer("q", "b", label="2")])
    ranking = Reranker.load(f"scripted:{path}").rank("q", ["a", "b"])
    assert [(result.id, result.score, result.explanation) for result in ranking] == [
        ("1", 2.0, ""),
        ("0", pytest.approx(1.6), "since"),
    ]


def test_load_checkpoint_that_whyrank_did_not_train(tmp_path: Path) -> None:
    folder = save_checkpoint("llama", tmp_path / "model")
    options = ModelOptions(device="cpu", batch_size=2)
    reranker = Reranker.load(folder, max_explanation_tokens=4, options=options)
    assert reranker.judge.template.name == "explain-0-2"
    name, _, digest = reranker.judge.generator.name.partition("@")
    assert (name, len(digest)) == (str(folder), 8)
    retrained = save_checkpoint("llama", tmp_path / "model", seed=1)
    renamed = Reranker.load(retrained, max_explanation_tokens=4, options=options).judge.generator.name
    assert renamed.partition("@")[0] == name
    assert renamed != reranker.judge.generator.name, "other weights at the same place must not pass for the same model"
    ranking = reranker.rank("why", ["fox", "quick"])
    assert sorted(result.id for result in ranking) == ["0", "1"]
    assert all(sum(result.judgment.probs or ()) == pytest.approx(1.0) for result in ranking)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no/such/folder", "expected a folder with a checkpoint at ./no/such/folder, found nothing"),
        ("scripted:no-such-file.jsonl", "expected a file at no-such-file.jsonl, found nothing"),
        ("endpoint:http://localhost:1/v1", "expected endpoint:URL#MODEL"),
    ],
)
def test_unknown_models_are_refused(model: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Reranker.load(model)


WITHOUT_TORCH = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Absent())
import whyrank
from whyrank.errors import MissingExtra
ranking = whyrank.Reranker.load("overlap").rank("words", ["words"])
assert ranking[0].label == "2"
try:
    whyrank.Reranker.load("some/model")
except MissingExtra as error:
    assert isinstance(error, ImportError)
    assert isinstance(error.__cause__, ModuleNotFoundError), error.__cause__
    sys.stdout.write(str(error))
"""


def test_without_torch_the_error_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True)
    assert "pip install 'whyrank[hf]'" in done.stdout
    assert "No module named 'torch'" in done.stdout
