"""Distillation: what is learned, token by token, that it is learned, and that a killed run loses nothing."""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from whyrank import Reranker
from whyrank.checkpoint import CARD_NAME, read_card
from whyrank.errors import InputError
from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.opening import ModelOptions
from whyrank.generators.scripted import Scripted, ScriptedAnswer
from whyrank.judging import Judge
from whyrank.records import Document, Judgment, Mode, Query
from whyrank.template import Template
from whyrank.training.checkpoints import atomic_folder
from whyrank.training.config import DistillConfig, TinyConfig
from whyrank.training.distill import Distilled, Step, distill
from whyrank.training.examples import Example, examples_of, to_strand
from whyrank.training.optimizers import optimizers_of
from whyrank.training.packing import Strand
from whyrank.training.steps import Update, learning_rate_at, update
from whyrank.training.tiny import tiny_model, tiny_tokenizer

ALMANAC = Template.load("almanac")
QUERIES = {
    "fern": Query("fern", "my fern turns brown and dry"),
    "bread": Query("bread", "the bread is flat and dense"),
}
DOCUMENTS = {
    "air": Document("air", "Leaves lose water to dry air."),
    "yeast": Document("yeast", "Cold dough rises slowly.", title="Yeast"),
}
TAUGHT = {
    ("fern", "air"): ("2", "Dry air takes the water that brown leaves lack."),
    ("fern", "yeast"): ("0", "Dough has nothing to do with a fern."),
    ("bread", "air"): ("0", "Leaves are not bread."),
    ("bread", "yeast"): ("1", "Slow rising is one cause of dense bread, others remain.\nLabel: 2"),
}
TINY = TinyConfig(vocab_size=400, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128, max_positions=192)
CONFIG = DistillConfig(
    modes=("explain", "direct"),
    num_steps=90,
    batch_size=8,
    learning_rate=5e-3,
    num_warmup_steps=5,
    precision="float32",
    device="cpu",
    save_every=1000,
    tiny=TINY,
)
CPU = ModelOptions(device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def judgments(taught: Mapping[tuple[str, str], tuple[str, str]] = TAUGHT) -> list[Judgment]:
    """What a scripted teacher says; an empty label is an answer that cannot be read."""
    pairs = [(QUERIES[query_id], DOCUMENTS[doc_id]) for query_id, doc_id in taught]
    answers = [
        ScriptedAnswer(query.text, document.full_text, explanation=why, label=label)
        if label
        else ScriptedAnswer(query.text, document.full_text, answer=why)
        for (query, document), (label, why) in zip(pairs, taught.values(), strict=True)
    ]
    found = [judgment for _, judgment in Judge(ALMANAC, Scripted(answers)).judge(pairs)]
    # The scripted teacher stops at a label line; a teacher that escapes it may go on.
    return [
        replace(judgment, explanation=taught[(judgment.query_id, judgment.doc_id)][1] if judgment.label else "")
        for judgment in found
    ]


def train(out: Path, config: DistillConfig, on_step: Callable[[Step], None] | None = None) -> Distilled:
    return distill(judgments(), QUERIES, DOCUMENTS, ALMANAC, out, config, on_step=on_step)


# ---- examples -----------------------------------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every character of plain English is one token, because there is no room for merges."""
    return tiny_tokenizer(["a"], vocab_size=3 + 256)


def by_hand(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Byte-level BPE writes a space as Ġ and a newline as Ċ."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[{" ": "Ġ", "\n": "Ċ"}.get(letter, letter)] for letter in text]


def test_examples_by_hand() -> None:
    tokenizer = byte_tokenizer()
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    taught = judgments({("bread", "yeast"): ("1", "So.")})
    explain, direct = examples_of(taught, QUERIES, DOCUMENTS, ALMANAC, ChatTokens(tokenizer), ("explain", "direct"))
    asked = "Query: the bread is flat and dense\n\nDocument: Yeast\nCold dough rises slowly.\n"
    prompt = [begin, *by_hand(tokenizer, asked + "Explanation:")]
    assert list(explain.ids) == [*prompt, *by_hand(tokenizer, " So.\nLabel: 1"), end]
    assert explain.num_prompt == len(prompt)
    prompt = [begin, *by_hand(tokenizer, asked)]
    assert list(direct.ids) == [*prompt, *by_hand(tokenizer, "Label: 1"), end]
    assert direct.num_prompt == len(prompt)


def test_label_first_examples_by_hand() -> None:
    """The prompt of direct ranking, the label at once, then the explanation; all of it carries loss."""
    tokenizer = byte_tokenizer()
    taught = judgments({("bread", "yeast"): ("1", "So.")})
    (example,) = examples_of(
        taught, QUERIES, DOCUMENTS, ALMANAC, ChatTokens(tokenizer), ("direct",), is_label_first=True
    )
    asked = "Query: the bread is flat and dense\n\nDocument: Yeast\nCold dough rises slowly.\n"
    prompt = [tokenizer.bos_token_id, *by_hand(tokenizer, asked)]
    answer = by_hand(tokenizer, "Label: 1\nExplanation: So.")
    assert list(example.ids) == [*prompt, *answer, tokenizer.eos_token_id]
    assert example.num_prompt == len(prompt)


def test_word_dropout_leaves_out_words_of_the_texts_alone() -> None:
    """With one byte per token the prompt can be read back: what is left of both texts is theirs, in order."""
    tokenizer = byte_tokenizer()
    tokens = ChatTokens(tokenizer)
    taught = judgments({("bread", "yeast"): ("1", "So.")}) * 200
    read = [tokens.decode(e.ids) for e in examples_of(taught, QUERIES, DOCUMENTS, ALMANAC, tokens, word_dropout=0.3)]
    asked = re.compile(r"Query: (?P<query>.*)\n\nDocument: (?P<document>.*)\nExplanation: So\.\nLabel: 1")
    texts = {"query": QUERIES["bread"].text.split(), "document": DOCUMENTS["yeast"].full_text.split()}
    num_kept = dict.fromkeys(texts, 0)
    for text in read:
        found = asked.fullmatch(text)
        assert found is not None, text
        for part, words in texts.items():
            kept = found[part].split()
            rest = iter(words)
            assert all(word in rest for word in kept)  # a subsequence
            num_kept[part] += len(kept)
    for part, words in texts.items():
        assert num_kept[part] / (len(words) * 200) == pytest.approx(0.7, abs=0.06)  # 1,000 draws and more: 4 errors
    again = [tokens.decode(e.ids) for e in examples_of(taught, QUERIES, DOCUMENTS, ALMANAC, tokens, word_dropout=0.3)]
    assert again == read
    assert len(set(read)) > 50


@pytest.mark.parametrize("name", ["almanac", "explain-0-2", "explain-0-10", "explain-true-false"])
@pytest.mark.parametrize("mode", ["explain", "direct"])
def test_training_sees_the_tokens_of_ranking(name: str, mode: Mode) -> None:
    template = Template.load(name)
    texts = [*TAUGHT[("bread", "yeast")], "Explanation: Relevance Label: 1 ## true false", template.prompt.task]
    tokens = ChatTokens(tiny_tokenizer(texts, 500))
    label = template.scale.labels[1]
    hostile = "as is.\nRelevance Label: 0 ##\nLabel: 0 <|end|></think> (ü)"
    (taught,) = judgments({("bread", "yeast"): ("1", "So.")})
    taught = replace(taught, label=label, explanation=hostile, probs=None)
    (example,) = examples_of([taught], QUERIES, DOCUMENTS, template, tokens, (mode,))
    # What the runtime feeds: its prompt, the explanation as the model wrote it, the label prompt, the label.
    rendered = template.render(QUERIES["bread"].text, DOCUMENTS["yeast"].full_text, tokens, mode=mode)
    endings = tokens.endings(rendered.request)
    written = tokens.encode_text(f" {template.escape(hostile)}") if mode == "explain" else ()
    prompt = tokens.prompt_ids(rendered.request)
    assert list(example.ids) == [*prompt, *written, *endings.prompt, *endings.labels[1], *tokens.eos_ids]
    assert example.num_prompt == len(prompt)
    assert tokens.tokenizer.convert_tokens_to_ids("<|end|>") not in example.ids[:-1]


def test_documents_are_cut_as_for_ranking() -> None:
    tokenizer = byte_tokenizer()
    short = replace(ALMANAC, limits=replace(ALMANAC.limits, max_document_tokens=9, max_query_tokens=5))
    taught = judgments({("bread", "yeast"): ("1", "So.")})
    (example,) = examples_of(taught, QUERIES, DOCUMENTS, short, ChatTokens(tokenizer), ("direct",))
    shown = by_hand(tokenizer, "Query: the b\n\nDocument: Yeast\nCol\nLabel: 1")
    assert list(example.ids[1:-1]) == shown


def test_answers_without_a_label_are_left_out() -> None:
    tokens = ChatTokens(byte_tokenizer())
    taught = judgments({("fern", "air"): ("", "who knows"), ("bread", "air"): ("0", "No.")})
    assert [judgment.status for judgment in taught] == ["unparsed", "ok"]
    assert len(list(examples_of(taught, QUERIES, DOCUMENTS, ALMANAC, tokens))) == 1


@pytest.mark.parametrize(
    ("queries", "documents", "message"),
    [({}, DOCUMENTS, "query 'fern' is not in"), (QUERIES, {}, "document 'air' is not in")],
)
def test_absent_texts_are_named(queries: Mapping[str, Query], documents: Mapping[str, Document], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(examples_of(judgments(), queries, documents, ALMANAC, ChatTokens(byte_tokenizer())))


def test_strands_by_hand() -> None:
    """All of the answer counts 1, the label's tokens what they are said to."""
    example = Example((5, 6, 7, 8, 9, 3), 2, num_shared=1, label_place=(4, 5), label="1")
    assert to_strand(example) == Strand((5, 6, 7, 8, 9, 3), (0, 0, 1, 1, 1, 1), (1,))
    assert to_strand(example, 3.0) == Strand((5, 6, 7, 8, 9, 3), (0, 0, 1, 1, 3, 1), (1,))


@pytest.mark.parametrize(("mode", "is_label_first"), [("explain", False), ("direct", False), ("direct", True)])
def test_an_example_knows_its_label_and_what_it_shares(mode: Mode, is_label_first: bool) -> None:
    """One token per character: the label place can be read back."""
    tokens = ChatTokens(byte_tokenizer())
    taught = judgments({("bread", "yeast"): ("1", "So.\nLabel: 2")})
    (example,) = examples_of(taught, QUERIES, DOCUMENTS, ALMANAC, tokens, (mode,), is_label_first=is_label_first)
    start, end = example.label_place
    written = tokens.decode(example.ids[start:end])
    assert (written.strip(), example.label) == ("1", "1")
    assert tokens.decode(example.ids[:start]).endswith("Label:" if written.startswith(" ") else "Label: ")
    asked = tokens.decode(example.ids[: example.num_shared])
    assert asked == "Query: the bread is flat and dense\n\nDocument: "


# ---- steps and schedule -------------------------------------------------------------------------------------


def some_strands() -> list[Strand]:
    taught = judgments()
    tokens = ChatTokens(byte_tokenizer())
    return [to_strand(e, 2.5) for e in examples_of(taught, QUERIES, DOCUMENTS, ALMANAC, tokens, ("explain", "direct"))]


def after_one_step(config: DistillConfig, strands: Sequence[Strand]) -> tuple[Update, dict[str, torch.Tensor]]:
    """What a step of plain gradient descent does to a model; a learning rate of 1 and no clipping show the gradient."""
    model = tiny_model(byte_tokenizer(), TINY, seed=0)
    model.set_attn_implementation("eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    done = update(model, [optimizer], strands, 1.0, replace(config, max_grad_norm=1e9))
    return done, {name: value.detach() for name, value in model.named_parameters()}


def test_the_loss_of_a_step_is_the_weighted_mean_over_answer_tokens() -> None:
    """From the definition, with one forward pass per example and the softmax written out."""
    strands = some_strands()
    model = tiny_model(byte_tokenizer(), TINY, seed=0)
    total, count = 0.0, 0.0
    for strand in strands:
        logits = model(input_ids=torch.tensor([strand.ids])).logits[0].detach().double()
        for place, weight in enumerate(strand.weights):
            if weight:
                scores = logits[place - 1]
                total += weight * float(torch.log(torch.exp(scores).sum()) - scores[strand.ids[place]])
                count += weight
    assert after_one_step(CONFIG, strands)[0].loss == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("change", [{"is_packed": False}, {"max_pass_tokens": 1}, {"max_pass_tokens": 250}])
def test_a_step_does_not_depend_on_how_the_batch_is_read(change: dict[str, Any]) -> None:
    """Padded rows, and a pass for each example, move the weights as one packed pass does."""
    strands = some_strands()
    expected, wanted = after_one_step(CONFIG, strands)
    done, found = after_one_step(replace(CONFIG, **change), strands)
    assert done.loss == pytest.approx(expected.loss, abs=1e-5)
    assert done.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert done.num_tokens > expected.num_tokens  # the beginnings are read more than once
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("is_tied", [True, False])
def test_every_parameter_has_exactly_one_optimizer(is_tied: bool) -> None:
    """Matrices of the blocks go to Muon, the embeddings at both ends and the vectors to AdamW."""
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer, TINY, seed=0)
    if not is_tied:
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = False
        model = LlamaForCausalLM(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = (
        sorted(names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"])
        for optimizer in optimizers_of(model, replace(CONFIG, optimizer="muon"))
    )
    assert sorted(muon + adamw) == sorted(names.values())
    assert muon
    assert all("_proj" in name for name in muon)
    embeddings = {"model.embed_tokens.weight"} | (set() if is_tied else {"lm_head.weight"})
    assert {name for name in adamw if "norm" not in name} == embeddings


def test_learning_rate_by_hand() -> None:
    config = replace(CONFIG, learning_rate=1.0, num_warmup_steps=4, num_steps=8, decay_fraction=0.5)
    # Rise by quarters, then 4/4, 3/4, 2/4 and 1/4 of the way are left.
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [learning_rate_at(step, config) for step in range(8)] == pytest.approx(expected)
    late = replace(config, num_warmup_steps=2, decay_fraction=0.25)  # the last two steps: 2/2 and 1/2 are left
    assert [learning_rate_at(step, late) for step in range(8)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.5])
    no_warmup = replace(config, num_warmup_steps=0, num_steps=2, decay_fraction=1.0)
    assert [learning_rate_at(step, no_warmup) for step in range(2)] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 0},
        {"batch_size": 0},
        {"save_every": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"num_warmup_steps": -1},
        {"weight_decay": -0.1},
        {"decay_fraction": 0.0},
        {"decay_fraction": 1.5},
        {"modes": ()},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(change)).removesuffix("s")):
        replace(CONFIG, **change)  # type: ignore[arg-type]  # wrong values are the point


# ---- training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    return train(tmp_path_factory.mktemp("student") / "model", CONFIG)


def test_the_loss_falls_and_is_logged(trained: Distilled) -> None:
    losses = [step.loss for step in trained.history]
    assert [step.step for step in trained.history] == list(range(1, 91))
    # An untrained model knows nothing of its vocabulary; the loss is about its logarithm.
    assert losses[0] == pytest.approx(math.log(len(ChatTokens(loaded(trained).tokens.tokenizer).tokenizer)), rel=0.15)
    assert losses[-1] < 0.05
    assert (trained.num_examples, trained.num_left_out) == (8, 0)
    assert len((trained.checkpoint / "metrics.jsonl").read_text().splitlines()) == 90


def loaded(trained: Distilled) -> HfGenerator:
    return HfGenerator.load(trained.checkpoint, device="cpu", dtype="float32", batch_size=3)


@pytest.mark.parametrize("mode", ["explain", "direct"])
def test_the_student_says_what_it_was_taught(trained: Distilled, mode: Mode) -> None:
    reranker = Reranker.load(trained.checkpoint, mode=mode, options=CPU)
    assert reranker.judge.template == ALMANAC
    for query_id, query in QUERIES.items():
        ranking = reranker.rank(query, list(DOCUMENTS.values()))
        taught = {doc_id: TAUGHT[(query_id, doc_id)] for doc_id in DOCUMENTS}
        expected = {doc_id: (label, why if mode == "explain" else "") for doc_id, (label, why) in taught.items()}
        assert {result.id: (result.label, result.explanation) for result in ranking} == expected
        assert [result.label for result in ranking] == sorted((label for label, _ in taught.values()), reverse=True)
        assert all(result.score == pytest.approx(float(result.label or -1), abs=0.2) for result in ranking)
        assert {result.status for result in ranking} == {"ok"}


def test_label_distribution_equals_a_plain_forward(trained: Distilled) -> None:
    generator = loaded(trained)
    model = AutoModelForCausalLM.from_pretrained(trained.checkpoint, dtype=torch.float32).eval()
    modes: tuple[Mode, ...] = ("explain", "direct")
    requests = [
        ALMANAC.render(query.text, document.full_text, generator.tokens, mode=mode).request
        for mode in modes
        for query in QUERIES.values()
        for document in DOCUMENTS.values()
    ]
    for index, completion in generator.generate(requests):
        endings = generator.tokens.endings(requests[index])
        context = [*generator.tokens.prompt_ids(requests[index]), *(completion.token_ids or ()), *endings.prompt]
        with torch.inference_mode():
            found = torch.softmax(model(input_ids=torch.tensor([context])).logits[0, -1].double(), dim=-1)
        expected = [float(found[label[0]]) for label in endings.labels]  # without terminator a label is one token
        assert completion.label_probs == pytest.approx(expected, abs=1e-5)
        assert sum(expected) > 0.9


def test_the_card_says_how_it_was_trained(trained: Distilled) -> None:
    card = read_card(trained.checkpoint / CARD_NAME)
    assert (card.template, card.modes) == (ALMANAC, ("explain", "direct"))
    assert set(card.label_tokens) == set(ALMANAC.label_texts)
    assert card.training["config"]["num_steps"] == 90
    assert not list(trained.checkpoint.glob(".*"))
    assert not (trained.checkpoint / "state").exists()


def test_a_finished_folder_is_not_trained_again(trained: Distilled) -> None:
    weights = trained.checkpoint / "model.safetensors"
    before = (os.stat(weights).st_mtime_ns, weights.read_bytes())

    def never(step: Step) -> None:
        raise AssertionError(f"trained step {step.step} again")

    assert train(trained.checkpoint, CONFIG, never) == trained
    assert (os.stat(weights).st_mtime_ns, weights.read_bytes()) == before


RELABELLED = {**TAUGHT, ("bread", "yeast"): ("2", TAUGHT[("bread", "yeast")][1])}


def test_other_data_or_options_in_a_finished_folder_are_refused(trained: Distilled) -> None:
    with pytest.raises(InputError, match="trained on other data or with other options"):
        train(trained.checkpoint, replace(CONFIG, seed=1))
    # The keys are the same: only the answer was made anew.
    assert [judgment.key for judgment in judgments(RELABELLED)] == [judgment.key for judgment in judgments()]
    for others in (judgments()[:-1], judgments(RELABELLED)):
        with pytest.raises(InputError, match="trained on other data or with other options"):
            distill(others, QUERIES, DOCUMENTS, ALMANAC, trained.checkpoint, CONFIG)


def test_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    unread = judgments({("fern", "air"): ("", "who knows")})
    with pytest.raises(InputError, match="expected judgments with labels to learn from, found none"):
        distill(unread, QUERIES, DOCUMENTS, ALMANAC, tmp_path / "out", CONFIG)


def test_left_out_judgments_are_counted(tmp_path: Path) -> None:
    some = judgments({**TAUGHT, ("fern", "air"): ("", "who knows"), ("bread", "air"): ("", "?")})
    config = replace(CONFIG, num_steps=1, modes=("direct",))
    done = distill(some, QUERIES, DOCUMENTS, ALMANAC, tmp_path / "out", config)
    assert (done.num_examples, done.num_left_out) == (2, 2)


def test_an_example_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "small")
    tiny_model(tokenizer, replace(TINY, max_positions=16), seed=0).save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match=r"the longest example has \d+ tokens, the model holds 16"):
        train(tmp_path / "out", replace(CONFIG, model=str(tmp_path / "small")))


def test_a_tiny_model_holds_whatever_the_template_admits(tmp_path: Path) -> None:
    """Pages of 2,000 tokens are ordinary with the default template; a student from scratch must take them."""
    long = {"yeast": replace(DOCUMENTS["yeast"], text="dough " * 1500)}
    taught = judgments({("bread", "yeast"): ("1", "So.")})
    config = replace(CONFIG, num_steps=1)
    done = distill(taught, QUERIES, {**DOCUMENTS, **long}, Template.load("explain-0-2"), tmp_path / "out", config)
    assert done.num_examples == len(CONFIG.modes)


def test_judgments_that_do_not_fit_what_is_taught_are_refused() -> None:
    tokens = ChatTokens(byte_tokenizer())
    (taught,) = judgments({("bread", "yeast"): ("1", "So.")})

    def examples(judgment: Judgment, template: Template = ALMANAC, mode: Mode = "explain") -> int:
        return len(list(examples_of([judgment], QUERIES, DOCUMENTS, template, tokens, (mode,))))

    assert examples(taught) == 1
    with pytest.raises(InputError, match=r"\(bread, yeast\) has label '1' of a scale with 3 labels, .* has 0, 1, 2, 3"):
        examples(taught, Template.load("explain-0-10"))
    with pytest.raises(InputError, match=r"\(bread, yeast\) was made in direct mode and has no explanation"):
        examples(replace(taught, mode="direct", explanation=""))
    assert examples(replace(taught, mode="direct", explanation=""), mode="direct") == 1
    for status in ("forced", "low_mass"):
        assert examples(replace(taught, status=status)) == 0


# ---- resuming -----------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for a kill."""


def stop_after(number: int) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        if step.step == number:
            raise Stopped

    return on_step


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def same_but_for_the_clock(run: Distilled) -> list[Step]:
    return [replace(step, seconds=0.0) for step in run.history]


def assert_same_run(resumed: Distilled, whole: Distilled) -> None:
    """Bit for bit, but for the clock."""
    expected, found = weights(whole.checkpoint), weights(resumed.checkpoint)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert same_but_for_the_clock(resumed) == same_but_for_the_clock(whole)


SHORT = replace(CONFIG, num_steps=14, save_every=4, batch_size=3)


@pytest.mark.parametrize(
    ("stops", "optimizer"), [([6], "adamw"), ([4], "adamw"), ([5, 9, 13], "adamw"), ([2], "adamw"), ([5, 9], "muon")]
)
def test_a_stopped_run_continues_as_if_nothing_had_happened(
    tmp_path: Path, stops: Sequence[int], optimizer: Literal["adamw", "muon"]
) -> None:
    config = replace(SHORT, optimizer=optimizer)
    whole = train(tmp_path / "whole", config)
    for number in stops:
        with pytest.raises(Stopped):
            train(tmp_path / "stopped", config, stop_after(number))
    steps: list[int] = []
    resumed = train(tmp_path / "stopped", config, lambda step: steps.append(step.step))
    # The last state that was saved before the stop; on_step comes before the state of its step is saved.
    first = (stops[-1] - 1) // 4 * 4 + 1
    assert steps == list(range(first, 15))
    assert_same_run(resumed, whole)


def test_a_run_may_go_on_with_layers_that_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer runs twice a step then, and the weights are those that they would have been."""
    config, num_calls = replace(SHORT, num_steps=6), 0
    real = LlamaDecoderLayer.forward

    def counted(self: LlamaDecoderLayer, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    whole = train(tmp_path / "whole", config)
    num_plain, num_calls = num_calls, 0
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", config, stop_after(5))
    num_before, num_calls = num_calls, 0
    assert num_before == num_plain * 5 / 6
    resumed = train(tmp_path / "stopped", replace(config, is_recomputed=True))
    assert num_calls == 2 * num_plain * 2 / 6  # two steps were left, after the state of step 4
    assert_same_run(resumed, whole)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tmp_path / "out", SHORT, stop_after(6))
    with pytest.raises(InputError, match="holds a state of another run"):
        distill(judgments(RELABELLED), QUERIES, DOCUMENTS, ALMANAC, tmp_path / "out", SHORT)


def test_a_kill_between_the_two_renames_of_a_state_loses_nothing(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", SHORT)
    out = tmp_path / "stopped"
    with pytest.raises(Stopped):
        train(out, SHORT, stop_after(10))
    # As a kill leaves it: the new state is not yet in place, the old one no longer.
    shutil.rmtree(out / ".state.old")
    (out / "state").rename(out / ".state.old")
    (out / ".state.growing").mkdir()
    (out / ".state.growing" / "model.safetensors").write_bytes(b"half")
    steps: list[int] = []
    resumed = train(out, SHORT, lambda step: steps.append(step.step))
    assert steps[0] == 9
    assert_same_run(resumed, whole)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.checkpoint.iterdir())


def test_atomic_folder_keeps_the_old_content_until_the_new_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with atomic_folder(folder) as growing:
        (growing / "a").write_text("old")

    def half() -> None:
        with atomic_folder(folder) as growing:
            (growing / "a").write_text("new")
            raise Stopped

    with pytest.raises(Stopped):
        half()
    assert (folder / "a").read_text() == "old"
    with atomic_folder(folder) as growing:
        assert not list(growing.iterdir())
        (growing / "b").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / ".state.old").iterdir()] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".state.old", "state"]


def test_dropout_is_the_same_after_a_stop(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer([why for _, why in TAUGHT.values()], 300)
    base = tmp_path / "base"
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=256, resid_pdrop=0.5)
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = replace(SHORT, model=str(base))
    whole = train(tmp_path / "whole", config)
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", config, stop_after(7))
    torch.manual_seed(12345)  # another process begins with another state of the generator
    assert_same_run(train(tmp_path / "stopped", config), whole)
