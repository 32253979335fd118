"""Scoring of validations: pair captured features with the labels of each batch, and accumulate them."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_logme.features.extractor import HEAD, Errors, Extractor
from lightning_logme.features.hooks import NotCalledError
from lightning_logme.features.labels import Labels, TargetSpec, read_labels
from lightning_logme.features.outputs import decide_num_outputs
from lightning_logme.features.padding import rows_without_padding
from lightning_logme.scores.accumulator import Accumulator, accumulate
from lightning_logme.scores.accuracy import Accuracy, measure
from lightning_logme.scores.curve import CurvePoint, curve_of, segments
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.reduction import reduced
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.messages import Messages
from lightning_logme.utilities.compat import LightningModule, Trainer, rank_zero_warn, validation_loaders
from lightning_logme.utilities.distributed import Failure, first_reason, gathered, reason_of, release

Key = tuple[str, int]  # source of features, index of the loader


class Result(NamedTuple):
    """The result of a pass for one source of features.

    Attributes:
        evidence: the evidence of all samples, on the CPU.
        accuracy: the accuracy of its linear head; None with ``accuracy=False``.
        curve: a point for each doubling of the samples; empty without ``curve=True``.
    """

    evidence: Evidence
    accuracy: Accuracy | None
    curve: list[CurvePoint]


class Pass:
    """One pass over labelled samples, with an accumulator for each source of features and each loader.

    For a curve, each doubling of the samples is a segment. The sums of the first 32 samples plus those of the next 32
    give the score of the first 64, in any number of processes.

    Attributes:
        errors: why a source has no result, by source; None stands for all sources. Processes share them at the end.
        batches: number of batches that this process has read, by loader.
        rows: number of samples in these batches, by loader, padding included.
        unseen: number of batches, at the start of the pass, in which no scored module was called, by loader.
        accumulators: the sums, by source and loader.
    """

    def __init__(self, scoring: Scoring, rank: int = 0, world_size: int = 1, num_loaders: int = 1) -> None:
        self.scoring = scoring
        self.num_loaders = num_loaders
        self.errors: dict[str | None, str] = {}
        self.batches: Counter[int] = Counter()
        self.rows: Counter[int] = Counter()
        self.unseen: Counter[int] = Counter()
        self.accumulators: dict[Key, Accumulator] = {}
        self._rank, self._world_size = rank, world_size
        self._columns: dict[int, int] = {}  # K by loader
        self._scored: Counter[int] = Counter()  # number of rows of this process that count, by loader
        self._uneven: set[int] = set()  # loaders with batches that have more or fewer rows than samples

    def add(self, rows: Mapping[str, Tensor], labels: Labels, positions: range, loader: int = 0) -> Errors:
        """Add the rows of a batch, and return the errors of sources whose rows could not be added.

        Args:
            rows: features (n, D), or tokens (n, T, D), by source.
            labels: labels of the batch.
            positions: positions of its samples among those of all processes.
            loader: index of the loader.
        """
        target = labels.target
        num_outputs = self.num_outputs(loader) or decide_num_outputs(self.scoring.task, values=target.values) or 1
        self._columns[loader] = num_outputs
        scoring = replace(self.scoring, num_outputs=num_outputs)
        errors: Errors = {}
        segment = self._segment(len(target.values), positions, loader, num_outputs) if self.scoring.curve else 0
        index = target.index(positions)
        for source, features in rows.items():
            try:
                kept = target.rows(features, normalize=scoring.normalize)
                accumulate(self.accumulators, (source, loader), kept, scoring, segment, index)
            except Exception as error:
                errors[source] = error
        return errors

    def num_outputs(self, loader: int) -> int | None:
        """Return K of a loader, which may differ between loaders; None if no batch has shown it."""
        return self._columns.get(loader, self.scoring.num_outputs)

    def _segment(self, number: int, positions: range, loader: int, num_outputs: int) -> Tensor:
        """Return the segment of the curve to which each row belongs."""
        indices = torch.arange(positions.start, positions.stop, positions.step)
        if number != len(positions):  # tokens count one by one, and ignored rows do not count
            self._uneven.add(loader)
        if loader in self._uneven:
            # This process does not know how many rows of other processes count: it assumes as many as its own.
            indices = (self._scored[loader] + torch.arange(number)) * self._world_size + self._rank
        self._scored[loader] += number
        return segments(indices, self.scoring.task, num_outputs)

    def results(self, device: torch.device, alone: bool) -> dict[Key, Result | None]:
        """Return the result of each source and loader, summed over processes; None after an error.

        All processes call this together.

        Args:
            device: where the sums over processes are computed.
            alone: whether the run has only one process.
        """
        accumulators = self.accumulators if alone else self._reduced(device)
        results: dict[Key, Result | None] = {}
        failed: dict[Key, str] = {}
        for key in sorted(accumulators):
            if None not in self.errors and key[0] not in self.errors:
                try:
                    results[key] = self._result(accumulators[key])
                except Exception as error:
                    results[key], failed[key] = None, f"{type(error).__name__}: {error}"
        # All processes have the same sums, but one may still fail, for example for lack of memory.
        for rank, reasons in enumerate([] if alone else gathered(False, dict(failed))):
            for key, reason in reasons.items():
                failed.setdefault(key, f"{reason} (process {rank})")
        results.update(dict.fromkeys(failed))
        for reason in dict.fromkeys(failed.values()):
            warnings.warn(f"LogME is NaN, after an error: {reason}", stacklevel=2)
        return results

    def _reduced(self, device: torch.device) -> Mapping[Key, Accumulator]:
        """Share errors between processes, and return the accumulators summed over processes."""
        mine, everyone = set(self.errors), gathered(False, self.errors)
        try:
            accumulators, mismatches = reduced(self.accumulators, self.scoring.task, device, alone=False)
        except Failure as failure:  # raised in all processes
            self.errors[None] = str(failure)
            accumulators, mismatches = {}, {}
        for rank, errors in enumerate(everyone):
            for source, reason in errors.items():
                self.errors.setdefault(source, f"{reason} (process {rank})")
        for (source, _), reason in mismatches.items():
            self.errors.setdefault(source, reason)
        for reason in dict.fromkeys(reason for source, reason in self.errors.items() if source not in mine):
            rank_zero_warn(f"LogME is NaN for these samples, after an error: {reason}")
        return accumulators

    def _result(self, accumulator: Accumulator) -> Result:
        scoring = self.scoring
        evidence, spectrum = accumulator.decomposed(scoring.fit_intercept)
        accuracy = measure(accumulator.sample(), evidence, spectrum, scoring.task) if scoring.accuracy else None
        curve = curve_of(accumulator, scoring.fit_intercept, (evidence, accuracy)) if scoring.curve else []
        temperature = None if accuracy is None else accuracy.temperature
        return Result(replace(evidence.to("cpu"), temperature=temperature), accuracy, curve)


class Stage(Enum):
    """How far the validations of a run have come. Early errors end the run; later ones only cause a warning."""

    UNPROVEN = "this process has not scored a batch yet"
    PROVEN = "this process has scored a batch"
    SETTLED = "all processes know that the validation set can be scored"


class Validation:
    """The scoring of a callback's validations: pairs the features of each batch with its labels, and accumulates them.

    Args:
        class_names: names of the outputs; their number is checked.
        has_probes: whether there are probes; then an error of the labels suggests ``validation=False``.
    """

    def __init__(
        self, name: str, scoring: Scoring, target: TargetSpec, class_names: Sequence[str] | None, has_probes: bool
    ) -> None:
        self._scoring = scoring
        self._target = target
        self._class_names = class_names
        self._has_probes = has_probes
        self._messages = Messages(name)
        # State of a run
        self._alone = True  # whether this is the only process; several must raise together, or some would wait forever
        self._stage = Stage.UNPROVEN
        # State of a validation
        self._extractor: Extractor | None = None
        self._pass: Pass | None = None
        self._loaders: list[Any] = []
        self._step_fetches_batches = False  # whether labels are known only after validation_step
        self._wrong_guess: str | None = None  # why the guessed head is dropped
        # State of a batch
        self._labels: Labels | Exception | None = None

    def prepare(self, alone: bool) -> None:
        """Prepare for a new run, with one process or several."""
        self._alone, self._stage = alone, Stage.UNPROVEN

    def open(self, extractor: Extractor, trainer: Trainer, module: LightningModule) -> None:
        """Start a validation."""
        self._extractor, self._loaders = extractor, validation_loaders(trainer)
        scoring = replace(self._scoring, num_outputs=extractor.num_outputs)
        self._pass = Pass(scoring, trainer.global_rank, trainer.world_size, len(self._loaders))
        self._step_fetches_batches = "dataloader_iter" in inspect.signature(module.validation_step).parameters

    def drop(self) -> None:
        """Discard what has been accumulated."""
        self._extractor, self._pass, self._wrong_guess, self._labels = None, None, None, None

    def start_batch(self, batch: Any, loader: int) -> None:
        """Start to capture, and read the labels, which ``validation_step`` may remove from the batch."""
        if self._extractor is None or self._pass is None or None in self._pass.errors:
            return
        self._labels = None if self._step_fetches_batches else self._read(batch, self._pass.num_outputs(loader))
        self._extractor.start(self._labels if isinstance(self._labels, Labels) else None)

    def end_batch(self, trainer: Trainer, batch: Any, batch_idx: int, loader: int) -> None:
        """Add the features that were captured from a batch.

        It is no error if no scored module is called in the first batches of a loader: ``validation_step`` may skip the
        first batch, or the whole sanity check.

        Raises:
            Exception: the first batch cannot be scored. Later errors do not end the run.
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
                    "no scored module was called in this batch, unlike in earlier ones; only the first batches of a "
                    "validation can be left out"
                )
        except Exception as error:
            errors = {None: error}
        finally:
            extractor.stop()
            self._labels = None
        current.batches[loader] += 1
        current.unseen[loader] += is_first and not is_called
        if errors and self._is_wrong_guess(extractor, current, errors):
            self._wrong_guess = str(errors.pop(HEAD))
        if errors:
            self._note(current, batch_idx, errors)
        elif is_called and not current.errors and self._stage is Stage.UNPROVEN:
            self._stage = Stage.PROVEN

    def _add(self, extractor: Extractor, current: Pass, trainer: Trainer, batch: Any, loader: int) -> Errors:
        """Add the rows of a batch, and return the errors of sources that failed."""
        labels = self._read(batch, current.num_outputs(loader)) if self._step_fetches_batches else self._labels
        if not isinstance(labels, Labels):
            raise labels or ValueError("its labels are unknown")
        with trainer.precision_plugin.forward_context():
            rows, errors = extractor.rows(batch, labels)
        number, world_size = labels.target.shape[0], trainer.world_size
        real: int | None = number
        if world_size > 1:
            real = rows_without_padding(self._loaders[loader], current.batches[loader], number)
        if real is None:
            self._messages.warn_of_padding()
            real = number
        if real < number:
            labels = labels._replace(target=labels.target.first(real))
        # Processes take samples in turn, as in DistributedSampler.
        first = current.rows[loader] * world_size + trainer.global_rank
        errors |= current.add(rows, labels, range(first, first + real * world_size, world_size), loader)
        current.rows[loader] += number
        if not self._messages.are_labels_reported:
            num_outputs = current.num_outputs(loader)
            if self._class_names is not None and len(self._class_names) != num_outputs:
                raise ValueError(
                    f"class_names must have one name for each of {num_outputs} outputs, got {len(self._class_names)}."
                )
            self._messages.report_labels(extractor.poolings)
            widths = [accumulator.num_features for accumulator in current.accumulators.values()]
            self._messages.check_memory(widths * len(self._loaders))
        return errors

    def close(self, is_sanity_check: bool) -> Pass | None:
        """End the validation, and return what was accumulated. All processes call this together.

        Raises:
            ValueError: the first batch could not be scored in at least one process. All processes raise it.
        """
        current, extractor, guess = self._pass, self._extractor, self._wrong_guess
        self._extractor, self._pass, self._wrong_guess = None, None, None
        if current is None or extractor is None:
            return None
        if not is_sanity_check and not current.errors and any(current.unseen.values()):
            obstacle = self._messages.warn_of_unseen(current.unseen, current.batches, extractor)
            if obstacle is not None:
                current.errors[None] = obstacle
        if self._stage is not Stage.SETTLED:
            self._settle(current, extractor, guess)
        return current

    def _settle(self, current: Pass, extractor: Extractor, guess: str | None) -> None:
        """Agree with the other processes whether the validation set can be scored, and raise if it cannot."""
        is_proven = self._stage is Stage.PROVEN
        error = None if is_proven else next(iter(current.errors.values()), None)
        if not self._alone:
            proven, errors, guesses = zip(*gathered(False, (is_proven, error, guess)), strict=True)
            is_proven, error, guess = any(proven), first_reason(errors), first_reason(guesses)
        if error is not None:
            raise ValueError(error)
        if is_proven:
            self._stage = Stage.SETTLED
        if guess is not None:
            self._messages.warn_of_dropped_guess(extractor, guess)

    def _read(self, batch: Any, num_outputs: int | None) -> Labels | Exception:
        """Return the labels, or the error of reading them. The error is raised later, unless the batch is left out."""
        try:
            if not self._messages.are_labels_reported:
                self._messages.note_origin(batch, self._target)
            return read_labels(batch, self._target, self._scoring.task, num_outputs, self._scoring.ignore_index)
        except Exception as error:
            if self._has_probes and isinstance(error, ValueError):
                return ValueError(f"{error} To score only the probes, write validation=False.")
            return error

    def _is_wrong_guess(self, extractor: Extractor, current: Pass, errors: Errors) -> bool:
        """Return whether a guessed head was not called, although layers were called."""
        if self._stage is Stage.SETTLED or not extractor.layers or not extractor.is_head_guessed:
            return False
        is_scored = any(source == HEAD for source, _ in current.accumulators)
        return isinstance(errors.get(HEAD), NotCalledError) and not is_scored

    def _note(self, current: Pass, batch_idx: int, errors: Errors) -> None:
        """Raise the first error of a run; otherwise record what failed, and warn."""
        is_final = self._stage is Stage.UNPROVEN
        if is_final and self._alone:
            raise next(iter(errors.values()))
        new = {source: reason_of(error) for source, error in errors.items() if source not in current.errors}
        for error in errors.values():
            release(error)
        current.errors.update(new)
        self._messages.warn_of_errors(new, batch_idx, is_final)
