"""From posts and pages to pairs. All posts are invented; expected values are worked by hand or are laws."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from lxml import etree
from typer.testing import CliRunner

from whyrank.cli import app
from whyrank.errors import InputError
from whyrank.mining.config import MiningConfig
from whyrank.mining.corpus import Attribution
from whyrank.mining.decontamination import Excluded
from whyrank.mining.html_text import plain_text
from whyrank.mining.negatives import Search, negative_pairs
from whyrank.mining.output import write
from whyrank.mining.pages import Page, PageStore
from whyrank.mining.pairs import Mined, is_test, mine
from whyrank.mining.stackexchange import Post, links_of, read_posts
from whyrank.records import Document, Pair, Query, ScoredDocument
from whyrank.stages.mine import mine_files
from whyrank.store import read_json, read_jsonl

SITE = "kites.stackexchange.com"
CONFIG = MiningConfig(site=SITE, min_document_chars=20, num_negatives=0, num_random=0)
TAIL = "https://en.wikipedia.org/wiki/Kite_tail"
KEEL = "https://keels.org/why"


def post(post_id: str, body: str, *, parent: str = "", title: str = "", score: int = 1, accepted: str = "") -> Post:
    html = plain_text(body)
    return Post(
        post_id=post_id,
        is_question=not parent,
        text=html.text,
        title=title,
        links=tuple(links_of(html)),
        score=score,
        parent_id=parent,
        accepted_id=accepted,
        author_id=f"u{post_id}",
        author_name="",
        created="2019-01-01",
        licence="CC BY-SA 4.0",
        is_licence_derived=post_id == "11",
    )


def link(href: str, words: str = "as told there") -> str:
    return f"<p>It swings because of the wind, {words} at <a href='{href}'>this place</a>.</p>"


# Question 1 is about tails, 2 about keels, 3 has no links, 4 only links that lead nowhere.
POSTS = [
    post("1", "<p>My kite spins on windy days.</p>", title="Why does it spin?", accepted="12"),
    post("2", "<p>It drifts to the left.</p>", title="Why does it drift?"),
    post("3", "<p>It tears.</p>", title="Why does it tear?"),
    post("4", "<p>It hums.</p>", title="Why does it hum?"),
    post("11", link(TAIL) + link("/a/21") + link("/q/1") + link(TAIL + "#history"), parent="1", score=5),
    post("12", link("http://en.m.wikipedia.org/wiki/Kite_tail"), parent="1", score=2),
    post("13", link(KEEL), parent="1", score=-3),
    post("21", "<p>Add a small keel under the spine.</p>", parent="2", score=4),
    post("22", link(KEEL) + "<p><a href='https://i.stack.imgur.com/a.png'>x</a></p>", parent="2", score=9),
    post("31", "<p>Use ripstop.</p>", parent="3"),
    post("41", link("https://unknown.org/hum") + "<pre>wget https://keels.org/why</pre>", parent="4"),
    post("91", link(TAIL), parent="99"),
]
PAGES = PageStore(
    [
        Page(TAIL, "A tail adds drag behind the kite and steadies it.", "Kite tail", "CC BY-SA 4.0"),
        Page(KEEL + "/", "A keel keeps the kite from drifting sideways.", "Keel"),
        Page("https://never.org/linked", "A page that no answer links to."),
    ]
)


def mined(config: MiningConfig = CONFIG, posts: Sequence[Post] = POSTS, exclude: Sequence[str] = ()) -> Mined:
    return mine(iter(posts), PAGES, config, exclude_texts=exclude)


def linked(result: Mined) -> dict[tuple[str, str], str]:
    """`(question number, source)` to evidence."""
    sources = {document.doc_id: document.source for document in result.documents}
    return {
        (pair.query_id.rpartition("/")[2], sources[pair.doc_id]): pair.evidence
        for pair in result.pairs
        if pair.relation == "linked"
    }


def test_linked_pairs_and_their_evidence() -> None:
    # Question 1: answers 11 and 12 link the tail page (one pair, two pieces of evidence), 11 links answer 21 of
    # question 2; its link to its own question, its second link to the tail and the answer with score -3 do not count.
    assert linked(mined()) == {
        ("1", TAIL): f"{SITE}/a/11 score=5; {SITE}/a/12 score=2 accepted",
        ("1", f"https://{SITE}/a/21"): f"{SITE}/a/11 score=5",
        ("2", KEEL + "/"): f"{SITE}/a/22 score=9",
    }


def test_every_link_is_accounted_for() -> None:
    # 11: 4, 12: 1, 13: 1, 22: 2, 41: 2 (one in code), 91: 1.
    counts = mined().counts
    assert {name: number for name, number in counts.items() if name.startswith("links") and number} == {
        "links": 11,
        "links.anchor": 10,
        "links.code": 1,
        "links.dropped.without_question": 1,
        "links.dropped.low_score": 1,
        "links.dropped.self_link": 1,
        "links.dropped.repeated": 1,
        "links.dropped.imgur": 1,
        "links.dropped.code": 1,
        "links.usable": 5,
        "links.to_page": 3,
        "links.to_post": 1,
        "links.without_text": 1,
    }
    assert (counts["questions"], counts["questions.kept"]) == (4, 2)
    assert (counts["questions.without_usable_link"], counts["questions.without_text"]) == (1, 1)
    assert (counts["answers"], counts["answers.with_links"], counts["answers.without_question"]) == (8, 6, 1)


def test_queries_and_documents() -> None:
    result = mined()
    # Question 2 is itself in the corpus, by way of its answer 21: it must never be ranked for itself.
    assert result.queries == (
        Query(f"{SITE}/q/1", "Why does it spin?\n\nMy kite spins on windy days."),
        Query(f"{SITE}/q/2", "Why does it drift?\n\nIt drifts to the left.", (f"{SITE}/a/21",)),
    )
    by_source = {document.source: document for document in result.documents}
    assert by_source[f"https://{SITE}/a/21"] == Document(
        f"{SITE}/a/21",
        "It drifts to the left.\n\nAdd a small keel under the spine.",
        "Why does it drift?",
        f"https://{SITE}/a/21",
        "CC BY-SA 4.0",
    )
    assert (by_source[TAIL].title, by_source[TAIL].licence) == ("Kite tail", "CC BY-SA 4.0")
    assert "https://never.org/linked" not in by_source


def test_context_stands_in_only_when_asked() -> None:
    result = mined(replace(CONFIG, without_page="context"))
    source = "link-context:https://unknown.org/hum"
    assert linked(result)[("4", source)] == f"{SITE}/a/41 score=1"
    document = next(document for document in result.documents if document.source == source)
    assert document.text == "It swings because of the wind, as told there at this place."
    assert document.title == "this place"
    assert (result.counts["links.to_context"], result.counts["links.without_text"]) == (1, 0)
    assert not [document for document in mined().documents if document.source.startswith("link-context")]


def test_context_or_page_can_be_too_short() -> None:
    # The context has 59 characters, the pages 49 and 45, answer 21 with its question 57 (posts have no minimum).
    assert len("It swings because of the wind, as told there at this place.") == 59
    counts = mined(replace(CONFIG, without_page="context", min_document_chars=60)).counts
    assert (counts["links.page_too_short"], counts["links.context_too_short"]) == (3, 4)
    assert (counts["links.to_post"], counts["links.without_text"]) == (1, 4)


def test_a_question_link_leads_to_its_best_answer() -> None:
    asking = [post("5", "<p>?</p>", title="Keel?"), post("51", link("/questions/2/why"), parent="5")]
    # Question 2 has no accepted answer; 22 has the most votes. With 21 accepted, 21 it is.
    assert ("5", f"https://{SITE}/a/22") in linked(mined(posts=[*POSTS, *asking]))
    accepted = [replace(one, accepted_id="21") if one.post_id == "2" else one for one in POSTS]
    assert ("5", f"https://{SITE}/a/21") in linked(mined(posts=[*accepted, *asking]))


def test_a_missing_post_may_be_a_stored_page() -> None:
    posts = [post("5", "<p>?</p>", title="Old?"), post("51", link("/a/777") + link("/a/778"), parent="5")]
    pages = PageStore([Page(f"https://{SITE}/a/777", "An answer that the dump no longer has.")])
    result = mine(posts, pages, CONFIG)
    assert result.counts["links.onsite_missing"] == 2
    assert result.counts["links.to_page"] == 1
    assert result.counts["links.without_text"] == 1


def test_the_same_text_is_one_document() -> None:
    pages = PageStore(
        [Page("https://a.org/1", "The same  words twice."), Page("https://b.org/2", "The same words twice.")]
    )
    posts = [post("5", "?", title="T"), post("51", link("https://a.org/1") + link("https://b.org/2"), parent="5")]
    result = mine(posts, pages, CONFIG)
    assert len(result.documents) == len(result.pairs) == 1
    assert result.counts["documents.merged"] == 1
    urls = [one.url for one in result.attributions if one.role == "document"]
    assert urls == ["https://a.org/1", "https://b.org/2"]


def test_attribution_names_every_author() -> None:
    attributions = mined().attributions
    assert attributions[0] == Attribution(
        f"{SITE}/q/1", "query", SITE, "1", "u1", "", "CC BY-SA 4.0", False, f"https://{SITE}/q/1"
    )
    authors = [(one.post_id, one.author_id) for one in attributions if one.record_id == f"{SITE}/a/21"]
    assert authors == [("2", "u2"), ("21", "u21")]


def test_a_derived_licence_says_so() -> None:
    posts = [post("5", "?", title="T"), post("51", link("https://x.org/"), parent="5")]
    posts[1] = replace(posts[1], licence="CC BY-SA 3.0", is_licence_derived=True)
    result = mine(posts, PageStore(), replace(CONFIG, without_page="context"))
    assert [document.licence for document in result.documents] == ["CC BY-SA 3.0 (derived from the post's date)"]
    assert result.attributions[1].is_licence_derived


def test_posts_come_once() -> None:
    with pytest.raises(InputError, match="found post 1 twice"):
        mined(posts=[*POSTS, POSTS[0]])


# --- decontamination ---

THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.mark.parametrize(
    ("excluded", "text", "is_match"),
    [
        ("Why, does it SPIN?", "why does it spin", True),
        ("Why does it spin?", "Why does it spin so?", False),
        (f"A {THIRTEEN}.", f"well: {THIRTEEN.upper()}, then", True),
        (f"A {THIRTEEN}.", THIRTEEN.removesuffix(" thirteen") + " 13", False),
        ("", "", False),
        ("?!", "...", False),
    ],
)
def test_shared_text_is_found(excluded: str, text: str, is_match: bool) -> None:
    assert Excluded([excluded]).matches(text) is is_match


def test_contaminated_questions_leave_no_trace() -> None:
    # Question 2 equals a benchmark query: it is dropped, and so is question 1's link to its answer 21.
    result = mined(exclude=["why does it DRIFT? It drifts, to the left"])
    assert linked(result) == {("1", TAIL): f"{SITE}/a/11 score=5; {SITE}/a/12 score=2 accepted"}
    assert result.counts["questions.contaminated"] == 1
    assert result.counts["links.to_contaminated"] == 1
    assert result.counts["links.dropped.contaminated"] == 2


# --- negatives ---


def in_given_order(documents: Sequence[Document]) -> Search:
    """A first stage that ranks the corpus as it stands."""

    def search(queries: Sequence[Query], top_k: int) -> Mapping[str, Sequence[ScoredDocument]]:
        return {
            query.query_id: [
                ScoredDocument(query.query_id, document.doc_id, rank, -rank)
                for rank, document in enumerate(documents[:top_k], start=1)
            ]
            for query in queries
        }

    return search


def negatives(config: MiningConfig, banned: set[str], num_documents: int = 20) -> tuple[list[Pair], Counter[str]]:
    counts: Counter[str] = Counter()
    documents = [Document(f"d{number:02}", "text") for number in range(1, num_documents + 1)]
    pairs = negative_pairs([Query("q", "text")], documents, {"q": frozenset(banned)}, config, in_given_order, counts)
    return list(pairs), counts


def test_hard_negatives_come_from_the_window() -> None:
    # Without d02 and d04 the ranking is d01 d03 d05 d06 d07 …: ranks 2 to 4 are d03, d05 and d06.
    config = replace(CONFIG, num_negatives=3, first_rank=2, last_rank=4)
    pairs, counts = negatives(config, {"d02", "d04"})
    assert pairs == [
        Pair("q", "d03", "negative", "first-stage rank 2"),
        Pair("q", "d05", "negative", "first-stage rank 3"),
        Pair("q", "d06", "negative", "first-stage rank 4"),
    ]
    assert counts == {"negatives.hard": 3, "negatives.random": 0, "negatives.missing": 0}


def test_negatives_are_distinct_and_never_banned() -> None:
    banned = {"d01", "d07", "d08"}
    for seed in range(50):
        config = replace(CONFIG, num_negatives=4, num_random=4, first_rank=1, last_rank=10, seed=seed)
        pairs, _ = negatives(config, banned)
        doc_ids = [pair.doc_id for pair in pairs]
        assert len(set(doc_ids)) == 8
        assert not banned & set(doc_ids)
        assert [pair.evidence == "random" for pair in pairs] == [False] * 4 + [True] * 4


def test_the_seed_decides_the_draw() -> None:
    config = replace(CONFIG, num_negatives=3, num_random=2, first_rank=1, last_rank=20)
    assert negatives(config, set()) == negatives(config, set())
    assert len({str(negatives(replace(config, seed=seed), set())[0]) for seed in range(10)}) > 5


def test_a_small_corpus_has_too_few() -> None:
    # Five documents, two banned: three are left for 3 hard ones from rank 2 (two of them) and 3 random ones (one).
    config = replace(CONFIG, num_negatives=3, num_random=3, first_rank=2, last_rank=9)
    pairs, counts = negatives(config, {"d01", "d02"}, num_documents=5)
    assert sorted(pair.doc_id for pair in pairs) == ["d03", "d04", "d05"]
    assert counts == {"negatives.hard": 2, "negatives.random": 1, "negatives.missing": 3}


def test_no_thread_gets_a_page_it_mentions_as_negative() -> None:
    # Corpus: the tail page, answer 21, the keel page. Question 1 links the first two, and mentions the third in an
    # answer with a low score: nothing is left. Question 2 is answer 21's own question: only the tail page is left.
    result = mined(replace(CONFIG, num_negatives=1, num_random=2, first_rank=1))
    found = [(pair.query_id, pair.doc_id) for pair in result.pairs if pair.relation == "negative"]
    tail = next(document.doc_id for document in result.documents if document.source == TAIL)
    assert found == [(f"{SITE}/q/2", tail)]
    assert result.counts["negatives.missing"] == 5


# --- splits and output ---


def test_the_split_depends_on_the_question_alone() -> None:
    ids = [f"{SITE}/q/{number}" for number in range(4000)]
    share = sum(is_test(query_id, 0.1) for query_id in ids) / len(ids)
    assert abs(share - 0.1) < 0.02  # four standard deviations: 4 * sqrt(0.1 * 0.9 / 4000) = 0.019
    assert not any(is_test(query_id, 0.0) for query_id in ids)
    assert all(is_test(query_id, 1.0) for query_id in ids)
    assert all(is_test(query_id, 0.3) for query_id in ids if is_test(query_id, 0.1))


def test_no_question_moves_when_the_dump_grows() -> None:
    more = [post(str(new), "?", title=f"T{new}") for new in range(500, 540)]
    more += [post(f"9{new.post_id}", link(TAIL), parent=new.post_id) for new in more]
    before, after = (
        {query.query_id: is_test(query.query_id, 0.5) for query in mined(posts=posts).queries}
        for posts in (POSTS, POSTS + more)
    )
    assert len(after) == len(before) + 40
    assert {query_id: after[query_id] for query_id in before} == before


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_manifest_tells_of_the_whole_command(tmp_path: Path) -> None:
    rows = (f'<row Id="{n}" PostTypeId="1" CreationDate="2019-01-01" Title="t" Body="b" />' for n in (1, 2, 3))
    posts, exclude = tmp_path / "Posts.xml", tmp_path / "queries.tsv"
    posts.write_text(f"<posts>{''.join(rows)}</posts>")
    exclude.write_text("q1\twhy do kites fly\n")
    begun = datetime.now(UTC).replace(microsecond=0)
    returned = mine_files(posts, tmp_path / "out", CONFIG, exclude=[exclude], limit=2, skip_bad=True)
    found = read_json(tmp_path / "out" / "manifest.json")
    assert found["config"] == {**json.loads(json.dumps(asdict(CONFIG))), "limit": 2, "skip_bad": True}
    assert set(found["inputs"]) == {str(posts), str(exclude)}
    assert (found["seed"], found["is_finished"], found["started"]) == (CONFIG.seed, True, returned.started)
    assert begun <= datetime.fromisoformat(found["started"]) <= datetime.now(UTC)
    assert (found["counts"]["questions"], found["counts"]["lines.bad"]) == (2, 0)
    assert found["counts"]["train.queries"] == 0  # what writing counts is there too


@pytest.mark.parametrize("words", [["--site", "nohost"], ["--site", "a.b", "--first-rank", "0"]])
def test_wrong_values_are_wrong_use(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["mine", "--posts", "none", "-o", "none", *words])
    assert result.exit_code == 2
    assert ": expected " in result.stderr


def test_what_is_written(tmp_path: Path) -> None:
    config = replace(CONFIG, num_negatives=1, first_rank=1, num_random=1, test_fraction=0.5)
    result = mined(config)
    out = tmp_path / "out"
    counts = write(result, out, config)
    # The manifest is the stage's, which knows the inputs.
    assert {path.name for path in out.iterdir()} == {"corpus.jsonl", "attribution.jsonl", "train", "test"}
    assert tuple(read_jsonl(out / "corpus.jsonl", Document)) == result.documents
    assert tuple(read_jsonl(out / "attribution.jsonl", Attribution)) == result.attributions
    queries = {split: list(read_jsonl(out / split / "queries.jsonl", Query)) for split in ("train", "test")}
    assert sorted(query.query_id for split in queries.values() for query in split) == [f"{SITE}/q/1", f"{SITE}/q/2"]
    for split, own in queries.items():
        pairs = list(read_jsonl(out / split / "pairs.jsonl", Pair))
        assert {pair.query_id for pair in pairs} == {query.query_id for query in own}
        qrels = [line.split() for line in (out / split / "qrels.trec").read_text().splitlines()]
        assert qrels == [[pair.query_id, "0", pair.doc_id, "1"] for pair in pairs if pair.relation == "linked"]
        assert all(is_test(query.query_id, 0.5) == (split == "test") for query in own)
    assert counts["pairs.linked"] == counts["train.qrels"] + counts["test.qrels"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"site": "kites"},
        {"without_page": "guess"},
        {"min_document_chars": 0},
        {"num_negatives": -1},
        {"num_random": -1},
        {"first_rank": 0},
        {"last_rank": 2},
        {"test_fraction": 1.5},
        {"test_fraction": float("nan")},
    ],
)
def test_bad_options_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(change))}: expected"):
        replace(CONFIG, **change)  # type: ignore[arg-type]


# --- real dumps ---

REAL = {
    "ai-2016": MiningConfig("ai.stackexchange.com"),
    "beer-2017": MiningConfig("beer.stackexchange.com", site_aliases=("alcohol.stackexchange.com",)),
    "cardano-2021": MiningConfig("cardano.stackexchange.com"),
}


@pytest.mark.parametrize("folder", REAL)
def test_laws_on_real_dumps(shared_data: Path, tmp_path: Path, folder: str) -> None:
    config = replace(REAL[folder], without_page="context")
    path = shared_data / "stackexchange" / folder / "Posts.xml"
    for run in ("first", "second"):
        counts: Counter[str] = Counter()
        result = mine(read_posts(path, counts=counts), PageStore(), config, counts=counts)
        write(result, tmp_path / run, config)
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    dropped = sum(number for name, number in counts.items() if name.startswith("links.dropped."))
    assert counts["links"] == dropped + counts["links.usable"]
    ends = ("to_post", "to_page", "to_context", "to_contaminated", "without_text")
    assert counts["links.usable"] == sum(counts[f"links.{end}"] for end in ends)
    reasons = ("contaminated", "without_usable_link", "without_text", "kept")
    assert counts["questions"] == sum(counts[f"questions.{reason}"] for reason in reasons)
    documents = {document.doc_id for document in result.documents}
    assert {pair.doc_id for pair in result.pairs} <= documents
    assert len({(pair.query_id, pair.doc_id) for pair in result.pairs}) == len(result.pairs)
    assert documents == {one.record_id for one in result.attributions if one.role == "document"}


def test_posts_of_the_dump_are_found(shared_data: Path) -> None:
    """Which question links which: by regular expressions over the raw attributes, as an independent reading."""
    path = shared_data / "stackexchange" / "ai-2016" / "Posts.xml"
    rows = {row.get("Id", ""): dict(row.attrib) for row in etree.parse(path).getroot().iterfind("row")}
    expected = set()
    for row in rows.values():
        for found in re.findall(r'href="https?://ai\.stackexchange\.com/(?:questions|q|a)/(\d+)', row["Body"]):
            target = rows.get(found, {})
            question = target.get("ParentId", found)
            if "ParentId" in row and int(row["Score"]) >= 0 and target and question != row["ParentId"]:
                expected.add((row["ParentId"], rows[question]["Title"]))
    result = mine(read_posts(path), PageStore(), REAL["ai-2016"])
    titles = {document.doc_id: document.title for document in result.documents}
    pairs = [pair for pair in result.pairs if pair.relation == "linked"]
    assert {(pair.query_id.rpartition("/")[2], titles[pair.doc_id]) for pair in pairs} == expected
    assert len(expected) > 20
