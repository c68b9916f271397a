"""The teacher that errs, and the simulated answer links: what they get wrong is stated, fixed and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import pytest

from whyrank.almanac import Collection, Reasoning, build, load_handwritten, load_knowledge
from whyrank.almanac.gold import gold_judgments
from whyrank.almanac.links import LinkRates, LinksConfig, answer_links, measure_links
from whyrank.almanac.teacher import Belief, Mistake, Teacher, TeacherConfig, teacher_judgments
from whyrank.errors import InputError
from whyrank.records import Judgment, Pair
from whyrank.template import Template

TEMPLATE = Template.load("almanac")
FAULTLESS = TeacherConfig(overlap=0, unquoted=0, confusion=0, setting=0)


@pytest.fixture(scope="module")
def train() -> Collection:
    return build("train", 300)


@pytest.fixture(scope="module")
def bread() -> Collection:
    return build("train", 60, domains=["bread", "car"])


def only(mistake: Mistake, rate: float) -> TeacherConfig:
    """A teacher with one kind of mistake."""
    rates = {name: rate if name == mistake else 0.0 for name in ("overlap", "unquoted", "confusion", "setting")}
    return TeacherConfig(rates["overlap"], rates["unquoted"], rates["confusion"], rates["setting"])


def beliefs(collection: Collection, config: TeacherConfig) -> dict[tuple[str, str], Belief]:
    teacher = Teacher(config, load_knowledge())
    return {
        (query_id, doc_id): teacher.believe(collection.query_facts[query_id], collection.document_facts[doc_id])
        for query_id, doc_id in collection.labels
    }


def accuracy(collection: Collection, judgments: list[Judgment]) -> float:
    return fmean(entry.label == str(collection.labels[entry.query_id, entry.doc_id]) for entry in judgments)


# ---- judgments -----------------------------------------------------------------------------------------------


def test_a_teacher_without_mistakes_says_what_gold_says(bread: Collection) -> None:
    """All fields but the name and what is made from it."""
    gold = list(gold_judgments(bread, TEMPLATE, num_irrelevant=5, seed=3))
    said = list(teacher_judgments(bread, TEMPLATE, FAULTLESS, num_irrelevant=5, seed=3))
    assert [replace(one, key=other.key, model=other.model) for one, other in zip(said, gold, strict=True)] == gold
    assert not {one.key for one in said} & {other.key for other in gold}


@pytest.mark.parametrize("read", [lambda: build("test", 80), load_handwritten], ids=["test", "handwritten"])
def test_every_label_follows_from_its_reason(read: Callable[[], Collection]) -> None:
    collection = read()
    for judgment in teacher_judgments(collection, TEMPLATE, TeacherConfig(setting=0.5, confusion=0.5)):
        reasoning = Reasoning.parse(judgment.explanation)
        assert reasoning is not None
        assert judgment.label == str(reasoning.label)
        assert judgment.score == reasoning.label
        assert judgment.probs == tuple(float(label == reasoning.label) for label in (0, 1, 2))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_default_teacher_is_right_about_four_times_in_five(train: Collection, seed: int) -> None:
    """On the pairs that students see and on whole candidate lists."""
    for num_irrelevant in (5, None):
        said = list(teacher_judgments(train, TEMPLATE, TeacherConfig(seed=seed), num_irrelevant=num_irrelevant))
        assert 0.75 <= accuracy(train, said) <= 0.85


def test_a_pair_is_judged_alike_in_any_company(bread: Collection) -> None:
    config = TeacherConfig(seed=1)
    few = build("train", 30, domains=["bread", "car"])
    said = {judgment.key: judgment for judgment in teacher_judgments(bread, TEMPLATE, config)}
    for judgment in teacher_judgments(few, TEMPLATE, config):
        assert judgment == said[judgment.key]
    narrow = Teacher(config, load_knowledge(["bread", "car"]))
    for (query_id, doc_id), belief in reversed(beliefs(bread, config).items()):
        assert narrow.believe(bread.query_facts[query_id], bread.document_facts[doc_id]) == belief


def test_another_configuration_has_another_name_and_other_keys(bread: Collection) -> None:
    configs = [TeacherConfig(), TeacherConfig(seed=1), TeacherConfig(overlap=0.4)]
    names = {config.model_name for config in configs}
    assert len(names) == 3
    assert all(name.startswith("almanac-teacher@") for name in names)
    keys = [{judgment.key for judgment in teacher_judgments(bread, TEMPLATE, config)} for config in configs]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]


# ---- mistakes ------------------------------------------------------------------------------------------------


def test_overlap_convinces_wherever_the_query_is_quoted(train: Collection) -> None:
    for pair, belief in beliefs(train, only("overlap", 1)).items():
        gold = train.reasons[pair]
        is_fooled = train.repeats_query(*pair) and not gold.is_same_cause
        assert belief.mistakes == (("overlap",) if is_fooled else ())
        assert belief.reasoning == (replace(gold, document_cause=gold.query_cause) if is_fooled else gold)


def test_overlap_is_decided_by_the_observation(train: Collection) -> None:
    """Among pairs that could fool, the same observation always does or never does; both kinds exist."""
    fooled: dict[tuple[str, str], set[bool]] = {}
    for (query_id, doc_id), belief in beliefs(train, only("overlap", 0.5)).items():
        query, document = train.query_facts[query_id], train.document_facts[doc_id]
        if document.quoted in query.phrases and not train.reasons[query_id, doc_id].is_same_cause:
            observation = query.observations[query.phrases.index(document.quoted)]
            fooled.setdefault((query.domain, observation), set()).add("overlap" in belief.mistakes)
    assert {len(values) for values in fooled.values()} == {1}
    share = fmean(True in values for values in fooled.values())
    assert share == pytest.approx(0.5, abs=0.2)  # 120 observations: four standard errors


def test_what_is_not_quoted_is_not_recognised(train: Collection) -> None:
    """A relevant document that repeats nothing gets label 0; all others keep theirs."""
    for pair, belief in beliefs(train, only("unquoted", 1)).items():
        gold = train.reasons[pair]
        is_missed = gold.is_same_cause and not train.repeats_query(*pair)
        assert belief.mistakes == (("unquoted",) if is_missed else ())
        assert belief.reasoning.label == (0 if is_missed else gold.label)
        assert belief.reasoning == replace(gold, document_cause=belief.reasoning.document_cause)


def test_confusion_takes_a_mechanism_for_one_sister(train: Collection) -> None:
    """Every document's cause is read as a fixed other one of its domain, with which it shares an observation."""
    observations = {m.name: set(m.observations) for d in load_knowledge().domains for m in d.mechanisms}
    taken_for: dict[str, set[str]] = {}
    for pair, belief in beliefs(train, only("confusion", 1)).items():
        gold = train.reasons[pair]
        assert belief.mistakes == ("confusion",)
        assert belief.reasoning == replace(gold, document_cause=belief.reasoning.document_cause)
        taken_for.setdefault(gold.document_cause, set()).add(belief.reasoning.document_cause)
    for cause, others in taken_for.items():
        (other,) = others
        assert other != cause
        assert observations[other] & observations[cause]


def test_settings_are_taken_for_one_other(train: Collection) -> None:
    taken_for: dict[tuple[str, str], set[str]] = {}
    for pair, belief in beliefs(train, only("setting", 1)).items():
        gold = train.reasons[pair]
        assert belief.mistakes == ("setting",)
        assert belief.reasoning == replace(gold, document_setting=belief.reasoning.document_setting)
        assert belief.reasoning.label == (1 if gold.label == 2 else belief.reasoning.label)
        domain = train.document_facts[pair[1]].domain
        taken_for.setdefault((domain, gold.document_setting), set()).add(belief.reasoning.document_setting)
    names = {d.name: {setting.name for setting in d.settings} for d in load_knowledge().domains}
    for (domain, setting), others in taken_for.items():
        (other,) = others
        assert other in names[domain] - {setting}


def test_the_teacher_reads_first_and_is_swayed_then(bread: Collection) -> None:
    """If it confuses every mechanism and every quotation convinces, a repeated phrase still makes the cause the same;
    the right documents among these come out right, by two mistakes."""
    found = beliefs(bread, replace(FAULTLESS, confusion=1, overlap=1))
    repeated = {pair: belief for pair, belief in found.items() if bread.repeats_query(*pair)}
    assert all(belief.reasoning.is_same_cause for belief in repeated.values())
    right = [belief for pair, belief in repeated.items() if bread.labels[pair] == 2]
    assert {belief.mistakes for belief in right} == {("confusion", "overlap")}
    assert {belief.reasoning.label for belief in right} == {2}


@pytest.mark.parametrize("mistake", ["overlap", "unquoted", "confusion", "setting"])
def test_a_higher_rate_keeps_the_mistakes_of_a_lower_one(bread: Collection, mistake: Mistake) -> None:
    wrong = []
    for rate in (0.0, 0.3, 0.7, 1.0):
        wrong.append({pair for pair, belief in beliefs(bread, only(mistake, rate)).items() if belief.mistakes})
    assert not wrong[0]
    assert wrong[1] <= wrong[2] <= wrong[3]
    assert wrong[3]


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["overlap", "unquoted", "confusion", "setting"])
def test_rates_of_the_teacher_are_checked(name: Mistake, rate: float) -> None:
    with pytest.raises(InputError, match=f"{name}: expected a rate from 0 to 1, found"):
        only(name, rate)


# ---- links ---------------------------------------------------------------------------------------------------


def linked(pairs: list[Pair]) -> set[tuple[str, str]]:
    return {(pair.query_id, pair.doc_id) for pair in pairs if pair.relation == "linked"}


def test_certain_links_are_the_relevant_documents(bread: Collection) -> None:
    pairs = list(answer_links(bread, LinksConfig(right=1, other_setting=1, astray=0)))
    assert linked(pairs) == {pair for pair, label in bread.labels.items() if label > 0}
    assert measure_links(bread, pairs) == LinkRates(60, 0, 5 * 60, 1.0, 1.0, 0.0)


def test_pairs_have_the_form_of_mined_ones(bread: Collection) -> None:
    """Linked ones first, then the other candidates with their rank among those, counted anew here."""
    pairs = list(answer_links(bread, LinksConfig(), seed=5))
    by_query: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_query.setdefault(pair.query_id, []).append(pair)
    assert list(by_query) == [query.query_id for query in bread.queries if query.query_id in by_query]
    for query_id, own in by_query.items():
        assert {pair.doc_id for pair in own} == set(bread.candidates[query_id])
        num_linked = sum(pair.relation == "linked" for pair in own)
        assert num_linked >= 1
        assert [pair.relation for pair in own] == ["linked"] * num_linked + ["negative"] * (24 - num_linked)
        assert [pair.evidence for pair in own[num_linked:]] == [
            f"first-stage rank {rank}" for rank in range(1, 25 - num_linked)
        ]
        assert len({pair.evidence for pair in own[:num_linked]}) == 1  # nothing in it tells a link astray
        assert {pair.relevance for pair in own} == {None}


def test_links_tell_as_much_as_was_asked_for() -> None:
    """600 queries: 1,200 documents of label 2, 1,800 of label 1, about 1,070 links; tolerances of four standard errors.
    A query has no link with probability 0.5² · 0.8³ · (1 - 0.178 / 19)^19, which is 0.107."""
    collection = build("train", 600)
    rates = measure_links(collection, answer_links(collection, LinksConfig(), seed=2))
    assert rates.share_of_right_linked == pytest.approx(0.5, abs=0.058)
    assert rates.share_of_other_setting_linked == pytest.approx(0.2, abs=0.038)
    assert rates.share_astray == pytest.approx(0.1, abs=0.037)
    assert rates.num_queries_without_link / rates.num_queries == pytest.approx(0.107, abs=0.05)


def test_links_of_a_query_depend_on_its_candidates_alone(bread: Collection) -> None:
    few = build("train", 25, domains=["bread", "car"])
    some, all_links = (linked(list(answer_links(entry, LinksConfig(), seed=1))) for entry in (few, bread))
    assert some == {pair for pair in all_links if pair[0] in few.candidates}
    turned = replace(
        bread,
        queries=bread.queries[::-1],
        documents=bread.documents[::-1],
        candidates={query_id: doc_ids[::-1] for query_id, doc_ids in reversed(bread.candidates.items())},
    )
    assert linked(list(answer_links(turned, LinksConfig(), seed=1))) == all_links
    assert linked(list(answer_links(bread, LinksConfig(), seed=2))) != all_links


def test_rates_are_counted_by_hand() -> None:
    """Two queries; of the first, one of two documents of label 2 and one irrelevant document are linked."""
    collection = build("train", 2, domains=["bread"])
    query_id = collection.queries[0].query_id
    by_label = {
        label: [d for d in collection.candidates[query_id] if collection.labels[query_id, d] == label]
        for label in (0, 1, 2)
    }
    pairs = [
        Pair(query_id, by_label[2][0], "linked"),
        Pair(query_id, by_label[0][0], "linked"),
        Pair(query_id, by_label[1][0], "negative"),
    ]
    assert measure_links(collection, pairs) == LinkRates(2, 1, 2, 1 / 4, 0.0, 1 / 2)
    assert measure_links(collection, []) == LinkRates(2, 2, 0, 0.0, 0.0, None)
    with pytest.raises(InputError, match="found \\('elsewhere', 'x'\\)"):
        measure_links(collection, [Pair("elsewhere", "x", "linked")])


def test_too_few_documents_for_links_astray_are_refused(bread: Collection) -> None:
    """Five certain links demand five astray at a share of one half."""
    relevant = {
        query_id: tuple(doc_id for doc_id in doc_ids if bread.labels[query_id, doc_id] > 0)
        for query_id, doc_ids in bread.candidates.items()
    }
    with pytest.raises(InputError, match=r"at least 5\.0 irrelevant candidates .*, found 0; lower astray"):
        list(answer_links(replace(bread, candidates=relevant), LinksConfig(right=1, other_setting=1, astray=0.5)))


@pytest.mark.parametrize(("name", "value", "most"), [("right", 1.2, 1), ("other_setting", -1, 1), ("astray", 0.6, 0.5)])
def test_rates_of_links_are_checked(name: str, value: float, most: float) -> None:
    with pytest.raises(InputError, match=f"{name}: expected a number from 0 to {most}, found {value}"):
        replace(LinksConfig(), **{name: value})
