"""The accuracy of a probe with test samples: the head of the training samples predicts them."""

import math
import warnings
import weakref

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from models import Classifier, loader, penultimate, trainer, vectors
from sklearn.metrics import confusion_matrix, f1_score, r2_score
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from witness import Quiet

from lightning_logme import LogMECallback, Probe, read_history
from lightning_logme.features.labels import Labels, Target
from lightning_logme.functional import evidence, leave_one_out
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.held_out import HeldOut
from lightning_logme.tracking.validation import Result

K = 3


def halves(train=150, test=60):
    """Return training and test samples of one task of three classes."""
    x, y = vectors(train + test, seed=7, classes=K).tensors
    return TensorDataset(x[:train], y[:train]), TensorDataset(x[train:], y[train:])


def with_labels(data, task):
    """Return the same samples with the labels of another task."""
    x, y = data.tensors
    labels = {
        "multiclass": y,
        "binary": (y == 0).long(),
        "multilabel": torch.stack([y == 0, y > 0, x[:, 0] > 0], 1).long(),
        "regression": x[:, :2] + 0.1 * y[:, None],
    }
    return TensorDataset(x, labels[task])


def prediction(module, train, test, task="multiclass", layer="model.2", **options):
    """Return the predictions of the test samples by the head of the training samples."""
    features, labels = penultimate(module, layer, train)
    return evidence(features, labels, task, **options).predict(penultimate(module, layer, test)[0])


def share(predictions, labels):
    return float((predictions.argmax(1) == labels).double().mean())


def rows_of(callback, key="logme/news"):
    return [row for row in callback.history if row["key"] == key]


def validate(tmp_path, callback, module=None, **options):
    module = Classifier() if module is None else module
    return trainer(tmp_path, callback, **options).validate(module, loader(), verbose=False)[0]


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel", "regression"])
def test_the_head_of_the_training_samples_predicts_the_test_samples(tmp_path, task, fit_intercept):
    train, test = (with_labels(data, task) for data in halves())
    probe = Probe(loader(train, 40), test=loader(test, 25), task=task)
    callback, module = (
        LogMECallback(probes={"news": probe}, layers=["model.0"], fit_intercept=fit_intercept),
        Classifier(),
    )
    metrics = validate(tmp_path, callback, module)
    name = {"multilabel": "f1", "regression": "r2"}.get(task, "accuracy")
    for key, layer in (("logme/news", "model.2"), ("logme/news/model.0", "model.1")):
        predictions = prediction(module, train, test, task, layer, fit_intercept=fit_intercept)
        expected = {
            "accuracy": lambda p, y: share(p, y),
            "f1": lambda p, y: f1_score(y, p > 0.5, average="macro"),
            "r2": lambda p, y: r2_score(y, p),
        }[name](predictions, test.tensors[1])
        (row,) = rows_of(callback, key)
        assert row[name] == pytest.approx(expected, abs=1e-6)
        assert metrics[key.replace("logme", f"logme_{name}", 1)] == pytest.approx(expected, abs=1e-6)
        assert (callback.accuracies[key].num_samples, row["num_samples"]) == (60, 150)
        whole = evidence(*penultimate(module, layer, train), task, fit_intercept=fit_intercept)
        assert (row["logme"], row["gain"]) == pytest.approx((float(whole.score), float(whole.gain)), rel=1e-5)
    if name == "accuracy":
        row, classes = (
            rows_of(callback)[0],
            prediction(module, train, test, task, fit_intercept=fit_intercept).argmax(1),
        )
        assert row["accuracy_stderr"] == pytest.approx(math.sqrt(row[name] * (1 - row[name]) / 60), rel=0.5)
        confusion = callback.accuracies["logme/news"].confusion
        assert confusion.tolist() == confusion_matrix(test.tensors[1], classes).tolist()


def test_points_of_a_curve_are_those_of_the_training_samples(tmp_path):
    train, test = halves()
    probe, module = Probe(loader(train), test=loader(test)), Classifier()
    callback = LogMECallback(probes={"news": probe}, curve=True)
    validate(tmp_path, callback, module)
    features, labels = penultimate(module, "model.2", train)
    point = callback.curves["logme/news"][-1]
    assert point.num_samples == 150
    assert point.accuracy == pytest.approx(share(leave_one_out(features, labels), labels), abs=1e-6)
    assert point.accuracy != rows_of(callback)[0]["accuracy"]


def test_tokens_are_predicted_one_by_one(tmp_path):
    class Tagger(Classifier):
        def validation_step(self, batch, batch_idx):
            pass

    data = []
    for part in halves(300, 120):
        x, y = part.tensors
        y = torch.where(torch.arange(len(y)) % 4 == 0, -100, y)
        data.append(TensorDataset(x.unflatten(0, (-1, 5)), y.unflatten(0, (-1, 5))))
    probe = Probe(loader(data[0]), test=loader(data[1], 7), num_classes=K)
    callback, module = LogMECallback(probes={"news": probe}, validation=False), Tagger()
    validate(tmp_path, callback, module)
    train, test = (
        TensorDataset(x.flatten(0, 1)[y.flatten() >= 0], y[y >= 0]) for x, y in (each.tensors for each in data)
    )
    assert rows_of(callback)[0]["accuracy"] == pytest.approx(
        share(prediction(module, train, test), test.tensors[1]), abs=1e-6
    )
    assert callback.accuracies["logme/news"].num_samples == 90


def test_limit_batches_holds_for_both_loaders(tmp_path):
    batches = [[tuple(batch) for batch in loader(data, 20)] for data in halves()]  # lists keep their order
    probe = Probe(batches[0], test=batches[1], num_classes=K, limit_batches=2)
    callback, module = LogMECallback(probes={"news": probe}), Classifier()
    validate(tmp_path, callback, module)
    train, test = (TensorDataset(*(tensor[:40] for tensor in data.tensors)) for data in halves())
    assert (rows_of(callback)[0]["num_samples"], callback.accuracies["logme/news"].num_samples) == (40, 40)
    assert rows_of(callback)[0]["accuracy"] == pytest.approx(
        share(prediction(module, train, test), test.tensors[1]), abs=1e-6
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_features_are_scaled_like_those_of_the_training_samples(tmp_path, normalize):
    train, test = halves()
    probe = Probe(loader(train), test=loader(test))
    callback, module = LogMECallback(probes={"news": probe}, normalize=normalize), Classifier()
    validate(tmp_path, callback, module)
    features, new = (penultimate(module, "model.2", data)[0] for data in (train, test))
    if normalize:
        features, new = nn.functional.normalize(features), nn.functional.normalize(new)
    expected = share(evidence(features, train.tensors[1]).predict(new), test.tensors[1])
    assert rows_of(callback)[0]["accuracy"] == pytest.approx(expected, abs=1e-6)


def test_a_checkpoint_holds_the_accuracy_of_its_own_weights(tmp_path):
    train, test = halves()
    callback = LogMECallback(probes={"news": Probe(loader(train), test=loader(test))}, probe_every="checkpoint")
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    trainer(tmp_path, callback, saving).fit(Classifier(), loader(), loader())
    paths = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(paths) == 2
    for path in paths:
        module = Classifier()
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        row = next(row for row in reversed(read_history(path)) if row["key"] == "logme/news")
        expected = share(prediction(module, train, test), test.tensors[1])
        assert row["accuracy"] == pytest.approx(expected, abs=1e-6)


def _history(rank, world, path):
    train, test = halves(151, 61)
    x, y = (torch.cat([part.tensors[which] for part in (train, test)]) for which in range(2))
    several = TensorDataset(x, torch.stack([y == 0, y > 0], 1).long())
    probes = {
        "news": Probe(loader(train, 9), test=loader(test, 9)),
        "few": Probe(loader(train, 9), test=loader(TensorDataset(*test[:5]), 9)),  # one batch: fewer than processes
        "topics": Probe(loader(several, 30), test=loader(several, 20), task="multilabel"),
    }
    callback = LogMECallback(probes=probes, layers=["model.0"], validation=False)
    options = {"devices": world, "strategy": DDPStrategy() if world > 1 else "auto", "precision": "64-true"}
    torch.manual_seed(0)
    run = trainer(path, callback, max_epochs=1, num_sanity_val_steps=1, **options)
    run.fit(Quiet(), loader(vectors(36), 36 // world), loader())
    return callback.history, {key: found.replicates for key, found in callback.accuracies.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_measure_what_one_does(processes, tmp_path, world):
    history, replicates = _history(0, 1, tmp_path)
    assert {row["key"] for row in history} == {
        f"logme/{name}{end}" for name in ("news", "few", "topics") for end in ("", "/model.0")
    }
    reports = processes.run(_history, tmp_path, world=world)
    assert all(report == reports[0] for report in reports)
    for row, expected in zip(reports[0][0], history, strict=True):
        metric = "f1" if "f1" in expected else "accuracy"
        assert (row["key"], row["num_samples"], row[metric]) == tuple(
            expected[name] for name in ("key", "num_samples", metric)
        )
        assert row["logme"] == pytest.approx(expected["logme"], rel=1e-9)
    assert reports[0][1] == replicates


def test_test_samples_without_accuracy_are_an_error():
    train, test = halves()
    with pytest.raises(ValueError, match=r"probes\['news'\]\.test: test samples only serve to measure accuracy"):
        LogMECallback(probes={"news": Probe(DataLoader(train), test=DataLoader(test))}, accuracy=False)


class TestMistakes:
    @pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
    @pytest.mark.parametrize("validated", [True, False])
    @pytest.mark.parametrize(
        ("test", "message"),
        [
            (lambda: loader(TensorDataset(torch.randn(20, 16), torch.arange(20) % 4)), ": .*labels from 0 to 3"),
            (lambda: loader(TensorDataset(torch.randn(20, 16))), ": no labels found"),
            (lambda: loader(TensorDataset(torch.zeros(0, 16), torch.zeros(0).long())), ": dataloader has no samples"),
            (lambda: [], ": "),
            (lambda: 3, ": .*must be a DataLoader"),
            (lambda: iter(loader(halves()[1])), ": .*read only once"),
            (
                lambda: loader(TensorDataset(torch.randn(20, 5), torch.arange(20) % K)),
                ": its first batch cannot be scored: RuntimeError: mat1 and",
            ),
        ],
    )
    def test_mistakes_are_errors_before_training(self, tmp_path, test, message, validated):
        class Untouched(Classifier):
            def training_step(self, batch, batch_idx):
                pytest.fail("training began")

        probes = {"news": Probe(loader(halves()[0]), test=test())}
        callback = LogMECallback(probes=probes, validation=validated)
        with pytest.raises(ValueError, match=rf"probes\['news'\]\.test{message}"):
            trainer(tmp_path, callback).fit(Untouched(), loader(), loader() if validated else None)

    @pytest.mark.parametrize(
        ("last", "message"),
        [
            (
                lambda x, y: (x, y + 1),
                r"probes\['news'\]\.test: the accuracy is NaN, after an error: .*labels from 1 to 3",
            ),
            (
                lambda x, y: (x[:, :5], y),
                r"probes\['news'\]\.test: the accuracy is NaN, after an error: RuntimeError: mat1 and",
            ),
            (lambda x, y: (x * math.nan, y), "LogME: the accuracy is NaN, because features, .* contain NaN or Inf"),
        ],
    )
    def test_a_later_error_makes_only_the_accuracy_nan(self, tmp_path, last, message):
        train, test = halves()
        first, second = loader(test, 30)
        probes = {
            "news": Probe(loader(train), test=[tuple(first), last(*second)]),
            "whole": Probe(loader(train), test=loader(test)),
        }
        callback = LogMECallback(probes=probes)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), loader(), loader())
        messages = [str(warning.message) for warning in caught if "NaN" in str(warning.message)]
        assert len(messages) == 1
        assert pytest.raises(AssertionError, match=message).matches(AssertionError(messages[0])), messages
        (news,), (whole,) = rows_of(callback), rows_of(callback, "logme/whole")
        assert math.isnan(news["accuracy"])
        assert math.isnan(news["accuracy_stderr"])
        assert (news["logme"], news["gain"]) == (whole["logme"], whole["gain"])
        assert math.isfinite(whole["accuracy"])

    @pytest.mark.parametrize("place", ["device", "accuracy"])
    def test_a_lack_of_memory_does_not_end_the_run(self, tmp_path, monkeypatch, place):
        def fail(*_, **__):
            raise torch.OutOfMemoryError("out of memory")

        move = Evidence.to
        if place == "accuracy":
            monkeypatch.setattr("lightning_logme.tracking.held_out.accuracy_of", fail)
        else:  # results go to "cpu", the heads for test samples to the device of the features
            monkeypatch.setattr(Evidence, "to", lambda self, device: (move if device == "cpu" else fail)(self, device))
        train, test = halves()
        callback = LogMECallback(probes={"news": Probe(loader(train), test=loader(test))})
        with pytest.warns(UserWarning, match=r"\.test: the accuracy is NaN, after an error: OutOfMemoryError: out of"):
            trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), loader(), loader())
        (row,) = rows_of(callback)
        assert math.isfinite(row["logme"])
        assert math.isnan(row["accuracy"])

    def test_two_sources_with_one_error_give_one_warning(self, tmp_path):
        train, test = halves()
        first, second = loader(test, 30)
        probe = Probe(loader(train), test=[tuple(first), (second[0], second[1] + 1)])
        callback = LogMECallback(probes={"news": probe}, layers=["model.0"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            validate(tmp_path, callback)
        assert len([warning for warning in caught if "the accuracy is NaN" in str(warning.message)]) == 1
        assert all(math.isnan(found.value) for key, found in callback.accuracies.items() if "news" in key)

    def test_a_loader_that_is_empty_later_gives_a_warning(self, tmp_path):
        class Ends(IterableDataset):
            data = halves()[1]

            def __iter__(self):
                return iter(Ends.data)

        def forward(module, batch):
            Ends.data = []
            return module(batch[0])

        probe = Probe(loader(halves()[0]), test=DataLoader(Ends(), 20), forward=forward)
        callback = LogMECallback(probes={"news": probe})
        with pytest.warns(UserWarning, match=r"probes\['news'\].test: the accuracy is NaN, because the loader gave no"):
            validate(tmp_path, callback)
        assert math.isnan(rows_of(callback)[0]["accuracy"])

    def test_without_evidence_there_is_no_accuracy_and_one_warning(self, tmp_path):
        train, test = halves()
        one_class = TensorDataset(train.tensors[0], torch.zeros(150).long())
        probe = Probe(loader(one_class), test=loader(test), num_classes=K)
        callback = LogMECallback(probes={"news": probe})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            validate(tmp_path, callback)
        messages = [str(warning.message) for warning in caught if "NaN" in str(warning.message)]
        assert ["only one class" in message for message in messages] == [True]
        assert math.isnan(rows_of(callback)[0]["accuracy"])

    def test_a_failure_in_the_training_samples_is_nan(self, tmp_path):
        train, test = halves()
        first, second = loader(train, 75)
        probe = Probe([tuple(first), (second[0], second[1] + 1)], test=loader(test), num_classes=K)
        callback = LogMECallback(probes={"news": probe})
        with pytest.warns(UserWarning, match="logme/news is NaN, after an error: .*labels from 1 to 3"):
            validate(tmp_path, callback)
        (row,) = rows_of(callback)
        assert math.isnan(row["logme"])
        assert math.isnan(row["accuracy"])

    def test_an_absent_class_is_never_predicted(self, tmp_path):
        train, test = halves()
        kept = train.tensors[1] > 0
        probe = Probe(loader(TensorDataset(*(tensor[kept] for tensor in train.tensors))), test=loader(test))
        callback = LogMECallback(probes={"news": probe})
        validate(tmp_path, callback)
        confusion = callback.accuracies["logme/news"].confusion
        assert confusion[:, 0].sum() == 0
        assert confusion[0].sum() == int((test.tensors[1] == 0).sum()) > 0


def test_features_of_test_samples_are_not_kept():
    whole = evidence(*halves()[0].tensors)
    held_out = HeldOut({("", 0): Result(whole, None, [])}, Scoring(num_outputs=K), torch.device("cpu"))
    kept = []
    for start in range(0, 60, 20):
        inputs, labels = halves()[1][start : start + 20]
        features = inputs.numpy().copy()  # a tensor with this memory holds a reference to the array
        kept.append(weakref.ref(features))
        batch = Labels(Target.checked(labels, "multiclass", K), None)
        assert held_out.add({"": torch.from_numpy(features)}, batch, range(start, start + 20)) == {}
    del features
    assert [reference() for reference in kept] == [None] * 3
    (result,) = held_out.tested("probes['news'].test", alone=True).values()
    expected = share(whole.predict(halves()[1].tensors[0]), halves()[1].tensors[1])
    assert (result.accuracy.num_samples, result.accuracy.value) == (60, pytest.approx(expected, abs=1e-6))
    assert result.evidence is whole
