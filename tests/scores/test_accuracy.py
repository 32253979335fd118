"""The accuracy of the linear head against scikit-learn's metrics of the same leave-one-out predictions."""

import math
import warnings

import numpy as np
import pytest
import torch
from oracles import metric_of_predictions, one_hot, problem
from sklearn.metrics import confusion_matrix
from streamed import rows_of

from lightning_logme.functional import evidence, leave_one_out
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.accuracy import accuracy_of, decide, measure
from lightning_logme.scores.subset import index_of, mixed

SHAPES = [(30, 50), (40, 40), (90, 12)]  # n < D, n = D, n > D
TASKS = ["binary", "multiclass", "multilabel", "regression"]


def data(task, n, d, seed=0, noise=2.0):
    """Return features, a target with several outputs where the task has some, and the number of outputs."""
    features, labels = map(torch.as_tensor, problem(n, d, 4, seed, noise))
    outside = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "binary": (features, labels % 2, 2),
        "multiclass": (features, labels, 4),
        "multilabel": (features, torch.as_tensor(one_hot(labels, 4))[:, :3].long(), 3),
        "regression": (features, features[:, :2].tanh() + outside, 2),
    }[task]


def measured(features, target, num_outputs, task="multiclass", fit_intercept=False, batch=17, ignore_index=None):
    accumulator = Accumulator(task, features.shape[1], num_outputs)
    for at in torch.arange(len(features)).split(batch):
        rows, kept = rows_of(features[at], target[at], task, num_outputs, ignore_index), at
        if ignore_index is not None:
            kept = at[target[at] != ignore_index]
        accumulator.add(rows, index=index_of(kept))
    found, spectrum = accumulator.decomposed(fit_intercept)
    return measure(accumulator.sample(), found, spectrum, task)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_value_is_the_metric_of_leave_one_out_predictions(n, d, task, fit_intercept):
    features, target, num_outputs = data(task, n, d)
    found = measured(features, target, num_outputs, task, fit_intercept)
    predictions = leave_one_out(features, target, task, fit_intercept=fit_intercept)
    assert found.metric == {"multilabel": "f1", "regression": "r2"}.get(task, "accuracy")
    assert found.value == pytest.approx(metric_of_predictions(predictions, target, task), rel=1e-6)
    assert found.num_samples == n
    assert len(found.replicates) == 32
    assert math.isfinite(found.stderr)
    if task in ("binary", "multiclass"):
        assert found.confusion.tolist() == confusion_matrix(target, predictions.argmax(1)).tolist()
    else:
        assert found.confusion is None


@pytest.mark.parametrize("task", TASKS)
def test_large_sets_are_measured_on_a_random_subset(task):
    features, target, num_outputs = data(task, 5000, 6)
    found = measured(features, target, num_outputs, task, batch=600)
    chosen = mixed(index_of(torch.arange(5000))).argsort()[:2048]
    predictions = leave_one_out(features, target, task)[chosen]
    assert found.value == pytest.approx(metric_of_predictions(predictions, target[chosen], task), rel=1e-6)
    assert found.num_samples == 2048


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_low_precision_features_give_the_value_of_the_same_numbers_in_double(n, d, dtype):
    features, target, num_outputs = data("multiclass", n, d)
    features = features.to(dtype)
    assert measured(features, target, num_outputs).value == measured(features.double(), target, num_outputs).value


def test_ignored_samples_do_not_count():
    features, target, num_outputs = data("multiclass", 80, 12)
    target[::3] = -100
    kept = target != -100
    found = measured(features, target, num_outputs, ignore_index=-100)
    assert found.value == measured(features[kept], target[kept], num_outputs).value
    assert found.num_samples == int(kept.sum())


class TestStandardError:
    @pytest.mark.parametrize(("task", "most"), [("multiclass", 1.3), ("regression", 1.3), ("multilabel", 2.0)])
    def test_is_the_spread_over_data_sets(self, task, most):
        """F1 at a threshold also varies with the head, which the blocks share."""
        features, target, num_outputs = data(task, 64 * 256, 6)
        found = [
            measured(rows, labels, num_outputs, task, batch=256)
            for rows, labels in zip(features.split(256), target.split(256), strict=True)
        ]
        spread = np.std([each.value for each in found], ddof=1)
        assert 0.8 < spread / np.mean([each.stderr for each in found]) < most  # the spread of 64 values: ± 9 %
        if task == "multiclass":
            p = np.mean([each.value for each in found])
            binomial = math.sqrt(p * (1 - p) / 256)
            assert np.mean([each.stderr for each in found]) == pytest.approx(binomial, rel=0.1)

    def test_tokens_of_a_sample_share_a_block(self):
        """Five equal tokens say no more than one."""
        features, target, _ = data("multiclass", 200, 6)
        head = evidence(features, target)
        classes = decide(head.predict(features), head, "multiclass")
        once = accuracy_of(classes, target, index_of(torch.arange(200)), head, "multiclass")
        index = index_of(torch.arange(200)[:, None], torch.arange(5)).flatten()
        tokens = [each.repeat_interleave(5) for each in (classes, target)]
        five = accuracy_of(*tokens, index, head, "multiclass")
        assert (five.value, five.num_samples) == (once.value, 1000)
        assert five.stderr == pytest.approx(once.stderr)
        apart = accuracy_of(*tokens, index_of(torch.arange(1000)), head, "multiclass")
        assert apart.stderr == pytest.approx(once.stderr / math.sqrt(5), rel=0.4)

    def test_blocks_are_the_same_for_all_heads_and_equally_large(self):
        """The replicates of two heads are paired, whatever the order of the samples."""
        features, target, _ = data("multiclass", 100, 6)
        head, order = evidence(features, target), torch.randperm(100)
        classes, index = decide(head.predict(features), head, "multiclass"), index_of(torch.arange(100))
        first = accuracy_of(classes, target, index, head, "multiclass")
        second = accuracy_of(classes[order], target[order], index[order], head, "multiclass")
        assert first.replicates == pytest.approx(second.replicates, rel=1e-12)
        right = accuracy_of(target, target, index, head, "multiclass")
        assert right.replicates == [1.0] * 32
        assert right.stderr == 0


class TestRSquared:
    @pytest.mark.parametrize("fit_intercept", [False, True])
    @pytest.mark.parametrize(("scale", "mean"), [(1e-6, 0), (1e-150, 0), (1e9, 0), (1.0, 1e6), (1e-3, 1e3)])
    def test_does_not_depend_on_the_unit_of_the_target(self, scale, mean, fit_intercept):
        features, target, _ = data("regression", 90, 12)
        target = target * scale + mean
        found = measured(features, target, 2, "regression", fit_intercept)
        predictions = leave_one_out(features, target, "regression", fit_intercept=fit_intercept)
        expected = metric_of_predictions(predictions, target, "regression")
        assert found.value == pytest.approx(expected, rel=1e-4)  # A large mean costs digits of the ridge.

    @pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
    @pytest.mark.parametrize("fit_intercept", [False, True])
    def test_constant_target_is_left_out(self, constant, fit_intercept):
        features, target, _ = data("regression", 72, 12)
        both = torch.stack([target[:, 0], torch.full((72,), constant, dtype=torch.float64)], 1)
        found = measured(features, both, 2, "regression", fit_intercept)
        assert found.value == pytest.approx(measured(features, target[:, :1], 1, "regression", fit_intercept).value)

    @pytest.mark.parametrize("n", [9, 44, 72])
    def test_constant_target_alone_is_nan(self, n):
        """The mean of n times 0.1 is not 0.1 in float64."""
        target = torch.full((n,), 0.1, dtype=torch.float64)
        assert math.isnan(measured(torch.randn(n, 4), target, 1, "regression").value)


class TestAbsentOutputs:
    def test_absent_class_is_never_predicted(self):
        features, target, _ = data("multiclass", 90, 12)
        found, without = measured(features, target, 6), measured(features, target, 4)
        assert found.value == without.value
        assert found.confusion.shape == (6, 6)
        assert int(found.confusion[:, 4:].sum() + found.confusion[4:].sum()) == 0

        head = evidence(features, target, num_classes=6)
        negative = torch.arange(-6.0, 0.0, dtype=torch.float64)[None]  # largest for absent ones
        assert decide(negative, head, "multiclass").tolist() == [3]

    def test_label_without_samples_in_the_subset_is_left_out(self):
        features, target, _ = data("multilabel", 90, 12)
        head, index = evidence(features, target, "multilabel"), index_of(torch.arange(90))
        always = torch.ones(90, 3, dtype=torch.long)
        subset = target.clone()
        subset[:, 2] = 0
        expected = metric_of_predictions(always[:, :2], target[:, :2], "multilabel")
        assert accuracy_of(always, subset, index, head, "multilabel").value == pytest.approx(expected)

    def test_absent_label_is_left_out(self):
        features, target, _ = data("multilabel", 90, 12)
        absent = torch.cat([target, torch.zeros(90, 1, dtype=torch.long)], 1)
        assert measured(features, absent, 4, "multilabel").value == pytest.approx(
            measured(features, target, 3, "multilabel").value
        )

    def test_label_that_all_samples_have_counts(self):
        features, target, _ = data("multilabel", 90, 12)
        always = torch.cat([target[:, :1], torch.ones(90, 1, dtype=torch.long)], 1)
        expected = metric_of_predictions(leave_one_out(features, always, "multilabel"), always, "multilabel")
        assert measured(features, always, 2, "multilabel").value == pytest.approx(expected)

    @pytest.mark.parametrize(("n", "d"), SHAPES)
    def test_class_with_one_sample_is_not_predicted_for_it(self, n, d):
        features, target, _ = data("multiclass", n, d)
        target[5] = 4
        found = measured(features, target, 5)
        assert found.value == pytest.approx(metric_of_predictions(leave_one_out(features, target), target))
        assert found.confusion[4].sum() == 1
        assert found.confusion[4, 4] == 0


@pytest.mark.parametrize(("classes", "shape"), [(30, (30, 30)), (31, None)])
def test_confusion_has_at_most_30_classes(classes, shape):
    features, target = map(torch.as_tensor, problem(200, 12, classes))
    confusion = measured(features, target, classes).confusion
    assert (None if confusion is None else confusion.shape) == shape


class TestNoEvidence:
    @pytest.mark.parametrize(
        ("features", "target", "num_outputs", "task"),
        [
            (torch.randn(9, 4), torch.zeros(9).long(), 3, "multiclass"),
            (torch.randn(9, 4), torch.zeros(9).long(), 1, "multiclass"),
            (torch.randn(9, 4), torch.ones(9).long(), 2, "binary"),
            (torch.randn(0, 4), torch.zeros(0).long(), 3, "multiclass"),
            (torch.randn(1, 4), torch.zeros(1).long(), 3, "multiclass"),
            (torch.randn(9, 4), torch.zeros(9, 2).long(), 2, "multilabel"),
            (torch.randn(9, 4), torch.zeros(9), 1, "regression"),
            (torch.full((9, 4), math.nan), torch.arange(9) % 3, 3, "multiclass"),
            (torch.eye(9, 4) * math.inf, torch.arange(9) % 3, 3, "multiclass"),
        ],
        ids=["one class", "K = 1", "one of two", "n = 0", "n = 1", "no labels", "zero target", "NaN", "Inf"],
    )
    def test_is_nan(self, features, target, num_outputs, task):
        with pytest.warns(UserWarning, match="LogME is NaN") as caught:
            found = measured(features, target, num_outputs, task)
        assert len(caught) == 1
        assert math.isnan(found.value)
        assert math.isnan(found.stderr)
        assert found.confusion is None

    @pytest.mark.parametrize("task", TASKS)
    def test_few_samples_raise_no_error(self, task):
        features, target, num_outputs = data(task, 40, 12)
        for n in (1, 2, 3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # One sample has no evidence, or a perfect fit.
                found = measured(features[:n], target[:n], num_outputs, task)
            assert math.isnan(found.value) or found.value <= 1

    @pytest.mark.parametrize("task", TASKS)
    def test_predictions_that_are_not_finite_are_nan_with_a_warning(self, task):
        features, target, _ = data(task, 40, 12)
        head = evidence(features, target, task)
        features[3, 2] = math.nan
        decisions = decide(head.predict(features), head, task)
        with pytest.warns(UserWarning, match="the accuracy is NaN, because features, .* or targets contain NaN or Inf"):
            assert math.isnan(accuracy_of(decisions, target, torch.arange(40), head, task).value)

    def test_targets_that_are_not_finite_are_nan_with_a_warning(self):
        features, target, _ = data("regression", 40, 12)
        head = evidence(features, target, "regression")
        target[3, 1] = math.nan
        with pytest.warns(UserWarning, match="the accuracy is NaN, because features, .* or targets contain NaN or Inf"):
            found = accuracy_of(head.predict(features), target, torch.arange(40), head, "regression")
        assert math.isnan(found.value)
