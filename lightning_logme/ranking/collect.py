"""One pass of a candidate over some samples: rows are accumulated, and everything so far is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from lightning_logme.features.isolation import seed_generators
from lightning_logme.features.labels import Target
from lightning_logme.features.sampling import FIRST_SAMPLES, Samples
from lightning_logme.ranking.candidate import Backbone, naming
from lightning_logme.ranking.resume import First, Score
from lightning_logme.scores.accumulator import Accumulator, accumulate
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.jackknife import jackknife
from lightning_logme.scores.scoring import Scoring
from lightning_logme.utilities.compat import Fabric

_CONSTANT = 1e-10  # of the features' mean square: a smaller variance is rounding


@dataclass(frozen=True)
class Rules:
    """What is the same for all candidates.

    Attributes:
        scoring: of their features; the number of outputs is known.
        race: whether candidates are dropped early.
        seed: of random weights.
    """

    scoring: Scoring
    race: bool
    seed: int

    def target(self, labels: Tensor) -> Target:
        """Return the checked labels of a batch."""
        return Target.checked(labels, self.scoring.task, self.scoring.num_outputs, self.scoring.ignore_index)


@dataclass
class Part:
    """What one process has accumulated from one pass.

    Attributes:
        accumulators: by source, with the block of each sample as the segment.
        seen: number of samples.
        labels: digest of their labels.
        skipped: digest of the labels of a stream that came before.
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
) -> Part:
    """Accumulate this process's batches of the samples from ``start`` to ``stop``.

    Args:
        backbone: gives the features.
        samples: of the target data set.
        rules: of the ranking.
        fabric: of the process.
        start: number of samples that were read before.
        stop: number of samples that have been read at the end.
        count: is called with the number of samples of each batch.
    """
    part = Part()
    for portion in samples.portions(start, stop, fabric.global_rank, fabric.world_size):
        if portion.start < start:
            part.skipped += portion.digest()
            continue
        number, target = len(portion.target), rules.target(portion.target)
        block, index = target.spread(portion.block), target.index(range(portion.start, portion.start + number))
        for source, features in backbone.rows(portion.batch, target, fabric).items():
            with naming(source):
                rows = target.rows(features, normalize=rules.scoring.normalize)
                accumulate(part.accumulators, source, rows, rules.scoring, block, index)
        part.seen += number
        part.labels += portion.digest()
        count(number)
    return part


def first_samples(backbone: Backbone, samples: Samples, rules: Rules, fabric: Fabric) -> First:
    """Return the labels and the features of the first samples, by which a network and a data set are recognised."""
    labels = samples.first.target[:FIRST_SAMPLES]
    target = rules.target(samples.first.target).first(len(labels))
    seed_generators(rules.seed)  # the network may draw random numbers when it runs
    rows = backbone.rows(samples.first.batch, target, fabric)
    return First(labels, {source: target.rows(features).features.float().cpu() for source, features in rows.items()})


def score(
    new: dict[str, Accumulator], earlier: dict[str, Accumulator], fit_intercept: bool
) -> Iterator[tuple[str, Score, Evidence]]:
    """Add what a round has accumulated to what was there, and yield the score of everything so far by source.

    Args:
        new: the accumulators of the round; afterwards they hold everything, on the CPU.
        earlier: those of the rounds before, which are used up.
        fit_intercept: as in :class:`~lightning_logme.Evidence`.
    """
    if not any(accumulator.is_finite for accumulator in new.values()):
        raise ValueError("the features contain NaN or Inf")
    for source, accumulator in sorted(new.items()):
        with naming(source):
            if source in earlier:
                accumulator.merge_(earlier[source])
            evidence, replicates = jackknife(accumulator, fit_intercept)
            accumulator.to("cpu")
            yield source, Score(float(evidence.score), float(evidence.gain), replicates), evidence.to("cpu")


def is_constant(accumulator: Accumulator) -> bool:
    """Return whether the features are the same for every sample."""
    features = accumulator.sample()[0].features.double()
    return bool((features - features.mean(0)).square().sum() <= _CONSTANT * features.square().sum())
