"""`whyrank distill` on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from whyrank.cli.options import (
    Board,
    DeviceName,
    Json,
    Limit,
    as_usage_error,
    console,
    existing,
    print_json,
    require_files,
    resumable,
    setting,
    settings_of,
)
from whyrank.errors import InputError, require
from whyrank.generators.opening import DEFAULT_TEMPLATE
from whyrank.records import Mode
from whyrank.store import Manifest
from whyrank.template import Template
from whyrank.training.config import AdapterConfig, DistillConfig, TinyConfig

if TYPE_CHECKING:
    from whyrank.training.distill import Distilled

__all__ = ["distill", "distill_config"]

ADAPTER = AdapterConfig()
DISTILL = DistillConfig()
TINY = TinyConfig()


def distill_config(params: Mapping[str, Any]) -> DistillConfig:
    """What `distill` was asked for.

    Raises:
        typer.BadParameter: a number is outside its range, or there is no such mode.
    """
    with as_usage_error():
        named = {name: params[f"lora_{name}"] for name in ("rank", "alpha")}
        named |= {"targets": _parts(params["lora_targets"]), **settings_of(AdapterConfig, params)}
        return DistillConfig(
            **{**settings_of(DistillConfig, params), "modes": _parse_modes(params["modes"])},
            adapter=AdapterConfig(**named),
            tiny=TinyConfig(**settings_of(TinyConfig, params)),
        )


def distill(
    context: typer.Context,
    judgments: Annotated[
        list[Path], existing("--judgments", help="judgments.jsonl of whyrank label; may be repeated.")
    ],
    queries: Annotated[list[Path], existing("--queries", help="Their queries; may be repeated.")],
    corpus: Annotated[list[Path], existing("--corpus", help="Their documents; may be repeated.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the checkpoint.")],
    model: Annotated[str, setting(DistillConfig, "model")] = DISTILL.model,
    modes: Annotated[
        str, typer.Option(help="What the student learns: explain, direct, or explain,direct.")
    ] = "explain",
    template: Annotated[str, typer.Option(help="Name or TOML file of the prompt to teach.")] = DEFAULT_TEMPLATE,
    is_label_first: Annotated[bool, setting(DistillConfig, "is_label_first", "--label-first")] = DISTILL.is_label_first,
    word_dropout: Annotated[float, setting(DistillConfig, "word_dropout")] = DISTILL.word_dropout,
    max_tokens: Annotated[int, setting(DistillConfig, "max_tokens")] = DISTILL.max_tokens,
    label_weight: Annotated[float, setting(DistillConfig, "label_weight")] = DISTILL.label_weight,
    is_balanced: Annotated[bool, setting(DistillConfig, "is_balanced", "--balanced")] = DISTILL.is_balanced,
    source_weight: Annotated[
        list[float] | None,
        typer.Option(help="Proportion in which a --judgments file is drawn; once for each of them, in their order."),
    ] = None,
    search_queries: Annotated[
        list[Path] | None,
        existing("--search-queries", help="search-queries.jsonl of whyrank expand, to teach that, too; repeatable."),
    ] = None,
    search_query_share: Annotated[float, setting(DistillConfig, "search_query_share")] = DISTILL.search_query_share,
    num_steps: Annotated[int, setting(DistillConfig, "num_steps")] = DISTILL.num_steps,
    batch_size: Annotated[int, setting(DistillConfig, "batch_size")] = DISTILL.batch_size,
    group_size: Annotated[int, setting(DistillConfig, "group_size")] = DISTILL.group_size,
    is_packed: Annotated[bool, setting(DistillConfig, "is_packed", "--packed/--no-packed")] = DISTILL.is_packed,
    max_pass_tokens: Annotated[int, setting(DistillConfig, "max_pass_tokens")] = DISTILL.max_pass_tokens,
    optimizer: Annotated[Literal["adamw", "muon"], setting(DistillConfig, "optimizer")] = DISTILL.optimizer,
    learning_rate: Annotated[float, setting(DistillConfig, "learning_rate")] = DISTILL.learning_rate,
    num_warmup_steps: Annotated[int, setting(DistillConfig, "num_warmup_steps")] = DISTILL.num_warmup_steps,
    decay_fraction: Annotated[float, setting(DistillConfig, "decay_fraction")] = DISTILL.decay_fraction,
    weight_decay: Annotated[float, setting(DistillConfig, "weight_decay")] = DISTILL.weight_decay,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], setting(DistillConfig, "precision")
    ] = DISTILL.precision,
    device: Annotated[DeviceName, setting(DistillConfig, "device")] = DISTILL.device,
    num_threads: Annotated[int, setting(DistillConfig, "num_threads")] = DISTILL.num_threads,
    is_recomputed: Annotated[bool, setting(DistillConfig, "is_recomputed", "--recompute")] = DISTILL.is_recomputed,
    is_divided: Annotated[bool, setting(DistillConfig, "is_divided", "--divide")] = DISTILL.is_divided,
    save_every: Annotated[int, setting(DistillConfig, "save_every")] = DISTILL.save_every,
    lora_rank: Annotated[int, setting(AdapterConfig, "rank")] = ADAPTER.rank,
    lora_alpha: Annotated[int, setting(AdapterConfig, "alpha")] = ADAPTER.alpha,
    lora_targets: Annotated[str, setting(AdapterConfig, "targets")] = ",".join(ADAPTER.targets),
    quantize: Annotated[Literal["none", "4bit"], setting(AdapterConfig, "quantize")] = ADAPTER.quantize,
    is_merged: Annotated[bool, setting(AdapterConfig, "is_merged", "--merge")] = ADAPTER.is_merged,
    dev_run: Annotated[Path | None, existing("--dev-run", help="First-stage run to rank while training.")] = None,
    dev_queries: Annotated[Path | None, existing("--dev-queries", help="Its queries.")] = None,
    dev_corpus: Annotated[Path | None, existing("--dev-corpus", help="Its documents.")] = None,
    dev_qrels: Annotated[Path | None, existing("--dev-qrels", help="Its relevance labels.")] = None,
    dev_top_k: Annotated[int, typer.Option(min=1, help="How many candidates of each dev query to rank.")] = 20,
    eval_every: Annotated[int, setting(DistillConfig, "eval_every")] = DISTILL.eval_every,
    patience: Annotated[int, setting(DistillConfig, "patience")] = DISTILL.patience,
    seed: Annotated[int, setting(DistillConfig, "seed")] = DISTILL.seed,
    vocab_size: Annotated[int, setting(TinyConfig, "vocab_size")] = TINY.vocab_size,
    hidden_size: Annotated[int, setting(TinyConfig, "hidden_size")] = TINY.hidden_size,
    num_layers: Annotated[int, setting(TinyConfig, "num_layers")] = TINY.num_layers,
    num_heads: Annotated[int, setting(TinyConfig, "num_heads")] = TINY.num_heads,
    intermediate_size: Annotated[int, setting(TinyConfig, "intermediate_size")] = TINY.intermediate_size,
    limit: Limit = None,
    tensorboard: Board = False,
    json: Json = False,
) -> None:
    """Train a student to explain and label like its teacher.

    Judgments without a label are left out and counted. With a dev run, the student that ranks it best is kept. Killed
    at any moment, the same command continues from its last saved state.

    \b
    Example:
      whyrank distill --judgments labelled/judgments.jsonl --queries mined/train/queries.jsonl \\
        --corpus mined/corpus.jsonl --num-steps 300 -o student/
    """
    require("torch", "train")
    require("transformers", "train")
    from whyrank.stages.distill import DevFiles, distill_files
    from whyrank.training.ranks import launched

    config = distill_config(context.params)
    with as_usage_error():
        dev = DevFiles.of(dev_run, dev_queries, dev_corpus, dev_qrels, dev_top_k)
        if source_weight and len(source_weight) != len(judgments):
            raise InputError(f"expected --source-weight for each of {len(judgments)} files, found {len(source_weight)}")
        taught = Template.load(template)
    require_files("--judgments", judgments, "whyrank label writes a judgments.jsonl into its -o")
    require_files("--queries", queries, "give those that the judgments were made from")
    require_files("--corpus", corpus, "give the one that the judgments were made from")
    more = search_queries or []
    require_files("--search-queries", more, "whyrank expand writes a search-queries.jsonl into its -o")
    manifest = Manifest("distill", {}, seed=seed).with_inputs(
        *judgments, *queries, *corpus, *more, *(dev.paths if dev else ())
    )
    with resumable(out / "state"), launched() as ranks:
        given = (judgments, queries, corpus, taught, out, config, manifest)
        done = distill_files(
            *given, dev=dev, shares=source_weight, search_queries=more, limit=limit, has_board=tensorboard
        )
    if not ranks.is_main:
        return
    if json:
        print_json({**asdict(done), "checkpoint": str(out), "history": [asdict(step) for step in done.history]})
    else:
        _print_distilled(done, out)


def _print_distilled(done: Distilled, out: Path) -> None:
    last = done.history[-1]
    left_out = f"{done.num_left_out} judgments without a label left out"
    if done.num_too_long:
        left_out += f", {done.num_too_long} too long"
    if done.num_search_examples:
        left_out += f"; {done.num_search_examples} about search queries"
    trained, whole = done.num_trained_parameters, done.num_parameters
    parameters = f"{whole:,} parameters" if trained == whole else f"{trained:,} of {whole:,} parameters"
    console().print(
        f"{done.num_examples} examples ({left_out}), {parameters}, loss {done.history[0].loss:.3f} to {last.loss:.3f} "
        f"nats per token in {last.step} steps ({last.seconds:.0f} s): {out}"
    )
    values = {step.step: step.dev_ndcg for step in done.history if step.dev_ndcg is not None}
    if values:
        console().print(
            f"dev nDCG@10 {values[done.best_step]:.3f} after step {done.best_step}, which is kept; "
            f"{values[last.step]:.3f} after the last, {last.step}"
            if last.step in values
            else f"dev nDCG@10 {values[done.best_step]:.3f} after step {done.best_step}, which is kept"
        )


def _parse_modes(text: str) -> tuple[Mode, ...]:
    modes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(modes) <= set(get_args(Mode)):
        raise typer.BadParameter(f"--modes: expected explain, direct or explain,direct, found {text!r}")
    return cast(tuple[Mode, ...], modes)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
