"""The engine: packed passes equal plain ones, what is shared is read once, and nobody waits for a neighbour."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from tests.checkpoints import save_checkpoint
from whyrank.generators import Completion, Request, Sampling
from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.attention import packed_attention
from whyrank.generators.hf.attention_loops import attend_several_narrow
from whyrank.generators.hf.attention_products import Rule
from whyrank.generators.hf.engine import rounded_up
from whyrank.generators.hf.labels import inner_nodes
from whyrank.generators.hf.last_layer import LastLayer
from whyrank.generators.hf.memory import LABEL_ROWS
from whyrank.generators.hf.packing import Packing, Pool, Span, Store
from whyrank.template import Template

TEMPLATE = Template.load("almanac")
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def small_model(kind: str) -> PreTrainedModel:
    """Random models whose attention differs: plain, windows everywhere, windows and squeezed scores, sinks."""
    torch.manual_seed(5)
    models: dict[str, PreTrainedModel] = {
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "mistral": MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=5, attn_logit_softcapping=3.0)),
        "gpt-oss": GptOssForCausalLM(
            GptOssConfig(**SHAPE, sliding_window=5, num_local_experts=2, num_experts_per_tok=1)
        ),
    }
    model = models[kind]
    model.train(False)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.set_attn_implementation("eager")
    return model


KINDS = ("llama", "mistral", "gemma2", "gpt-oss")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_last_alone", [False, True], ids=["all tokens", "last tokens"])
@pytest.mark.parametrize("way", ["compiled", "plain torch", "narrow"])
def test_packed_passes_equal_plain_ones(
    kind: str, is_last_alone: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences behind a common prefix, one of them behind a longer one, and one alone: read together, then two
    tokens more for each, one by one. With `is_last_alone`, only each one's last token goes the whole way through the
    last layer. On other devices nothing is compiled; that is tried here, too. Where keys and values are kept
    in bfloat16, prompts are multiplied in it if the layer's rule allows it; three layers multiply its error."""
    model = small_model(kind)
    monkeypatch.setattr("whyrank.generators.hf.attention.multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("whyrank.generators.hf.attention.attention_loops.FEWEST_QUERIES", 1)
    num_narrow = 0

    def noted(queries: Tensor, span: Span, layer: int, rule: Rule) -> Tensor:
        nonlocal num_narrow
        num_narrow += 1
        return attend_several_narrow(queries, span, layer, rule)

    monkeypatch.setattr("whyrank.generators.hf.attention.attention_loops.attend_several_narrow", noted)
    if way == "plain torch":
        for module in ("attention", "packing"):
            monkeypatch.setattr(f"whyrank.generators.hf.{module}.is_compiled", lambda tensor: False)
    rng = random.Random(0)
    prefix, longer, *own = ([rng.randrange(3, 97) for _ in range(size)] for size in (7, 3, 4, 9, 6))
    more = [[rng.randrange(3, 97) for _ in range(2)] for _ in own]
    pool = Pool(4, 16, torch.bfloat16 if way == "narrow" else None)
    shared, further, last = Store(7), Store(3), LastLayer.of(model)
    stores = [pool.take() for _ in own]
    contexts: list[tuple[Store, ...]] = [(shared,), (shared, further), ()]
    found: list[list[Tensor]] = [[] for _ in own]

    def run(
        tokens: Sequence[Sequence[int]], stores: Sequence[Store], contexts: Sequence[tuple[Store, ...]]
    ) -> tuple[Tensor, ...]:
        spans, num_tokens = [], 0
        for ids, store, context in zip(tokens, stores, contexts, strict=True):
            num_wanted = len(ids) if not is_last_alone else 0 if store is shared or store is further else 1
            spans.append(Span(num_tokens, len(ids), store, store.length, context, num_wanted))
            num_tokens += len(ids)
        for ids, store in zip(tokens, stores, strict=True):
            store.length += len(ids)
        ends = [(span.start + span.num_tokens, span.num_wanted) for span in spans]
        places = torch.tensor([place for end, num in ends for place in range(end - num, end)])
        several, single = (spans, []) if any(len(ids) > 1 for ids in tokens) else ([], spans)
        index = last.index if is_last_alone else None
        with (
            torch.inference_mode(),
            packed_attention(model),
            last.only_at(places) if is_last_alone else nullcontext(),
        ):
            logits: Tensor = model(
                input_ids=torch.tensor([[token for ids in tokens for token in ids]]),
                position_ids=torch.tensor([[s.position + i for s in spans for i in range(s.num_tokens)]]),
                use_cache=False,
                logits_to_keep=places,
                packing=Packing(pool, single, several, torch.device("cpu"), index),
            ).logits[0]
        pieces: tuple[Tensor, ...] = logits.split([span.num_wanted for span in spans])
        return pieces

    first = run([prefix, longer, *own], [shared, further, *stores], [(), (shared,), *contexts])
    for number, logits in enumerate(first[2:]):
        found[number].append(logits)
    for step in range(2):
        for number, logits in enumerate(run([[ids[step]] for ids in more], stores, contexts)):
            found[number].append(logits)
    assert (num_narrow > 0) == (way == "narrow" and kind in ("llama", "mistral"))
    for number, ids in enumerate(own):
        before = [[], prefix, [*prefix, *longer]][len(contexts[number])]
        whole = [*before, *ids, *more[number]]
        with torch.inference_mode():
            plain = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
        logits = torch.cat(found[number])
        assert len(logits) == (3 if is_last_alone else len(ids) + 2)
        tolerance = 0.1 * float(plain.abs().max()) if way == "narrow" else 2e-5
        torch.testing.assert_close(logits, plain[-len(logits) :], atol=tolerance, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["compiled", "plain torch", "narrow"])
def test_nodes_of_a_trie_follow_their_ancestors_alone(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A common prefix, then a sequence behind it, then a trie behind both."""
    model = small_model(kind)
    monkeypatch.setattr("whyrank.generators.hf.attention.multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("whyrank.generators.hf.attention.attention_loops.FEWEST_QUERIES", 1)
    if way == "plain torch":
        for module in ("attention", "packing"):
            monkeypatch.setattr(f"whyrank.generators.hf.{module}.is_compiled", lambda tensor: False)
    nodes = ((5,), (5, 8), (5, 8, 9), (5, 9), (8,), (9,), (9, 5))
    pool = Pool(1, 16, torch.bfloat16 if way == "narrow" else None)
    shared, own, trie = Store(7), pool.take(), Store(len(nodes))
    texts = ([11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24], [node[-1] for node in nodes])
    found = torch.empty(0)
    for ids, store, context in zip(texts, (shared, own, trie), ((), (shared,), (shared, own)), strict=True):
        span = Span(0, len(ids), store, 0, context, len(ids), nodes if store is trie else ())
        store.length = len(ids)
        with torch.inference_mode(), packed_attention(model):
            found = model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([span.positions]),
                use_cache=False,
                packing=Packing(pool, [], [span], torch.device("cpu")),
            ).logits[0]
    for node, logits in zip(nodes, found, strict=True):
        with torch.inference_mode():
            plain = model(input_ids=torch.tensor([[*texts[0], *texts[1], *node]]), use_cache=False).logits[0, -1]
        tolerance = 0.1 * float(plain.abs().max()) if way == "narrow" else 2e-5
        torch.testing.assert_close(logits, plain, atol=tolerance, rtol=2e-5)


def test_prompts_go_only_partly_through_the_last_layer(generator: HfGenerator) -> None:
    """Of a whole prompt its last token does; of answers, one token a step; and only these ask in attention."""
    *_, before, last = generator.model.model.layers
    rows: dict[str, list[int]] = {"before": [], "last": []}
    handles = [
        layer.mlp.register_forward_hook(
            lambda module, given, found, name=name: rows[name].append(given[0].numel() // given[0].shape[-1])
        )
        for name, layer in (("before", before), ("last", last))
    ]
    requests = requests_about(generator, 4)
    try:
        with passes_of(generator) as sizes:
            answers(generator, requests)
    finally:
        for handle in handles:
            handle.remove()
    assert rows["before"] == [rounded_up(size) for size in sizes]
    assert rows["last"][:2] == [1, 4]  # the first is the engine's look at what this MLP returns
    assert sizes[0] > 4 * 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_works_for_wanted_tokens_alone(kind: str) -> None:
    """Its MLP (where that returns rows and nothing else) and attention's output see as many rows as are wanted, the
    layers before it all; afterwards the model is what it was."""
    model = small_model(kind)
    seen: dict[str, list[int]] = {}
    for number, layer in enumerate(model.model.layers):
        for name, module in (("mlp", layer.mlp), ("output", layer.self_attn.o_proj)):

            def note(
                module: torch.nn.Module, given: tuple[Tensor], found: object, key: str = f"{name} {number}"
            ) -> None:
                seen.setdefault(key, []).append(given[0].shape[1])

            module.register_forward_hook(note)
    ids, wanted = torch.arange(3, 11)[None], torch.tensor([2, 7])
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False).logits
        with LastLayer.of(model).only_at(wanted):
            narrow = model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits
        again = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(narrow, plain[:, wanted], atol=1e-5, rtol=1e-5)
    assert torch.equal(again, plain)
    is_mixture = kind == "gpt-oss"  # its MLP returns what its router chose, too
    counts = {key: sizes[-2] for key, sizes in seen.items()}
    assert counts["output 2"] == 2
    assert counts["mlp 2"] == (8 if is_mixture else 2)
    assert {counts[f"{name} {number}"] for name in ("mlp", "output") for number in (0, 1)} == {8}


def test_the_last_sequence_moves_into_a_slot_that_is_given_back() -> None:
    pool = Pool(3, 4)
    stores = [pool.take() for _ in range(3)]
    pool.prepare(0, torch.zeros(2, 1, 5), torch.zeros(2, 1, 6))
    for number, store in enumerate(stores):
        store.write(0, 0, torch.full((2, 2, 5), float(number)), torch.full((2, 2, 6), 10.0 + number))
        store.length = 2
    pool.give_back(stores[0])
    assert [pool.slot_of(store) for store in stores[1:]] == [1, 0]
    for slot, number in ((0, 2), (1, 1)):
        keys, values = pool.layers[0]
        assert (keys[slot, :, :2] == number).all()
        assert (values[slot, :, :2] == 10 + number).all()
    stores[2].write(0, 2, torch.full((2, 1, 5), 7.0), torch.full((2, 1, 6), 7.0))
    assert (pool.layers[0][0][0, :, 2] == 7).all()  # the moved sequence goes on where it lies now
    pool.give_back(stores[2])
    assert [pool.slot_of(store) for store in (stores[1],)] == [0]


# ---- through the generator -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> HfGenerator:
    folder = save_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return HfGenerator.load(folder, device="cpu", dtype="float32", batch_size=4)


def requests_about(
    generator: HfGenerator, num_documents: int, *, query: str = "why asks the fox", **sampling: Any
) -> list[Request]:
    rng = random.Random(query)
    words = ["quick", "brown", "document", "helps", "because", "10", "true"]
    drawn = Sampling(**{"max_tokens": 5, **sampling})
    return [
        TEMPLATE.render(
            query, " ".join(rng.choices(words, k=rng.randint(1, 30))), generator.tokens, sampling=drawn
        ).request
        for _ in range(num_documents)
    ]


@contextmanager
def passes_of(generator: HfGenerator) -> Iterator[list[int]]:
    """The number of tokens in every pass of the model."""
    sizes: list[int] = []

    def note(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        packing = kwargs["packing"]
        sizes.append(sum(span.num_tokens for span in (*packing.single, *packing.several)))
        assert kwargs["input_ids"].numel() == rounded_up(sizes[-1])

    handle = generator.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def answers(generator: HfGenerator, requests: Sequence[Request]) -> list[Completion]:
    found = dict(generator.generate(requests))
    return [found[index] for index in range(len(requests))]


def test_instruction_and_query_are_read_once_for_all_documents(generator: HfGenerator) -> None:
    requests = requests_about(generator, 4)
    parts = [generator.tokens.prompt_parts(request) for request in requests]
    num_shared = parts[0][1]
    assert num_shared > 5
    assert {tuple(prompt[:num_shared]) for prompt, _ in parts} == {tuple(parts[0][0][:num_shared])}
    with passes_of(generator) as sizes:
        answers(generator, requests)
    assert sizes[0] == num_shared + sum(len(prompt) - num_shared for prompt, _ in parts)


def test_a_prompt_is_read_once_for_all_its_samples(generator: HfGenerator) -> None:
    (request,) = requests_about(generator, 1)
    samples = [replace(request, sampling=Sampling(temperature=1.0, max_tokens=5, seed=seed)) for seed in range(4)]
    prompt = generator.tokens.prompt_ids(request)
    with passes_of(generator) as sizes:
        together = answers(generator, samples)
    assert sizes[0] == len(prompt) - 1 + 4  # the last token is asked anew by each
    alone = [answers(generator, [sample])[0] for sample in samples]
    assert [found.text for found in together] == [found.text for found in alone]
    assert len({found.text for found in together}) > 1
    for one, other in zip(together, alone, strict=True):
        assert one.label_probs == pytest.approx(other.label_probs, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_answers_do_not_depend_on_the_number_of_slots(generator: HfGenerator, batch_size: int) -> None:
    """Two queries, their requests in turn, some direct: as many slots as may be, each answer is the same."""
    explain = requests_about(generator, 6)
    other = requests_about(generator, 5, query="or why does the quick fox ask")
    direct = [replace(request, is_direct=True) for request in requests_about(generator, 3, query="10 or 2")]
    requests = [item for group in zip(explain, [*other, direct[0]], strict=True) for item in group] + direct[1:]
    expected = [answers(generator, [request])[0] for request in requests]
    found = answers(replace(generator, batch_size=batch_size), requests)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one, wanted in zip(found, expected, strict=True):
        assert one.label_probs == pytest.approx(wanted.label_probs, abs=1e-6)
        assert one.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_labels_of_many_answers_take_several_passes(generator: HfGenerator, batch_size: int) -> None:
    """The inner nodes of a trie are read for each: never more rows of logits than a few per slot and one whole trie."""
    template = replace(Template.load("explain-0-2"), labels="0-10")
    requests = [
        template.render("why", "brown " * number, generator.tokens, sampling=Sampling(max_tokens=3)).request
        for number in range(1, 9)
    ]
    (num_rows,) = {len(inner_nodes(generator.tokens.endings(request).labels)) - 1 for request in requests}
    assert num_rows >= 10
    expected = [answers(generator, [request])[0] for request in requests]
    logits: list[int] = []
    output = generator.model.get_output_embeddings()
    handle = output.register_forward_hook(lambda module, given, found: logits.append(found.shape[1]))
    try:
        found = answers(replace(generator, batch_size=batch_size), requests)
    finally:
        handle.remove()
    assert num_rows <= max(logits) <= LABEL_ROWS * min(batch_size, len(requests)) + num_rows
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one, wanted in zip(found, expected, strict=True):
        assert one.label_probs == pytest.approx(wanted.label_probs, abs=1e-6)


def test_several_threads_may_ask_one_model(generator: HfGenerator) -> None:
    """A pass changes the model for its time; the threads' passes take turns."""
    asked = [requests_about(generator, 5, query=query) for query in ("why", "how", "when", "where")]
    expected = [answers(generator, requests) for requests in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda requests: answers(generator, requests), asked * 5))
    assert [[one.token_ids for one in group] for group in found] == [
        [one.token_ids for one in group] for group in expected * 5
    ]


def test_a_model_s_threads_change_no_answer(generator: HfGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_about(generator, 6)
    expected = answers(generator, requests)
    before = torch.get_num_threads()
    monkeypatch.setattr("whyrank.generators.hf.threads.WORTH_A_THREAD", 1)
    torch.set_num_threads(2)
    try:
        found = answers(generator, requests)
    finally:
        torch.set_num_threads(before)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one, wanted in zip(found, expected, strict=True):
        assert one.label_probs == pytest.approx(wanted.label_probs, abs=1e-6)


def test_a_finished_answer_makes_room_at_once(generator: HfGenerator) -> None:
    """Three short answers pass through two slots while a long one is written in the other: the passes are as many as
    the long one needs alone, and short answers come before it."""
    (long,) = requests_about(generator, 1, query="the long one", max_tokens=12)
    short = requests_about(generator, 3, query="the short ones", max_tokens=1)
    with passes_of(generator) as sizes:
        alone = answers(generator, [long])
    num_alone = len(sizes)
    assert len(alone[0].token_ids or ()) == 12
    with passes_of(generator) as sizes:
        order = [index for index, _ in replace(generator, batch_size=2).generate([long, *short])]
    assert sorted(order[:3]) == [1, 2, 3]  # the long one comes last
    assert len(sizes) == num_alone


@pytest.mark.parametrize(("num_requests", "num_slots"), [(1, 1), (3, 3), (40, 32)])
def test_slots_are_no_more_than_answers(
    num_requests: int, num_slots: int, generator: HfGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool takes all its memory at its first write: few answers must not pay for many."""
    made: list[int] = []

    class Noted(Pool):
        def __init__(self, num_slots: int, capacity: int, dtype: torch.dtype | None = None) -> None:
            made.append(num_slots)
            super().__init__(num_slots, capacity, dtype)

    monkeypatch.setattr("whyrank.generators.hf.engine.Pool", Noted)
    found = answers(replace(generator, batch_size=32), requests_about(generator, num_requests))
    assert len(found) == num_requests
    assert max(made) == num_slots


def test_narrow_answers_do_not_depend_on_the_number_of_slots(tmp_path: Path) -> None:
    """With 8-bit products keys and values are kept in bfloat16, wherever they lie: in the pool, or shared."""
    folder = save_checkpoint("llama", tmp_path)
    exact = HfGenerator.load(folder, device="cpu", dtype="float32")
    narrow = HfGenerator.load(folder, device="cpu", dtype="int8")
    requests = [replace(request, is_direct=True) for request in requests_about(exact, 6)]
    requests += requests_about(exact, 6, query="why the quick fox")
    wanted = answers(narrow, requests)
    stores: list[torch.dtype] = []
    real = Store.write

    def noted(self: Store, layer: int, *given: Any) -> None:
        real(self, layer, *given)
        stores.append(self.layers[layer][0].dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", noted)
        found = answers(replace(narrow, batch_size=2), requests)
    assert set(stores) == {torch.bfloat16}
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    for one, other, right in zip(found, wanted, answers(exact, requests), strict=True):
        assert one.label_probs == pytest.approx(other.label_probs, rel=1e-3, abs=1e-6)
        if one.token_ids == right.token_ids:
            assert one.label_probs == pytest.approx(right.label_probs, rel=0.3, abs=1e-3)


def test_nothing_is_left_behind(generator: HfGenerator) -> None:
    """The model is as it was: a plain forward works, and gives what it gave before."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        before = generator.model(input_ids=ids).logits
        answers(generator, requests_about(generator, 2))
        after = generator.model(input_ids=ids).logits
    assert torch.equal(before, after)


def test_passes_have_few_lengths_and_are_little_longer_than_needed() -> None:
    lengths = [rounded_up(number) for number in range(1, 2001)]
    assert all(number <= length < number + 32 for number, length in enumerate(lengths, 1))
    assert lengths[:32] == list(range(1, 33))
    assert len(set(lengths)) == 32 + 6 + 59  # by ones to 32, by 16 to 128, by 32 to 2,016
