"""The temperature against independent minimisers of the whole cross-entropy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import problem
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax

from lightning_logme.functional import leave_one_out
from lightning_logme.scores.calibration import fit_temperature

ALL = torch.ones(3, dtype=torch.bool)


def predictions_of(n=200, classes=3, seed=0, noise=2.0):
    features, labels = problem(n, 6, classes, seed, noise=noise)
    return leave_one_out(features, labels), torch.as_tensor(labels)


def multilabel(n=200, seed=0):
    predictions, labels = predictions_of(n, seed=seed)
    return predictions, torch.nn.functional.one_hot(labels, 3)


def cross_entropy(predictions, target, scale):
    """Return the sum of −log p of all labels, and of one more sample whose label is unknown, averaged over samples."""
    p, y = predictions.numpy(), target.numpy()
    if y.ndim == 1:
        log_p = log_softmax(scale * p, 1)
        own = log_p[np.arange(len(y)), y]
    else:
        on, off = np.log(expit(scale * (p - 0.5))), np.log(expit(-scale * (p - 0.5)))
        own, log_p = np.where(y == 1, on, off), (on + off) / 2
    return -own.sum() - log_p.mean(0).sum() if y.ndim == 2 else -own.sum() - log_p.mean()


@pytest.mark.parametrize("data", [predictions_of, multilabel])
@pytest.mark.parametrize("seed", range(3))
def test_temperature_minimises_the_cross_entropy(data, seed):
    predictions, target = data(seed=seed)
    task = "multiclass" if target.ndim == 1 else "multilabel"
    found = minimize_scalar(
        lambda log: cross_entropy(predictions, target, math.exp(log)), bounds=(-3, 8), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    assert found.success
    assert fit_temperature(predictions, target, task, ALL) == pytest.approx(math.exp(-found.x), rel=1e-5)


def test_temperature_is_that_of_a_gradient_method():
    """With errors among many samples, the unknown label hardly counts: the plain cross-entropy has the same minimum."""
    predictions, target = predictions_of(n=5000)
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(log_scale.exp() * predictions, target)
        loss.backward()
        return loss

    optimizer.step(closure)
    plain = math.exp(-log_scale.item())
    assert fit_temperature(predictions, target, "multiclass", ALL) == pytest.approx(plain, rel=2e-3)


@given(seed=st.integers(0, 50), factor=st.floats(1e-6, 1e6))
def test_temperature_scales_with_the_predictions_and_ignores_their_order(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (40,), generator=generator)
    noise = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    predictions = noise + 2 * torch.nn.functional.one_hot(target, 3)
    one = fit_temperature(predictions, target, "multiclass", ALL)
    order, classes = torch.randperm(40, generator=generator), torch.randperm(3, generator=generator)
    permuted = predictions[order][:, classes], classes.argsort()[target[order]]
    assert fit_temperature(*permuted, "multiclass", ALL) == pytest.approx(one, rel=1e-8)
    assert fit_temperature(factor * predictions + 7, target, "multiclass", ALL) == pytest.approx(factor * one, rel=1e-4)
    labels = torch.nn.functional.one_hot(target, 3)
    one = fit_temperature(predictions, labels, "multilabel", ALL)
    scaled = fit_temperature(0.5 + factor * (predictions - 0.5), labels, "multilabel", ALL)
    assert scaled == pytest.approx(factor * one, rel=1e-4)
    assert fit_temperature(predictions[order], labels[order], "multilabel", ALL) == pytest.approx(one, rel=1e-8)


@pytest.mark.parametrize("n", [3, 30, 3000])
def test_probability_of_separable_predictions_grows_with_the_samples(n):
    """With all samples right, the probability of the label is that of Laplace's rule: one more, unknown label."""
    target = torch.arange(n) % 3
    predictions = torch.nn.functional.one_hot(target, 3).double()
    temperature = fit_temperature(predictions, target, "multiclass", ALL)
    probability = (predictions / temperature).softmax(1)[0, 0]
    assert float(probability) == pytest.approx((n + 1 / 3) / (n + 1), rel=1e-9)
    temperature = fit_temperature(predictions, predictions, "multilabel", ALL)
    assert float((0.5 / torch.tensor(temperature)).sigmoid()) == pytest.approx((n + 1 / 2) / (n + 1), rel=1e-6)


def test_extreme_separable_predictions_are_finite():
    target = torch.arange(30) % 3
    predictions = torch.nn.functional.one_hot(target, 3) * torch.logspace(-6, 6, 30, dtype=torch.float64)[:, None]
    assert 0 < fit_temperature(predictions, target, "multiclass", ALL) < math.inf


def test_useless_predictions_have_an_infinite_temperature():
    target = torch.arange(30) % 3
    right = torch.nn.functional.one_hot(target, 3).double()
    for predictions in (torch.full((30, 3), 0.7), -right, torch.zeros(30, 3)):
        assert fit_temperature(predictions, target, "multiclass", ALL) == math.inf
    assert fit_temperature(1 - right, right, "multilabel", ALL) == math.inf


def test_absent_classes_are_left_out():
    predictions, target = predictions_of()
    wide = torch.zeros(len(target), 5, dtype=torch.float64)
    wide[:, [0, 2, 4]] = predictions
    present = torch.tensor([True, False, True, False, True])
    expected = fit_temperature(predictions, target, "multiclass", ALL)
    assert fit_temperature(wide, 2 * target, "multiclass", present) == pytest.approx(expected, rel=1e-12)
    labels = torch.nn.functional.one_hot(2 * target, 5)
    expected = fit_temperature(predictions, labels[:, ::2], "multilabel", ALL)
    assert fit_temperature(wide, labels, "multilabel", present) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_nothing_to_fit_is_nan(task):
    K = 2 if task == "binary" else 3
    target = torch.zeros(4, dtype=torch.int64) if task != "multilabel" else torch.zeros(4, K)
    present, predictions = torch.ones(K, dtype=torch.bool), torch.rand(4, K)
    assert math.isnan(fit_temperature(predictions[:0], target[:0], task, present))
    assert math.isnan(fit_temperature(predictions * math.nan, target, task, present))
    assert math.isnan(fit_temperature(predictions, target, task, ~present))


def test_regression_has_no_temperature():
    with pytest.raises(ValueError, match="regression"):
        fit_temperature(torch.zeros(2, 1), torch.zeros(2, 1), "regression", ALL[:1])
