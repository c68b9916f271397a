"""Samples and passages through a real engine, from Python, on the command line, and on to training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import save_checkpoint
from tests.command_line import RERANK, order, run, run_json
from tests.test_engine import passes_of
from whyrank import Reranker
from whyrank.combining import sample_seed
from whyrank.errors import InputError
from whyrank.generators import Sampling
from whyrank.generators.hf import HfGenerator
from whyrank.judging import Judge
from whyrank.passages import Passages, windows
from whyrank.records import Document, Judgment, Query
from whyrank.store import read_jsonl, write_jsonl
from whyrank.template import Template
from whyrank.training.examples import examples_of

TEMPLATE = Template.load("almanac")
SMALL = replace(TEMPLATE, limits=replace(TEMPLATE.limits, max_document_tokens=40))
QUERY = Query("q", "why asks the fox")
SHORT = [Document(f"d{i}", text) for i, text in enumerate(["the quick fox", "10 or 2", "because it helps, true"])]
LONG = Document("long", "The fox asks why. " * 2 + "Brown label document. " * 3 + "It is judged relevant. " * 2)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> HfGenerator:
    folder = save_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return HfGenerator.load(folder, device="cpu", dtype="float32", batch_size=4)


# ---- the engine -----------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_batch_or_neighbours(generator: HfGenerator) -> None:
    drawn = Sampling(temperature=1.0, max_tokens=6, seed=11)
    documents = [*SHORT, LONG]
    expected: list[Judgment] = []
    for document in documents:  # each alone, one answer at a time
        judge = Judge(SMALL, replace(generator, batch_size=1), sampling=drawn, num_samples=5, passages=Passages())
        expected += [found for _, found in judge.judge([(QUERY, document)])]
    assert [found.num_passages > 1 for found in expected] == [False, False, False, True]
    for batch_size in (2, 3, 32):
        judge = Judge(
            SMALL, replace(generator, batch_size=batch_size), sampling=drawn, num_samples=5, passages=Passages()
        )
        judged = dict(judge.judge([(QUERY, document) for document in reversed(documents)]))
        for wanted, (_, found) in zip(reversed(expected), sorted(judged.items()), strict=True):
            assert (found.key, found.doc_id, found.explanation) == (wanted.key, wanted.doc_id, wanted.explanation)
            assert (found.passage, found.num_completion_tokens) == (wanted.passage, wanted.num_completion_tokens)
            assert found.score == pytest.approx(wanted.score, abs=1e-6)
            assert found.probs == pytest.approx(wanted.probs, abs=1e-6)


def test_the_mean_is_that_of_the_single_draws(generator: HfGenerator) -> None:
    """Sample by sample with the seed that it was drawn with."""
    drawn = Sampling(temperature=1.0, max_tokens=6, seed=11)
    ((_, mean),) = Judge(TEMPLATE, generator, sampling=drawn, num_samples=5).judge([(QUERY, SHORT[0])])
    singles = []
    for number in range(5):
        judge = Judge(TEMPLATE, generator, sampling=replace(drawn, seed=sample_seed(11, number)))
        singles += [found for _, found in judge.judge([(QUERY, SHORT[0])])]
    assert len({found.explanation for found in singles}) > 1
    assert mean.explanation in {found.explanation for found in singles}
    assert mean.score == pytest.approx(sum(found.score or 0.0 for found in singles) / 5, abs=1e-6)
    assert mean.num_completion_tokens == sum(found.num_completion_tokens for found in singles)


def test_the_prompt_of_a_pair_is_read_once_for_its_samples(generator: HfGenerator) -> None:
    drawn = Sampling(temperature=1.0, max_tokens=1, seed=1)
    request = TEMPLATE.render(QUERY.text, SHORT[0].text, generator.tokens, sampling=drawn).request
    with passes_of(generator) as sizes:
        list(Judge(TEMPLATE, generator, sampling=drawn, num_samples=4).judge([(QUERY, SHORT[0])]))
    # All of the prompt but its last token once, and that token by each of the four samples.
    assert sizes[0] == len(generator.tokens.prompt_ids(request)) - 1 + 4


def test_passages_fit_by_the_tokens_of_the_model_and_win_as_if_judged_alone(generator: HfGenerator) -> None:
    greedy = Sampling(max_tokens=4)
    ((_, found),) = Judge(SMALL, generator, sampling=greedy, passages=Passages()).judge([(QUERY, LONG)])
    assert found.num_passages == len(windows(LONG.text, 40, generator.tokens)) > 1
    start, end = found.passage
    assert len(generator.tokens.offsets(LONG.text[start:end])) <= 40
    window = Document("window", LONG.text[start:end])
    ((_, alone),) = Judge(SMALL, generator, sampling=greedy, passages=Passages()).judge([(QUERY, window)])
    assert (alone.num_passages, alone.explanation, alone.label) == (1, found.explanation, found.label)
    assert alone.score == pytest.approx(found.score, abs=1e-6)


# ---- training -------------------------------------------------------------------------------------------------


def test_a_student_reads_the_passage_that_won(generator: HfGenerator) -> None:
    greedy = Sampling(max_tokens=4)
    ((_, found),) = Judge(SMALL, generator, sampling=greedy, passages=Passages()).judge([(QUERY, LONG)])
    taught = replace(found, status="ok", label="1", passage=(36, 58))
    assert LONG.text[36:58] == "Brown label document. "
    (example,) = examples_of([taught], {"q": QUERY}, {"long": LONG}, SMALL, generator.tokens)
    text = generator.tokens.decode(example.ids[: example.num_prompt])
    assert "Brown label document." in text
    assert "The fox asks why." not in text


# ---- Python ---------------------------------------------------------------------------------------------------


FILLER = "Stones are grey and do not grow. " * 300  # 9,900 characters; the cap of 2048 tokens is 8,192 of them
BURIED = Document("d1", FILLER + "Yellow leaves tell that the plant is thirsty. " + FILLER)
PLAIN = Document("d2", "A plant in the shade.")
THIRST = "yellow leaves plant"


def test_what_lies_behind_the_cut_is_found() -> None:
    """By words: the cut document shares none of three, which is label 0; its second passage all, which is 2."""
    cut = Reranker.load("overlap").rank(THIRST, [BURIED, PLAIN])
    assert [(found.id, found.label) for found in cut] == [("d2", "1"), ("d1", "0")]
    read = Reranker.load("overlap", long_documents="passages").rank(THIRST, [BURIED, PLAIN])
    assert [(found.id, found.label) for found in read] == [("d1", "2"), ("d2", "1")]
    assert "Yellow leaves tell" in read[0].passage
    assert "Yellow leaves tell" not in cut[1].passage
    assert read[0].passage == BURIED.text[slice(*read[0].judgment.passage)]
    assert (read[0].judgment.num_passages, read[1].judgment.num_passages) == (3, 1)
    assert read[1].judgment == cut[0].judgment
    settled = Passages("mean-top-2", max_passages=2)
    (mean,) = Reranker.load("overlap", long_documents=settled).rank(THIRST, [BURIED])
    # The first passage is always judged, and of the other two the one with the words: labels 0 and 2.
    assert (mean.score, mean.judgment.num_passages, mean.judgment.is_document_cut) == (1.0, 2, True)


def test_settings_are_refused_before_a_model_is_looked_for() -> None:
    for options, complaint in (
        ({"num_samples": 4}, "give a temperature above 0"),
        ({"temperature": -1.0}, "a temperature of at least 0"),
        ({"long_documents": "split"}, "long_documents among cut, passages"),
    ):
        with pytest.raises(InputError, match=complaint):
            Reranker.load("./nowhere", **options)


def test_a_temperature_and_samples_reach_the_judge() -> None:
    reranker = Reranker.load("overlap", temperature=0.5, num_samples=3, max_explanation_tokens=77)
    assert reranker.judge.sampling == Sampling(0.5, 77)
    (found,) = reranker.rank(THIRST, [PLAIN])
    assert (found.score, found.judgment.num_samples) == (1.0, 3)
    assert Reranker.load("overlap", temperature=0.0).judge.sampling is None


# ---- the command line -----------------------------------------------------------------------------------------

SAMPLED = ("--samples", "2", "--temperature", "0.7")
BY_PASSAGES = ("--long-documents", "passages", "--passage-score", "mean-top-2", "--max-passages", "2")


@pytest.mark.usefixtures("here")
def test_a_run_with_samples_and_passages() -> None:
    write_jsonl("docs.jsonl", [BURIED, PLAIN, *(Document(f"d{i}", "Nothing.") for i in (3, 4, 5))])
    done = run(*RERANK, *SAMPLED, *BY_PASSAGES)
    assert done.exit_code == 0, done.output
    assert "1 long documents were judged by 2 passages" in done.stdout
    # Both have 1 (d1 as the mean of 0 and 2); the first stage has d1 first.
    assert order("out/run.trec")["q1"] == ["d1", "d2", "d3"]
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["config"]["num_samples"] == 2
    assert manifest["config"]["passages"] == {"score": "mean-top-2", "max_passages": 2, "num_overlap_sentences": 1}
    assert manifest["config"]["sampling"] == {"temperature": 0.7, "max_tokens": 256, "seed": 0}
    # Five pairs with two samples each, one of them of two passages.
    counts = manifest["counts"]
    assert [counts[name] for name in ("num_answers", "num_by_passages", "num_passages")] == [12, 1, 2]
    judged = {found.doc_id: found for found in read_jsonl("out/judgments.jsonl", Judgment)}
    assert (judged["d1"].num_samples, judged["d1"].num_passages, judged["d1"].score) == (2, 2, 1.0)
    again = run(*RERANK, *SAMPLED, *BY_PASSAGES)
    assert "5 were there already, 0 are new" in again.stdout
    refused = run(*RERANK, *SAMPLED)
    assert refused.exit_code == 1


@pytest.mark.usefixtures("here")
def test_one_query_shows_the_passage_that_won() -> None:
    write_jsonl("docs.jsonl", [BURIED, PLAIN])
    words = ("rerank", "--query", THIRST, "--documents", "docs.jsonl", "--model", "overlap", *SAMPLED)
    found = run_json(*words, "--long-documents", "passages")["results"]
    assert [entry["id"] for entry in found] == ["d1", "d2"]
    start, end = found[0]["passage_span"]
    assert found[0]["passage"] == BURIED.text[start:end]
    assert start < len(FILLER) < end
    assert (found[0]["num_passages"], found[0]["num_samples"], found[0]["num_unreadable"]) == (3, 2, 0)
    shown = run(*words, "--long-documents", "passages").stdout
    assert f"characters {start:,} to {end:,}, best of 3 passages, mean of 2 samples; was 1)" in shown


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--samples", "2"), "2 samples drawn at temperature 0 would all be the same"),
        (("--max-passages", "2"), "--max-passages: without effect unless --long-documents is passages"),
        (("--passage-score", "max"), "--passage-score: without effect unless --long-documents is passages"),
        (("--samples", "0"), "Input should be greater than or equal to 1"),
    ],
)
def test_options_without_effect_are_refused(words: tuple[str, ...], complaint: str) -> None:
    done = run(*RERANK, *words)
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.split())
    assert not Path("out").exists()
