"""What the benchmarks share: data, a clock that lets threads come to rest, peaks of memory, and Markdown."""

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

# NumPy and torch bring a pool of threads each, which spin for a while after their last job (0.2 s in Intel's OpenMP)
# and would steal the cores from whatever is timed next.
_REST = 0.4  # seconds


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call takes once all thread pools have gone to sleep, and what it returns."""
    time.sleep(_REST)
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def class_features(num_rows: int, num_features: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32 features as a network's last layer gives them, relu(class mean + noise), and their labels."""
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
    """Set the high-water mark back to what is resident now, and return that in MiB."""
    RESET.write_text("5")
    return _status("VmRSS")


def peak() -> float:
    return _status("VmHWM")


def _status(field: str) -> float:
    line = next(line for line in _STATES.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
