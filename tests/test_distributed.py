"""Two real processes give what one gives."""

import math
import multiprocessing
import os
import socket
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy
from models import CLASSES, Classifier, loader, penultimate, trainer, vectors
from oracles import problem
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lightning_logme import LogME, LogMECallback
from lightning_logme.distributed import rows_without_padding
from lightning_logme.functional import evidence
from lightning_logme.samples import Samples

# Processes are forked off a server that has imported everything and started no thread: a fork of this process could
# inherit a lock that nobody will release, and a spawned one takes seconds to import torch.
multiprocessing.set_forkserver_preload(["torch", "lightning.pytorch", "lightning_logme", "models"])


def spawn(function, *args, world=2):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(_process, (world, port, function, args), nprocs=world, start_method="forkserver")


def _process(rank, world, port, function, args):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        function(rank, world, *args)
        dist.barrier()  # nobody leaves while another still needs its store
    finally:
        dist.destroy_process_group()


def _sync_of_uneven_shards(rank, world, empty_rank):
    features, labels = map(torch.as_tensor, problem(101, 6, 4))
    metric = LogME("multiclass", 6, num_classes=4)
    mine = slice(rank, None, world) if empty_rank is None else slice(0, None) if rank != empty_rank else slice(0, 0)
    metric.update(features[mine], labels[mine])
    expected = evidence(features, labels)
    for _ in range(2):
        torch.testing.assert_close(metric.compute(), expected.score, rtol=1e-10, atol=0)
        assert metric.evidence().num_samples == 101
        torch.testing.assert_close(metric.evidence().weight, expected.weight)
    assert int(metric.count) == len(features[mine])  # own sums are back after the sync
    metric.update(features[:10], labels[:10])
    assert metric.evidence().num_samples == 101 + 10 * world


@pytest.mark.parametrize("empty_rank", [None, 0, 1])
def test_metric(empty_rank):
    spawn(_sync_of_uneven_shards, empty_rank)


class Quiet(Classifier):
    """Logs nothing itself, so that any warning of Lightning is about what the callback logs."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])


class Checked(pl.Callback):
    """Compares in each process, where the history of the callback is, with all the data in one."""

    def __init__(self, callback, datasets):
        self.callback, self.datasets = callback, datasets

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        assert len(self.callback.history) == len(self.datasets) * (1 + len(self.callback.layers))
        for index, data in enumerate(self.datasets):
            key = "logme" if len(self.datasets) == 1 else f"logme/dataloader_idx_{index}"
            expected = evidence(*penultimate(pl_module, "model.2", data), num_classes=CLASSES)
            row = next(row for row in self.callback.history if row["key"] == key)
            assert row["num_samples"] == len(data)
            assert row["logme"] == pytest.approx(float(expected.score), rel=1e-9)
            assert row["gain"] == pytest.approx(float(expected.gain), rel=1e-9)
            assert float(trainer.callback_metrics[key]) == pytest.approx(row["logme"], rel=1e-6)


def fit(path, module, datasets, train, val=None, layers=(), **options):
    callback = LogMECallback(layers=layers)
    checked = Checked(callback, datasets)
    run = trainer(
        path,
        callback,
        checked,
        devices=2,
        strategy=DDPStrategy(start_method="forkserver"),
        max_epochs=1,
        precision="64-true",
        **options,
    )
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


@pytest.mark.filterwarnings("ignore:logme of the validation set is left out")
@pytest.mark.parametrize("sanity", [0, 1])
def test_what_cannot_be_scored_on_one_rank_is_left_out_on_all(tmp_path, sanity):
    strategy = DDPStrategy(start_method="forkserver")
    callback = LogMECallback(probes={"news": loader(vectors(60), 9)})
    run = trainer(tmp_path, callback, OnlyProbes(), devices=2, strategy=strategy, num_sanity_val_steps=sanity)
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
        first = 0
        for batch in data:
            kept += batch[: rows_without_padding(data, first, len(batch))].tolist()
            first += len(batch)
    assert sorted(kept) == list(range(number))


def test_other_samplers_have_no_padding():
    assert rows_without_padding(DataLoader(range(5), batch_size=2), 4, 2) == 2
    assert rows_without_padding(None, 0, 3) == 3
    sampler = DistributedSampler(range(5), 2, 1, drop_last=True)
    assert rows_without_padding(DataLoader(range(5), sampler=sampler), 0, 2) == 2
    batched = torch.utils.data.BatchSampler(DistributedSampler(range(5), 2, 1), 2, drop_last=False)
    assert rows_without_padding(DataLoader(range(5), batch_sampler=batched), 2, 1) == 0
