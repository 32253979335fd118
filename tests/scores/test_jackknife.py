"""Error bars compared with the spread of fresh samples, and how often a race drops an equally good candidate."""

import math

import numpy as np
import pytest
import torch
from oracles import problem
from scipy import stats
from streamed import rows_of

from lightning_logme.functional import logme
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.jackknife import (
    ERROR_RATE,
    jackknife,
    quantile_of_ties,
    quantile_to_drop,
    standard_error,
    student_quantile,
    trailing,
)

BLOCKS = 8
WIDTH = 24


def in_blocks(features, labels, classes=3, batch=None):
    """Return an accumulator in which block k holds every eighth sample from k on."""
    accumulator = Accumulator("multiclass", features.shape[1], classes)
    for at in torch.arange(len(labels)).split(batch or len(labels)):
        accumulator.add(rows_of(features[at], labels[at], num_outputs=classes), at % BLOCKS)
    return accumulator


def jackknifed(features, labels, classes, fit_intercept=False):
    """Return the evidence, and the scores without each block."""
    evidence, scores, _ = jackknife(in_blocks(features, labels, classes), fit_intercept)
    return evidence, torch.tensor(scores, dtype=torch.float64)


def tensors(*args, **options):
    return [torch.as_tensor(array) for array in problem(*args, **options)]


@pytest.mark.parametrize("probability", [0.2, 0.05, 1e-3, 1e-6])
def test_quantiles_are_those_of_students_t_distribution(probability):
    assert student_quantile(probability) == pytest.approx(stats.t.isf(probability, BLOCKS - 1), rel=1e-9)


def test_error_rate_is_shared_among_pairs_and_rounds():
    spent = sum(stats.t.sf(quantile_to_drop(5, r), BLOCKS - 1) * 5 * 4 for r in range(1, 2000))
    assert spent == pytest.approx(ERROR_RATE, rel=1e-3)
    assert quantile_of_ties(2) == pytest.approx(stats.t.isf(ERROR_RATE / 2, BLOCKS - 1))


@pytest.mark.parametrize("batch", [None, 30])
@pytest.mark.parametrize(("n", "d"), [(200, 12), (100, 40), (50, 120), (100, 300), (300, 280)])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_scores_with_a_block_left_out_are_those_of_the_other_rows(n, d, fit_intercept, batch):
    """At most 256 directions are used: the scores are exact unless both N and D are larger."""
    features, labels = tensors(n, d, 3, noise=2.0)
    whole, scores, _ = jackknife(in_blocks(features, labels, batch=batch), fit_intercept)
    expected = logme(features, labels, fit_intercept=fit_intercept)
    assert float(whole.score) == pytest.approx(float(expected), rel=1e-8)
    rest = [torch.arange(n) % BLOCKS != k for k in range(BLOCKS)]
    expected = [float(logme(features[r], labels[r], fit_intercept=fit_intercept)) for r in rest]
    assert scores == pytest.approx(expected, rel=1e-7 if d <= 256 or n <= 256 else 0.05)


@pytest.mark.parametrize(("n", "d"), [(200, 400), (1500, 400)])
def test_leading_directions_are_enough_for_error_bars(n, d):
    features, labels = tensors(n, d, 5, noise=3.0)
    features = features / torch.arange(1, d + 1)  # The spectrum decays, as in features of networks.
    _, scores = jackknifed(features, labels, 5)
    rest = [torch.arange(n) % BLOCKS != k for k in range(BLOCKS)]
    exact = [float(logme(features[r], labels[r], num_classes=5)) for r in rest]
    assert standard_error(scores.tolist()) == pytest.approx(standard_error(exact), rel=0.35)


def test_class_present_in_a_single_block_does_not_inflate_the_error():
    features, labels = tensors(160, 6, 3)
    without = standard_error(jackknifed(features, labels, 3)[1].tolist())
    labels = labels.clone()
    labels[3] = 3
    evidence, scores = jackknifed(features, labels, 4)
    assert not evidence.per_output.isnan().any()
    assert scores.isfinite().all()
    assert standard_error(scores.tolist()) < 5 * without


@pytest.mark.slow
def test_error_bars_match_the_spread_of_fresh_samples():
    """The difference of two candidates on the same samples varies less than the scores."""
    n, classes, draws = 400, 4, 60
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, WIDTH, generator=generator, dtype=torch.float64)
    scores, differences, errors, paired = [], [], [], []
    for _ in range(draws):
        labels = torch.randint(classes, (n,), generator=generator)
        features = means[labels] + 3 * torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
        noisy = features + torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
        results = [jackknifed(f, labels, classes) for f in (features, noisy)]
        (first, left_out), (second, left_out_too) = results
        scores.append(float(first.score))
        differences.append(float(first.score - second.score))
        errors.append(standard_error(left_out.tolist()))
        paired.append(standard_error((left_out - left_out_too).tolist()))
    for values, error in ((scores, errors), (differences, paired)):
        assert 0.75 < np.sqrt(np.mean(np.square(error))) / np.std(values, ddof=1) < 1.5
    assert np.mean(paired) < 0.6 * np.mean(errors)


@pytest.mark.slow
@pytest.mark.parametrize("first_informative", [0, 256], ids=["everywhere", "beyond the leading directions"])
def test_error_bars_of_many_features_are_no_smaller_than_the_spread(first_informative):
    """The difference is that of two equally good candidates, with more features than leading directions."""
    n, d, classes, draws = 512, 320, 5, 20
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, d + 1) ** -0.25
    differences, errors = [], []
    for _ in range(draws):
        means = torch.randn(classes, d, generator=generator)
        means[:, :first_informative] = 0
        labels = torch.randint(classes, (n,), generator=generator)
        shared = means[labels] / 2 + torch.randn(n, d, generator=generator)
        candidates = [(shared + torch.randn(n, d, generator=generator)).relu() * sizes for _ in range(2)]
        results = [jackknifed(f, labels, classes) for f in candidates]
        (first, left_out), (second, left_out_too) = results
        differences.append(float(first.score - second.score))
        errors.append(standard_error((left_out - left_out_too).tolist()))
    spread = np.sqrt(np.mean(np.square(differences)))  # The mean is 0, because the candidates are equal.
    # Chance moves the ratio of 20 draws by 0.16. Eight directions instead of 256 would give 0.30 in the second case.
    assert 0.6 < np.sqrt(np.mean(np.square(errors))) / spread < 2.5


def test_candidates_behind_the_leader_are_listed_unless_their_error_is_unknown():
    replicates = {"a": [1.0] * 8, "b": [0.9 + 0.001 * k for k in range(8)], "c": [math.nan] * 8, "d": [1.0] * 8}
    behind = trailing({"a": 1.0, "b": 0.9, "c": 0.1, "d": 1.0}, replicates, 4.0)
    assert set(behind) == {"b"}
    assert behind["b"] == pytest.approx(0.1 / standard_error(replicates["b"]))
    assert trailing({"c": math.nan}, replicates, 4.0) == {}


def simulated_race(candidates: int, rng: np.random.Generator) -> int:
    """Return how many of several equally good candidates a race of three rounds drops.

    The candidates share the signal, and each has its own noise. So they are different, but equally good.
    """
    n, d, classes = 240, 6, 3
    labels = torch.as_tensor(rng.integers(classes, size=n))
    signal = torch.as_tensor(rng.normal(size=(classes, d)))[labels]
    features = [signal + torch.as_tensor(rng.normal(size=(n, d))) * 2 for _ in range(candidates)]
    running = list(range(candidates))
    for index, stop in enumerate((60, 120, 240)):
        results = {k: jackknifed(features[k][:stop], labels[:stop], classes) for k in running}
        behind = trailing(
            {k: float(evidence.score) for k, (evidence, _) in results.items()},
            {k: scores.tolist() for k, (_, scores) in results.items()},
            quantile_to_drop(candidates, index + 1),
        )
        running = [k for k in running if k not in behind]
    return candidates - len(running)


@pytest.mark.slow
@pytest.mark.parametrize(("candidates", "races"), [(2, 250), (4, 200)])
def test_ties_survive(candidates, races):
    """The share of races that drop an equally good candidate is not significantly above the stated rate."""
    rng = np.random.default_rng(0)
    unfair = sum(simulated_race(candidates, rng) > 0 for _ in range(races))
    assert stats.binomtest(unfair, races, ERROR_RATE, alternative="greater").pvalue > 0.05


@pytest.mark.parametrize(("n", "d"), [(100, 40), (100, 300)])
def test_held_rows_and_sums_give_the_same_scores(n, d):
    features, labels = tensors(n, d, 3, noise=2.0)
    held, folded = (in_blocks(features, labels, batch=30) for _ in range(2))
    folded.moments()
    assert jackknife(held)[1] == pytest.approx(jackknife(folded)[1], rel=1e-7)


def test_few_rows_are_not_summed():
    accumulator = in_blocks(*tensors(100, 300, 3, noise=2.0), batch=16)
    jackknife(accumulator)
    assert not accumulator.sums
    assert accumulator.nbytes == 100 * (300 + 1) * 8


def test_scores_of_a_single_block_are_nan():
    accumulator = Accumulator("multiclass", 5, 3)
    accumulator.add(rows_of(*tensors(60, 5, 3)))
    scores = jackknife(accumulator)[1]
    assert scores
    assert all(map(math.isnan, scores))
