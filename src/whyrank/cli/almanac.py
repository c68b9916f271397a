"""`whyrank almanac`: the embedded collection as files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from whyrank.almanac import HANDWRITTEN, Split, build, load_handwritten, write_bright
from whyrank.almanac.gold import gold_judgments, gold_search_queries
from whyrank.almanac.links import LinksConfig, answer_links
from whyrank.almanac.teacher import TeacherConfig, teacher_judgments
from whyrank.cli.options import Json, as_usage_error, console, print_json
from whyrank.errors import InputError
from whyrank.records import Judgment, Pair
from whyrank.stages.expand import SEARCH_QUERIES
from whyrank.store import write_jsonl
from whyrank.template import Template

__all__ = ["almanac"]

NUM_QUERIES = 100
Rates = TypeVar("Rates", TeacherConfig, LinksConfig)

MISTAKES = tuple(name for name in asdict(TeacherConfig()) if name != "seed")
LINKS = tuple(asdict(LinksConfig()))

almanac = typer.Typer(help="The embedded collection as files.", no_args_is_help=True, rich_markup_mode=None)


@almanac.callback()
def group() -> None:
    """The embedded collection as files."""


@almanac.command()
def export(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for queries, corpus, qrels, candidates, judgments.")],
    split: Annotated[
        Split, typer.Option(help="Drawn splits share no combination of observations and setting; one is handwritten.")
    ] = "test",
    num_queries: Annotated[
        int | None,
        typer.Option(min=1, help=f"Queries, with 24 candidates each; default: {NUM_QUERIES}, or all of {HANDWRITTEN}."),
    ] = None,
    domain: Annotated[list[str] | None, typer.Option(help="Only this domain; repeatable. Default: all.")] = None,
    num_irrelevant: Annotated[
        int | None, typer.Option(min=0, help="Label-0 documents per query in judgments.jsonl; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses among the texts of a drawn split, and label-0 documents.")] = 0,
    has_teacher: Annotated[
        bool,
        typer.Option("--teacher", help="Also write teacher.jsonl, by a teacher that errs, and pairs.jsonl, links."),
    ] = False,
    teacher_seed: Annotated[int, typer.Option(help="Chooses what the teacher is wrong about.")] = 0,
    mistake: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=RATE", help=f"What the teacher gets wrong, repeatable: {', '.join(MISTAKES)}."),
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=RATE", help=f"What is linked, repeatable: {', '.join(LINKS)}."),
    ] = None,
    json: Json = False,
) -> None:
    """Write a split in files that every other verb reads, with the gold explanations as judgments.

    search-queries.jsonl holds what somebody would search for who knows the answers, and the folder bright/ the same in
    the layout of BRIGHT's data set. With --teacher, teacher.jsonl holds what a teacher says whose mistakes are
    systematic and whose wrong labels have matching wrong reasons, and pairs.jsonl simulated answer links as whyrank
    mine writes them.

    \b
    Example:
      whyrank almanac export --split test --num-queries 100 -o almanac-test/
    """
    if (mistake or link) and not has_teacher:
        raise typer.BadParameter("--mistake and --link are about what --teacher writes; add --teacher")
    with as_usage_error():
        errs = _with_rates(TeacherConfig(seed=teacher_seed), "--mistake", mistake or (), MISTAKES)
        links = _with_rates(LinksConfig(), "--link", link or (), LINKS)
    if split == HANDWRITTEN:
        collection = load_handwritten(domain, num_queries=num_queries)
    else:
        collection = build(split, NUM_QUERIES if num_queries is None else num_queries, seed=seed, domains=domain)
    collection.write(out)
    write_bright(collection, out / "bright")
    template = Template.load("almanac")
    gold = gold_judgments(collection, template, num_irrelevant=num_irrelevant, seed=seed)
    num_judgments = write_jsonl(out / "judgments.jsonl", gold)
    write_jsonl(out / SEARCH_QUERIES, gold_search_queries(collection))
    counts = {
        "queries": len(collection.queries),
        "documents": len(collection.documents),
        "pairs": len(collection.labels),
        "judgments": num_judgments,
    }
    if has_teacher:
        said = teacher_judgments(collection, template, errs, num_irrelevant=num_irrelevant, seed=seed)
        counts |= _write_evidence(out, said, answer_links(collection, links, seed))
    if json:
        print_json({"out": str(out), "split": split, **counts})
        return
    described = ", ".join(f"{count} {name}" for name, count in counts.items())
    console().print(f"{described} of the {split} split in {out}")


def _write_evidence(out: Path, said: Iterable[Judgment], links: Iterable[Pair]) -> dict[str, int]:
    """What a real collection would have in place of gold: a teacher's word, and links."""
    pairs = list(links)
    write_jsonl(out / "pairs.jsonl", pairs)
    return {
        "teacher judgments": write_jsonl(out / "teacher.jsonl", said),
        "links": sum(pair.relation == "linked" for pair in pairs),
    }


def _with_rates(config: Rates, option: str, texts: Sequence[str], kinds: Sequence[str]) -> Rates:
    """The config with the rates that a person gave as `KIND=RATE`.

    Raises:
        InputError: no such kind, or no number in its range.
    """
    for text in texts:
        kind, _, rate = text.partition("=")
        if kind not in kinds:
            raise InputError(
                f"{option}: expected one of {', '.join(kinds)} with a rate, as in {kinds[0]}=0.5, found {text!r}"
            )
        try:
            changed: dict[str, Any] = {kind: float(rate)}
        except ValueError as cause:
            raise InputError(f"{option}: expected a number after {kind}=, found {rate!r}") from cause
        config = replace(config, **changed)
    return config
