"""Predict the test samples of a probe with linear heads that are fitted to its training samples."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_logme.features.extractor import Errors
from lightning_logme.features.labels import Labels
from lightning_logme.scores.accuracy import METRICS, Accuracy, accuracy_of, decide
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.moments import moments_device
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.validation import Key, Result
from lightning_logme.utilities.distributed import first_reason, gathered, reason_of

Decisions = tuple[Tensor, Tensor, Tensor]  # what the head predicts, the targets, and the indices of the rows


class HeldOut:
    """The predictions of linear heads on test samples. The features are not kept.

    Args:
        results: the results of the training samples. Their evidence contains the heads.
        scoring: the options.
        device: the device of the features.

    Attributes:
        errors: why a source has no accuracy, by source; None stands for all sources.
        batches: number of batches that this process has read, by loader. There is one loader, 0.
    """

    def __init__(self, results: Mapping[Key, Result | None], scoring: Scoring, device: torch.device) -> None:
        self.scoring = scoring
        self.errors: dict[str | None, str] = {}
        self.batches: Counter[int] = Counter()
        self._results = results
        self._device = moments_device(device)
        self._heads: dict[str, Evidence] = {
            source: result.evidence
            for (source, _), result in results.items()
            if result is not None and not result.evidence.score.isnan()
        }
        self._decisions: defaultdict[str, list[Decisions]] = defaultdict(list)

    def add(self, rows: Mapping[str, Tensor], labels: Labels, positions: range) -> Errors:
        """Predict the rows of a batch, and return the errors of sources that failed. See :meth:`Pass.add`."""
        errors: Errors = {}
        target, index = labels.target, labels.target.index(positions)
        for source in self._heads.keys() & rows.keys():
            scoring = self.scoring
            try:
                head = self._heads[source] = self._heads[source].to(self._device)
                kept = target.rows(rows[source], head.weight.shape[1], scoring.normalize).to(self._device)
                decisions = decide(head.predict(kept.features), head, scoring.task)
                self._decisions[source].append((decisions.cpu(), kept.target.cpu(), index))
            except Exception as error:
                errors[source] = error
        return errors

    def tested(self, key: str, alone: bool) -> dict[Key, Result | None]:
        """Return the results with the accuracy on the test samples of all processes. All call this together.

        Args:
            key: the name of the test samples, for warnings.
            alone: whether the run has only one process.
        """
        everyone = gathered(alone, (dict(self._decisions), self.errors))
        unknown = Accuracy(METRICS[self.scoring.task])
        accuracies: dict[Key, Accuracy] = {}
        failed: dict[Key, str] = {}
        reasons = []
        for place, result in self._results.items():
            if result is None:
                continue
            source = place[0]
            accuracies[place] = unknown
            parts = [part for decisions, _ in everyone for part in decisions.get(source, [])]
            reason = first_reason([errors.get(source, errors.get(None)) for _, errors in everyone])
            if reason is not None:
                reasons.append(f"after an error: {reason}")
            elif parts:
                try:
                    decided, target, index = map(torch.cat, zip(*parts, strict=True))
                    accuracies[place] = accuracy_of(decided, target, index, result.evidence, self.scoring.task)
                except Exception as error:
                    failed[place] = reason_of(error)
            elif source in self._heads:
                reasons.append("because the loader gave no batch.")
        # All processes have the same decisions, but one may still fail, for example for lack of memory.
        for failures in gathered(alone, failed):
            accuracies.update(dict.fromkeys(failures, unknown))
            reasons += [f"after an error: {reason}" for reason in failures.values()]
        for reason in dict.fromkeys(reasons):
            warnings.warn(f"{key}: the accuracy is NaN, {reason}", stacklevel=2)
        return {
            place: result and result._replace(accuracy=accuracies[place]) for place, result in self._results.items()
        }
