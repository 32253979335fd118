"""In token classification, each token with a label is a sample."""

import re

import pytest
import torch
from models import CLASSES, Classifier, loader, mlp, trainer
from oracles import problem
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_logme import LogME, LogMECallback
from lightning_logme.functional import evidence, logme


class Tagger(nn.Module):
    """A network that predicts a label for each token."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.encoder = mlp(16, 24)
        self.classifier = nn.Linear(24, CLASSES)
        self.flat = flat

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder(tokens)
        logits = self.classifier(hidden.flatten(0, 1) if self.flat else hidden)
        return logits.unflatten(0, tokens.shape[:2]) if self.flat else logits


def sentences(n: int = 30, length: int = 7) -> TensorDataset:
    features, labels = problem(n * length, 16, CLASSES, 3, noise=2.0)
    labels = torch.as_tensor(labels).unflatten(0, (n, length)).clone()
    labels[torch.rand(n, length) < 0.3] = -100
    return TensorDataset(torch.as_tensor(features).float().unflatten(0, (n, length)), labels)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class TestTokens:
    @pytest.mark.parametrize("flat", [False, True])
    def test_callback_and_probes_score_tokens_with_a_label(self, tmp_path, flat):
        module, data = Classifier(Tagger(flat), token_loss), sentences()
        callback = LogMECallback(layers=["model.encoder.0"], probes={"others": loader(data, 9)})
        trainer(tmp_path, callback).validate(module, loader(data, 8), verbose=False)
        x, y = (tensor.flatten(0, 1) for tensor in data.tensors)
        with torch.no_grad():
            hidden = module.model.encoder(x)
            inner = module.model.encoder[0](x)
        expected = {
            "logme": evidence(hidden, y, ignore_index=-100),
            "logme/model.encoder.0": evidence(inner, y, ignore_index=-100),
            "logme/others": evidence(hidden, y, ignore_index=-100),
            "logme/others/model.encoder.0": evidence(inner, y, ignore_index=-100),
        }
        for row, (key, one) in zip(callback.history, expected.items(), strict=True):
            assert row["key"] == key
            assert row["num_samples"] == one.num_samples == int((y >= 0).sum())
            assert row["logme"] == pytest.approx(float(one.score), rel=1e-5)

    def test_metric_and_function_score_tokens_with_a_label(self):
        x, y = sentences().tensors
        metric = LogME("multiclass", 16, CLASSES, ignore_index=-100)
        metric.update(x[:11], y[:11])
        metric.update(x[11:], y[11:])
        expected = evidence(x.flatten(0, 1), y.flatten(), ignore_index=-100)
        torch.testing.assert_close(metric.compute(), expected.score)
        torch.testing.assert_close(logme(x, y, ignore_index=-100), expected.score)
        assert metric.evidence().num_samples == expected.num_samples

    @pytest.mark.parametrize("task", ["multilabel", "regression"])
    def test_tokens_of_other_tasks_are_refused(self, task):
        x, y = sentences(20, 5).tensors
        with pytest.raises(ValueError, match=re.escape("features must have shape (N, D), got (20, 5, 16)")):
            logme(x, (y > 1).long(), task)
