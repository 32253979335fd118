"""A pass over labelled samples, in one process and in several."""

import math

import pytest
import torch
from oracles import problem
from spawned import spawn

from lightning_logme.features.labels import Labels, Target
from lightning_logme.functional import evidence
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.validation import Pass

CPU = torch.device("cpu")


def labels_of(target):
    return Labels(Target.checked(target, "multiclass", 3), None)


@pytest.mark.parametrize("curve", [False, True])
@pytest.mark.parametrize(("number", "width", "folds"), [(60, 200, False), (60, 8, True)])
def test_few_samples_are_never_summed(number, width, folds, curve):
    features, target = map(torch.as_tensor, problem(number, width, 3))
    current = Pass(Scoring(num_outputs=3, curve=curve))
    for index in torch.arange(number).split(16):
        places = range(int(index[0]), int(index[-1]) + 1)
        assert current.add({"": features[index], "x": 2 * features[index]}, labels_of(target[index]), places) == {}
    results = current.results(CPU, alone=True)
    expected = evidence(features, target)
    for accumulator in current.accumulators.values():
        assert bool(accumulator.sums) == folds
        assert sum(len(held.index) for held in accumulator.held) == (0 if folds else number)
    for result in results.values():
        assert float(result.evidence.score) == pytest.approx(float(expected.score), rel=1e-9)
        assert [point.num_samples for point in result.curve] == ([32, 60] if curve else [])
    if not folds:
        assert torch.equal(results["", 0].evidence.score, expected.score)


def test_source_that_cannot_be_added_leaves_the_others():
    current = Pass(Scoring(num_outputs=3))
    errors = current.add({"": torch.randn(5, 4), "x": torch.randn(6, 4)}, labels_of(torch.arange(5) % 3), range(5))
    assert list(errors) == ["x"]
    assert "same length" in str(errors["x"])
    assert list(current.accumulators) == [("", 0)]


FIRST, SECOND = ("", 0), ("model.0", 0)


@pytest.mark.filterwarnings("ignore:LogME is NaN")
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
def test_processes_share_what_each_has_met_and_what_broke(everyone, finite, errors):
    spawn(_shared, everyone, finite, errors, world=len(everyone))


def _shared(rank, world, everyone, finite, errors):
    widths, own = everyone[rank]
    current = Pass(Scoring(num_outputs=3), rank, world)
    current.errors.update(own)
    labels = labels_of(torch.arange(12) % 3)
    for (source, loader), width in widths.items():
        assert current.add({source: torch.randn(12, width)}, labels, range(rank, 12 * world, world), loader) == {}
    results = current.results(CPU, alone=False)
    assert set(results) == finite
    assert all(math.isfinite(result.evidence.score) for result in results.values())
    assert current.errors == errors | own
