"""What a student in training is drawn, weighed, ranked and kept by; and that damage to a state costs steps only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tests.checkpoints import FAMILIES, Family, save_checkpoint
from tests.test_training import (
    ALMANAC,
    CONFIG,
    DOCUMENTS,
    QUERIES,
    TAUGHT,
    Stopped,
    assert_same_run,
    judgments,
    same_but_for_the_clock,
    stop_after,
    weights,
)
from whyrank import Reranker
from whyrank.checkpoint import read_card
from whyrank.errors import InputError
from whyrank.generators.opening import ModelOptions
from whyrank.records import Qrel, ScoredDocument
from whyrank.training.config import AdapterConfig, DistillConfig
from whyrank.training.curves import draw_curves
from whyrank.training.distill import Distilled, Step, distill
from whyrank.training.examples import Example
from whyrank.training.sampling import batches, frequencies, shares_of_sources
from whyrank.training.validation import DevSet

SHORT = replace(CONFIG, num_steps=14, save_every=4, batch_size=3)
CPU = ModelOptions(device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(
    out: Path, config: DistillConfig, on_step: Callable[[Step], None] | None = None, dev: DevSet | None = None
) -> Distilled:
    return distill(judgments(), QUERIES, DOCUMENTS, ALMANAC, out, config, dev=dev, on_step=on_step)


# ---- drawing ------------------------------------------------------------------------------------------------


def test_frequencies_by_hand() -> None:
    """Three 0s and a 1: balanced, the 1 is drawn as often as the 0s together; the mean stays 1."""
    assert frequencies("0001", [1, 1, 1, 1], is_balanced=False) == [1, 1, 1, 1]
    assert frequencies("0001", [1, 1, 1, 1], is_balanced=True) == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    # Within the 0s the first counts double: 2/4, 1/4, 1/4 of one half of four draws.
    assert frequencies("0001", [2, 1, 1, 5], is_balanced=True) == pytest.approx([1, 1 / 2, 1 / 2, 2])


def test_shares_of_sources_by_hand() -> None:
    """3 : 1 over 10 and 20 judgments: 10 × 0.3 = 3 and 20 × 0.05 = 1."""
    assert shares_of_sources([10, 20], [3, 1]) == pytest.approx([0.3, 0.05])
    with pytest.raises(InputError, match=r"one weight per judgments file \(2\), found 1"):
        shares_of_sources([10, 20], [3])
    with pytest.raises(InputError, match="source weights above 0"):
        shares_of_sources([10, 20], [3, 0])


def some_examples(num_queries: int = 6, num_documents: int = 5) -> list[Example]:
    return [
        Example((q, q, 10 + d, *range(20, 20 + q + d)), 3, num_shared=2)
        for q in range(num_queries)
        for d in range(num_documents)
    ]


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_every_epoch_has_every_example_once(group_size: int) -> None:
    examples = some_examples()
    config = replace(CONFIG, batch_size=6, group_size=group_size)
    drawn: Counter[Example] = Counter()
    for batch in batches(examples, [1.0] * 30, config):
        drawn.update(batch)
        if drawn.total() >= 60:
            break
    assert set(drawn) == set(examples)
    assert set(drawn.values()) == {2}


def test_groups_share_their_beginning() -> None:
    """Five documents of a query, in groups of up to 5: every batch of 5 is about one query."""
    config = replace(CONFIG, batch_size=5, group_size=5)
    for batch in islice(batches(some_examples(), [1.0] * 30, config), 12):
        assert len(batch) == 5
        assert len({example.ids[:2] for example in batch}) == 1


def test_draws_follow_the_frequencies_and_the_order_can_be_gone_on_with() -> None:
    """2.5 draws per epoch are 2 or 3, 250 in 100 epochs up to chance (standard deviation 5); 0.5 likewise."""
    examples = some_examples(2, 1)
    config = replace(CONFIG, batch_size=1)
    order = list(islice(batches(examples, [2.5, 0.5], config), 300))
    counts = Counter(batch[0] for batch in order)
    assert counts[examples[0]] == pytest.approx(250, abs=25)
    assert counts[examples[1]] == 300 - counts[examples[0]]
    assert list(islice(batches(examples, [2.5, 0.5], config, num_done=123), 177)) == order[123:]


def test_long_examples_are_left_out_and_counted(tmp_path: Path) -> None:
    whole = train(tmp_path / "all", replace(SHORT, num_steps=1))
    some = train(tmp_path / "some", replace(SHORT, num_steps=1, max_tokens=30))
    assert whole.num_too_long == 0
    assert 0 < some.num_examples < whole.num_examples
    assert some.num_examples + some.num_too_long == whole.num_examples == 2 * len(TAUGHT)
    with pytest.raises(InputError, match="expected judgments with labels to learn from"):
        train(tmp_path / "none", replace(SHORT, max_tokens=3))


# ---- dev rankings -------------------------------------------------------------------------------------------


def dev_set() -> DevSet:
    """Both queries with both documents, the worse one first."""
    run = {
        query_id: [ScoredDocument(query_id, doc_id, rank, -rank) for rank, doc_id in enumerate(docs, 1)]
        for query_id, docs in {"fern": ["yeast", "air"], "bread": ["air", "yeast"]}.items()
    }
    qrels = tuple(Qrel(query_id, doc_id, int(label)) for (query_id, doc_id), (label, _) in TAUGHT.items())
    return DevSet(tuple(QUERIES.values()), DOCUMENTS, run, qrels)


def test_the_best_student_is_kept(tmp_path: Path) -> None:
    """A student that learns ranks better; a late explosion of the learning rate must not reach the checkpoint."""
    config = replace(CONFIG, eval_every=10, num_steps=60)
    done = train(tmp_path / "good", config, dev=dev_set())
    ranked = {step.step: step.dev_ndcg for step in done.history if step.dev_ndcg is not None}
    assert list(ranked) == [10, 20, 30, 40, 50, 60]
    assert ranked[done.best_step] == 1.0  # both queries in order: by definition of nDCG
    assert done.best_step == next(step for step, value in ranked.items() if value == 1.0)
    assert read_card(done.checkpoint / "whyrank.json").training["best_step"] == done.best_step
    # The checkpoint holds the weights after that step: those of a run that ends there, on the same schedule.
    cut: list[dict[str, torch.Tensor]] = []
    again = tmp_path / "again"
    saving = replace(config, save_every=done.best_step)
    with pytest.raises(Stopped):
        train(again, saving, stop_after(done.best_step + 1), dev=dev_set())
    cut.append(weights(again / "state"))
    kept = weights(done.checkpoint)
    assert all(torch.equal(kept[name], value) for name, value in cut[0].items() if name in kept)
    assert set(cut[0]) <= set(kept)


def test_training_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    config = replace(CONFIG, eval_every=2, num_steps=90, patience=3, learning_rate=1e-9)
    done = train(tmp_path / "out", config, dev=dev_set())
    # Nothing is learned: the first ranking stays the best, and three more are waited for.
    assert (done.best_step, done.history[-1].step) == (2, 8)


def test_dev_rankings_change_nothing_about_the_training(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", SHORT)
    ranked = train(tmp_path / "ranked", replace(SHORT, eval_every=5), dev=dev_set())
    assert [step.loss for step in ranked.history] == [step.loss for step in plain.history]


def test_a_dev_query_without_candidates_is_refused() -> None:
    with pytest.raises(InputError, match="candidates for every dev query that is judged, found none for 'moss'"):
        replace(dev_set(), qrels=(Qrel("moss", "air", 1),))


# ---- resuming -----------------------------------------------------------------------------------------------

FULL = replace(SHORT, eval_every=2, group_size=2, is_balanced=True, label_weight=2.0, optimizer="muon")


def test_a_damaged_state_costs_steps_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every file of the newest state cut short in turn, at a place drawn anew: the one before it is gone on from."""
    whole = train(tmp_path / "whole", FULL, dev=dev_set())
    rng = Random(0)
    names = ("model.safetensors", "optimizer.safetensors", "best.safetensors", "state.json")
    for name in names:
        out = tmp_path / name
        with pytest.raises(Stopped):
            train(out, FULL, stop_after(11), dev=dev_set())
        assert {path.name for path in (out / "state").iterdir()} == set(names)
        damaged = out / "state" / name
        damaged.write_bytes(damaged.read_bytes()[: rng.randrange(damaged.stat().st_size)])
        steps: list[int] = []
        resumed = train(out, FULL, lambda step, steps=steps: steps.append(step.step), dev=dev_set())  # type: ignore[misc]
        assert steps[0] == 5  # states were saved after steps 4 and 8
        assert "is damaged" in caplog.text
        caplog.clear()
        assert_same_run(resumed, whole)
        assert resumed.best_step == whole.best_step


def test_two_damaged_states_cost_all_steps(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", FULL, dev=dev_set())
    with pytest.raises(Stopped):
        train(tmp_path / "out", FULL, stop_after(11), dev=dev_set())
    for state in ("state", ".state.old"):
        (tmp_path / "out" / state / "model.safetensors").write_bytes(b"")
    assert_same_run(train(tmp_path / "out", FULL, dev=dev_set()), whole)


def test_metrics_and_curves_are_those_of_a_run_that_was_never_stopped(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", FULL, dev=dev_set())
    with pytest.raises(Stopped):
        train(tmp_path / "out", FULL, stop_after(11), dev=dev_set())
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 11  # as it went
    resumed = train(tmp_path / "out", FULL, dev=dev_set())
    assert same_but_for_the_clock(resumed) == same_but_for_the_clock(whole)
    pictures = [(run.checkpoint / "curves.svg").read_text() for run in (resumed, whole)]
    assert pictures[0] == pictures[1]
    assert "dev nDCG@10" in pictures[0]
    assert "loss (nats per answer token)" in pictures[0]


def test_curves_are_means_of_neighbouring_steps(tmp_path: Path) -> None:
    draw_curves(tmp_path / "none.svg", {"nothing": {}})
    assert not (tmp_path / "none.svg").exists()
    for name in ("one.svg", "two.svg"):
        draw_curves(tmp_path / name, {"loss": {step: 1 / step for step in range(1, 2001)}})
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


# ---- adapters -----------------------------------------------------------------------------------------------


def adapted(base: Path, **more: Any) -> DistillConfig:
    adapter = AdapterConfig(rank=8, **more)
    return replace(SHORT, model=str(base), num_steps=6, learning_rate=0.05, adapter=adapter, modes=("explain",))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_and_its_merged_weights_rank_alike(family: Family, tmp_path: Path) -> None:
    base = save_checkpoint(family, tmp_path / "base")
    done = train(tmp_path / "adapter", adapted(base))
    assert 0 < done.num_trained_parameters < done.num_parameters / 2
    assert done.history[-1].loss < done.history[0].loss
    assert not (done.checkpoint / "model.safetensors").exists()
    merged = train(tmp_path / "merged", adapted(base, is_merged=True))
    assert (merged.checkpoint / "model.safetensors").exists()
    assert not (merged.checkpoint / "adapter_config.json").exists()
    rankings = [
        Reranker.load(str(folder), options=CPU).rank(QUERIES["fern"].text, list(DOCUMENTS.values()))
        for folder in (done.checkpoint, merged.checkpoint, base)
    ]
    scores = [[result.score for result in ranking] for ranking in rankings]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert scores[0] != pytest.approx(scores[2], abs=1e-2)


@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_an_adapters_training_can_be_stopped(quantize: str, tmp_path: Path) -> None:
    if quantize == "4bit":
        pytest.importorskip("bitsandbytes")
    base = save_checkpoint("llama", tmp_path / "base")
    config = replace(adapted(base, quantize=quantize), save_every=2, eval_every=2)
    whole = train(tmp_path / "whole", config, dev=dev_set())
    with pytest.raises(Stopped):
        train(tmp_path / "out", config, stop_after(5), dev=dev_set())
    assert all("lora" in name for name in weights(tmp_path / "out" / "state"))
    resumed = train(tmp_path / "out", config, dev=dev_set())
    assert same_but_for_the_clock(resumed) == same_but_for_the_clock(whole)
    name = "adapter_model.safetensors"
    assert (resumed.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes()
