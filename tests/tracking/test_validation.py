"""A pass over labelled samples, in one process and in several."""

import math

import pytest
import torch
from oracles import problem

from lightning_logme.features.labels import Labels, Target
from lightning_logme.functional import evidence
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.validation import Pass

CPU = torch.device("cpu")


def labels_of(target):
    return Labels(Target.checked(target, "multiclass", 3), None)


@pytest.mark.parametrize("curve", [False, True])
@pytest.mark.parametrize(("number", "width", "folds"), [(60, 200, False), (60, 8, True)])
def test_samples_are_summed_only_where_they_outnumber_the_features(number, width, folds, curve):
    features, target = map(torch.as_tensor, problem(number, width, 3))
    current = Pass(Scoring(num_outputs=3, curve=curve))
    for index in torch.arange(number).split(16):
        places = range(int(index[0]), int(index[-1]) + 1)
        assert current.add({"": features[index], "x": 2 * features[index]}, labels_of(target[index]), places) == {}
    results = current.results(CPU, alone=True)
    expected = evidence(features, target)
    assert set(current.accumulators) == set(results) == {("", 0), ("x", 0)}
    for accumulator in current.accumulators.values():
        assert bool(accumulator.sums) == folds
        assert sum(len(held.index) for held in accumulator.held) == (0 if folds else number)
    for result in results.values():
        assert float(result.evidence.score) == pytest.approx(float(expected.score), rel=1e-9)
        assert [point.num_samples for point in result.curve] == ([32, 60] if curve else [])
    if not folds:
        assert torch.equal(results["", 0].evidence.score, expected.score)


def test_a_source_that_cannot_be_added_does_not_affect_another():
    current = Pass(Scoring(num_outputs=3))
    errors = current.add({"": torch.randn(5, 4), "x": torch.randn(6, 4)}, labels_of(torch.arange(5) % 3), range(5))
    assert list(errors) == ["x"]
    assert "same length" in str(errors["x"])
    assert list(current.accumulators) == [("", 0)]


FIRST, SECOND = ("", 0), ("model.0", 0)


def _results(rank, world, everyone):
    """Return what each call of ``add`` returned, whether each source has a finite score, and the errors of a pass."""
    widths, own = everyone[rank]
    current = Pass(Scoring(num_outputs=3), rank, world)
    current.errors.update(own)
    labels = labels_of(torch.arange(12) % 3)
    added = [
        current.add({source: torch.randn(12, width)}, labels, range(rank, 12 * world, world), loader)
        for (source, loader), width in widths.items()
    ]
    results = current.results(CPU, alone=False)
    return added, {key: math.isfinite(result.evidence.score) for key, result in results.items()}, current.errors


@pytest.mark.parametrize(
    ("everyone", "finite", "errors"),
    [
        ([({FIRST: 4}, {})], {FIRST}, {}),
        ([({}, {None: "no memory"})], set(), {None: "no memory"}),
        ([({FIRST: 4}, {}), ({FIRST: 4}, {})], {FIRST}, {}),
        ([({FIRST: 4}, {}), ({}, {})], {FIRST}, {}),
        ([({}, {}), ({FIRST: 4, SECOND: 5}, {})], {FIRST, SECOND}, {}),
        ([({FIRST: 4}, {}), ({FIRST: 4}, {"": "no memory"})], set(), {"": "no memory (process 1)"}),
        ([({FIRST: 4, SECOND: 5}, {}), ({}, {"": "no memory"})], {SECOND}, {"": "no memory (process 1)"}),
        ([({}, {None: "no memory"}), ({}, {None: "no disk"})], set(), {None: "no memory"}),
        (
            [({SECOND: 4}, {}), ({SECOND: 5}, {})],
            set(),
            {"model.0": "features and targets have lengths (5, 3) in process 1, but (4, 3) in another process"},
        ),
    ],
)
def test_processes_share_the_sources_and_the_errors_that_each_has_met(processes, everyone, finite, errors):
    world = len(everyone)
    answers = processes.run(_results, everyone, world=world)
    assert len(answers) == world
    for (widths, own), (added, found, shared) in zip(everyone, answers, strict=True):
        assert added == [{}] * len(widths)
        assert found == dict.fromkeys(finite, True)
        assert shared == errors | own
