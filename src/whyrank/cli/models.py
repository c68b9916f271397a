"""Verbs that run or train a model: label, demo."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue

from whyrank.cli.options import (
    MODEL,
    BatchSize,
    Concurrency,
    Corpus,
    Deadline,
    Device,
    Dtype,
    Instruction,
    Json,
    Limit,
    Logprobs,
    MaxExplanationTokens,
    MaxRetries,
    Memory,
    ModeOption,
    Queries,
    SkipBad,
    TemplateOption,
    Timeout,
    TokenLimitField,
    as_usage_error,
    console,
    existing,
    model_options,
    print_json,
    resumable,
)
from whyrank.demo.config import DemoConfig
from whyrank.errors import require
from whyrank.generators import Sampling
from whyrank.generators.opening import ModelOptions
from whyrank.rerank import Reranker
from whyrank.stages.failures import describe_failures
from whyrank.stages.label import label_files, read_pairs
from whyrank.store import Manifest
from whyrank.template import Template

__all__ = ["demo", "judge_config", "label", "template_of"]

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
    memory: Memory = MODEL.memory,
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
    asked = template_of(template)
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
    config = judge_config(reranker, options, limit=limit, skip_bad=skip_bad)
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


def template_of(name: str | None) -> Template | None:
    """The template that `--template` names; one that cannot be read is a usage error."""
    with as_usage_error():
        return None if name is None else Template.load(name)


def judge_config(reranker: Reranker, options: ModelOptions, **more: JsonValue) -> dict[str, JsonValue]:
    """What a manifest says of how pairs are judged."""
    judge = reranker.judge
    limits = judge.template.limits
    sampling = judge.sampling or Sampling(max_tokens=limits.max_explanation_tokens)
    return {
        "model": judge.generator.name,
        "template": judge.template.version,
        "mode": reranker.mode,
        "instruction": judge.instruction,
        "limits": asdict(limits),
        "sampling": asdict(sampling),
        "options": asdict(options),
        **({} if reranker.auto is None else {"auto": asdict(reranker.auto)}),
        **more,
    }
