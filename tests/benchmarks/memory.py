"""Peak extra memory of ``LogME``, which is built, updated with batches of 256 that are made on the fly, and computed.

Every case runs in a new process. After the imports, a small case starts the threads and allocates the buffers of the
BLAS. The kernel's high-water mark of resident memory (Linux: ``/proc/self``) is reset before each stage and read after
it. "Extra" memory is this mark minus the resident memory before the metric was built: states, batches, temporaries of
the arithmetic, and buffers that the BLAS keeps.

- The peak must not depend on N. It must be at most 6 matrices of D × D float64 and one batch.
- The papers' algorithm gets all its float32 features in memory first. They are not counted, but its float64 copy is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from statistics import median

import torch
from torch import Tensor

from lightning_logme import LogME
from tests.benchmarks.common import BATCH_SIZE, RESET, class_features, peak, print_table, reset_peak
from tests.benchmarks.peers import papers_logme

AIM = 6.0  # of D² float64 numbers

_CLASSES = 10
_SIZES = ((2_000, 1024), (20_000, 1024), (100_000, 1024), (5_000, 2048), (5_000, 4096))  # N, D
_FEW_SHOT = ((400, 2048), (400, 4096))
_PAPERS_SIZES = ((20_000, 1024),)
_QUICK = ((500, 256), (2_000, 256))
_PAPERS = "papers"
_METRIC = "metric"
_MIB = 2**20


def report(repeats: int, quick: bool) -> None:
    if not RESET.exists():
        print("Memory: not measured, there is no /proc here.\n")
        return
    repeats = min(repeats, 3)  # Memory is much less noisy than time.
    print_table(
        f"Memory: peak extra MiB, medians of {repeats} processes each (aim: {AIM:g} D² float64 + one batch, flat in N)",
        ("N × D", "after construction and updates, kept", "peak of updates", "peak of compute", "peak", "peak / D²·8"),
        (_metric_row(n, d, repeats) for n, d in (_QUICK if quick else (*_SIZES, *_FEW_SHOT))),
    )
    print_table(
        "Memory: the papers' algorithm",
        ("N × D", "peak extra MiB", "peak / D²·8"),
        (_papers_row(n, d, repeats) for n, d in (_QUICK if quick else _PAPERS_SIZES)),
    )


def _metric_row(n: int, d: int, repeats: int) -> tuple[str, ...]:
    runs = [_in_fresh_process(_METRIC, n, d) for _ in range(repeats)]
    kept, updates, compute = (median(run[stage] for run in runs) for stage in ("kept", "updates", "compute"))
    batch = BATCH_SIZE * d * 4 / _MIB
    peak = max(updates, compute)
    return (
        f"{n} × {d}",
        *(f"{value:.1f}" for value in (kept, updates, compute, peak)),
        f"{(peak - batch) / _matrix(d):.2f} + one batch",
    )


def _papers_row(n: int, d: int, repeats: int) -> tuple[str, ...]:
    peak = median(_in_fresh_process(_PAPERS, n, d)["compute"] for _ in range(repeats))
    return f"{n} × {d}", f"{peak:.1f}", f"{peak / _matrix(d):.2f}"


def _matrix(d: int) -> float:
    return d * d * 8 / _MIB


def _in_fresh_process(subject: str, n: int, d: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, subject, str(n), str(d)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _batches(n: int, d: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, n, BATCH_SIZE):
        yield class_features(min(BATCH_SIZE, n - start), d, _CLASSES, seed=start)


def _measure_metric(n: int, d: int) -> dict[str, float]:
    _run_metric(64, _batches(512, 64))
    before = reset_peak()
    metric = LogME("multiclass", d, _CLASSES)
    _update(metric, _batches(n, d))
    updates, kept = peak() - before, reset_peak() - before
    metric.compute()
    return {"kept": kept, "updates": updates, "compute": peak() - before}


def _run_metric(d: int, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    metric = LogME("multiclass", d, _CLASSES)
    _update(metric, batches)
    metric.compute()


def _update(metric: LogME, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    for features, target in batches:
        metric.update(features, target)


def _measure_papers(n: int, d: int) -> dict[str, float]:
    small, labels = class_features(512, 64, _CLASSES)
    papers_logme(small.numpy(), labels.numpy(), _CLASSES)
    features, target = class_features(n, d, _CLASSES)
    before = reset_peak()
    papers_logme(features.numpy(), target.numpy(), _CLASSES)
    return {"compute": peak() - before}


if __name__ == "__main__":
    torch.manual_seed(0)
    measure = {_METRIC: _measure_metric, _PAPERS: _measure_papers}[sys.argv[1]]
    print(json.dumps(measure(int(sys.argv[2]), int(sys.argv[3]))))
