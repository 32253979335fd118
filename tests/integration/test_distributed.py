"""Two or three real processes give the same results as one process."""

import math
import re
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from models import CLASSES, loader, penultimate, trainer, vectors
from oracles import problem
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MetricCollection
from witness import CallsHeadTwice, Quiet, Witness, check_equals_one_process

from lightning_logme import Evidence, LogME, LogMECallback, Probe
from lightning_logme.features.sampling import Samples
from lightning_logme.functional import evidence, logme
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.moments import Moments, Rows


def _metric_of_uneven_shards(rank, world, empty_rank):
    features, labels = map(torch.as_tensor, problem(101, 6, 4))
    metric = LogME("multiclass", 6, num_classes=4)
    full = [other for other in range(world) if other != empty_rank]
    mine = slice(full.index(rank), None, len(full)) if rank in full else slice(0, 0)
    metric.update(features[mine], labels[mine])
    computed = [(metric.compute(), metric.evidence().num_samples, metric.evidence().weight) for _ in range(2)]
    own = len(features[mine]), int(metric.count)
    metric.update(features[:10], labels[:10])
    return computed, own, metric.evidence().num_samples


@pytest.mark.parametrize(("empty_rank", "world"), [(None, 2), (0, 2), (1, 3)])
def test_metric_of_uneven_shards(processes, empty_rank, world):
    expected = evidence(*map(torch.as_tensor, problem(101, 6, 4)))
    reports = processes.run(_metric_of_uneven_shards, empty_rank, world=world)
    assert sum(number for _, (number, _), _ in reports) == 101
    for computed, (number, count), later in reports:
        for score, num_samples, weight in computed:
            torch.testing.assert_close(score, expected.score, rtol=1e-10, atol=0)
            assert num_samples == 101
            torch.testing.assert_close(weight, expected.weight)
        assert count == number  # after the sync, the metric has its own sums again
        assert later == 101 + 10 * world


def _metric_of_two_samples(rank, world):
    features, labels = map(torch.as_tensor, problem(2, 6, 2))
    metric = LogME("multiclass", 6, num_classes=2)
    metric.update(features[rank : rank + 1], labels[rank : rank + 1])
    return metric.compute()


def test_metric_of_fewer_samples_than_processes(processes):
    expected = evidence(*map(torch.as_tensor, problem(2, 6, 2))).score
    torch.testing.assert_close(processes.run(_metric_of_two_samples, world=3), [expected] * 3, rtol=1e-10, atol=0)


def _scores_without_gathering(rank, world):
    """Gathering would need a matrix for each process, in every process."""

    def refused(*args, **kwargs):
        raise AssertionError("a state was gathered")

    features, labels = map(torch.as_tensor, problem(50, 6, 4))
    plain, centred = LogME("multiclass", 6, num_classes=4), LogME("multiclass", 6, num_classes=4, fit_intercept=True)
    collection = MetricCollection({"plain": plain, "centred": centred})  # in one group, which shares its states
    on_step = LogME("multiclass", 6, num_classes=4, dist_sync_on_step=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", refused)
        for part in (slice(rank, 25, world), slice(25 + rank, 50, world)):
            collection.update(features[part], labels[part])
            values = collection.compute()
        values["on_step"] = on_step(features[rank::world], labels[rank::world])
    return values, len(collection.compute_groups)


def test_sums_are_reduced_and_never_gathered(processes):
    features, labels = map(torch.as_tensor, problem(50, 6, 4))
    expected = {name: evidence(features, labels, fit_intercept=name == "centred").score for name in NAMES}
    reports = processes.run(_scores_without_gathering)
    assert len(reports) == 2
    for values, groups in reports:
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=0)
        assert groups == 1


NAMES = ("plain", "centred", "on_step")


def _score_after_inference_mode(rank, world):
    features, labels = map(torch.as_tensor, problem(50, 6, 4))
    with torch.inference_mode():
        sums = Moments.zeros(6, 4).accumulate(Rows(features[rank::world], labels[rank::world]))
    return Evidence.from_moments(sums.all_reduce(), "multiclass").score


def test_sums_made_in_inference_mode_can_be_reduced(processes):
    expected = evidence(*map(torch.as_tensor, problem(50, 6, 4))).score
    torch.testing.assert_close(processes.run(_score_after_inference_mode), [expected] * 2, rtol=1e-10, atol=0)


def _fit(rank, world, *, path, module, val, logme=None, callback=LogMECallback, datasets=(), curves=None, **options):
    """Return the reports of a Witness, and all warnings."""
    callback = callback(**(logme or {}))
    witness = Witness(callback, datasets, curves)
    strategy = DDPStrategy(find_unused_parameters=options.pop("find_unused_parameters", False))
    defaults = {"devices": world, "strategy": strategy, "max_epochs": 1, "precision": "64-true"}
    run = trainer(path, callback, witness, **{**defaults, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, loader(vectors(40)), val)
    return witness.reports, [str(warning.message) for warning in caught]


def fit(processes, path, module, val, **options):
    """Return what :func:`_fit` returns in each of two processes."""
    return processes.run(partial(_fit, path=path, module=module, val=val, **options))


def _error(rank, world, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
        _fit(rank, world, **options)
    return str(caught.value)


def check_error_in_both(processes, message, **options):
    """Assert that a run ends with the same error in both processes."""
    first, second = processes.run(partial(_error, message=message, **options))
    assert re.match(message, first)
    assert first == second


def fit_and_compare(processes, path, module, val, datasets, num_samples=None, **options):
    """Compare a run in two processes with one process that has the whole data sets."""
    reports = [report for report, _ in fit(processes, path, module, val, datasets=datasets, **options)]
    check_equals_one_process(reports, num_samples or list(map(len, datasets)))


LAYERS = {"layers": ["model.0"]}


@pytest.mark.parametrize("number", [11, 16])
def test_callback_counts_no_padding(processes, tmp_path, number):
    data = vectors(number)
    fit_and_compare(processes, tmp_path, Quiet(), loader(data, batch_size=3), [data], [number] * 2, logme=LAYERS)


def test_callback_with_several_loaders(processes, tmp_path):
    datasets = [vectors(number, seed=number) for number in (9, 5, 8)]
    fit_and_compare(processes, tmp_path, Quiet(), [loader(data, batch_size=3) for data in datasets], datasets)


class OnlyInFirstProcess(IterableDataset):
    def __iter__(self):
        return iter(vectors(12) if dist.get_rank() == 0 else ())


def test_a_process_without_data(processes, tmp_path):
    val, options = DataLoader(OnlyInFirstProcess(), batch_size=5), {"num_sanity_val_steps": 0, "logme": LAYERS}
    fit_and_compare(processes, tmp_path, Quiet(), val, [vectors(12)], [12] * 2, **options)


class Uneven(IterableDataset):
    """The first process has twice as many samples as the second."""

    def __iter__(self):
        return iter([vectors(30)[index] for index in (range(20) if dist.get_rank() == 0 else range(20, 30))])


def test_a_process_with_fewer_batches(processes, tmp_path):
    val = DataLoader(Uneven(), batch_size=5)
    fit_and_compare(processes, tmp_path, Quiet(), val, [vectors(30)], num_sanity_val_steps=0)


class Unused(Quiet):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(3))


def test_unused_parameters(processes, tmp_path):
    data = vectors(11)
    fit_and_compare(processes, tmp_path, Unused(), loader(data, 3), [data], find_unused_parameters=True)


def test_metrics_come_back_from_processes_that_the_trainer_starts(tmp_path):
    module, data = Quiet(), vectors(11)
    strategy = DDPStrategy(start_method="forkserver")
    options = {"devices": 2, "strategy": strategy, "max_epochs": 1, "precision": "64-true"}
    run = trainer(tmp_path, LogMECallback(), **options)
    run.fit(module, loader(vectors(40)), loader(data, batch_size=3))
    expected = logme(*penultimate(module, "model.2", data), num_classes=CLASSES)
    assert float(run.callback_metrics["logme"]) == pytest.approx(float(expected), rel=1e-6)


class NaNInProcess1(Quiet):
    def validation_step(self, batch, batch_idx):
        self(batch[0] * (math.nan if batch_idx == 1 and self.global_rank == 1 else 1.0))


class SkipsBatchInProcess1(Quiet):
    def validation_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_rank == 1:
            return
        self(batch[0])


class OutOfMemoryInProcess1(LogMECallback):
    """Process 1 runs out of memory after the reduction of the sums, while the evidence is computed."""

    def on_validation_epoch_end(self, trainer, pl_module):
        whole = Accumulator.decomposed

        def fails(accumulator, *args):
            if trainer.global_rank == 1:
                raise MemoryError("on purpose")
            return whole(accumulator, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Accumulator, "decomposed", fails)
            super().on_validation_epoch_end(trainer, pl_module)


@pytest.mark.parametrize(
    ("module", "options", "warnings"),
    [
        (
            CallsHeadTwice([1]),
            {"num_sanity_val_steps": 1},
            (
                "LogME is NaN for these samples, after an error: .* was called 2 times for one batch, .* .process 1.",
                "logme is NaN for this validation, after an error in batch 1: .* was called 2 times for one batch",
            ),
        ),
        (NaNInProcess1(), {}, ("LogME is NaN: the features contain NaN or Inf",) * 2),
        (
            SkipsBatchInProcess1(),
            {},
            (
                "LogME is NaN for these samples, after an error: no scored module was called .* .process 1.",
                "logme is NaN for this validation, after an error in batch 1: no scored module was called in this",
            ),
        ),
        (
            Quiet(),
            {"callback": OutOfMemoryInProcess1, "logme": {"curve": True, **LAYERS}},
            (
                "LogME is NaN, after an error: MemoryError: on purpose .process 1.",
                "LogME is NaN, after an error: MemoryError: on purpose",
            ),
        ),
    ],
    ids=["head called twice", "NaN features", "batch skipped", "no memory for the evidence"],
)
def test_a_failure_in_one_process_is_nan_in_all_and_the_run_goes_on(processes, tmp_path, module, options, warnings):
    answers = fit(processes, tmp_path, module, loader(vectors(40), batch_size=10), **options)
    assert len(answers) == 2
    for ((report,), messages), warning in zip(answers, warnings, strict=True):
        assert math.isnan(report["metrics"]["logme"])
        assert math.isnan(report["history"][-1]["logme"])
        assert any(re.match(warning, message) for message in messages), messages


@pytest.mark.parametrize(("batches", "sanity"), [(None, 0), (None, 1), ([0], 0)])
def test_a_first_batch_that_cannot_be_scored_in_one_process_is_an_error_in_all(processes, tmp_path, batches, sanity):
    logme = {"probes": {"news": loader(vectors(60), 9)}}
    options = {"path": tmp_path, "module": CallsHeadTwice(batches), "val": loader(vectors(40), 10)}
    message = "the head 'model.2' was called 2 times for one batch, .* .process 1."
    check_error_in_both(processes, message, **options, logme=logme, num_sanity_val_steps=sanity)


@pytest.mark.parametrize("sanity", [0, 1])
def test_probes_alone_do_not_depend_on_head_calls_of_validation(processes, tmp_path, sanity):
    logme = {"probes": {"news": loader(vectors(60), 9)}, "validation": False}
    val = loader(vectors(40), 10)
    answers = fit(processes, tmp_path, CallsHeadTwice(), val, logme=logme, num_sanity_val_steps=sanity)
    assert len(answers) == 2
    for (report,), _ in answers:
        assert "logme" not in report["metrics"]
        assert math.isfinite(report["metrics"]["logme/news"])


class NoLabelsInProcess1:
    """Batches whose labels are missing in process 1."""

    def __iter__(self):
        x, y = vectors(20).tensors
        yield (x, y) if dist.get_rank() == 0 else (x,)


PROBES_ALONE = {"curve": True, "validation": False}


def test_a_probe_without_labels_in_one_process_is_an_error_in_all(processes, tmp_path):
    logme = {"probes": {"news": Probe(NoLabelsInProcess1(), num_classes=CLASSES)}, **PROBES_ALONE}
    options = {"path": tmp_path, "module": Quiet(), "val": loader(vectors(40))}
    check_error_in_both(processes, r"probes\['news'\]: no labels found .*process 1", **options, logme=logme)


def _history_of_a_run_alone(rank, world, path):
    """Run in one of two connected processes, as in a search of hyperparameters where each process trains separately."""
    callback = LogMECallback(probes={"news": loader(vectors(40))}, curve=True)
    if rank == 0:
        run = trainer(path, callback, max_epochs=1, num_sanity_val_steps=1)
        run.fit(Quiet(), loader(vectors(40)), loader(vectors(40)))
    return [row["num_samples"] for row in callback.history]


def test_a_run_of_one_process_waits_for_no_other(processes, tmp_path):
    assert processes.run(_history_of_a_run_alone, tmp_path) == [[40, 40], []]


def as_probes_take_them(data):
    """Return a data set in the order in which a probe takes its samples."""
    portions = list(Samples(loader(data, 9), "multiclass", None, 0).portions(0, None))
    return TensorDataset(torch.cat([p.batch[0] for p in portions]), torch.cat([p.target for p in portions]))


def test_the_batches_of_probes_are_divided_among_processes(processes, tmp_path):
    # The small data set is a single batch, so one process gets no batch.
    large, small = vectors(150, seed=1), vectors(7, seed=2)
    logme = {"probes": {"large": loader(large, 9), "small": loader(small, 9)}, **PROBES_ALONE}
    curves = {"logme/large": as_probes_take_them(large), "logme/small": as_probes_take_them(small)}
    answers = fit(processes, tmp_path, Quiet(), loader(vectors(40)), logme=logme, curves=curves)
    check_equals_one_process([reports for reports, _ in answers], [150, 7])
    for (report,), _ in answers:
        assert {key: curve[-1][0] for key, curve in report["curves"].items()} == {"logme/large": 150, "logme/small": 7}


def test_a_curve_of_the_validation_set(processes, tmp_path):
    data = vectors(75)
    answers = fit(processes, tmp_path, Quiet(), loader(data, 6), logme={"curve": True}, curves={"logme": data})
    check_equals_one_process([reports for reports, _ in answers], [75])
    for (report,), _ in answers:
        assert [number for number, _, _ in report["curves"]["logme"]] == [32, 64, 75]


class ProbeFailsInProcess1(Quiet):
    """Fails in batches of 9 samples, which only a probe has."""

    def forward(self, x):
        if len(x) == 9 and not self.trainer.sanity_checking and self.global_rank == 1:
            raise RuntimeError("on purpose")
        return super().forward(x)


def test_a_probe_that_fails_in_one_process_is_nan_in_all(processes, tmp_path):
    logme = {"probes": {"broken": loader(vectors(60), 9), "whole": loader(vectors(60), 10)}, **PROBES_ALONE}
    answers = fit(processes, tmp_path, ProbeFailsInProcess1(), loader(vectors(40)), logme=logme)
    assert len(answers) == 2
    for (report,), _ in answers:
        assert math.isnan(report["metrics"]["logme/broken"])
        assert math.isfinite(report["metrics"]["logme/whole"])
    message = "LogME is NaN for these samples, after an error: RuntimeError: on purpose (process 1)"
    assert message in answers[0][1]


class Crops(Quiet):
    """Two views of a sample, one after the other."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [tensor.repeat_interleave(2, 0) for tensor in batch]


def test_padding_is_counted_where_a_sample_has_two_rows(processes, tmp_path):
    answers = fit(processes, tmp_path, Crops(), loader(vectors(11), 3))
    assert len(answers) == 2
    for (report,), _ in answers:
        assert report["history"][-1]["num_samples"] == 2 * 12  # one of 11 samples comes twice
        assert "logme" in report["metrics"]
    assert any("logme: the rows of a batch do not match the samples" in message for message in answers[0][1])
