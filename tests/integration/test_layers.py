"""Several layers and their mean are scored in whole runs, for validations and for probes."""

import pytest
import torch
from layered import Deep
from models import CLASSES, Classifier, VisionTransformer, images, loader, trainer, vectors
from torch import nn

from lightning_logme import LogMECallback
from lightning_logme.functional import evidence, logme


def test_each_layer_and_the_mean_of_layers_are_scored(tmp_path):
    module = Classifier(Deep(3))
    callback = LogMECallback(layers=["model.blocks.*"], layer_mean=True)
    run = trainer(tmp_path, callback)
    run.validate(module, loader(), verbose=False)
    x, y = vectors().tensors
    with torch.no_grad():
        outputs = module.model.outputs(x)
    for index, output in enumerate(outputs):
        key = f"logme/model.blocks.{index}"
        assert float(run.callback_metrics[key]) == pytest.approx(float(logme(output, y)), rel=1e-5)
    mean = evidence(torch.stack(outputs).mean(0), y)
    assert float(run.callback_metrics["logme/layer_mean"]) == pytest.approx(float(mean.score), rel=1e-5)
    assert float(run.callback_metrics["logme_gain/layer_mean"]) == pytest.approx(float(mean.gain), rel=1e-5)


def test_layers_are_pooled_before_the_mean(tmp_path):
    """The tokens (N, T, D) of each layer are averaged first, and then the layers."""
    seen = []
    module = Classifier(VisionTransformer())
    for layer in module.model.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    callback = LogMECallback(layers=["model.encoder.layers.*"], layer_mean=True)
    trainer(tmp_path, callback).validate(module, loader(images(), 48), verbose=False)
    expected = logme(torch.stack([tokens.mean(1) for tokens in seen]).mean(0), images().tensors[1])
    assert callback.history[-1]["key"] == "logme/layer_mean"
    assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-4)


def test_mean_of_layers_of_different_lengths_is_an_error(tmp_path):
    callback = LogMECallback(layers=["model.0", "model.2"], layer_mean=True)
    with pytest.raises(
        ValueError, match=r"layer_mean needs features of equal length, got 'model.0' \(20, 32\), 'model.2'"
    ):
        trainer(tmp_path, callback).validate(Classifier(), loader(), verbose=False)


def test_mean_of_a_single_layer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="layer_mean is the mean of several layers"):
        trainer(tmp_path, LogMECallback(layers=["model.0"], layer_mean=True)).validate(
            Classifier(), loader(), verbose=False
        )


def test_probes_score_layers_and_their_mean(tmp_path):
    module, other = Classifier(Deep(2)), vectors(70, seed=5)
    callback = LogMECallback(layers=["model.blocks.*"], layer_mean=True, probes={"news": loader(other)})
    trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    with torch.no_grad():
        first, second = module.model.outputs(other.tensors[0])
    expected = {
        "": second,
        "/model.blocks.0": first,
        "/model.blocks.1": second,
        "/layer_mean": (first + second) / 2,
    }
    found = {row["key"]: row["logme"] for row in callback.history if row["key"].startswith("logme/news")}
    scores = {f"logme/news{key}": float(logme(features, other.tensors[1])) for key, features in expected.items()}
    assert list(found) == list(scores)
    assert found == pytest.approx(scores, rel=1e-5)


def test_gram_matrices_of_more_than_a_gibibyte_cause_a_warning(tmp_path):
    class Wide(nn.Module):
        def forward(self, x):
            return x.repeat(1, 375)

    network = nn.Sequential(Wide(), nn.Identity(), nn.Identity(), nn.Linear(6000, CLASSES))
    callback = LogMECallback(layers=["model.[012]"])
    with pytest.warns(UserWarning, match="logme will hold 1.1 GiB in 4 matrices of D × D"):
        trainer(tmp_path, callback).validate(Classifier(network), loader(), verbose=False)
