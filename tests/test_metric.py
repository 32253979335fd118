"""The metric behaves as users of torchmetrics expect."""

import copy
import math
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from oracles import metric_of_predictions, problem
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.classification import MulticlassAccuracy

from lightning_logme import LogME
from lightning_logme.functional import evidence, leave_one_out, logme
from lightning_logme.scores.subset import index_of, mixed

FEATURES, TARGET = map(torch.as_tensor, problem(200, 8, 4, noise=2.0))
FEATURES = FEATURES.float()
EXPECTED = float(logme(FEATURES, TARGET))


def filled(parts: int = 4, **options) -> LogME:
    metric = LogME("multiclass", num_features=8, num_classes=4, **options)
    for features, target in zip(FEATURES.chunk(parts), TARGET.chunk(parts), strict=True):
        metric.update(features, target)
    return metric


def test_batches_add_up_to_the_total():
    metric = filled()
    assert float(metric.compute()) == pytest.approx(EXPECTED, rel=1e-12)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().shape == ()
    assert metric.higher_is_better
    assert metric.full_state_update is False
    assert metric.is_differentiable is False


@pytest.mark.parametrize(
    ("task", "target", "options"),
    [
        ("binary", TARGET % 2, {}),
        ("multilabel", torch.stack([TARGET == 1, TARGET > 1], 1).long(), {"num_labels": 2}),
        ("multilabel", torch.stack([TARGET == 1, TARGET > 1], 1).float(), {"num_labels": 2}),
        ("regression", FEATURES[:, 0].sin(), {}),
        ("regression", FEATURES[:, :2].sin(), {"num_outputs": 2}),
        ("multiclass", TARGET, {"num_classes": 4, "ignore_index": 2}),
        ("multiclass", TARGET, {"num_classes": 4, "fit_intercept": True}),
    ],
)
def test_tasks_and_options_equal_the_function(task, target, options):
    metric = LogME(task, 8, **options)
    for features, labels in zip(FEATURES.split(33), target.split(33), strict=True):
        metric.update(features, labels)
    shared = {name: value for name, value in options.items() if name in ("ignore_index", "fit_intercept")}
    expected = evidence(FEATURES, target, task, **shared)
    assert float(metric.compute()) == pytest.approx(float(expected.score), rel=1e-12)
    torch.testing.assert_close(metric.evidence().weight, expected.weight, rtol=1e-9, atol=1e-12)
    assert metric.evidence().num_samples == expected.num_samples


def test_forward_returns_the_score_of_the_batch_and_keeps_the_total():
    metric = LogME("multiclass", 8, num_classes=4)
    for features, target in zip(FEATURES.chunk(4), TARGET.chunk(4), strict=True):
        batch = FEATURES.new_tensor(float(metric(features, target)))
        assert float(batch) == pytest.approx(float(logme(features, target)), rel=1e-6)
    assert float(metric.compute()) == pytest.approx(EXPECTED, rel=1e-12)
    assert metric.evidence().num_samples == 200


def test_sums_have_no_graph():
    metric = LogME("multiclass", 8, num_classes=4)
    features = FEATURES.clone().requires_grad_()
    metric(features * 2, TARGET)
    metric.update(features * 2, TARGET)
    assert not metric.gram.requires_grad


def test_compute_is_cached_until_the_next_update(monkeypatch):
    metric = filled()
    first = metric.evidence()
    assert metric.evidence() is first
    assert float(metric.compute()) == float(first.score)
    metric.update(FEATURES[:50], TARGET[:50].flip(0))
    assert metric.evidence() is not first
    assert metric.evidence().num_samples == 250


def test_score_without_a_cache_is_the_same():
    metric = filled(compute_with_cache=False)
    assert float(metric.evidence().score) == pytest.approx(EXPECTED, rel=1e-12)


def test_reset_forgets_all_batches():
    metric = filled()
    metric.reset()
    metric.update(FEATURES[:100], TARGET[:100])
    assert float(metric.compute()) == pytest.approx(float(logme(FEATURES[:100], TARGET[:100])), rel=1e-12)


@pytest.mark.parametrize("copied", [lambda m: m.clone(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("computed", [False, True])
def test_copies_are_independent(copied, computed):
    metric = filled()
    if computed:
        metric.compute()
    other = copied(metric)
    other.update(FEATURES[:50], TARGET[:50].flip(0))
    assert float(metric.compute()) == pytest.approx(EXPECTED, rel=1e-12)
    assert other.evidence().num_samples == 250
    assert float(other.compute()) != pytest.approx(EXPECTED, rel=1e-6)


@pytest.mark.parametrize("as_dict", [False, True])
def test_merged_states_give_the_total(as_dict):
    first, second = LogME("multiclass", 8, num_classes=4), LogME("multiclass", 8, num_classes=4)
    first.update(FEATURES[:120], TARGET[:120])
    second.update(FEATURES[120:], TARGET[120:])
    first.compute()  # This score must not stay in the cache.
    first.merge_state(second.metric_state if as_dict else second)
    assert float(first.compute()) == pytest.approx(EXPECTED, rel=1e-12)
    empty = LogME("multiclass", 8, num_classes=4)
    empty.merge_state(filled())
    assert float(empty.compute()) == pytest.approx(EXPECTED, rel=1e-12)


def test_state_dict_is_empty_unless_persistent():
    metric = filled()
    assert metric.state_dict() == {}
    metric.persistent(True)
    other = LogME("multiclass", 8, num_classes=4)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(FEATURES[:0], TARGET[:0])
    assert float(other.compute()) == pytest.approx(EXPECTED, rel=1e-12)


def persistent():
    metric = LogME("multiclass", 8, num_classes=4)
    metric.persistent(True)
    return metric


def test_loaded_states_are_copies_and_forget_what_was_computed():
    saved = filled()
    saved.persistent(True)
    state = saved.state_dict()
    first, second = persistent(), persistent()
    first.update(FEATURES[:50], TARGET[:50])
    first.compute()
    for metric in (first, second):
        metric.load_state_dict(state)
    first.update(FEATURES[:50], TARGET[:50])
    second.update(FEATURES[:0], TARGET[:0])
    assert first.evidence().num_samples == 250
    assert float(second.compute()) == float(saved.compute())
    assert float(state["count"]) == 200


@pytest.mark.parametrize(("number", "name", "shape"), [(20, "gram", r"\(8, 8\)"), (3, "held_features", r"\(3, 8\)")])
def test_states_of_other_shapes_are_refused(number, name, shape):
    other = LogME("multiclass", 6, num_classes=4)
    other.persistent(True)
    other.update(FEATURES[:number, :6], TARGET[:number])
    metric = persistent()
    metric.update(FEATURES, TARGET)
    with pytest.raises(ValueError, match=rf"state '{name}' must have shape {shape}, got \(\d, 6\)"):
        metric.load_state_dict(other.state_dict())
    assert metric.gram.shape == (8, 8)
    assert float(metric.compute()) == pytest.approx(EXPECTED, rel=1e-12)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.set_dtype(torch.float16),
        lambda m: m.type(torch.float32),
        lambda m: torch.nn.ModuleList([m]).to(torch.bfloat16)[0],
    ],
)
def test_casts_do_not_change_the_precision_of_states(cast):
    metric = LogME("multiclass", 8, num_classes=4)
    metric.update(FEATURES[:5], TARGET[:5])
    metric = cast(metric)
    assert [rows.dtype for rows in metric.held_features] == [torch.float32]
    metric.update(FEATURES[5:100], TARGET[5:100])
    metric = cast(metric)
    metric.update(FEATURES[100:], TARGET[100:])
    assert all(value.dtype == torch.float64 for value in metric.metric_state.values() if torch.is_tensor(value))
    assert float(metric.compute()) == pytest.approx(EXPECTED, rel=1e-12)
    metric.reset()
    assert metric.gram.dtype == torch.float64


def test_collection_shares_one_update_between_equal_states():
    collection = MetricCollection(
        {
            "plain": LogME("multiclass", 8, num_classes=4),
            "centred": LogME("multiclass", 8, num_classes=4, fit_intercept=True),
        }
    )
    for features, target in zip(FEATURES.chunk(4), TARGET.chunk(4), strict=True):
        collection.update(features, target)
    assert len(collection.compute_groups) == 1
    for _ in range(2):
        values = collection.compute()
        assert float(values["plain"]) == pytest.approx(EXPECTED, rel=1e-12)
        assert float(values["centred"]) == pytest.approx(float(logme(FEATURES, TARGET, fit_intercept=True)), rel=1e-12)
    collection.update(FEATURES[:50], TARGET[:50])
    assert collection["centred"].evidence().num_samples == 250
    collection.reset()
    collection.update(FEATURES, TARGET)
    assert float(collection.compute()["plain"]) == pytest.approx(EXPECTED, rel=1e-12)


def test_collection_may_hold_other_metrics():
    collection = MetricCollection(LogME("multiclass", 8, num_classes=8), MulticlassAccuracy(8))
    collection.update(FEATURES, TARGET)
    assert set(collection.compute()) == {"LogME", "MulticlassAccuracy"}


def test_tracker_finds_the_best_score():
    tracker = MetricTracker(LogME("multiclass", 8, num_classes=4))
    generator = torch.Generator().manual_seed(0)
    for noise in (1.0, 0.1, 3.0):
        tracker.increment()
        tracker.update(FEATURES + noise * torch.randn(FEATURES.shape, generator=generator), TARGET)
    best, step = tracker.best_metric(return_step=True)
    assert step == 1
    assert best == pytest.approx(float(tracker.compute_all().max()))


@pytest.mark.parametrize("reset", [False, True])
def test_updates_in_inference_mode_and_in_training_can_be_mixed(reset):
    metric = LogME("multiclass", 8, num_classes=4)
    with torch.inference_mode():
        metric.reset()
        metric.update(FEATURES[:100], TARGET[:100])
        metric.compute()
    if reset:
        metric.reset()
        metric.update(FEATURES[:100], TARGET[:100])
    metric.update(FEATURES[100:], TARGET[100:])
    assert float(metric.compute()) == pytest.approx(EXPECTED, rel=1e-12)
    with torch.inference_mode():
        metric.update(FEATURES[:50], TARGET[:50])
    assert metric.evidence().num_samples == 250


def test_nan_in_the_features_is_nan_with_one_warning():
    metric = LogME("multiclass", 8, num_classes=4)
    broken = FEATURES.clone()
    broken[7, 3] = math.nan
    metric.update(broken, TARGET)
    with pytest.warns(UserWarning, match="features contain NaN or Inf") as caught:
        assert math.isnan(metric.compute())
        assert math.isnan(metric.evidence().gain)
    assert len(caught) == 1


def few(number, **options):
    metric = LogME("multiclass", num_features=300, num_classes=4, **options)
    features, target = FEATURES.repeat(1, 40)[:, :300] * torch.linspace(1, 2, 300), TARGET
    for start in range(0, number, 40):
        metric.update(features[start : start + 40], target[start : start + 40])
    return metric, float(logme(features[:number], target[:number]))


class TestFewerRowsThanFeatures:
    def test_rows_are_held_and_not_summed(self):
        metric, expected = few(200)
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)
        assert sum(map(len, metric.held_features)) == 200
        assert metric.gram.numel() == 1
        metric.update(torch.randn(100, 300), torch.arange(100) % 4)
        assert metric.gram.shape == (300, 300)
        assert metric.held_features == []
        assert metric.evidence().num_samples == 300

    def test_rows_may_be_overwritten_by_the_caller(self):
        metric = LogME("multiclass", 300, num_classes=4)
        features, target = torch.randn(40, 300), torch.arange(40) % 4
        expected = float(logme(features, target))
        metric.update(features, target)
        features.zero_()
        target.zero_()
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        "copied", [lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu").half()]
    )
    def test_rows_are_copied_with_the_metric(self, copied):
        metric, expected = few(120)
        assert float(copied(metric).compute()) == pytest.approx(expected, rel=1e-12)

    def test_reset_drops_the_rows(self):
        metric, _ = few(120)
        metric.reset()
        assert metric.held_features == []
        with pytest.warns(UserWarning, match="no samples|before the ``update``"):
            assert math.isnan(metric.compute())

    def test_rows_are_saved_and_loaded(self):
        metric, expected = few(120)
        metric.persistent(True)
        other = few(80)[0]
        other.persistent(True)
        other.load_state_dict(metric.state_dict())
        assert float(other.compute()) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("number", [120, 400])
    def test_forward_holds_no_more_rows_than_features(self, number):
        metric = LogME("multiclass", 300, num_classes=4)
        features, target = torch.randn(number, 300), torch.arange(number) % 4
        for rows, labels in zip(features.split(40), target.split(40), strict=True):
            metric(rows, labels)
        assert sum(map(len, metric.held_features)) == (number if number < 300 else 0)
        assert float(metric.compute()) == pytest.approx(float(logme(features, target)), rel=1e-9)

    @pytest.mark.parametrize("numbers", [(80, 120), (200, 200)])
    def test_rows_of_merged_states_give_the_total(self, numbers):
        features, target = torch.randn(sum(numbers), 300), torch.arange(sum(numbers)) % 4
        parts = [LogME("multiclass", 300, num_classes=4) for _ in numbers]
        for metric, rows, labels in zip(parts, features.split(numbers), target.split(numbers), strict=True):
            metric.update(rows, labels)
        parts[0].merge_state(parts[1])
        assert float(parts[0].compute()) == pytest.approx(float(logme(features, target)), rel=1e-9)

    def test_members_of_a_collection_share_rows(self):
        features, target = torch.randn(400, 300), torch.arange(400) % 4
        ways = {"plain": {}, "centred": {"fit_intercept": True}, "normal": {"normalize": True}}
        collection = MetricCollection(
            {name: LogME("multiclass", 300, num_classes=4, **options) for name, options in ways.items()}
        )
        for stop in range(40, 401, 40):
            collection.update(features[stop - 40 : stop], target[stop - 40 : stop])
            if stop % 80 == 0:
                values = collection.compute()
                for name, options in ways.items():
                    expected = float(logme(features[:stop], target[:stop], **options))
                    assert float(values[name]) == pytest.approx(expected, rel=1e-8)
        assert len(collection.compute_groups) == 2

    @pytest.mark.parametrize(("number", "width"), [(40, 300), (400, 300), (200, 8)])
    def test_autocast_does_not_reach_the_sums(self, number, width):
        features, target = torch.randn(number, width), torch.arange(number) % 4
        metric = LogME("multiclass", width, num_classes=4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            metric.update(features, target)
            score = metric.compute()
        assert float(score) == pytest.approx(float(logme(features, target)), rel=1e-12)


def accuracy_of(features, target, **options):
    return metric_of_predictions(leave_one_out(features, target, **options), target)


ACCURACY = accuracy_of(FEATURES, TARGET)
ACCURACY_TASKS = [
    ("binary", TARGET % 2, {}, "accuracy"),
    ("multiclass", TARGET, {"num_classes": 4, "fit_intercept": True}, "accuracy"),
    ("multiclass", TARGET, {"num_classes": 4, "normalize": True}, "accuracy"),
    ("multilabel", torch.stack([TARGET == 1, TARGET > 1], 1).long(), {"num_labels": 2}, "f1"),
    ("regression", FEATURES[:, 0].sin(), {}, "r2"),
    ("regression", FEATURES[:, :2].sin(), {"num_outputs": 2}, "r2"),
]


class TestAccuracy:
    @pytest.mark.parametrize(("task", "target", "options", "metric"), ACCURACY_TASKS)
    def test_is_the_metric_of_leave_one_out_predictions(self, task, target, options, metric):
        measured = LogME(task, 8, **options)
        for features, labels in zip(FEATURES.split(33), target.split(33), strict=True):
            measured.update(features, labels)
        found = measured.accuracy()
        options = {key: value for key, value in options.items() if key in ("fit_intercept", "normalize")}
        predictions = leave_one_out(FEATURES, target, task, **options)
        target = target[:, None] if target.ndim == 1 and task == "regression" else target
        assert found.metric == metric
        assert found.value == pytest.approx(metric_of_predictions(predictions, target, task), rel=1e-6)
        assert found.num_samples == 200
        assert found.stderr > 0

    @pytest.mark.parametrize("number", [1, 2, 299, 300, 400])
    def test_around_as_many_samples_as_features(self, number):
        metric = LogME("multiclass", 300, num_classes=4)
        features, target = torch.randn(number, 300), torch.arange(number) % 4
        for rows, labels in zip(features.split(40), target.split(40), strict=True):
            metric.update(rows, labels)
        with nullcontext() if number > 1 else pytest.warns(UserWarning, match="only one class is present"):
            found = metric.accuracy()
        if number > 1:
            assert found.value == pytest.approx(accuracy_of(features, target))
        else:
            assert math.isnan(found.value)

    def test_of_many_samples_is_measured_on_a_random_subset(self):
        features, target = map(torch.as_tensor, problem(5000, 8, 4, noise=3.0))
        metric = LogME("multiclass", 8, num_classes=4)
        for rows, labels in zip(features.split(300), target.split(300), strict=True):
            metric.update(rows, labels)
        chosen = mixed(index_of(torch.arange(5000))).argsort()[:2048]
        expected = metric_of_predictions(leave_one_out(features, target)[chosen], target[chosen])
        assert metric.accuracy().value == pytest.approx(expected)
        assert sum(map(len, metric.subset_features)) == metric.accuracy().num_samples == 2048

    def test_ignored_samples_and_unlabelled_tokens_do_not_count(self):
        tokens, labels = FEATURES.unflatten(0, (40, 5)), TARGET.clone().unflatten(0, (40, 5))
        labels[torch.rand(40, 5) < 0.3] = -100
        metric = LogME("multiclass", 8, num_classes=4, ignore_index=-100)
        for rows, some in zip(tokens.split(9), labels.split(9), strict=True):
            metric.update(rows, some)
        kept = labels.flatten() >= 0
        assert metric.accuracy().value == pytest.approx(accuracy_of(FEATURES[kept], TARGET[kept]))
        assert metric.accuracy().num_samples == int(kept.sum())

    @pytest.mark.parametrize("first", ["compute", "accuracy"])
    def test_is_cached_until_the_next_update(self, first):
        metric = filled()
        getattr(metric, first)()
        found, computed = metric.accuracy(), metric.evidence()
        assert metric.accuracy() is found
        assert metric.evidence() is computed
        assert float(metric.compute()) == pytest.approx(EXPECTED, rel=1e-12)
        metric.update(FEATURES[:50], TARGET[:50].flip(0))
        assert metric.accuracy().num_samples == metric.evidence().num_samples == 250
        metric.reset()
        metric.update(FEATURES[:60], TARGET[:60])
        assert metric.accuracy().value == pytest.approx(accuracy_of(FEATURES[:60], TARGET[:60]))

    def test_without_a_cache_is_the_same(self):
        assert filled(compute_with_cache=False).accuracy().value == pytest.approx(ACCURACY)

    def test_after_forward_is_that_of_all_batches(self):
        metric = LogME("multiclass", 8, num_classes=4)
        for features, target in zip(FEATURES.chunk(4), TARGET.chunk(4), strict=True):
            metric(features, target)
        assert metric.accuracy().value == pytest.approx(ACCURACY)
        assert metric.accuracy().num_samples == 200

    @pytest.mark.parametrize(
        "copied",
        [
            lambda m: m.clone(),
            copy.deepcopy,
            lambda m: pickle.loads(pickle.dumps(m)),
            lambda m: m.half().to("cpu", torch.bfloat16),
            lambda m: torch.nn.ModuleList([m]).double()[0],
        ],
    )
    def test_survives_copies_and_casts(self, copied):
        metric = LogME("multiclass", 8, num_classes=4)
        for features, target in zip(FEATURES.split(5), TARGET.split(5), strict=True):
            metric.update(features, target)
            metric = copied(metric)
        assert metric.accuracy().value == pytest.approx(ACCURACY)
        assert metric.subset_features[0].dtype == torch.float32
        assert metric.subset_index[0].dtype == torch.int64

    @pytest.mark.parametrize("number", [3, 200])
    def test_indices_stay_on_the_cpu(self, number):
        """Otherwise, updates would wait for the device."""
        metric = LogME("multiclass", 8, num_classes=4)
        metric.update(FEATURES[:number], TARGET[:number])
        metric.to("meta")
        rows, index = metric.held_features + metric.subset_features, metric.held_index + metric.subset_index
        assert [each.device.type for each in rows + index + metric.num_seen] == ["meta", "cpu", "cpu"]

    @pytest.mark.parametrize("number", [3, 120, 200])
    def test_states_can_be_saved_and_loaded(self, number):
        saved, other = persistent(), persistent()
        saved.update(FEATURES[:number], TARGET[:number])
        other.update(FEATURES[:50], TARGET[:50])
        other.accuracy()  # This accuracy must not stay in the cache.
        other.load_state_dict(saved.state_dict())
        assert other.accuracy().num_samples == number
        other.update(FEATURES[number:], TARGET[number:])
        assert other.accuracy().value == pytest.approx(ACCURACY)
        assert other.accuracy().num_samples == 200

    @pytest.mark.parametrize("as_dict", [False, True])
    @pytest.mark.parametrize("parts", [(3, 197), (120, 80), (197, 3)])
    def test_of_merged_states_is_that_of_all_samples(self, parts, as_dict):
        metrics = [LogME("multiclass", 8, num_classes=4) for _ in parts]
        for metric, features, target in zip(metrics, FEATURES.split(parts), TARGET.split(parts), strict=True):
            metric.update(features, target)
        metrics[0].accuracy()
        metrics[0].merge_state(metrics[1].metric_state if as_dict else metrics[1])
        assert metrics[0].accuracy().value == pytest.approx(ACCURACY)
        assert metrics[0].accuracy().num_samples == 200
        assert len(torch.cat([*metrics[0].subset_index, *metrics[0].held_index]).unique()) == 200
        metrics[0].update(FEATURES, TARGET)
        assert metrics[0].accuracy().num_samples == 400

    def test_of_large_merged_states_is_measured_on_samples_of_both(self):
        features, target = map(torch.as_tensor, problem(20_000, 8, 4, noise=3.0))
        metrics = [LogME("multiclass", 8, num_classes=4) for _ in range(2)]
        for metric, rows, labels in zip(metrics, features.split(10_000), target.split(10_000), strict=True):
            metric.update(rows, labels)
        own = metrics[0].subset_features[0].clone()
        metrics[0].merge_state(metrics[1])
        found, kept = metrics[0].accuracy(), metrics[0].subset_features[0]
        assert found.num_samples == 2048
        share = (kept[:, None] == own[None]).all(2).any(1).double().mean()
        assert 0.4 < float(share) < 0.6
        assert found.value == pytest.approx(accuracy_of(features, target), abs=4 * found.stderr)

    @pytest.mark.parametrize("number", [0, 3000])
    def test_a_merged_metric_stays_as_it_was(self, number):
        features, target = map(torch.as_tensor, problem(9_000, 8, 4, noise=3.0))
        metrics = [LogME("multiclass", 8, num_classes=4) for _ in range(2)]
        for metric, rows, labels in zip(metrics, features.split(6_000), target.split(6_000), strict=True):
            metric.update(rows[:3000], labels[:3000])
        first = metrics[0] if number else LogME("multiclass", 8, num_classes=4)
        kept = metrics[1].subset_features[0].clone(), metrics[1].subset_target[0].clone()
        first.merge_state(metrics[1])
        first.update(features[3000:6000], target[3000:6000])
        assert first.accuracy().num_samples == 2048
        assert torch.equal(metrics[1].subset_features[0], kept[0])
        assert torch.equal(metrics[1].subset_target[0], kept[1])

    def test_members_of_a_collection_share_rows(self):
        collection = MetricCollection(
            {
                name: LogME("multiclass", 8, num_classes=4, fit_intercept=name == "centred")
                for name in ("plain", "centred")
            }
        )
        for features, target in zip(FEATURES.chunk(4), TARGET.chunk(4), strict=True):
            collection.update(features, target)
        collection.compute()
        assert len(collection.compute_groups) == 1
        for name, metric in collection.items():
            expected = accuracy_of(FEATURES, TARGET, fit_intercept=name == "centred")
            assert metric.accuracy().value == pytest.approx(expected)
        collection.update(FEATURES[:50], TARGET[:50])
        assert [metric.accuracy().num_samples for _, metric in collection.items()] == [250, 250]

    def test_updates_in_inference_mode_and_in_training_can_be_mixed(self):
        metric = LogME("multiclass", 8, num_classes=4)
        for at in torch.arange(200).split(40):
            with torch.inference_mode(int(at[0]) in (0, 120)):
                metric.update(FEATURES[at], TARGET[at])
        with torch.inference_mode():
            assert metric.accuracy().value == pytest.approx(ACCURACY)
        metric.update(FEATURES, TARGET)
        assert metric.accuracy().num_samples == 400

    def test_nan_in_the_features_is_nan_with_one_warning(self):
        metric, broken = LogME("multiclass", 8, num_classes=4), FEATURES.clone()
        broken[7, 3] = math.nan
        metric.update(broken, TARGET)
        with pytest.warns(UserWarning, match="features contain NaN or Inf") as caught:
            assert math.isnan(metric.accuracy().value)
            assert math.isnan(metric.accuracy().stderr)
            assert math.isnan(metric.compute())
        assert len(caught) == 1

    def test_without_updates_is_nan_with_a_warning(self):
        with pytest.warns(UserWarning, match="no samples"):
            assert math.isnan(LogME("regression", 8).accuracy().value)


def test_states_of_version_0_1_can_be_loaded():
    full = filled()
    full.persistent(True)
    names = ("count", "gram", "cross", "feature_sum", "target_sum", "target_square")
    state = {name: full.state_dict()[name] for name in names}
    metric = LogME("multiclass", 8, num_classes=4)
    metric.persistent(True)
    metric.update(FEATURES[:3], TARGET[:3])
    metric.load_state_dict(state)
    assert math.isnan(metric.accuracy().value)  # Version 0.1 kept no rows.
    metric.update(FEATURES[:50], TARGET[:50])
    assert metric.evidence().num_samples == 250
    assert metric.accuracy().num_samples == 50
    other = filled()
    other.merge_state(state)
    assert other.evidence().num_samples == 400


def test_normalize_scales_every_sample_to_length_one():
    metric = LogME("multiclass", 8, num_classes=4, normalize=True)
    scales = torch.rand(200, 1) * 100
    metric.update(FEATURES * scales, TARGET)
    expected = logme(torch.nn.functional.normalize(FEATURES.double(), dim=1), TARGET)
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)
    assert float(logme(FEATURES * scales, TARGET, normalize=True)) == pytest.approx(float(expected), rel=1e-5)


def test_compute_without_updates_is_nan_with_a_warning():
    metric = LogME("multiclass", 8, num_classes=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert math.isnan(metric.compute())
    assert any("no samples" in str(warning.message) for warning in caught)


def test_metric_can_be_plotted():
    pytest.importorskip("matplotlib")
    metric = filled()
    figure, _ = metric.plot()
    assert figure is not None
    values = [metric.compute(), metric.compute() + 1]
    assert len(metric.plot(values)[1].lines) >= 1


def test_arguments_can_be_passed_by_name():
    metric = LogME(task="multiclass", num_features=8, num_classes=4)
    metric.update(features=FEATURES, target=TARGET)
    assert float(metric.compute()) == pytest.approx(EXPECTED, rel=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This property will be removed")  # of torchmetrics
def test_module_that_holds_a_metric_can_be_scripted():
    """As with metrics of torchmetrics, the forward method is compiled, and the metric is left out."""

    class Holder(torch.nn.Linear):
        def __init__(self):
            super().__init__(8, 4)
            self.metric = LogME("multiclass", num_features=8, num_classes=4)

    module, x = Holder(), torch.randn(20, 8)
    module.metric(x, torch.arange(20) % 4)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))
    torch.jit.script(module.metric)
