"""A recipe's stage as a command: its options become words of the command line, which the verb itself then reads."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import typer
from pydantic import JsonValue

from whyrank.cli.data import mining_config, search_config
from whyrank.cli.distill import distill_config
from whyrank.cli.options import model_options
from whyrank.cli.refine import refine_config
from whyrank.cli.rerank import check_rerank
from whyrank.errors import InputError, OtherJob, WhyrankError
from whyrank.recipe import DoneStage, Recipe, Stage, digest, files_in, is_done, set_aside
from whyrank.store import atomic_path

__all__ = ["VERBS", "Command", "commands_of"]

# Beside being parsed, options are looked at as the verb itself would, before anything runs.
CHECKS: Final[Mapping[str, Callable[[typer.Context], object]]] = {
    "mine": lambda context: mining_config(context.params),
    "label": lambda context: model_options(context, context.params["teacher"]),
    "expand": lambda context: model_options(context, context.params["model"]),
    "distill": lambda context: distill_config(context.params),
    "refine": refine_config,
    "search": lambda context: search_config(context.params),
    "rerank": check_rerank,
}
VERBS: Final = (
    "mine",
    "label",
    "expand",
    "distill",
    "refine",
    "calibrate",
    "search",
    "rerank",
    "evaluate",
    "almanac export",
)
NOT_IN_RECIPES: Final = ("json", "help")
log = logging.getLogger("whyrank")


@dataclass(frozen=True, slots=True)
class Command:
    """One stage, ready to run in the work folder: the words after `whyrank`, and what the verb made of them."""

    stage: Stage
    words: tuple[str, ...]
    context: typer.Context

    @property
    def out(self) -> Path | None:
        """Where the stage writes, if it writes."""
        found: Path | None = self.context.params.get("out")
        return found

    def inputs(self) -> tuple[str, ...]:
        """The files and folders that its options name and that are there; `scripted:FILE` names one, too."""
        named = (str(item) for key, value in self.context.params.items() if key != "out" for item in _items(value))
        paths = (name.removeprefix("scripted:") for name in named)
        return tuple(dict.fromkeys(path for path in paths if Path(path).exists()))

    def is_done(self, known: DoneStage | None) -> bool:
        """Whether the stage can be left out, see `recipe.is_done`."""
        return is_done(known, self.words, self.inputs())

    def run(self) -> int:
        """Run the verb in this process; returns its exit code.

        What the stage made earlier, from other inputs or with other options, is set aside under another name if it must
        not be mixed with what it makes now.

        Raises:
            WhyrankError: as the verb, with the stage's name.
        """
        try:
            try:
                return self._invoke()
            except OtherJob:
                if self.out is None or not self.out.is_dir():
                    raise
                aside = set_aside(self.out)
                log.warning("%s held what other inputs or options had made; it is %s now", self.out, aside)
                return self._invoke()
        except (WhyrankError, OSError) as cause:
            raise WhyrankError(f"stage {self.stage.name}: {cause}") from cause

    def _invoke(self) -> int:
        try:
            with self.context:
                self.context.command.invoke(self.context)
        except typer.Exit as stop:
            return stop.exit_code
        return 0

    def as_done(self) -> DoneStage:
        """What to remember of it after it ended well."""
        inputs = {path: digest(Path(path)) for path in self.inputs()}
        return DoneStage(self.words, inputs, files_in(self.out) if self.out else ())


def _items(value: object) -> Iterator[str | Path]:
    """Texts and paths among an option's values."""
    if isinstance(value, str | Path):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _items(item)


def commands_of(recipe: Recipe, root: Any) -> list[Command]:
    """The stages as commands, all their options looked at. To be called in the work folder, where the tables that some
    options hold are written to files.

    Args:
        recipe: as read.
        root: the group of all verbs.

    Raises:
        InputError: a verb or an option does not exist, or a value is refused; the message names file and stage.
    """
    found = []
    for stage in recipe.stages:
        where = f"{recipe.path}: stages.{stage.name}"
        if stage.verb not in VERBS:
            raise InputError(f"{where}: expected a verb among {', '.join(VERBS)}, found {stage.verb!r}")
        command = root
        for part in stage.verb.split():
            command = command.commands[part]
        words = _words(command.params, stage, where)
        try:
            context = command.make_context(stage.verb, list(words))
            if stage.verb in CHECKS:
                CHECKS[stage.verb](context)
        except typer.BadParameter as cause:
            raise InputError(f"{where}: {cause.format_message()}") from cause
        found.append(Command(stage, (*stage.verb.split(), *words), context))
    return found


def _words(parameters: Sequence[Any], stage: Stage, where: str) -> tuple[str, ...]:
    """A stage's options as words of its verb's command line; positional ones come last."""
    known: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.name not in NOT_IN_RECIPES:
            names = [option.removeprefix("--").replace("-", "_") for option in parameter.opts if len(option) > 2]
            known |= dict.fromkeys([parameter.name, *names], parameter)
    words: list[str] = []
    positional: list[str] = []
    for key, value in stage.options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise InputError(f"{where}: whyrank {stage.verb} has no option {key!r}; {advice}")
        parameter = known[key]
        values = value if isinstance(value, list) else [value]
        if len(values) > 1 and not parameter.multiple and parameter.nargs == 1:
            raise InputError(f"{where}.{key}: expected one value, found a list of {len(values)}")
        texts = [_text(stage, key, item, where) for item in values if not isinstance(item, bool)]
        if getattr(parameter, "is_flag", False):
            words += _flag(parameter, value, f"{where}.{key}")
        elif len(texts) < len(values):
            raise InputError(f"{where}.{key}: expected a value, found {json.dumps(value)}")
        elif parameter.param_type_name == "argument":
            positional += texts
        else:
            words += [word for text in texts for word in (parameter.opts[-1], text)]
    return (*words, *positional)


def _flag(parameter: Any, value: JsonValue, where: str) -> list[str]:
    if not isinstance(value, bool):
        raise InputError(f"{where}: expected true or false, found {value!r}")
    words: list[str] = parameter.opts[-1:] if value else parameter.secondary_opts[:1]
    return words


def _text(stage: Stage, key: str, value: JsonValue, where: str) -> str:
    """One value as a word; the table of an option that names a file is written to one."""
    if isinstance(value, dict):
        if (stage.verb, key) != ("refine", "config"):
            raise InputError(f"{where}.{key}: expected a text or a number, found a table")
        path = Path(f"{stage.name}.config.json")
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        return str(path)
    if value is None or isinstance(value, list):
        raise InputError(f"{where}.{key}: expected a text or a number, found {json.dumps(value)}")
    return str(value)
