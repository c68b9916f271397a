"""What several verbs share: option types, help taken from the config classes, and printing."""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from whyrank.errors import InputError
from whyrank.generators.opening import ModelOptions, options_of
from whyrank.passages import LongDocuments, Passages, PassageScore
from whyrank.records import Mode
from whyrank.rerank import RankingMode
from whyrank.search import Bm25Config

__all__ = [
    "AutoTolerance",
    "AutoTopK",
    "BatchSize",
    "Board",
    "Concurrency",
    "Corpus",
    "Deadline",
    "Device",
    "DeviceName",
    "Dtype",
    "DtypeName",
    "Excluded",
    "Instruction",
    "Interrupted",
    "Json",
    "Limit",
    "Logprobs",
    "LongDocumentsOption",
    "MaxExplanationTokens",
    "MaxPassages",
    "MaxRetries",
    "MaxTokensPerQuery",
    "Memory",
    "ModeOption",
    "NumSamples",
    "PassageScoreOption",
    "Queries",
    "RankingModeOption",
    "SkipBad",
    "Temperature",
    "TemplateOption",
    "Timeout",
    "TokenLimitField",
    "TokenLimitName",
    "as_usage_error",
    "console",
    "existing",
    "model_options",
    "passage_options",
    "print_json",
    "require_files",
    "resumable",
    "setting",
    "settings_of",
    "show_version",
]


@lru_cache(maxsize=16)
def attribute_docs(config: type) -> Mapping[str, str]:
    """The string under each attribute of a class: the one place where an option is explained."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            found[statement.target.id] = inspect.cleandoc(str(following.value.value)).replace("`", "")
    return found


def setting(config: type, name: str, *flags: str, minimum: int | None = None) -> Any:
    """A command-line option for one attribute of a config class, with its help."""
    return typer.Option(*flags, help=attribute_docs(config)[name], min=minimum)


def settings_of(config: type, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a verb that bear the names of a config's attributes."""
    return {item.name: params[item.name] for item in fields(config) if item.name in params}


def existing(*flags: str, help: str) -> Any:
    """An option that names a file; whether it exists is checked by the reader, which also accepts `-`."""
    return typer.Option(*flags, help=help, metavar="FILE")


def require_files(option: str, paths: Iterable[Path], advice: str) -> None:
    """Find out what is missing before anything is read or loaded.

    Raises:
        InputError: a path is not a file.
    """
    for path in paths:
        if str(path) != "-" and not path.is_file():
            found = "a directory" if path.is_dir() else "nothing"
            raise InputError(f"{option}: expected a file at {path}, found {found}; {advice}")


Corpus = Annotated[Path, existing("--corpus", help="Documents: JSONL, BEIR, BRIGHT, TREC SGML, Solr JSON or TSV.")]
Queries = Annotated[Path, existing("--queries", help="Queries: JSONL, BEIR, BRIGHT examples, TREC topics or TSV.")]
Excluded = Annotated[Path | None, existing("--excluded", help="Documents never to return: `query_id doc_id` lines.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many, to try a command out.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count malformed lines and pass over them.")]
Board = Annotated[
    bool, typer.Option("--tensorboard", help="Write the curves for TensorBoard, too, in a folder of that name.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
ModeOption = Annotated[Mode, typer.Option(help="explain: reason, then label; direct: label at once.")]
RankingModeOption = Annotated[
    RankingMode,
    typer.Option(
        help="explain: reason, then label; direct: label at once; auto: direct for all, reasons where they can change "
        "the first places (needs a calibrated checkpoint)."
    ),
]
AutoTopK = Annotated[
    int | None, typer.Option(min=1, help="With --mode auto: how many first places reasons settle; default: 10.")
]
AutoTolerance = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="With --mode auto: by how much, in label units, a document must be able to exceed the last of these "
        "places to be worth a reason; default: 0.",
    ),
]
MaxTokensPerQuery = Annotated[
    int | None, typer.Option(min=0, help="With --mode auto: most tokens to write for a query; default: no limit.")
]
TemplateOption = Annotated[
    str | None, typer.Option(help="Name or TOML file; a checkpoint trained by whyrank brings its own.")
]
Instruction = Annotated[str | None, typer.Option(help="Replaces the template's statement of what is relevant.")]
MaxExplanationTokens = Annotated[int | None, typer.Option(min=1, help="Overrides the template's cap.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="How explanations are drawn; 0 is greedy.")]
NumSamples = Annotated[
    int, typer.Option("--samples", min=1, help="Judgments drawn per pair, to be averaged; needs a --temperature.")
]
LongDocumentsOption = Annotated[
    LongDocuments,
    typer.Option(help="A document over the template's cap: cut judges its beginning, passages all of it in pieces."),
]
PassageScoreOption = Annotated[PassageScore, setting(Passages, "score", "--passage-score")]
MaxPassages = Annotated[int, setting(Passages, "max_passages", minimum=1)]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Device = Annotated[DeviceName, setting(ModelOptions, "device")]
Dtype = Annotated[DtypeName, setting(ModelOptions, "dtype")]
BatchSize = Annotated[int | None, setting(ModelOptions, "batch_size", minimum=1)]
Memory = Annotated[str | None, setting(ModelOptions, "memory")]
Concurrency = Annotated[int, setting(ModelOptions, "concurrency", minimum=1)]
Timeout = Annotated[float, setting(ModelOptions, "timeout")]
Deadline = Annotated[float, setting(ModelOptions, "deadline")]
MaxRetries = Annotated[int, setting(ModelOptions, "max_retries")]
Logprobs = Annotated[bool, setting(ModelOptions, "has_logprobs", "--logprobs")]
TokenLimitName = Literal["max_tokens", "max_completion_tokens"]
TokenLimitField = Annotated[TokenLimitName, setting(ModelOptions, "token_limit_field")]
BM25 = Bm25Config()
MODEL = ModelOptions()
PASSAGES = Passages()


@contextmanager
def as_usage_error() -> Iterator[None]:
    """An option whose value is refused by the library was used wrongly: exit code 2, not 1."""
    try:
        yield
    except InputError as cause:
        raise typer.BadParameter(str(cause)) from cause


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a job that the same command continues."""


@contextmanager
def resumable(kept: Path) -> Iterator[None]:
    """What an interrupted block has done is not lost once `kept` is there: tell so by `Interrupted`."""
    try:
        yield
    except KeyboardInterrupt as cause:
        if kept.exists():
            raise Interrupted from cause
        raise


def model_options(context: typer.Context, model: str | None) -> ModelOptions:
    """What a verb was given for loading its model: the parameters that bear the names of the attributes.

    Raises:
        typer.BadParameter: an option was given that the model's backend has no use for, or a value that means nothing.
    """
    names = [option.name for option in fields(ModelOptions) if option.name in context.params]
    backend, useful = options_of(model)
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params if parameter.name in names}
    given = [name for name in names if _is_given(context, name)]
    idle = [flags[name] for name in given if name not in useful]
    if idle:
        rest = ", ".join(flags[name] for name in useful if name in flags) or "none of these options"
        raise typer.BadParameter(
            f"{', '.join(idle)}: without effect on {model or 'the demo model'}, leave it out; a model of the kind "
            f"{backend} takes {rest}"
        )
    with as_usage_error():
        return ModelOptions(**settings_of(ModelOptions, context.params))


def passage_options(context: typer.Context) -> LongDocuments | Passages:
    """What a verb was given for long documents.

    Raises:
        typer.BadParameter: an option about passages was given, and documents are cut.
    """
    if context.params["long_documents"] == "passages":
        return Passages(context.params["passage_score"], context.params["max_passages"])
    given = {"passage_score": "--passage-score", "max_passages": "--max-passages"}
    idle = [flag for name, flag in given.items() if _is_given(context, name)]
    if idle:
        raise typer.BadParameter(f"{', '.join(idle)}: without effect unless --long-documents is passages; give it too")
    return "cut"


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def console() -> Console:
    """Standard output for people; plain text when it is not a terminal. Names may hold brackets and colons."""
    is_terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=not is_terminal)


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        sys.stdout.write(f"whyrank {version('whyrank')}\n")
        raise typer.Exit


def show_version(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Rerankers that show their reasons: mine, label, distil, rerank, evaluate."""
