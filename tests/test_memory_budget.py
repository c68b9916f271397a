"""`--memory`: how many answers are written at once, and what that takes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoints import save_checkpoint
from whyrank.errors import GenerationError, InputError
from whyrank.generators import Completion, Request, Sampling
from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.linears import pack
from whyrank.generators.hf.memory import LABEL_ROWS, TAKEN_BY_LIBRARIES, Footprint
from whyrank.generators.opening import ModelOptions
from whyrank.template import Template

TEMPLATE = Template.load("explain-0-2")


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 * 2**30), ("800MB", 800_000_000), ("1.5 KiB", 1536), ("100000", 100_000)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert ModelOptions(memory=text).num_bytes() == size


@pytest.mark.parametrize("text", ["four", "4 XB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a size of memory such as 4GiB"):
        ModelOptions(memory=text)


def test_a_footprint_is_counted_from_the_shape() -> None:
    shape = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    found = Footprint.of(LlamaForCausalLM(shape))
    # Heads of 8 values: 2 key heads and 2 value heads in 3 layers, 4 bytes each.
    assert found.cached_token == (2 + 2) * 8 * 3 * 4
    # Twice 200 for the MLP, five times queries (32) and keys with values (32), six times the hidden size.
    assert found.pass_token == (400 + 5 * 64 + 6 * 32) * 4
    assert found.logits_row == 3 * 100 * 4
    assert found.attended == 4 + 1
    kept = Footprint.of(LlamaForCausalLM(shape), torch.bfloat16)
    # Scores of 256 queries in 4 heads, and copies of keys and values, in 2 bytes each.
    assert kept == replace(found, cached_token=found.cached_token // 2, scored=2 * (256 * 4 + 2 * 2 * 2 * 8))


def test_narrow_weights_do_not_make_activations_narrow() -> None:
    """Once its weights are laid out for the CPU, a model in bfloat16 computes the rest in float32 all the same."""
    shape = LlamaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    wide, narrow = LlamaForCausalLM(shape), LlamaForCausalLM(shape)
    torch.nn.Module.to(narrow, torch.bfloat16)
    pack(narrow)
    assert Footprint.of(narrow, torch.bfloat16).pass_token == Footprint.of(wide).pass_token


def test_layers_with_a_window_take_a_mask_of_their_own() -> None:
    shape = LlamaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = LlamaForCausalLM(shape)
    plain = Footprint.of(model)
    model.config.sliding_window = 4
    assert Footprint.of(model) == replace(plain, attended=2 * 4 + 1)


def test_slots_fill_the_budget_and_never_more() -> None:
    model = Footprint(cached_token=10, pass_token=3, logits_row=40, attended=5, scored=7)
    needs = {"capacity": 8, "num_shared": 5, "num_pass_tokens": 20, "num_label_rows": 11}
    # Once: 20 tokens of activations, 20 x 13 mask entries of 5 bytes, scores of 13 tokens, two shared beginnings of 5,
    # and one answer's label trie.
    fixed = TAKEN_BY_LIBRARIES + 20 * 3 + 5 * 20 * 13 + 7 * 13 + 2 * 5 * 10 + 11 * (40 + 3 + 5 * 13)
    slot = 8 * 10 + 4 * (40 + 3 + 5 * 13)
    for num_slots in (1, 2, 7):
        assert model.num_slots(fixed + num_slots * slot, **needs, most=100) == num_slots
        assert model.num_slots(fixed + (num_slots + 1) * slot - 1, **needs, most=100) == num_slots
    assert model.num_slots(10**9, **needs, most=100) == 100
    with pytest.raises(GenerationError, match=r"too little for one answer of 13 tokens.*give at least that"):
        model.num_slots(fixed + slot - 1, **needs, most=100)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> HfGenerator:
    return HfGenerator.load(save_checkpoint("llama", tmp_path_factory.mktemp("llama")), device="cpu", dtype="float32")


def requests_about(generator: HfGenerator, query: str, num_documents: int) -> list[Request]:
    documents = ["quick brown document " * (number % 9 + 1) for number in range(num_documents)]
    sampling = Sampling(max_tokens=4)
    return [TEMPLATE.render(query, text, generator.tokens, sampling=sampling).request for text in documents]


def answers(generator: HfGenerator, requests: list[Request]) -> list[Completion]:
    found = dict(generator.generate(requests))
    return [found[index] for index in range(len(requests))]


def test_answers_are_the_same_within_any_budget(generator: HfGenerator) -> None:
    """Many queries, so that their shared beginnings have to wait for room, too."""
    requests = [
        request for fox in range(6) for request in requests_about(generator, f"why asks fox {fox}", 3 + fox % 2)
    ]
    expected = answers(generator, requests)
    longest = max(len(generator.tokens.prompt_ids(request)) for request in requests)
    footprint = Footprint.of(generator.model)
    least = (
        TAKEN_BY_LIBRARIES
        + int(footprint.cached_token * longest * 2)
        + footprint.pass_token * (512 + 3 * longest)
        + 5 * (512 + 3 * longest) * (2 * longest)
        + LABEL_ROWS * footprint.logits_row
    )
    for budget in (least, 2 * least - TAKEN_BY_LIBRARIES, 10**9):
        found = answers(replace(generator, memory=budget), requests)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        for one, wanted in zip(found, expected, strict=True):
            assert one.label_probs == pytest.approx(wanted.label_probs, abs=1e-6)


def test_too_little_memory_says_how_much_is_needed(generator: HfGenerator) -> None:
    with pytest.raises(GenerationError, match="--memory 0 MiB is too little for one answer"):
        answers(replace(generator, memory=1000), requests_about(generator, "why", 2))


MEASURE = """
import sys
from pathlib import Path
import torch
from whyrank.generators import Sampling
from whyrank.generators.hf import HfGenerator
from whyrank.template import Template

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

torch.set_num_threads(1)
folder, memory, dtype = sys.argv[1], int(sys.argv[2]) or None, sys.argv[3]
generator = HfGenerator.load(folder, device="cpu", dtype=dtype, memory=memory, batch_size=None if memory else 96)
template = Template.load("explain-0-2")
def requests(num):
    for number in range(num):
        text = "quick brown document helps " * (20 + number % 40)
        yield template.render("why", text, generator.tokens, sampling=Sampling(max_tokens=3)).request
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
before = status("VmRSS")
list(generator.generate(requests(96)))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_process_keeps_to_its_budget(tmp_path: Path, dtype: str) -> None:
    """From loading on, libraries included. In float32, 96 answers at once take more than that: the budget is what holds
    them back."""
    shape = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=12, num_attention_heads=8)
    folder = save_checkpoint("llama", tmp_path)
    shape.vocab_size = LlamaConfig.from_pretrained(folder).vocab_size
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder)

    def taken(memory: int) -> int:
        command = [sys.executable, "-c", MEASURE, str(folder), str(memory), dtype]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    budget = 120 * 2**20
    assert dtype == "int8" or taken(0) > 1.2 * budget  # keys and values take half as much there
    assert taken(budget) <= budget


def test_a_longer_shared_beginning_is_planned_for_when_it_comes(generator: HfGenerator) -> None:
    """The second query comes when the slots have been counted for the first, whose instruction and query are short."""
    short, long = requests_about(generator, "why", 20), requests_about(generator, "why asks the fox " * 60, 1)
    prefixes = [generator.tokens.prompt_parts(request)[1] for request in (short[0], long[0])]
    footprint = Footprint.of(generator.model)
    for_short = 2 * prefixes[0] * footprint.cached_token
    for_long = 2 * prefixes[1] * footprint.cached_token
    few = replace(generator, batch_size=1)  # reads eight ahead

    def budget(shared: int) -> int:
        longest = max(len(generator.tokens.prompt_ids(request)) for request in short) - prefixes[0]
        capacity = 64 * -(-(longest + 20) // 64)
        num_pass_tokens = 512 + capacity + prefixes[1]
        attended = 5 * num_pass_tokens * (capacity + prefixes[1])
        row = footprint.logits_row + footprint.pass_token + 5 * (capacity + prefixes[1])
        labels = (LABEL_ROWS + 3) * row  # a terminator after each of three
        slot = capacity * footprint.cached_token + labels
        return TAKEN_BY_LIBRARIES + num_pass_tokens * footprint.pass_token + attended + shared + slot

    assert [one.error for one in answers(replace(few, memory=budget(for_long)), [*short, *long])] == [None] * 21
    with pytest.raises(GenerationError, match="too little for one answer"):
        answers(replace(few, memory=budget(for_short)), [*short, *long])
