"""The paired block jackknife: standard errors of scores and of differences of scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch

from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.moments import Moments
from lightning_logme.scores.spectrum import Spectrum

Name = TypeVar("Name", bound=Hashable)

# The probability that a race among equally good candidates drops any of them. Also the probability that a candidate as
# good as the best is not reported as tied.
ERROR_RATE = 0.05

# Scores without a block are computed in this many leading eigenvectors. For real features with D = 384 and 1280, the
# standard errors are .84 to 1.06 times those in all directions. The worst case is a random network: .76 times.
# At D = 1280, this takes an eighth of the time or less.
_DIRECTIONS = 256


def jackknife(accumulator: Accumulator, fit_intercept: bool = False) -> tuple[Evidence, list[float], Spectrum | None]:
    """Return the evidence of all blocks together, the score without each block, and the spectrum of all blocks.

    Args:
        accumulator: its segments are the blocks: disjoint random subsets of the samples, about equally large.
        fit_intercept: as in :meth:`~lightning_logme.Evidence.from_moments`.

    Returns:
        The evidence, B scores in the leading directions of feature space, and the spectrum (None without evidence). The
        scores are NaN without evidence, or if there is only one block. A class that occurs in a single block keeps its
        evidence from all blocks, so that every score is a mean over the same classes.
    """
    evidence, spectrum = accumulator.decomposed(fit_intercept)
    if spectrum is None or len(accumulator.segments) < 2:
        return evidence, [math.nan] * len(accumulator.segments), spectrum
    many = accumulator.num_features > _DIRECTIONS
    blocks = accumulator.projected(spectrum.leading(_DIRECTIONS) if many else None)
    scores = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The evidence of all blocks has already warned.
        for index in range(len(blocks)):
            others = Moments.sum([*blocks[:index], *blocks[index + 1 :]])
            rest = Evidence.from_moments(others, accumulator.task, fit_intercept)
            absent = rest.per_output.isnan() & ~evidence.per_output.isnan()
            scores.append(torch.where(absent, evidence.per_output, rest.per_output).nanmean())
    return evidence, torch.stack(scores).tolist(), spectrum


def standard_error(scores: Sequence[float]) -> float:
    """Return the standard error of a score, given the B scores without each block: √((B−1)/B Σ (s₋ₖ − mean)²).

    Block jackknife: Shao & Tu 1995, "The Jackknife and Bootstrap", ch. 2. Given differences of scores, the result is
    the standard error of the difference. It is NaN without scores, for example if no sample counts.
    """
    if not scores:
        return math.nan
    mean = sum(scores) / len(scores)
    return math.sqrt((len(scores) - 1) / len(scores) * sum((score - mean) ** 2 for score in scores))


def paired_error(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the standard error of the difference of two scores, given the replicates of both.

    Both have the same samples in the same blocks, so the difficulty of a block cancels.
    """
    return standard_error([a - b for a, b in zip(first, second, strict=True)])


def trailing(
    scores: Mapping[Name, float], replicates: Mapping[Name, Sequence[float]], quantile: float
) -> dict[Name, float]:
    """Return the rows that trail the leader by more than ``quantile`` paired standard errors, and by how many.

    ``replicates`` are the scores without each block: see :func:`paired_error`.
    """
    known = {name: score for name, score in scores.items() if not math.isnan(score)}
    if not known:
        return {}
    leader = max(known, key=known.__getitem__)
    found = {}
    for name, score in known.items():
        error = paired_error(replicates[leader], replicates[name])
        if scores[leader] - score > quantile * error:  # False if either is NaN
            found[name] = (scores[leader] - score) / error if error > 0 else math.inf
    return found


def quantile_to_drop(number: int, round_: int) -> float:
    """Return by how many paired standard errors a row must trail the leader to be dropped in a round.

    By Bonferroni's inequality, the error rate is divided among all pairs of rows, because any may lead and any may
    trail. It is also divided among the rounds as 1/2, 1/6, 1/12, …, whose sum is 1 for any number of rounds.

    Args:
        number: the number of rows at the start, one for each candidate and source of features.
        round_: 1, 2, …
    """
    return student_quantile(ERROR_RATE / (round_ * (round_ + 1)) / (number * (number - 1)))


def quantile_of_ties(number: int) -> float:
    """Return by how many paired standard errors a row may trail the best and still be tied with it."""
    return student_quantile(ERROR_RATE / (2 * max(number - 1, 1)))


def student_quantile(probability: float) -> float:
    """Return the value that Student's t with 7 = B − 1 degrees of freedom exceeds with a (small) probability.

    The distribution function for odd degrees of freedom is elementary: Abramowitz & Stegun 26.7.3.
    """

    def exceeded(t: float) -> float:
        angle = math.atan(t / math.sqrt(7))
        sine, cosine = math.sin(angle), math.cos(angle)
        within = 2 / math.pi * (angle + sine * (cosine + 2 / 3 * cosine**3 + 8 / 15 * cosine**5))
        return (1 - within) / 2

    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeded(middle) > probability else (low, middle)
    return (low + high) / 2
