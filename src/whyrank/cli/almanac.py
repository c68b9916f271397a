"""`whyrank almanac`: the embedded collection as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whyrank.almanac import HANDWRITTEN, Split, build, load_handwritten, write_bright
from whyrank.almanac.gold import gold_judgments
from whyrank.cli.options import Json, console, print_json
from whyrank.store import write_jsonl
from whyrank.template import Template

__all__ = ["almanac"]

NUM_QUERIES = 100

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
    json: Json = False,
) -> None:
    """Write a split in files that every other verb reads, with the gold explanations as judgments.

    The folder bright/ in it holds the same in the layout of BRIGHT's data set.

    \b
    Example:
      whyrank almanac export --split test --num-queries 100 -o almanac-test/
    """
    if split == HANDWRITTEN:
        collection = load_handwritten(domain, num_queries=num_queries)
    else:
        collection = build(split, NUM_QUERIES if num_queries is None else num_queries, seed=seed, domains=domain)
    collection.write(out)
    write_bright(collection, out / "bright")
    gold = gold_judgments(collection, Template.load("almanac"), num_irrelevant=num_irrelevant, seed=seed)
    num_judgments = write_jsonl(out / "judgments.jsonl", gold)
    counts = {
        "queries": len(collection.queries),
        "documents": len(collection.documents),
        "pairs": len(collection.labels),
        "judgments": num_judgments,
    }
    if json:
        print_json({"out": str(out), "split": split, **counts})
        return
    described = ", ".join(f"{count} {name}" for name, count in counts.items())
    console().print(f"{described} of the {split} split in {out}")
