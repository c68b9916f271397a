"""Checkpoints of the real architectures go the whole road: distilled, refined, saved, loaded again, merged, ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoints import FAMILIES, Family, save_checkpoint
from tests.test_refine import CONFIG as REFINE
from tests.test_refine import CPU, DATA, SHORT
from tests.test_training import DOCUMENTS, QUERIES, judgments
from whyrank import Reranker
from whyrank.generators.hf.adapters import read_adapter
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.hf.load import load_model, load_tokenizer
from whyrank.training.config import AdapterConfig, DistillConfig
from whyrank.training.distill import distill
from whyrank.training.examples import examples_of
from whyrank.training.refine import refine

KINDS = {
    "full": AdapterConfig(),
    "lora": AdapterConfig(rank=4),
    "merged": AdapterConfig(rank=4, is_merged=True),
    "qlora": AdapterConfig(rank=4, quantize="4bit"),
}


def ranked(folder: Path) -> list[tuple[str, float | None, str]]:
    found = Reranker.load(folder, options=CPU).rank("my fern is brown", ["Dry air.", "Yeast eats sugar."])
    assert {result.status for result in found} <= {"ok", "forced", "low_mass"}
    return [(result.id, result.score, result.explanation) for result in found]


def difference(one: Path, other: Path) -> float:
    mine, theirs = (load_model(folder, torch.device("cpu"), torch.float32).state_dict() for folder in (one, other))
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


QUICK = {("llama", "lora"), ("qwen3", "qlora"), ("gemma3", "full")}  # the others are alike, and slow


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=() if (family, kind) in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for kind in KINDS
    ],
)
def test_a_family_goes_the_whole_road(family: Family, kind: str, tmp_path: Path) -> None:
    adapter = KINDS[kind]
    if adapter.rank:
        pytest.importorskip("peft")
    if adapter.quantize != "none":
        pytest.importorskip("bitsandbytes")
    base = save_checkpoint(family, tmp_path / "base")
    config = DistillConfig(
        model=str(base),
        num_steps=2,
        batch_size=4,
        learning_rate=1e-2,
        num_warmup_steps=0,
        device="cpu",
        adapter=adapter,
    )
    distilled = distill(judgments(), QUERIES, DOCUMENTS, SHORT, tmp_path / "distilled", config).checkpoint
    assert (read_adapter(distilled) is not None) == (kind in ("lora", "qlora"))
    if kind != "qlora":  # the base is rounded for training, and the comparison would be with that one
        assert 1e-4 < difference(base, distilled) < 1.0
    assert ranked(distilled) == ranked(distilled)

    # Random weights never end an answer, so that all are worth -1; what moves the weights is the replay.
    tokens = ChatTokens(load_tokenizer(distilled))
    replay = tuple(examples_of(judgments(), QUERIES, DOCUMENTS, SHORT, tokens))
    whole = base if kind == "qlora" else distilled  # an adapter cannot be quantised
    few = replace(REFINE, algorithm="grpo", num_steps=2, num_samples=2, replay_weight=1.0, learning_rate=5e-3)
    data = replace(DATA, replay=replay)
    refined = refine(whole, data, SHORT, tmp_path / "refined", replace(few, adapter=adapter, dev_every=5))
    assert [step.num_rollouts for step in refined.history] == [8, 8]
    assert max(step.max_gap for step in refined.history) < (0.05 if kind == "qlora" else 1e-3)
    assert all(step.replay_loss > 0 for step in refined.history)
    if kind != "qlora":
        assert 1e-4 < difference(whole, refined.checkpoint) < 1.0
    # An adapter alone stands on the student, which may be an adapter itself.
    assert (read_adapter(refined.checkpoint) is not None) == (kind in ("lora", "qlora"))
    assert len(ranked(refined.checkpoint)) == 2
