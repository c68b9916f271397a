"""`whyrank calibrate`: what reasons do to a checkpoint's direct scores."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue

from whyrank.calibration import COVERAGE
from whyrank.cli.options import (
    MODEL,
    BatchSize,
    Corpus,
    Device,
    Dtype,
    Json,
    Limit,
    Memory,
    Queries,
    SkipBad,
    console,
    existing,
    print_json,
    resumable,
)
from whyrank.generators.opening import ModelOptions
from whyrank.rerank import Reranker
from whyrank.stages import EXIT_OK, EXIT_PARTIAL
from whyrank.stages.calibrate import calibrate_files, check_calibratable
from whyrank.stages.rerank import read_candidates
from whyrank.store import Manifest

__all__ = ["calibrate"]


def calibrate(
    model: Annotated[Path, typer.Option(help="Folder of a checkpoint trained with --modes explain,direct.")],
    run: Annotated[Path, existing("--run", help="Development run: pairs like those to be ranked; no labels needed.")],
    corpus: Corpus,
    queries: Queries,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for judgments and manifest.")],
    coverage: Annotated[
        float, typer.Option(help="Share of pairs whose score with a reason may be trusted to stay below its ceiling.")
    ] = COVERAGE,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the first so many of each query.")] = None,
    device: Device = MODEL.device,
    dtype: Dtype = MODEL.dtype,
    batch_size: BatchSize = MODEL.batch_size,
    memory: Memory = MODEL.memory,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Measure what reasons do to a checkpoint's direct scores, for rerank --mode auto.

    Judges every pair of a development run in both modes and writes the result into the checkpoint's whyrank.json.
    Stopped at any moment, the same command continues where it was.

    \b
    Example:
      whyrank calibrate --model student/ --run dev/bm25.trec --corpus docs.jsonl \\
        --queries dev/queries.jsonl -o calibration/
    """
    if not 0 < coverage <= 1:
        raise typer.BadParameter(f"--coverage: expected a share above 0 and up to 1, found {coverage}")
    manifest = Manifest("calibrate", {})
    check_calibratable(model)
    candidates = read_candidates(run, corpus=corpus, queries=queries, top_k=top_k, limit=limit, skip_bad=skip_bad)
    options = ModelOptions(device=device, dtype=dtype, batch_size=batch_size, memory=memory)
    judge = Reranker.load(model, options=options).judge
    config: dict[str, JsonValue] = {"model": judge.generator.name, "template": judge.template.version}
    config |= {"coverage": coverage, "top_k": top_k, "limit": limit, "options": asdict(options)}
    manifest = replace(manifest, config=config)
    with resumable(out / "judgments-direct.jsonl"):
        done = calibrate_files(
            candidates, judge, model, out, manifest.with_inputs(run, corpus, queries), coverage=coverage
        )
    if json:
        print_json(done.to_json())
    else:
        found = done.calibration
        console().print(
            f"{found.num_pairs} pairs in both modes ({done.num_left_out} left out): a reason moves a score by "
            f"{done.mean_distance:.3f} on average, {done.mean_shift:+.3f} with its sign"
        )
        steps = ", ".join(f"{edge:.3f}: {top:.3f}" for edge, top in zip(found.edges, found.ceilings, strict=True))
        console().print(f"ceilings of scores with a reason, by direct score up to: {steps}")
        console().print(f"{done.card} ({done.seconds:.1f} s)")
    raise typer.Exit(EXIT_PARTIAL if done.counts.is_partial else EXIT_OK)
