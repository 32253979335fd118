"""Helpers of the benchmarks: data, a clock that waits for idle threads, peaks of memory, and Markdown tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

BATCH_SIZE = 256

RESET = Path("/proc/self/clear_refs")
_STATES = Path("/proc/self/status")

T = TypeVar("T")

# NumPy and torch have a pool of threads each. After their last job, the threads spin for a while (0.2 s in Intel's
# OpenMP) and would take the cores from the next job.
_REST = 0.4  # seconds


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds that a call takes once all thread pools are idle, and its result."""
    time.sleep(_REST)
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def class_features(num_rows: int, num_features: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return float32 features like those of the last layer of a network, relu(class mean + noise), and labels."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(num_rows) % num_classes
    target = target[torch.randperm(num_rows, generator=generator)]
    means = torch.randn(num_classes, num_features, generator=generator)
    features = torch.randn(num_rows, num_features, generator=generator).mul_(2).add_(means[target]).relu_()
    return features, target


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"### {title}\n", flush=True)
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print(flush=True)


def reset_peak() -> float:
    """Reset the high-water mark to the memory that is resident now, and return that memory in MiB."""
    RESET.write_text("5")
    return _status("VmRSS")


def peak() -> float:
    return _status("VmHWM")


def _status(field: str) -> float:
    line = next(line for line in _STATES.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
