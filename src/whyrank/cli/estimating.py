"""What the stages of a recipe will take, from their options, the files that are there, and what the recipe expects."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import typer
from pydantic import JsonValue

from whyrank.cli.commands import Command
from whyrank.cli.distill import distill_config
from whyrank.cli.expand import writer_in
from whyrank.cli.refine import refine_config
from whyrank.datasets import read_queries, read_run
from whyrank.estimates import (
    Expected,
    Price,
    Work,
    cost,
    distilling,
    expanding,
    hours,
    judging,
    refining,
    tiny_parameters,
)
from whyrank.generators.opening import EMBEDDED_MODEL, options_of
from whyrank.recipe import Recipe
from whyrank.store import read_lines

__all__ = ["Estimate", "estimates_of"]

FREE: Final = ("scripted", "overlap")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one stage will take. `price` and `hours` are `None` where the recipe does not say enough, and `missing` is
    what it would have to say; `is_counted` tells that pairs or queries were counted in files."""

    work: Work
    is_counted: bool
    cost: float | None
    hours: float | None
    missing: str = ""

    def to_json(self) -> dict[str, JsonValue]:
        """Plain values for `--json`."""
        return {
            **asdict(self.work),
            "is_counted": self.is_counted,
            "cost": self.cost,
            "hours": self.hours,
            "missing": self.missing,
        }


def estimates_of(recipe: Recipe, commands: Iterable[Command]) -> list[Estimate]:
    """One estimate per stage, in the work folder. A model that a stage trains is as large as what it starts from."""
    sizes = dict(recipe.parameters)
    found = []
    for command in commands:
        params, verb = command.context.params, command.stage.verb
        work, is_counted = COUNTED[verb](command.context, command.stage.expected) if verb in COUNTED else (Work(), True)
        model = _model_of(command)
        size = None if model is None else _size(model, sizes, params)
        if size is not None and verb in ("distill", "refine"):
            sizes[str(command.out)] = size
        estimate = Estimate(work, is_counted, 0.0, 0.0)
        found.append(estimate if model is None else _charged(estimate, model, size, recipe, _has_adapter(command)))
    return found


def _model_of(command: Command) -> str | None:
    """What a stage runs or trains; `None` for verbs without a model."""
    params = command.context.params
    if command.stage.verb == "search":
        return writer_in(params["expand"]) if params["expand"] else None
    if command.stage.verb not in ("label", "expand", "distill", "refine", "calibrate", "rerank"):
        return None
    model = str(params.get("teacher") or params.get("model") or EMBEDDED_MODEL)
    return model if options_of(model)[0] == "endpoint" else str(Path(model))


def _charged(estimate: Estimate, model: str, size: float | None, recipe: Recipe, has_adapter: bool) -> Estimate:
    """With what the stage costs: money at an endpoint, hours on the recipe's hardware elsewhere."""
    backend, _ = options_of(model)
    if backend in FREE:
        return estimate
    if backend == "endpoint":
        name = model.partition("#")[2]
        price: Price | None = recipe.prices.get(name)
        missing = f'[prices."{name}"]'
        return replace(estimate, cost=cost(estimate.work, price) if price else None, missing="" if price else missing)
    if size is None or recipe.hardware is None:
        missing = f"[parameters] for {model}" if size is None else "[hardware]"
        return replace(estimate, hours=None, missing=missing)
    return replace(estimate, hours=hours(estimate.work, size, recipe.hardware, is_adapter=has_adapter))


def _has_adapter(command: Command) -> bool:
    """Whether a stage trains an adapter rather than all weights."""
    config = refine_config(command.context) if command.stage.verb == "refine" else None
    return bool(config.adapter.rank if config else command.context.params.get("lora_rank"))


def _size(model: str, sizes: Mapping[str, float], params: Mapping[str, Any]) -> float | None:
    """Parameters of a model: as the recipe says, of a model from scratch, or counted in its files."""
    if model in sizes:
        return sizes[model]
    if model == "tiny" and "vocab_size" in params:
        return tiny_parameters(*(params[name] for name in TINY))
    files = sorted(Path(model).glob("*.safetensors"))
    return sum(map(_parameters_in, files)) if files else None


TINY: Final = ("vocab_size", "hidden_size", "num_layers", "intermediate_size")


def _parameters_in(path: Path) -> int:
    """Numbers in a safetensors file, from its header: eight bytes of length, then JSON with every tensor's shape."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


# ---- what is looked at ----------------------------------------------------------------------------------------


def _labelled(context: typer.Context, expected: Expected) -> tuple[Work, bool]:
    params = context.params
    pairs: Path = params["pairs"]
    is_counted = pairs.is_file()
    num_pairs = (
        sum(1 for _ in read_lines(pairs)) if is_counted else expected.questions * expected.documents_per_question
    )
    num_pairs = min(num_pairs, params["limit"] or num_pairs)
    is_shared = options_of(params["teacher"])[0] != "endpoint"
    return judging(expected, expected.questions, num_pairs, params["mode"], is_shared=is_shared), is_counted


def _expanded(context: typer.Context, expected: Expected) -> tuple[Work, bool]:
    """Search queries for the questions of a file, which are counted if it is there."""
    params = context.params
    if context.command.name == "search" and (not params["expand"] or writer_in(params["expand"]) is None):
        return Work(), True
    is_counted = params["queries"].is_file()
    num_queries = sum(1 for _ in read_queries(params["queries"])) if is_counted else expected.questions
    if context.command.name == "search" and not is_counted:
        num_queries = expected.queries
    return expanding(expected, min(num_queries, params["limit"] or num_queries)), is_counted


def _distilled(context: typer.Context, expected: Expected) -> tuple[Work, bool]:
    config = distill_config(context.params)
    num_examples = config.num_steps * config.batch_size
    parts = [distilling(expected, num_examples // len(config.modes), mode) for mode in config.modes]
    if context.params["dev_run"]:
        num_pairs = expected.queries * min(context.params["dev_top_k"], expected.candidates)
        num_rankings = config.num_steps // config.eval_every
        parts += [judging(expected, expected.queries, num_pairs, config.modes[0])] * num_rankings
    return sum(parts, Work()), False


def _refined(context: typer.Context, expected: Expected) -> tuple[Work, bool]:
    config = refine_config(context)
    sizes = (config.num_steps, config.num_queries, config.num_candidates, config.num_samples, config.num_epochs)
    work = refining(expected, *sizes)
    if context.params["dev_run"]:
        ranking = judging(expected, expected.queries, expected.queries * expected.candidates)
        work = sum([ranking] * (1 + config.num_steps // config.dev_every), work)
    return work, False


def _calibrated(context: typer.Context, expected: Expected) -> tuple[Work, bool]:
    num_queries, num_pairs, is_counted = _ranked(context.params, expected)
    both = (judging(expected, num_queries, num_pairs, mode) for mode in ("explain", "direct"))
    return sum(both, Work()), is_counted


def _reranked(context: typer.Context, expected: Expected) -> tuple[Work, bool]:
    params = context.params
    num_queries, num_pairs, is_counted = _ranked(params, expected)
    is_shared = options_of(params["model"])[0] != "endpoint"
    samples = params["num_samples"]
    work = judging(expected, num_queries, num_pairs, params["mode"], num_samples=samples, is_shared=is_shared)
    return work, is_counted


def _ranked(params: Mapping[str, Any], expected: Expected) -> tuple[int, int, bool]:
    """Queries and pairs of a run, counted in the file if it is there, and whether they were."""
    top_k, limit = params["top_k"], params["limit"]
    if params["run"] is not None and params["run"].is_file():
        lengths = [len(lines) for lines in read_run(params["run"]).values()][:limit]
    else:
        lengths = [expected.candidates] * min(expected.queries, limit or expected.queries)
    num_pairs = sum(min(length, top_k or length) for length in lengths)
    return len(lengths), num_pairs, params["run"] is not None and params["run"].is_file()


COUNTED: Final[Mapping[str, Callable[[typer.Context, Expected], tuple[Work, bool]]]] = {
    "label": _labelled,
    "expand": _expanded,
    "search": _expanded,
    "distill": _distilled,
    "refine": _refined,
    "calibrate": _calibrated,
    "rerank": _reranked,
}
