"""`whyrank expand`: a model writes search queries; and the same for `whyrank search --expand`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from whyrank.cli.options import (
    MODEL,
    BatchSize,
    Concurrency,
    Deadline,
    Device,
    Dtype,
    Json,
    Limit,
    MaxRetries,
    Memory,
    Queries,
    SkipBad,
    Timeout,
    TokenLimitField,
    console,
    model_options,
    print_json,
    resumable,
)
from whyrank.datasets import read_queries
from whyrank.generators.opening import ModelOptions, open_writer, options_of
from whyrank.records import Query
from whyrank.search_queries import PROMPT_VERSION, QueryWriter
from whyrank.stages import warn_of_bad_lines
from whyrank.stages.expand import SEARCH_QUERIES, Expanded, by_query, expand_queries, written_by
from whyrank.store import BadLines, Manifest

__all__ = ["expand", "expansions_of", "print_expanded", "writer_in", "writer_of"]


def writer_of(model: str, options: ModelOptions = MODEL) -> QueryWriter:
    """The model, ready to write.

    Raises:
        TemplateMismatch: a checkpoint of whyrank was not taught to write search queries.
        InputError: the model cannot be opened.
    """
    generator, template = open_writer(model, prompt=PROMPT_VERSION, options=options)
    return QueryWriter(generator, template.chat_options)


def expand(
    context: typer.Context,
    queries: Queries,
    model: Annotated[str, typer.Option(help="Folder, hub id, endpoint:URL#MODEL, vllm:MODEL or scripted:FILE.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for search-queries.jsonl and manifest.json.")],
    device: Device = MODEL.device,
    dtype: Dtype = MODEL.dtype,
    batch_size: BatchSize = MODEL.batch_size,
    memory: Memory = MODEL.memory,
    concurrency: Concurrency = MODEL.concurrency,
    timeout: Timeout = MODEL.timeout,
    deadline: Deadline = MODEL.deadline,
    max_retries: MaxRetries = MODEL.max_retries,
    token_limit_field: TokenLimitField = MODEL.token_limit_field,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Let a model write up to ten search queries for each question.

    They serve search --expand, and teach a student (distill --search-queries). Stopped at any moment, the same command
    continues where it was.

    \b
    Example:
      whyrank expand --queries queries.jsonl --model endpoint:http://localhost:8000/v1#my-model -o expanded/
    """
    options = model_options(context, model)
    bad = BadLines() if skip_bad else None
    asked = list(islice(read_queries(queries, bad=bad), limit))
    warn_of_bad_lines(bad)
    manifest = Manifest("expand", {"limit": limit, "skip_bad": skip_bad}).with_inputs(queries)
    writer = writer_of(model, options)
    with resumable(out / SEARCH_QUERIES):
        done = expand_queries(asked, writer, out / SEARCH_QUERIES, manifest)
    if json:
        counts = {**done.counts.to_counts(), "search_queries": done.num_search_queries}
        print_json({"out": str(out), "counts": counts, "first_error": done.first_error, "seconds": done.seconds})
    else:
        print_expanded(done)
    raise typer.Exit(done.exit_code)


def writer_in(source: str) -> str | None:
    """The model that `search --expand` names; `None` where it names a file of search queries."""
    return None if source.endswith(".jsonl") and options_of(source)[0] == "hf" else source


def print_expanded(done: Expanded) -> None:
    """What was written, and for how many queries nothing could be read."""
    num_queries = done.counts.num_known + done.counts.num_new
    console().print(
        f"{done.num_search_queries} search queries for {num_queries} queries in {done.path} "
        f"({done.counts.num_known} were there already, {done.counts.num_unreadable} unreadable, {done.seconds:.1f} s)"
    )
    if done.first_error:
        console().print(f"{done.counts.statuses['error']} requests failed, the first one with: {done.first_error}")


def expansions_of(
    source: str, asked: Sequence[Query], kept: Path, manifest: Manifest
) -> tuple[Mapping[str, Sequence[str]], Expanded | None]:
    """Search queries by query id: from a file of them, or written by a model into `kept`."""
    if writer_in(source) is None:
        return by_query(written_by([Path(source)])), None
    with resumable(kept):
        done = expand_queries(asked, writer_of(source), kept, manifest)
    return by_query(written_by([kept])), done
