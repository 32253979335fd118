"""Draw samples from the loader of a map-style data set: indices, labels, order, blocks and batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from lightning_logme.features.labels import LABEL_KEYS, TargetSpec

# The number of blocks of the jackknife.
BLOCKS = 8


def sample_indices(loader: Any) -> Tensor | None:
    """Return the indices that a loader draws, each once; None if they are unknown, for example for a stream."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if loader.batch_sampler is None or type(loader).__iter__ is not DataLoader.__iter__:
        return None  # The data set or the loader itself makes the batches.
    if type(loader.batch_sampler) is not BatchSampler:
        return _each_once(index for batch in loader.batch_sampler for index in batch)
    sampler: Any = loader.batch_sampler.sampler
    draws_all = type(sampler) is SequentialSampler or isinstance(sampler, DistributedSampler)
    draws_all = draws_all or (type(sampler) is RandomSampler and sampler.num_samples == len(sampler.data_source))
    if draws_all:
        return torch.arange(len(loader.dataset))  # type: ignore[arg-type]
    # A sampler without a length may never end.
    return _each_once(sampler) if hasattr(sampler, "__len__") else None


def _each_once(indices: Iterable[Any]) -> Tensor | None:
    """Return the sorted distinct indices, or None if they are not integers."""
    # Iterating advances the generator of the sampler, which the training loader may share.
    generator = getattr(indices, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        return torch.tensor(sorted({int(index) for index in indices}))
    except (TypeError, ValueError):
        return None
    finally:
        if generator is not None and state is not None:
            generator.set_state(state)


def labels_at_hand(dataset: Any, target: TargetSpec) -> Tensor | None:
    """Return the labels of a data set if they can be read without loading the samples, else None."""
    if isinstance(dataset, Subset):
        labels = labels_at_hand(dataset.dataset, target)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        index = 1 if target is None else target
        is_index = isinstance(index, int) and -len(dataset.tensors) <= index < len(dataset.tensors)
        return dataset.tensors[index] if is_index else None  # type: ignore[index]
    for name in LABEL_KEYS if target is None else (target,):
        if not isinstance(name, str):
            continue
        column = getattr(dataset, name, None)
        if column is None and name in (getattr(dataset, "column_names", None) or ()):
            column = dataset[name]
        if column is None:
            continue
        try:
            labels = torch.as_tensor(column)
        except (TypeError, ValueError, RuntimeError):
            continue
        if labels.ndim and len(labels) == len(dataset):
            return labels
    return None


def stratified_order(number: int, strata: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a random order of the samples, and the block of each position in it.

    The classes in ``strata`` are spread evenly over the order and the blocks. So for any n, the first n samples contain
    the classes in proportion.

    Returns:
        The order (N,), and the block (N,) of each position.
    """
    shuffled = torch.randperm(number, generator=generator)
    if strata is None:
        return shuffled, torch.arange(number) % BLOCKS
    by_class = shuffled[strata[shuffled].argsort(stable=True)]
    _, counts = strata.unique(return_counts=True)
    size = counts.repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    member = torch.arange(number) - first  # 0, 1, … within the class
    # Each class has a sample at 0, so that the first samples include rare classes. Ties are broken at random.
    tie_break = torch.rand(len(counts), generator=generator).repeat_interleave(counts)
    interleaved = (member.double() / size + tie_break * 1e-9).argsort(stable=True)
    return by_class[interleaved], (torch.arange(number) % BLOCKS)[interleaved]


def with_batches(loader: DataLoader[Any], batches: list[list[int]], seed: int) -> DataLoader[Any]:
    """Return a loader like this one that yields the given batches of indices."""
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
        }
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=torch.Generator().manual_seed(seed),  # else it draws from the user's generator
        **workers,
    )
