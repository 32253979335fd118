"""How often a race drops one of several equally good candidates, by LogME and by accuracy.

The error bars of LogME come from the leading directions, and those of accuracy from a random subset of the samples.

The candidates share labels, class means and some noise. Each also has noise of its own, so all are equally good in the
long run. The signal is so weak that accuracies lie between chance and 1. Features are rectified, and their sizes decay
as in features of networks. If the signal is in the tail, the leading directions hold no information about the labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_logme.features.drawing import stratified_order
from lightning_logme.ranking.comparison import Comparison
from lightning_logme.ranking.result import RankBy
from lightning_logme.ranking.resume import Score
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.accuracy import measure
from lightning_logme.scores.jackknife import ERROR_RATE, jackknife, paired_error, quantile_to_drop
from lightning_logme.scores.moments import Rows
from tests.benchmarks.common import print_table

_CANDIDATES, _ROUNDS = 4, 5
_COMPARED: tuple[RankBy, ...] = ("logme", "accuracy")
_SETTINGS = [  # features, classes, decay of the sizes, position of the signal
    (640, 10, 0.5, "everywhere"),
    (640, 100, 0.5, "everywhere"),
    (640, 10, 0.25, "tail"),
    (1280, 2, 0.5, "everywhere"),
    (1280, 10, 0.5, "everywhere"),
    (1280, 10, 0.25, "tail"),
]


def report(repeats: int, quick: bool) -> None:
    """Run ten races of each setting in each repeat."""
    print_table(
        f"Races of {_CANDIDATES} equal candidates: at most {ERROR_RATE:.0%} may drop any; error bar / true spread of "
        "the difference of two, round by round",
        ("D", "classes", "decay", "signal", "by", "races", "dropped any", "95 % interval", "error bar / spread"),
        (row for setting in (_SETTINGS[:1] if quick else _SETTINGS) for row in _rows(10 * repeats, *setting)),
    )


def _rows(races: int, width: int, classes: int, decay: float, where: str) -> Iterator[tuple[str, ...]]:
    from scipy.stats import binomtest

    results = [race(width, classes, decay, where, seed) for seed in range(races)]
    for rank_by in _COMPARED:
        dropped, differences, errors = zip(*(result[rank_by] for result in results), strict=True)
        unfair = sum(number > 0 for number in dropped)
        low, high = binomtest(unfair, races).proportion_ci()
        spread = torch.tensor(differences).square().mean(0).sqrt()
        ratio = torch.tensor(errors).square().mean(0).sqrt() / spread
        yield (
            *map(str, (width, classes, decay, where, rank_by, races, unfair)),
            f"{low:.1%} to {high:.1%}",
            ", ".join(f"{value:.2f}" for value in ratio.tolist()),
        )


def race(
    width: int, classes: int, decay: float, where: str, seed: int
) -> dict[RankBy, tuple[int, list[float], list[float]]]:
    """Run one race by LogME and one by accuracy, on the same samples.

    Returns:
        For each of the two: how many candidates are dropped, and, round by round, the difference of the first two
        candidates and its error bar.
    """
    features, labels, blocks = candidates(width, classes, decay, where, seed)
    stops = [max(256, 4 * classes) * 2**index for index in range(_ROUNDS)]
    sums = [Accumulator("multiclass", width, classes) for _ in features]
    running = {rank_by: {f"{name}" for name in range(len(features))} for rank_by in _COMPARED}
    differences: dict[RankBy, list[float]] = {rank_by: [] for rank_by in _COMPARED}
    errors: dict[RankBy, list[float]] = {rank_by: [] for rank_by in _COMPARED}
    start = 0
    for index, stop in enumerate(stops):
        scores = {}
        for name in sorted({"0", "1"}.union(*running.values())):
            own = sums[int(name)]
            own.add(Rows(features[int(name)][start:stop], labels[start:stop]), blocks[start:stop])
            evidence, replicates, spectrum = jackknife(own)
            accuracy = measure(own.sample(), evidence, spectrum, "multiclass")
            logme, gain = float(evidence.score), float(evidence.gain)
            scores[name, ""] = Score(logme, gain, replicates, accuracy.value, accuracy.replicates)
        first, second = scores["0", ""], scores["1", ""]
        differences["logme"].append(first.logme - second.logme)
        errors["logme"].append(paired_error(first.replicates, second.replicates))
        differences["accuracy"].append(first.accuracy - second.accuracy)
        errors["accuracy"].append(paired_error(first.accuracy_replicates, second.accuracy_replicates))
        for rank_by, names in running.items():
            known = {row: score for row, score in scores.items() if row[0] in names}
            behind = Comparison(known, rank_by).behind(quantile_to_drop(len(features), index + 1))
            names -= {name for name, _ in behind}
        start = stop
    return {
        rank_by: (len(features) - len(names), differences[rank_by], errors[rank_by])
        for rank_by, names in running.items()
    }


def candidates(
    width: int, classes: int, decay: float, where: str, seed: int
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """Return the features of all candidates, the labels, and the block of each sample, as in a race."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(256, 4 * classes) * 2 ** (_ROUNDS - 1)
    labels = torch.randint(classes, (rows,), generator=generator)
    order, blocks = stratified_order(rows, labels, generator)
    labels = labels[order]
    means = torch.randn(classes, width, generator=generator)
    means[:, : 256 if where == "tail" else 0] = 0
    shared = means[labels] / 4 + torch.randn(rows, width, generator=generator)
    sizes = torch.arange(1, width + 1) ** -decay
    features = [(shared + torch.randn(rows, width, generator=generator)).relu_() * sizes for _ in range(_CANDIDATES)]
    return features, labels, blocks
