"""Seconds from float32 features in memory to the score, compared with two peers and with the cost of the arithmetic.

All contestants run in one process, in turn in every round, so that noise affects all of them alike. Each is timed
alone, after a pause in which the thread pools of NumPy and torch become idle. Figures are medians over the rounds. A
contestant that has used up its time for a case skips the remaining rounds.

- "metric": ``LogME`` is built, updated with batches of 256, and computed. "accumulator": the same with the accumulator
  that the callback and rankings use. "logme": one call of the function.
- The aim is a factor over the faster peer.
- The limit is the time of half a float64 product (a Gram matrix is symmetric), with the best of several block sizes
  and without the conversion to float64, plus the time of one ``torch.linalg.eigh``. The product is FᵀF, or FFᵀ where
  N < D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from lightning_logme import LogME
from lightning_logme.features.labels import Target
from lightning_logme.functional import logme
from lightning_logme.scores.accumulator import Accumulator
from tests.benchmarks.common import BATCH_SIZE, class_features, print_table, timed
from tests.benchmarks.peers import papers_logme, transformer_ranker_logme

PAPERS, RANKER, METRIC, FUNCTION = "papers", "transformer-ranker", "metric", "logme"
ACCUMULATOR = "accumulator"
CONTESTANTS = (PAPERS, RANKER, METRIC, ACCUMULATOR, FUNCTION)
PRODUCT, EIGH = "product", "eigh"

_BLOCKS = (256, 1024, 4096, 1 << 30)  # rows per product
_BUDGET = 40.0  # seconds that a contestant may spend on a case


@dataclass(frozen=True)
class Case:
    """A shape of the features, and the aims: factors over the faster peer."""

    rows: int
    features: int
    classes: int
    metric_aim: float
    accumulator_aim: float
    function_aim: float

    def __str__(self) -> str:
        return f"{self.rows} × {self.features}, {self.classes}"


CASES = (
    Case(20_000, 768, 100, 3, 3, 3),
    Case(20_000, 2048, 100, 3, 3, 3),
    Case(5_000, 1280, 10, 2, 2, 2),
    Case(50_000, 512, 1000, 10, 10, 10),
    Case(400, 3072, 10, 3, 3, 5),
    Case(500, 4096, 10, 3, 3, 5),
)
QUICK_CASES = (Case(2_000, 256, 20, 1, 1, 1), Case(200, 512, 5, 1, 1, 1))


def report(repeats: int, quick: bool) -> None:
    warm_up()
    results = []
    for case in QUICK_CASES if quick else CASES:
        seconds, scores = measure(case, repeats)
        results.append((case, {name: median(times) for name, times in seconds.items()}, scores))
        print(_spread(case, seconds), flush=True)
    print()
    faster = ("metric: × faster (aim)", "accumulator: × faster (aim)", "logme: × faster (aim)")
    print_table(
        "Speed: seconds, medians",
        (
            "N × D, K",
            PAPERS,
            RANKER,
            METRIC,
            ACCUMULATOR,
            FUNCTION,
            *faster,
            "limit",
            "metric / limit",
            "logme / limit",
        ),
        (_row(case, seconds) for case, seconds, _ in results),
    )
    print_table(
        "Speed: the parts, in seconds, and the scores",
        (
            "N × D, K",
            "metric: updates",
            "metric: compute",
            "½ product",
            "eigh",
            PAPERS,
            RANKER,
            METRIC,
            ACCUMULATOR,
            FUNCTION,
        ),
        (_parts(case, seconds, scores) for case, seconds, scores in results),
    )


def warm_up() -> None:
    """Do what happens once in a process: start threads, allocate memory of the BLAS, choose kernels."""
    for rows, width in (600, 64), (64, 600):
        features, target = class_features(rows, width, 3)
        for call in contestants(features, target, 3).values():
            call()


def measure(case: Case, repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return, for every contestant, the seconds of each round and the score."""
    features, target = class_features(case.rows, case.features, case.classes)
    seconds: dict[str, list[float]] = {}
    scores: dict[str, float] = {}
    for _ in range(repeats):
        for name, call in contestants(features, target, case.classes).items():
            if sum(seconds.get(name, ())) < _BUDGET:
                elapsed, scores[name] = timed(call)
                seconds.setdefault(name, []).append(elapsed)
        for name, elapsed in {**metric_parts(features, target, case.classes), **limits(features)}.items():
            seconds.setdefault(name, []).append(elapsed)
    return seconds, scores


def contestants(features: Tensor, target: Tensor, num_classes: int) -> dict[str, Callable[[], float]]:
    calls: dict[str, Callable[[], float]] = {
        PAPERS: partial(papers_logme, features.numpy(), target.numpy(), num_classes),
        METRIC: lambda: float(fed_metric(features, target, num_classes).compute()),
        ACCUMULATOR: lambda: float(fed_accumulator(features, target, num_classes).evidence().score),
        FUNCTION: lambda: float(logme(features, target, num_classes=num_classes)),
    }
    ranker = transformer_ranker_logme()
    if ranker is not None:
        calls[RANKER] = partial(ranker, features, target)
    return calls


def fed_metric(features: Tensor, target: Tensor, num_classes: int) -> LogME:
    metric = LogME("multiclass", features.shape[1], num_classes)
    for rows, labels in zip(features.split(BATCH_SIZE), target.split(BATCH_SIZE), strict=True):
        metric.update(rows, labels)
    return metric


def fed_accumulator(features: Tensor, target: Tensor, num_classes: int) -> Accumulator:
    accumulator = Accumulator("multiclass", features.shape[1], num_classes)
    for rows, labels in zip(features.split(BATCH_SIZE), target.split(BATCH_SIZE), strict=True):
        accumulator.add(Target.checked(labels, "multiclass", num_classes).rows(rows))
    return accumulator


def metric_parts(features: Tensor, target: Tensor, num_classes: int) -> dict[str, float]:
    updates, metric = timed(lambda: fed_metric(features, target, num_classes))
    compute, _ = timed(metric.compute)
    return {"updates": updates, "compute": compute}


def limits(features: Tensor) -> dict[str, float]:
    """Return the seconds of the unavoidable arithmetic."""
    rows = features.double()
    if len(rows) < rows.shape[1]:
        rows = rows.T
    product = min(timed(partial(_gram, rows, block))[0] for block in _BLOCKS)
    gram = rows.T @ rows
    return {PRODUCT: product / 2, EIGH: timed(lambda: torch.linalg.eigh(gram))[0]}


def _gram(rows: Tensor, block: int) -> Tensor:
    gram = rows.new_zeros(rows.shape[1], rows.shape[1])
    for part in rows.split(min(block, len(rows))):
        gram.addmm_(part.T, part)
    return gram


def _row(case: Case, seconds: Mapping[str, float]) -> tuple[str, ...]:
    peer = min(seconds[name] for name in (PAPERS, RANKER) if name in seconds)
    limit = seconds[PRODUCT] + seconds[EIGH]
    return (
        str(case),
        *(
            f"{seconds[name]:.3f}" if name in seconds else "–"
            for name in (PAPERS, RANKER, METRIC, ACCUMULATOR, FUNCTION)
        ),
        f"{peer / seconds[METRIC]:.1f} ({case.metric_aim:g})",
        f"{peer / seconds[ACCUMULATOR]:.1f} ({case.accumulator_aim:g})",
        f"{peer / seconds[FUNCTION]:.1f} ({case.function_aim:g})",
        f"{limit:.3f}",
        f"{seconds[METRIC] / limit:.2f}",
        f"{seconds[FUNCTION] / limit:.2f}",
    )


def _parts(case: Case, seconds: Mapping[str, float], scores: Mapping[str, float]) -> tuple[str, ...]:
    parts = ("updates", "compute", PRODUCT, EIGH)
    return (
        str(case),
        *(f"{seconds[name]:.3f}" for name in parts),
        *(f"{scores[name]:.6f}" if name in scores else "–" for name in CONTESTANTS),
    )


def _spread(case: Case, seconds: Mapping[str, list[float]]) -> str:
    """Return a line with the range of the rounds of a case, which shows the noise."""
    ranges = (f"{name} {min(times):.3f}…{max(times):.3f} ({len(times)})" for name, times in seconds.items())
    return f"- {case}: " + ", ".join(ranges)
