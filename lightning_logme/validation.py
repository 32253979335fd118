"""The batches of ``validation_step``, as they go by."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_logme.batch import TargetSpec, conform_target, describe_target, find_mask, find_target
from lightning_logme.collector import Collector
from lightning_logme.distributed import first_reason, gathered, reason_of, rows_without_padding, validation_loader
from lightning_logme.moments import Task
from lightning_logme.packages import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_logme.sources import HEAD, Sources
from lightning_logme.taps import NotCalledError


class Validation:
    """Pairs the features of each batch with its labels, and adds them up.

    Args:
        name: of the score, for messages.
        task: of the labels.
        target: where they are in a batch.
        class_names: are checked against the labels.
        optional: whether a validation set that cannot be scored is left out, as there are probes.
        options: of :class:`~lightning_logme.collector.Collector`.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        target: TargetSpec,
        class_names: Sequence[str] | None,
        optional: bool = False,
        **options: Any,
    ) -> None:
        self._name = name
        self._task: Task = task
        self._target = target
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
        self._wrong_guess: str | None = None  # why the guessed head is dropped
        # Of a batch
        self._batch: Any = None
        self._labels: tuple[Tensor, Tensor | None] | Exception | None = None

    def prepare(self, alone: bool) -> None:
        """For a new run, in one process alone or in several."""
        self._alone, self._proven, self._decided, self._left_out = alone, False, False, False

    def open(self, sources: Sources, rank: int, world: int) -> None:
        """For a new validation."""
        if sources.obstacle is not None and not self._left_out:
            self._leave_out(sources.obstacle)
        if self._left_out:
            sources.drop_guess()
        if not self._left_out:
            self._sources = sources
            self._collector = Collector(self._task, sources.num_outputs, rank=rank, world=world, **self._options)

    def close(self, sanity_checking: bool) -> Collector | None:
        """Return what was added up, or None where the validation set is left out. All processes call this in step.

        Raises:
            ValueError: the first batch could not be scored, in one process or more: raised in all.
        """
        collector, sources, guess = self._collector, self._sources, self._wrong_guess
        self.drop()
        if collector is None:
            return None
        if not sanity_checking and not collector.broken:
            self._warn_of_unseen(collector, sources)
        if self._decided:
            return collector
        error = None if self._proven else next(iter(collector.broken.values()), None)
        everyone = gathered(self._alone, (self._proven, error, guess))
        reason = first_reason([error for _, error, _ in everyone])
        self._decided = reason is not None or any(proven for proven, _, _ in everyone)
        if reason is not None:
            if not self._optional:
                raise ValueError(reason)
            self._leave_out(reason)
            sources.drop_guess()
            return None
        guess = first_reason([guess for _, _, guess in everyone])
        if guess is not None:
            head = sources.head
            sources.drop_guess()
            if head is not None and head.outputs == sources.num_outputs:
                guess += f" K = {head.outputs}, the number of its outputs, is kept; num_classes= gives another one."
            rank_zero_warn(f"{self._name} is logged for {', '.join(sources.names)} only: {guess}")
        return collector

    def _warn_of_unseen(self, collector: Collector, sources: Sources) -> None:
        """Say which batches called none of the modules that are scored."""
        head = sources.head
        other = "it ran another network, such as an averaged copy: name its head with head="
        if head is not None and head.guess is not None:
            other = f"it ran another network, such as an averaged copy, or another head than '{head.guess}': give head="
        elif head is not None and any(tap.side == "output" for tap in head.taps):
            other = "it called parts of the module and not self(…): name layers=[…], or give features="
        causes = [
            "validation_step left out its forward pass",
            other,
            "the model was compiled and run before the hooks were attached: call "
            'torch.compiler.set_stance("force_eager") or compile it anew',
        ]
        causes = causes[::-1] if sources.is_compiled else causes
        for loader, unseen in collector.unseen.items():
            batches = collector.batches[loader]
            where = f" of loader {loader}" if len(collector.batches) > 1 else ""
            what = f"{unseen} of {batches} batches{where} called none of the modules that are scored"
            key = self._name if head is not None else f"{self._name}/{sources.names[0]}"
            if unseen < batches and not sources.is_compiled:
                warnings.warn(f"{key}: {what}, and are left out.", stacklevel=2)
                continue
            if unseen < batches:  # compiled code may call hooks for batches of one shape only
                collector.broken[None] = what
            warnings.warn(
                f"{key} is NaN: {what}. Likely causes, the likeliest first: {'; '.join(causes)}.", stacklevel=2
            )

    def drop(self) -> None:
        """Forget what has been added up."""
        self._sources, self._collector, self._wrong_guess = Sources(), None, None
        self._batch, self._labels = None, None

    def _leave_out(self, reason: str) -> None:
        self._left_out = True
        rank_zero_warn(
            f"{self._name} of the validation set is left out, and only the probes are scored: {reason} If the "
            "validation set has no labels, write validation=False."
        )

    def start_batch(self, batch: Any) -> None:
        """Read the labels before ``validation_step``, which may take them out of the batch, and listen."""
        if self._collector is None or None in self._collector.broken:
            return
        self._batch, self._labels = batch, None
        if batch is not None:
            try:
                self._labels = self._read(batch)
            except Exception as error:  # raised when it is known that the batch is not left out
                self._labels = error
        self._sources.start()

    def end_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Add what has been seen of a batch.

        Nothing is decided by a loader's first batches in which no module was called: ``validation_step`` may leave out
        the first batch, or all of the sanity check.

        Raises:
            Exception: the first batch cannot be scored. Later errors must not end the run.
        """
        collector = self._collector
        if collector is None or None in collector.broken:
            return
        called = self._sources.called
        is_first = collector.rows[dataloader_idx] == 0
        errors: dict[str | None, Exception]
        try:
            if not called and not is_first:
                raise ValueError(
                    "it called none of the modules that are scored, unlike the batches before; only the first batches "
                    "of a validation can be left out"
                )
            errors = self._add(collector, trainer, pl_module, batch, dataloader_idx) if called else {}
        except Exception as error:
            errors = {None: error}
        finally:
            self._sources.stop()
            self._batch, self._labels = None, None
        collector.batches[dataloader_idx] += 1
        if not called and is_first:
            collector.unseen[dataloader_idx] += 1
            return
        errors = self._without_wrong_guess(collector, errors)
        if errors and self._alone and not (self._proven or self._optional):
            raise next(iter(errors.values()))
        self._proven = self._proven or not errors
        self._note(collector, batch_idx, errors)

    def _add(
        self, collector: Collector, trainer: Trainer, pl_module: LightningModule, batch: Any, dataloader_idx: int
    ) -> dict[str | None, Exception]:
        """Add the rows of a batch; returns the errors of sources that failed."""
        # A validation_step that fetches its own batches (dataloader_iter) has had another one by now.
        labels = self._labels if self._labels and batch is self._batch else self._read(batch)
        if isinstance(labels, Exception):
            raise labels
        target, mask = labels
        with trainer.precision_plugin.forward_context():
            rows, failed = self._sources.rows(pl_module, batch, target, mask, self._task)
        first = collector.rows[dataloader_idx]
        collector.rows[dataloader_idx] += len(target)
        real = self._real(validation_loader(trainer, dataloader_idx), collector.batches[dataloader_idx], len(target))
        rank, world = trainer.global_rank, trainer.world_size  # as DistributedSampler deals samples out
        places = range(first * world + rank, (first + real) * world + rank, world)
        rows = {source: features[:real] for source, features in rows.items()}
        errors = {**failed, **collector.add(dataloader_idx, rows, target[:real], places)}
        self._check_class_names(self._sources.num_outputs or (target.shape[1] if target.ndim > 1 else 1))
        self._explain()
        return errors

    def _without_wrong_guess(
        self, collector: Collector, errors: Mapping[str | None, Exception]
    ) -> dict[str | None, Exception]:
        """The errors without that of a head that was guessed and is not called, where layers were."""
        error = errors.get(HEAD)
        uncalled = isinstance(error, NotCalledError) and not collector.has(HEAD)
        if self._decided or not (uncalled and self._sources.is_head_guessed):
            return dict(errors)
        self._wrong_guess = str(error)
        return {source: error for source, error in errors.items() if source != HEAD}

    def _note(self, collector: Collector, batch_idx: int, errors: Mapping[str | None, Exception]) -> None:
        """Remember what failed, and warn once for each cause."""
        new = {source: reason_of(error) for source, error in errors.items() if source not in collector.broken}
        collector.broken.update(new)
        for text in dict.fromkeys(new.values()):
            failed = [source for source in new if new[source] == text]
            several = None in failed or HEAD in failed
            key = self._name if several else " and ".join(f"{self._name}/{source}" for source in failed)
            verb = "is" if several or len(failed) == 1 else "are"
            if self._proven or self._decided:
                warnings.warn(
                    f"{key} {verb} NaN for this validation, after an error in batch {batch_idx}: {text}", stacklevel=2
                )
            elif not self._optional:
                warnings.warn(
                    f"{key} cannot be scored, which will end the run after this validation, in all processes: {text}",
                    stacklevel=2,
                )

    def _real(self, loader: Any, batches: int, number: int) -> int:
        """How many of the rows of a batch are data, and not what a sampler repeats."""
        real = rows_without_padding(loader, batches, number)
        if real is None and not self._unmatched:
            self._unmatched = True
            warnings.warn(
                f"{self._name}: the rows of a batch are not the samples that the loader's sampler names, one by one, "
                "so padding cannot be detected, and padded rows are counted.",
                stacklevel=2,
            )
        return number if real is None else real

    def _explain(self) -> None:
        """Report once which labels and pooling were inferred: a wrong guess would still give a plausible number."""
        if self._explained:
            return
        self._explained = True
        labels, rivals = self._origin
        poolings = self._sources.poolings()
        if len(poolings) > 2:
            poolings[2:] = ["…"]
        rank_zero_info("; ".join([f"LogMECallback: the labels are {labels}", *poolings]) + ".")
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
        # A copy, because validation_step may write to them: -100 is often replaced before tokens are decoded.
        labels = conform_target(find_target(batch, self._target), self._task).clone()
        if not self._explained:  # while the labels are still in the batch
            self._origin = describe_target(batch, self._target)
        return labels, find_mask(batch)
