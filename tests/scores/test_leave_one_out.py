"""Leave-one-out predictions against refits without the sample."""

import math

import numpy as np
import pytest
import torch
from oracles import one_hot, problem
from streamed import rows_of

from lightning_logme.scores.leave_one_out import predict_without_each
from lightning_logme.scores.moments import Moments
from lightning_logme.scores.spectrum import Spectrum

SHAPES = [(30, 50), (20, 20), (60, 8), (2, 3)]


def spectrum_of(path, rows, num_outputs, fit_intercept):
    if path == "rows":
        return Spectrum.from_rows(rows, num_outputs, fit_intercept)
    moments = Moments.zeros(rows.features.shape[1], num_outputs).accumulate(rows)
    return Spectrum.from_moments(moments, fit_intercept)


def refits(features, target, ratio, fit_intercept):
    """Predict each sample with ridge regressions that are fitted without it, by a stacked least-squares problem."""
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
def test_predictions_are_those_of_refits_without_the_sample(n, d, path, fit_intercept):
    features, labels = problem(n, d, 2)
    ratio = torch.tensor([0.0, math.inf]) if n == 2 else torch.tensor([0.0, 3.0, 1e-6, math.inf])
    target = one_hot(labels, len(ratio))
    target[:, 2:] = features[:, :2]
    rows = rows_of(torch.tensor(features), torch.tensor(target), "regression")
    spectrum = spectrum_of(path, rows, len(ratio), fit_intercept)
    predictions = predict_without_each(rows, spectrum, ratio.double())
    np.testing.assert_allclose(predictions, refits(features, target, ratio.tolist(), fit_intercept), atol=1e-9)
