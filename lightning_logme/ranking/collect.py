"""One round of a candidate: accumulate its features, and score all samples so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_logme.features.isolation import seed_generators
from lightning_logme.features.labels import Target
from lightning_logme.features.sampling import FIRST_SAMPLES, Samples
from lightning_logme.ranking.candidate import Backbone, errors_naming
from lightning_logme.ranking.result import RankBy
from lightning_logme.ranking.resume import FirstSamples, Score
from lightning_logme.scores.accumulator import Accumulator, accumulate
from lightning_logme.scores.accuracy import measure
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.jackknife import jackknife
from lightning_logme.scores.scoring import Scoring
from lightning_logme.utilities.compat import Fabric

_CONSTANT = 1e-10  # a smaller variance, relative to the features' mean square, is a rounding error


@dataclass(frozen=True)
class Rules:
    """The settings that all candidates of a ranking share.

    Attributes:
        scoring: how to score; its number of outputs is known.
        rank_by: what the candidates are compared by.
        race: whether to drop candidates early.
        seed: seed of random weights.
    """

    scoring: Scoring
    rank_by: RankBy
    race: bool
    seed: int

    def target(self, labels: Tensor) -> Target:
        """Return the checked labels of a batch."""
        return Target.checked(labels, self.scoring.task, self.scoring.num_outputs, self.scoring.ignore_index)


@dataclass
class Collected:
    """The samples that one process has read in one round.

    Attributes:
        accumulators: their sums by source. The segment of a sample is its block of the jackknife.
        seen: number of samples.
        labels: digest of their labels.
        skipped: digest of the labels of earlier rounds, which a stream yields again.
    """

    accumulators: dict[str, Accumulator] = field(default_factory=dict)
    seen: int = 0
    labels: int = 0
    skipped: int = 0


def collect(
    backbone: Backbone,
    samples: Samples,
    rules: Rules,
    fabric: Fabric,
    start: int,
    stop: int,
    count: Callable[[int], object],
) -> Collected:
    """Accumulate this process's batches of the samples from ``start`` to ``stop``.

    Args:
        start: number of samples that earlier rounds have read.
        stop: number of samples after this round.
        count: called with the number of samples of each batch, to show progress.
    """
    collected = Collected()
    for portion in samples.portions(start, stop, fabric.global_rank, fabric.world_size):
        if portion.start < start:
            collected.skipped += portion.digest()
            continue
        number, target = len(portion.target), rules.target(portion.target)
        block, index = target.spread(portion.block), target.index(range(portion.start, portion.start + number))
        for source, features in backbone.rows(portion.batch, target, fabric).items():
            with errors_naming(source):
                rows = target.rows(features, normalize=rules.scoring.normalize)
                accumulate(collected.accumulators, source, rows, rules.scoring, block, index)
        collected.seen += number
        collected.labels += portion.digest()
        count(number)
    return collected


def first_samples(backbone: Backbone, samples: Samples, rules: Rules, fabric: Fabric) -> FirstSamples:
    """Return the labels and features of the first samples, to recognise a network and a data set later."""
    labels = samples.first.target[:FIRST_SAMPLES]
    target = rules.target(samples.first.target).first(len(labels))
    seed_generators(rules.seed)  # the forward pass may draw random numbers
    rows = backbone.rows(samples.first.batch, target, fabric)
    features = {source: target.rows(values).features.float().cpu() for source, values in rows.items()}
    return FirstSamples(labels, features)


def score(
    new: dict[str, Accumulator], earlier: dict[str, Accumulator], fit_intercept: bool
) -> Iterator[tuple[str, Score, Evidence]]:
    """Add earlier rounds to a new one, and yield the score and the evidence of all samples so far, by source.

    Args:
        new: accumulators of the new round. Afterwards they hold all rounds, on the CPU.
        earlier: accumulators of the earlier rounds. They must not be used later.
        fit_intercept: as in :class:`~lightning_logme.Evidence`.
    """
    if not any(accumulator.is_finite for accumulator in new.values()):
        raise ValueError("the features contain NaN or Inf")
    for source, accumulator in sorted(new.items()):
        with errors_naming(source):
            if source in earlier:
                accumulator.merge_(earlier[source])
            evidence, replicates, spectrum = jackknife(accumulator, fit_intercept)
            accuracy = measure(accumulator.sample(), evidence, spectrum, accumulator.task)
            accumulator.to("cpu")
            gain = float(evidence.gain)
            found = Score(float(evidence.score), gain, replicates, accuracy.value, accuracy.replicates)
            yield source, found, replace(evidence.to("cpu"), temperature=accuracy.temperature)


def is_constant(accumulator: Accumulator) -> bool:
    """Return whether the features are the same for every sample."""
    features = accumulator.sample().rows.features.double()
    return bool((features - features.mean(0)).square().sum() <= _CONSTANT * features.square().sum())
