"""Curves of validations and probes: evidence against the number of samples, in whole runs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CLASSES, Classifier, loader, penultimate, trainer, vectors
from torch.utils.data import TensorDataset

from lightning_logme import LogMECallback, Probe, read_history
from lightning_logme.features.labels import Labels, Target
from lightning_logme.features.sampling import Samples
from lightning_logme.functional import evidence
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.validation import Pass


def test_only_the_last_point_of_a_curve_warns():
    current = Pass(Scoring(num_outputs=3, curve=True))
    labels = Labels(Target.checked(torch.zeros(128, dtype=torch.long), "multiclass", 3), None)
    assert current.add({"": torch.randn(128, 4)}, labels, range(128)) == {}
    with pytest.warns(UserWarning, match="only one class is present in 128 samples") as caught:
        current.results(torch.device("cpu"), alone=True)
    assert len(caught) == 1


def test_points_of_a_validation_are_scores_of_its_first_samples(tmp_path):
    data, module, callback = vectors(150), Classifier(), LogMECallback(curve=True)
    trainer(tmp_path, callback).validate(module, loader(data, 23), verbose=False)
    features, labels = penultimate(module, "model.2", data)
    assert [point.num_samples for point in callback.curves["logme"]] == [32, 64, 128, 150]
    for point in callback.curves["logme"]:
        expected = evidence(features[: point.num_samples], labels[: point.num_samples], num_classes=CLASSES)
        assert point.logme == pytest.approx(float(expected.score), rel=1e-6)
        assert point.gain == pytest.approx(float(expected.gain), rel=1e-6)
    assert callback.history[-1]["curve"] == [list(point) for point in callback.curves["logme"]]
    assert callback.history[-1]["logme"] == callback.curves["logme"][-1].logme


def test_points_of_a_probe_are_scores_of_random_samples(tmp_path):
    """The data set is sorted by class, but the first 32 random samples hold all classes."""
    data = vectors(200)
    order = data.tensors[1].argsort()
    data = TensorDataset(*(tensor[order] for tensor in data.tensors))
    module, callback = Classifier(), LogMECallback(curve=True, probes={"news": loader(data)}, validation=False)
    trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    portions = list(Samples(loader(data), "multiclass", None, 0).portions(0, None))
    shuffled = TensorDataset(torch.cat([p.batch[0] for p in portions]), torch.cat([p.target for p in portions]))
    features, labels = penultimate(module, "model.2", shuffled)
    assert len(labels[:32].unique()) == CLASSES
    for point, number in zip(callback.curves["logme/news"], [32, 64, 128, 200], strict=True):
        expected = evidence(features[:number], labels[:number], num_classes=CLASSES)
        assert point[:3] == pytest.approx((number, float(expected.score), float(expected.gain)), rel=1e-6)


def test_checkpoints_hold_the_curve_of_every_layer_and_probe(tmp_path):
    callback = LogMECallback(curve=True, layers=["model.0"], probes={"news": loader(vectors(70))})
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(Classifier(), loader(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    rows = {row["key"]: row for row in read_history(tmp_path / "last.ckpt")}
    assert set(rows) == {"logme", "logme/model.0", "logme/news", "logme/news/model.0"}
    assert {key: [n for n, *_ in row["curve"]] for key, row in rows.items()} == {
        "logme": [32, 64, 96],
        "logme/model.0": [32, 64, 96],
        "logme/news": [32, 64, 70],
        "logme/news/model.0": [32, 64, 70],
    }


def test_points_without_evidence_are_nan_without_a_warning(tmp_path):
    labels = torch.arange(96) // 48
    data = TensorDataset(torch.randn(96, 16), labels)
    callback = LogMECallback(curve=True, num_classes=CLASSES)
    trainer(tmp_path, callback).validate(Classifier(), loader(data), verbose=False)
    first, second, last = callback.curves["logme"]
    assert math.isnan(first.logme)
    assert second.num_samples == 64
    assert math.isfinite(second.logme)
    assert math.isfinite(last.logme)


@pytest.mark.parametrize("ignored", [lambda i: i % 2 == 1, lambda i: i < 50])
def test_ignored_rows_are_not_counted(tmp_path, ignored):
    x, y = vectors(100).tensors
    data = TensorDataset(x, torch.where(ignored(torch.arange(100)), -100, y))
    callback = LogMECallback(curve=True, probes={"same": loader(data)})
    trainer(tmp_path, callback).validate(Classifier(), loader(data), verbose=False)
    for key in ("logme", "logme/same"):
        assert [point.num_samples for point in callback.curves[key]] == [32, 50]


def test_tokens_are_counted_and_not_sequences(tmp_path):
    x, y = vectors(120).tensors
    data = TensorDataset(x.unflatten(0, (20, 6)), y.unflatten(0, (20, 6)))
    callback = LogMECallback(curve=True, probes={"same": loader(data, 3)})
    module = Classifier(loss=lambda logits, labels: logits.mean())
    trainer(tmp_path, callback).validate(module, loader(data, 7), verbose=False)
    for key in ("logme", "logme/same"):
        assert [point.num_samples for point in callback.curves[key]] == [32, 64, 120]


def test_curve_of_many_classes_starts_later(tmp_path):
    data = TensorDataset(torch.randn(300, 16), torch.arange(300) % 50)
    callback = LogMECallback(curve=True, probes={"many": Probe(loader(data))}, validation=False)
    trainer(tmp_path, callback).validate(Classifier(), loader(), verbose=False)
    assert [point.num_samples for point in callback.curves["logme/many"]] == [100, 200, 300]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    world=st.integers(1, 3),
    rank=st.integers(0, 2),
)
def test_rows_fall_into_segments_by_their_position_among_all_processes(lengths, world, rank):
    """Process r of several has the samples r, r + world, … of each batch."""
    rank %= world
    one, first = Pass(Scoring("multiclass", CLASSES, curve=True), rank, world), 0
    for length in lengths:
        positions = range(first * world + rank, (first + length) * world + rank, world)
        features = torch.tensor(positions, dtype=torch.float64)[:, None]
        target = Target.checked(torch.arange(length) % CLASSES, "multiclass", CLASSES)
        assert one.add({"": features}, Labels(target, None), positions) == {}
        first += length
    sums = one.accumulators["", 0].moments()
    assert sum(int(each.count) for each in sums.values()) == first
    for segment, each in sums.items():
        start, stop = 32 * 2 ** (segment - 1) if segment else 0, 32 * 2**segment
        members = [position for position in range(rank, first * world, world) if start <= position < stop]
        assert int(each.count) == len(members)
        assert float(each.feature_sum) == sum(members)
