"""Pairs the captured features with the labels of each validation batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from lightning_logme.features.extractor import HEAD, Errors, Extractor
from lightning_logme.features.hooks import NotCalledError
from lightning_logme.features.labels import Labels, TargetSpec, describe_target, read_labels
from lightning_logme.features.padding import distributed_sampler, rows_without_padding
from lightning_logme.tracking.passes import Pass, Scoring
from lightning_logme.utilities.compat import (
    LightningModule,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
    validation_loaders,
)
from lightning_logme.utilities.distributed import first_reason, gathered, reason_of


class Stage(Enum):
    """How far the validations of a run have come: errors end the run at first, and only warn later."""

    UNPROVEN = "this process has not scored a batch yet"
    PROVEN = "this process has scored a batch"
    SETTLED = "all processes know that the validation set can be scored"


class Validation:
    """Pairs the features of each batch with its labels, and accumulates them.

    Args:
        name: of the score, for messages.
        scoring: of the labels.
        target: where they are in a batch.
        class_names: are checked against the labels.
    """

    def __init__(
        self, name: str, scoring: Scoring, target: TargetSpec, class_names: Sequence[str] | None = None
    ) -> None:
        self._name = name
        self._scoring = scoring
        self._target = target
        self._class_names = class_names
        self._said: set[str] = set()  # what is reported once
        self._origin: tuple[str, str | None] = "", None
        # Of a run
        self._alone = True  # whether this is the only process: if not, all must raise together, or some would wait
        self._stage = Stage.UNPROVEN
        # Of a validation
        self._extractor: Extractor | None = None
        self._pass: Pass | None = None
        self._loaders: list[Any] = []
        self._fetches_batches = False  # whether validation_step does, so that labels are known only after it
        self._wrong_guess: str | None = None  # why the guessed head is dropped
        # Of a batch
        self._labels: Labels | Exception | None = None

    def prepare(self, alone: bool) -> None:
        """Begin a new run, in one process alone or in several."""
        self._alone, self._stage = alone, Stage.UNPROVEN

    def open(self, extractor: Extractor, trainer: Trainer, module: LightningModule) -> None:
        """Begin a new validation."""
        self._extractor, self._loaders = extractor, validation_loaders(trainer)
        scoring = replace(self._scoring, num_outputs=extractor.num_outputs)
        self._pass = Pass(scoring, trainer.global_rank, trainer.world_size, len(self._loaders))
        self._fetches_batches = "dataloader_iter" in inspect.signature(module.validation_step).parameters

    def drop(self) -> None:
        """Forget what has been accumulated."""
        self._extractor, self._pass, self._wrong_guess, self._labels = None, None, None, None

    def start_batch(self, batch: Any) -> None:
        """Read the labels before ``validation_step``, which may take them out of the batch, and capture."""
        if self._extractor is None or self._pass is None or None in self._pass.errors:
            return
        self._labels = None if self._fetches_batches else self._read(batch, self._pass.num_outputs)
        self._extractor.start(self._labels if isinstance(self._labels, Labels) else None)

    def end_batch(self, trainer: Trainer, batch: Any, batch_idx: int, loader: int) -> None:
        """Add what has been captured from a batch.

        Nothing is decided by a loader's first batches in which no module was called: ``validation_step`` may leave out
        the first batch, or all of the sanity check.

        Raises:
            Exception: the first batch cannot be scored. Later errors must not end the run.
        """
        extractor, current = self._extractor, self._pass
        if extractor is None or current is None or None in current.errors:
            return
        is_called, is_first = extractor.called, current.unseen[loader] == current.batches[loader]
        errors: Errors = {}
        try:
            if is_called:
                errors = self._add(extractor, current, trainer, batch, loader)
            elif not is_first:
                raise ValueError(
                    "it called none of the modules that are scored, unlike the batches before; only the first batches "
                    "of a validation can be left out"
                )
        except Exception as error:
            errors = {None: error}
        finally:
            extractor.stop()
            self._labels = None
        current.batches[loader] += 1
        current.unseen[loader] += is_first and not is_called
        if self._is_wrong_guess(errors):
            self._wrong_guess = str(errors.pop(HEAD))
        if errors and self._alone and self._stage is Stage.UNPROVEN:
            raise next(iter(errors.values()))
        if is_called and not errors and self._stage is Stage.UNPROVEN:
            self._stage = Stage.PROVEN
        if errors:
            self._note(current, batch_idx, errors)

    def _add(self, extractor: Extractor, current: Pass, trainer: Trainer, batch: Any, loader: int) -> Errors:
        """Add the rows of a batch; return the errors of sources that failed."""
        labels = self._read(batch, current.num_outputs) if self._fetches_batches else self._labels
        if not isinstance(labels, Labels):
            raise labels or ValueError("its labels are not known")
        with trainer.precision_plugin.forward_context():
            rows, errors = extractor.rows(batch, labels)
        number, start = labels.target.shape[0], current.rows[loader]
        if distributed_sampler(self._loaders[loader]) is not None:
            labels = self._without_padding(labels, current.batches[loader], loader)
        world = trainer.world_size  # samples are dealt out in turn, as DistributedSampler does
        first, real = start * world + trainer.global_rank, labels.target.num_samples
        errors |= current.add(rows, labels, range(first, first + real * world, world), loader)
        current.rows[loader] += number
        if "labels" not in self._said:
            self._check_class_names(current.num_outputs)
            self._explain(extractor)
        return errors

    def close(self, is_sanity_check: bool) -> Pass | None:
        """Return what was accumulated. All processes call this in step.

        Raises:
            ValueError: the first batch could not be scored, in one process or more: raised in all.
        """
        current, extractor, guess = self._pass, self._extractor, self._wrong_guess
        self.drop()
        if current is None or extractor is None:
            return None
        if not is_sanity_check and not current.errors and any(current.unseen.values()):
            self._warn_of_unseen(current, extractor)
        if self._stage is Stage.SETTLED:
            return current
        is_proven = self._stage is Stage.PROVEN
        error = None if is_proven else next(iter(current.errors.values()), None)
        everyone = [(is_proven, error, guess)] if self._alone else gathered(False, (is_proven, error, guess))
        proven, errors, guesses = zip(*everyone, strict=True)
        reason = first_reason(errors)
        if reason is not None:
            raise ValueError(reason)
        if any(proven):
            self._stage = Stage.SETTLED
        guess = first_reason(guesses)
        if guess is not None:
            self._drop_guess(extractor, guess)
        return current

    def _read(self, batch: Any, num_outputs: int | None) -> Labels | Exception:
        """Return the labels; an error is raised once it is known that the batch is not left out."""
        if batch is None:
            return ValueError("its batch is None, so there are no labels")
        try:
            if "labels" not in self._said:  # while the labels are still in the batch
                self._origin = describe_target(batch, self._target)
            return read_labels(batch, self._target, self._scoring.task, num_outputs, self._scoring.ignore_index)
        except Exception as error:
            return error

    def _without_padding(self, labels: Labels, batches: int, loader: int) -> Labels:
        """Return the labels of the samples that are data, and not repeated by a sampler."""
        number = labels.target.shape[0]
        real = rows_without_padding(self._loaders[loader], batches, number)
        if real is None and "padding" not in self._said:
            self._said.add("padding")
            warnings.warn(
                f"{self._name}: the rows of a batch are not the samples that the loader's sampler names, one by one, "
                "so padding cannot be detected, and padded rows are counted.",
                stacklevel=2,
            )
        return labels if real in (None, number) else labels._replace(target=labels.target.first(real))

    def _is_wrong_guess(self, errors: Errors) -> bool:
        """Return whether a head that was guessed is not called, where layers were."""
        extractor, current = self._extractor, self._pass
        if self._stage is Stage.SETTLED or extractor is None or current is None or not extractor.layers:
            return False
        is_scored = any(source == HEAD for source, _ in current.accumulators)
        return isinstance(errors.get(HEAD), NotCalledError) and extractor.is_head_guessed and not is_scored

    def _drop_guess(self, extractor: Extractor, reason: str) -> None:
        head = extractor.head
        extractor.drop_guess()
        if head is not None and head.outputs == extractor.num_outputs:
            reason += f" K = {head.outputs}, the number of its outputs, is kept; num_classes= gives another one."
        rank_zero_warn(f"{self._name} is logged for {', '.join(extractor.names)} only: {reason}")

    def _note(self, current: Pass, batch_idx: int, errors: Errors) -> None:
        """Remember what failed, and warn once for each cause."""
        new = {source: reason_of(error) for source, error in errors.items() if source not in current.errors}
        current.errors.update(new)
        for text in dict.fromkeys(new.values()):
            failed = [source for source in new if new[source] == text]
            is_all = None in failed or HEAD in failed
            key = self._name if is_all else " and ".join(f"{self._name}/{source}" for source in failed)
            if self._stage is Stage.UNPROVEN:
                what = "cannot be scored, which will end the run after this validation, in all processes"
            else:
                verb = "is" if is_all or len(failed) == 1 else "are"
                what = f"{verb} NaN for this validation, after an error in batch {batch_idx}"
            warnings.warn(f"{key} {what}: {text}", stacklevel=2)

    def _warn_of_unseen(self, current: Pass, extractor: Extractor) -> None:
        """Say which batches called none of the modules that are scored."""
        head = extractor.head
        other = "it ran another network, such as an averaged copy: name its head with head="
        if head is not None and head.guess is not None:
            other = f"it ran another network, such as an averaged copy, or another head than '{head.guess}': give head="
        elif head is not None and any(capture.side == "output" for capture in head.captures):
            other = "it called parts of the module and not self(…): name layers=[…], or give features="
        causes = [
            "validation_step left out its forward pass",
            other,
            "the model was compiled and run before the hooks were attached: call "
            'torch.compiler.set_stance("force_eager") or compile it anew',
        ]
        causes = causes[::-1] if extractor.is_compiled else causes
        for loader, unseen in current.unseen.items():
            batches = current.batches[loader]
            if not unseen:
                continue
            where = f" of loader {loader}" if len(current.batches) > 1 else ""
            what = f"{unseen} of {batches} batches{where} called none of the modules that are scored"
            key = self._name if head is not None else f"{self._name}/{extractor.names[0]}"
            if unseen < batches and not extractor.is_compiled:
                warnings.warn(f"{key}: {what}, and are left out.", stacklevel=2)
                continue
            if unseen < batches:  # compiled code may call hooks for batches of one shape only
                current.errors[None] = what
            warnings.warn(
                f"{key} is NaN: {what}. Likely causes, the likeliest first: {'; '.join(causes)}.", stacklevel=2
            )

    def _explain(self, extractor: Extractor) -> None:
        """Report once which labels and pooling were inferred: a wrong guess would still give a plausible number."""
        self._said.add("labels")
        found, rivals = self._origin
        poolings = extractor.poolings
        if len(poolings) > 2:
            poolings[2:] = ["…"]
        rank_zero_info("; ".join([f"LogMECallback: the labels are {found}", *poolings]) + ".")
        if rivals:
            rank_zero_warn(
                f"LogMECallback took {found} for the labels, and {rivals} could be as well; say which with target=."
            )

    def _check_class_names(self, num_outputs: int | None) -> None:
        if self._class_names is not None and len(self._class_names) != num_outputs:
            raise ValueError(
                f"class_names must hold one name for each of {num_outputs} outputs, got {len(self._class_names)}."
            )
