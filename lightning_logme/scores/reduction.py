"""Reduce the accumulators of several processes to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.moments import Moments
from lightning_logme.scores.subset import IndexedRows, largest_hash, mixed
from lightning_logme.utilities.checks import Task
from lightning_logme.utilities.distributed import gathered, together

Key = TypeVar("Key")


def reduced(
    mine: Mapping[Key, Accumulator], task: Task, device: torch.device, alone: bool
) -> tuple[dict[Key, Accumulator], dict[Key, str]]:
    """Add up the accumulators of all processes. All processes must call this.

    The moments are reduced key by key and segment by segment. Rows are exchanged only for the random subset of all
    samples. A process without a key or segment contributes zeros.

    Args:
        mine: the accumulators of this process, by sortable keys. They must not be used later.
        task: the task of all accumulators.
        device: the device of the sums, which the backend must support.
        alone: whether the run has only one process. Then nothing changes.

    Returns:
        The accumulators by key, the same in every process, and the reason why a key has no accumulator, by key.

    Raises:
        Failure: in all processes, if one of them could not sum its rows.
    """
    if alone:
        return dict(mine), {}
    with together(alone):
        for accumulator in mine.values():
            accumulator.to(device).moments()
    everyone = gathered(
        alone,
        {
            key: (each.num_features, each.num_outputs, each.sample_size, each.num_samples, set(each.sums))
            for key, each in mine.items()
        },
    )
    results: dict[Key, Accumulator] = {}
    broken: dict[Key, str] = {}
    segments: dict[Key, set[int]] = {}
    for rank, accumulators in enumerate(everyone):
        for key, (num_features, num_outputs, sample_size, number, present) in accumulators.items():
            total = results.setdefault(key, Accumulator(task, num_features, num_outputs, device, sample_size))
            shape, first = (num_features, num_outputs), (total.num_features, total.num_outputs)
            if shape != first:
                broken.setdefault(
                    key, f"features and targets have lengths {shape} in process {rank}, but {first} in another process"
                )
            total.num_samples += number
            segments.setdefault(key, set()).update(present)
    for key in sorted(results.keys() - broken.keys()):  # type: ignore[type-var]
        total = results[key]
        own = mine.get(key, total)
        for segment in sorted(segments[key]):
            sums = own.sums.pop(segment, None)
            if sums is None:
                sums = Moments.zeros(total.num_features, total.num_outputs, total.device)
            total.sums[segment] = sums.all_reduce()
        total.segments = segments[key]
        if total.sample_size:
            total.choose(gathered_subset(own.chosen(), total.sample_size))
    return {key: results[key] for key in sorted(results.keys() - broken.keys())}, broken  # type: ignore[type-var]


def gathered_subset(mine: Sequence[IndexedRows], size: int, group: Any = None) -> list[IndexedRows]:
    """Return the rows of all processes that are in the random subset of all samples, on the CPU. All must call this.

    The processes first exchange all indices, and then only the rows in that subset.

    Args:
        mine: the rows in the random subset of this process.
        size: the largest number of rows.
        group: the processes; None stands for all.
    """
    indices = gathered(False, [rows.index for rows in mine], group)
    bound = largest_hash([index for process in indices for index in process], size)
    kept = [rows[(mixed(rows.index) <= bound).nonzero()[:, 0]].to("cpu") for rows in mine]
    return [rows for process in gathered(False, kept, group) for rows in process]
