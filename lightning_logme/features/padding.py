"""Find the rows of a batch that are padding, which a distributed sampler adds."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler


def distributed_sampler(loader: Any) -> DistributedSampler[Any] | None:
    """Return the sampler of a loader if it may add padding: a ``DistributedSampler`` without ``drop_last``."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    return sampler if isinstance(sampler, DistributedSampler) and not sampler.drop_last else None


def rows_without_padding(loader: Any, batches: int, number: int) -> int | None:
    """Return the number of real rows in the next batch of this process, without padding; None if it is not known.

    ``DistributedSampler`` repeats samples so that all processes get equally many. The i-th index of rank r has position
    i · world size + r in the list of indices, shuffled or not. Positions beyond the length of the data set are padding,
    so padding comes last in each rank. Other samplers may have another order, and a ``collate_fn`` may make more
    or fewer rows than samples.

    Args:
        loader: the loader of the batch.
        batches: the number of its earlier batches in this process.
        number: the number of rows in the batch.
    """
    sampler = distributed_sampler(loader)
    if sampler is None:
        return number
    share = math.ceil(len(sampler.dataset) / sampler.num_replicas)  # type: ignore[arg-type]
    if not _has_known_order(sampler) or len(sampler) != share:
        return None
    own = math.ceil((len(sampler.dataset) - sampler.rank) / sampler.num_replicas)  # type: ignore[arg-type]
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is None:  # Each index is one batch.
        return number if batches < own else 0
    if type(batch_sampler) is not BatchSampler:
        return None
    first = batches * batch_sampler.batch_size
    if number != min(batch_sampler.batch_size, len(sampler) - first):
        return None
    return max(0, min(number, own - first))


def _has_known_order(sampler: DistributedSampler[Any]) -> bool:
    """Return whether a sampler has the order of torch's own or of Lightning's wrapper. A subclass may change it."""
    for cls in type(sampler).__mro__:
        if cls is DistributedSampler or cls.__name__ == "DistributedSamplerWrapper":
            return True
        if {"__iter__", "__len__"} & vars(cls).keys():
            return False
    return False
