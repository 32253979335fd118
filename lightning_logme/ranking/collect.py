"""Forward passes over a part of the samples, and the moments of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_logme.moments import Batch, Moments, Task, moments_device
from lightning_logme.packages import Fabric
from lightning_logme.ranking.candidate import Backbone
from lightning_logme.samples import BLOCKS, PROBE, Portion

# Rows that wait until they are added: a Gram matrix is read and written once for each block that gets some.
_PENDING = 2048


@dataclass(frozen=True, eq=False)
class Part:
    """What this process has from one pass over a part of the samples.

    Attributes:
        blocks: the moments of its blocks; empty where it had no batch.
        labels: digest of the labels that came.
        skipped: digest of the labels of a stream that came before.
        probe: (n, D) and (n,) or (n, K) the features, float32, and labels of the first samples, on the CPU.
    """

    blocks: list[Moments]
    labels: int
    skipped: int
    probe: tuple[Tensor, Tensor] | None


class BlockMoments:
    """The moments of every block, added to a few thousand rows at a time."""

    def __init__(self, task: Task, num_outputs: int) -> None:
        self._task: Task = task
        self._num_outputs = num_outputs
        self._blocks: list[Moments] = []
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._rows = 0
        self.num_features: int | None = None

    def add(self, features: Tensor, target: Tensor, block: Tensor) -> None:
        """Add rows of features (n, D), with the target and the block of each."""
        if self.num_features not in (None, features.shape[1]):
            raise ValueError(
                f"features of length {features.shape[1]} after features of length {self.num_features}; pool them to "
                "one length, with pooling=callable or forward=callable."
            )
        batch = Batch.checked(features, target, self._task, self._num_outputs)
        if self.num_features is None:
            self.num_features = features.shape[1]
            device = moments_device(features.device)
            self._blocks = [Moments.zeros(self.num_features, self._num_outputs, device) for _ in range(BLOCKS)]
        # Cloned: a module may write its next output to the same memory, and a view would keep all that it is a view of.
        self._pending.append((batch.features.clone(), batch.target, block))
        self._rows += len(block)
        if self._rows >= _PENDING:
            self._flush()

    def blocks(self) -> list[Moments]:
        """The moments so far; empty if there were no rows."""
        self._flush()
        return self._blocks

    def _flush(self) -> None:
        if not self._pending:
            return
        features, target, block = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._rows = [], 0
        for index, moments in enumerate(self._blocks):
            rows = (block == index).nonzero()[:, 0].to(features.device)
            if len(rows):
                self._blocks[index] = moments.accumulate(Batch(features[rows], target[rows]))


def collect(
    backbone: Backbone,
    portions: Iterable[Portion],
    start: int,
    task: Task,
    num_outputs: int,
    fabric: Fabric,
    count: Callable[[int], object],
) -> Part:
    """The moments of some samples.

    Args:
        backbone: gives the features.
        portions: this process's batches.
        start: place of the first sample to be counted; a stream gives those before as well.
        task: of the targets.
        num_outputs: K.
        fabric: of the process.
        count: is told the number of samples after each batch.

    Raises:
        ValueError: features do not fit the labels, or those before. Whatever the module raises.
    """
    sums, labels, skipped, probe = BlockMoments(task, num_outputs), 0, 0, None
    for portion in portions:
        if portion.start < start:
            skipped += portion.digest()
            continue
        features = backbone.features(portion.batch, portion.target, fabric)
        sums.add(features, portion.target, portion.block)
        labels += portion.digest()
        probe = probe or (features[:PROBE].float().cpu(), portion.target[:PROBE])
        count(len(features))
    return Part(sums.blocks(), labels, skipped, probe)
