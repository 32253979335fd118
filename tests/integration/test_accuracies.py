"""The accuracy that callbacks and metrics report in whole runs, against scikit-learn, also in several processes."""

import math
from functools import partial

import pytest
import torch
from boards import events
from layered import Deep
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from models import CLASSES, Classifier, loader, mlp, penultimate, trainer, vectors
from oracles import metric_of_predictions, problem
from test_tokens import Tagger, sentences, token_loss
from torch import nn
from torch.utils.data import TensorDataset
from witness import Quiet

from lightning_logme import LogME, LogMECallback, Probe, read_evidence, read_history
from lightning_logme.features.labels import Labels, Target
from lightning_logme.functional import leave_one_out
from lightning_logme.scores.scoring import Scoring
from lightning_logme.scores.subset import index_of, mixed
from lightning_logme.tracking.validation import Pass


def expected_of(features, target, task="multiclass", **options):
    """Return the metric of the leave-one-out predictions of all samples."""
    return metric_of_predictions(leave_one_out(features, target, task, **options), target, task)


def test_every_source_loader_and_probe_has_an_accuracy(tmp_path):
    module, sets = Classifier(Deep(2)), (vectors(), vectors(60, seed=5))
    callback = LogMECallback(
        layers=["model.blocks.*"], layer_mean=True, probes={"news": loader(vectors(80, seed=6))}, fit_intercept=True
    )
    run = trainer(tmp_path, callback)
    run.validate(module, list(map(loader, sets)), verbose=False)
    expected = {}
    for prefix, ending, data in (
        ("", "/dataloader_idx_0", sets[0]),
        ("", "/dataloader_idx_1", sets[1]),
        ("/news", "", vectors(80, seed=6)),
    ):
        x, y = data.tensors
        first, second = (output.detach() for output in module.model.outputs(x))
        sources = {"": second, "/model.blocks.0": first, "/model.blocks.1": second, "/layer_mean": (first + second) / 2}
        for source, features in sources.items():
            expected[f"{prefix}{source}{ending}"] = expected_of(features, y, fit_intercept=True)
    assert {row["key"].removeprefix("logme"): row["accuracy"] for row in callback.history} == pytest.approx(expected)
    logged = {key.removeprefix("logme_accuracy"): float(value) for key, value in run.callback_metrics.items()}
    assert {key: logged[key] for key in expected} == pytest.approx(expected)
    assert {key.removeprefix("logme"): each.value for key, each in callback.accuracies.items()} == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    ("task", "metric", "outputs", "loss", "convert"),
    [
        ("binary", "accuracy", 2, nn.functional.cross_entropy, lambda y: y % 2),
        ("multilabel", "f1", 3, nn.functional.binary_cross_entropy_with_logits, lambda y: torch.eye(4)[y][:, :3]),
        ("regression", "r2", 2, nn.functional.mse_loss, lambda y: torch.stack([y, -y], 1).float()),
    ],
)
def test_tasks_and_probes_of_other_tasks_have_their_own_metric(tmp_path, task, metric, outputs, loss, convert):
    x, y = vectors().tensors
    data, module = TensorDataset(x, convert(y)), Classifier(mlp(16, outputs), loss)
    mood, news = Probe(loader(TensorDataset(x, x[:, 0])), task="regression"), loader(vectors(60))
    callback = LogMECallback(task=task, probes={"mood": mood, "news": news}, curve=True)
    run = trainer(tmp_path, callback)
    run.validate(module, loader(data), verbose=False)
    features, target = penultimate(module, "model.2", data)
    assert float(run.callback_metrics[f"logme_{metric}"]) == pytest.approx(expected_of(features, target, task))
    first = callback.history[0]
    assert first[metric] == callback.accuracies["logme"].value
    assert first[f"{metric}_stderr"] == callback.accuracies["logme"].stderr > 0
    assert first["curve"][-1][3] == callback.curves["logme"][-1].accuracy == first[metric]
    expected = expected_of(features, x[:, :1], "regression")
    assert float(run.callback_metrics["logme_r2/mood"]) == pytest.approx(expected, rel=1e-4)
    names = {key for key in run.callback_metrics if "_accuracy" in key or "_r2" in key or "_f1" in key}
    assert names == {f"logme_{metric}", "logme_r2/mood", "logme_accuracy/news"}


def test_large_validation_is_measured_on_a_random_subset(tmp_path):
    module, callback, data = Classifier(), LogMECallback(), vectors(3000)
    trainer(tmp_path, callback).validate(module, loader(data, 500), verbose=False)
    features, labels = penultimate(module, "model.2", data)
    chosen = mixed(index_of(torch.arange(3000))).argsort()[:2048]
    expected = metric_of_predictions(leave_one_out(features, labels)[chosen], labels[chosen])
    assert callback.history[0]["accuracy"] == pytest.approx(expected)
    assert callback.accuracies["logme"].num_samples == 2048


def test_only_tokens_with_a_label_count(tmp_path):
    module, callback, data = Classifier(Tagger(), token_loss), LogMECallback(), sentences()
    trainer(tmp_path, callback).validate(module, loader(data, 8), verbose=False)
    x, y = (tensor.flatten(0, 1) for tensor in data.tensors)
    hidden = module.model.encoder(x).detach()[y >= 0]
    assert callback.history[0]["accuracy"] == pytest.approx(expected_of(hidden, y[y >= 0]))
    assert callback.accuracies["logme"].num_samples == int((y >= 0).sum())


class TestWithoutAccuracy:
    def test_has_no_key_row_or_state_of_accuracy(self, tmp_path):
        callback = LogMECallback(accuracy=False, curve=True, probes={"news": loader()}, plots=True)
        saving, logger = ModelCheckpoint(tmp_path, "saved"), TensorBoardLogger(tmp_path, "", "")
        run = trainer(tmp_path, callback, saving, logger=logger, log_every_n_steps=1, max_epochs=1)
        run.fit(Classifier(), loader(), loader())
        assert not any("accuracy" in key for row in callback.history for key in row)
        assert not any("logme_accuracy" in key for key in run.callback_metrics)
        assert callback.accuracies == {}
        assert all(math.isnan(point.accuracy) for point in callback.curves["logme"])
        assert "accuracy" not in str([read(tmp_path / "saved.ckpt") for read in (read_history, read_evidence)])
        seen = events(tmp_path)
        assert not any("accuracy" in tag or "confusion" in tag for tags in seen.Tags().values() if tags for tag in tags)
        assert b"accuracy" not in seen.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]

    @pytest.mark.parametrize("accuracy", [False, True])
    def test_keeps_no_rows(self, accuracy):
        current = Pass(Scoring(num_outputs=CLASSES, accuracy=accuracy))
        x, y = vectors(400).tensors
        current.add({"": x}, Labels(Target.checked(y, "multiclass", CLASSES), None), range(400))
        rows = current.accumulators["", 0].nbytes - sum(
            value.nbytes for sums in current.accumulators["", 0].moments().values() for value in vars(sums).values()
        )
        assert rows == (2048 * (16 * 4 + 8) if accuracy else 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_nan_and_the_run_goes_on(tmp_path, value):
    class Sometimes(Classifier):
        def forward(self, x):
            return super().forward(x * value if self.current_epoch == 1 and not self.training else x)

    callback = LogMECallback()
    run = trainer(tmp_path, callback, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=3)
    with pytest.warns(UserWarning, match="LogME is NaN: the features contain NaN or Inf"):
        run.fit(Sometimes(), loader(), loader())
    assert [math.isfinite(row["accuracy"]) for row in callback.history] == [True, False, True]
    assert [math.isfinite(row["accuracy_stderr"]) for row in callback.history] == [True, False, True]
    assert math.isnan(read_history(tmp_path / "epoch=1.ckpt")[-1]["accuracy"])


def test_source_that_fails_has_nan_and_keeps_its_last_accuracy(tmp_path):
    class Fails(Classifier):
        def forward(self, x):
            if self.current_epoch == 1 and len(x) == 17:  # only batches of the probe
                raise RuntimeError("on purpose")
            return super().forward(x)

    ratings = TensorDataset(torch.randn(34, 16), torch.randn(34))
    callback = LogMECallback(probes={"mood": Probe(loader(ratings, 17), task="regression")})
    run = trainer(tmp_path, callback, max_epochs=2)
    with pytest.warns(UserWarning, match="on purpose"):
        run.fit(Fails(), loader(), loader())
    first, second = (row for row in callback.history if row["key"] == "logme/mood")
    assert math.isnan(second["r2"])
    assert math.isnan(second["r2_stderr"])
    assert math.isnan(run.callback_metrics["logme_r2/mood"])
    assert math.isfinite(run.callback_metrics["logme_accuracy"])
    assert callback.accuracies["logme/mood"].value == first["r2"]


@pytest.mark.parametrize(("number", "classes"), [(1, 2), (2, 2), (3, 4), (40, 1)])
def test_few_samples_and_classes_end_no_run(tmp_path, recwarn, number, classes):
    x, y = vectors(number).tensors
    callback = LogMECallback(probes={"same": Probe(loader(TensorDataset(x, y % classes)), num_classes=classes)})
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(Classifier(), loader(), loader(TensorDataset(x, y % classes)))
    first, second = callback.history
    assert str(first["accuracy"]) == str(second["accuracy"])  # also NaN
    assert math.isnan(first["accuracy"]) == math.isnan(first["logme"]) == (number == 1 or classes == 1)


def test_checkpoints_hold_accuracies_as_plain_numbers(tmp_path):
    callback = LogMECallback(layers=["model.0"])
    run = trainer(tmp_path, callback, ModelCheckpoint(tmp_path, "saved"), max_epochs=2)
    run.fit(Classifier(), loader(), loader())
    rows, saved = read_history(tmp_path / "saved.ckpt"), read_evidence(tmp_path / "saved.ckpt")
    assert rows == callback.history
    for key, accuracy in callback.accuracies.items():
        assert saved[key]["accuracy"] == accuracy.value == rows[-2 if key == "logme" else -1]["accuracy"]
        assert saved[key]["accuracy_stderr"] == accuracy.stderr


def test_accuracy_can_be_monitored(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}-{logme_accuracy:.4f}", monitor="logme_accuracy", mode="max")
    callback = LogMECallback()
    trainer(tmp_path, checkpoint, callback, max_epochs=4).fit(Classifier(lr=0.5), loader(), loader())
    best = max(row["accuracy"] for row in callback.history)
    assert float(checkpoint.best_model_score) == pytest.approx(best)
    assert f"logme_accuracy={best:.4f}" in checkpoint.best_model_path


@pytest.mark.parametrize(("classes", "drawn"), [(30, 2), (31, 0)])
def test_confusion_is_drawn_for_the_head_and_at_most_30_classes(tmp_path, classes, drawn):
    callback = LogMECallback(layers=["model.0"], plots=True)
    run = trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path, "", ""), log_every_n_steps=1)
    run.fit(Classifier(mlp(16, classes)), loader(vectors(93, 0, classes)), loader(vectors(93, 0, classes)))
    tags = [tag for tag in events(tmp_path).Tags()["images"] if tag.endswith("confusion")]
    assert tags == ["logme/confusion"] * bool(drawn)
    if drawn:
        assert len(events(tmp_path).Images("logme/confusion")) == drawn
        assert callback.accuracies["logme"].confusion.sum() == 93


class QuietTagger(Quiet):
    def __init__(self):
        super().__init__()
        self.model, self.loss = Tagger(), token_loss


def _validated(rank, world, path, kind):
    """Return all rows and accuracies of a run in one or several processes."""
    module, data = (QuietTagger(), sentences(501)) if kind == "tokens" else (Quiet(), vectors(kind))
    callback = LogMECallback(curve=True, probes={"news": Probe(loader(data, 40), num_classes=CLASSES)})
    options = {"strategy": DDPStrategy()} if world > 1 else {}
    run = trainer(path, callback, devices=world, precision="64-true", **options)
    run.validate(module, loader(data, 40), verbose=False)
    accuracies = {
        key: (each.value, each.num_samples, each.replicates, each.confusion.tolist())
        for key, each in callback.accuracies.items()
    }
    return accuracies, [point.accuracy for point in callback.curves["logme"]]


@pytest.mark.parametrize(("kind", "world"), [(91, 2), (91, 3), (2500, 2), (2500, 3), ("tokens", 2)])
def test_callback_has_the_accuracies_of_one_process(processes, tmp_path, kind, world):
    """Below and above 2048 samples; with padding of the distributed sampler."""
    torch.manual_seed(0)
    alone, curve = _validated(0, 1, tmp_path, kind)
    answers = processes.run(partial(_validated, path=tmp_path, kind=kind), world=world)
    assert all(answer == answers[0] for answer in answers)  # to the last bit
    accuracies, points = answers[0]
    assert list(accuracies) == list(alone) == ["logme", "logme/news"]
    for key, (value, number, replicates, confusion) in accuracies.items():
        assert value == pytest.approx(alone[key][0], rel=1e-6)
        assert number == alone[key][1]
        assert replicates == pytest.approx(alone[key][2], rel=1e-6)
        assert confusion == alone[key][3]
    if kind != "tokens":  # With tokens, processes do not know which are the first ones.
        assert points == pytest.approx(curve, rel=1e-6)


def _metric(rank, world, number, width):
    features, labels = map(torch.as_tensor, problem(number, width, 4, noise=2.0))
    metric = LogME("multiclass", width, num_classes=4)
    for start in range(rank, number, 50 * world):
        mine = slice(start, min(start + 50 * world, number), world)
        metric.update(features[mine], labels[mine])
    seen = metric.accuracy(), metric.evidence().num_samples, float(metric.compute())
    metric.update(features[rank::world], labels[rank::world])  # The sync is undone.
    apart = LogME("multiclass", width, num_classes=4, sync_on_compute=False)
    apart.update(features[rank::world], labels[rank::world])
    assert apart.accuracy().num_samples == min(2048, len(features[rank::world]))
    return seen[0].value, seen[0].num_samples, seen[0].confusion.tolist(), *seen[1:], metric.accuracy().num_samples


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("number", "width"), [(301, 6), (301, 400), (3001, 6)])
def test_metric_has_the_accuracy_of_one_process(processes, number, width, world):
    alone = _metric(0, 1, number, width)
    answers = processes.run(_metric, number, width, world=world)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][:4] == alone[:4]
    assert answers[0][4:] == pytest.approx(alone[4:], rel=1e-9)
    assert alone[5] == min(2048, 2 * number)
