"""Small random checkpoints of real architectures, saved to disk with tokenizer and chat template.

The weights mean nothing; the config classes, tokenizer families, special tokens and chat templates are the ones
that hub models use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Family = Literal["llama", "qwen3", "gemma3"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen3", "gemma3")

LETTERS = (
    "The quick brown fox asks why 0123456789 relevance label explanation document query judged 10 or 2 ## true false"
)
TRAINING_TEXT = [
    LETTERS,
    LETTERS.lower(),
    "Relevance Label: 1 ## Explanation: because it helps",
    "äöü 漢字 ▁ <x> | / _",
] * 3

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIAL: dict[Family, list[str]] = {
    "llama": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "qwen3": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "gemma3": ["<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
}
NOT_SPECIAL_BUT_ADDED: dict[Family, list[str]] = {"llama": [], "qwen3": ["<think>", "</think>"], "gemma3": []}


def byte_level_tokenizer(family: Family) -> Tokenizer:
    """Byte-level BPE as Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def spaced_bpe_tokenizer() -> Tokenizer:
    """BPE with byte fallback and a letter for spaces, as Gemma has it; its vocabulary holds its special tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=[*SPECIAL["gemma3"], *bytes_])
    words = [word for line in TRAINING_TEXT for word in line.replace(" ", " ▁").split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    data = tokenizer.to_str()
    reloaded: Tokenizer = Tokenizer.from_str(data)
    return reloaded


def save_checkpoint(family: Family, folder: Path, *, seed: int = 0) -> Path:
    """Write a random checkpoint of about 100,000 parameters and return its folder."""
    backend = spaced_bpe_tokenizer() if family == "gemma3" else byte_level_tokenizer(family)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[family][0] if family != "qwen3" else None,
        eos_token=SPECIAL[family][1],
        chat_template={"llama": LLAMA_TEMPLATE, "qwen3": QWEN_TEMPLATE, "gemma3": GEMMA_TEMPLATE}[family],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[family]})
    tokenizer.add_tokens([AddedToken(text, special=False) for text in NOT_SPECIAL_BUT_ADDED[family]])
    torch.manual_seed(seed)
    model = _random_model(family, len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _random_model(family: Family, vocab_size: int) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16))
    config = Gemma3TextConfig(**shape, head_dim=16, sliding_window=32, query_pre_attn_scalar=16)
    config.layer_types = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(config)
