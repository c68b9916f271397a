"""The laws that the almanac's knowledge keeps; every breach is reported with its file and entry.

They make the collection fair (a word never gives the label away) and solvable (two observations decide).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from whyrank.almanac.schema import Common, Domain, Knowledge, Mechanism, Observation, Setting
from whyrank.errors import InputError

__all__ = ["breaches", "check", "refuse"]

PLAIN_WORDS = re.compile(r"[a-z]+(?: [a-z]+)*")
SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
MAX_SHOWN = 20  # breaches in one message; the rest is only counted


def check(knowledge: Knowledge) -> None:
    """Refuse knowledge that breaks a law.

    Raises:
        InputError: naming file, entry, what was expected and what was found, for every breach.
    """
    refuse("the almanac's knowledge breaks its laws", breaches(knowledge))


def refuse(message: str, lines: Iterable[str]) -> None:
    """Report the breaches that there are, at most `MAX_SHOWN` of them word for word.

    Raises:
        InputError: there is at least one.
    """
    found = list(lines)
    if found:
        rest = f"\n… and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
        raise InputError(f"{message}:\n" + "\n".join(found[:MAX_SHOWN]) + rest)


def breaches(knowledge: Knowledge) -> Iterator[str]:
    """One line per broken law, `file: entry: what is wrong`; nothing if all is well."""
    for line in _common_breaches(knowledge.common):
        yield f"common.toml: {line}"
    for domain in knowledge.domains:
        for line in _domain_breaches(domain):
            yield f"{domain.name}.toml: {line}"
    yield from _shared_things(knowledge.domains)
    yield from _repeated_texts(knowledge.domains)
    yield from _repeated("name of a mechanism", [e.name for domain in knowledge.domains for e in domain.mechanisms])


def _common_breaches(common: Common) -> Iterator[str]:
    yield from _too_few("openings", common.openings, 4)
    yield from _too_few("details", common.details, 4)
    yield from _too_few("closers", common.closers, 4)
    yield from _frames("connections", common.connections, ("{first}", "{second}"))
    yield from _frames("quotes", common.quotes, ("{phrase}",))


def _domain_breaches(domain: Domain) -> Iterator[str]:
    yield from _frames("query_frames", domain.query_frames, ("{thing}",))
    yield from _frames("document_frames", domain.document_frames, ("{thing}",))
    for kind, ids in (
        ("settings", [entry.id for entry in domain.settings]),
        ("observations", [entry.id for entry in domain.observations]),
        ("mechanisms", [entry.id for entry in domain.mechanisms]),
    ):
        yield from _ids(kind, ids)
    yield from _too_few("settings", domain.settings, 3)
    yield from _too_few("mechanisms", domain.mechanisms, 5)
    yield from _repeated("summary of an observation", [entry.summary for entry in domain.observations])
    for setting in domain.settings:
        yield from _setting_breaches(setting)
    for observation in domain.observations:
        yield from _observation_breaches(observation, domain)
    for mechanism in domain.mechanisms:
        yield from _mechanism_breaches(mechanism, domain)
    yield from _ambiguous_pairs(domain)
    yield from _things_elsewhere(domain)


def _setting_breaches(setting: Setting) -> Iterator[str]:
    where = f"setting {setting.id!r}"
    yield from _length(f"{where}, name", setting.name, 1, 2)
    yield from _too_few(f"{where}, things", setting.things, 6)
    for thing in setting.things:
        yield from _length(f"{where}, thing", thing, 1, 3)


def _observation_breaches(observation: Observation, domain: Domain) -> Iterator[str]:
    where = f"observation {observation.id!r}"
    yield from _length(f"{where}, summary", observation.summary, 2, 4)
    yield from _too_few(f"{where}, phrasings", observation.phrasings, 5)
    for phrasing in observation.phrasings:
        yield from _length(f"{where}, phrasing", phrasing, 3, 9)
    num_causes = sum(observation.id in mechanism.observations for mechanism in domain.mechanisms)
    if num_causes < 2:
        yield f"{where}: expected it to fit at least 2 mechanisms, found {num_causes}"
    known = {word for entry in domain.observations for text in entry.shown(False) for word in text.split()}
    yield from _unknown(f"{where}, held-out phrasing", observation.phrasings[-1:], known)


def _mechanism_breaches(mechanism: Mechanism, domain: Domain) -> Iterator[str]:
    where = f"mechanism {mechanism.id!r}"
    yield from _length(f"{where}, name", mechanism.name, 2, 3)
    yield from _too_few(f"{where}, statements", mechanism.statements, 4)
    for statement in mechanism.statements:
        yield from _length(f"{where}, statement", statement, 8, 14)
    if not 3 <= len(set(mechanism.observations)) == len(mechanism.observations) <= 4:
        yield f"{where}: expected 3 or 4 different observations, found {list(mechanism.observations)}"
    for unknown in set(mechanism.observations) - {entry.id for entry in domain.observations}:
        yield f"{where}: no observation has the id {unknown!r}"
    known = {word for entry in domain.mechanisms for text in entry.shown(False) for word in text.split()}
    yield from _unknown(f"{where}, held-out statement", mechanism.statements[-1:], known)


def _ambiguous_pairs(domain: Domain) -> Iterator[str]:
    for one, other in combinations(domain.mechanisms, 2):
        shared = sorted(set(one.observations) & set(other.observations))
        if len(shared) > 1:
            yield f"mechanisms {one.id!r} and {other.id!r}: expected at most 1 shared observation, found {shared}"


def _things_elsewhere(domain: Domain) -> Iterator[str]:
    """A thing's word in another text of the domain would name a setting by accident."""
    texts = [*domain.query_frames, *domain.document_frames]
    texts += [text for observation in domain.observations for text in observation.phrasings]
    texts += [text for mechanism in domain.mechanisms for text in mechanism.statements]
    words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    for setting in domain.settings:
        for thing in setting.things:
            if set(thing.split()) & words:
                yield f"setting {setting.id!r}: the words of {thing!r} also stand in another text of the domain"


def _shared_things(domains: Sequence[Domain]) -> Iterator[str]:
    """Each word of a thing leads to one setting, and has to be learnt: it is no word of a setting's name."""
    names = {word for domain in domains for setting in domain.settings for word in setting.name.split()}
    owners: dict[str, str] = {}
    for domain in domains:
        for setting in domain.settings:
            where = f"{domain.name}.toml: setting {setting.id!r}"
            for word in (word for thing in setting.things for word in thing.split()):
                if word in owners:
                    yield f"{where}: the word {word!r} also stands in a thing of {owners[word]}"
                if word in names:
                    yield f"{where}: the word {word!r} of a thing is also the name of a setting"
                owners[word] = where


def _repeated_texts(domains: Sequence[Domain]) -> Iterator[str]:
    """No text of a list may contain another one: it must be possible to tell what a text says."""
    phrasings = [text for domain in domains for entry in domain.observations for text in entry.phrasings]
    statements = [text for domain in domains for entry in domain.mechanisms for text in entry.statements]
    for texts in (phrasings, statements):
        joined = "|".join(f" {text} " for text in texts)
        for text in texts:
            if joined.count(f" {text} ") > 1:
                yield f"{_owner(text, domains)}: {text!r} also stands in another text of its kind"


def _owner(text: str, domains: Sequence[Domain]) -> str:
    for domain in domains:
        texts = {entry.id: entry.phrasings for entry in domain.observations}
        texts |= {entry.id: entry.statements for entry in domain.mechanisms}
        for entry_id, own in texts.items():
            if text in own:
                return f"{domain.name}.toml: {entry_id!r}"
    raise KeyError(text)


# ---- the small laws that several entries share ---------------------------------------------------------------


def _length(where: str, text: str, shortest: int, longest: int) -> Iterator[str]:
    if not PLAIN_WORDS.fullmatch(text):
        yield f"{where}: expected lower-case words and single blanks, found {text!r}"
    elif not shortest <= len(text.split()) <= longest:
        yield f"{where}: expected {shortest} to {longest} words, found {len(text.split())}: {text!r}"


def _too_few(where: str, entries: Sequence[object], fewest: int) -> Iterator[str]:
    if len(entries) < fewest:
        yield f"{where}: expected at least {fewest}, found {len(entries)}"


def _ids(kind: str, ids: Sequence[str]) -> Iterator[str]:
    yield from _repeated(f"id in {kind}", ids)
    for entry_id in ids:
        if not SLUG.fullmatch(entry_id):
            yield f"{kind}: expected an id of lower-case words joined by hyphens, found {entry_id!r}"


def _repeated(what: str, values: Sequence[str]) -> Iterator[str]:
    for value, count in Counter(values).items():
        if count > 1:
            yield f"{what}: expected each once, found {value!r} {count} times"


def _frames(where: str, frames: Sequence[str], places: tuple[str, ...]) -> Iterator[str]:
    yield from _too_few(where, frames, 3)
    for frame in frames:
        if any(frame.count(place) != 1 for place in places) or frame.count("{") != len(places):
            yield f"{where}: expected {' and '.join(places)} once each, found {frame!r}"


def _unknown(where: str, texts: Sequence[str], known: set[str]) -> Iterator[str]:
    """A held-out text tests a new sentence, not new words: those could not have been learnt."""
    for text in texts:
        strange = [word for word in text.split() if word not in known]
        if strange:
            yield f"{where}: expected words that other texts of the domain teach, found {strange} in {text!r}"
