"""The hf backend against a plain forward: one sequence at a time, no cache, no padding, float32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
)

from tests.checkpoints import FAMILIES, NOT_SPECIAL_BUT_ADDED, SPECIAL, Family, save_checkpoint
from whyrank.errors import GenerationError, InputError, TemplateMismatch, UnsupportedModel
from whyrank.generators import Request, Sampling
from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.labels import label_log_probs, prefixes_to_visit
from whyrank.generators.hf.load import load_model, weights_digest
from whyrank.records import Mode
from whyrank.template import Template

MAX_NEW_TOKENS = 7


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    return {family: save_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def generator(request: pytest.FixtureRequest, checkpoints: dict[Family, Path]) -> HfGenerator:
    return HfGenerator.load(checkpoints[request.param], device="cpu", dtype="float32", batch_size=4)


def requests_for(generator: HfGenerator, template: Template, modes: Sequence[Mode], seed: int = 0) -> list[Request]:
    """Pairs of very different lengths."""
    rng = random.Random(seed)
    words = ["why", "fox", "asks", "quick", "relevance", "or", "document", "helps", "10", "because"]
    sampling = Sampling(max_tokens=MAX_NEW_TOKENS)
    rendered = []
    for index in range(9):
        query = " ".join(rng.choices(words, k=rng.randint(1, 6)))
        document = " ".join(rng.choices(words, k=rng.randint(1, 60)))
        mode = modes[index % len(modes)]
        rendered.append(template.render(query, document, generator.tokens, mode=mode, sampling=sampling).request)
    return rendered


def plain_completion(generator: HfGenerator, request: Request) -> tuple[list[int], list[float]]:
    """Greedy explanation tokens and label probabilities by repeated full forwards of a single row."""

    def log_probs(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = generator.model(input_ids=torch.tensor([list(ids)])).logits[0]
        return torch.log_softmax(logits.double(), dim=-1)

    ids = generator.tokens.prompt_ids(request)
    explanation: list[int] = []
    while not request.is_direct and len(explanation) < request.sampling.max_tokens:
        token = int(log_probs(ids + explanation)[-1].argmax())
        if token in generator.eos_ids:
            break
        explanation.append(token)
    endings = generator.tokens.endings(request)
    context = [*ids, *explanation, *endings.prompt]
    probs = []
    for label in endings.labels:
        found = log_probs([*context, *label])
        log_prob = sum(float(found[len(context) - 1 + i, token]) for i, token in enumerate(label))
        probs.append(float(torch.tensor(log_prob).double().exp()))
    return explanation, probs


@pytest.mark.parametrize("labels", ["0-2", "0-10", ("false", "true")])
def test_equals_a_plain_forward(generator: HfGenerator, labels: str | tuple[str, ...]) -> None:
    template = replace(Template.load("explain-0-2"), labels=labels)
    requests = requests_for(generator, template, ("explain", "explain", "direct"))
    completions = dict(generator.generate(requests))
    assert sorted(completions) == list(range(len(requests)))
    for index, request in enumerate(requests):
        explanation, probs = plain_completion(generator, request)
        completion = completions[index]
        assert completion.token_ids == tuple(explanation)
        assert completion.label_probs == pytest.approx(probs, abs=1e-5, rel=1e-3)


def test_does_not_depend_on_batch_order_or_company(checkpoints: dict[Family, Path]) -> None:
    template = Template.load("explain-0-2")
    base = HfGenerator.load(checkpoints["qwen3"], device="cpu", dtype="float32", batch_size=4)
    requests = requests_for(base, template, ("explain", "direct"))
    expected = dict(base.generate(requests))
    order = list(range(len(requests)))
    random.Random(3).shuffle(order)
    for batch_size in (1, 3, 16):
        other = replace(base, batch_size=batch_size)
        shuffled = dict(other.generate([requests[i] for i in order]))
        for position, i in enumerate(order):
            assert shuffled[position].token_ids == expected[i].token_ids
            assert shuffled[position].label_probs == pytest.approx(expected[i].label_probs, abs=1e-6, rel=1e-4)


def test_samples_do_not_depend_on_company_but_on_the_seed(checkpoints: dict[Family, Path]) -> None:
    base = HfGenerator.load(checkpoints["llama"], device="cpu", dtype="float32", batch_size=4)
    requests = [
        replace(request, sampling=Sampling(temperature=1.0, max_tokens=MAX_NEW_TOKENS, seed=seed))
        for seed, request in enumerate(requests_for(base, Template.load("explain-0-2"), ("explain",)))
    ]
    together = dict(base.generate(requests))
    for index, request in enumerate(requests):
        alone = dict(base.generate([request]))[0]
        assert alone.token_ids == together[index].token_ids
        assert alone.logprobs == pytest.approx(together[index].logprobs, abs=1e-4)
    reseeded = [replace(r, sampling=replace(r.sampling, seed=r.sampling.seed + 100)) for r in requests]
    assert [c.token_ids for _, c in sorted(base.generate(reseeded))] != [
        c.token_ids for _, c in sorted(together.items())
    ]


def test_logprobs_are_those_of_a_plain_forward(generator: HfGenerator) -> None:
    request = requests_for(generator, Template.load("explain-0-2"), ("explain",))[0]
    completion = dict(generator.generate([request]))[0]
    assert completion.token_ids is not None
    prompt = generator.tokens.prompt_ids(request)
    with torch.inference_mode():
        logits = generator.model(input_ids=torch.tensor([[*prompt, *completion.token_ids]])).logits[0].double()
    expected = torch.log_softmax(logits, dim=-1)
    values = [float(expected[len(prompt) - 1 + i, token]) for i, token in enumerate(completion.token_ids)]
    assert completion.logprobs == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_texts_stay_text(family: Family, checkpoints: dict[Family, Path]) -> None:
    generator = HfGenerator.load(checkpoints[family], device="cpu", dtype="float32")
    template = Template.load("explain-0-2")
    backend = generator.tokens.tokenizer.backend_tokenizer
    structural = {backend.token_to_id(text) for text in SPECIAL[family] + NOT_SPECIAL_BUT_ADDED[family]}

    def num_structural(query: str, document: str) -> int:
        ids = generator.tokens.prompt_ids(template.render(query, document, generator.tokens).request)
        return sum(token in structural for token in ids)

    clean = num_structural("why", "because")
    assert clean > 0
    for text in SPECIAL[family] + NOT_SPECIAL_BUT_ADDED[family]:
        for hostile in (text, f"a{text}b", f"{text}{text}", f" {text} \n{text}"):
            assert num_structural(hostile, hostile) == clean
            spelled = generator.tokens.encode_text(hostile)
            assert backend.decode(list(spelled), skip_special_tokens=False) == hostile


def test_the_explanation_ends_at_the_separator_and_the_separator_is_not_part_of_it(
    checkpoints: dict[Family, Path],
) -> None:
    """A request whose stop is a piece of what the model writes anyway: the text before it is kept, no more."""
    generator = HfGenerator.load(checkpoints["llama"], device="cpu", dtype="float32", batch_size=2)
    requests = requests_for(generator, Template.load("explain-0-2"), ("explain",), seed=1)
    written = {index: c.token_ids or () for index, c in generator.generate(requests)}
    pieces = {index: [generator.tokens.decode([token]) for token in ids] for index, ids in written.items()}
    chosen, cut = next(
        (index, cut)
        for index, texts in sorted(pieces.items())
        for cut in range(1, len(texts))
        if "".join(texts[: cut + 1]).isascii() and texts[cut] not in "".join(texts[:cut])
    )
    free, full, stop = requests[chosen], written[chosen], pieces[chosen][cut]
    before = "".join(pieces[chosen][:cut])
    stopped = dict(generator.generate([replace(free, stops=(stop,)), free]))
    assert (stopped[0].text, stopped[0].finish_reason) == (before, "stop")
    assert stopped[1].token_ids == full
    context = [*generator.tokens.prompt_ids(free), *full[:cut]]
    endings = generator.tokens.endings(free)
    with torch.inference_mode():
        ids = torch.tensor([[*context, *endings.prompt, *endings.labels[0]]])
        found = torch.log_softmax(generator.model(input_ids=ids).logits[0].double(), dim=-1)
    start = len(context) + len(endings.prompt) - 1
    expected = sum(float(found[start + i, token]) for i, token in enumerate(endings.labels[0]))
    assert stopped[0].label_probs is not None
    assert stopped[0].label_probs[0] == pytest.approx(float(torch.tensor(expected).double().exp()), abs=1e-6, rel=1e-3)


def test_rows_that_finish_early_do_not_narrow_a_sliding_window(checkpoints: dict[Family, Path]) -> None:
    """Gemma 3 attends to 32 tokens; its neighbours write 30 more before the short row's label is read."""
    generator = HfGenerator.load(checkpoints["gemma3"], device="cpu", dtype="float32", batch_size=4)
    base = requests_for(generator, Template.load("explain-0-2"), ("explain",))[:4]
    caps = (3, 30, 30, 30)
    requests = [replace(r, sampling=Sampling(max_tokens=cap)) for r, cap in zip(base, caps, strict=True)]
    together = dict(generator.generate(requests))
    for index, request in enumerate(requests):
        explanation, probs = plain_completion(generator, request)
        assert together[index].token_ids == tuple(explanation)
        assert together[index].label_probs == pytest.approx(probs, abs=1e-9, rel=1e-3)


def test_a_stop_inside_a_token_keeps_the_text_before_it(checkpoints: dict[Family, Path]) -> None:
    """The stop is the second letter of a token: its first letter is kept, spelled anew, and the label follows it."""
    generator = HfGenerator.load(checkpoints["qwen3"], device="cpu", dtype="float32", batch_size=2)
    free = requests_for(generator, Template.load("explain-0-2"), ("explain",))[0]
    written = dict(generator.generate([free]))[0]
    assert written.text.startswith(" because")
    assert len(written.token_ids or ()) == MAX_NEW_TOKENS
    cut = dict(generator.generate([replace(free, stops=("cause",), label_prompt="\n\nRelevance Label:")]))[0]
    assert (cut.text, cut.finish_reason, cut.logprobs) == (" be", "stop", None)
    assert cut.token_ids == generator.tokens.encode_text(" be")
    context = [*generator.tokens.prompt_ids(free), *cut.token_ids, *generator.tokens.endings(free).prompt]
    label = generator.tokens.endings(free).labels[0]
    with torch.inference_mode():
        found = torch.log_softmax(generator.model(input_ids=torch.tensor([[*context, *label]])).logits[0].double(), -1)
    log_prob = sum(float(found[len(context) - 1 + i, token]) for i, token in enumerate(label))
    assert cut.label_probs is not None
    assert cut.label_probs[0] == pytest.approx(float(torch.tensor(log_prob).double().exp()), rel=1e-3, abs=1e-9)


def test_a_request_that_does_not_fit_fails_alone(checkpoints: dict[Family, Path]) -> None:
    generator = HfGenerator.load(checkpoints["llama"], device="cpu", dtype="float32", batch_size=2)
    good = requests_for(generator, Template.load("explain-0-2"), ("direct",))[0]
    too_long = replace(good, is_direct=False, sampling=Sampling(max_tokens=5000))
    completions = dict(generator.generate([too_long, good]))
    assert isinstance(completions[0].error, GenerationError)
    assert "holds 2048" in str(completions[0].error)
    assert completions[0].label_probs is None
    assert completions[1].error is None


def test_reads_a_stream_ahead_by_a_bounded_amount(checkpoints: dict[Family, Path]) -> None:
    generator = HfGenerator.load(checkpoints["llama"], device="cpu", dtype="float32", batch_size=1)
    request = requests_for(generator, Template.load("explain-0-2"), ("direct",))[0]
    num_taken = 0

    def endless() -> object:
        nonlocal num_taken
        while True:
            num_taken += 1
            yield request

    index, completion = next(generator.generate(endless()))  # type: ignore[arg-type]
    assert completion.error is None
    assert index < num_taken <= 8


def test_two_labels_with_one_beginning_need_a_terminator(checkpoints: dict[Family, Path]) -> None:
    generator = HfGenerator.load(checkpoints["llama"], device="cpu", dtype="float32")
    request = requests_for(generator, Template.load("explain-0-2"), ("direct",))[0]
    unterminated = replace(request, labels=(" a", " ab", " abc"))
    with pytest.raises(TemplateMismatch, match="terminator"):
        list(generator.generate([unterminated]))


def test_label_trie_by_hand() -> None:
    """Labels 1, 10 and 2 with terminator 9: P(1)=.5*.6, P(10)=.5*.4*.9, P(2)=.3*.2."""
    from math import exp, log

    labels = ((1, 9), (1, 0, 9), (2, 9))
    assert prefixes_to_visit(labels) == ((1, 0), (2,))
    after = {
        (): {1: log(0.5), 2: log(0.3)},
        (1,): {9: log(0.6), 0: log(0.4)},
        (1, 0): {9: log(0.9)},
        (2,): {9: log(0.2)},
    }
    assert [exp(p) for p in label_log_probs(labels, after)] == pytest.approx([0.3, 0.18, 0.06])


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    T5Config(d_model=8, num_layers=1, num_heads=1, d_ff=8, vocab_size=8).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModel, match="t5 is an encoder-decoder"):
        load_model(tmp_path / "t5", cpu, torch.float32)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=2, num_hidden_layers=1))
    mamba.save_pretrained(tmp_path / "mamba")
    with pytest.raises(UnsupportedModel, match="mamba"):
        load_model(tmp_path / "mamba", cpu, torch.float32)
    with pytest.raises(InputError, match="expected a folder with a Hugging Face checkpoint"):
        load_model(tmp_path / "nothing", cpu, torch.float32)


def test_models_that_cannot_write_are_refused_by_name(tmp_path: Path) -> None:
    """A classifier's body would load with a random head and rank at random."""
    shape: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForSequenceClassification(LlamaConfig(**shape, pad_token_id=0)).save_pretrained(tmp_path / "classifier")
    with pytest.raises(UnsupportedModel, match="LlamaForSequenceClassification cannot continue a text"):
        load_model(tmp_path / "classifier", torch.device("cpu"), torch.float32)
    headless = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    headless.save_pretrained(tmp_path / "headless")
    weights = load_file(tmp_path / "headless" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "headless" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lack 1 tensors of LlamaForCausalLM, the first is lm_head\.weight"):
        load_model(tmp_path / "headless", torch.device("cpu"), torch.float32)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"safetensors"):
        load_model(tmp_path, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("num_values", [1, 65, 2**24 + 2, 28_311_552, 155_582_464])
def test_the_digest_sees_the_first_and_the_last_value_of_tensors_of_any_size(num_values: int) -> None:
    def digest(first: float, last: float) -> str:
        values = torch.zeros(num_values, dtype=torch.bfloat16)  # the last one is a table of 151,936 tokens by 1,024
        values[0], values[-1] = first, last
        network = torch.nn.Module()
        network.register_parameter("table", torch.nn.Parameter(values))
        return weights_digest(cast(PreTrainedModel, network))

    found = {digest(0.0, 0.0), digest(1.0, 1.0), *([digest(1.0, 0.0), digest(0.0, 1.0)] if num_values > 1 else [])}
    assert len(found) == (4 if num_values > 1 else 2)
