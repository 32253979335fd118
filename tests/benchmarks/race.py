"""How often a race drops one of several equally good candidates, with error bars from the leading directions.

The candidates share labels, class means and some noise. Each also has noise of its own, so all are equally good in the
long run. Features are rectified, and their sizes decay as in features of networks. If the signal is in the tail, the
leading directions contain no information about the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_logme.features.drawing import stratified_order
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.jackknife import ERROR_RATE, jackknife, quantile_to_drop, standard_error, trailing
from lightning_logme.scores.moments import Rows
from tests.benchmarks.common import print_table

_CANDIDATES, _ROUNDS = 4, 5
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
        ("D", "classes", "decay", "signal", "races", "dropped any", "95 % interval", "error bar / spread"),
        (_row(10 * repeats, *setting) for setting in (_SETTINGS[:1] if quick else _SETTINGS)),
    )


def _row(races: int, width: int, classes: int, decay: float, where: str) -> tuple[str, ...]:
    from scipy.stats import binomtest

    unfair, differences, errors = 0, [], []
    for seed in range(races):
        dropped, difference, error = race(width, classes, decay, where, seed)
        unfair += dropped > 0
        differences.append(difference)
        errors.append(error)
    spread = torch.tensor(differences).square().mean(0).sqrt()
    ratio = torch.tensor(errors).square().mean(0).sqrt() / spread
    low, high = binomtest(unfair, races).proportion_ci()
    return (
        *map(str, (width, classes, decay, where, races, unfair)),
        f"{low:.1%} to {high:.1%}",
        ", ".join(f"{value:.2f}" for value in ratio.tolist()),
    )


def race(width: int, classes: int, decay: float, where: str, seed: int) -> tuple[int, list[float], list[float]]:
    """Return how many candidates are dropped, and per round the difference of the first two and its error bar."""
    features, labels, blocks = candidates(width, classes, decay, where, seed)
    stops = [max(256, 4 * classes) * 2**index for index in range(_ROUNDS)]
    sums = [Accumulator("multiclass", width, classes, sample_size=0) for _ in features]
    running, differences, errors, start = set(range(len(features))), [], [], 0
    for index, stop in enumerate(stops):
        scores, replicates = {}, {}
        for name in sorted(running | {0, 1}):
            sums[name].add(Rows(features[name][start:stop], labels[start:stop]), blocks[start:stop])
            evidence, replicates[f"{name}"] = jackknife(sums[name])
            scores[f"{name}"] = float(evidence.score)
        differences.append(scores["0"] - scores["1"])
        errors.append(standard_error([a - b for a, b in zip(replicates["0"], replicates["1"], strict=True)]))
        known = {name: score for name, score in scores.items() if int(name) in running}
        running -= {int(name) for name in trailing(known, replicates, quantile_to_drop(len(features), index + 1))}
        start = stop
    return len(features) - len(running), differences, errors


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
    shared = means[labels] / 2 + torch.randn(rows, width, generator=generator)
    sizes = torch.arange(1, width + 1) ** -decay
    features = [(shared + torch.randn(rows, width, generator=generator)).relu_() * sizes for _ in range(_CANDIDATES)]
    return features, labels, blocks
