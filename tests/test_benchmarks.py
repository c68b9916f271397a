"""The benchmarks measure what they say: arithmetic by hand, answers by plain forwards, and one small run of it all."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from benchmarks import train
from benchmarks.machine import limits, merged, peak_memory_mb
from benchmarks.measuring import best_baseline, ratios
from benchmarks.roofline import (
    BYTES,
    Job,
    Limits,
    Precision,
    Shape,
    Work,
    causal_pairs,
    forward_work,
    ideal_work,
    least_seconds,
)
from benchmarks.systems import BASELINES, Agreement, Answer, compare, generate, load_plain, open_system
from benchmarks.workload import RANDOM_MODELS, Workload, build, endless_copy, save_random_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.checkpoints import FAMILIES, Family, save_checkpoint
from whyrank.errors import GenerationError, InputError
from whyrank.generators.hf import HfGenerator
from whyrank.generators.hf.chat import ChatTokens, Endings
from whyrank.generators.hf.linears import is_available
from whyrank.generators.hf.load import load_tokenizer

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "rerank.py"
TINY = Shape(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=300
)
# By hand: query and output 4x4 each, key and value 4x2 each, three MLP matrices 4x6: 120 weights a layer.
SMALL = Shape(hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, vocab_size=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(TINY, tmp_path_factory.mktemp("random") / "tiny")


@pytest.fixture(scope="module")
def tokens(checkpoint: Path) -> ChatTokens:
    return ChatTokens(load_tokenizer(checkpoint))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return load_plain(checkpoint, "float32")


# ---- arithmetic -----------------------------------------------------------------------------------------------


def test_a_small_forward_is_counted_by_hand() -> None:
    work = forward_work(SMALL, BYTES["float32"], num_tokens=3, num_pairs=6, num_logits=1, num_read=10)
    # 3 tokens x 2 layers x 120 weights and 1 x (4 x 5) for the logits, times two: 1480.
    # Attention: 6 pairs x 2 layers x 2 heads x 2 dimensions, times four: 192.
    assert work.flops == 1480 + 192
    # 240 + 20 weights; keys and values are 2 x 2 layers x 1 head x 2 = 8 numbers a token, 3 written and 10 read.
    assert work.num_bytes == 4 * 260 + 4 * 8 * 13


def test_the_last_layer_works_for_those_that_ask() -> None:
    work = forward_work(
        SMALL, BYTES["float32"], num_tokens=3, num_pairs=6, num_logits=1, num_asking=1, num_asking_pairs=3
    )
    # Two tokens do without queries and output (2 x 16) and the MLP (72), twice each; 3 pairs x 2 heads x 2, four times.
    assert work.flops == 1480 + 192 - 2 * 2 * 104 - 4 * 3 * 2 * 2


def test_bytes_follow_the_precision_of_weights_and_cache() -> None:
    work = forward_work(SMALL, Precision(weight=1, value=4), num_tokens=3, num_pairs=6, num_logits=0)
    assert work.num_bytes == 240 + 4 * 8 * 3  # without logits their matrix stays where it is


@pytest.mark.parametrize("num_cached", [0, 9])
def test_flops_are_those_that_torch_counts(num_cached: int) -> None:
    num_rows, num_new = 2, 5
    config = LlamaConfig(
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.intermediate_size,
        num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_heads,
        num_key_value_heads=TINY.num_kv_heads,
        vocab_size=TINY.vocab_size,
    )
    assert Shape.of(config) == TINY
    llama = LlamaForCausalLM(config)
    llama.set_attn_implementation("eager")
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        if num_cached:
            llama(torch.ones(num_rows, num_cached, dtype=torch.long), past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            llama(torch.ones(num_rows, num_new, dtype=torch.long), past_key_values=cache, logits_to_keep=2)
    # Torch's matrices know no causality: every new token meets all tokens.
    pairs = num_rows * num_new * (num_cached + num_new)
    work = forward_work(TINY, BYTES["float32"], num_tokens=num_rows * num_new, num_pairs=pairs, num_logits=num_rows * 2)
    assert counter.get_total_flops() == work.flops


@pytest.mark.parametrize(("num_cached", "num_new"), [(0, 1), (0, 4), (3, 1), (7, 5)])
def test_causal_pairs_are_the_ones_below_the_diagonal(num_cached: int, num_new: int) -> None:
    mask = torch.ones(num_cached + num_new, num_cached + num_new).tril()[num_cached:]
    assert causal_pairs(num_cached, num_new) == mask.sum()


def flops_token_by_token(shape: Shape, contexts: list[int], asking: list[int], num_logits: int) -> int:
    """Each token passes all weights and attends to its context, itself included; in the last layer only those of some
    contexts do, and the others make keys and values."""
    attending = 4 * shape.num_heads * shape.head_dim
    total = num_logits * 2 * shape.head_weights
    for context in contexts:
        total += (shape.num_layers - 1) * (2 * shape.layer_weights + attending * context)
        total += 2 * 2 * shape.hidden_size * shape.num_kv_heads * shape.head_dim
    for context in asking:
        total += 2 * (shape.layer_weights - 2 * shape.hidden_size * shape.num_kv_heads * shape.head_dim)
        total += attending * context
    return total


def test_explaining_costs_every_token_once_and_the_prefix_once_for_all() -> None:
    job = Job(prefix=5, documents=(3, 4), generated=3, label_prompt=2, label_depths=(1,))
    prefill, decode = ideal_work(SMALL, BYTES["float32"], job)
    # The prefix sees itself; the documents see the prefix and themselves; each prompt's last place has logits.
    assert prefill.flops == flops_token_by_token(SMALL, [1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9], [8, 9], 2)
    # After 8 and 9 tokens: three written tokens and two of the label prompt, then one inner node of the labels. Logits
    # after the first two written ones (the third's come from nowhere else), after the prompt, and after the node.
    asking = [9, 10, 13, 14, 10, 11, 14, 15]
    assert decode.flops == flops_token_by_token(SMALL, [*range(9, 15), *range(10, 16)], asking, 2 * (2 + 2))
    # Weights are read in each of two steps and at the label. Cached are 5 + 3 + 4 tokens, then two more after each
    # step; all that is fed (2 x 6 tokens) is written.
    assert decode.num_bytes == 3 * 4 * 260 + 4 * 8 * (12 + 14 + 16 + 12)


def test_labels_alone_are_one_phase() -> None:
    job = Job(prefix=5, documents=(3, 4), generated=0, label_prompt=2)
    (only,) = ideal_work(SMALL, BYTES["float32"], job)
    contexts = [1, 2, 3, 4, 5, *range(6, 11), *range(6, 12)]
    assert only == Work(flops_token_by_token(SMALL, contexts, [10, 11], 2), 4 * 260 + 4 * 8 * 16)


def test_sharing_saves_the_prefix_of_all_documents_but_one() -> None:
    shared = Job(prefix=50, documents=(30, 40, 60), generated=8, label_prompt=2)
    apart = replace(shared, prefix=0, documents=tuple(50 + length for length in shared.documents))
    saved = forward_work(
        *(SMALL, BYTES["float32"]),
        num_tokens=50,
        num_pairs=causal_pairs(0, 50),
        num_logits=0,
        num_asking=0,
        num_asking_pairs=0,
    ).flops
    flops = [sum(work.flops for work in ideal_work(SMALL, BYTES["float32"], job)) for job in (shared, apart)]
    assert flops[1] - flops[0] == 2 * saved


def test_every_phase_waits_for_its_own_limit() -> None:
    machine = Limits(flops=100.0, num_bytes=10.0)
    # Arithmetic takes 3 s and memory 1 s in the first phase; 1 s and 4 s in the second.
    assert least_seconds([Work(300, 10), Work(100, 40)], machine) == pytest.approx(7.0)


def test_the_random_models_have_the_sizes_in_their_names() -> None:
    sizes = {name: shape.num_layers * shape.layer_weights + shape.head_weights for name, shape in RANDOM_MODELS.items()}
    # By hand: 8 x (4 x 384^2 + 3 x 384 x 2048) + 384 x 8192, and the published 134.5 million of SmolLM2-135M, whose
    # shape it is (its 61 norms of 576 numbers are not counted here).
    assert sizes == {"random-30m": 26_738_688, "random-135m": 134_515_008 - 61 * 576}


# ---- the machine ----------------------------------------------------------------------------------------------


def rates(float32: float | None, copied: float) -> dict[str, Any]:
    return {"gemm_gflops": {"float32": {"a": float32, "b": 2.0}, "int8": {"a": None}}, "copy_gb_per_second": copied}


def test_limits_are_the_best_rates_of_the_dtype() -> None:
    assert limits(rates(5.0, 3.0), "float32") == Limits(5e9, 3e9)
    with pytest.raises(GenerationError, match=r"dtype int8: .*no such matrix product"):
        limits(rates(5.0, 3.0), "int8")


def test_of_two_measurements_the_higher_counts() -> None:
    assert merged(rates(5.0, 3.0), rates(4.0, 6.0)) == rates(5.0, 6.0)
    assert merged(rates(None, 3.0), rates(None, 6.0)) == rates(None, 6.0)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts ru_maxrss in KiB, macOS in bytes")
def test_peak_memory_is_in_megabytes() -> None:
    import resource

    held = b"1" * 100_000_000
    peak = peak_memory_mb()
    # getrusage knows at least as much, since it may add what a parent held.
    assert len(held) / 1e6 < peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 + 1


# ---- figures --------------------------------------------------------------------------------------------------


def test_ratios_compare_neighbours_in_time() -> None:
    # The machine is three times as slow in the second round; in each round alone `whyrank` takes half or a third.
    times = {"generate-1": [9.0, 27.0, 9.0], "generate-8": [4.0, 12.0, 6.0], "whyrank": [2.0, 6.0, 2.0]}
    found = ratios(times, "generate-8")
    assert found == {"generate-1": pytest.approx(4 / 9), "generate-8": 1.0, "whyrank": 2.0}


def test_the_best_baseline_is_never_whyrank() -> None:
    times = {"whyrank": [1.0], "generate-1": [5.0, 5.0, 1.0], "generate-8": [4.0, 4.0, 9.0], "generate-32": [6.0]}
    assert best_baseline(times) == "generate-8"
    assert median(times["generate-8"]) == 4.0


# ---- workloads ------------------------------------------------------------------------------------------------


def test_a_workload_has_the_lengths_that_it_promises(tokens: ChatTokens) -> None:
    workload = build("W", tokens, 32, draw=0)
    job = workload.job
    assert (job.prefix, job.generated, job.label_depths) == (200, 64, ())
    assert [len(prompt) - 200 for prompt in workload.prompts] == list(job.documents)
    assert all(100 <= length <= 400 for length in job.documents)
    assert max(job.documents) - min(job.documents) > 200  # 16 uniform draws and their mirror images spread further
    assert len(set(workload.endings.labels)) == 3


@pytest.mark.parametrize("num_documents", [4, 5])
def test_draws_have_other_lengths_and_words_and_the_same_total(tokens: ChatTokens, num_documents: int) -> None:
    one, other = (build("S", tokens, num_documents, draw=draw) for draw in (0, 1))
    assert sum(one.job.documents) == sum(other.job.documents) == 250 * num_documents
    assert one.job != other.job
    assert build("S", tokens, num_documents, draw=0) == one
    assert not {prompt[:20] for prompt in one.prompts} & {prompt[:20] for prompt in other.prompts}


def test_a_prompt_that_begins_another_keeps_a_token_of_its_own(tokens: ChatTokens) -> None:
    workload = replace(build("S", tokens, 2, draw=0), prompts=((1, 2, 3), (1, 2, 3, 4)))
    assert (workload.job.prefix, workload.job.documents) == (2, (1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_any_family_loses_its_end(family: Family, tmp_path: Path) -> None:
    source = save_checkpoint(family, tmp_path / "source")
    folder = endless_copy(source, tmp_path / "copy")
    generator = HfGenerator.load(folder, device="cpu", dtype="float32")
    assert generator.eos_ids == frozenset()
    workload = build("S", generator.tokens, 2, draw=0)
    num_begin = int(family != "qwen3")  # a token that opens the text
    assert workload.job.prefix - num_begin in range(195, 206)  # words that were cut may be spelled otherwise
    ours = open_system("whyrank", folder, "float32")(workload)
    theirs = generate(load_plain(folder, "float32"), workload, 2)
    for one, other in zip(ours, theirs, strict=True):
        assert one.label_probs == pytest.approx(other.label_probs, abs=1e-5)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a folder with config"):
        endless_copy(tmp_path, tmp_path / "copy")


# ---- the baseline and the check -------------------------------------------------------------------------------


@torch.inference_mode()
def plain_answer(model: PreTrainedModel, workload: Workload, prompt: tuple[int, ...]) -> Answer:
    """One document, one whole forward per token, no cache."""
    ids = list(prompt)
    for _ in range(workload.num_generated):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    probs = []
    for label in workload.endings.labels:
        whole = [*ids, *workload.endings.prompt, *label]
        log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        places = range(len(whole) - len(label) - 1, len(whole) - 1)
        probs.append(float(sum(log_probs[place, whole[place + 1]] for place in places).exp()))
    return Answer(tuple(ids[len(prompt) :]), tuple(probs))


@pytest.mark.parametrize("num_generated", [0, 5])
@pytest.mark.parametrize("labels", [((7,), (8,), (9,)), ((7,), (8, 10), (8, 11, 12))])
def test_the_baseline_answers_like_a_plain_forward(
    model: PreTrainedModel, tokens: ChatTokens, num_generated: int, labels: tuple[tuple[int, ...], ...]
) -> None:
    built = build("S", tokens, 3, draw=0)
    prompts = tuple(prompt[180 : 220 + 10 * i] for i, prompt in enumerate(built.prompts))
    workload = Workload(built.requests, prompts, Endings(built.endings.prompt, labels), num_generated)
    expected = [plain_answer(model, workload, prompt) for prompt in prompts]
    for batch_size in (1, 2, 3):
        for one, other in zip(generate(model, workload, batch_size), expected, strict=True):
            assert one.tokens == other.tokens
            assert one.label_probs == pytest.approx(other.label_probs, rel=1e-4)


def test_whyrank_and_the_baseline_agree(model: PreTrainedModel, checkpoint: Path, tokens: ChatTokens) -> None:
    workload = build("W", tokens, 3, draw=0)
    ours = open_system("whyrank", checkpoint, "float32")(workload)
    agreement = compare(model, workload, ours, generate(model, workload, 2))
    assert (agreement.num_documents, agreement.num_mismatches) == (3, 0)
    assert agreement.largest_label_difference < 1e-6


def test_other_tokens_or_labels_are_mismatches(model: PreTrainedModel, tokens: ChatTokens) -> None:
    built = build("S", tokens, 3, draw=0)
    workload = replace(built, num_generated=4)
    right = [plain_answer(model, workload, prompt) for prompt in workload.prompts]
    token, label, hidden = right
    second = int(model(torch.tensor([[*workload.prompts[0], *token.tokens[:1]]])).logits[0, -1].topk(2).indices[1])
    wrong = [
        replace(token, tokens=(token.tokens[0], second, *token.tokens[2:])),
        replace(label, label_probs=(label.label_probs[0] + 2e-4, *label.label_probs[1:])),
        replace(hidden, label_probs=(float("nan"), *hidden.label_probs[1:])),
    ]
    assert compare(model, workload, right, right) == Agreement(3)
    found = compare(model, workload, right, wrong)
    assert (found.num_mismatches, found.num_near_ties) == (3, 0)


def test_a_tie_may_fall_either_way(model: PreTrainedModel, tokens: ChatTokens) -> None:
    workload = replace(build("S", tokens, 1, draw=0), num_generated=1)
    tied = deepcopy(model)
    best = plain_answer(model, workload, workload.prompts[0])
    twin = (best.tokens[0] + 1) % TINY.vocab_size
    head = tied.get_output_embeddings().weight.detach().clone()
    head[twin] = head[best.tokens[0]]  # the same logit for both; the embeddings stay as they are
    tied.get_output_embeddings().weight = torch.nn.Parameter(head)
    other = replace(best, tokens=(twin,))
    assert compare(tied, workload, [best], [other]) == Agreement(1, num_near_ties=1)
    assert compare(model, workload, [best], [other]) == Agreement(1, num_mismatches=1)


# ---- the whole command ----------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_the_whole_command_on_a_tiny_model(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "speed.json"
    done = run("--model", checkpoint, "--documents", "4", "--repeats", "2", "--json", target)
    assert done.returncode == 0, done.stderr
    result = json.loads(target.read_text(encoding="utf-8"))
    keys = "workload model system dtype documents_per_second ratio peak_rss_mb roofline"
    assert all(list(row) == keys.split() for row in result["rows"])
    systems = ["whyrank", *BASELINES]
    assert [(row["workload"], row["system"]) for row in result["rows"]] == [
        (kind, system) for kind in "WS" for system in systems
    ]
    for kind in "WS":
        baselines = [row["ratio"] for row in result["rows"] if row["workload"] == kind and row["system"] in BASELINES]
        assert 1.0 in baselines
    assert all(0 < row["roofline"] < 1 and row["peak_rss_mb"] > 100 for row in result["rows"])
    assert all(len(more["wall_seconds"]) == len(more["cpu_seconds"]) == 2 for more in result["measurements"])
    assert [check["num_mismatches"] for check in result["checks"]] == [0] * 6
    made = {"command", "commit", "date", "hardware", "cpu", "num_threads", "versions", "machine"}
    assert made <= result.keys()
    assert result["num_threads"] == 1
    assert all(system in done.stdout for system in systems)


@pytest.mark.slow
@pytest.mark.skipif(not is_available(int8=True), reason="this torch has no 8-bit products here")
def test_dtypes_held_against_the_same_plain_systems_share_their_runs(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "speed.json"
    options = ("--documents", "2", "--repeats", "2", "--workload", "S", "--dtype", "int8", "bfloat16", "float32")
    done = run("--model", checkpoint, *options, "--json", target)
    assert done.returncode == 0, done.stderr
    result = json.loads(target.read_text(encoding="utf-8"))
    assert [row["dtype"] for row in result["rows"]] == ["int8"] * 4 + ["float32"] * 4 + ["bfloat16"] * 4
    seconds = {(more["dtype"], more["system"]): more["wall_seconds"] for more in result["measurements"]}
    for system in BASELINES:
        assert seconds["int8", system] == seconds["float32", system]
    rooflines = {(row["dtype"], row["system"]): row["roofline"] for row in result["rows"]}
    for system in BASELINES:  # they compute in float32 there
        assert rooflines["int8", system] == rooflines["float32", system]
    assert [found["dtype"] for found in result["machine"]] == ["int8", "float32", "bfloat16"]


@pytest.mark.slow
def test_a_wrong_model_is_refused_in_one_line(tmp_path: Path) -> None:
    done = run("--model", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"rerank.py: --model {tmp_path}: expected a folder")


# ---- training ------------------------------------------------------------------------------------------------------


def test_training_ratios_are_medians_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round does not count. In the other three, padded takes 2, 3 and 8 times as long; the median is 3."""
    clock = iter([0, 9, 9, 9, *(0, 1, 0, 2), *(0, 2, 0, 6), *(0, 1, 0, 8)])
    monkeypatch.setattr("benchmarks.train.time.perf_counter", lambda: float(next(clock)))
    found = train.measure({"packed": lambda: None, "padded": lambda: None}, 3, 12, lambda text: None)
    assert found["packed_is_faster_by"] == {"packed": 1.0, "padded": 3.0}
    assert found["samples_per_second"] == {"packed": 12.0, "padded": 2.0}


@pytest.mark.slow
def test_training_is_measured_without_trl(tmp_path: Path) -> None:
    words = ["--num-layers", "1", "--num-rounds", "1", "--num-steps", "1", "--num-threads", "1"]
    threads = torch.get_num_threads()
    try:
        train.main([*words, "--json", str(tmp_path / "speed.json")])
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    for part in ("distillation", "refinement"):
        assert {"packed", "padded"} <= found[part]["samples_per_second"].keys()
        assert min(found[part]["samples_per_second"].values()) > 0
