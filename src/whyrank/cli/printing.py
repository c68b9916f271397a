"""What people and programs read on standard output."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from whyrank.cli.options import console, print_json
from whyrank.records import Judgment
from whyrank.rerank import Ranking
from whyrank.stages.failures import describe_failures
from whyrank.stages.rerank import Reranked

__all__ = ["print_ranking", "print_reranked"]

PASSAGE_CHARACTERS = 160


def print_ranking(query: str, ranking: Ranking, *, as_json: bool) -> None:
    """One query's ranking: for people with reasons and passages, for programs as JSON."""
    if as_json:
        print_json({"query": query, "results": [_result(ranking, index) for index in range(len(ranking))]})
        return
    screen = console()
    screen.print(Text(query, style="bold"))
    for result in ranking:
        score = "no label" if result.score is None else f"score {result.score:.3f}, label {result.label}"
        note = "" if result.status == "ok" else f", {result.status}"
        heading = Text(f"{result.rank}. {result.id}", style="bold")
        note += _combined(result.judgment)
        heading.append(f"  ({score}{note}; was {result.first_stage_rank})", style="not bold")
        screen.print()
        screen.print(heading)
        if result.judgment.error:
            _print_indented(screen, Text(result.judgment.error))
        if result.explanation:
            _print_indented(screen, Text(f"why: {result.explanation}"))
        shown = " ".join(result.passage.split())
        cut = shown[: PASSAGE_CHARACTERS - 1] + "…" if len(shown) > PASSAGE_CHARACTERS else shown
        _print_indented(screen, Text(cut, style="dim"))
    if ranking.num_unreadable:
        screen.print(f"\n{ranking.num_unreadable} of {len(ranking)} answers could not be read")


def _combined(judgment: Judgment) -> str:
    """What a judgment was made from, where that is more than one answer."""
    start, end = judgment.passage
    parts = [
        f", characters {start:,} to {end:,}, best of {judgment.num_passages} passages"
        if judgment.num_passages > 1
        else "",
        f", mean of {judgment.num_samples} samples" if judgment.num_samples > 1 else "",
        f", {judgment.num_unreadable} of {judgment.num_answers} answers unreadable" if judgment.num_unreadable else "",
    ]
    return "".join(parts)


def _print_indented(screen: Console, text: Text) -> None:
    """Wrapped even where other lines are not: a padded line that is not wrapped would be cut at the width."""
    screen.print(Padding(text, (0, 0, 0, 3)), soft_wrap=False)


def _result(ranking: Ranking, index: int) -> dict[str, object]:
    result = ranking[index]
    return {
        "id": result.id,
        "rank": result.rank,
        "score": result.score,
        "rank_score": result.rank_score,
        "label": result.label,
        "probs": result.judgment.probs,
        "explanation": result.explanation,
        "is_explained": result.is_explained,
        "status": result.status,
        "error": result.judgment.error,
        "passage": result.passage,
        "passage_span": result.judgment.passage,
        "num_passages": result.judgment.num_passages,
        "num_samples": result.judgment.num_samples,
        "num_unreadable": result.judgment.num_unread_answers,
        "first_stage_rank": result.first_stage_rank,
    }


def print_reranked(done: Reranked) -> None:
    """The summary of a reranking job."""
    counts, screen = done.counts, console()
    statuses = ", ".join(f"{status} {count}" for status, count in sorted(counts.statuses.items()))
    screen.print(f"{done.num_queries} queries, {counts.num_judgments} judgments ({statuses})")
    if done.first_error:
        screen.print(describe_failures(counts.statuses["error"], done.first_error))
    if done.auto is not None:
        auto = done.auto
        screen.print(
            f"{auto.num_explained} documents got a reason; {auto.num_tokens / max(1, done.num_queries):.1f} tokens "
            f"written per query, {auto.most_tokens_per_query} at most; the budget cut {auto.num_cut_short} short"
        )
    if counts.num_known:
        screen.print(f"{counts.num_known} were there already, {counts.num_new} are new")
    if counts.num_torn_bytes:
        screen.print(f"an earlier run was killed while writing: its last {counts.num_torn_bytes} bytes were cut away")
    if counts.num_queries_cut:
        screen.print(f"{counts.num_queries_cut} judgments saw a query that was cut to the template's max_query_tokens")
    if counts.num_documents_cut:
        cap = "max_passages" if counts.num_by_passages else "max_document_tokens"
        screen.print(f"{counts.num_documents_cut} judgments saw a document that was cut to {cap}")
    if counts.num_by_passages:
        screen.print(f"{counts.num_by_passages} long documents were judged by {counts.num_passages} passages")
    if counts.num_answers > counts.num_judgments and counts.num_unread_answers:
        screen.print(f"{counts.num_unread_answers} of the {counts.num_answers} answers behind them could not be read")
    if done.num_excluded:
        screen.print(f"{done.num_excluded} excluded documents were left out")
    if done.num_bad_lines:
        screen.print(f"{done.num_bad_lines} malformed lines were passed over")
    if done.num_without_text:
        screen.print(f"{done.num_without_text} candidates without a text were dropped")
    if counts.num_new and done.seconds:
        speed, tokens = counts.num_new / done.seconds, counts.num_completion_tokens / counts.num_new
        screen.print(f"{speed:.1f} documents per second, {tokens:.1f} tokens written per document")
    screen.print(f"{done.run}, {done.out / 'judgments.jsonl'}, {done.out / 'manifest.json'} ({done.seconds:.1f} s)")
