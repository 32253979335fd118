"""The batches of ``validation_step``, as they go by."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_logme.batch import TargetSpec, conform_target, describe_target, find_mask, find_target
from lightning_logme.collector import Collector
from lightning_logme.distributed import agree, rows_without_padding, validation_loader
from lightning_logme.moments import Task
from lightning_logme.packages import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_logme.sources import Sources
from lightning_logme.taps import Pooling


class Validation:
    """Pairs the features of each batch with its labels, and adds them up.

    Args:
        name: of the score, for messages.
        task: of the labels.
        target: where they are in a batch.
        pooling: to one vector a sample.
        class_names: are checked against the labels.
        optional: whether a validation set that cannot be scored is left out, as there are probes.
        options: of :class:`~lightning_logme.collector.Collector`.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        target: TargetSpec,
        pooling: Pooling,
        class_names: Sequence[str] | None,
        optional: bool = False,
        **options: Any,
    ) -> None:
        self._name = name
        self._task: Task = task
        self._target = target
        self._pooling: Pooling = pooling
        self._class_names = class_names
        self._optional = optional
        self._options = options
        self._explained = False
        self._unmatched = False  # whether it has been said that padding is counted
        self._origin: tuple[str, str | None] = "", None
        # Of a run
        self._alone = True  # whether this is the only process: if not, all must raise together, or some would wait
        self._proven = False  # whether a batch has gone through: errors raise before, and warn after
        self._decided = False  # whether it is known in all processes that it can be scored
        self._left_out = False
        # Of a validation
        self._sources = Sources()
        self._collector: Collector | None = None
        # Of a batch
        self._batch: Any = None
        self._labels: tuple[Tensor, Tensor | None] | None = None

    def prepare(self, alone: bool) -> None:
        """For a new run, in one process alone or in several."""
        self._alone, self._proven, self._decided, self._left_out = alone, False, False, False

    def open(self, sources: Sources) -> None:
        """For a new validation."""
        if sources.obstacle is not None and not self._left_out:
            self._leave_out(sources.obstacle)
        if not self._left_out:
            self._sources = sources
            self._collector = Collector(self._task, sources.num_outputs, **self._options)

    def close(self) -> Collector | None:
        """What has been added up; None where nothing is. To be called by all processes in step.

        Raises:
            ValueError: the first batch could not be scored, in one process or more: raised in all.
        """
        collector = self._collector
        self.drop()
        if collector is not None and not self._decided:
            self._decided = True
            _, reason = agree(self._alone, {}, None if self._proven else collector.broken)
            if reason is not None:
                if not self._optional:
                    raise ValueError(reason.removeprefix("ValueError: "))
                self._leave_out(reason)
                return None
        return collector

    def drop(self) -> None:
        """Forget what has been added up."""
        self._sources, self._collector, self._batch, self._labels = Sources(), None, None, None

    def _leave_out(self, reason: str) -> None:
        self._left_out = True
        rank_zero_warn(
            f"{self._name} of the validation set is left out, and only the probes are scored, as is meant with "
            f"validation=False: {reason}"
        )

    def start_batch(self, batch: Any, batch_idx: int) -> None:
        self._attempt(batch_idx, self._start, batch)

    def end_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        self._attempt(batch_idx, self._end, trainer, pl_module, batch, dataloader_idx)

    def _attempt(self, batch_idx: int, step: Callable[..., None], *args: Any) -> None:
        """Errors of a run's first batch are the user's to know at once; a later one must not end the run."""
        collector = self._collector
        if collector is None or collector.broken is not None:
            return
        try:
            step(collector, *args)
        except Exception as error:
            self._sources.stop()
            if self._alone and not (self._proven or self._optional):
                raise
            collector.broken = f"{type(error).__name__}: {error}"
            if self._proven or self._decided:
                warnings.warn(
                    f"{self._name} is NaN for this validation, after an error in batch {batch_idx}: {collector.broken}",
                    stacklevel=2,
                )
            elif not self._optional:
                warnings.warn(
                    f"{self._name} cannot be scored, which will end the run after this validation, in all processes: "
                    f"{collector.broken}",
                    stacklevel=2,
                )

    def _start(self, collector: Collector, batch: Any) -> None:
        # Labels are read before validation_step, which may take them out of the batch.
        self._batch, self._labels = batch, None if batch is None else self._read(batch)
        self._sources.start()

    def _end(
        self, collector: Collector, trainer: Trainer, pl_module: LightningModule, batch: Any, dataloader_idx: int
    ) -> None:
        # A validation_step that fetches its own batches (dataloader_iter) has had another one by now.
        target, mask = self._labels if self._labels and batch is self._batch else self._read(batch)
        batches, first = collector.seen.get(dataloader_idx, (0, 0))
        collector.seen[dataloader_idx] = batches + 1, first + len(target)
        real = self._real(validation_loader(trainer, dataloader_idx), batches, len(target))
        with trainer.precision_plugin.forward_context():
            seen = self._sources.seen(pl_module, batch)
        rank, world = trainer.global_rank, trainer.world_size  # as DistributedSampler deals samples out
        places = range(first * world + rank, (first + real) * world + rank, world)
        rows = self._sources.pooled(seen, target, mask, self._pooling, self._task)
        for source, features in rows.items():
            collector.add((source, dataloader_idx), features[:real], target[:real], places)
        self._check_class_names(self._sources.num_outputs or (target.shape[1] if target.ndim > 1 else 1))
        if not self._explained:
            pooled = [source for source, tensor in seen.items() if tensor.ndim > 2 == rows[source].ndim]
            shapes = [f"{self._sources.describe(source)}: {tuple(seen[source].shape)}" for source in pooled]
            self._explain(shapes[:2] + ["…"] * (len(shapes) > 2), mask)
        self._batch, self._labels, self._proven = None, None, True

    def _real(self, loader: Any, batches: int, number: int) -> int:
        """How many of the rows of a batch are data, and not what a sampler repeats."""
        real = rows_without_padding(loader, batches, number)
        if real is None and not self._unmatched:
            self._unmatched = True
            warnings.warn(
                f"{self._name}: the rows of a batch are not the samples that the loader's sampler names, one by one, "
                "so that those it repeats to fill up cannot be told: they are counted.",
                stacklevel=2,
            )
        return number if real is None else real

    def _explain(self, pooled: list[str], mask: Tensor | None) -> None:
        """Say once what was taken without being told, for a wrong guess would give a plausible number."""
        self._explained = True
        labels, rivals = self._origin
        how = "the callable" if callable(self._pooling) else repr(self._pooling)
        shapes = f"; pooled by {how}{' under attention_mask' if mask is not None else ''}: {', '.join(pooled)}"
        rank_zero_info(f"LogMECallback: the labels are {labels}{shapes if pooled else ''}.")
        if rivals:
            rank_zero_warn(
                f"LogMECallback took {labels} for the labels, and {rivals} could be as well; say which with target=."
            )

    def _check_class_names(self, num_outputs: int) -> None:
        if self._class_names is not None and len(self._class_names) != num_outputs:
            raise ValueError(
                f"class_names must hold one name for each of {num_outputs} outputs, got {len(self._class_names)}."
            )

    def _read(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        # A copy, for validation_step may write to them: -100 is often replaced before tokens are decoded.
        labels = conform_target(find_target(batch, self._target), self._task).clone()
        if not self._explained:  # while the labels are still in the batch
            self._origin = describe_target(batch, self._target)
        return labels, find_mask(batch)
