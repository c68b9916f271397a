"""The knowledge behind the almanac: it keeps its laws, and a breach is reported with file and entry."""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import pytest

from whyrank.almanac import Knowledge, build, domain_names, load_knowledge
from whyrank.errors import InputError

MAX_DISTINCT_WORDS = 3000  # of twelve domains; the student's tokenizer is trained on them
# Words that carry no content: they may stand in phrasings and statements alike.
FUNCTION_WORDS = """
a about above after all also an and any are as at be because been before below but by can cannot down each for from had
has have if in into is it its just like many me more my no not nothing of off on once one only or other out over so some
than that the their them then there these they this through to too two under up was we were when where while who will
with without yet
"""


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return load_knowledge()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped knowledge that a test may break."""
    copy = tmp_path / "knowledge"
    shutil.copytree(str(files("whyrank") / "almanac" / "knowledge"), copy)
    return copy


def test_size(knowledge: Knowledge) -> None:
    assert len(knowledge.domains) >= 12
    assert sum(len(domain.mechanisms) for domain in knowledge.domains) >= 60


def test_two_observations_decide_and_one_does_not(knowledge: Knowledge) -> None:
    for domain in knowledge.domains:
        causes = {o.id: [m.id for m in domain.mechanisms if o.id in m.observations] for o in domain.observations}
        assert all(len(found) >= 2 for found in causes.values()), domain.name
        for mechanism in domain.mechanisms:
            for first, second in combinations(mechanism.observations, 2):
                assert set(causes[first]) & set(causes[second]) == {mechanism.id}
                assert domain.explained_by(second, first) is mechanism


def test_statements_share_no_content_word_with_lay_words(knowledge: Knowledge) -> None:
    stem = import_module("Stemmer").Stemmer("english").stemWord  # the package has no type information
    for domain in knowledge.domains:
        lay = [text for entry in domain.observations for text in entry.phrasings]
        lay += [frame.replace("{thing}", "") for frame in domain.query_frames]
        stems = {stem(word) for text in lay for word in re.findall("[a-z]+", text.lower())}
        learned = [text for entry in domain.mechanisms for text in entry.statements]
        learned += [frame.replace("{thing}", "") for frame in domain.document_frames]
        for text in learned:
            words = set(re.findall("[a-z]+", text.lower())) - set(FUNCTION_WORDS.split())
            assert not [word for word in words if stem(word) in stems], f"{domain.name}.toml: {text!r}"


def test_held_out_texts_can_be_understood(knowledge: Knowledge) -> None:
    """By words alone: a held-out text shares more words with its own entry than with any other of its domain, and
    at least two of them with no other."""
    for domain in knowledge.domains:
        phrasings = {entry.id: entry.phrasings for entry in domain.observations}
        statements = {entry.id: entry.statements for entry in domain.mechanisms}
        for texts in (phrasings, statements):
            taught = {key: {word for text in own[:-1] for word in text.split()} for key, own in texts.items()}
            for key, own in texts.items():
                shared = {other: set(own[-1].split()) & words for other, words in taught.items()}
                mine = shared.pop(key)
                assert len(mine) > max(len(words) for words in shared.values()), own[-1]
                assert len(mine.difference(*shared.values())) >= 2, own[-1]


def test_vocabulary_is_small() -> None:
    words: set[str] = set()
    for split in ("train", "dev", "test"):
        collection = build(split, 200)
        texts = [query.text for query in collection.queries] + [document.text for document in collection.documents]
        for text in (*texts, *collection.explanations.values()):
            words.update(re.findall("[a-z]+", text.lower()))
    assert len(words) < MAX_DISTINCT_WORDS


def test_a_choice_of_domains_is_read_in_alphabetical_order() -> None:
    chosen = load_knowledge(["houseplants", "bread", "bread"])
    assert [domain.name for domain in chosen.domains] == ["bread", "houseplants"]


def test_an_unknown_domain_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"expected domains among aquarium, bicycle, bread, .*found garden, moon"):
        load_knowledge(["moon", "bread", "garden"])
    with pytest.raises(InputError, match="found none"):
        load_knowledge([])


def test_common_words_are_not_a_domain(folder: Path) -> None:
    assert "common" not in domain_names()
    (folder / "common.toml").unlink()
    with pytest.raises(InputError, match=r"expected a file common\.toml"):
        load_knowledge(folder=folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a folder of TOML files at .*elsewhere, found none"):
        load_knowledge(folder=tmp_path / "elsewhere")


# (what is replaced in bread.toml, by what, what the message must say). Every row breaks exactly one law.
BREACHES = {
    "unknown key": ('name = "weak gluten"', 'name = "weak gluten"\ntitle = "x"', r"mechanisms\.weak-gluten\.title"),
    "wrong type": ('name = "weak gluten"', "name = 3", r"mechanisms\.weak-gluten\.name"),
    "file and name differ": ('name = "bread"', 'name = "dough"', "expected name = 'bread'.*found 'dough'"),
    "not TOML": ('name = "bread"', "name = bread", r"bread\.toml: expected TOML"),
    "long name": ('name = "weak gluten"', 'name = "a very weak gluten"', "'weak-gluten', name: expected 2 to 3 words"),
    "capital letter": ('"there is no brown on top"', '"There is no brown on top"', "'pale-crust', phrasing: .*blanks"),
    "short phrasing": ('"there is no brown on top"', '"no brown"', "'pale-crust', phrasing: expected 3 to 9 words"),
    "few phrasings": ('"there is no brown on top",', "", "'pale-crust', phrasings: expected at least 5, found 4"),
    "short statement": (
        '"hydration exceeds what this flour is able to absorb"',
        '"hydration exceeds absorption"',
        "'excess-water', statement: expected 8 to 14 words, found 3",
    ),
    "new held-out word": (
        '"the slices fall apart into crumbs"',
        '"the slices fall apart into powder"',
        "'crumbly-bread', held-out phrasing: .*'powder'",
    ),
    "unknown observation": (
        '["cracked-crust", "large-holes", "dense-crumb"]',
        '["cracked-crust", "large-holes", "dense-crumb", "blue-crust"]',
        "'short-proofing': no observation has the id 'blue-crust'",
    ),
    "two shared observations": (
        '["cracked-crust", "large-holes", "dense-crumb"]',
        '["cracked-crust", "large-holes", "dense-crumb", "raw-middle"]',
        "'short-proofing' and 'fierce-heat': expected at most 1 shared observation",
    ),
    "observation with one cause": (
        '["cracked-crust", "raw-middle", "hard-crust"]',
        '["cracked-crust", "raw-middle", "pale-crust"]',
        "observation 'hard-crust': expected it to fit at least 2 mechanisms, found 1",
    ),
    "thing of two settings": ('"summit"', '"tent"', "setting 'camping': the word 'tent' also stands in a thing"),
    "thing of another domain": ('"summit"', '"shower"', "houseplants.*the word 'shower' also stands in a thing"),
    "thing that names a setting": (
        '"summit"',
        '"church"',
        "the word 'church' of a thing is also the name of a setting",
    ),
    "thing in a phrasing": ('"summit"', '"pancake"', "setting 'mountain': the words of 'pancake' also stand"),
    "phrasing within another": (
        '"there is no brown on top"',
        '"the top stays pale"',
        r"bread\.toml: 'pale-crust': 'the top stays pale' also stands",
    ),
    "repeated id": ('id = "weak-gluten"', 'id = "cool-oven"', "id in mechanisms: .*'cool-oven' 2 times"),
    "frame without its place": ('"For recipes by the {thing}:"', '"For recipes:"', "document_frames: expected {thing}"),
    "name of another domain": ('name = "weak gluten"', 'name = "root rot"', "'root rot' 2 times"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_broken_law_is_reported(folder: Path, breach: str) -> None:
    old, new, message = BREACHES[breach]
    text = (folder / "bread.toml").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / "bread.toml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_knowledge(folder=folder)


def test_common_frames_need_their_places(folder: Path) -> None:
    text = (folder / "common.toml").read_text(encoding="utf-8")
    (folder / "common.toml").write_text(text.replace("Now {first}, and {second}.", "Now {first}."), encoding="utf-8")
    with pytest.raises(InputError, match=r"common\.toml: connections: expected {first} and {second} once each"):
        load_knowledge(folder=folder)
