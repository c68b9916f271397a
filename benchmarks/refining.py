"""One round of refinement by GRPO, three ways: answers are drawn, rewarded and learned from once.

All sides have the same network, prompts of the same length, samples per prompt and new tokens, a reference policy whose
distance is priced, and random rewards. `packed` is what `whyrank refine` does, the label included, which the others do
not have; `padded` writes every sample with `model.generate` and learns from one row per sample; `trl` is GRPOTrainer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from benchmarks.workload import LABEL_PROMPT, LABELS, NEVER_WRITTEN, SPECIAL_TOKENS
from whyrank.generators import Request, Sampling, Segment
from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.hf.load import load_model, load_tokenizer
from whyrank.training import ppo_math
from whyrank.training.refine_config import RefineConfig
from whyrank.training.scoring import Episode
from whyrank.training.updating import Learner

__all__ = ["NUM_PROMPTS", "NUM_SAMPLES", "packed", "padded", "trl"]

NUM_PROMPT_TOKENS, NUM_SAMPLES, NUM_NEW, NUM_PROMPTS = 512, 8, 64, 2
LEARNING_RATE, PRICE, CLIP = 1e-6, 0.02, 0.2
System = Callable[[], object]


def texts(vocab_size: int, num_prompts: int, rng: Random) -> list[str]:
    """Prompts of made-up words, one token each."""
    return [
        " ".join(f"w{rng.randrange(vocab_size - 100)}" for _ in range(NUM_PROMPT_TOKENS)) for _ in range(num_prompts)
    ]


def packed(folder: Path, num_rounds: int) -> System:
    """Rounds as in `whyrank refine`: the engine reads a prompt once for its samples, and so does the update."""
    model = load_model(folder, torch.device("cpu"), torch.float32)
    tokens, rng = ChatTokens(load_tokenizer(folder)), Random(0)
    generator = HfGenerator("student", model, tokens, NUM_PROMPTS * NUM_SAMPLES)
    config = RefineConfig(
        algorithm="grpo",
        num_samples=NUM_SAMPLES,
        num_epochs=1,
        minibatch_size=NUM_PROMPTS,
        microbatch_size=NUM_PROMPTS,
        kl_coefficient=PRICE,
        clip=CLIP,
        replay_weight=0.0,
        device="cpu",
    )
    learner = Learner(model, config)

    def run() -> None:
        for _ in range(num_rounds):
            episodes = _drawn(generator, texts(model.config.vocab_size, NUM_PROMPTS, rng), rng)
            lesson = learner.prepare(episodes, [rng.random() for _ in episodes], PRICE)
            more: dict[str, Any] = {"is_value_only": False, "replay": list, "rng": rng}
            learner.update(lesson, rate=LEARNING_RATE, coefficient=PRICE, **more)

    return run


def _drawn(generator: HfGenerator, prompts: Sequence[str], rng: Random) -> list[Episode]:
    """The samples of every prompt, as the refinement draws them."""
    requests = [
        Request(
            segments=(Segment("user", "document", prompt),),
            stops=(NEVER_WRITTEN,),
            label_prompt=LABEL_PROMPT,
            labels=LABELS,
            sampling=Sampling(1.0, NUM_NEW, rng.randrange(2**31)),
        )
        for prompt in prompts
        for _ in range(NUM_SAMPLES)
    ]
    found = dict(generator.generate(requests))
    episodes = []
    for number, request in enumerate(requests):
        ends, answer = generator.tokens.endings(request), found[number]
        prompt, written = tuple(generator.tokens.prompt_ids(request)), answer.token_ids or ()
        if (len(prompt), len(written)) != (NUM_PROMPT_TOKENS, NUM_NEW):
            raise AssertionError(f"expected {NUM_PROMPT_TOKENS} + {NUM_NEW} tokens, found {len(prompt), len(written)}")
        episodes.append(Episode(prompt, written, False, answer.logprobs, ends.prompt, ends.labels, 0))
    return episodes


def padded(folder: Path, num_rounds: int) -> System:
    """The same mathematics with one row per sample; prompts are equally long, so that there is nothing to pad."""
    model = load_model(folder, torch.device("cpu"), torch.float32)
    frozen, tokenizer, rng = copy.deepcopy(model).requires_grad_(False), load_tokenizer(folder), Random(0)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def run() -> None:
        for _ in range(num_rounds):
            prompts = tokenizer(texts(model.config.vocab_size, NUM_PROMPTS, rng), return_tensors="pt").input_ids
            rows = prompts.repeat_interleave(NUM_SAMPLES, dim=0)
            with torch.no_grad():
                sampled: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": NUM_NEW}
                rows = cast(Any, model).generate(rows, attention_mask=torch.ones_like(rows), **sampled)
                reference = _log_probs(frozen, rows)
            new = _log_probs(model, rows)
            mask = torch.ones_like(new)
            rewards = torch.tensor([[rng.random() for _ in range(NUM_SAMPLES)] for _ in range(NUM_PROMPTS)])
            advantages = ppo_math.group_advantages(rewards, is_scaled=True).reshape(-1, 1) * mask
            actions = {"num_actions": int(mask.sum())}
            loss = ppo_math.policy_loss(new, new.detach(), advantages, mask, clip=CLIP, **actions)
            (loss + PRICE * ppo_math.kl_k3(new, reference).mean()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def _log_probs(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Of the new tokens, `(rows, new tokens)`."""
    logits = model(input_ids=rows, use_cache=False, logits_to_keep=NUM_NEW + 1).logits[:, :-1].float()
    return torch.log_softmax(logits, dim=-1).gather(2, rows[:, -NUM_NEW:, None])[..., 0]


def trl(folder: Path, num_rounds: int, scratch: Path) -> System:
    """As many steps of GRPOTrainer; it is made before the clock starts."""
    dataset, library = import_module("datasets").Dataset, import_module("trl")
    tokenizer, rng = load_tokenizer(folder), Random(0)
    tokenizer.eos_token = SPECIAL_TOKENS[1]  # it insists on one; this one comes once in thousands of tokens
    settings: dict[str, Any] = {
        "output_dir": str(scratch),
        "per_device_train_batch_size": NUM_PROMPTS * NUM_SAMPLES,
        "num_generations": NUM_SAMPLES,
        "max_completion_length": NUM_NEW,
        "max_steps": num_rounds,
        "learning_rate": LEARNING_RATE,
        "beta": PRICE,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    prompts = texts(len(tokenizer), num_rounds * NUM_PROMPTS, rng)
    trainer = library.GRPOTrainer(
        model=str(folder),  # it makes its reference from the same place
        reward_funcs=_random_reward,
        args=library.GRPOConfig(**settings),
        train_dataset=dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    train: System = trainer.train
    return train


def _random_reward(completions: Sequence[str], **unused: object) -> list[float]:
    rng = Random(len(completions[0]))
    return [rng.random() for _ in completions]
