"""A curve has a point wherever the number of samples has doubled."""

import math

import pytest
import torch
from oracles import metric_of_predictions, problem
from streamed import rows_of

from lightning_logme.functional import evidence, leave_one_out
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.accuracy import measure
from lightning_logme.scores.curve import curve_of, segments


@pytest.mark.parametrize(
    ("task", "num_outputs", "first"),
    [("multiclass", 4, 32), ("multiclass", 50, 100), ("binary", 2, 32), ("multilabel", 50, 32), ("regression", 50, 32)],
)
def test_segments_end_where_the_number_of_samples_has_doubled(task, num_outputs, first):
    found = segments(torch.arange(8 * first), task, num_outputs)
    assert found.tolist() == sorted(found.tolist())
    assert found.bincount().tolist() == [first, first, 2 * first, 4 * first]


def accumulated(features, labels, segment, size=2048):
    accumulator = Accumulator("multiclass", features.shape[1], 3, sample_size=size)
    for at in torch.arange(len(labels)).split(20):
        accumulator.add(rows_of(features[at], labels[at], num_outputs=3), segment[at], at)
    return accumulator


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize(("n", "d"), [(90, 10), (90, 200), (90, 60)])
def test_points_are_the_scores_of_prefixes_and_their_accuracies_on_all_samples(n, d, fit_intercept):
    features, labels = map(torch.as_tensor, problem(n, d, 3, noise=2.0))
    segment = torch.bucketize(torch.arange(n), torch.tensor([31, 63]))
    accumulator = accumulated(features, labels, segment)
    whole, spectrum = accumulator.decomposed(fit_intercept)
    known = whole, measure(accumulator.sample(), whole, spectrum, "multiclass")
    for points in (curve_of(accumulator, fit_intercept), curve_of(accumulator, fit_intercept, known)):
        assert [point.num_samples for point in points] == [32, 64, 90]
        for point in points:
            first, options = point.num_samples, {"num_classes": 3, "fit_intercept": fit_intercept}
            result = evidence(features[:first], labels[:first], **options)
            assert point.logme == pytest.approx(float(result.score), rel=1e-7)
            assert point.gain == pytest.approx(float(result.gain), rel=1e-7)
            # Ignored samples are predicted by the head of the others.
            unseen = labels.where(torch.arange(n) < first, -1)
            predictions = leave_one_out(features, unseen, ignore_index=-1, **options)
            assert point.accuracy == pytest.approx(metric_of_predictions(predictions, labels))


def test_without_a_random_subset_accuracies_are_nan():
    features, labels = map(torch.as_tensor, problem(90, 10, 3))
    points = curve_of(accumulated(features, labels, torch.arange(90) // 45, size=0))
    assert [(point.num_samples, math.isnan(point.accuracy)) for point in points] == [(45, True), (90, True)]


@pytest.mark.filterwarnings("error")
def test_nan_in_a_later_sample_makes_earlier_accuracies_nan_without_a_warning():
    features, labels = map(torch.as_tensor, problem(90, 10, 3))
    features[80] = math.nan
    accumulator = accumulated(features, labels, torch.arange(90) // 45)
    with pytest.warns(UserWarning, match="LogME is NaN: the features contain NaN or Inf") as caught:
        first, last = curve_of(accumulator)
    assert len(caught) == 1
    assert math.isfinite(first.logme)
    assert math.isnan(first.accuracy)
    assert math.isnan(last.logme)
    assert math.isnan(last.accuracy)


def test_only_the_last_point_warns():
    features, segment = torch.randn(40, 4), torch.arange(40) // 20
    points = curve_of(accumulated(features, segment, segment))
    assert math.isnan(points[0].logme)
    assert math.isnan(points[0].accuracy)
    assert math.isfinite(points[1].logme)
    with pytest.warns(UserWarning, match="only one class is present in 40 samples") as caught:
        curve_of(accumulated(features, torch.zeros(40, dtype=torch.long), segment))
    assert len(caught) == 1
