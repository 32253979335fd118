"""Two real processes give what one gives."""

import math
import multiprocessing

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from launched import Checked, Quiet
from lightning.pytorch.strategies import DDPStrategy
from models import CLASSES, loader, penultimate, trainer, vectors
from oracles import problem
from spawned import spawn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from torchmetrics import MetricCollection

from lightning_logme import Evidence, LogME, LogMECallback, Probe
from lightning_logme.features.padding import rows_without_padding
from lightning_logme.features.sampling import Samples
from lightning_logme.functional import evidence
from lightning_logme.scores.moments import Moments, Rows

# Imported before tests fork: see spawned.py.
multiprocessing.set_forkserver_preload(["torch", "lightning.pytorch", "lightning_logme", "models", "launched"])


def _sync_of_uneven_shards(rank, world, empty_rank):
    features, labels = map(torch.as_tensor, problem(101, 6, 4))
    metric = LogME("multiclass", 6, num_classes=4)
    full = [other for other in range(world) if other != empty_rank]
    mine = slice(full.index(rank), None, len(full)) if rank in full else slice(0, 0)
    metric.update(features[mine], labels[mine])
    expected = evidence(features, labels)
    for _ in range(2):
        torch.testing.assert_close(metric.compute(), expected.score, rtol=1e-10, atol=0)
        assert metric.evidence().num_samples == 101
        torch.testing.assert_close(metric.evidence().weight, expected.weight)
    assert int(metric.count) == len(features[mine])  # own sums are back after the sync
    metric.update(features[:10], labels[:10])
    assert metric.evidence().num_samples == 101 + 10 * world


@pytest.mark.parametrize(("empty_rank", "world"), [(None, 2), (0, 2), (1, 3)])
def test_metric(empty_rank, world):
    spawn(_sync_of_uneven_shards, empty_rank, world=world)


def _fewer_samples_than_processes(rank, world):
    features, labels = map(torch.as_tensor, problem(2, 6, 2))
    metric = LogME("multiclass", 6, num_classes=2)
    metric.update(features[rank : rank + 1], labels[rank : rank + 1])
    torch.testing.assert_close(metric.compute(), evidence(features, labels).score, rtol=1e-10, atol=0)


def test_metric_of_fewer_samples_than_processes():
    spawn(_fewer_samples_than_processes, world=3)


def _gathers_nothing(rank, world):
    """Gathering takes as many matrices as there are processes, in each of them."""

    def refused(*args, **kwargs):
        raise AssertionError("a state was gathered")

    dist.all_gather = refused
    features, labels = map(torch.as_tensor, problem(50, 6, 4))
    plain, centred = LogME("multiclass", 6, num_classes=4), LogME("multiclass", 6, num_classes=4, fit_intercept=True)
    collection = MetricCollection({"plain": plain, "centred": centred})  # of one group, which shares its states
    for part in (slice(rank, 25, world), slice(25 + rank, 50, world)):
        collection.update(features[part], labels[part])
        values = collection.compute()
    assert len(collection.compute_groups) == 1
    torch.testing.assert_close(values["plain"], evidence(features, labels).score, rtol=1e-10, atol=0)
    expected = evidence(features, labels, fit_intercept=True)
    torch.testing.assert_close(values["centred"], expected.score, rtol=1e-10, atol=0)
    on_step = LogME("multiclass", 6, num_classes=4, dist_sync_on_step=True)
    score = on_step(features[rank::world], labels[rank::world])
    torch.testing.assert_close(score, values["plain"], rtol=1e-10, atol=0)


def test_sums_are_reduced_and_never_gathered():
    spawn(_gathers_nothing)


def _after_inference_mode(rank, world):
    features, labels = map(torch.as_tensor, problem(50, 6, 4))
    with torch.inference_mode():
        sums = Moments.zeros(6, 4).accumulate(Rows(features[rank::world], labels[rank::world]))
    evidences = Evidence.from_moments(sums.all_reduce(), "multiclass")
    torch.testing.assert_close(evidences.score, evidence(features, labels).score, rtol=1e-10, atol=0)


def test_sums_made_in_inference_mode():
    spawn(_after_inference_mode)


def fit(path, module, datasets, train, val=None, layers=(), **options):
    callback = LogMECallback(layers=layers)
    checked = Checked(callback, datasets)
    defaults = {"devices": 2, "strategy": DDPStrategy(start_method="forkserver"), "max_epochs": 1}
    run = trainer(path, callback, checked, **{**defaults, "precision": "64-true", **options})
    run.fit(module, train, val)
    assert "logme" in " ".join(run.callback_metrics)  # what was logged comes back from the processes


@pytest.mark.parametrize("number", [11, 16])
def test_callback_counts_no_padding(tmp_path, number):
    data = vectors(number)
    fit(tmp_path, Quiet(), [data], loader(vectors(40)), loader(data, batch_size=3), layers=["model.0"])


def test_callback_with_several_loaders(tmp_path):
    datasets = [vectors(number, seed=number) for number in (9, 5, 8)]
    fit(tmp_path, Quiet(), datasets, loader(vectors(40)), [loader(data, batch_size=3) for data in datasets])


class FirstRankOnly(IterableDataset):
    def __iter__(self):
        return iter(vectors(12) if dist.get_rank() == 0 else ())


def test_a_rank_without_data(tmp_path):
    fit(
        tmp_path,
        Quiet(),
        [vectors(12)],
        loader(vectors(40)),
        DataLoader(FirstRankOnly(), batch_size=5),
        layers=["model.0"],
        num_sanity_val_steps=0,
    )


class Failing(Quiet):
    """Calls its head twice in the last batch of one process."""

    def validation_step(self, batch, batch_idx):
        self(batch[0])
        if batch_idx == 1 and self.global_rank == 1:
            self(batch[0])


class AllNaN(pl.Callback):
    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            assert math.isnan(trainer.callback_metrics["logme"])


@pytest.mark.filterwarnings("ignore:logme is NaN for this validation")
@pytest.mark.filterwarnings("ignore:LogME is NaN for these samples, after an error. .* .process 1.")
def test_what_breaks_on_one_rank_is_nan_on_all_and_ends_nothing(tmp_path):
    run = trainer(
        tmp_path,
        LogMECallback(),
        AllNaN(),
        devices=2,
        strategy=DDPStrategy(start_method="forkserver"),
        num_sanity_val_steps=1,
    )
    run.fit(Failing(), loader(vectors(40)), loader(vectors(40), batch_size=10))
    assert math.isnan(run.callback_metrics["logme"])


def fit_to_the_end(path, module, callback=None, val=None, **options):
    """In two processes; whatever happens in one of them must not end the run."""
    callback = callback or LogMECallback()
    defaults = {"devices": 2, "strategy": DDPStrategy(start_method="forkserver"), "max_epochs": 1}
    run = trainer(path, callback, AllNaN(), **{**defaults, **options})
    run.fit(module, loader(vectors(40)), val or loader(vectors(40), batch_size=10))
    return run


class NaNOnOneRank(Quiet):
    def validation_step(self, batch, batch_idx):
        self(batch[0] * (math.nan if batch_idx == 1 and self.global_rank == 1 else 1.0))


class OneRankSkipsABatch(Quiet):
    def validation_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_rank == 1:
            return
        self(batch[0])


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:LogME is NaN|logme is NaN")
@pytest.mark.parametrize("module", [NaNOnOneRank, OneRankSkipsABatch])
def test_what_one_rank_spoils_is_nan_on_all_and_ends_nothing(tmp_path, module):
    run = fit_to_the_end(tmp_path, module())
    assert math.isnan(run.callback_metrics["logme"])


class Uneven(IterableDataset):
    """The last batch of one process is missing in the other."""

    def __iter__(self):
        return iter([vectors(30)[index] for index in (range(20) if dist.get_rank() == 0 else range(20, 30))])


@pytest.mark.timeout(120)
def test_a_rank_with_fewer_batches(tmp_path):
    data = DataLoader(Uneven(), batch_size=5)
    fit(tmp_path, Quiet(), [vectors(30)], loader(vectors(40)), data, num_sanity_val_steps=0)


class FailsInTheEnd(LogMECallback):
    """One process runs out of memory when the first points of a curve are turned into evidence."""

    def on_validation_epoch_end(self, trainer, pl_module):
        whole = Evidence.from_moments

        def fails(moments, *args):
            if trainer.global_rank == 1:
                raise MemoryError("on purpose")
            return whole(moments, *args)

        Evidence.from_moments = fails
        try:
            super().on_validation_epoch_end(trainer, pl_module)
        finally:
            Evidence.from_moments = whole


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:LogME is NaN, after an error")
def test_a_rank_that_fails_when_the_sums_are_there_keeps_nobody_waiting(tmp_path):
    run = fit_to_the_end(tmp_path, Quiet(), FailsInTheEnd(curve=True, layers=["model.0"]))
    assert math.isnan(run.callback_metrics["logme"])


class NoLabelsOnOneRank:
    """Batches whose labels are missing in one process."""

    def __iter__(self):
        x, y = vectors(20).tensors
        yield (x, y) if dist.get_rank() == 0 else (x,)


@pytest.mark.timeout(120)
def test_a_probe_without_labels_on_one_rank_is_an_error_on_all(tmp_path):
    probes = {"news": Probe(NoLabelsOnOneRank(), num_classes=CLASSES)}
    with pytest.raises(mp.ProcessRaisedException, match=r"probes\['news'\]: no labels found .*process 1"):
        fit_with_probes(tmp_path, probes)


class Unused(Quiet):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(3))


def test_unused_parameters(tmp_path):
    strategy = DDPStrategy(start_method="forkserver", find_unused_parameters=True)
    fit(tmp_path, Unused(), [vectors(11)], loader(vectors(40)), loader(vectors(11), 3), strategy=strategy)


def _runs_of_their_own(rank, world, path):
    """As in a search of hyperparameters, whose processes know each other and train for themselves."""
    if rank == 0:
        callback = LogMECallback(probes={"news": loader(vectors(40))}, curve=True)
        run = trainer(path, callback, max_epochs=1, num_sanity_val_steps=1)
        run.fit(Quiet(), loader(vectors(40)), loader(vectors(40)))
        assert [row["num_samples"] for row in callback.history] == [40, 40]


@pytest.mark.timeout(120)
def test_a_run_of_one_process_waits_for_no_other(tmp_path):
    spawn(_runs_of_their_own, tmp_path)


class ProbesOfOneProcess(pl.Callback):
    """Compares in each process, where the callback's curves are, with a run that is not distributed."""

    def __init__(self, callback, datasets):
        self.callback, self.datasets = callback, datasets

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        for name, data in self.datasets.items():
            portions = list(Samples(loader(data, 9), "multiclass", None, 0).portions(0, None))
            tensors = torch.cat([p.batch[0] for p in portions]), torch.cat([p.target for p in portions])
            features, labels = penultimate(pl_module, "model.2", TensorDataset(*tensors))
            curve = self.callback.curves[name]
            assert curve[-1].num_samples == len(data)
            for point in curve:
                number = point.num_samples
                expected = evidence(features[:number], labels[:number], num_classes=CLASSES)
                assert point.logme == pytest.approx(float(expected.score), rel=1e-9)
            assert float(trainer.callback_metrics[name]) == pytest.approx(curve[-1].logme, rel=1e-6)


def fit_with_probes(path, probes, checked=(), module=None, **options):
    callback = LogMECallback(probes=probes, curve=True, validation=False)
    run = trainer(
        path,
        callback,
        ProbesOfOneProcess(callback, dict(checked)),
        devices=2,
        strategy=DDPStrategy(start_method="forkserver"),
        max_epochs=1,
        precision="64-true",
        **options,
    )
    run.fit(module or Quiet(), loader(vectors(40)), loader(vectors(40)))
    return run


def test_probes_are_shared_out(tmp_path):
    large, small = vectors(150, seed=1), vectors(7, seed=2)  # the small one is one batch: a process has none of it
    probes = {"large": loader(large, 9), "small": loader(small, 9)}
    fit_with_probes(tmp_path, probes, {"logme/large": large, "logme/small": small})


class FailingProbe(Quiet):
    def forward(self, x):
        if len(x) == 9 and not self.trainer.sanity_checking and self.global_rank == 1:
            raise RuntimeError("on purpose")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:logme/broken is NaN")
def test_a_probe_that_breaks_on_one_rank_is_nan_on_all(tmp_path):
    probes = {"broken": loader(vectors(60), 9), "whole": loader(vectors(60), 10)}
    run = fit_with_probes(tmp_path, probes, module=FailingProbe())
    assert math.isnan(run.callback_metrics["logme/broken"])
    assert math.isfinite(run.callback_metrics["logme/whole"])


class FailingAtOnce(Quiet):
    """Calls its head twice in every batch of one process, the first one too."""

    def validation_step(self, batch, batch_idx):
        self(batch[0])
        if self.global_rank == 1:
            self(batch[0])


class OnlyProbes(pl.Callback):
    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            assert "logme" not in trainer.callback_metrics
            assert math.isfinite(trainer.callback_metrics["logme/news"])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("sanity", [0, 1])
def test_first_batch_that_cannot_be_scored_on_one_rank_is_an_error_on_all(tmp_path, sanity):
    options = {"devices": 2, "num_sanity_val_steps": sanity}
    callback = LogMECallback(probes={"news": loader(vectors(60), 9)})
    run = trainer(tmp_path, callback, strategy=DDPStrategy(start_method="forkserver"), **options)
    message = "the head 'model.2' was called 2 times for one batch, .* .process 1."
    with pytest.raises(mp.ProcessRaisedException, match=message):
        run.fit(FailingAtOnce(), loader(vectors(40)), loader(vectors(40), 10))
    callback = LogMECallback(probes={"news": loader(vectors(60), 9)}, validation=False)
    run = trainer(tmp_path, callback, OnlyProbes(), strategy=DDPStrategy(start_method="forkserver"), **options)
    run.fit(FailingAtOnce(), loader(vectors(40)), loader(vectors(40), 10))
    assert math.isfinite(run.callback_metrics["logme/news"])


class CurveOfOneProcess(pl.Callback):
    def __init__(self, callback, data):
        self.callback, self.data = callback, data

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        features, labels = penultimate(pl_module, "model.2", self.data)
        assert [point.num_samples for point in self.callback.curves["logme"]] == [32, 64, 75]
        for point in self.callback.curves["logme"]:
            expected = evidence(features[: point.num_samples], labels[: point.num_samples], num_classes=CLASSES)
            assert point.logme == pytest.approx(float(expected.score), rel=1e-9)


def test_curve_of_the_validation_set(tmp_path):
    data, callback = vectors(75), LogMECallback(curve=True)
    strategy = DDPStrategy(start_method="forkserver")
    options = {"devices": 2, "strategy": strategy, "max_epochs": 1, "precision": "64-true"}
    run = trainer(tmp_path, callback, CurveOfOneProcess(callback, data), **options)
    run.fit(Quiet(), loader(vectors(40)), loader(data, 6))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("number", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_padding_rule(world, number, shuffle, batch_size):
    """Over all ranks each sample is kept exactly once."""
    kept = []
    for rank in range(world):
        sampler = DistributedSampler(range(number), world, rank, shuffle=shuffle)
        data = DataLoader(range(number), batch_size=batch_size, sampler=sampler)
        for index, batch in enumerate(data):
            kept += batch[: rows_without_padding(data, index, len(batch))].tolist()
    assert sorted(kept) == list(range(number))


def test_a_data_set_of_batches_has_whole_batches_of_padding():
    kept = []
    for rank in range(2):
        data = DataLoader(vectors(5), batch_size=None, sampler=DistributedSampler(range(5), 2, rank, shuffle=False))
        kept += [rows_without_padding(data, index, 7) for index in range(3)]
    assert kept == [7, 7, 7, 7, 7, 0]


class Blocks(DistributedSampler):
    """The first process has the first samples."""

    def __iter__(self):
        share = len(self)
        return iter([index % 11 for index in range(self.rank * share, (self.rank + 1) * share)])


class Twice(DistributedSampler):
    """Every sample comes two times."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.num_samples *= 2
        self.total_size *= 2


class Sorted(torch.utils.data.BatchSampler):
    """By length, for instance."""

    def __iter__(self):
        return iter(sorted(super().__iter__()))


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (DataLoader(range(11), sampler=Blocks(range(11), 2, 1), batch_size=3), 3),
        (DataLoader(range(11), sampler=Twice(range(11), 2, 1), batch_size=3), 3),
        (DataLoader(range(11), batch_sampler=Sorted(DistributedSampler(range(11), 2, 1), 3, False)), 3),
        (DataLoader(range(11), sampler=DistributedSampler(range(11), 2, 1), batch_size=3), 6),  # two crops a sample
        (DataLoader(range(11), sampler=DistributedSampler(range(11), 2, 1), batch_size=3), 2),  # one was dropped
    ],
)
def test_padding_of_other_orders_and_rows_is_not_guessed(data, number):
    assert rows_without_padding(data, 0, number) is None


class Crops(Quiet):
    """Two views of a sample, one after the other."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [tensor.repeat_interleave(2, 0) for tensor in batch]


class CropsCounted(pl.Callback):
    def __init__(self, callback):
        self.callback = callback

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            assert self.callback.history[-1]["num_samples"] == 2 * 12  # one sample comes twice


@pytest.mark.filterwarnings("ignore:logme. the rows of a batch are not the samples")
def test_two_rows_a_sample(tmp_path):
    callback = LogMECallback()
    run = trainer(
        tmp_path,
        callback,
        CropsCounted(callback),
        devices=2,
        strategy=DDPStrategy(start_method="forkserver"),
        max_epochs=1,
    )
    run.fit(Crops(), loader(vectors(40)), loader(vectors(11), 3))
    assert "logme" in run.callback_metrics


def test_other_samplers_have_no_padding():
    assert rows_without_padding(DataLoader(range(5), batch_size=2), 2, 2) == 2
    assert rows_without_padding(None, 0, 3) == 3
    sampler = DistributedSampler(range(5), 2, 1, drop_last=True)
    assert rows_without_padding(DataLoader(range(5), sampler=sampler), 0, 2) == 2
    batched = torch.utils.data.BatchSampler(DistributedSampler(range(5), 2, 1), 2, drop_last=False)
    assert rows_without_padding(DataLoader(range(5), batch_sampler=batched), 1, 1) == 0
