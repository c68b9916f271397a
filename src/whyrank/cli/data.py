"""Verbs that need no model: mine, search, evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from whyrank.cli.expand import expansions_of, print_expanded
from whyrank.cli.options import (
    BM25,
    Corpus,
    Excluded,
    Json,
    Limit,
    Queries,
    SkipBad,
    as_usage_error,
    console,
    existing,
    print_json,
    setting,
    settings_of,
)
from whyrank.evaluation import Ties, parse_measures
from whyrank.mining.config import MiningConfig
from whyrank.records import Query
from whyrank.search import Bm25Config, Bm25Method, QueryWeighting
from whyrank.stages import EXIT_OK, EXIT_PARTIAL
from whyrank.stages.evaluate import evaluate_files
from whyrank.stages.expand import SEARCH_QUERIES, Expanded, Expansion
from whyrank.stages.mine import mine_files
from whyrank.stages.search import search_files
from whyrank.store import Manifest

__all__ = ["evaluate", "mine", "mining_config", "search", "search_config"]

MINING = MiningConfig(site="example.com")
LEFT_OUT = (
    *("questions.", "links.dropped.", "links.without_text", "links.to_contaminated", "answers.without_question"),
    *("posts.skipped", "posts.bad", "lines.bad"),
)


def mining_config(params: Mapping[str, Any]) -> MiningConfig:
    """What `mine` was asked for.

    Raises:
        typer.BadParameter: a number is outside its range.
    """
    with as_usage_error():
        return MiningConfig(**settings_of(MiningConfig, params), site_aliases=tuple(params["site_alias"] or ()))


def search_config(params: Mapping[str, Any]) -> Bm25Config:
    """What `search` was asked for.

    Raises:
        typer.BadParameter: a number is outside its range.
    """
    with as_usage_error():
        return Bm25Config(**settings_of(Bm25Config, params))


def mine(
    context: typer.Context,
    posts: Annotated[Path, existing("--posts", help="A StackExchange dump's Posts.xml.")],
    site: Annotated[str, setting(MiningConfig, "site")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for corpus, queries, pairs, qrels, manifest.")],
    pages: Annotated[list[Path] | None, existing("--pages", help="Page texts, JSONL {url, text|html, title}.")] = None,
    site_alias: Annotated[list[str] | None, setting(MiningConfig, "site_aliases")] = None,
    without_page: Annotated[Literal["skip", "context"], setting(MiningConfig, "without_page")] = MINING.without_page,
    num_negatives: Annotated[int, setting(MiningConfig, "num_negatives")] = MINING.num_negatives,
    num_random: Annotated[int, setting(MiningConfig, "num_random")] = MINING.num_random,
    first_rank: Annotated[int, setting(MiningConfig, "first_rank")] = MINING.first_rank,
    last_rank: Annotated[int, setting(MiningConfig, "last_rank")] = MINING.last_rank,
    min_answer_score: Annotated[int, setting(MiningConfig, "min_answer_score")] = MINING.min_answer_score,
    min_document_chars: Annotated[int, setting(MiningConfig, "min_document_chars")] = MINING.min_document_chars,
    test_fraction: Annotated[float, setting(MiningConfig, "test_fraction")] = MINING.test_fraction,
    seed: Annotated[int, setting(MiningConfig, "seed")] = MINING.seed,
    exclude: Annotated[
        list[Path] | None, existing("--exclude", help="Queries of a benchmark: questions like them are dropped.")
    ] = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Turn a Q&A dump into queries, documents and pairs worth labelling.

    A question is paired with the pages that its answers link to, and with hard and random negatives. Texts come
    from other posts of the dump and from --pages; nothing is fetched. --limit takes only the first so many posts.

    \b
    Example:
      whyrank mine --posts Posts.xml --site ai.stackexchange.com --without-page context -o mined/
    """
    config = mining_config(context.params)
    manifest = mine_files(posts, out, config, pages=pages or (), exclude=exclude or (), limit=limit, skip_bad=skip_bad)
    if json:
        print_json({"out": str(out), "counts": manifest.counts, "seconds": manifest.seconds})
        return
    counts = manifest.counts
    console().print(
        f"{counts['questions']} questions, {counts['questions.kept']} with a usable linked page; "
        f"{counts['documents']} documents, {counts['pairs.linked']} linked and {counts['pairs.negative']} negative "
        f"pairs in {out} ({manifest.seconds:.1f} s)"
    )
    if not counts["questions.kept"]:
        console().print(
            "\n".join(["Nothing was kept. What was left out, as counted in manifest.json:", *_reasons(counts)])
        )
    if counts["links.without_text"]:
        remedy = ", or take the answer's own words with --without-page context" if without_page == "skip" else ""
        console().print(
            f"{counts['links.without_text']} links lead to pages without text here: give texts with --pages{remedy}"
        )


def _reasons(counts: Mapping[str, int]) -> list[str]:
    """A line for each reason why questions, links or posts were left out, the most frequent first."""
    names = [name for name in counts if name.startswith(LEFT_OUT) and name != "questions.kept" and counts[name]]
    named = [f"  {counts[name]} {name}" for name in sorted(names, key=lambda name: (-counts[name], name))]
    return named or ["  nothing: the dump holds no questions"]


def search(
    context: typer.Context,
    corpus: Corpus,
    queries: Queries,
    out: Annotated[Path, typer.Option("-o", "--out", help="Run to write: TREC, or JSON where it ends in .json.")],
    top_k: Annotated[int, typer.Option(min=1, help="Documents per query.")] = 100,
    k1: Annotated[float, setting(Bm25Config, "k1")] = BM25.k1,
    b: Annotated[float, setting(Bm25Config, "b")] = BM25.b,
    method: Annotated[Bm25Method, setting(Bm25Config, "method")] = BM25.method,
    delta: Annotated[float, setting(Bm25Config, "delta")] = BM25.delta,
    query_weighting: Annotated[QueryWeighting, setting(Bm25Config, "query_weighting")] = BM25.query_weighting,
    stemmer: Annotated[str, setting(Bm25Config, "stemmer")] = BM25.stemmer,
    stop_words: Annotated[str, setting(Bm25Config, "stop_words")] = BM25.stop_words,
    expand: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|FILE",
            help="Search for more than the queries' own words: search queries by a model (see whyrank expand), or "
            "from its search-queries.jsonl.",
        ),
    ] = None,
    expansion: Annotated[
        Expansion,
        typer.Option(help="append: one search for all of a query's texts; fuse: one for each, fused by rank."),
    ] = "append",
    excluded: Excluded = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Find candidates with BM25: the first stage.

    With --expand, what a model writes is kept beside the run, and the same command continues where it was stopped. A
    query for which nothing could be read is searched for as it is (exit code 7).

    \b
    Example:
      whyrank search --corpus docs.jsonl --queries queries.jsonl --top-k 100 -o bm25.trec
    """
    written: list[Expanded] = []

    def more_queries(asked: Sequence[Query]) -> Mapping[str, Sequence[str]]:
        assert expand is not None
        kept = out.with_name(f"{out.name}.{SEARCH_QUERIES}")
        found, done = expansions_of(expand, asked, kept, Manifest("expand", {}).with_inputs(queries))
        written.extend([done] if done else [])
        return found

    config = search_config(context.params)
    found = search_files(
        corpus,
        queries,
        out,
        top_k=top_k,
        config=config,
        excluded=excluded,
        expand=more_queries if expand else None,
        expansion=expansion,
        limit=limit,
        skip_bad=skip_bad,
    )
    unreadable = sum(done.counts.num_unreadable for done in written)
    if json:
        print_json({**asdict(found), "run": str(found.run), "unreadable_expansions": unreadable})
        raise typer.Exit(EXIT_PARTIAL if unreadable else EXIT_OK)
    for done in written:
        print_expanded(done)
    console().print(
        f"{found.num_documents} documents, {found.num_queries} queries ({found.num_empty_queries} found nothing), "
        f"{found.num_lines} lines in {out} ({found.seconds:.1f} s)"
    )
    if found.num_bad_lines:
        console().print(f"{found.num_bad_lines} malformed lines were passed over")
    raise typer.Exit(EXIT_PARTIAL if unreadable else EXIT_OK)


def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="TREC, JSON {qid: {docid: score}} or RankGPT.", metavar="RUN...")],
    qrels: Annotated[Path, existing("--qrels", help="Relevance: TREC qrels, BEIR TSV or BRIGHT examples.")],
    measures: Annotated[str, typer.Option(help="Any measures of ir_measures, with blanks between.")] = "nDCG@10 R@100",
    ties: Annotated[
        Ties,
        typer.Option(help="Order of equal scores: trec_eval's (by document id, as published) or the run's own (rank)."),
    ] = "trec_eval",
    allow_unparsed: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of unreadable judgments up to which a run is measured.")
    ] = 0.01,
    excluded: Excluded = None,
    per_query: Annotated[bool, typer.Option("--per-query", help="With --json: every query's values too.")] = False,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Measure runs against relevance judgments.

    Queries that a run lacks count as 0. For a run that rerank wrote, with its judgments.jsonl beside it, the share
    of unreadable judgments is shown, and above --allow-unparsed nothing is measured.

    \b
    Example:
      whyrank evaluate --qrels qrels.txt bm25.trec out/run.trec --measures "nDCG@10 R@100"
    """
    asked = measures.split()
    with as_usage_error():
        parse_measures(asked)
    evaluation = evaluate_files(
        runs,
        qrels,
        asked,
        ties=ties,
        allow_unparsed=allow_unparsed,
        excluded=excluded,
        limit=limit,
        skip_bad=skip_bad,
    )
    if json:
        print_json(evaluation.to_json(per_query=per_query))
        return
    from whyrank.evaluation import table

    console().print(table(evaluation))
