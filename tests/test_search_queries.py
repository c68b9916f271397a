"""Search queries: the law, hostile answers, the loop, the backends, searching with them, and learning to write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from tests import fake_vllm
from tests.checkpoints import FAMILIES, Family, save_checkpoint
from tests.fake_endpoint import FakeEndpoint, Reply
from tests.test_training import ALMANAC, CONFIG, DOCUMENTS, QUERIES, TINY, judgments
from whyrank.almanac import build, load_handwritten
from whyrank.almanac.gold import gold_search_queries
from whyrank.checkpoint import CARD_NAME, read_card
from whyrank.cli import app
from whyrank.datasets import read_run
from whyrank.errors import InputError, OtherJob, TemplateMismatch
from whyrank.generators import Generator
from whyrank.generators.endpoint import Endpoint
from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.opening import EMBEDDED_MODEL, open_writer
from whyrank.generators.overlap import Overlap
from whyrank.generators.scripted import Scripted, ScriptedAnswer
from whyrank.generators.vllm import EngineConfig, VllmGenerator
from whyrank.records import Query, ScoredDocument, SearchQueries
from whyrank.search_queries import (
    LONGEST_QUERY,
    MAX_QUERIES,
    PROMPT_VERSION,
    QueryWriter,
    WritingCounts,
    answer,
    normalised,
    parse,
    render,
    write_into,
)
from whyrank.stages.expand import by_query, fused, searched_for
from whyrank.store import read_json, read_jsonl, write_jsonl
from whyrank.training.config import DistillConfig
from whyrank.training.distill import distill
from whyrank.training.examples import search_query_examples
from whyrank.training.sampling import with_share

FERN, BREAD = QUERIES["fern"], QUERIES["bread"]


def whyrank(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def scripted(answers: dict[str, str], name: str = "scripted") -> Scripted:
    return Scripted([ScriptedAnswer(query, "", answer=text) for query, text in answers.items()], name=name)


# ---- reading --------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=40), max_size=14))
def test_what_is_written_is_read(texts: list[str]) -> None:
    queries = normalised(texts)
    assert parse(answer(queries)) == queries
    assert normalised(queries) == queries
    assert len(queries) <= MAX_QUERIES


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        ("\n- dry air\n- brown leaves", ("dry air", "brown leaves")),
        ("1. dry air\n2) brown leaves\n(3) fern care", ("dry air", "brown leaves", "fern care")),
        ("* dry air\n• brown leaves", ("dry air", "brown leaves")),
        ('Here are the queries:\n\n1. "dry air"\n2. “brown leaves”', ("dry air", "brown leaves")),
        ("```\ndry air\nbrown leaves\n```", ("dry air", "brown leaves")),
        ("dry air\nDry  Air\nbrown leaves", ("dry air", "brown leaves")),
        ("- dry air\n\nThese should help you.", ("dry air",)),
        ("<think>- not this\nhm</think>\n- dry air", ("dry air",)),
        ("<think>- dry air", ()),
        ("", ()),
        ("   \n\n", ()),
        ("word " * (LONGEST_QUERY // 5 + 1), ()),
        ("- \n-\n- dry air", ("dry air",)),
        ("- 2024 - a year\n- - nested", ("2024 - a year", "- nested")),
        ('- "exact phrase"\n- dry air', ('"exact phrase"', "dry air")),
        ("\n".join(f"- q{n}" for n in range(30)), tuple(f"q{n}" for n in range(10))),
    ],
)
def test_answers_of_all_kinds(text: str, queries: tuple[str, ...]) -> None:
    assert parse(text) == queries


def test_the_line_that_a_cap_ended_is_left_out() -> None:
    assert parse("\n- dry air\n- brown lea", is_cut=True) == ("dry air",)
    assert parse("\n- dry a", is_cut=True) == ()


# ---- the loop -------------------------------------------------------------------------------------------------


def test_what_becomes_of_answers(tmp_path: Path) -> None:
    writer = QueryWriter(scripted({FERN.text: "- dry air\n- humidity", BREAD.text: "I cannot: <think>"}))
    counts = WritingCounts()
    strange = Query("strange", "nobody wrote an answer to this")
    found = {item.query_id: item for item in write_into(tmp_path / "q", writer, [FERN, BREAD, strange], counts)}
    assert (found["fern"].status, found["fern"].queries) == ("ok", ("dry air", "humidity"))
    assert (found["bread"].status, found["bread"].queries) == ("unparsed", ())
    assert found["bread"].unreadable == "I cannot: <think>"
    assert (found["strange"].status, found["strange"].queries) == ("error", ())
    assert "no answer" in (found["strange"].error or "")
    assert (counts.num_new, counts.num_unreadable) == (3, 2)
    assert {item.query_id: item for item in read_jsonl(tmp_path / "q", SearchQueries)} == found


def test_what_is_there_is_not_written_again_and_errors_are_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    list(write_into(path, QueryWriter(scripted({FERN.text: "- dry air"})), [FERN, BREAD], WritingCounts()))
    counts = WritingCounts()
    more = QueryWriter(scripted({FERN.text: "- something else", BREAD.text: "- yeast"}))
    found = list(write_into(path, more, [FERN, BREAD], counts))
    assert [item.queries for item in found] == [("dry air",), ("yeast",)]
    assert (counts.num_known, counts.num_new) == (1, 1)
    assert [item.status for item in read_jsonl(path, SearchQueries)] == ["ok", "ok"]


@pytest.mark.parametrize("other", ["model", "text"])
def test_another_model_or_text_is_not_mixed_in(tmp_path: Path, other: str) -> None:
    path = tmp_path / "queries.jsonl"
    answers = {FERN.text: "- dry air"}
    list(write_into(path, QueryWriter(scripted(answers)), [FERN], WritingCounts()))
    before = path.read_bytes()
    writer = QueryWriter(scripted(answers, name="another" if other == "model" else "scripted"))
    query = FERN if other == "model" else replace(FERN, text="another text")
    with pytest.raises(OtherJob, match="choose another output folder"):
        list(write_into(path, writer, [query], WritingCounts()))
    assert path.read_bytes() == before


def test_a_long_question_is_cut_and_told() -> None:
    writer = QueryWriter(scripted({}))
    (found,) = writer.write([Query("long", "word " * 5000)])
    assert found.is_query_cut
    request, _ = render("word " * 5000, writer.generator.tokens)
    assert len(request.text_of("query")) == 1024 * 4  # a script's tokens have four characters


# ---- backends -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    return {family: save_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_without_a_label_is_that_of_plain_greedy_generation(
    family: Family, checkpoints: dict[Family, Path]
) -> None:
    generator = HfGenerator.load(checkpoints[family], device="cpu", dtype="float32", batch_size=2)
    asked = [render(text, generator.tokens)[0] for text in ("why asks the fox", "or judge a document", "10")]
    requests = [replace(request, sampling=replace(request.sampling, max_tokens=7)) for request in asked]
    found = dict(generator.generate(requests))
    for index, request in enumerate(requests):
        ids = generator.tokens.prompt_ids(request)
        plain = _greedy(HfGenerator.load(checkpoints[family], device="cpu", dtype="float32"), ids, 7)
        assert found[index].token_ids == tuple(plain)
        assert found[index].label_probs == ()
        assert found[index].num_completion_tokens in (len(plain), len(plain) + 1)  # an end of text counts


def _greedy(generator: HfGenerator, ids: Sequence[int], num_tokens: int) -> list[int]:
    """One token after the other, everything before it read anew each time, by transformers' own forward pass."""
    import torch

    written: list[int] = []
    with torch.inference_mode():
        while len(written) < num_tokens:
            logits = generator.model(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1]
            token = int(logits.argmax())
            if token in generator.eos_ids:
                break
            written.append(token)
    return written


def test_vllm_writes_the_same(checkpoints: dict[Family, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    base = HfGenerator.load(checkpoints["llama"], device="cpu", dtype="float32", batch_size=2)
    request = render("why asks the fox", base.tokens)[0]
    short = replace(request, sampling=replace(request.sampling, max_tokens=6))
    expected = dict(base.generate([short]))[0]
    found = dict(VllmGenerator.load(checkpoints["llama"], config=EngineConfig()).generate([short]))[0]
    assert (found.token_ids, found.text, found.label_probs) == (expected.token_ids, expected.text, ())


def test_an_endpoint_is_read_whole() -> None:
    with FakeEndpoint(lambda document, attempt: Reply(text="1. dry air\n2. humidity")) as endpoint:
        (found,) = QueryWriter(Endpoint(endpoint.url, "m")).write([FERN])
        sent = endpoint.seen[0].payload
    assert (found.status, found.queries) == ("ok", ("dry air", "humidity"))
    assert FERN.text in json.dumps(sent["messages"])


@pytest.mark.parametrize(
    "generator", [Overlap(), Scripted([ScriptedAnswer(FERN.text, "", label="1")])], ids=["overlap", "scripted label"]
)
def test_what_cannot_write_fails_and_makes_nothing_up(generator: Generator) -> None:
    (found,) = QueryWriter(generator).write([FERN])
    assert (found.status, found.queries) == ("error", ())


# ---- searching ------------------------------------------------------------------------------------------------


def line(doc_id: str, rank: int) -> ScoredDocument:
    return ScoredDocument("q", doc_id, rank, 1.0 / rank)


def test_fusion_by_hand() -> None:
    # a: 1/61 + 1/62, b: 1/62 + 1/61, c: 1/63; a and b are equal and go by their ids.
    found = fused("q", [[line("a", 1), line("b", 2), line("c", 3)], [line("b", 1), line("a", 2)]], top_k=2)
    assert [(item.doc_id, item.rank) for item in found] == [("a", 1), ("b", 2)]
    assert [item.score for item in found] == pytest.approx([1 / 61 + 1 / 62] * 2)


def test_what_is_searched_for() -> None:
    query = Query("q", "why", ("no",))
    assert searched_for(query, ["one", "two"], "append") == [Query("q", "why\none\ntwo", ("no",))]
    assert searched_for(query, ["one"], "fuse") == [query, Query("q", "one", ("no",))]
    assert searched_for(query, [], "append") == searched_for(query, [], "fuse") == [query]


def test_writers_add_up() -> None:
    item = next(iter(QueryWriter(scripted({FERN.text: "- a\n- b"})).write([FERN])))
    assert by_query([item, replace(item, queries=("c",))]) == {"fern": ("a", "b", "c")}


@pytest.fixture
def road(tmp_path: Path) -> dict[str, Path]:
    """Documents that share no word with their query."""
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("corpus", "queries", "answers")}
    write_jsonl(paths["corpus"], DOCUMENTS.values())
    write_jsonl(paths["queries"], [Query("fern", "my plant suffers"), Query("bread", "flat loaf")])
    answers = [
        ScriptedAnswer("my plant suffers", "", answer="- leaves lose water"),
        ScriptedAnswer("flat loaf", "", answer="<think>"),
    ]
    write_jsonl(paths["answers"], answers)
    return paths


@pytest.mark.parametrize("expansion", ["append", "fuse"])
def test_search_finds_what_the_question_does_not_say(road: dict[str, Path], tmp_path: Path, expansion: str) -> None:
    files = ("--corpus", road["corpus"], "--queries", road["queries"])
    assert whyrank("search", *files, "-o", tmp_path / "plain.trec").exit_code == 0
    assert (tmp_path / "plain.trec").read_text() == ""
    model = ("--expand", f"scripted:{road['answers']}", "--expansion", expansion)
    done = whyrank("search", *files, *model, "-o", tmp_path / "more.trec")
    assert done.exit_code == 7  # nothing to be read for the bread
    assert "1 unreadable" in done.output
    assert [item.doc_id for item in read_run(tmp_path / "more.trec")["fern"]] == ["air"]
    kept = tmp_path / "more.trec.search-queries.jsonl"
    assert [item.queries for item in read_jsonl(kept, SearchQueries)] == [("leaves lose water",), ()]
    assert read_json(tmp_path / "more.trec.manifest.json")["counts"]["expanded"] == 1
    again = whyrank("search", *files, "--expand", kept, "--expansion", expansion, "-o", tmp_path / "again.trec")
    assert again.exit_code == 0
    assert read_run(tmp_path / "again.trec") == read_run(tmp_path / "more.trec")


def test_expand_writes_a_file_and_resumes(road: dict[str, Path], tmp_path: Path) -> None:
    words = ("expand", "--queries", road["queries"], "--model", f"scripted:{road['answers']}", "-o", tmp_path / "out")
    for num_known in (0, 2):
        done = whyrank(*words, "--json")
        assert done.exit_code == 7
        assert json.loads(done.stdout)["counts"]["known"] == num_known
    assert read_json(tmp_path / "out" / "manifest.json")["config"]["prompt"] == PROMPT_VERSION
    assert len(list(read_jsonl(tmp_path / "out" / "search-queries.jsonl", SearchQueries))) == 2


# ---- learning to write ----------------------------------------------------------------------------------------


def taught(query: Query, *queries: str, **changes: Any) -> SearchQueries:
    empty = SearchQueries("k", query.query_id, "ok", queries, False, 0, 0, PROMPT_VERSION, "teacher")
    return replace(empty, **changes)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(1, 9), st.floats(0.01, 0.99))
def test_a_share_is_a_share(drawn: list[float], num_more: int, share: float) -> None:
    found = with_share(drawn, num_more, share)
    assert sum(found[len(drawn) :]) / sum(found) == pytest.approx(share)
    assert sum(found) / len(found) == pytest.approx(1)
    assert found[0] / drawn[0] == pytest.approx(sum(found[: len(drawn)]) / sum(drawn))


def test_examples_carry_loss_on_the_queries_alone(tmp_path: Path) -> None:
    from tests.test_training import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokens = ChatTokens(tokenizer)
    given_ = [taught(FERN, "dry air", "mist"), taught(BREAD, status="unparsed")]
    (example,) = search_query_examples(given_, QUERIES, ALMANAC, tokens)
    assert tokens.decode(example.ids[example.num_prompt :]) == "\n- dry air\n- mist"
    assert example.ids[-1] == tokenizer.eos_token_id
    assert tokens.decode(example.ids[: example.num_prompt]).endswith(f"Question:\n{FERN.text}\nSearch queries:")
    with pytest.raises(InputError, match="'nobody'"):
        list(search_query_examples([taught(replace(FERN, query_id="nobody"), "x")], QUERIES, ALMANAC, tokens))


def test_a_student_learns_both_tasks(tmp_path: Path) -> None:
    lessons = [taught(FERN, "dry air", "leaves lose water"), taught(BREAD, "slow yeast")]
    config = replace(CONFIG, num_steps=150, tiny=replace(TINY, max_positions=320), search_query_share=0.4)
    done = distill(judgments(), QUERIES, DOCUMENTS, ALMANAC, tmp_path / "both", config, search_queries=lessons)
    assert done.num_search_examples == 2
    assert read_card(tmp_path / "both" / CARD_NAME).search_queries == PROMPT_VERSION
    generator, template = open_writer(tmp_path / "both", prompt=PROMPT_VERSION)
    found = {item.query_id: item for item in QueryWriter(generator, template.chat_options).write(QUERIES.values())}
    assert found["fern"].queries == ("dry air", "leaves lose water")
    assert found["bread"].queries == ("slow yeast",)


def test_a_checkpoint_that_was_not_taught_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateMismatch, match="taught not at all"):
        open_writer(EMBEDDED_MODEL, prompt=PROMPT_VERSION)
    queries = tmp_path / "queries.jsonl"
    write_jsonl(queries, [FERN])
    done = whyrank("expand", "--queries", queries, "--model", EMBEDDED_MODEL, "-o", tmp_path / "out")
    assert isinstance(done.exception, TemplateMismatch)


def test_the_share_has_a_range() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match="search_query_share"):
            DistillConfig(search_query_share=share)


# ---- the almanac's own ----------------------------------------------------------------------------------------


def test_gold_search_queries_say_what_the_query_does_not() -> None:
    collection = build("train", 20, domains=["bread"])
    for item in gold_search_queries(collection):
        facts = collection.query_facts[item.query_id]
        assert item.queries == normalised(item.queries)
        assert 5 <= len(item.queries) <= MAX_QUERIES
        assert not set(item.queries) & set(facts.phrases)
    held_out = build("test", 40, domains=["bread"])
    said = {text for item in gold_search_queries(held_out) for text in item.queries}
    statements = {held_out.document_facts[d].statement for q in held_out.held_out for d in held_out.candidates[q]}
    assert not said & statements
    assert len(list(gold_search_queries(load_handwritten()))) == len(load_handwritten().queries)
