"""One model at one dtype on all systems: interleaved times, peak memory, agreement, and the rows made of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.machine import Rates, limits, measure_rates, merged, peak_memory_mb
from benchmarks.roofline import BYTES, Job, Shape, ideal_work, least_seconds
from benchmarks.systems import BASELINES, SYSTEMS, Agreement, Run, compare, load_plain, open_system
from benchmarks.workload import Kind, Workload, build
from whyrank.errors import GenerationError
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.hf.load import load_tokenizer

__all__ = ["Options", "Setting", "Trial", "best_baseline", "measure", "ratios"]

NUM_WARM_UP_DOCUMENTS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for; the field names are those of the command line."""

    models: tuple[str, ...]
    kinds: tuple[Kind, ...]
    dtypes: tuple[str, ...]
    num_threads: int
    num_repeats: int
    num_documents: int


@dataclass(frozen=True, slots=True)
class Setting:
    """One model at one dtype, on disk."""

    name: str
    folder: Path
    shape: Shape
    dtype: str


@dataclass(slots=True)
class Trial:
    """All runs of one workload: what there was to do in every repeat, seconds per system in the order in which they
    ran, and how the answers compare."""

    jobs: list[Job]
    wall: dict[str, list[float]] = field(default_factory=lambda: {system: [] for system in SYSTEMS})
    cpu: dict[str, list[float]] = field(default_factory=lambda: {system: [] for system in SYSTEMS})
    agreements: dict[str, Agreement] = field(default_factory=lambda: dict.fromkeys(BASELINES, Agreement(0)))


# ---- measuring ------------------------------------------------------------------------------------------------


def measure(setting: Setting, options: Options, note: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Rows, measurements, checks and rates (`machine`); `note` gets a line about every run."""
    rates = measure_rates(setting.shape, options.num_documents)
    trials = _trials(setting, options, note)
    rates = merged(rates, measure_rates(setting.shape, options.num_documents))
    result: dict[str, list[dict[str, Any]]] = {"rows": [], "measurements": [], "checks": []}
    for kind, trial in trials.items():
        memory = {system: _memory_of(setting, system, kind, options) for system in SYSTEMS}
        for row, more in _rows(setting, kind, trial, memory, rates):
            result["rows"].append(row)
            result["measurements"].append({**_keys(setting, kind), "system": row["system"], **more})
        for system, agreement in trial.agreements.items():
            compared = {"systems": ["whyrank", system], **asdict(agreement)}
            result["checks"].append({**_keys(setting, kind), **compared})
    return {**result, "machine": [{"model": setting.name, "dtype": setting.dtype, **rates}]}


def _keys(setting: Setting, kind: Kind) -> dict[str, str]:
    return {"workload": kind, "model": setting.name, "dtype": setting.dtype}


def _trials(setting: Setting, options: Options, note: Callable[[str], None]) -> dict[Kind, Trial]:
    """All systems on all workloads. Their models are gone afterwards, and leave memory to the processes that follow."""
    tokens = ChatTokens(load_tokenizer(setting.folder))
    judge = load_plain(setting.folder, "float32")
    runs = {system: open_system(system, setting.folder, setting.dtype) for system in SYSTEMS}
    trials: dict[Kind, Trial] = {}
    for kind in options.kinds:
        draws = [build(kind, tokens, options.num_documents, draw=draw) for draw in range(options.num_repeats)]
        for run in runs.values():
            run(build(kind, tokens, NUM_WARM_UP_DOCUMENTS, draw=options.num_repeats))
        trial = Trial([draw.job for draw in draws])
        for number, workload in enumerate(draws, 1):
            note(f"{_title(setting, kind)}, {number} of {len(draws)}")
            _interleave(runs, workload, judge, trial, note)
        trials[kind] = trial
    return trials


def _title(setting: Setting, kind: Kind) -> str:
    return f"{setting.name} {setting.dtype} {kind}"


def _interleave(
    runs: Mapping[str, Run], workload: Workload, judge: PreTrainedModel, trial: Trial, note: Callable[[str], None]
) -> None:
    """Every system once, one after the other, on the same requests; times and agreement go into the trial."""
    answers = {}
    for system, run in runs.items():
        start, start_cpu = time.perf_counter(), time.process_time()
        answers[system] = run(workload)
        trial.wall[system].append(time.perf_counter() - start)
        trial.cpu[system].append(time.process_time() - start_cpu)
        note(f"  {system}: {trial.wall[system][-1]:.2f} s, CPU {trial.cpu[system][-1]:.2f} s")
    for system in BASELINES:
        trial.agreements[system] += compare(judge, workload, answers["whyrank"], answers[system])


def _memory_of(setting: Setting, system: str, kind: Kind, options: Options) -> float:
    """Peak memory of a process that loads one system and runs the workload once; in 1e6 bytes."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        job = pool.submit(
            peak_memory_of_run, system, setting.folder, setting.dtype, kind, options.num_documents, options.num_threads
        )
        try:
            return job.result()
        except BrokenProcessPool as cause:
            raise GenerationError(
                f"{_title(setting, kind)}: {system} died while its memory was measured, probably because there was not "
                "enough; take fewer --documents or a smaller --model"
            ) from cause


def peak_memory_of_run(
    system: str, folder: Path, dtype: str, kind: Kind, num_documents: int, num_threads: int
) -> float:
    """Runs in a process of its own: interpreter, torch, weights and workload, in 1e6 bytes."""
    torch.set_num_threads(num_threads)
    run = open_system(system, folder, dtype)
    run(build(kind, ChatTokens(load_tokenizer(folder)), num_documents, draw=0))
    return peak_memory_mb()


# ---- figures --------------------------------------------------------------------------------------------------


def ratios(times: Mapping[str, Sequence[float]], best: str) -> dict[str, float]:
    """How many times as fast as the system `best` each is: the median over the repeats of seconds by seconds.

    Neighbours in time are compared with each other, so that a machine that slows down slows both sides of a pair.
    """
    return {
        system: median(base / own for base, own in zip(times[best], seconds, strict=True))
        for system, seconds in times.items()
    }


def best_baseline(times: Mapping[str, Sequence[float]]) -> str:
    """The batch size of `generate` with the lowest median time."""
    return min(BASELINES, key=lambda system: median(times[system]))


def _rows(
    setting: Setting, kind: Kind, trial: Trial, memory: Mapping[str, float], rates: Rates
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A row per system, and what stands behind it."""
    wall_ratios, cpu_ratios = (ratios(times, best_baseline(times)) for times in (trial.wall, trial.cpu))
    phases = [ideal_work(setting.shape, BYTES[setting.dtype], job) for job in trial.jobs]
    least = [least_seconds(work, limits(rates, setting.dtype)) for work in phases]
    num = len(trial.jobs[0].documents)
    for system in SYSTEMS:
        seconds, cpu_seconds = trial.wall[system], trial.cpu[system]
        row = {
            "workload": kind,
            "model": setting.name,
            "system": system,
            "dtype": setting.dtype,
            "documents_per_second": round(num / median(seconds), 4),
            "ratio": round(wall_ratios[system], 3),
            "peak_rss_mb": round(memory[system], 1),
            "roofline": round(median(map(truediv, least, seconds)), 4),
        }
        yield (
            row,
            {
                "documents_per_cpu_second": round(num / median(cpu_seconds), 4),
                "ratio_cpu": round(cpu_ratios[system], 3),
                "wall_seconds": [round(second, 4) for second in seconds],
                "cpu_seconds": [round(second, 4) for second in cpu_seconds],
                "least_seconds": [round(second, 4) for second in least],
                "tokens": [asdict(job) for job in trial.jobs],
                "phases": [[asdict(work) for work in repeat] for repeat in phases],
            },
        )
