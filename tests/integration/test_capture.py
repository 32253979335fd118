"""Captured features are scored in whole runs: labels known late, normalised rows, fewer samples than features."""

import warnings

import pytest
import torch
from layered import Encoder
from models import CLASSES, Classifier, loader, trainer, vectors
from torch import nn
from torch.utils.data import TensorDataset

from lightning_logme import LogMECallback, Probe
from lightning_logme.features.labels import Target
from lightning_logme.functional import logme
from lightning_logme.scores.moments import Moments


def chain(number: int) -> Classifier:
    layers = [nn.Linear(16, 16) for _ in range(number)]
    return Classifier(nn.Sequential(*layers, nn.Linear(16, CLASSES)))


@pytest.mark.parametrize("pooling", ["auto", "last", lambda tokens: tokens.amax(1)])
def test_labels_known_only_after_the_step_give_the_same_scores(tmp_path, pooling):
    class Fetching(Classifier):
        def validation_step(self, dataloader_iter):
            (x, _), _, _ = next(dataloader_iter)
            self(x)

    data = TensorDataset(torch.randn(40, 5, 6), torch.arange(40) % CLASSES)
    torch.manual_seed(1)
    network, scores = Encoder(), []
    for module in (Fetching(network), Classifier(network)):
        callback = LogMECallback(layers=["model.project"], pooling={"model.project": pooling})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*`dataloader_iter`")
            trainer(tmp_path, callback).validate(module, loader(data, 8), verbose=False)
        scores.append([row["logme"] for row in callback.history])
        assert [row["num_samples"] for row in callback.history] == [40, 40]
    assert scores[0] == scores[1]


def test_labels_are_checked_once_per_batch(tmp_path, monkeypatch):
    checked, calls = Target.checked, []

    def counted(*args):
        calls.append(args)
        return checked(*args)

    monkeypatch.setattr(Target, "checked", counted)
    callback = LogMECallback(layers=["model.*"])
    trainer(tmp_path, callback).validate(chain(12), loader(vectors(100), 20), verbose=False)
    assert len(callback.history) == 14
    assert len(calls) == 5


def test_normalized_features_are_scored_as_by_the_function(tmp_path):
    module, other = chain(2), vectors(60, seed=3)
    callback = LogMECallback(layers=["model.[01]"], layer_mean=True, normalize=True, probes={"news": loader(other)})
    trainer(tmp_path, callback).validate(module, loader(batch_size=32), verbose=False)
    scores = {row["key"]: row["logme"] for row in callback.history}
    for prefix, data in (("logme", vectors()), ("logme/news", other)):
        x, y = data.tensors
        with torch.no_grad():
            first = module.model[0](x)
            second = module.model[1](first)
        features = {"": second, "/model.0": first, "/model.1": second, "/layer_mean": (first + second) / 2}
        for suffix, rows in features.items():
            score = scores.pop(prefix + suffix)
            assert score == pytest.approx(float(logme(rows, y, normalize=True)), rel=1e-6)
            assert score == pytest.approx(float(logme(nn.functional.normalize(rows), y)), rel=1e-6)
            assert abs(score - float(logme(rows, y))) > 1e-4
    assert not scores


def test_few_samples_are_scored_without_a_gram_matrix(tmp_path, monkeypatch):
    """With fewer samples than features, rows are kept and never summed to a D × D matrix."""
    shapes, zeros = [], Moments.zeros

    def recorded(num_features, *args):
        shapes.append(num_features)
        return zeros(num_features, *args)

    monkeypatch.setattr(Moments, "zeros", recorded)
    module = Classifier(nn.Sequential(nn.Linear(16, 200), nn.Linear(200, CLASSES)))
    few, fewer = vectors(60), vectors(40, seed=3)
    callback = LogMECallback(layers=["model.0"], curve=True, probes={"news": Probe(loader(fewer))})
    trainer(tmp_path, callback).validate(module, loader(few), verbose=False)
    assert shapes == []
    scores = {row["key"]: row["logme"] for row in callback.history}
    for prefix, data, rel in (("logme", few, 0), ("logme/news", fewer, 1e-9)):  # Probes have their own order.
        x, y = data.tensors
        with torch.no_grad():
            expected = float(logme(module.model[0](x), y))
        for key in (prefix, f"{prefix}/model.0"):
            assert scores[key] == pytest.approx(expected, rel=rel, abs=0)
