"""What processes must know of each other, and of the sampler that feeds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch.utils.data import BatchSampler, DistributedSampler

from lightning_logme.packages import LightningModule, Trainer

# Strategies that gather weights in every forward pass.
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")

T = TypeVar("T")


def gathered(alone: bool, mine: T) -> list[T]:
    """What each process has, by rank.

    Args:
        alone: whether the run has but one process, whatever others torch.distributed may know of.
        mine: of this process; must be picklable.
    """
    if alone:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def reason_of(error: Exception) -> str:
    """An error as part of a message: its kind matters where it is not one of ours."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def first_reason(reasons: Sequence[str | None]) -> str | None:
    """The first reason that a process has, by rank, and which process it is."""
    for rank, reason in enumerate(reasons):
        if reason is not None:
            return reason if len(reasons) == 1 else f"{reason} (process {rank})"
    return None


def is_sharded(trainer: Trainer) -> bool:
    """Whether the weights are spread over processes, which must then make as many forward passes as each other."""
    return trainer.world_size > 1 and is_one_of(trainer.strategy, _SHARDED)


def is_one_of(thing: object, names: tuple[str, ...]) -> bool:
    """By name, as `lightning` and `pytorch_lightning` have a class each, and not all versions have all."""
    return any(cls.__name__ in names for cls in type(thing).__mro__)


def why_out_of_step(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Why processes could wait for each other in vain, or would not know of each other, if so."""
    if trainer.world_size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return (
            f"the {trainer.world_size} processes of {type(trainer.strategy).__name__} are not connected by "
            "torch.distributed, so that their sums cannot be added up"
        )
    if _tensor_parallel(trainer) > 1:
        return (
            "under tensor parallelism a process holds parts of the features of samples that others see as well; save "
            "checkpoints, and score them afterwards with score_checkpoints"
        )
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return (
            "with a time for val_check_interval each process goes by its own clock, and one that validates earlier "
            "would wait for the others; give a number of batches"
        )
    allows = "allow_zero_length_dataloader_with_multiple_devices"
    if getattr(pl_module, allows, False) or getattr(getattr(trainer, "datamodule", None), allows, False):
        return (
            f"with {allows}=True a process whose loader has length 0 passes over the validation, and the others would "
            "wait for it; give each a batch, or a loader without a length"
        )
    return None


def _tensor_parallel(trainer: Trainer) -> int:
    """How many processes a layer may be split between."""
    mesh: Any = getattr(trainer.strategy, "device_mesh", None)
    split = "tensor_parallel" in (getattr(mesh, "mesh_dim_names", None) or ())
    return mesh["tensor_parallel"].size() if split else 1


def validation_loader(trainer: Trainer, index: int) -> Any:
    """The validation loader in use, as Lightning has prepared it; None where batches of several come at once."""
    combined = _combined_loader(trainer)
    return combined.flattened[index] if combined is not None and combined._mode == "sequential" else None


def number_of_loaders(trainer: Trainer) -> int:
    """How many validation loaders Lightning counts: one, where batches of several come at once."""
    combined = _combined_loader(trainer)
    return len(combined.flattened) if combined is not None and combined._mode == "sequential" else 1


def _combined_loader(trainer: Trainer) -> Any:
    # Trainer.val_dataloaders would go on to name those of fit during a later Trainer.validate.
    fitting = trainer.state.fn == "fit"
    loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    return loop._combined_loader


def rows_without_padding(loader: Any, batches: int, number: int) -> int | None:
    """How many rows of the next batch of this process are data; None where that cannot be told.

    ``DistributedSampler`` repeats samples until all processes have as many. Its i-th index for process r is the sample
    i · world + r of its list, whatever the order, and what is beyond the data set's length is repeated: always the last
    indices of a process. Samplers of other kinds may have an order of their own, and a ``collate_fn`` may make more or
    fewer rows than samples.

    Args:
        loader: the loader the rows come from.
        batches: that this process has had from it before.
        number: rows it gets now.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return number
    share = math.ceil(len(sampler.dataset) / sampler.num_replicas)  # type: ignore[arg-type]
    if not _deals_out_in_turn(sampler) or len(sampler) != share:
        return None
    own = math.ceil((len(sampler.dataset) - sampler.rank) / sampler.num_replicas)  # type: ignore[arg-type]
    if batch_sampler is None:  # each index gives a batch
        return number if batches < own else 0
    if type(batch_sampler) is not BatchSampler:
        return None
    first = batches * batch_sampler.batch_size
    if number != min(batch_sampler.batch_size, len(sampler) - first):
        return None
    return max(0, min(number, own - first))


def _deals_out_in_turn(sampler: DistributedSampler[Any]) -> bool:
    """Whether it is torch's, or Lightning's around another sampler, and no subclass with rules of its own."""
    for cls in type(sampler).__mro__:
        if cls is DistributedSampler or cls.__name__ == "DistributedSamplerWrapper":
            return True
        if {"__iter__", "__len__"} & vars(cls).keys():
            return False
    return False
