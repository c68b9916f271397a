"""Opening a model by what a person types: a folder, a hub id, or such as `vllm:MODEL` or `endpoint:URL#MODEL`.

The only place that knows all backends; each is imported when it is asked for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

from whyrank.calibration import Calibration
from whyrank.checkpoint import CARD_NAME, Card, read_card
from whyrank.errors import InputError, require
from whyrank.generators import Generator
from whyrank.records import Mode
from whyrank.store import sha256_file
from whyrank.template import Template

__all__ = [
    "DEFAULT_TEMPLATE",
    "EMBEDDED_MODEL",
    "ModelOptions",
    "calibration_of",
    "open_model",
    "open_writer",
    "options_of",
]

DEFAULT_TEMPLATE = "explain-0-2"
EMBEDDED_MODEL = Path(str(files("whyrank") / "almanac" / "model"))
DEMO_NOTICE = (
    "using the demo model that ships with whyrank: it knows the almanac's few subjects and nothing else. "
    "Choose a real one with --model (or Reranker.load(model)): a folder, a hub id or endpoint:URL#MODEL."
)
CONFIG_NAME = "config.json"
log = logging.getLogger("whyrank")


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model is loaded. A backend has a use for some of it (`options_of`); the command line refuses the rest."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where an hf model runs; auto prefers CUDA, then MPS, then the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Weights of an hf model; auto is bfloat16 on CUDA, on CPUs that multiply it if the checkpoint has it, and else
    float32; int8 is for CPUs."""
    batch_size: int | None = None
    """Answers that an hf model writes at once; by default 32, or as many as --memory has room for."""
    memory: str | None = None
    """What an hf model may take on top of its weights, such as 4GiB; fewer answers at once keep to it."""
    concurrency: int = 8
    """Requests that are under way at an endpoint at once."""
    timeout: float = 120.0
    """Seconds until an attempt at an endpoint is given up."""
    deadline: float = 600.0
    """Seconds until a request to an endpoint, with all its attempts, is given up."""
    max_retries: int = 5
    """Further attempts after an endpoint was busy or failed; its Retry-After is always honoured."""
    has_logprobs: bool = False
    """Read the label distribution from an endpoint's log-probabilities, where it offers them."""
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How an endpoint names the cap of an answer's length; some services refuse max_tokens."""

    def __post_init__(self) -> None:
        """Refuse a size that cannot be read now, not after a model has been loaded."""
        self.num_bytes()

    def num_bytes(self) -> int | None:
        """`memory` in bytes, from such as `4GiB`, `800MB` or `100000`.

        Raises:
            InputError: it is not a size.
        """
        try:
            return None if self.memory is None else TypeAdapter(ByteSize).validate_python(self.memory)
        except ValidationError as cause:
            raise InputError(f"expected a size of memory such as 4GiB or 800MB, found {self.memory!r}") from cause


OPTIONS = {
    "hf": ("device", "dtype", "batch_size", "memory"),
    "vllm": ("dtype",),
    "endpoint": ("concurrency", "timeout", "deadline", "max_retries", "has_logprobs", "token_limit_field"),
    "scripted": (),
    "overlap": (),
}


def options_of(spec: str | Path | None) -> tuple[str, tuple[str, ...]]:
    """The backend that a model's name asks for, and the attributes of `ModelOptions` that it has a use for."""
    kind, colon, _ = str(spec).partition(":")
    if str(spec) == "overlap":
        backend = "overlap"
    else:
        backend = kind if colon and kind in ("vllm", "endpoint", "scripted") else "hf"
    return backend, OPTIONS[backend]


def open_model(
    spec: str | Path | None,
    *,
    template: Template | None = None,
    mode: Mode = "explain",
    options: ModelOptions = ModelOptions(),
) -> tuple[Generator, Template]:
    """Load the model and settle on its template.

    A checkpoint with a `whyrank.json` brings its own template and is checked against it; other models use
    `template`, or the default one.

    Args:
        spec: `None` for the embedded demo model.
        template: asked for by the caller.
        mode: the mode it will be used in.
        options: how to load it.

    Raises:
        InputError: `spec` names nothing.
        MissingExtra: the backend is not installed.
        TemplateMismatch: the checkpoint was trained for something else.
    """
    if spec is None:
        if not (EMBEDDED_MODEL / CARD_NAME).is_file():
            raise InputError("this installation has no embedded model; name one with --model")
        log.warning(DEMO_NOTICE)
        return _open_hf(EMBEDDED_MODEL, template, mode, options, name="whyrank-demo")
    kind, _, rest = str(spec).partition(":")
    if kind == "endpoint":
        from whyrank.generators.endpoint import Endpoint, EndpointConfig

        url, _, model = rest.partition("#")
        if not url or not model:
            raise InputError(f"expected endpoint:URL#MODEL, found {str(spec)!r}")
        config = EndpointConfig(
            concurrency=options.concurrency,
            timeout=options.timeout,
            deadline=options.deadline,
            max_retries=options.max_retries,
            has_logprobs=options.has_logprobs,
            token_limit_field=options.token_limit_field,
        )
        return Endpoint(url, model, config=config), template or Template.load(DEFAULT_TEMPLATE)
    if kind == "scripted" and rest:
        from whyrank.generators.scripted import Scripted

        path = Path(rest)
        name = f"scripted:{path.name}@{sha256_file(path)[:8]}" if path.is_file() else "scripted"
        return Scripted.from_file(path, name=name), template or Template.load(DEFAULT_TEMPLATE)
    if kind in ("scripted", "endpoint"):
        raise InputError(f"expected scripted:FILE or endpoint:URL#MODEL, found {str(spec)!r}")
    if kind == "vllm":
        return _open_vllm(rest, template, mode, options)
    if str(spec) == "overlap":
        from whyrank.generators.overlap import Overlap

        return Overlap(), template or Template.load(DEFAULT_TEMPLATE)
    if _is_path(str(spec)) and not Path(spec).expanduser().is_dir():
        raise InputError(f"expected a folder with a checkpoint at {spec}, found nothing")
    return _open_hf(Path(spec).expanduser() if _is_path(str(spec)) else spec, template, mode, options, name=str(spec))


def calibration_of(spec: str | Path | None) -> Calibration:
    """What mode `auto` rests on, from the card of the checkpoint that `open_model` would load.

    Raises:
        InputError: there is no such folder, or no calibration in it.
        MissingExtra: the backend is not installed.
        TemplateMismatch: the checkpoint was not trained for both modes.
    """
    card = _card_of(spec)
    if card is not None:
        card.check_both_modes()
    if card is None or card.calibration is None:
        place = _place_of(spec)
        what = f"the {CARD_NAME} of {place} has none" if card else f"{place} has no {CARD_NAME}, where it is kept"
        raise InputError(
            f"--mode auto rests on a calibration, and {what}; make one for a checkpoint of whyrank distill: whyrank "
            "calibrate --model FOLDER --run RUN --corpus DOCUMENTS --queries QUERIES -o OUT"
        )
    return card.calibration


def open_writer(
    spec: str | Path | None, *, prompt: str, options: ModelOptions = ModelOptions()
) -> tuple[Generator, Template]:
    """Load a model that is to write search queries; its template's `chat_options` belong to it.

    Args:
        spec: as for `open_model`.
        prompt: version of the prompt for search queries; a checkpoint of whyrank must have been taught it.
        options: how to load it.

    Raises:
        TemplateMismatch: a checkpoint of whyrank was not taught to write search queries; and see `open_model`.
    """
    card = _card_of(spec)
    if card is None:
        return open_model(spec, options=options)
    card.check_search_queries(prompt)
    return open_model(spec, mode=card.modes[0], options=options)


def _place_of(spec: str | Path | None) -> str:
    """Folder or hub id of a model that has weights."""
    return str(EMBEDDED_MODEL if spec is None else spec).removeprefix("vllm:")


def _card_of(spec: str | Path | None) -> Card | None:
    """The card of the checkpoint that `open_model` would load; `None` if it has none, or is not a checkpoint.

    Raises:
        InputError: there is no such folder.
        MissingExtra: the backend is not installed.
    """
    backend, _ = options_of(spec)
    if backend not in ("hf", "vllm"):
        return None
    place = _place_of(spec)
    if _is_path(place) and not Path(place).expanduser().is_dir():
        raise InputError(f"expected a folder with a checkpoint at {place}, found nothing")
    require("transformers", backend)
    return _find_card(Path(place).expanduser() if _is_path(place) else place, is_template_given=False)


def _is_path(spec: str) -> bool:
    """Whether a model's name can only be a folder: hub ids are `name` or `owner/name`."""
    return spec.startswith((".", "/", "~")) or spec.endswith("/") or spec.count("/") > 1


def _open_hf(
    model: str | Path, template: Template | None, mode: Mode, options: ModelOptions, *, name: str
) -> tuple[Generator, Template]:
    for module in ("torch", "transformers"):
        require(module, "hf")
    if not Path(model).is_dir():
        _require_on_hub(str(model))
    from whyrank.generators.hf import HfGenerator

    generator = HfGenerator.load(
        model,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        memory=options.num_bytes(),
        name=name.rstrip("/"),
    )
    card = _find_card(model, is_template_given=template is not None)
    if card is None:
        return generator, template or Template.load(DEFAULT_TEMPLATE)
    card.check(mode=mode, template=template, label_tokens=generator.tokens.label_tokens(card.template))
    return generator, template or card.template


def _open_vllm(model: str, template: Template | None, mode: Mode, options: ModelOptions) -> tuple[Generator, Template]:
    if not model:
        raise InputError("expected vllm:MODEL with a folder or hub id, found 'vllm:'")
    if options.device not in ("auto", "cuda"):
        raise InputError(f"vLLM runs on the device that it was built for; leave --device {options.device} out")
    if options.dtype == "int8":
        raise InputError("--dtype int8 is for hf models on CPUs; vLLM runs checkpoints that were quantized beforehand")
    for module in ("torch", "transformers"):
        require(module, "vllm")
    from transformers.utils.hub import cached_file

    from whyrank.generators.vllm import VllmGenerator, safetensors_digest

    if _is_path(model) and not Path(model).expanduser().is_dir():
        raise InputError(f"expected a folder with a checkpoint at {model}, found nothing")
    place = str(Path(model).expanduser()) if _is_path(model) else model
    generator = VllmGenerator.load(place, dtype=options.dtype)
    settings = cached_file(place, "config.json", local_files_only=True)  # vLLM has fetched what is not a folder
    digest = safetensors_digest(Path(str(settings)).parent)
    generator = replace(generator, name=f"vllm:{model.rstrip('/')}@{digest}")
    card = _find_card(place, is_template_given=template is not None)
    if card is None:
        return generator, template or Template.load(DEFAULT_TEMPLATE)
    card.check(mode=mode, template=template, label_tokens=generator.tokens.label_tokens(card.template))
    return generator, template or card.template


def _require_on_hub(model: str) -> None:
    """Ask once whether a model is in the local cache or on the hub: loading it asks five times, with longer and longer
    pauses.

    Raises:
        InputError: it is not, or the hub cannot be asked.
    """
    from transformers.utils import hub

    chatty = logging.getLogger(hub.__name__)
    was_off, chatty.disabled = chatty.disabled, True  # what it says is in the message below
    advice = "Give the folder of a checkpoint (out/student) or a hub id (owner/name)"
    try:
        is_there = hub.has_file(model, CONFIG_NAME, local_files_only=True) or hub.has_file(model, CONFIG_NAME)
    except Exception as cause:  # a refusal of the hub, of a proxy, or of the name itself: each has a class of its own
        reason = " ".join(str(cause).split())
        raise InputError(f"no folder {model!r} is here, and as a hub id it was refused: {reason} {advice}") from cause
    finally:
        chatty.disabled = was_off
    if not is_there:
        raise InputError(
            f"no folder {model!r} is here, and the hub cannot be reached or has no {CONFIG_NAME} of a model with this "
            f"id. {advice}"
        )


def _find_card(model: str | Path, *, is_template_given: bool) -> Card | None:
    """The card in a folder or a hub repository; `None` if the checkpoint was not trained by whyrank.

    Raises:
        InputError: the hub cannot be asked, and the caller named no template either.
    """
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(str(model), CARD_NAME, _raise_exceptions_for_missing_entries=False)
    except OSError as cause:
        if is_template_given:
            log.warning("the hub cannot be asked whether %s has a %s; using the template given", model, CARD_NAME)
            return None
        raise InputError(
            f"the hub cannot be asked whether {model} has a {CARD_NAME} with its own template; go online once, or name "
            "a template with --template"
        ) from cause
    return read_card(found) if found is not None else None
