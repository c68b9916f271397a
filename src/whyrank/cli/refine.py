"""`whyrank refine`: a distilled student learns from rewards for its own answers."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from whyrank.cli.options import (
    Board,
    DeviceName,
    Json,
    as_usage_error,
    console,
    existing,
    print_json,
    require_files,
    resumable,
    setting,
)
from whyrank.errors import require
from whyrank.stages import EXIT_OK, EXIT_PARTIAL
from whyrank.store import Manifest
from whyrank.template import Template
from whyrank.training.refine_config import Algorithm, EvidenceConfig, RefineConfig, read_config

__all__ = ["refine", "refine_config"]

CONFIG = RefineConfig()
EVIDENCE = EvidenceConfig()


def refine_config(context: typer.Context) -> RefineConfig:
    """What `refine` was asked for: a file's options, and every one that was given on the command line.

    Raises:
        typer.BadParameter: the file or a number is not what was expected.
    """
    path: Path | None = context.params["config"]

    def given(names: list[str]) -> dict[str, Any]:
        sources = {name: context.get_parameter_source(name) for name in names if name in context.params}
        return {
            name: context.params[name]
            for name, source in sources.items()
            if source is not None and source.name == "COMMANDLINE"
        }

    with as_usage_error():
        if path is not None:
            require_files("--config", [path], "give a TOML or JSON file with options of refine")
        config = CONFIG if path is None else read_config(path)
        evidence = replace(config.evidence, **given([item.name for item in fields(EvidenceConfig)]))
        changed = given([item.name for item in fields(RefineConfig)])
        if "rewards" in changed:
            changed["rewards"] = tuple(changed["rewards"])
        return replace(config, **changed, evidence=evidence)


def refine(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="The distilled student: a folder or a hub id.")],
    queries: Annotated[list[Path], existing("--queries", help="Queries of all pairs; may be repeated.")],
    corpus: Annotated[list[Path], existing("--corpus", help="Documents of all pairs; may be repeated.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the checkpoint.")],
    pairs: Annotated[
        list[Path] | None, existing("--pairs", help="Links as evidence: pairs.jsonl of whyrank mine; may be repeated.")
    ] = None,
    judgments: Annotated[
        list[Path] | None, existing("--judgments", help="Teachers' judgments as evidence; may be repeated.")
    ] = None,
    qrels: Annotated[
        list[Path] | None, existing("--qrels", help="People's judgments as evidence, on the scale; may be repeated.")
    ] = None,
    replay: Annotated[
        list[Path] | None, existing("--replay", help="Judgments to go on distilling from; may be repeated.")
    ] = None,
    dev_run: Annotated[
        Path | None, existing("--dev-run", help="Candidates of dev queries, to rank on the way.")
    ] = None,
    dev_qrels: Annotated[Path | None, existing("--dev-qrels", help="What people say of the dev candidates.")] = None,
    config: Annotated[
        Path | None, existing("--config", help="Options from a TOML or JSON file; those given here count more.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Name or TOML file; only for a model that brings none.")] = None,
    algorithm: Annotated[Algorithm, setting(RefineConfig, "algorithm")] = CONFIG.algorithm,
    rewards: Annotated[list[str] | None, setting(RefineConfig, "rewards", "--reward")] = None,
    unreadable_reward: Annotated[float, setting(RefineConfig, "unreadable_reward")] = CONFIG.unreadable_reward,
    num_steps: Annotated[int, setting(RefineConfig, "num_steps")] = CONFIG.num_steps,
    num_queries: Annotated[int, setting(RefineConfig, "num_queries")] = CONFIG.num_queries,
    num_candidates: Annotated[int, setting(RefineConfig, "num_candidates")] = CONFIG.num_candidates,
    num_samples: Annotated[int, setting(RefineConfig, "num_samples")] = CONFIG.num_samples,
    temperature: Annotated[float, setting(RefineConfig, "temperature")] = CONFIG.temperature,
    num_epochs: Annotated[int, setting(RefineConfig, "num_epochs")] = CONFIG.num_epochs,
    minibatch_size: Annotated[int, setting(RefineConfig, "minibatch_size")] = CONFIG.minibatch_size,
    microbatch_size: Annotated[int, setting(RefineConfig, "microbatch_size")] = CONFIG.microbatch_size,
    learning_rate: Annotated[float, setting(RefineConfig, "learning_rate")] = CONFIG.learning_rate,
    kl_coefficient: Annotated[float, setting(RefineConfig, "kl_coefficient")] = CONFIG.kl_coefficient,
    kl_target: Annotated[float, setting(RefineConfig, "kl_target")] = CONFIG.kl_target,
    kl_limit: Annotated[float, setting(RefineConfig, "kl_limit")] = CONFIG.kl_limit,
    length_price: Annotated[float, setting(RefineConfig, "length_price")] = CONFIG.length_price,
    curriculum: Annotated[float, setting(RefineConfig, "curriculum")] = CONFIG.curriculum,
    replay_weight: Annotated[float, setting(RefineConfig, "replay_weight")] = CONFIG.replay_weight,
    dev_every: Annotated[int, setting(RefineConfig, "dev_every")] = CONFIG.dev_every,
    link_trust: Annotated[float, setting(EvidenceConfig, "link_trust")] = EVIDENCE.link_trust,
    unlinked_trust: Annotated[float, setting(EvidenceConfig, "unlinked_trust")] = EVIDENCE.unlinked_trust,
    unlinked_value: Annotated[float, setting(EvidenceConfig, "unlinked_value")] = EVIDENCE.unlinked_value,
    consensus_trust: Annotated[float, setting(EvidenceConfig, "consensus_trust")] = EVIDENCE.consensus_trust,
    qrels_trust: Annotated[float, setting(EvidenceConfig, "qrels_trust")] = EVIDENCE.qrels_trust,
    device: Annotated[DeviceName, setting(RefineConfig, "device")] = CONFIG.device,
    num_threads: Annotated[int, setting(RefineConfig, "num_threads")] = CONFIG.num_threads,
    is_recomputed: Annotated[bool, setting(RefineConfig, "is_recomputed", "--recompute")] = CONFIG.is_recomputed,
    is_divided: Annotated[bool, setting(RefineConfig, "is_divided", "--divide")] = CONFIG.is_divided,
    batch_size: Annotated[int, setting(RefineConfig, "batch_size")] = CONFIG.batch_size,
    save_every: Annotated[int, setting(RefineConfig, "save_every")] = CONFIG.save_every,
    seed: Annotated[int, setting(RefineConfig, "seed")] = CONFIG.seed,
    tensorboard: Board = False,
    json: Json = False,
) -> None:
    """Refine a distilled student with rewards for its own answers.

    The checkpoint that ranks the dev queries best is kept, and may be the one to begin with. A run that goes wrong says
    so, keeps that checkpoint and ends with exit code 7. Killed at any moment, the same command continues from its last
    saved state. The options that are not shown here are set in a TOML file (--config).

    \b
    Example:
      whyrank refine --model student/ --pairs mined/train/pairs.jsonl --judgments labelled/judgments.jsonl \\
        --queries mined/train/queries.jsonl --corpus mined/corpus.jsonl -o refined/
    """
    require("torch", "train")
    require("transformers", "train")
    from whyrank.stages.refine import RefineFiles, refine_files
    from whyrank.training.ranks import launched

    settled = refine_config(context)
    with as_usage_error():
        files = RefineFiles(
            queries=tuple(queries),
            corpora=tuple(corpus),
            pairs=tuple(pairs or ()),
            judgments=tuple(judgments or ()),
            qrels=tuple(qrels or ()),
            replay=tuple(replay or ()),
            dev_run=dev_run,
            dev_qrels=dev_qrels,
        )
        asked = Template.load(template) if template is not None else None
    for option, paths in (("--queries", queries), ("--corpus", corpus)):
        require_files(option, paths, "give those that the pairs were made from")
    require_files("another file", files.all, "check its name")
    manifest = Manifest("refine", {}, seed=settled.seed).with_inputs(*files.all, config)
    with resumable(out / "state"), launched() as ranks:
        done = refine_files(model, files, asked, out, settled, manifest, has_board=tensorboard)
    if not ranks.is_main:
        return
    if json:
        print_json({**asdict(done), "checkpoint": str(out), "history": [asdict(step) for step in done.history]})
    else:
        first, last = done.history[0], done.history[-1]
        console().print(
            f"{done.num_pairs} pairs, {last.step} rounds, reward {first.reward:.3f} to {last.reward:.3f}, "
            f"{last.kl_k3:.3f} nats per token from the distilled student ({last.seconds:.0f} s): {out}"
        )
        if done.best_dev is not None:
            console().print(
                f"dev nDCG@10 {done.first_dev:.3f} before, {done.best_dev:.3f} after round {done.best_step}"
            )
        if done.alarm:
            console().print(f"stopped: {done.alarm}")
    raise typer.Exit(EXIT_PARTIAL if done.alarm else EXIT_OK)
