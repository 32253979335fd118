"""Rows on the same samples: which are behind, and the remark that LogME is sure of a difference that hardly matters."""

import math
import re

import numpy as np
import pytest
import torch
from backbones import CLASSES, Columns, rank
from scipy import stats
from streamed import rows_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme.functional import leave_one_out
from lightning_logme.ranking.comparison import Comparison
from lightning_logme.ranking.resume import Round, Score
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.accuracy import measure
from lightning_logme.scores.jackknife import ERROR_RATE, jackknife, paired_error, quantile_of_ties, quantile_to_drop

BLOCKS = 32


def replicates(value, error):
    """Return values without each block, whose standard error is given: half of them are larger, half smaller."""
    step = error / math.sqrt(BLOCKS - 1)
    return [value + step * (-1) ** block for block in range(BLOCKS)]


def scored(logme, accuracy, error=0.0, logme_error=0.01):
    values = [] if math.isnan(accuracy) else replicates(accuracy, error)
    return Score(logme, logme, replicates(logme, logme_error)[:8], accuracy, values)


def compared(rank_by="logme", **rows):
    rounds = {name: Round(100, 100, 0, {"": score}) for name, score in rows.items()}
    return Comparison.of(rounds, rank_by)


def test_paired_error_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    first = rng.random((BLOCKS, 10)) < 0.8
    second = first ^ (rng.random((BLOCKS, 10)) < 0.1)
    without = [[np.delete(each, block, 0).mean() for block in range(BLOCKS)] for each in (first, second)]
    differences = (first * 1.0 - second).mean(1)  # of each block
    assert paired_error(*without) == pytest.approx(differences.std(ddof=1) / math.sqrt(BLOCKS), rel=1e-9)


@pytest.mark.parametrize(("rank_by", "leader", "behind"), [("logme", "sure", "right"), ("accuracy", "right", "sure")])
def test_rows_are_behind_in_what_is_compared(rank_by, leader, behind):
    comparison = compared(rank_by, sure=scored(1.0, 0.8), right=scored(0.5, 0.9, 0.01))
    assert max(comparison.scores, key=comparison.value) == (leader, "")
    assert set(comparison.behind(4.0)) == {(behind, "")}


@pytest.mark.parametrize(
    ("difference", "error", "remark"),
    [
        (0.004, 0.0001, ", but accuracy is only 0.004 ± 0.000 lower"),  # certain, but it hardly matters
        (0.02, 0.015, ", but accuracy is only 0.020 ± 0.015 lower"),  # may be chance
        (0.02, 0.005, ""),
        (0.0, 0.0, ", but accuracy is only 0.000 ± 0.000 lower"),
        (-0.01, 0.001, ", but accuracy is 0.010 ± 0.001 higher"),
        (math.nan, math.nan, ""),
    ],
)
def test_remark_is_made_if_accuracy_does_not_confirm_logme(difference, error, remark):
    rows = {"first": scored(1.0, 0.9), "second": scored(0.5, 0.9 - difference, error)}
    assert compared(**rows).remark(("second", ""), "accuracy") == remark
    assert compared(**rows).remark(("second", ""), "r2") == remark.replace("accuracy", "R²")
    assert compared("accuracy", **rows).remark(("second", ""), "accuracy") == ""


def test_a_row_without_a_value_neither_leads_nor_trails():
    rows = {"a": scored(1.0, math.nan), "b": scored(0.5, 0.9), "c": scored(0.4, 0.7), "none": scored(math.nan, 0.99)}
    assert set(compared(**rows).behind(4.0)) == {("b", ""), ("c", "")}
    assert set(compared("accuracy", **rows).behind(4.0)) == {("c", "")}
    assert ("none", "") not in compared(**rows).scores
    assert compared(**rows).remark(("b", ""), "accuracy") == ""


def easy_task(n=2000):
    """Return classes that one feature separates with a small, one with a larger, and one with a huge noise."""
    labels = torch.arange(n) % CLASSES
    ones = nn.functional.one_hot(labels, CLASSES).repeat(1, 3).float()
    noise = torch.tensor([0.05, 0.15, 0.8]).repeat_interleave(CLASSES)
    x = ones + noise * torch.randn(n, 3 * CLASSES, generator=torch.Generator().manual_seed(0))
    return {"sure": Columns(0, 4), "less sure": Columns(4, 8), "worse": Columns(8, 12)}, TensorDataset(x, labels)


@pytest.mark.parametrize("race", [True, False])
def test_a_row_behind_in_logme_alone_has_a_remark(race):
    candidates, data = easy_task()
    ranking = rank({**candidates, "too": Columns(0, 4)}, DataLoader(data, 100), race=race)
    rows = {row.name: row for row in ranking.rows}
    assert set(ranking.tied) == {"sure", "too"}
    assert rows["less sure"].ended == rows["worse"].ended == ("dropped" if race else "finished")
    start = r"\d+\.\d standard errors behind at 256 samples" if race else "significantly behind in LogME"
    assert re.fullmatch(start + r", but accuracy is only 0\.00\d ± 0\.00\d lower", rows["less sure"].message)
    assert "accuracy" not in rows["worse"].message
    assert rows["less sure"].message in str(ranking)


def test_the_remark_holds_the_paired_difference_and_its_error():
    """Two candidates that differ by a little noise make nearly the same mistakes."""
    n = 1000
    labels = torch.arange(n) % CLASSES
    generator = torch.Generator().manual_seed(1)
    shared = nn.functional.one_hot(labels, CLASSES) + 0.5 * torch.randn(n, CLASSES, generator=generator)
    x = torch.cat([shared, shared + 0.1 * torch.randn(n, CLASSES, generator=generator)], 1)
    ranking = rank({"a": Columns(0, 4), "b": Columns(4, 8)}, DataLoader(TensorDataset(x, labels), 100), race=False)
    correct = [leave_one_out(part, labels).argmax(1) == labels for part in x.split(CLASSES, 1)]
    difference = (correct[0].double() - correct[1].double()).numpy()
    found = re.search(r"([\d.]+) ± ([\d.]+) lower", ranking.rows[1].message)
    assert float(found[1]) == pytest.approx(difference.mean(), abs=5.1e-4)
    # 32 random blocks give the error of single samples, up to chance.
    assert float(found[2]) == pytest.approx(difference.std() / math.sqrt(n), rel=0.4)
    assert float(found[2]) < 0.6 * math.hypot(*(row.accuracy_stderr for row in ranking.rows))


def simulated_race(candidates, rng):
    """Return how many of several equally accurate candidates a race of two rounds drops, and how many are not tied."""
    n, d, classes = 512, 8, 3
    labels = torch.as_tensor(rng.integers(classes, size=n))
    signal = torch.as_tensor(rng.normal(size=(classes, d)))[labels]
    features = [signal + torch.as_tensor(rng.normal(size=(n, d))) * 2 for _ in range(candidates)]
    sums = [Accumulator("multiclass", d, classes) for _ in features]
    running, start, behind = set(range(candidates)), 0, {}
    for index, stop in enumerate((256, 512)):
        rounds = {}
        for k in running:
            rows = rows_of(features[k][start:stop], labels[start:stop], num_outputs=classes)
            sums[k].add(rows, torch.arange(start, stop) % 8)
            evidence, _, spectrum = jackknife(sums[k])
            found = measure(sums[k].sample(), evidence, spectrum, "multiclass")
            score = Score(float(evidence.score), 0.0, [0.0] * 8, found.value, found.replicates)
            rounds[str(k)] = Round(stop, stop, 0, {"": score})
        comparison = Comparison.of(rounds, "accuracy")
        behind = comparison.behind(quantile_of_ties(len(running)))
        running -= {int(name) for name, _ in comparison.behind(quantile_to_drop(candidates, index + 1))}
        start = stop
    return candidates - len(running), len(behind)


@pytest.mark.slow
def test_equally_accurate_candidates_survive_the_race_and_are_tied():
    rng = np.random.default_rng(0)
    races = [simulated_race(3, rng) for _ in range(60)]
    dropped, not_tied = (sum(number > 0 for number in numbers) for numbers in zip(*races, strict=True))
    assert dropped <= 60 * ERROR_RATE
    assert stats.binomtest(not_tied, 2 * 60, ERROR_RATE, alternative="greater").pvalue > 0.05
