"""Leave-one-out predictions against refits without the sample."""

import math

import numpy as np
import pytest
import torch
from oracles import one_hot, problem
from streamed import rows_of

from lightning_logme import Evidence
from lightning_logme.functional import evidence, leave_one_out
from lightning_logme.scores.leave_one_out import predict_without_each
from lightning_logme.scores.moments import Moments
from lightning_logme.scores.spectrum import Spectrum

SHAPES = [(30, 50), (20, 20), (21, 20), (60, 8)]


def spectrum_of(path, rows, num_outputs, fit_intercept):
    if path == "rows":
        return Spectrum.from_rows(rows, num_outputs, fit_intercept)
    moments = Moments.zeros(rows.features.shape[1], num_outputs).accumulate(rows)
    return Spectrum.from_moments(moments, fit_intercept)


def refits(features, target, ratio, fit_intercept=False):
    """Predict each sample with ridge regressions that are fitted without it, as least-squares problems."""
    features, target = np.asarray(features, float), np.asarray(target, float)
    predictions = np.empty_like(target)
    for i in range(len(features)):
        f, y = np.delete(features, i, 0), np.delete(target, i, 0)
        mean_f, mean_y = (f.mean(0), y.mean(0)) if fit_intercept else (0.0, np.zeros(y.shape[1]))
        for k, t in enumerate(ratio):
            weight = np.zeros(f.shape[1])
            if t != math.inf:
                stacked = np.vstack([f - mean_f, math.sqrt(t) * np.eye(f.shape[1])])
                weight = np.linalg.lstsq(stacked, np.append(y[:, k] - mean_y[k], weight), rcond=1e-12)[0]
            predictions[i, k] = mean_y[k] + (features[i] - mean_f) @ weight
    return predictions


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("path", ["rows", "moments"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_predictions_equal_refits_without_the_sample(n, d, path, fit_intercept):
    features, labels = problem(n, d, 2)
    ratio = torch.tensor([0.0, math.inf, 3.0, 1e-6], dtype=torch.float64)
    target = one_hot(labels, 4)
    target[:, 2:] = features[:, :2] + one_hot(labels, 2)
    rows = rows_of(torch.tensor(features), torch.tensor(target), "regression")
    predictions = predict_without_each(rows, spectrum_of(path, rows, 4, fit_intercept), ratio)
    np.testing.assert_allclose(predictions, refits(features, target, ratio.tolist(), fit_intercept), atol=1e-9)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_some_rows_have_the_predictions_that_they_have_among_all(n, d, fit_intercept):
    features, labels = map(torch.as_tensor, problem(n, d, 3))
    chosen = torch.randperm(n)[:7]
    whole = evidence(features, labels, fit_intercept=fit_intercept)
    expected = leave_one_out(features, labels, fit_intercept=fit_intercept)
    torch.testing.assert_close(whole.leave_one_out(features[chosen], labels[chosen]), expected[chosen])
    moments = Moments.zeros(d, 3).accumulate(rows_of(features, labels))
    summed = Evidence.from_moments(moments, "multiclass", fit_intercept)
    torch.testing.assert_close(summed.leave_one_out(features, labels), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_function_holds_the_ridge_of_all_samples(dtype, fit_intercept):
    features, labels = map(torch.as_tensor, problem(40, 12, 3))
    features = features.to(dtype)
    found = evidence(features, labels, fit_intercept=fit_intercept)
    expected = refits(features.double(), one_hot(labels, 3), (found.alpha / found.beta).tolist(), fit_intercept)
    np.testing.assert_allclose(leave_one_out(features, labels, fit_intercept=fit_intercept), expected, atol=1e-9)


def test_duplicated_rows_predict_each_other():
    features, labels = map(torch.as_tensor, problem(20, 30, 4))
    features, labels = features.repeat(2, 1), labels.repeat(2)
    found = evidence(features, labels)
    expected = refits(features, one_hot(labels, 4), (found.alpha / found.beta).tolist())
    predictions = leave_one_out(features, labels)
    np.testing.assert_allclose(predictions, expected, atol=1e-7)
    assert bool((predictions.argmax(1) == labels).all())


@pytest.mark.parametrize("num_classes", [1000])
def test_many_classes(num_classes):
    features, labels = map(torch.as_tensor, problem(2000, 16, num_classes))
    predictions = leave_one_out(features, labels, num_classes=num_classes)
    assert predictions.shape == (2000, num_classes)
    found = evidence(features, labels, num_classes=num_classes)
    some = [0, 7, 999]
    ratio = (found.alpha / found.beta)[some]
    rest = np.arange(1, 2000)
    target = one_hot(labels, num_classes)[:, some]
    for column, t in enumerate(ratio.tolist()):
        gram = features[rest].T @ features[rest] + (0 if t == math.inf else t) * torch.eye(16)
        weight = torch.linalg.solve(gram, features[rest].T @ torch.as_tensor(target)[rest, column])
        expected = 0.0 if t == math.inf else float(features[0] @ weight)
        assert float(predictions[0, some[column]]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_prediction_without_gain_is_exactly_zero(n, d):
    """Otherwise, rounding errors would choose the class."""
    features, labels = map(torch.as_tensor, problem(n, d, 3))
    rows, ratio = rows_of(features, labels), torch.full((3,), math.inf, dtype=torch.float64)
    assert int(predict_without_each(rows, spectrum_of("rows", rows, 3, False), ratio).count_nonzero()) == 0


def test_multilabel_and_regression_predict_each_column():
    features, labels = map(torch.as_tensor, problem(50, 6, 3))
    for task, target in (("multilabel", torch.as_tensor(one_hot(labels, 3))), ("regression", features[:, :2] ** 2)):
        found = evidence(features, target, task)
        expected = refits(features, target, (found.alpha / found.beta).tolist())
        np.testing.assert_allclose(leave_one_out(features, target, task), expected, atol=1e-9)
    assert leave_one_out(features, features[:, 0], "regression").shape == (50, 1)


@pytest.mark.parametrize("normalize", [False, True])
def test_ignored_samples_are_predicted_by_the_head_of_the_others(normalize):
    features, labels = map(torch.as_tensor, problem(40, 6, 3))
    kept = torch.arange(40) % 4 != 0
    options = {"normalize": normalize, "fit_intercept": True}
    predictions = leave_one_out(features, labels.where(kept, -100), num_classes=3, ignore_index=-100, **options)
    expected = leave_one_out(features[kept], labels[kept], num_classes=3, **options)
    torch.testing.assert_close(predictions[kept], expected)
    head = evidence(features[kept], labels[kept], num_classes=3, **options).head(torch.float64)
    scaled = torch.nn.functional.normalize(features[~kept]) if normalize else features[~kept]
    torch.testing.assert_close(predictions[~kept], head(scaled).detach())


def test_tokens_have_predictions_in_their_shape():
    features, labels = map(torch.as_tensor, problem(60, 6, 3))
    flat = leave_one_out(features, labels)
    torch.testing.assert_close(leave_one_out(features.unflatten(0, (12, 5)), labels.view(12, 5)), flat.view(12, 5, 3))


def test_a_class_with_one_sample_is_not_predicted_for_it():
    features, labels = map(torch.as_tensor, problem(40, 50, 3))
    labels[5] = 3
    predictions = leave_one_out(features, labels)
    assert bool(predictions.isfinite().all())
    assert predictions[5, 3] == pytest.approx(0, abs=1e-9)  # without the sample, its class is absent
    assert int(predictions[5].argmax()) != 3


@pytest.mark.parametrize(
    ("features", "labels"), [(torch.randn(9, 4), torch.zeros(9)), (torch.ones(0, 4), torch.ones(0))]
)
def test_predictions_are_nan_without_evidence(features, labels):
    with pytest.warns(UserWarning, match="LogME is NaN"):
        predictions = leave_one_out(features, labels.long(), num_classes=3)
    assert predictions.shape == (len(features), 3)
    assert bool(predictions.isnan().all())


def test_bad_input_is_an_error():
    features, labels = map(torch.as_tensor, problem(20, 6, 3))
    found = evidence(features, labels)
    with pytest.raises(ValueError, match=r"features must have shape \(m, 6\) and target length m, got \(20, 5\)"):
        found.leave_one_out(features[:, :5], labels)
    with pytest.raises(ValueError, match="decomposition: the evidence of a callback"):
        Evidence(**{**vars(found), "decomposition": None}).leave_one_out(features, labels)
    with pytest.raises(ValueError, match="features must be finite"):
        leave_one_out(features.index_fill(0, torch.tensor([3]), math.nan), labels)
