"""The split that people wrote: what it holds, that nothing in it was copied, and that a broken law is reported."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import bm25s  # type: ignore[import-untyped]
import pytest
from typer.testing import CliRunner

from whyrank.almanac import DRAWN_SPLITS, Collection, Knowledge, build, domain_names, load_handwritten, load_knowledge
from whyrank.cli import app
from whyrank.datasets import read_qrels
from whyrank.errors import InputError
from whyrank.records import Query
from whyrank.store import read_jsonl

NUM_DRAWN = 288  # queries of each drawn split that the handwritten texts are compared with: four rounds


@pytest.fixture(scope="module")
def written() -> Collection:
    return load_handwritten()


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return load_knowledge()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped files that a test may break."""
    copy = tmp_path / "handwritten"
    shutil.copytree(str(files("whyrank") / "almanac" / "handwritten"), copy)
    return copy


def words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


# ---- what it holds ---------------------------------------------------------------------------------------------


def test_every_domain_has_six_queries_and_24_documents(written: Collection) -> None:
    asked = Counter(facts.domain for facts in written.query_facts.values())
    told = Counter(facts.domain for facts in written.document_facts.values())
    assert asked == dict.fromkeys(domain_names(), 6)
    assert told == dict.fromkeys(domain_names(), 24)
    assert len(written.documents) == len({document.doc_id for document in written.documents}) == 24 * len(told)
    assert written.split == "test-handwritten"


def test_every_document_of_a_domain_is_a_candidate(written: Collection) -> None:
    for query_id, doc_ids in written.candidates.items():
        domain = written.query_facts[query_id].domain
        mine = {doc_id for doc_id, facts in written.document_facts.items() if facts.domain == domain}
        assert len(doc_ids) == 24
        assert set(doc_ids) == mine
        # one document of the mechanism for the setting, three for the other settings, 5 x 4 of other mechanisms
        assert Counter(written.labels[query_id, doc_id] for doc_id in doc_ids) == {2: 1, 1: 3, 0: 20}


def test_labels_and_explanations_follow_from_the_ids(written: Collection, knowledge: Knowledge) -> None:
    """By hand, from the file: sticky dough and a pale crust while camping are spent yeast."""
    (query,) = (query for query in written.queries if query.query_id == "handwritten-bread-02")
    assert query.text.startswith("By the light of the lantern I could not get the dough off my fingers")
    facts = written.query_facts[query.query_id]
    assert (facts.mechanism, facts.setting, facts.observations) == (
        "spent-yeast",
        "camping",
        ("pale-crust", "sticky-dough"),
    )
    for doc_id in written.candidates[query.query_id]:
        found = written.document_facts[doc_id]
        label = 0 if found.mechanism != "spent-yeast" else 2 if found.setting == "camping" else 1
        assert written.labels[query.query_id, doc_id] == label
        if label == 2:
            assert written.explanations[query.query_id, doc_id] == (
                "Here pale crust and sticky dough suggest spent yeast, the text means spent yeast: same cause. "
                "Asked for camping, the text means camping: same setting."
            )
    for fact in written.query_facts.values():
        assert knowledge.domain(fact.domain).explained_by(*fact.observations).id == fact.mechanism


def test_queries_go_round_the_domains(written: Collection) -> None:
    names = [query.query_id for query in written.queries]
    assert names[:13] == [f"handwritten-{name}-01" for name in domain_names()] + ["handwritten-aquarium-02"]
    assert names[-1] == "handwritten-weather-06"


def test_the_order_of_the_candidates_is_not_that_of_the_file(written: Collection) -> None:
    """Mean place of the right document: 12.5 of 24 by chance, standard error 0.8 for 72 queries."""
    places = [
        place
        for query_id, doc_ids in written.candidates.items()
        for place, doc_id in enumerate(doc_ids, start=1)
        if written.labels[query_id, doc_id] == 2
    ]
    assert 9.5 < sum(places) / len(places) < 15.5


def test_a_choice_of_domains_and_queries_is_a_part_of_the_whole(written: Collection) -> None:
    part = load_handwritten(["car", "bread", "car"], num_queries=3)
    assert [query.query_id for query in part.queries] == [
        "handwritten-bread-01",
        "handwritten-car-01",
        "handwritten-bread-02",
    ]
    assert set(part.queries) <= set(written.queries)
    assert set(part.documents) <= set(written.documents)
    assert len(part.documents) == 48
    assert all(written.candidates[query_id] == doc_ids for query_id, doc_ids in part.candidates.items())
    assert len(load_handwritten(["car", "bread"], num_queries=1).documents) == 24


# ---- what it must not hold -------------------------------------------------------------------------------------


def test_no_text_is_in_two_splits(written: Collection) -> None:
    owners: dict[str, str] = {}
    for collection in (written, *(build(split, NUM_DRAWN) for split in DRAWN_SPLITS)):
        texts = [query.text for query in collection.queries] + [document.text for document in collection.documents]
        assert len(texts) == len(set(texts))
        for text in texts:
            assert owners.setdefault(text.lower(), collection.split) == collection.split, text


def test_no_text_of_the_grammar_was_copied(written: Collection) -> None:
    """By plain comparison with texts that the grammar wrote, instead of with its parts: no six words in a row."""

    def runs(text: str) -> set[str]:
        found = words(text)
        return {" ".join(found[start : start + 6]) for start in range(len(found) - 5)}

    train = build("train", NUM_DRAWN)
    drawn = {run for query in train.queries for run in runs(query.text)}
    drawn |= {run for document in train.documents for run in runs(document.text)}
    assert len(drawn) > 10_000
    for text in [query.text for query in written.queries] + [document.text for document in written.documents]:
        assert not runs(text) & drawn, text


# ---- fairness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1], ids=["bm25", "reversed"])
def test_word_overlap_ranks_no_better_than_chance(written: Collection, sign: int) -> None:
    """Chance by hand: a rank holds (2 + 3 x 1) / 24 on average; ideal are a 2 and three 1s. Standard error .02."""
    discounts = [1 / math.log2(rank + 1) for rank in range(1, 11)]
    ideal = 2 * discounts[0] + sum(discounts[1:4])
    retriever = bm25s.BM25()
    retriever.index([words(document.text) for document in written.documents], show_progress=False)
    row = {document.doc_id: index for index, document in enumerate(written.documents)}
    values = []
    for query in written.queries:
        scores = retriever.get_scores(words(query.text))
        order = sorted(written.candidates[query.query_id], key=lambda doc_id: -sign * scores[row[doc_id]])
        gains = [written.labels[query.query_id, doc_id] for doc_id in order[:10]]
        values.append(sum(gain * discount for gain, discount in zip(gains, discounts, strict=True)) / ideal)
    chance = 5 / 24 * sum(discounts) / ideal
    assert chance == pytest.approx(0.266, abs=0.001)
    assert fmean(values) == pytest.approx(chance, abs=0.06)


def test_length_says_nothing(written: Collection) -> None:
    """Area under the ROC curve of `relevant` by length; one half is chance, standard error .02 to .03."""
    length = {document.doc_id: len(document.text) for document in written.documents}
    for least in (1, 2):
        wins = []
        for query_id, doc_ids in written.candidates.items():
            hits = [length[doc_id] for doc_id in doc_ids if written.labels[query_id, doc_id] >= least]
            misses = [length[doc_id] for doc_id in doc_ids if written.labels[query_id, doc_id] < least]
            wins += [(hit > miss) + 0.5 * (hit == miss) for hit in hits for miss in misses]
        assert fmean(wins) == pytest.approx(0.5, abs=0.08)


# ---- laws ------------------------------------------------------------------------------------------------------

QUERY = "Our first loaf of the holiday tore wide open along its edge."
DOCUMENT = "Patience is the missing ingredient."

# (what is replaced in bread.toml, by what, what the message must say).
BREACHES = {
    "unknown key": ("[[queries]]\n", '[[queries]]\ntitle = "x"\n', r"bread\.toml: queries\.0\.title"),
    "wrong type": (f'text = "{QUERY}', f'text = 3 # "{QUERY}', r"bread\.toml: queries\.0\.text"),
    "three observations": (
        '["cracked-crust", "dense-crumb"]',
        '["cracked-crust", "dense-crumb", "large-holes"]',
        r"bread\.toml: queries\.0\.observations",
    ),
    "not TOML": ("[[queries]]\n", "[[queries]\n", r"bread\.toml: expected TOML"),
    "unknown mechanism": (
        'mechanism = "short-proofing"\nsetting = "camping"\nobservations',
        'mechanism = "long-proofing"\nsetting = "camping"\nobservations',
        r"bread\.toml: query for long-proofing: the knowledge has no such entry",
    ),
    "unknown setting": (
        'setting = "camping"\nobservations = ["cracked-crust"',
        'setting = "moon"\nobservations = ["cracked-crust"',
        r"bread\.toml: query for 'short-proofing': no setting has the id 'moon'",
    ),
    "observation of another mechanism": (
        '["cracked-crust", "dense-crumb"]',
        '["cracked-crust", "hard-crust"]',
        r"query for 'short-proofing': expected two observations among .*found \['cracked-crust', 'hard-crust'\]",
    ),
    "one observation twice": (
        '["cracked-crust", "dense-crumb"]',
        '["dense-crumb", "dense-crumb"]',
        r"query for 'short-proofing': expected two observations",
    ),
    "second query of a mechanism": (
        'mechanism = "short-proofing"\nsetting = "camping"\nobservations = ["cracked-crust", "dense-crumb"]',
        'mechanism = "fierce-heat"\nsetting = "camping"\nobservations = ["raw-middle", "hard-crust"]',
        r"expected one query for short-proofing, found 0(.|\n)*expected one query for fierce-heat, found 2",
    ),
    "missing document": (
        'mechanism = "short-proofing"\nsetting = "mountain"\ntext',
        'mechanism = "short-proofing"\nsetting = "boat"\ntext',
        r"expected one document for short-proofing in mountain, found 0(.|\n)*for short-proofing in boat, found 2",
    ),
    "name of a mechanism": (
        DOCUMENT,
        "Short proofing it is called.",
        "document for 'short-proofing' in 'camping': .*name",
    ),
    "thing of another setting": (
        DOCUMENT,
        "Leave the harbour.",
        "'short-proofing' in 'camping': .*'harbour' of 'boat'",
    ),
    "copied phrasing": (
        QUERY,
        "Oh, the loaf caved in.",
        "query for 'short-proofing': .*own, found 'the loaf caved in'",
    ),
    "copied run": (
        DOCUMENT,
        "See that gas escapes because the protein runs away.",
        "'camping': .*own, found 'gas escapes because the protein' of 'gas escapes because the protein strands",
    ),
    "copied closing sentence": (
        DOCUMENT,
        "Look for more about it in the second volume.",
        "'camping': .*own, found 'more about it in the' of 'More about it in the second volume.'",
    ),
    "too many sentences": (
        QUERY,
        "One. Two! Three? Four. Five.",
        "query for 'short-proofing': expected 1 to 4 sentences",
    ),
    "too few sentences": (
        f"{DOCUMENT} Fermentation in a cold tent is slow, and",
        "Fermentation in a cold tent is slow, and",
        "document for 'short-proofing' in 'camping': expected 2 to 5 sentences, found 1",
    ),
    "two blanks": (DOCUMENT, "Patience is the missing  ingredient.", "expected one line with single blanks"),
    "small letter": (DOCUMENT, "patience is the missing ingredient.", "expected a capital letter at the beginning"),
    "repeated sentence": (DOCUMENT, QUERY, r"bread\.toml: expected each sentence once, found again, after bread\.toml"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_broken_law_is_reported(folder: Path, breach: str) -> None:
    old, new, message = BREACHES[breach]
    text = (folder / "bread.toml").read_text(encoding="utf-8")
    assert old in text
    (folder / "bread.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_handwritten(["bread"], folder=folder)


def test_a_sentence_of_another_domain_is_found(folder: Path) -> None:
    text = (folder / "car.toml").read_text(encoding="utf-8")
    head, opening, rest = text.partition('text = "')
    (folder / "car.toml").write_text(f"{head}{opening}{DOCUMENT} {rest}", encoding="utf-8")
    with pytest.raises(InputError, match=r"car\.toml: expected each sentence once, found again, after bread\.toml"):
        load_handwritten(["bread", "car"], folder=folder)


# ---- on the command line ---------------------------------------------------------------------------------------


def export(*options: str) -> dict[str, object]:
    result = CliRunner().invoke(app, ["almanac", "export", "--split", "test-handwritten", *options, "--json"])
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)
    assert isinstance(counts, dict)
    return counts


def test_export_writes_all_of_it_by_default(tmp_path: Path, written: Collection) -> None:
    counts = export("-o", str(tmp_path))
    # 12 domains of 6 queries and 24 documents, all of which are candidates: 12 x 6 x 24 pairs
    expected = {"queries": 72, "documents": 288, "pairs": 1728, "judgments": 1728}
    assert counts == {"out": str(tmp_path), "split": "test-handwritten", **expected}
    assert tuple(read_jsonl(tmp_path / "queries.jsonl", Query)) == written.queries
    labels = {(qrel.query_id, qrel.doc_id): qrel.relevance for qrel in read_qrels(tmp_path / "qrels.trec")}
    assert labels == written.labels
    assert {path.stem for path in (tmp_path / "bright" / "examples").iterdir()} == set(domain_names())


def test_export_takes_the_first_queries_of_some_domains(tmp_path: Path) -> None:
    options = ("--num-queries", "3", "--domain", "car", "--domain", "bread", "--num-irrelevant", "4")
    counts = export("-o", str(tmp_path), *options)
    # a query keeps 1 + 3 relevant documents and 4 others
    assert (counts["queries"], counts["documents"], counts["pairs"], counts["judgments"]) == (3, 48, 72, 24)
    ids = [query.query_id for query in read_jsonl(tmp_path / "queries.jsonl", Query)]
    assert ids == ["handwritten-bread-01", "handwritten-car-01", "handwritten-bread-02"]


def test_export_of_a_drawn_split_has_a_hundred_queries(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["almanac", "export", "--split", "dev", "-o", str(tmp_path), "--json"])
    assert json.loads(result.stdout)["queries"] == 100


# ---- which files -----------------------------------------------------------------------------------------------


def test_a_domain_without_a_file_is_not_in_the_split(folder: Path) -> None:
    (folder / "car.toml").unlink()
    assert "car" not in {facts.domain for facts in load_handwritten(folder=folder).query_facts.values()}
    with pytest.raises(InputError, match=r"domains that have a handwritten test, among aquarium, .*, found car"):
        load_handwritten(["car"], folder=folder)
    with pytest.raises(InputError, match="found none"):
        load_handwritten([], folder=folder)


def test_a_file_without_a_domain_is_refused(folder: Path) -> None:
    (folder / "car.toml").rename(folder / "moon.toml")
    with pytest.raises(InputError, match=r"moon\.toml: expected the name of a domain, one of aquarium, "):
        load_handwritten(folder=folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a folder of TOML files at .*elsewhere, found none"):
        load_handwritten(folder=tmp_path / "elsewhere")


@pytest.mark.parametrize("num_queries", [0, 13])
def test_more_queries_than_are_written_are_refused(num_queries: int) -> None:
    with pytest.raises(InputError, match=f"expected 1 to 12 queries, as many as are written, found {num_queries}"):
        load_handwritten(["bread", "car"], num_queries=num_queries)
