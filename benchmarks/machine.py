"""What this machine can do, measured: matrix products, memory bandwidth, and the memory of a process."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.roofline import Limits, Shape
from whyrank.errors import GenerationError

__all__ = ["Rates", "description", "limits", "measure_rates", "merged", "peak_memory_mb", "sooner"]

NUM_CALLS = 5
NUM_COPIED = 1 << 25  # float32 values: 128 MiB, many times the caches
BIG = (1024, 2048, 2048)
NUM_PREFILL_ROWS = 512

Rates = dict[str, Any]


def sooner(call: Callable[[], object], num_calls: int = NUM_CALLS) -> float:
    """Seconds of the fastest of several calls, after one that does not count: noise only ever adds."""
    call()
    fastest = float("inf")
    for _ in range(num_calls):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


@torch.inference_mode()
def measure_rates(shape: Shape, num_rows: int) -> Rates:
    """Giga-operations per second of matrix products, per dtype and size, and GB/s of a copy in memory.

    Args:
        shape: its MLP gives the realistic sizes: for a prefill of 512 tokens, and for one step of `num_rows` sequences.
        num_rows: documents that are decoded together.

    Sizes are `rows x inputs x outputs`; `packed` has the weights in oneDNN's own layout. A product that this build
    of torch does not have is `None`.
    """
    inputs, outputs = shape.hidden_size, shape.intermediate_size
    sizes = dict.fromkeys([(NUM_PREFILL_ROWS, inputs, outputs), (num_rows, inputs, outputs), BIG])
    rates: Rates = {"gemm_gflops": {dtype: {} for dtype in ("float32", "bfloat16", "int8")}}
    for rows, ins, outs in sizes:
        for name, call in _products(rows, ins, outs).items():
            dtype, _, layout = name.partition(" ")
            seconds = _seconds_if_possible(call)
            rate = None if seconds is None else round(2 * rows * ins * outs / seconds / 1e9, 1)
            rates["gemm_gflops"][dtype][f"{rows}x{ins}x{outs} {layout}".strip()] = rate
    source, target = torch.ones(NUM_COPIED), torch.empty(NUM_COPIED)
    rates["copy_gb_per_second"] = round(2 * 4 * NUM_COPIED / sooner(lambda: target.copy_(source)) / 1e9, 2)
    return rates


def _products(rows: int, inputs: int, outputs: int) -> Mapping[str, Callable[[], object]]:
    values = torch.randn(rows, inputs)
    layer = torch.nn.Linear(inputs, outputs)
    narrow, narrow_weight = values.bfloat16(), layer.weight.bfloat16()
    small, small_weight = values.mul(9).to(torch.int8), layer.weight.mul(99).to(torch.int8).t()
    calls: dict[str, Callable[[], object]] = {
        "float32": lambda: linear(values, layer.weight),
        "bfloat16": lambda: linear(narrow, narrow_weight),
        "int8": lambda: torch._int_mm(small, small_weight),
    }
    if torch.backends.mkldnn.is_available():
        calls["float32 packed"] = _packed_product(values, layer.weight.detach())
        calls["bfloat16 packed"] = _packed_product(narrow, narrow_weight.detach())
    return calls


def _packed_product(values: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, values.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(values, packed, None, "none", [], "")


def _seconds_if_possible(call: Callable[[], object]) -> float | None:
    try:
        return sooner(call)
    except (NotImplementedError, RuntimeError):
        return None


def merged(one: Rates, other: Rates) -> Rates:
    """Of two measurements of the same things the higher rates, since noise only ever lowers them."""
    products = {
        dtype: {
            size: max(rate, other["gemm_gflops"][dtype][size]) if rate is not None else None
            for size, rate in found.items()
        }
        for dtype, found in one["gemm_gflops"].items()
    }
    return {
        "gemm_gflops": products,
        "copy_gb_per_second": max(one["copy_gb_per_second"], other["copy_gb_per_second"]),
    }


def limits(rates: Rates, dtype: str) -> Limits:
    """The best rate of this dtype over all sizes and layouts, and the bandwidth.

    float16 is held against bfloat16's rate: processors have both at the same speed or lack the former.

    Raises:
        GenerationError: there is no such product here.
    """
    measured = rates["gemm_gflops"]["bfloat16" if dtype == "float16" else dtype]
    found = [rate for rate in measured.values() if rate is not None]
    if not found:
        raise GenerationError(f"--dtype {dtype}: this build of torch has no such matrix product here")
    return Limits(max(found) * 1e9, rates["copy_gb_per_second"] * 1e9)


def peak_memory_mb() -> float:
    """The most memory that this process has held at once, in 1e6 bytes.

    On Linux from `/proc`: `getrusage` there carries over what the parent held before this process was started.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def description(num_threads: int) -> dict[str, Any]:
    """Processor, threads and versions."""
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": num_threads,
        "versions": {"python": platform.python_version(), **versions},
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
