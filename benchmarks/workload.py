"""The models and requests that are measured: one query, many documents, explanations of a fixed length, labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.roofline import Job, Shape
from whyrank.errors import InputError
from whyrank.generators import Request, Sampling, Segment
from whyrank.generators.hf.chat import ChatTokens, Endings
from whyrank.generators.hf.load import load_tokenizer

__all__ = ["KINDS", "RANDOM_MODELS", "Kind", "Workload", "build", "endless_copy", "save_random_model"]

# W: explain and label. S: label at once.
Kind = Literal["W", "S"]
KINDS: tuple[Kind, ...] = ("W", "S")

NUM_INSTRUCTION_TOKENS, NUM_QUERY_TOKENS = 120, 80
NUM_DOCUMENT_TOKENS = (100, 400)
NUM_GENERATED = 64
# No tokenizer writes this character by itself: a stop that cannot occur, and a label prompt that no explanation begins.
NEVER_WRITTEN = "\uf8ff"
LABEL_PROMPT = f"{NEVER_WRITTEN} answer"
LABELS = (" yes", " no", " maybe")
SPECIAL_TOKENS = ("<|pad|>", "<|unknown|>")

# The sizes of small Llamas that people use; hidden, MLP, layers, heads, key/value heads, head, vocabulary.
RANDOM_MODELS = {
    "random-30m": Shape(384, 2048, 8, 6, 6, 64, 8192),
    "random-135m": Shape(576, 1536, 30, 9, 3, 64, 49152),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, and the same as token ids: `prompts` in the requests' order; label prompt and labels in `endings`."""

    requests: tuple[Request, ...]
    prompts: tuple[tuple[int, ...], ...]
    endings: Endings
    num_generated: int

    @property
    def job(self) -> Job:
        """How many tokens there are of what, counted on the prompts."""
        prefix = _num_common(self.prompts)
        return Job(
            prefix=prefix,
            documents=tuple(len(prompt) - prefix for prompt in self.prompts),
            generated=self.num_generated,
            label_prompt=len(self.endings.prompt),
            label_depths=tuple(sorted(len(node) for node in _inner_nodes(self.endings))),
        )


# ---- requests -------------------------------------------------------------------------------------------------


def build(kind: Kind, tokens: ChatTokens, num_documents: int, *, draw: int) -> Workload:
    """Documents of 100 to 400 tokens behind a prefix of 200.

    Words and lengths differ from draw to draw, so that nothing that was kept from one draw can help in the next but
    code made for a size that comes again. The total of the lengths is always the same. Draws count from 0: of a
    negative number, the same words and lengths would be drawn as of its opposite.
    """
    words, rng = _words(tokens), Random(draw)
    lengths = _lengths(rng, num_documents)
    shared = (
        Segment("user", "instruction", _text(tokens, words, rng, NUM_INSTRUCTION_TOKENS)),
        Segment("user", "query", _text(tokens, words, rng, NUM_QUERY_TOKENS)),
    )
    one = Request(
        segments=shared,
        stops=(NEVER_WRITTEN,),
        label_prompt=LABEL_PROMPT,
        labels=LABELS,
        sampling=Sampling(temperature=0.0, max_tokens=NUM_GENERATED),
        is_direct=kind == "S",
    )
    requests = tuple(
        replace(one, segments=(*shared, Segment("user", "document", _text(tokens, words, rng, length))))
        for length in lengths
    )
    prompts = tuple(tuple(tokens.prompt_ids(request)) for request in requests)
    return Workload(requests, prompts, tokens.endings(one), NUM_GENERATED if kind == "W" else 0)


def _lengths(rng: Random, num_documents: int) -> list[int]:
    """In pairs that lie on both sides of the middle, equally far from it; the middle itself for an odd one."""
    shortest, longest = NUM_DOCUMENT_TOKENS
    drawn = [rng.randint(shortest, longest) for _ in range(num_documents // 2)]
    lengths = [*drawn, *(shortest + longest - length for length in drawn)]
    if num_documents % 2:
        lengths.append((shortest + longest) // 2)
    rng.shuffle(lengths)
    return lengths


def _words(tokens: ChatTokens) -> list[str]:
    """Plain words that this tokenizer has as one piece, in a fixed order."""
    found = {tokens.decode([i]).strip() for i in tokens.tokenizer.get_vocab().values()}
    return sorted(word for word in found if word.isascii() and word.isalnum())


def _text(tokens: ChatTokens, words: Sequence[str], rng: Random, num_tokens: int) -> str:
    """Random words, cut after so many tokens; every word is one token at least."""
    text = " ".join(rng.choices(words, k=num_tokens))
    return text[: tokens.offsets(text)[num_tokens - 1][1]]


def _num_common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; a prompt keeps one of its own."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, prompts)) - 1)


def _inner_nodes(endings: Endings) -> set[tuple[int, ...]]:
    """Beginnings of labels that are longer than nothing and shorter than a label."""
    return {label[:end] for label in endings.labels for end in range(1, len(label))}


# ---- models ---------------------------------------------------------------------------------------------------


def save_random_model(shape: Shape, folder: Path, *, seed: int = 0) -> Path:
    """A Llama with random weights and a vocabulary of made-up words, without an end token; returns the folder."""
    num_words = shape.vocab_size - len(SPECIAL_TOKENS) - len(LABELS) - 1
    words = [*SPECIAL_TOKENS, "answer", *(label.strip() for label in LABELS), *(f"w{i}" for i in range(num_words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL_TOKENS[0], unk_token=SPECIAL_TOKENS[1]
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,  # wide enough for greedy answers with a clear winner at most places
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    GenerationConfig(pad_token_id=0).save_pretrained(folder)
    return folder


def endless_copy(source: Path, folder: Path) -> Path:
    """A checkpoint like `source` without end token and chat template: every answer runs to the limit, on every side.

    Weights are linked, not copied. Returns the new folder.

    Raises:
        InputError: `source` is not a folder with a config and safetensors weights.
    """
    weights = sorted(source.glob("*.safetensors*"))
    if not (source / "config.json").is_file() or not weights:
        raise InputError(
            f"--model {source}: expected a folder with config.json and *.safetensors, or one of "
            f"{', '.join(RANDOM_MODELS)}"
        )
    folder.mkdir(parents=True)
    for path in weights:
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["eos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer = load_tokenizer(source)
    PreTrainedTokenizerFast(
        tokenizer_object=ChatTokens(tokenizer).tokenizer.backend_tokenizer, bos_token=tokenizer.bos_token
    ).save_pretrained(folder)
    GenerationConfig(pad_token_id=0).save_pretrained(folder)
    return folder
