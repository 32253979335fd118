"""The samples of a data set: their order, their rounds, and the block of the jackknife that each belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_logme.features.drawing import BLOCKS, labels_at_hand, sample_indices, stratified_order, with_batches
from lightning_logme.features.isolation import seed_generators
from lightning_logme.features.labels import Target, TargetSpec, conform_target, find_target
from lightning_logme.features.outputs import decide_num_outputs
from lightning_logme.scores.subset import mixed
from lightning_logme.utilities.checks import EXCLUSIVE, Task

# The first round has 256 samples, or four per class if that is more. Fewer samples say little, and each round costs
# time: the evidence is computed, and candidates that factories make are loaded again.
_FIRST_ROUND = 256
_PER_CLASS = 4
# A later run compares the features of these samples, to see whether the candidate and the samples are still the same.
FIRST_SAMPLES = 16
SAME_SAMPLES = "dataloader must give the same samples in the same order every time it is iterated over."


@dataclass(frozen=True, eq=False)
class Portion:
    """A batch of samples, and its position among all samples.

    Attributes:
        batch: the batch, as the loader yields it.
        target: its labels, in the form that the metric takes, on the CPU.
        block: (n,) the block of each sample.
        start: the position of the first sample.
    """

    batch: Any
    target: Tensor
    block: Tensor
    start: int

    def digest(self) -> int:
        """Return a digest of the labels and their positions. Digests of batches can be added, also across processes."""
        return _digest(self.target, self.start)


class Samples:
    """The samples of a target data set, in the same order and the same blocks for every candidate.

    Args:
        loader: the loader of a map-style data set, or a stream: anything else that yields batches each time it is
            iterated over. Samples of a map-style data set are drawn without replacement, stratified by class if the
            labels can be read without loading the samples. A stream keeps its order.
        task: the task of the labels.
        target: see :func:`~lightning_logme.features.labels.find_target`.
        seed: the seed of the order.
        repeatable: whether a stream must give the same samples every time.

    Attributes:
        number: the number of samples; None for a stream.
        labels: the labels of all samples in their order; None if they cannot be read without loading the samples.
        first: the first batch. For a map-style data set, it has only a few samples.

    Raises:
        ValueError: the loader can be read only once, yields no batch, or yields a batch without labels.
    """

    def __init__(self, loader: Any, task: Task, target: TargetSpec, seed: int, repeatable: bool = True) -> None:
        self.task: Task = task
        self.target = target
        self.seed = seed
        self.labels: Tensor | None = None
        self.number: int | None = None
        self._loader = loader
        self._repeatable = repeatable
        indices = sample_indices(loader)
        if indices is None:
            _check_stream(loader)
        else:
            self._draw(loader, indices)
        first = next(self.portions(0, FIRST_SAMPLES), None)
        if first is None:
            raise ValueError("dataloader gave no batch.")
        self.first = first
        if self.labels is not None and not _equal(self.labels[: len(self.first.target)], self.first.target):
            self.labels = None  # The loader changes the labels of the data set, as with a target_transform.

    def _draw(self, loader: Any, indices: Tensor) -> None:
        """Draw the order and the blocks of samples from a map-style data set."""
        self.number = len(indices)
        if self.number == 0:
            raise ValueError("dataloader has no samples.")
        labels = labels_at_hand(loader.dataset, self.target)
        if labels is not None:
            labels = conform_target(labels[indices], self.task).cpu()
        strata = labels if labels is not None and self.task in EXCLUSIVE and labels.ndim == 1 else None
        order, block = stratified_order(self.number, strata, torch.Generator().manual_seed(self.seed))
        self.labels = None if labels is None else labels[order]
        self._order = indices[order]
        self._block = block

    def check_number(self, number: int) -> None:
        """Raise ``ValueError`` if there are fewer than two samples for each block."""
        if number < 2 * BLOCKS:
            raise ValueError(
                f"dataloader has {number} samples, and error bars need at least {2 * BLOCKS}: two for each of {BLOCKS} "
                "blocks."
            )

    def num_outputs(self, num_classes: int | None, ignore_index: int | None = None) -> int:
        """Return K, checked against all labels if they are known, else against the labels of the first batch.

        Args:
            num_classes: K of "multiclass" and "multilabel". None counts the classes.
            ignore_index: the label of samples that do not count.

        Raises:
            ValueError: the labels do not fit the task, or K is not known.
        """
        known = decide_num_outputs(self.task, num_classes)
        labels = self.first.target if self.labels is None else self.labels
        target = Target.checked(labels, self.task, known, ignore_index)
        is_known = self.labels is not None or self.task != "multiclass"
        outputs = decide_num_outputs(self.task, num_classes, values=target.values if is_known else None)
        if outputs is None:
            raise ValueError(
                "num_classes is needed for task='multiclass': pass the number of classes. It is counted only if the "
                "data set has all labels in its `targets` or `labels`, or is a TensorDataset."
            )
        return outputs

    def rounds(self, num_outputs: int | None) -> Iterator[int]:
        """Yield the number of samples read by the end of each round: it doubles until all samples are read."""
        stop = max(_FIRST_ROUND, _PER_CLASS * (num_outputs or 0) if self.task in EXCLUSIVE else 0)
        # A last round with few new samples is not worth its time.
        while self.number is None or stop * 1.5 < self.number:
            yield stop
            stop *= 2
        yield self.number

    def portions(self, start: int, stop: int | None, rank: int = 0, world: int = 1) -> Iterator[Portion]:
        """Yield the batches of one process from the samples between ``start`` and about ``stop``.

        The processes take turns at the same batches, so that features do not depend on the world size. A stream is
        read from its beginning, until the first batch that reaches ``stop``.
        """
        seed_generators(self.seed)  # So a loader that shuffles has the same order every time.
        if self.number is None:
            yield from self._streamed(stop, rank, world)
        else:
            yield from self._drawn(start, self.number if stop is None else stop, rank, world)

    def _drawn(self, start: int, stop: int, rank: int, world: int) -> Iterator[Portion]:
        size = self._loader.batch_size or getattr(self._loader.batch_sampler, "batch_size", None) or 32
        slices = [slice(first, min(first + size, stop)) for first in range(start, stop, size)][rank::world]
        loader = with_batches(self._loader, [self._order[positions].tolist() for positions in slices], self.seed)
        for positions, batch in zip(slices, loader, strict=True):
            target, block = self._read(batch), self._block[positions]
            if len(target) != len(block):
                raise ValueError(
                    f"dataloader gave {len(target)} labels for a batch of {len(block)} samples (shape "
                    f"{tuple(target.shape)}); its collate_fn must keep every sample, and target= must name the labels."
                )
            yield Portion(batch, target, block, positions.start)

    def _streamed(self, stop: int | None, rank: int, world: int) -> Iterator[Portion]:
        position = 0
        for index, batch in enumerate(self._loader):
            target = self._read(batch)
            first, position = position, position + len(target)
            known: Portion | None = getattr(self, "first", None)  # None while the first batch itself is read
            if index == 0 and self._repeatable and known is not None and not _equal(target, known.target):
                raise ValueError(f"the labels of the first batch have changed since the previous pass; {SAME_SAMPLES}")
            if index % world == rank:
                yield Portion(batch, target, mixed(torch.arange(first, position)) % BLOCKS, first)
            if stop is not None and position >= stop:
                return

    def _read(self, batch: Any) -> Tensor:
        # Copied, because a loader may reuse the memory of its batches.
        return conform_target(find_target(batch, self.target), self.task).detach().to("cpu", copy=True)

    def fingerprint(self) -> dict[str, Any]:
        """Return values that identify the data set, the order and the loader, without loading samples."""
        labels = None if self.labels is None else _digest(self.labels, 0)
        target = getattr(self.target, "__qualname__", type(self.target)) if callable(self.target) else self.target
        # The rounds of a stream end with a batch, so they depend on the batch size.
        batch = len(self.first.target) if self.number is None else None
        options = {"task": self.task, "samples": self.number, "labels": labels, "seed": self.seed}
        return {**options, "target": target, "batch": batch}


def _digest(target: Tensor, start: int) -> int:
    labels = target.double().reshape(len(target), -1).contiguous().view(torch.int64)
    position = torch.arange(start, start + len(labels))
    column = torch.arange(labels.shape[1])
    return int(mixed(mixed(labels + column) + position[:, None]).sum())


def total(digests: Iterable[int]) -> int:
    """Return the digest of several batches together. Digests wrap around as int64 does."""
    return sum(digests) % 2**64


def _equal(labels: Tensor, others: Tensor) -> bool:
    return labels.shape == others.shape and bool((labels == others).all())


def _check_stream(loader: Any) -> None:
    if not isinstance(loader, Iterable):
        raise ValueError(
            f"dataloader must be a DataLoader or another iterable of batches, got {type(loader).__name__}."
        )
    if iter(loader) is loader:
        raise ValueError(
            "dataloader is an iterator that can be read only once, but every candidate reads it from the start; pass a "
            "DataLoader, or a list of batches."
        )
