"""Layers by pattern, their mean, and tokens with a label each."""

import re

import pytest
import torch
from boards import events
from lightning.pytorch.loggers import TensorBoardLogger
from models import CLASSES, Classifier, VisionTransformer, images, loader, mlp, trainer, vectors
from oracles import problem
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_logme.tracking.messages
from lightning_logme import LogME, LogMECallback, Probe
from lightning_logme.features.selection import Selection, attach_by_tree
from lightning_logme.functional import evidence, logme


def layers_of(module: nn.Module, patterns: list[str]) -> list[str]:
    """The layers that patterns find in a module."""
    return attach_by_tree(module, Selection(layers=patterns), "multiclass", None, is_scored=True)[0].layers


class Deep(nn.Module):
    """Ten blocks of one width and a head."""

    def __init__(self, blocks: int = 11, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(blocks))
        self.head = nn.Linear(width, CLASSES)

    def outputs(self, x: Tensor) -> list[Tensor]:
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outputs(x)[-1])


class TestPatterns:
    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
            (["model.blocks.*"], [f"model.blocks.{index}" for index in range(11)]),  # in the order of the network
            (["model.blocks.?"], [f"model.blocks.{index}" for index in range(10)]),
            (["model.blocks.1*"], ["model.blocks.1", "model.blocks.10"]),
            (["model.blocks.[13].1"], ["model.blocks.1.1", "model.blocks.3.1"]),
            (["model.head", "model.*"], ["model.head"]),  # each once; a list of modules is none to be called
        ],
    )
    def test_stand_for_one_part_of_a_name(self, patterns, expected):
        assert layers_of(Classifier(Deep()), patterns) == expected

    def test_wrappers_have_no_part_in_names(self):
        module = Classifier(Deep(3))
        module.model = torch.compile(module.model, backend="eager")
        layers = layers_of(module, ["model.blocks.*"])
        assert layers == [f"model.blocks.{index}" for index in range(3)]

    def test_nothing_matches(self, tmp_path):
        with pytest.raises(ValueError, match=r"layers: no module of Classifier matches 'encoder.\*'.*'model.blocks.0'"):
            trainer(tmp_path, LogMECallback(layers=["encoder.*"])).validate(Classifier(Deep()), loader(), verbose=False)

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("blocks.*", r"write 'model\.blocks\.\*'\.$"),
            ("blocks.*.0", r"write 'model\.blocks\.\*\.0'\.$"),
            ("model.block.*", r"its modules are 'model', 'model.blocks.0', .*, …\.$"),
        ],
    )
    def test_a_pattern_that_misses_the_prefix_of_a_wrapper_is_completed(self, pattern, expected):
        with pytest.raises(ValueError, match=f"matches {re.escape(repr(pattern))}, .*; {expected}"):
            layers_of(Classifier(Deep()), [pattern])


def test_each_layer_and_their_mean(tmp_path):
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


def test_pooled_before_the_mean(tmp_path):
    """Of tokens (N, T, D), the mean over layers of the mean over tokens."""
    seen = []
    module = Classifier(VisionTransformer())
    for layer in module.model.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    callback = LogMECallback(layers=["model.encoder.layers.*"], layer_mean=True)
    trainer(tmp_path, callback).validate(module, loader(images(), 48), verbose=False)
    expected = logme(torch.stack([tokens.mean(1) for tokens in seen]).mean(0), images().tensors[1])
    assert callback.history[-1]["key"] == "logme/layer_mean"
    assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-4)


def test_the_mean_needs_layers_of_one_length(tmp_path):
    callback = LogMECallback(layers=["model.0", "model.2"], layer_mean=True)
    with pytest.raises(ValueError, match=r"layer_mean needs layers of one length, got 'model.0' \(20, 32\), 'model.2'"):
        trainer(tmp_path, callback).validate(Classifier(), loader(), verbose=False)


def test_the_mean_of_one_layer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="layer_mean is the mean of several layers"):
        trainer(tmp_path, LogMECallback(layers=["model.0"], layer_mean=True)).validate(
            Classifier(), loader(), verbose=False
        )


def test_probes_have_layers(tmp_path):
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


def test_figures(tmp_path):
    probes = {"news": loader(vectors(seed=5))}
    callback = LogMECallback(layers=["model.blocks.*"], layer_mean=True, probes=probes, curve=True, plots=True)
    run = trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path, "", ""), max_epochs=3, log_every_n_steps=1)
    run.fit(Classifier(Deep(3)), loader(), loader())
    seen = events(tmp_path)
    for prefix in ("logme", "logme/news"):
        for figure in ("gain_by_layer", "gain_by_samples"):
            assert len(seen.Images(f"{prefix}/{figure}")) == 3


@pytest.mark.parametrize("curve", [False, True])
def test_what_is_nan_ends_no_plots(tmp_path, curve):
    class Sometimes(Classifier):
        def forward(self, x):
            return super().forward(x * float("nan") if self.current_epoch == 1 and not self.training else x)

    callback = LogMECallback(layers=["model.blocks.*"], curve=curve, plots=True)
    run = trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path, "", ""), max_epochs=3, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="features contain NaN"):
        run.fit(Sometimes(Deep(3)), loader(), loader())
    assert len(events(tmp_path).Images("logme/gain_by_output")) == 2
    assert len(events(tmp_path).Images("logme/gain_by_layer")) == 3


def test_a_curve_is_drawn_where_there_is_a_new_one(tmp_path):
    """Not once more where a later pass has none."""
    calls = []

    def forward(module, batch):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("on purpose")
        return module(batch[0])

    probe = Probe([vectors(64).tensors], num_classes=CLASSES, forward=forward)
    callback = LogMECallback(probes={"news": probe}, curve=True, validation=False, plots=True)
    options = {"logger": TensorBoardLogger(tmp_path, "", ""), "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    with pytest.warns(UserWarning, match="logme/news is NaN"):
        trainer(tmp_path, callback, max_epochs=3, **options).fit(Classifier(), loader(), loader())
    assert [point.num_samples for point in callback.curves["logme/news"]] == [32, 64]
    assert len(events(tmp_path).Images("logme/news/gain_by_samples")) == 2


def test_much_memory_is_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(lightning_logme.tracking.messages, "_MUCH_MEMORY", 3 * 16 * 16 * 8)
    with pytest.warns(UserWarning, match="logme will hold 0.0 GiB in 4 matrices of D × D"):
        trainer(tmp_path, LogMECallback(layers=["model.blocks.*"])).validate(
            Classifier(Deep(3)), loader(), verbose=False
        )


class Tagger(nn.Module):
    """A label for each token."""

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
    def test_every_token_that_has_a_label(self, tmp_path, flat):
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

    def test_metric_and_function(self):
        x, y = sentences().tensors
        metric = LogME("multiclass", 16, CLASSES, ignore_index=-100)
        metric.update(x[:11], y[:11])
        metric.update(x[11:], y[11:])
        expected = evidence(x.flatten(0, 1), y.flatten(), ignore_index=-100)
        torch.testing.assert_close(metric.compute(), expected.score)
        torch.testing.assert_close(logme(x, y, ignore_index=-100), expected.score)
        assert metric.evidence().num_samples == expected.num_samples

    @pytest.mark.parametrize("task", ["multilabel", "regression"])
    def test_other_tasks_have_several_outputs_a_sample(self, task):
        x, y = sentences(20, 5).tensors
        with pytest.raises(ValueError, match=re.escape("features must have shape (N, D), got (20, 5, 16)")):
            logme(x, (y > 1).long(), task)
