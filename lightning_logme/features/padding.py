"""Which rows of a batch are data, and which a distributed sampler repeats to fill up."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler


def distributed_sampler(loader: Any) -> DistributedSampler[Any] | None:
    """Return the sampler of a loader if it may repeat samples, as ``DistributedSampler`` does without ``drop_last``."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    return sampler if isinstance(sampler, DistributedSampler) and not sampler.drop_last else None


def rows_without_padding(loader: Any, batches: int, number: int) -> int | None:
    """Return how many rows of the next batch of this process are data; None where that cannot be detected.

    ``DistributedSampler`` repeats samples until all processes have as many. Its i-th index for process r is the sample
    i · world + r of its list, whatever the order, and what is beyond the data set's length is repeated: always the last
    indices of a process. Samplers of other kinds may have an order of their own, and a ``collate_fn`` may make more or
    fewer rows than samples.

    Args:
        loader: the loader the rows come from.
        batches: that this process has had from it before.
        number: rows it gets now.
    """
    sampler = distributed_sampler(loader)
    if sampler is None:
        return number
    share = math.ceil(len(sampler.dataset) / sampler.num_replicas)  # type: ignore[arg-type]
    if not _deals_out_in_turn(sampler) or len(sampler) != share:
        return None
    own = math.ceil((len(sampler.dataset) - sampler.rank) / sampler.num_replicas)  # type: ignore[arg-type]
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is None:  # each index gives a batch
        return number if batches < own else 0
    if type(batch_sampler) is not BatchSampler:
        return None
    first = batches * batch_sampler.batch_size
    if number != min(batch_sampler.batch_size, len(sampler) - first):
        return None
    return max(0, min(number, own - first))


def _deals_out_in_turn(sampler: DistributedSampler[Any]) -> bool:
    """Return whether a sampler is torch's, or Lightning's around another one, and no subclass with its own rules."""
    for cls in type(sampler).__mro__:
        if cls is DistributedSampler or cls.__name__ == "DistributedSamplerWrapper":
            return True
        if {"__iter__", "__len__"} & vars(cls).keys():
            return False
    return False
