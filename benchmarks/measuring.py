"""One model on all systems: interleaved times, peak memory, agreement, and the rows made of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from benchmarks.systems import (
    BASELINES,
    SYSTEMS,
    Agreement,
    Answer,
    Run,
    compare,
    load_plain,
    open_system,
    open_whyrank,
    plain,
    plain_dtype,
)
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
    """One model on disk, and those dtypes of whyrank's that are held against the same plain systems."""

    name: str
    folder: Path
    shape: Shape
    dtypes: tuple[str, ...]


@dataclass(slots=True)
class Trial:
    """All runs of one workload at one dtype: what there was to do in every repeat, seconds per system in the order in
    which they ran, and how the answers compare."""

    jobs: list[Job]
    wall: dict[str, list[float]] = field(default_factory=lambda: {system: [] for system in SYSTEMS})
    cpu: dict[str, list[float]] = field(default_factory=lambda: {system: [] for system in SYSTEMS})
    agreements: dict[str, Agreement] = field(default_factory=lambda: dict.fromkeys(BASELINES, Agreement(0)))


@dataclass(frozen=True, slots=True)
class Systems:
    """What is loaded: whyrank once per dtype, the plain systems once for all of these, and who decides on near ties."""

    ours: Mapping[str, Run]
    plain: Mapping[str, Run]
    judge: PreTrainedModel


Trials = dict[tuple[str, Kind], Trial]  # by dtype and workload


# ---- measuring ------------------------------------------------------------------------------------------------


def measure(setting: Setting, options: Options, note: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Rows, measurements, checks and rates (`machine`); `note` gets a line about every run."""
    rates = measure_rates(setting.shape, options.num_documents)
    for dtype in setting.dtypes:
        limits(rates, dtype)  # refused now rather than in an hour
    trials = _trials(setting, options, note)
    rates = merged(rates, measure_rates(setting.shape, options.num_documents))
    result: dict[str, list[dict[str, Any]]] = {"rows": [], "measurements": [], "checks": [], "machine": []}
    plain_memory = {
        kind: _memory(setting, setting.dtypes[0], kind, options, tuple(BASELINES)) for kind in options.kinds
    }
    for (dtype, kind), trial in trials.items():
        memory = {**_memory(setting, dtype, kind, options, ("whyrank",)), **plain_memory[kind]}
        keys = {"workload": kind, "model": setting.name, "dtype": dtype}
        for row, more in _rows(keys, setting.shape, trial, memory, rates):
            result["rows"].append(row)
            result["measurements"].append({**keys, "system": row["system"], **more})
        for system, agreement in trial.agreements.items():
            result["checks"].append({**keys, "systems": ["whyrank", system], **asdict(agreement)})
    result["machine"] = [{"model": setting.name, "dtype": dtype, **rates} for dtype in setting.dtypes]
    return result


def _trials(setting: Setting, options: Options, note: Callable[[str], None]) -> Trials:
    """All systems on all workloads. Their models are gone afterwards, and leave memory to the processes that follow."""
    tokens = ChatTokens(load_tokenizer(setting.folder))
    systems = _opened(setting)
    trials: Trials = {}
    for kind in options.kinds:
        draws = [build(kind, tokens, options.num_documents, draw=draw) for draw in range(options.num_repeats)]
        for run in (*systems.ours.values(), *systems.plain.values()):
            run(build(kind, tokens, NUM_WARM_UP_DOCUMENTS, draw=options.num_repeats))
        own = {dtype: Trial([draw.job for draw in draws]) for dtype in setting.dtypes}
        for number, workload in enumerate(draws, 1):
            note(f"{setting.name} {kind}, {number} of {len(draws)}")
            _interleave(systems, workload, own, note)
        trials |= {(dtype, kind): trial for dtype, trial in own.items()}
    return dict(sorted(trials.items(), key=lambda item: setting.dtypes.index(item[0][0])))


def _opened(setting: Setting) -> Systems:
    model = load_plain(setting.folder, setting.dtypes[0])
    return Systems(
        ours={dtype: open_whyrank(setting.folder, dtype) for dtype in setting.dtypes},
        plain={system: plain(model, system) for system in BASELINES},
        judge=model if model.dtype == torch.float32 else load_plain(setting.folder, "float32"),
    )


def _interleave(systems: Systems, workload: Workload, trials: Mapping[str, Trial], note: Callable[[str], None]) -> None:
    """Every system once, one after the other, on the same requests; times and agreement go into the trials."""

    def timed(system: str, title: str, run: Run, into: Iterable[Trial]) -> list[Answer]:
        start, start_cpu = time.perf_counter(), time.process_time()
        answers = run(workload)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        for trial in into:
            trial.wall[system].append(seconds)
            trial.cpu[system].append(cpu_seconds)
        note(f"  {title}: {seconds:.2f} s, CPU {cpu_seconds:.2f} s")
        return answers

    ours = {dtype: timed("whyrank", f"whyrank {dtype}", run, [trials[dtype]]) for dtype, run in systems.ours.items()}
    for system, run in systems.plain.items():
        theirs = timed(system, system, run, trials.values())
        for dtype, trial in trials.items():
            trial.agreements[system] += compare(systems.judge, workload, ours[dtype], theirs)


def _memory(setting: Setting, dtype: str, kind: Kind, options: Options, systems: Sequence[str]) -> dict[str, float]:
    """For each system, peak memory of a process that loads it and runs the workload once; in 1e6 bytes."""
    found = {}
    for system in systems:
        measured = (setting.folder, dtype, kind, options.num_documents, options.num_threads)
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            job = pool.submit(peak_memory_of_run, system, *measured)
            try:
                found[system] = job.result()
            except BrokenProcessPool as cause:
                raise GenerationError(
                    f"{setting.name} {dtype} {kind}: {system} died while its memory was measured, probably because "
                    "there was not enough; take fewer --documents or a smaller --model"
                ) from cause
    return found


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
    keys: Mapping[str, str], shape: Shape, trial: Trial, memory: Mapping[str, float], rates: Rates
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A row per system, and what stands behind it."""
    wall_ratios, cpu_ratios = (ratios(times, best_baseline(times)) for times in (trial.wall, trial.cpu))
    num = len(trial.jobs[0].documents)
    for system in SYSTEMS:
        seconds, cpu_seconds = trial.wall[system], trial.cpu[system]
        dtype = keys["dtype"] if system == "whyrank" else plain_dtype(keys["dtype"])
        phases = [ideal_work(shape, BYTES[dtype], job) for job in trial.jobs]
        least = [least_seconds(work, limits(rates, dtype)) for work in phases]
        row = {
            "workload": keys["workload"],
            "model": keys["model"],
            "system": system,
            "dtype": keys["dtype"],
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
