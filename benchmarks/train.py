"""Training speed: our packed step, the same step in padded rows, and TRL's trainers; distillation and refinement.

One random Llama of 30 million parameters, the same examples, dtype and threads in one process: queries of 60 tokens,
four documents of 60 each, answers of 40. Refinement is a round of GRPO (`refining.py`): two prompts of 512 tokens,
eight samples each, 64 new tokens. The systems take turns; a round gives one time each, and ratios are medians of
the rounds' ratios. TRL is no dependency of whyrank. It installs beside it (`pip install 'trl>=1.16,<2'`, which brings
datasets, pandas and pyarrow); without it, the other two are measured, and the table says so.

    python benchmarks/train.py --json results/train-speed.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # run as a file, Python would look in this folder only

import torch  # noqa: E402
from provenance import provenance, write_result  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from benchmarks import refining  # noqa: E402
from benchmarks.machine import description  # noqa: E402
from benchmarks.workload import RANDOM_MODELS, save_random_model  # noqa: E402
from whyrank.generators.hf.load import load_model, load_tokenizer  # noqa: E402
from whyrank.training.config import DistillConfig  # noqa: E402
from whyrank.training.optimizers import optimizers_of  # noqa: E402
from whyrank.training.packing import Strand  # noqa: E402
from whyrank.training.steps import update  # noqa: E402

__all__ = ["main", "measure", "strands"]

NUM_QUERY, NUM_DOCUMENT, NUM_ANSWER, NUM_DOCUMENTS = 60, 60, 40, 4
LEARNING_RATE = 1e-5
System = Callable[[], object]


def strands(num_queries: int, vocab_size: int, seed: int = 0) -> list[Strand]:
    """Random tokens in the sizes above; the loss is on the answers."""
    rng = Random(seed)

    def ids(num: int) -> tuple[int, ...]:
        return tuple(rng.randrange(6, vocab_size) for _ in range(num))

    found = []
    for query in [ids(NUM_QUERY) for _ in range(num_queries)]:
        for _ in range(NUM_DOCUMENTS):
            read = query + ids(NUM_DOCUMENT)
            weights = (0.0,) * len(read) + (1.0,) * NUM_ANSWER
            found.append(Strand(read + ids(NUM_ANSWER), weights, (NUM_QUERY,)))
    return found


def ours(folder: Path, batch: Sequence[Strand], dtype: str, num_steps: int, *, is_packed: bool) -> System:
    """Some steps of `whyrank distill`."""
    model = _model(folder)
    model.set_attn_implementation("eager")
    precision: Literal["float32", "bfloat16"] = "bfloat16" if dtype == "bfloat16" else "float32"
    config = DistillConfig(is_packed=is_packed, precision=precision, learning_rate=LEARNING_RATE)
    optimizers = optimizers_of(model, config)

    def run() -> None:
        for _ in range(num_steps):
            update(model, optimizers, batch, LEARNING_RATE, config)

    return run


def trl(folder: Path, batch: Sequence[Strand], dtype: str, num_steps: int, scratch: Path) -> System:
    """As many steps of SFTTrainer on the same tokens, its settings for a GPU taken back; the trainer is made
    before the clock starts."""
    dataset, library = import_module("datasets").Dataset, import_module("trl")
    rows = [
        {"input_ids": list(strand.ids), "completion_mask": [int(weight > 0) for weight in strand.weights]}
        for strand in batch
    ]
    settings: dict[str, Any] = {
        "output_dir": str(scratch),
        "per_device_train_batch_size": len(batch),
        "max_steps": num_steps,
        "learning_rate": LEARNING_RATE,
        "bf16": dtype == "bfloat16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "completion_only_loss": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
    }
    trainer = library.SFTTrainer(
        model=_model(folder),
        args=library.SFTConfig(**settings),
        train_dataset=dataset.from_list(rows),
        processing_class=load_tokenizer(folder),
    )
    train: System = trainer.train
    return train


def _model(folder: Path) -> PreTrainedModel:
    model = load_model(folder, torch.device("cpu"), torch.float32)
    torch.nn.Module.train(model, True)
    return model


def measure(
    systems: Mapping[str, System], num_rounds: int, num_samples: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Interleaved rounds after one that does not count: seconds of each system, samples per second (median), and how
    many times faster `packed` is than each (median of the rounds' ratios)."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(num_rounds + 1):
        for name, run in systems.items():
            start = time.perf_counter()
            run()
            spent = time.perf_counter() - start
            note(f"round {number} of {num_rounds}: {name} {spent:.2f} s")
            if number:
                seconds[name].append(spent)
    ratios = {
        name: round(median(other / own for own, other in zip(seconds["packed"], times, strict=True)), 3)
        for name, times in seconds.items()
    }
    speeds = {name: round(num_samples / median(times), 3) for name, times in seconds.items()}
    return {"samples_per_second": speeds, "packed_is_faster_by": ratios, "seconds": seconds}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and write the result as JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--part", choices=("distillation", "refinement", "both"), default="both")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=3, help="optimizer steps per time")
    parser.add_argument("--num-queries", type=int, default=4, help="queries per step, four documents each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--num-layers", type=int, default=RANDOM_MODELS["random-30m"].num_layers)
    options = parser.parse_args(words)
    torch.set_num_threads(options.num_threads)
    shape = replace(RANDOM_MODELS["random-30m"], num_layers=options.num_layers)
    batch = strands(options.num_queries, shape.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_random_model(shape, Path(scratch) / "model")
        more = (folder, batch, options.dtype, options.num_steps)
        systems = {"packed": ours(*more, is_packed=True), "padded": ours(*more, is_packed=False)}
        rounds = {
            "packed": refining.packed(folder, options.num_steps),
            "padded": refining.padded(folder, options.num_steps),
        }
        if find_spec("trl") is not None:
            systems["trl"] = trl(*more, Path(scratch) / "trl")
            rounds["trl"] = refining.trl(folder, options.num_steps, Path(scratch) / "trl-grpo")
        else:
            sys.stderr.write("trl is not installed; the table goes without it: pip install 'trl>=1.16,<2'\n")
        per_round = refining.NUM_PROMPTS * refining.NUM_SAMPLES
        result: dict[str, Any] = {}
        if options.part != "refinement":
            result["distillation"] = measure(systems, options.num_rounds, len(batch) * options.num_steps, _note)
        if options.part != "distillation":
            result["refinement"] = measure(rounds, options.num_rounds, per_round * options.num_steps, _note)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    for part, found in result.items():
        for name, speed in found["samples_per_second"].items():
            ratio = found["packed_is_faster_by"][name]
            sys.stdout.write(f"{part:12} {name:8} {speed:8.2f} samples/s   packed is {ratio:.2f} times as fast\n")
    made = provenance(shlex.join(["python", "benchmarks/train.py", *(sys.argv[1:] if words is None else words)]))
    result = {**made, **result, "settings": settings, "machine": description(options.num_threads)}
    if options.json:
        write_result(options.json, result)
    return result


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
