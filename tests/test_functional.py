"""The functions take arrays or tensors and return scores. Wrong input is refused with one clear sentence."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from oracles import one_hot, problem

import lightning_logme
from lightning_logme import LogME
from lightning_logme.functional import evidence, logme

F = torch.randn(20, 4)
Y = torch.arange(20) % 3


def test_arrays_and_tensors_of_any_layout_have_the_same_score():
    features, labels = problem(50, 6, 3)
    expected = float(logme(torch.as_tensor(features), torch.as_tensor(labels)))
    read_only = features.copy()
    read_only.setflags(write=False)
    for array in (features, read_only, np.asfortranarray(features), features[:, ::-1], features.repeat(2, 1)[:, ::2]):
        assert float(logme(array, labels)) == pytest.approx(expected, rel=1e-12)
    strided = torch.as_tensor(features.T.copy()).T
    assert float(logme(strided, torch.as_tensor(labels, dtype=torch.uint8))) == pytest.approx(expected, rel=1e-12)


def test_score_is_a_float64_scalar_without_a_graph():
    score = logme(F.clone().requires_grad_(), Y)
    assert score.shape == ()
    assert score.dtype == torch.float64
    assert not score.requires_grad


def test_tasks_agree_where_they_describe_the_same_targets():
    features, labels = problem(60, 5, 3)
    multi = evidence(features, labels)
    columns = evidence(features, one_hot(labels, 3).astype(int), "multilabel")
    numbers = evidence(features, one_hot(labels, 3), "regression")
    for result in (columns, numbers):
        np.testing.assert_allclose(result.per_output, multi.per_output, rtol=1e-12)
    two = labels % 2
    assert float(logme(features, two, "binary")) == pytest.approx(float(logme(features, two, num_classes=2)), rel=1e-12)
    y = features[:, 0]
    assert float(logme(features, y, "regression")) == float(logme(features, y[:, None], "regression"))


def test_evidence_has_the_documented_fields():
    result = evidence(F, Y)
    assert {name: tuple(value.shape) for name, value in vars(result).items() if torch.is_tensor(value)} == {
        "score": (),
        "per_output": (3,),
        "null": (3,),
        "gain": (),
        "alpha": (3,),
        "beta": (3,),
        "effective_dim": (3,),
        "weight": (3, 4),
        "saturated": (3,),
        "spectrum": (4,),
    }
    assert result.num_samples == 20
    assert isinstance(result.num_samples, int)
    assert result.saturated.dtype == torch.bool
    assert float(result.gain) == pytest.approx(float((result.per_output - result.null).mean()))


def test_input_is_not_changed():
    features, labels = F.clone(), Y.clone()
    logme(features, labels, ignore_index=1)
    assert torch.equal(features, F)
    assert torch.equal(labels, Y)


BAD = {
    "features not floating": ((F.long(), Y), {}, "features must be floating point, got torch.int64"),
    "features of rank 1": ((F[:, 0], Y), {}, r"features must have shape \(N, D\), got \(20,\)"),
    "features of rank 3": ((F[None], Y), {}, r"features must have shape \(N, D\), got \(1, 20, 4\)"),
    "complex features": ((F.cfloat(), Y), {}, "features must be floating point, got torch.complex64"),
    "different lengths": ((F, Y[:-1]), {}, r"same length, got \(20, 4\) and \(19,\)"),
    "scalar target": ((F, torch.tensor(1)), {}, r"target must have shape \(N,\) for task='multiclass', got \(\)"),
    "one-hot labels": ((F, torch.eye(3)[Y]), {}, r"target must have shape \(N,\) for task='multiclass', got \(20, 3\)"),
    "float labels": ((F, Y.float()), {}, "integer class labels for task='multiclass', got torch.float32"),
    "flat multilabel": (
        (F, Y, "multilabel"),
        {},
        r"target must have shape \(N, L\) for task='multilabel', got \(20,\)",
    ),
    "multilabel of 2": (
        (F, Y[:, None], "multilabel"),
        {},
        "only 0 and 1 for task='multilabel', got values from 0 to 2",
    ),
    "too many dims": (
        (F, F[None].repeat(20, 1, 1), "regression"),
        {},
        r"shape \(N,\) or \(N, M\) for task='regression'",
    ),
    "boolean regression": ((F, Y > 1, "regression"), {}, "real numbers for task='regression', got torch.bool"),
    "label too large": ((F, Y), {"num_classes": 2}, r"labels from 0 to 2, .* must be in 0…1 \(2 classes\)"),
    "label negative": ((F, Y - 1), {}, "labels from -1 to 1, .* must be at least 0"),
    "binary label 2": ((F, Y, "binary"), {}, r"labels from 0 to 2, .* must be in 0…1"),
    "unknown task": ((F, Y, "ranking"), {}, "task must be one of 'binary', 'multiclass', .*, got 'ranking'"),
    "zero classes": ((F, Y), {"num_classes": 0}, "num_classes must be a positive integer, got 0"),
    "classes of binary": (
        (F, Y, "binary"),
        {"num_classes": 3},
        "num_classes must be 2 or None for task='binary', got 3",
    ),
    "classes of regression": ((F, F, "regression"), {"num_classes": 3}, "num_classes=3 has no meaning for task='regr"),
    "ignored numbers": ((F, F, "regression"), {"ignore_index": -100}, "ignore_index=-100 has no meaning for task='reg"),
    "NaN in features": (
        (F / (F > -9.0).float().tril(-1)[:, :4], Y),
        {},
        r"features must be finite, but 10 of 80 values",
    ),
    "NaN in targets": ((F, F[:, 0] / 0, "regression"), {}, "target must be finite, but 20 of 20 values are NaN or Inf"),
}


@pytest.mark.parametrize(("args", "options", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_values_and_shapes_are_refused(args, options, message):
    with pytest.raises(ValueError, match=message):
        logme(*args, **options)


@pytest.mark.parametrize(("features", "target", "name"), [([[1.0]], Y, "features"), (F, [1, 2], "target")])
def test_wrong_types_are_refused(features, target, name):
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor or a numpy.ndarray, got list"):
        logme(features, target)


METRIC_BAD = {
    "no classes": (("multiclass", 4), {}, "num_classes must be a positive integer, got None"),
    "no labels": (("multilabel", 4), {}, "num_labels must be a positive integer, got None"),
    "no features": (("binary", 0), {}, "num_features must be a positive integer, got 0"),
    "features not a number": (("binary", "4"), {}, "num_features must be a positive integer, got '4'"),
    "no outputs": (("regression", 4), {"num_outputs": 0}, "num_outputs must be a positive integer, got 0"),
    "task": (("classification", 4), {}, "task must be one of"),
    "binary": (("binary", 4), {"num_classes": 5}, "num_classes must be 2 or None"),
    "ignored numbers": (("regression", 4), {"ignore_index": 0}, "ignore_index=0 has no meaning"),
    "unknown option": (("binary", 4), {"num_clases": 5}, "num_clases"),
}


@pytest.mark.parametrize(("args", "options", "message"), METRIC_BAD.values(), ids=METRIC_BAD.keys())
def test_wrong_arguments_of_the_metric_are_refused(args, options, message):
    with pytest.raises(ValueError, match=message):
        LogME(*args, **options)


SHAPES_AND_TYPES = [
    "features not floating",
    "features of rank 1",
    "features of rank 3",
    "complex features",
    "different lengths",
    "scalar target",
    "one-hot labels",
    "float labels",
    "flat multilabel",
    "multilabel of 2",
    "too many dims",
    "boolean regression",
    "label negative",
    "binary label 2",
]


@pytest.mark.parametrize("name", SHAPES_AND_TYPES)
def test_refused_batch_adds_nothing_to_the_metric(name):
    args = BAD[name][0]
    task = args[2] if len(args) > 2 else "multiclass"
    metric = LogME(task, 4, num_classes=2 if task == "binary" else 3, num_labels=1)
    good = {"multilabel": (Y[:, None] > 1).long(), "regression": F[:, :1], "binary": Y % 2}.get(task, Y)
    metric.update(F, good)
    before = float(metric.compute())
    with pytest.raises(ValueError, match="."):
        metric.update(*args[:2])
    assert float(metric.compute()) == before


def test_metric_refuses_another_number_of_features():
    metric = LogME("multiclass", 5, num_classes=3)
    with pytest.raises(ValueError, match=r"shape \(N, 5\) as num_features=5, got \(20, 4\)"):
        metric.update(F, Y)


def test_import_needs_neither_lightning_nor_torchmetrics():
    code = "import sys, lightning_logme.functional; print({name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'lightning_logme'" in loaded
    assert not any(f"'{name}'" in loaded for name in ("lightning", "pytorch_lightning", "torchmetrics"))


def test_public_names_are_listed_before_they_are_imported():
    assert set(lightning_logme.__all__) <= set(dir(lightning_logme))
    assert all(getattr(lightning_logme, name).__name__ == name for name in lightning_logme.__all__)
    assert len(lightning_logme.__all__) == 13
    assert lightning_logme.CurvePoint(1, 2.0, 3.0).gain == 3.0
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = lightning_logme.Nothing


def test_no_sample_after_ignoring_is_nan_with_a_warning():
    with pytest.warns(UserWarning, match="no samples"):
        assert math.isnan(logme(F, torch.full((20,), -1), ignore_index=-1))


def test_each_token_with_a_label_is_a_sample():
    features, labels = problem(60, 5, 3)
    tokens, target = features.reshape(12, 5, 5), labels.reshape(12, 5)
    assert float(logme(tokens, target)) == pytest.approx(float(logme(features, labels)), rel=1e-12)
    with pytest.raises(ValueError, match="features must have shape"):
        logme(tokens, target % 2, "multilabel")
    with pytest.raises(ValueError, match="target must have shape"):
        logme(features, np.stack([labels, labels], 1))
    with pytest.raises(ValueError, match="features must have shape"):
        logme(tokens, target[:, :4])
