"""The verb rerank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import JsonValue

from whyrank.cli.documents import read_documents
from whyrank.cli.models import judge_config, template_of
from whyrank.cli.options import (
    MODEL,
    PASSAGES,
    AutoTolerance,
    AutoTopK,
    BatchSize,
    Concurrency,
    Deadline,
    Device,
    Dtype,
    Excluded,
    Instruction,
    Json,
    Limit,
    Logprobs,
    LongDocumentsOption,
    MaxExplanationTokens,
    MaxPassages,
    MaxRetries,
    MaxTokensPerQuery,
    Memory,
    NumSamples,
    PassageScoreOption,
    RankingModeOption,
    SkipBad,
    Temperature,
    TemplateOption,
    Timeout,
    TokenLimitField,
    as_usage_error,
    existing,
    model_options,
    passage_options,
    print_json,
    resumable,
)
from whyrank.cli.printing import print_ranking, print_reranked
from whyrank.generators.opening import ModelOptions
from whyrank.judging import check_samples
from whyrank.passages import LongDocuments, Passages
from whyrank.progress import Progress
from whyrank.ranking import OnUnparsed, parse_fuse
from whyrank.records import Document, Judgment
from whyrank.rerank import Reranker
from whyrank.stages import EXIT_OK, EXIT_PARTIAL
from whyrank.stages.failures import require_answers
from whyrank.stages.rerank import read_candidates, rerank_files
from whyrank.store import Manifest
from whyrank.template import Template

__all__ = ["Asked", "check_rerank", "rerank"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What `rerank` was asked for, as far as it can be judged before anything is read."""

    fields: dict[str, str]
    template: Template | None
    options: ModelOptions
    long_documents: LongDocuments | Passages


def check_rerank(context: typer.Context) -> Asked:
    """Refuse options that do not belong together.

    Raises:
        typer.BadParameter: which, and why.
    """
    params = context.params
    one, run = (params["query"], params["documents"]), (params["run"], params["out"])
    is_one = _is_one(one, run, of_runs=[params[name] for name in ("corpus", "queries", "excluded")])
    names = _parse_fields(params["field"] or [])
    with as_usage_error():
        needs_scores = parse_fuse(params["fuse"]).method in ("zscore", "minmax")
    if is_one and needs_scores:
        raise typer.BadParameter(
            f"--fuse {params['fuse']} needs the scores of a --run; with --query choose none or rrf"
        )
    asked = template_of(params["template"])
    options = model_options(context, params["model"])
    long = passage_options(context)
    _check_auto(params, is_fanned_out=params["num_samples"] > 1 or long != "cut")
    with as_usage_error():
        check_samples(params["num_samples"], params["temperature"])
    return Asked(names, asked, options, long)


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
    mode: RankingModeOption = "explain",
    auto_top_k: AutoTopK = None,
    auto_tolerance: AutoTolerance = None,
    max_tokens_per_query: MaxTokensPerQuery = None,
    template: TemplateOption = None,
    instruction: Instruction = None,
    max_explanation_tokens: MaxExplanationTokens = None,
    num_samples: NumSamples = 1,
    temperature: Temperature = 0.0,
    long_documents: LongDocumentsOption = "cut",
    passage_score: PassageScoreOption = PASSAGES.score,
    max_passages: MaxPassages = PASSAGES.max_passages,
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
    memory: Memory = MODEL.memory,
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
    manifest = Manifest("rerank", {})
    asked = check_rerank(context)
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
            fields=asked.fields,
        )
    reranker = Reranker.load(
        model,
        template=asked.template,
        mode=mode,
        instruction=instruction,
        fuse=fuse,
        on_unparsed=on_unparsed,
        max_explanation_tokens=max_explanation_tokens,
        temperature=temperature,
        num_samples=num_samples,
        long_documents=asked.long_documents,
        auto_top_k=auto_top_k,
        auto_tolerance=auto_tolerance,
        max_tokens_per_query=max_tokens_per_query,
        options=asked.options,
    )
    if query is not None and documents is not None:
        found = read_documents(documents, asked.fields, limit=limit, skip_bad=skip_bad)
        _rank_one(reranker, query, found, top_k=top_k, as_json=json)
    assert candidates is not None
    assert out is not None
    more: dict[str, JsonValue] = {"fuse": fuse, "on_unparsed": on_unparsed, "top_k": top_k, "limit": limit}
    passages = asdict(reranker.judge.passages) if reranker.judge.passages else None
    more |= {"num_samples": num_samples, "passages": passages}
    config = judge_config(reranker, asked.options, **more, field={**asked.fields}, skip_bad=skip_bad)
    manifest = replace(manifest, config=config).with_inputs(run, corpus, queries, excluded)
    with resumable(out / "judgments.jsonl"):
        done = rerank_files(candidates, reranker, out, manifest)
    if json:
        print_json(done.to_json())
    else:
        print_reranked(done)
    raise typer.Exit(done.exit_code)


def _rank_one(
    reranker: Reranker, query: str, documents: Sequence[Document], *, top_k: int | None, as_json: bool
) -> NoReturn:
    errors: list[str] = []
    num_judgments = 0
    total = None if reranker.auto else len(documents)
    with Progress(f"judging with {reranker.judge.generator.name}", total) as progress:

        def on_judgment(judgment: Judgment) -> None:
            nonlocal num_judgments
            num_judgments += 1
            progress.advance()
            if judgment.status == "error":
                errors.append(str(judgment.error))

        ranking = reranker.rank(query, documents, top_k=top_k, on_judgment=on_judgment)
    require_answers(len(errors), num_judgments, next(iter(errors), None))
    print_ranking(query, ranking, as_json=as_json)
    raise typer.Exit(EXIT_PARTIAL if ranking.num_unreadable else EXIT_OK)


def _is_one(
    for_one: tuple[str | None, Path | None], for_run: tuple[Path | None, Path | None], *, of_runs: Sequence[Path | None]
) -> bool:
    """Whether one query is ranked rather than a run; anything between the two is a usage error."""
    num_one, num_run = (sum(given is not None for given in pair) for pair in (for_one, for_run))
    if (num_one, num_run) not in ((2, 0), (0, 2)):
        raise typer.BadParameter(
            _explain_choice(has_query=for_one[0] is not None, has_run=for_run[0] is not None, out=for_run[1])
        )
    if num_one and any(given is not None for given in of_runs):
        raise typer.BadParameter("--corpus, --queries and --excluded go with --run, not with --query")
    return num_one > 0


def _check_auto(params: Mapping[str, Any], *, is_fanned_out: bool) -> None:
    """Options of mode `auto` belong to it, and those that judge a document several times do not."""
    mode = params["mode"]
    settings = [params[name] for name in ("auto_top_k", "auto_tolerance", "max_tokens_per_query")]
    if mode == "auto" and is_fanned_out:
        raise typer.BadParameter("--mode auto judges a document once: leave --samples and --long-documents out")
    if mode != "auto" and any(setting is not None for setting in settings):
        raise typer.BadParameter("--auto-top-k, --auto-tolerance and --max-tokens-per-query go with --mode auto")


def _explain_choice(*, has_query: bool, has_run: bool, out: Path | None) -> str:
    both = "give either --run and -o, or --query and --documents"
    if has_query and not has_run and out is not None:
        return f"{both}: one --query is printed and writes nothing, leave -o {out} out (or redirect --json into a file)"
    return both


def _parse_fields(texts: Sequence[str]) -> dict[str, str]:
    fields = dict(text.split("=", 1) for text in texts if "=" in text)
    if len(fields) < len(texts) or not set(fields) <= {"doc_id", "text", "title"}:
        raise typer.BadParameter(f"--field: expected doc_id=NAME, text=NAME or title=NAME, found {', '.join(texts)}")
    return fields
