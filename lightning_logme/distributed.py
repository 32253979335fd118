"""What processes must know of each other, and of the sampler that feeds them."""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DistributedSampler

Shapes = dict[tuple[str, int, int], tuple[int, int]]


def is_distributed() -> bool:
    """Whether there are processes to talk to."""
    return dist.is_available() and dist.is_initialized()


def agree(shapes: Shapes, broken: str | None) -> tuple[Shapes, str | None]:
    """The shapes that any process has met, and what broke in any of them; the same in all.

    Processes that sum tensors must have the same tensors to sum, in the same order: one may have seen no data, or have
    failed.

    Args:
        shapes: by source, loader and part of the curve, (num_features, num_outputs) met by this process.
        broken: what went wrong in this process, if anything.
    """
    if not is_distributed():
        return shapes, broken
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (shapes, broken))
    together: Shapes = {}
    reasons = []
    for rank, (theirs, reason) in enumerate(everyone):
        if reason is not None:
            reasons.append(f"{reason} (process {rank})")
        for key, shape in theirs.items():
            if together.setdefault(key, shape) != shape:
                reasons.append(
                    f"features or targets of lengths {shape} in process {rank}, and {together[key]} in another"
                )
    return together, next(iter(reasons), None)


def data_parallel(trainer: Trainer) -> tuple[int, int, Any]:
    """Place and number of the processes that samples are dealt out to, and their group; None stands for all.

    Where layers are split between processes (tensor parallelism), several of them see the same samples.
    """
    mesh = getattr(trainer.strategy, "device_mesh", None)
    if "data_parallel" not in (getattr(mesh, "mesh_dim_names", None) or ()):
        return trainer.global_rank, trainer.world_size, None
    mesh = mesh["data_parallel"]  # type: ignore[index]
    return mesh.get_local_rank(), mesh.size(), mesh.get_group()


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
    fitting = trainer.state.fn == TrainerFn.FITTING
    loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    return loop._combined_loader


def rows_without_padding(loader: Any, first: int, number: int) -> int:
    """How many of the next ``number`` rows of this process are data.

    ``DistributedSampler`` repeats samples until all processes have as many. Row i of rank r is sample i · world + r of
    its list, whatever the order, and what is beyond the data set's length is repeated: always the last rows of a
    process.

    Args:
        loader: the loader the rows come from.
        first: rows this process has had from it before.
        number: rows it gets now.
    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return number
    own = math.ceil((len(sampler.dataset) - sampler.rank) / sampler.num_replicas)  # type: ignore[arg-type]
    return max(0, min(number, own - first))
