"""The cost of accuracy: seconds from float32 features in memory to the results, without and with accuracy.

An accumulator, as in the callback and the rankings, takes batches of 256, and the evidence is computed. With accuracy,
the accumulator also keeps a random subset of 2048 rows, and the accuracy on that subset and its standard error are
measured too. Runs without and with accuracy take turns, and their order changes every round.
"""

from __future__ import annotations

from statistics import median

from torch import Tensor

from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.accuracy import Accuracy, measure
from lightning_logme.scores.moments import Rows
from lightning_logme.scores.subset import SAMPLE_SIZE
from tests.benchmarks.common import BATCH_SIZE, class_features, print_table, timed

_CASES = ((256, 1280, 10), (5_000, 1280, 10), (10_000, 256, 10), (20_000, 768, 100), (20_000, 2048, 1000))


def report(repeats: int, quick: bool) -> None:
    print_table(
        "Accuracy: medians",
        ("N × D, K", "without, s", "with, s", "added, s", "added, %", "smallest … largest, s", "subset, MiB"),
        (_row(*case, repeats) for case in (_CASES[:1] if quick else _CASES)),
    )


def _row(n: int, d: int, k: int, repeats: int) -> tuple[str, ...]:
    features, labels = class_features(n, d, k)
    _run(features, labels, k, True)  # The first call of a function may take longer.
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for index in range(repeats):
        for accurate in (index % 2 == 0, index % 2 == 1):
            taken, _ = timed(lambda accurate=accurate: _run(features, labels, k, accurate))  # type: ignore[misc]
            seconds[accurate].append(taken)
    without, added = median(seconds[False]), [a - b for a, b in zip(seconds[True], seconds[False], strict=True)]
    return (
        f"{n} × {d}, {k}",
        f"{without:.3f}",
        f"{median(seconds[True]):.3f}",
        f"{median(added):.3f}",
        f"{100 * median(added) / without:.1f} %",
        f"{min(added):.3f} … {max(added):.3f}",
        f"{min(n, SAMPLE_SIZE) * d * 4 / 2**20 if n >= d else 0:.1f}",
    )


def _run(features: Tensor, labels: Tensor, num_classes: int, accurate: bool) -> Accuracy | None:
    size = SAMPLE_SIZE if accurate else 0
    accumulator = Accumulator("multiclass", features.shape[1], num_classes, sample_size=size)
    for rows, target in zip(features.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
        accumulator.add(Rows(rows, target))
    evidence, spectrum = accumulator.decomposed()
    return measure(accumulator.sample(), evidence, spectrum, "multiclass") if accurate else None
