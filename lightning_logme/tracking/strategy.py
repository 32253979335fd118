"""Checks whether a run with several processes can be scored."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lightning_logme.utilities.compat import LightningModule, Trainer, is_one_of, validates_by_clock

# Strategies that gather weights in every forward pass.
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")
_UNEVEN = "allow_zero_length_dataloader_with_multiple_devices"


def is_sharded(trainer: Trainer) -> bool:
    """Return whether weights are sharded, so that all processes must run the same number of forward passes."""
    return trainer.world_size > 1 and is_one_of(trainer.strategy, _SHARDED)


def why_not_scored(trainer: Trainer, module: LightningModule) -> str | None:
    """Return why a run with several processes cannot be scored, or None if it can."""
    if trainer.world_size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return (
            f"the {trainer.world_size} processes of {type(trainer.strategy).__name__} are not connected by "
            "torch.distributed, so their sums cannot be added up"
        )
    mesh: Any = getattr(trainer.strategy, "device_mesh", None)
    if "tensor_parallel" in (getattr(mesh, "mesh_dim_names", None) or ()) and mesh["tensor_parallel"].size() > 1:
        return (
            "under tensor parallelism several processes see the same samples, and each holds only part of their "
            "features; save checkpoints, and score them later with score_checkpoints"
        )
    if validates_by_clock(trainer):
        return (
            "with a time for val_check_interval each process uses its own clock, and one that validates early would "
            "wait for the others; give a number of batches"
        )
    if getattr(module, _UNEVEN, False) or getattr(getattr(trainer, "datamodule", None), _UNEVEN, False):
        return (
            f"with {_UNEVEN}=True a process whose loader has length 0 skips the validation, and the others would wait "
            "for it; give each process a batch, or a loader without a length"
        )
    return None
