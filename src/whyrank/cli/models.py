"""Verbs that run a model: label, rerank, demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from pydantic import JsonValue

from whyrank.cli.documents import read_documents
from whyrank.cli.options import (
    MODEL,
    BatchSize,
    Concurrency,
    Corpus,
    Deadline,
    Device,
    Dtype,
    Excluded,
    Instruction,
    Json,
    Limit,
    Logprobs,
    MaxExplanationTokens,
    MaxRetries,
    ModeOption,
    Queries,
    SkipBad,
    TemplateOption,
    Timeout,
    as_usage_error,
    console,
    existing,
    model_options,
    print_json,
    resumable,
    setting,
)
from whyrank.cli.printing import print_ranking, print_reranked
from whyrank.demo.config import DemoConfig
from whyrank.errors import require
from whyrank.generators import Sampling
from whyrank.generators.opening import ModelOptions
from whyrank.progress import Progress
from whyrank.ranking import OnUnparsed, parse_fuse
from whyrank.records import Document, Judgment
from whyrank.rerank import Reranker
from whyrank.stages import EXIT_OK, EXIT_PARTIAL
from whyrank.stages.failures import describe_failures, require_answers
from whyrank.stages.label import label_files, read_pairs
from whyrank.stages.rerank import read_candidates, rerank_files
from whyrank.store import Manifest
from whyrank.template import Template

__all__ = ["demo", "label", "rerank"]

TokenLimitField = Annotated[Literal["max_tokens", "max_completion_tokens"], setting(ModelOptions, "token_limit_field")]
DEMO = DemoConfig()


def label(
    context: typer.Context,
    pairs: Annotated[Path, existing("--pairs", help="Pairs to label: pairs.jsonl of whyrank mine.")],
    queries: Queries,
    corpus: Corpus,
    teacher: Annotated[
        str, typer.Option(help="Folder, hub id, endpoint:URL#MODEL, scripted:FILE, or overlap (compares words only).")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for judgments.jsonl and manifest.json.")],
    mode: ModeOption = "explain",
    template: TemplateOption = None,
    instruction: Instruction = None,
    max_explanation_tokens: MaxExplanationTokens = None,
    device: Device = MODEL.device,
    dtype: Dtype = MODEL.dtype,
    batch_size: BatchSize = MODEL.batch_size,
    concurrency: Concurrency = MODEL.concurrency,
    timeout: Timeout = MODEL.timeout,
    deadline: Deadline = MODEL.deadline,
    max_retries: MaxRetries = MODEL.max_retries,
    has_logprobs: Logprobs = MODEL.has_logprobs,
    token_limit_field: TokenLimitField = MODEL.token_limit_field,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Let a teacher explain and label pairs.

    Stopped at any moment, the same command continues where it was. Answers that could not be read stay in the
    file as unparsed or error and are never used for training.

    \b
    Example:
      whyrank label --pairs mined/train/pairs.jsonl --queries mined/train/queries.jsonl \\
        --corpus mined/corpus.jsonl --teacher endpoint:http://localhost:8000/v1#my-model -o labelled/
    """
    manifest = Manifest("label", {})
    asked = _template(template)
    options = model_options(context, teacher)
    texts = read_pairs(pairs, queries, corpus, limit=limit, skip_bad=skip_bad)
    reranker = Reranker.load(
        teacher,
        template=asked,
        mode=mode,
        instruction=instruction,
        max_explanation_tokens=max_explanation_tokens,
        options=options,
    )
    config = _judge_config(reranker, options, limit=limit, skip_bad=skip_bad)
    manifest = replace(manifest, config=config).with_inputs(pairs, queries, corpus)
    with resumable(out / "judgments.jsonl"):
        done = label_files(texts, reranker.judge, out, manifest)
    if json:
        counts = done.counts.to_counts()
        found = {"labels": done.labels, "bad_lines": done.num_bad_lines, "first_error": done.first_error}
        print_json({"out": str(out), "counts": counts, **found, "seconds": done.seconds})
    else:
        for relation, labels in sorted(done.labels.items()):
            shares = ", ".join(f"{label}: {count}" for label, count in sorted(labels.items()))
            console().print(f"{relation} pairs: {shares}")
        console().print(
            f"{done.counts.num_judgments} judgments in {out} ({done.counts.num_known} were there already, "
            f"{done.counts.num_unreadable} unreadable, {done.seconds:.1f} s)"
        )
        if done.first_error:
            console().print(describe_failures(done.counts.statuses["error"], done.first_error))
        if done.num_bad_lines:
            console().print(f"{done.num_bad_lines} malformed lines were passed over")
    raise typer.Exit(done.exit_code)


def rerank(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Folder, hub id, endpoint:URL#MODEL or scripted:FILE; default: the demo model.")
    ] = None,
    run: Annotated[Path | None, existing("--run", help="First-stage run; a RankGPT file brings its own texts.")] = None,
    corpus: Annotated[Path | None, existing("--corpus", help="Documents of the run.")] = None,
    queries: Annotated[Path | None, existing("--queries", help="Queries of the run.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for run, judgments and manifest.")] = None,
    query: Annotated[str | None, typer.Option(help="Rank for this one query and print the reasons.")] = None,
    documents: Annotated[Path | None, existing("--documents", help="Its documents; - is standard input.")] = None,
    mode: ModeOption = "explain",
    template: TemplateOption = None,
    instruction: Instruction = None,
    max_explanation_tokens: MaxExplanationTokens = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --run: judge the first so many of each query; the rest follow as they stood. With --query: "
            "judge all, print so many.",
        ),
    ] = None,
    fuse: Annotated[str, typer.Option(help="Mix in the first stage: none, rrf, zscore:w, minmax:w.")] = "none",
    on_unparsed: Annotated[
        OnUnparsed,
        typer.Option(help="A pair without a label: first_stage takes its neighbours' place, last, or error."),
    ] = "first_stage",
    field: Annotated[list[str] | None, typer.Option(help="Corpus field: doc_id=NAME, text=NAME, title=NAME.")] = None,
    device: Device = MODEL.device,
    dtype: Dtype = MODEL.dtype,
    batch_size: BatchSize = MODEL.batch_size,
    concurrency: Concurrency = MODEL.concurrency,
    timeout: Timeout = MODEL.timeout,
    deadline: Deadline = MODEL.deadline,
    max_retries: MaxRetries = MODEL.max_retries,
    has_logprobs: Logprobs = MODEL.has_logprobs,
    token_limit_field: TokenLimitField = MODEL.token_limit_field,
    excluded: Excluded = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Put candidates in a better order, with the reasons.

    With --run, writes run.trec, judgments.jsonl and manifest.json into -o; stopped at any moment, the same command
    continues where it was. Candidates without a text are an error; --skip-bad drops and counts them. With --query,
    prints a readable ranking.

    \b
    Examples:
      whyrank rerank --run bm25.trec --corpus docs.jsonl --queries queries.jsonl --model my-model/ -o out/
      whyrank rerank --run rankgpt.json --model endpoint:http://localhost:8000/v1#my-model -o out/
      whyrank rerank --query "Why do the leaves of my fern turn brown?" --documents docs.jsonl
    """
    is_one = query is not None and documents is not None and run is None and out is None
    is_many = run is not None and out is not None and query is None and documents is None
    if is_one == is_many:
        raise typer.BadParameter(_explain_choice(has_query=query is not None, has_run=run is not None, out=out))
    if is_one and (corpus, queries, excluded) != (None, None, None):
        raise typer.BadParameter("--corpus, --queries and --excluded go with --run, not with --query")
    names = _parse_fields(field or [])
    with as_usage_error():
        needs_scores = parse_fuse(fuse).method in ("zscore", "minmax")
    if is_one and needs_scores:
        raise typer.BadParameter(f"--fuse {fuse} needs the scores of a --run; with --query choose none or rrf")
    manifest = Manifest("rerank", {})
    asked = _template(template)
    options = model_options(context, model)
    candidates = None
    if run is not None:  # before the model, which may take minutes to load
        candidates = read_candidates(
            run,
            corpus=corpus,
            queries=queries,
            excluded=excluded,
            top_k=top_k,
            limit=limit,
            skip_bad=skip_bad,
            fields=names,
        )
    reranker = Reranker.load(
        model,
        template=asked,
        mode=mode,
        instruction=instruction,
        fuse=fuse,
        on_unparsed=on_unparsed,
        max_explanation_tokens=max_explanation_tokens,
        options=options,
    )
    if query is not None and documents is not None:
        found = read_documents(documents, names, limit=limit, skip_bad=skip_bad)
        _rank_one(reranker, query, found, top_k=top_k, as_json=json)
    assert candidates is not None
    assert out is not None
    more: dict[str, JsonValue] = {"fuse": fuse, "on_unparsed": on_unparsed, "top_k": top_k, "limit": limit}
    config = _judge_config(reranker, options, **more, field={**names}, skip_bad=skip_bad)
    manifest = replace(manifest, config=config).with_inputs(run, corpus, queries, excluded)
    with resumable(out / "judgments.jsonl"):
        done = rerank_files(candidates, reranker, out, manifest)
    if json:
        print_json(done.to_json())
    else:
        print_reranked(done)
    raise typer.Exit(done.exit_code)


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for runs, judgments, manifest and report.")] = Path(
        "out/demo"
    ),
    num_steps: Annotated[int, typer.Option(min=1, help="Training steps of the explaining student.")] = DEMO.num_steps,
    num_queries: Annotated[int, typer.Option(min=1, help="Test queries.")] = DEMO.num_queries,
    seed: Annotated[int, typer.Option(help="Fixes data and weights.")] = DEMO.seed,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """See the paper's claim happen on this machine: train two tiny students, one that explains and one that does
    not, on the embedded almanac, and compare them with BM25 and chance.

    \b
    Example:
      whyrank demo -o out/demo
    """
    for module in ("torch", "transformers"):
        require(module, "train")
    for module in ("matplotlib", "jinja2"):
        require(module, "report")
    from whyrank.demo.run import run_demo

    queries = num_queries if limit is None else min(limit, num_queries)
    with resumable(out):
        outcome = run_demo(out, replace(DEMO, num_steps=num_steps, num_queries=queries, seed=seed))
    if json:
        print_json(outcome.to_json())
    else:
        outcome.print(console())


def _rank_one(
    reranker: Reranker, query: str, documents: Sequence[Document], *, top_k: int | None, as_json: bool
) -> NoReturn:
    errors: list[str] = []
    with Progress(f"judging with {reranker.judge.generator.name}", len(documents)) as progress:

        def on_judgment(judgment: Judgment) -> None:
            progress.advance()
            if judgment.error:
                errors.append(judgment.error)

        ranking = reranker.rank(query, documents, top_k=top_k, on_judgment=on_judgment)
    require_answers(len(errors), len(documents), next(iter(errors), None))
    print_ranking(query, ranking, as_json=as_json)
    raise typer.Exit(EXIT_PARTIAL if ranking.num_unreadable else EXIT_OK)


def _explain_choice(*, has_query: bool, has_run: bool, out: Path | None) -> str:
    both = "give either --run and -o, or --query and --documents"
    if has_query and not has_run and out is not None:
        return f"{both}: one --query is printed and writes nothing, leave -o {out} out (or redirect --json into a file)"
    return both


def _template(name: str | None) -> Template | None:
    with as_usage_error():
        return None if name is None else Template.load(name)


def _judge_config(reranker: Reranker, options: ModelOptions, **more: JsonValue) -> dict[str, JsonValue]:
    judge = reranker.judge
    limits = judge.template.limits
    sampling = judge.sampling or Sampling(max_tokens=limits.max_explanation_tokens)
    return {
        "model": judge.generator.name,
        "template": judge.template.version,
        "mode": judge.mode,
        "instruction": judge.instruction,
        "limits": asdict(limits),
        "sampling": asdict(sampling),
        "options": asdict(options),
        **more,
    }


def _parse_fields(texts: Sequence[str]) -> dict[str, str]:
    fields = dict(text.split("=", 1) for text in texts if "=" in text)
    if len(fields) < len(texts) or not set(fields) <= {"doc_id", "text", "title"}:
        raise typer.BadParameter(f"--field: expected doc_id=NAME, text=NAME or title=NAME, found {', '.join(texts)}")
    return fields
