"""Runs in several processes, started in the way a user's script starts them.

`python tests/launched.py SCENARIOS OUT START WORLD` runs scenarios (comma-separated names of functions below) one after
the other. Each process writes what it reports to OUT/<scenario>/<rank>.json.
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
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from models import CLASSES, Classifier, loader, mlp, penultimate, trainer, vectors
from torch.utils.data import DataLoader, TensorDataset
from witness import CallsHeadTwice, Quiet, Witness

from lightning_logme import LogMECallback, Probe, read_history
from lightning_logme.functional import evidence


def write(out: Path, rank: int, report: Any) -> None:
    (out / f"{rank}.json").write_text(json.dumps(report))


class WritingWitness(Witness):
    """A Witness that writes its reports to files, because a process that the Trainer spawns cannot return them."""

    def __init__(self, out: Path, *args: Any) -> None:
        super().__init__(*args)
        self.out = out

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            write(self.out, trainer.global_rank, self.reports)


def run(callback: LogMECallback, out: Path, start: str, world: int, *others: pl.Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"devices": world, "max_epochs": 1, "precision": "64-true", "num_sanity_val_steps": 1}
    options = {**defaults, "strategy": DDPStrategy(start_method=start), **options}
    return trainer(out, callback, *others, **options)


def exact(out: Path, start: str, world: int) -> None:
    """Run with padding, fewer samples than processes, several loaders, layers and accumulated gradients."""
    datasets = [vectors(number, seed=number) for number in (11, 2, 30)]
    callback = LogMECallback(layers=["model.0"])
    done = run(callback, out, start, world, WritingWitness(out, callback, datasets), accumulate_grad_batches=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LogME is NaN: only one class")
        done.fit(Quiet(), loader(vectors(40)), [loader(data, batch_size=3) for data in datasets])


def probes_at_checkpoints(out: Path, start: str, world: int) -> dict[str, Any]:
    """Run probes while a checkpoint is saved. Their results are in that checkpoint."""
    data = vectors(21, seed=3)
    probe = Probe(loader(data, batch_size=4), num_classes=CLASSES)
    callback = LogMECallback(probes={"others": probe}, probe_every="checkpoint")
    saving = ModelCheckpoint(out, "saved")
    run(callback, out, start, world, saving).fit(Quiet(), loader(vectors(40)), loader())
    checkpoint = torch.load(out / "saved.ckpt", weights_only=True)
    module = Classifier().double()
    module.load_state_dict(checkpoint["state_dict"])
    inputs, labels = data.tensors
    features = penultimate(module, "model.2", TensorDataset(inputs.double(), labels))
    return {
        "history": callback.history,
        "saved": read_history(out / "saved.ckpt"),
        "global_step": checkpoint["global_step"],
        "expected": float(evidence(*features, num_classes=CLASSES).score),
    }


class Sharded(Quiet):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for part in (self.model[0], self.model[2], self.model):
            fully_shard(part, mesh=mesh)


def doubles(number: int) -> TensorDataset:
    """Return data in double precision, because Lightning has no option for it under this strategy."""
    x, y = vectors(number).tensors
    return TensorDataset(x.double(), y)


class Unsharded(pl.Callback):
    """Record the score of the unsharded weights, and the history in a sharded checkpoint."""

    def __init__(self) -> None:
        self.report: dict[str, Any] = {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = Classifier().double()
        module.load_state_dict({name: value.full_tensor() for name, value in pl_module.state_dict().items()})
        path = Path(trainer.default_root_dir) / "saved.ckpt"
        trainer.save_checkpoint(path)
        self.report = {
            "expected": float(evidence(*penultimate(module, "model.2", doubles(23))).score),
            "is_sharded": path.is_dir(),
            "saved": read_history(path),
        }


def fsdp2(out: Path, start: str, world: int) -> dict[str, Any]:
    shards = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, process_group_backend="gloo")
    callback, unsharded = LogMECallback(layers=["model.0"]), Unsharded()
    done = run(callback, out, start, world, unsharded, strategy=shards, precision="32-true")
    done.fit(Sharded(mlp().double()), loader(doubles(40)), loader(doubles(23), batch_size=4))
    return {**unsharded.report, "history": callback.history}


class Split(Quiet):
    def configure_model(self) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.model, self.device_mesh["tensor_parallel"], plan)


def tensor_parallel(out: Path, start: str, world: int) -> None:
    split = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=world, process_group_backend="gloo")
    callback = LogMECallback()
    witness = WritingWitness(out, callback)
    run(callback, out, start, world, witness, strategy=split, precision="32-true").validate(
        Split(), loader(), verbose=False
    )


class FailsInProcess1(Quiet):
    """Process 1 raises an exception, or is killed, while the others go on."""

    is_killed = False

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.global_rank == 1 and batch_idx == 1:
            if self.is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a mistake of the user's own")
        self(batch[0])


def one_process_raises(out: Path, start: str, world: int) -> None:
    run(LogMECallback(), out, start, world).fit(FailsInProcess1(), loader(vectors(40)), loader(batch_size=10))


def one_process_is_killed(out: Path, start: str, world: int) -> None:
    module = FailsInProcess1()
    module.is_killed = True
    run(LogMECallback(), out, start, world).fit(module, loader(vectors(40)), loader(batch_size=10))


def first_batch_fails(out: Path, start: str, world: int) -> None:
    run(LogMECallback(), out, start, world).fit(CallsHeadTwice(), loader(vectors(40)), loader(batch_size=10))


class EmptyLoader(pl.LightningDataModule):
    """The validation loader has length 0 in every process but the first."""

    def __init__(self, allow: bool) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = allow

    def train_dataloader(self) -> DataLoader:
        return loader(vectors(40))

    def val_dataloader(self) -> DataLoader:
        return loader(vectors(12) if self.trainer.global_rank == 0 else TensorDataset(torch.empty(0, 16)))


def empty_loader(out: Path, start: str, world: int) -> None:
    done = run(LogMECallback(), out, start, world, use_distributed_sampler=False)
    done.fit(Quiet(), datamodule=EmptyLoader(allow=False))


def empty_loader_allowed(out: Path, start: str, world: int) -> None:
    callback = LogMECallback()
    done = run(callback, out, start, world, WritingWitness(out, callback), use_distributed_sampler=False)
    done.fit(Quiet(), datamodule=EmptyLoader(allow=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenarios, folder, start_method, number = sys.argv[1:]
    for scenario in scenarios.split(","):
        torch.manual_seed(0)
        out = Path(folder) / scenario
        out.mkdir(exist_ok=True)
        report = globals()[scenario](out, start_method, int(number))
        if report is not None:
            write(out, dist.get_rank(), report)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
