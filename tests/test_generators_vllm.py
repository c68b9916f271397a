"""The vllm backend against the hf backend on the same weights, on a stand-in for the engine (`fake_vllm.py`)."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests import fake_vllm
from tests.checkpoints import FAMILIES, NOT_SPECIAL_BUT_ADDED, SPECIAL, Family, save_checkpoint
from tests.test_generators_hf import MAX_NEW_TOKENS, requests_for
from whyrank.almanac.collection import build
from whyrank.checkpoint import CARD_NAME, Card, read_card, write_card
from whyrank.errors import GenerationError, InputError, MissingExtra, TemplateMismatch
from whyrank.generators import Completion, Request, Sampling
from whyrank.generators.explanations import Explanation, num_until_stop, reason_to_stop, settle_explanation
from whyrank.generators.hf import HfGenerator
from whyrank.generators.opening import EMBEDDED_MODEL, ModelOptions, open_model
from whyrank.generators.vllm import EngineConfig, VllmGenerator, safetensors_digest
from whyrank.template import Template

TEMPLATE = Template.load("explain-0-2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    return {family: save_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(autouse=True)
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in, for all tests but the slow one."""
    if request.node.get_closest_marker("slow") is None:
        fake_vllm.install(monkeypatch)


def load(checkpoint: Path, **settings: Any) -> VllmGenerator:
    return VllmGenerator.load(checkpoint, config=EngineConfig(**settings))


def hf(checkpoint: Path) -> HfGenerator:
    return HfGenerator.load(checkpoint, device="cpu", dtype="float32", batch_size=4)


def engine_of(generator: VllmGenerator) -> fake_vllm.LLMEngine:
    assert isinstance(generator.engine, fake_vllm.LLMEngine)
    return generator.engine


def assert_alike(found: Completion, expected: Completion, *, tolerance: float = 1e-6) -> None:
    assert found.error is None
    assert (found.token_ids, found.text, found.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )
    assert found.label_probs == pytest.approx(expected.label_probs, abs=tolerance, rel=1e-3)
    assert (found.logprobs is None) == (expected.logprobs is None)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert found.num_prompt_tokens == expected.num_prompt_tokens
    assert found.num_completion_tokens == expected.num_completion_tokens


# ---- the same as hf -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["0-2", "0-10", ("false", "true")])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_hf_backend(family: Family, labels: str | tuple[str, ...], checkpoints: dict[Family, Path]) -> None:
    base = hf(checkpoints[family])
    requests = requests_for(base, replace(TEMPLATE, labels=labels), ("explain", "explain", "direct"))[:6]
    expected = dict(base.generate(requests))
    generator = load(checkpoints[family], max_num_seqs=3)
    found = dict(generator.generate(requests))
    assert sorted(found) == list(range(len(requests)))
    for index, completion in found.items():
        assert_alike(completion, expected[index])
        assert 0 < sum(completion.label_probs or ()) < 1  # of the whole vocabulary: random weights prefer no label


def test_a_stop_inside_a_token_keeps_the_text_before_it(checkpoints: dict[Family, Path]) -> None:
    """The same request as in the hf backend's test: " because" is one token, of which " be" is kept."""
    base = hf(checkpoints["qwen3"])
    free = requests_for(base, TEMPLATE, ("explain",))[0]
    request = replace(free, stops=("cause",), label_prompt="\n\nRelevance Label:")
    found = dict(load(checkpoints["qwen3"]).generate([request]))[0]
    assert (found.text, found.finish_reason, found.logprobs) == (" be", "stop", None)
    assert_alike(found, dict(base.generate([request]))[0])


def test_a_stop_at_the_beginning_needs_no_newline(checkpoints: dict[Family, Path]) -> None:
    """vLLM does not know of that newline and writes on; what it wrote is kept out of explanation and label."""
    base = hf(checkpoints["qwen3"])
    request = replace(requests_for(base, TEMPLATE, ("explain",))[0], stops=("\n because",))
    found = dict(load(checkpoints["qwen3"]).generate([request]))[0]
    assert (found.text, found.token_ids, found.finish_reason) == ("", (), "stop")
    assert found.num_completion_tokens == MAX_NEW_TOKENS  # all of it was paid for
    assert_alike(replace(found, num_completion_tokens=1), dict(base.generate([request]))[0])


@pytest.mark.parametrize(
    ("cap", "is_direct", "finish"), [(3, False, "length"), (0, False, "length"), (3, True, "stop")]
)
def test_the_cap_is_told_from_an_end(cap: int, is_direct: bool, finish: str, checkpoints: dict[Family, Path]) -> None:
    base = hf(checkpoints["llama"])
    request = requests_for(base, TEMPLATE, ("explain",))[0]
    request = replace(request, is_direct=is_direct, sampling=Sampling(max_tokens=cap))
    found = dict(load(checkpoints["llama"]).generate([request]))[0]
    assert found.finish_reason == finish
    assert len(found.token_ids or ()) == (0 if is_direct else cap)
    assert_alike(found, dict(base.generate([request]))[0])


@pytest.mark.parametrize("is_first", [True, False], ids=["tokenizer", "generation config"])
def test_an_end_token_is_no_part_of_the_explanation(
    is_first: bool, checkpoints: dict[Family, Path], tmp_path: Path
) -> None:
    """The third token that the model writes is made an end token: by the tokenizer, or by the checkpoint."""
    base = hf(checkpoints["llama"])
    request = requests_for(base, TEMPLATE, ("explain",))[0]
    written = dict(base.generate([request]))[0].token_ids or ()
    assert written[2] not in written[:2]
    if is_first:
        base.tokens.tokenizer.eos_token = base.tokens.tokenizer.convert_ids_to_tokens(written[2])
    shutil.copytree(checkpoints["llama"], tmp_path, dirs_exist_ok=True)
    base.tokens.tokenizer.save_pretrained(tmp_path)
    settings = base.model.generation_config
    assert settings is not None
    settings.eos_token_id = None if is_first else [base.tokens.tokenizer.eos_token_id, written[2]]
    settings.save_pretrained(tmp_path)
    found = dict(load(tmp_path).generate([request]))[0]
    assert (found.token_ids, found.finish_reason, found.num_completion_tokens) == (written[:2], "stop", 3)
    assert_alike(found, dict(hf(tmp_path).generate([request]))[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # vLLM's own
def test_equals_the_hf_backend_on_the_real_engine() -> None:
    """The embedded model, because it explains, stops and answers: where vLLM is installed, on whatever it runs on."""
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    base = HfGenerator.load(EMBEDDED_MODEL, device="cpu", dtype="float32")
    config = EngineConfig(max_num_seqs=8, max_model_len=1024, gpu_memory_utilization=0.3)
    generator = VllmGenerator.load(EMBEDDED_MODEL, dtype="float32", config=config)
    collection = build("test", 1)
    template = read_card(EMBEDDED_MODEL / CARD_NAME).template
    requests = [
        template.render(query.text, document.full_text, base.tokens, mode=mode).request
        for query in collection.queries
        for document in collection.documents[:8]
        for mode in ("explain", "direct")
    ]
    written = dict(base.generate(requests[:1]))[0].text
    requests += [replace(request, stops=(written[5:8],)) for request in requests[::4]]  # within a word, for some
    requests += [replace(request, sampling=Sampling(max_tokens=4)) for request in requests[:2]]
    expected = dict(base.generate(requests))
    found = dict(generator.generate(requests))
    assert sorted(found) == sorted(expected)
    for index, completion in found.items():
        assert_alike(completion, expected[index], tolerance=1e-4)
    drawn = [sampled(request, seed) for request in requests[:6:2] for seed in (-1, 0, 1)]
    together = dict(generator.generate(drawn))
    for index, request in enumerate(drawn):
        assert dict(generator.generate([request]))[0].token_ids == together[index].token_ids


# ---- what the engine is asked ----------------------------------------------------------------------------------


def test_one_request_per_inner_node_of_the_labels(checkpoints: dict[Family, Path]) -> None:
    generator = load(checkpoints["llama"])
    direct = requests_for(hf(checkpoints["llama"]), TEMPLATE, ("direct",))[0]
    single = replace(direct, label_prompt="=", labels=("A", "B", "C"))
    assert [len(label) for label in generator.tokens.endings(single).labels] == [1, 1, 1]
    list(generator.generate([single]))
    assert len(engine_of(generator).received) == 1
    engine_of(generator).received.clear()
    # Nine inner nodes: the root; A and AQ; AB; B; X, XY, XYZ and XYZU.
    words = replace(single, labels=("AQX", "ABX", "BX", "XYZUV"))
    assert [len(label) for label in generator.tokens.endings(words).labels] == [3, 3, 2, 5]
    list(generator.generate([words]))
    prompts = [ids for ids, _ in engine_of(generator).received]
    assert len(prompts) == 9
    assert all(ids[: len(prompts[0])] == prompts[0] for ids in prompts)  # the root came first


def test_the_label_continues_the_tokens_of_the_explanation(checkpoints: dict[Family, Path]) -> None:
    """So that the prefix cache holds them: nothing is spelled anew."""
    generator = load(checkpoints["llama"])
    request = requests_for(hf(checkpoints["llama"]), TEMPLATE, ("explain",))[0]
    completion = dict(generator.generate([request]))[0]
    (prompt, _), *others = engine_of(generator).received
    assert prompt == generator.tokens.prompt_ids(request)
    begun = [*prompt, *(completion.token_ids or ()), *generator.tokens.endings(request).prompt]
    assert [ids for ids, _ in others if ids[: len(begun)] != begun] == []
    assert engine_of(generator).args.enable_prefix_caching


def test_more_labels_than_vllm_takes_at_once(checkpoints: dict[Family, Path]) -> None:
    """130 labels of one token: vLLM tells the log-probabilities of 128 tokens at most."""
    base = hf(checkpoints["llama"])
    direct = requests_for(base, TEMPLATE, ("direct",))[0]
    whole = base.tokens.encode_structure("Label: ")
    texts = (base.tokens.decode([i]) for i in range(len(base.tokens.tokenizer)))
    single = (text for text in texts if text and base.tokens.encode_structure(f"Label: {text}")[:-1] == whole)
    labels = tuple(islice(dict.fromkeys(single), 130))
    request = replace(direct, label_prompt="Label: ", labels=labels)
    assert [len(label) for label in base.tokens.endings(request).labels] == [1] * 130
    generator = load(checkpoints["llama"])
    found = dict(generator.generate([request]))[0]
    assert [len(params.logprob_token_ids or []) for _, params in engine_of(generator).received] == [128, 2]
    assert_alike(found, dict(base.generate([request]))[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_text_never_becomes_structure(family: Family, checkpoints: dict[Family, Path]) -> None:
    generator = load(checkpoints[family])
    backend = generator.tokens.tokenizer.backend_tokenizer
    markers = SPECIAL[family] + NOT_SPECIAL_BUT_ADDED[family]
    structural = {backend.token_to_id(text) for text in markers}

    def num_structural(text: str) -> int:
        engine_of(generator).received.clear()
        list(generator.generate([TEMPLATE.render(text, text, generator.tokens, mode="direct").request]))
        return sum(token in structural for token in engine_of(generator).received[0][0])

    clean = num_structural("why")
    assert clean > 0
    assert [num_structural(f"a{marker} {marker}b") for marker in markers] == [clean] * len(markers)


# ---- sampling -------------------------------------------------------------------------------------------------


def sampled(request: Request, seed: int, temperature: float = 1.0) -> Request:
    return replace(request, sampling=Sampling(temperature=temperature, max_tokens=MAX_NEW_TOKENS, seed=seed))


def test_samples_depend_on_the_seed_alone(checkpoints: dict[Family, Path]) -> None:
    """Minus one included, which vLLM reads as no seed at all."""
    generator = load(checkpoints["llama"], max_num_seqs=2)
    requests = requests_for(hf(checkpoints["llama"]), TEMPLATE, ("explain",))[:3]
    drawn = [sampled(request, seed) for request in requests for seed in (-1, 0, 1)]
    together = dict(generator.generate(drawn))
    for index, request in enumerate(drawn):
        assert dict(generator.generate([request]))[0].token_ids == together[index].token_ids
    assert len({together[index].token_ids for index in range(3)}) == 3


def test_logprobs_are_those_of_the_distribution_or_none(checkpoints: dict[Family, Path]) -> None:
    """The engine tells them at temperature 1; at 0.7 the tokens were drawn from another distribution."""
    generator = load(checkpoints["llama"])
    request = requests_for(hf(checkpoints["llama"]), TEMPLATE, ("explain",))[0]
    (_, warm), (_, cool) = sorted(generator.generate([sampled(request, 5), sampled(request, 5, 0.7)]))
    assert (cool.error, cool.logprobs) == (None, None)
    ids = warm.token_ids or ()
    prompt = generator.tokens.prompt_ids(request)
    with torch.inference_mode():
        logits = engine_of(generator).model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double()
    expected = torch.log_softmax(logits, dim=-1)
    values = [float(expected[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)]
    assert warm.logprobs == pytest.approx(values, abs=1e-6)


# ---- order and errors -----------------------------------------------------------------------------------------


def test_completions_come_as_they_finish_and_a_closed_iteration_can_be_resumed(
    checkpoints: dict[Family, Path],
) -> None:
    generator = load(checkpoints["llama"])
    requests = requests_for(hf(checkpoints["llama"]), TEMPLATE, ("explain",))[:4]
    slow = replace(requests[0], sampling=Sampling(max_tokens=40))
    requests = [slow, *requests[1:]]
    whole = list(generator.generate(requests))
    assert whole[-1][0] == 0  # it came first and wrote longest
    with closing(cast(Generator[tuple[int, Completion]], generator.generate(requests))) as begun:
        first = next(begun)
    assert not engine_of(generator).has_unfinished_requests()
    left = [index for index in range(len(requests)) if index != first[0]]
    rest = [(left[index], completion) for index, completion in generator.generate([requests[i] for i in left])]
    assert sorted([first, *rest], key=lambda item: item[0]) == sorted(whole, key=lambda item: item[0])


def test_reads_a_stream_ahead_by_a_bounded_amount(checkpoints: dict[Family, Path]) -> None:
    generator = load(checkpoints["llama"], max_num_seqs=3)
    request = requests_for(hf(checkpoints["llama"]), TEMPLATE, ("direct",))[0]
    num_taken = 0

    def endless() -> Iterator[Request]:
        nonlocal num_taken
        while True:
            num_taken += 1
            yield request

    with closing(cast(Generator[tuple[int, Completion]], generator.generate(endless()))) as stream:
        assert next(stream)[1].error is None
        assert num_taken == 3
        with pytest.raises(GenerationError, match="end or close that iteration first"):
            next(generator.generate([request]))
    assert dict(generator.generate([request]))[0].error is None


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(max_tokens=5000), "holds 2048; lower max_document_tokens"),
        (Sampling(max_tokens=3, temperature=3.0), r"vLLM refuses the request: temperature must be in \[0, 2\]"),
    ],
)
def test_a_request_that_cannot_be_met_fails_alone(
    sampling: Sampling, message: str, checkpoints: dict[Family, Path]
) -> None:
    generator = load(checkpoints["llama"], max_num_seqs=1)
    good = requests_for(hf(checkpoints["llama"]), TEMPLATE, ("direct",))[0]
    bad = replace(good, is_direct=False, sampling=sampling)
    found = dict(generator.generate([bad, good, bad]))
    assert isinstance(found[0].error, GenerationError)
    with pytest.raises(GenerationError, match=message):
        raise found[0].error
    assert (found[0].label_probs, found[1].error) == (None, None)
    assert isinstance(found[2].error, GenerationError)


@pytest.mark.parametrize("number", [0, 1, 3], ids=["explanation", "root", "node"])
def test_a_request_that_vllm_gives_up_fails_alone(number: int, checkpoints: dict[Family, Path]) -> None:
    """Of the first pair: its explanation, the root of its labels, or one of the nodes that go together."""
    generator = load(checkpoints["llama"], max_num_seqs=1)
    requests = requests_for(hf(checkpoints["llama"]), TEMPLATE, ("explain",))[:2]
    engine_of(generator).gives_up_on = number
    found = dict(generator.generate(requests))
    assert isinstance(found[0].error, GenerationError)
    assert "finish reason 'abort'" in str(found[0].error)
    assert (found[0].label_probs, found[1].error) == (None, None)
    assert not engine_of(generator).has_unfinished_requests()


def test_a_dead_engine_ends_the_job_and_loses_nothing_that_was_done(checkpoints: dict[Family, Path]) -> None:
    generator = load(checkpoints["llama"], max_num_seqs=1)
    requests = requests_for(hf(checkpoints["llama"]), TEMPLATE, ("direct",))[:3]
    stream = generator.generate(requests)
    assert next(stream)[1].error is None
    engine_of(generator).dies_at_step = engine_of(generator).num_steps + 2
    with pytest.raises(GenerationError, match=r"stopped with 1 pairs under way \(EngineDeadError: EngineCore enc"):
        next(stream)


def test_labels_that_cannot_be_told_apart_end_the_job(checkpoints: dict[Family, Path]) -> None:
    generator = load(checkpoints["llama"])
    request = requests_for(hf(checkpoints["llama"]), TEMPLATE, ("direct",))[0]
    with pytest.raises(TemplateMismatch, match=r"^vllm:.*terminator"):
        list(generator.generate([replace(request, labels=(" a", " ab", " abc"))]))


# ---- where it comes from --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.28.2", "0.34.0rc1", "1.0", "unknown"])
def test_other_versions_are_refused(
    version: str, checkpoints: dict[Family, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch, version)
    with pytest.raises(MissingExtra, match=rf"at least 0\.29 and below 0\.34, found {version}.*whyrank\[vllm\]"):
        load(checkpoints["llama"])


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"pip install 'whyrank\[vllm\]'"):
        open_model("vllm:some/model")


def test_vllm_keeps_its_messages_out_of_the_results(
    checkpoints: dict[Family, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_LOGGING_STREAM", raising=False)
    load(checkpoints["llama"])
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"


def test_opens_by_its_name_with_the_template_of_the_checkpoint(tmp_path: Path) -> None:
    first, second = (save_checkpoint("llama", tmp_path / str(seed), seed=seed) for seed in (1, 2))
    generator, template = open_model(f"vllm:{first}", template=TEMPLATE)
    assert generator.name == f"vllm:{first}@{safetensors_digest(first)}"
    assert template is TEMPLATE
    assert safetensors_digest(first) != safetensors_digest(second)  # same names and sizes, other weights
    own = Template.load("explain-true-false")
    write_card(first, Card(template=own, modes=("direct",)))
    assert open_model(f"vllm:{first}", mode="direct")[1].version == own.version
    with pytest.raises(TemplateMismatch, match="was trained for --mode direct"):
        open_model(f"vllm:{first}", mode="explain")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("vllm:", ModelOptions(), "expected vllm:MODEL"),
        ("vllm:./nowhere/", ModelOptions(), "expected a folder with a checkpoint"),
        ("vllm:model", ModelOptions(device="cpu"), "vLLM runs on the device that it was built for"),
    ],
)
def test_what_cannot_be_opened_is_refused(spec: str, options: ModelOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_model(spec, options=options)


def test_weights_other_than_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected weights as \*\.safetensors"):
        safetensors_digest(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"max_num_seqs": 0}, {"max_model_len": 0}, {"gpu_memory_utilization": 1.5}, {"tensor_parallel_size": 0}],
)
def test_sizes_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"expected {next(iter(settings))}"):
        EngineConfig(**settings)


# ---- the rule for explanations, by hand -------------------------------------------------------------------------


class Pairs:
    """One token per two letters, so that a stop can end inside of one; a rest is spelled by single letters."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) if i < 1000 else chr(i // 1000) + chr(i % 1000) for i in ids)

    def encode_text(self, text: str, /) -> tuple[int, ...]:
        return tuple(ord(letter) for letter in text)


def pairs(text: str) -> list[int]:
    return [ord(text[i]) * 1000 + ord(text[i + 1]) for i in range(0, len(text), 2)]


def request_with(stops: tuple[str, ...], cap: int = 9) -> Request:
    return Request((), stops, "\nLabel:", (" 1", " 2"), Sampling(max_tokens=cap))


@pytest.mark.parametrize(
    ("text", "stops", "until", "expected"),
    [
        ("so it is", (), None, Explanation(4)),
        ("so it##x", ("##",), 4, Explanation(2, (ord("t"),))),  # "t#" and "#x": the t is spelled anew
        ("so i##xyz.", ("##",), 3, Explanation(2)),
        ("so is##xyz!##", ("##",), 4, Explanation(2, (ord("s"),))),
        ("## so..", ("\n##",), 1, Explanation(0)),  # the beginning needs no newline
        ("so \nLa", (), None, Explanation(1, (ord(" "),))),  # the beginning of the label prompt is left to us
        ("so\nLabel##", ("##",), 5, Explanation(1)),
    ],
)
def test_where_an_explanation_ends(text: str, stops: tuple[str, ...], until: int | None, expected: Explanation) -> None:
    ids = pairs(text + " " * (len(text) % 2))
    request = request_with(stops)
    assert num_until_stop(ids, Pairs(), request) == until
    assert settle_explanation(ids[:until], Pairs(), request) == expected


def test_when_writing_is_enough() -> None:
    """After every token of "so ##", with a cap of three tokens or more."""
    ids = pairs("so ## ..")
    assert [reason_to_stop(ids[:n], Pairs(), request_with(("##",))) for n in (1, 2, 3)] == [None, None, "stop"]
    assert [reason_to_stop(ids[:n], Pairs(), request_with((), cap=3)) for n in (1, 2, 3)] == [None, None, "length"]
    assert reason_to_stop(pairs("##" + "." * 60), Pairs(), request_with(("##",), cap=99)) is None  # long ago
