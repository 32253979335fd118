"""Runs in several real processes, as a user's script starts them: `python tests/launched.py SCENARIO OUT START WORLD`.

Each process leaves what it has seen in OUT/<rank>.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from models import CLASSES, Classifier, loader, mlp, penultimate, trainer, vectors
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import LogMECallback, Probe, read_history
from lightning_logme.functional import evidence


class Quiet(Classifier):
    """Logs nothing itself, so that any warning of Lightning is about what the callback logs."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


class Checked(pl.Callback):
    """Compares in each process, where the history of the callback is, with all the data in one."""

    def __init__(self, callback: LogMECallback, datasets: list[TensorDataset]) -> None:
        self.callback, self.datasets = callback, datasets

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        assert len(self.callback.history) >= len(self.datasets) * (1 + len(self.callback.layers))
        for index, data in enumerate(self.datasets):
            key = "logme" if len(self.datasets) == 1 else f"logme/dataloader_idx_{index}"
            expected = evidence(*penultimate(pl_module, "model.2", data), num_classes=CLASSES)
            row = next(row for row in reversed(self.callback.history) if row["key"] == key)
            assert row["num_samples"] == len(data)
            assert row["logme"] == pytest.approx(float(expected.score), rel=1e-10)
            assert row["gain"] == pytest.approx(float(expected.gain), rel=1e-10, abs=1e-12)
            assert float(trainer.callback_metrics[key]) == pytest.approx(row["logme"], rel=1e-6)


class Report(pl.Callback):
    """Writes down what a process has seen."""

    def __init__(self, callback: LogMECallback, out: Path) -> None:
        self.callback, self.out = callback, out

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            seen = {"history": self.callback.history, "metrics": metrics}
            (self.out / f"{trainer.global_rank}.json").write_text(json.dumps(seen))


def strategy(start: str, **options: Any) -> Any:
    return DDPStrategy(start_method=start, **options)


def run(callback: LogMECallback, out: Path, start: str, world: int, *others: pl.Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"devices": world, "max_epochs": 1, "precision": "64-true", "num_sanity_val_steps": 1}
    options = {**defaults, "strategy": strategy(start), **options}
    return trainer(out, callback, *others, Report(callback, out), **options)


def exact(out: Path, start: str, world: int) -> None:
    """Padding, fewer samples than processes, several loaders, layers, accumulated gradients."""
    datasets = [vectors(number, seed=number) for number in (11, 2, 30)]
    callback = LogMECallback(layers=["model.0"])
    done = run(callback, out, start, world, Checked(callback, datasets), accumulate_grad_batches=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LogME is NaN: only one class")
        done.fit(Quiet(), loader(vectors(40)), [loader(data, batch_size=3) for data in datasets])


def probes_at_checkpoints(out: Path, start: str, world: int) -> None:
    """Probes that run while a checkpoint is saved, and their results in that checkpoint."""
    data = vectors(21, seed=3)
    probe = Probe(loader(data, batch_size=4), num_classes=CLASSES)
    callback = LogMECallback(probes={"others": probe}, probe_every="checkpoint")
    saving = ModelCheckpoint(out, "saved")
    run(callback, out, start, world, saving).fit(Quiet(), loader(vectors(40)), loader())
    checkpoint = torch.load(out / "saved.ckpt", weights_only=True)
    module = Classifier().double()
    module.load_state_dict(checkpoint["state_dict"])
    inputs, labels = data.tensors
    doubled = TensorDataset(inputs.double(), labels)
    expected = evidence(*penultimate(module, "model.2", doubled), num_classes=CLASSES)
    row = callback.history[-1]
    assert (row["key"], row["num_samples"], row["global_step"]) == ("logme/others", 21, checkpoint["global_step"])
    assert row["logme"] == pytest.approx(float(expected.score), rel=1e-10)
    assert read_history(out / "saved.ckpt") == callback.history
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(callback.history))


class Sharded(Quiet):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for part in (self.model[0], self.model[2], self.model):
            fully_shard(part, mesh=mesh)


def doubles(number: int) -> TensorDataset:
    """Of double precision, which Lightning has no option for under this strategy."""
    x, y = vectors(number).tensors
    return TensorDataset(x.double(), y)


class Whole(pl.Callback):
    """Compares sharded runs with the weights put together: those of the checkpoint, and of the history within."""

    def __init__(self, callback: LogMECallback) -> None:
        self.callback = callback

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = Classifier().double()
        module.load_state_dict({name: value.full_tensor() for name, value in pl_module.state_dict().items()})
        expected = evidence(*penultimate(module, "model.2", doubles(23)))
        assert self.callback.history[-2]["num_samples"] == 23
        assert self.callback.history[-2]["logme"] == pytest.approx(float(expected.score), rel=1e-10)
        path = Path(trainer.default_root_dir) / "saved.ckpt"
        trainer.save_checkpoint(path)
        assert path.is_dir()
        assert read_history(path) == self.callback.history


def fsdp2(out: Path, start: str, world: int) -> None:
    shards = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, process_group_backend="gloo")
    callback = LogMECallback(layers=["model.0"])
    done = run(callback, out, start, world, Whole(callback), strategy=shards, precision="32-true")
    done.fit(Sharded(mlp().double()), loader(doubles(40)), loader(doubles(23), batch_size=4))


def tensor_parallel(out: Path, start: str, world: int) -> None:
    split = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=world, process_group_backend="gloo")
    done = run(LogMECallback(), out, start, world, strategy=split, precision="32-true")
    done.validate(Split(), loader(), verbose=False)


class Split(Quiet):
    def configure_model(self) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.model, self.device_mesh["tensor_parallel"], plan)


class RankFails(Quiet):
    """One process raises an exception of its own, or is killed, while the others go on."""

    how = "raises"

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.global_rank == 1 and batch_idx == 1:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a mistake of the user's own")
        self(batch[0])


def rank_raises(out: Path, start: str, world: int) -> None:
    run(LogMECallback(), out, start, world).fit(RankFails(), loader(vectors(40)), loader(batch_size=10))


def rank_killed(out: Path, start: str, world: int) -> None:
    module = RankFails()
    module.how = "killed"
    run(LogMECallback(), out, start, world).fit(module, loader(vectors(40)), loader(batch_size=10))


class FirstBatchFails(Quiet):
    """What the head gets in one process cannot be scored, from the very first batch."""

    failing = 1000  # batches

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])
        if self.global_rank == 1 and batch_idx < self.failing:
            self(batch[0])


def first_batch_fails(out: Path, start: str, world: int) -> None:
    run(LogMECallback(), out, start, world).fit(FirstBatchFails(), loader(vectors(40)), loader(batch_size=10))


def only_first_batch_fails(out: Path, start: str, world: int) -> None:
    module = FirstBatchFails()
    module.failing = 1
    done = run(LogMECallback(), out, start, world, num_sanity_val_steps=0)
    done.fit(module, loader(vectors(40)), loader(batch_size=10))


class EmptyRank(pl.LightningDataModule):
    """A loader of length 0 in one process."""

    def __init__(self, allow: bool) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = allow

    def train_dataloader(self) -> DataLoader:
        return loader(vectors(40))

    def val_dataloader(self) -> DataLoader:
        return loader(vectors(12) if self.trainer.global_rank == 0 else TensorDataset(torch.empty(0, 16)))


def empty_rank(out: Path, start: str, world: int) -> None:
    done = run(LogMECallback(), out, start, world, use_distributed_sampler=False)
    done.fit(Quiet(), datamodule=EmptyRank(allow=False))


def empty_rank_allowed(out: Path, start: str, world: int) -> None:
    done = run(LogMECallback(), out, start, world, use_distributed_sampler=False)
    done.fit(Quiet(), datamodule=EmptyRank(allow=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scenario, folder, start_method, number = sys.argv[1:]
    globals()[scenario](Path(folder), start_method, int(number))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
