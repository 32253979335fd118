"""The race: in each round, the candidates that may still be the best see twice as many samples."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from lightning_logme.features.isolation import same_generators
from lightning_logme.features.sampling import SAME_SAMPLES, Samples, total
from lightning_logme.ranking.candidate import Backbone, Candidate
from lightning_logme.ranking.collect import Collected, Rules, collect, first_samples, is_constant, score
from lightning_logme.ranking.comparison import Comparison
from lightning_logme.ranking.report import Report
from lightning_logme.ranking.result import METRIC_NAMES, in_words, row_name
from lightning_logme.ranking.resume import (
    FirstSamples,
    Progress,
    Round,
    Score,
    Store,
    warn_of_restart,
)
from lightning_logme.scores.accuracy import METRICS
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.jackknife import quantile_to_drop
from lightning_logme.scores.reduction import reduced
from lightning_logme.utilities.compat import Fabric
from lightning_logme.utilities.distributed import Failure, gathered, together


class Race:
    """A race of candidates, which see more and more of the same samples until one candidate is left.

    Args:
        candidates: candidates with different names.
        store: folder for results of candidates that finished or were dropped; None saves nothing.

    Attributes:
        progress: the state of each candidate, by name.
        rules: the settings that all candidates share.
        dropped: how far a dropped candidate was behind, by name.
        failed: why a candidate failed, by name.
        interrupted: whether Ctrl-C ended the race.
    """

    def __init__(
        self,
        fabric: Fabric,
        candidates: Sequence[Candidate],
        samples: Samples,
        rules: Rules,
        store: Store | None,
        report: Report,
    ) -> None:
        self._fabric = fabric
        self._alone = fabric.world_size == 1
        self._candidates = {candidate.name: candidate for candidate in candidates}
        self.samples = samples
        self.rules = rules
        self._store = store if fabric.is_global_zero else None
        self._is_resumed = store is not None
        self._report = report
        self._labels: dict[int, int] = {}  # digest of the labels, by round
        self._num_rows = len(candidates)
        self.progress = {name: Progress() for name in self._candidates}
        self.dropped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.interrupted = False

    @property
    def running(self) -> list[str]:
        """The names of the candidates that have neither been dropped nor failed."""
        return [name for name in self._candidates if name not in self.dropped and name not in self.failed]

    def run(self) -> None:
        """Run until one candidate is left, the samples are used up, or the user presses Ctrl-C."""
        try:
            with same_generators():
                if self._is_resumed:
                    for name in self.running:
                        self._resume(name)
                if self.rules.race:
                    self._run_by_rounds()
                else:
                    for name in self.running:
                        self._advance(name)
                for name in self.running:
                    self._finish(name)
        except KeyboardInterrupt:
            self.interrupted = True

    def _rounds(self) -> Iterable[tuple[int, int]]:
        """Yield the index of each round, and the number of samples that have been read at its end."""
        return enumerate(self.samples.rounds(self.rules.scoring.num_outputs))

    def _run_by_rounds(self) -> None:
        for index, stop in self._rounds():
            for name in self.running:
                self._advance(name, index + 1)
            if stop == self.samples.number or all(self.progress[name].seen < stop for name in self.running):
                return
            self._drop(index)
            if self.dropped and len(self.running) == 1:
                return

    def _drop(self, index: int) -> None:
        """Drop each candidate whose rows are all significantly behind the leader."""
        rounds = {
            name: self.progress[name].rounds[index] for name in self.running if len(self.progress[name].rounds) > index
        }
        self._num_rows = max(self._num_rows, sum(len(one.scores) for one in rounds.values()))
        comparison, metric = Comparison.of(rounds, self.rules.rank_by), METRICS[self.rules.scoring.task]
        compared = f" in {METRIC_NAMES[metric]}" if self.rules.rank_by == "accuracy" else ""
        behind = comparison.behind(quantile_to_drop(self._num_rows, index + 1))
        for name, one in rounds.items():
            known = [row for row in comparison.scores if row[0] == name]
            if known and all(row in behind for row in known):
                distance = f"{min(behind[row] for row in known):.1f} standard errors behind{compared}"
                remark = comparison.remark(max(known, key=comparison.value), metric)
                self.dropped[name] = f"{distance} at {one.num_samples} samples{remark}"
                self._finish(name)
                self._report.line(f"{name} is dropped: {self.dropped[name]}.")

    def _advance(self, name: str, until: int | None = None) -> None:
        """Run a candidate until it has finished ``until`` rounds or seen all samples."""
        before, started = self.progress[name], time.perf_counter()
        if before.is_complete or (until is not None and len(before.rounds) >= until):
            return
        if not before.accumulators:
            # An earlier ranking dropped this candidate, and the folder holds only its results, so the candidate starts
            # again.
            before = self.progress[name] = Progress()
        with self._failures(name), self._built(name) as backbone:
            for index, stop in itertools.islice(self._rounds(), len(before.rounds), until):
                self._run_round(name, backbone, index, stop, started)
                if self.progress[name].is_complete:
                    return
                started = time.perf_counter()

    @contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        """Record the failure of a candidate in all processes, and let the other candidates go on."""
        try:
            yield
        except Failure as failure:
            self.failed[name] = str(failure)
            self.progress[name].accumulators = {}
            self._report.line(f"{name} failed: {failure}")
        finally:
            if self._fabric.device.type == "cuda":
                torch.cuda.empty_cache()  # so that the next candidate can use this one's memory

    @contextmanager
    def _built(self, name: str) -> Iterator[Backbone]:
        """Build the network of a candidate, and check that a factory gives the same weights every time."""
        candidate, before = self._candidates[name], self.progress[name]
        if self._fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._fabric.device)
        with ExitStack() as stack:
            with together(self._alone):
                backbone = stack.enter_context(candidate.on_device(self._fabric, self.rules.seed, before.heads))
                if before.first is not None and candidate.is_rebuilt:
                    cause = before.first.difference(self._first(backbone))
                    if cause is not None:
                        raise ValueError(
                            f"its factory built a different network this time ({cause}); it must give the same weights "
                            "every time, for example by drawing them from torch's generator, which is seeded."
                        )
            yield backbone

    def _first(self, backbone: Backbone) -> FirstSamples:
        return first_samples(backbone, self.samples, self.rules, self._fabric)

    def _run_round(self, name: str, backbone: Backbone, index: int, stop: int, started: float) -> None:
        """Run a candidate through one round. Its progress changes only when the round has succeeded."""
        before, first = self.progress[name], self.progress[name].first
        with self._report.bar(name, before.seen, stop) as count, together(self._alone):
            collected = collect(backbone, self.samples, self.rules, self._fabric, before.seen, stop, count)
            if first is None and (self._is_resumed or (self.rules.race and self._candidates[name].is_rebuilt)):
                first = self._first(backbone)
        seen, labels = self._agree(name, index, before, collected)
        if seen == before.seen:  # the stream ended exactly at the end of the previous round
            before.is_complete = True
            self._finish(name)
            return
        scores, evidence = self._score(backbone, before, collected)
        num_samples = max(whole.num_samples for whole in evidence.values())
        self.progress[name] = Progress(
            [*before.rounds, Round(seen, num_samples, labels, scores)],
            evidence,
            collected.accumulators,
            first,
            None if backbone.heads is None else list(backbone.heads),
            [source for source, accumulator in collected.accumulators.items() if is_constant(accumulator)],
            backbone.num_parameters,
            before.seconds + time.perf_counter() - started,
            self._peak_memory(before),
            is_complete=seen == self.samples.number or seen < stop,
        )
        self._show(name, self.progress[name].rounds[-1])
        if self.progress[name].is_complete:
            self._finish(name)

    def _agree(self, name: str, index: int, before: Progress, collected: Collected) -> tuple[int, int]:
        """Return the number of samples that all processes have read, and the digest of their labels.

        Raises:
            ValueError: the labels differ from those of other candidates, or there are too few samples.
        """
        counts = zip(*gathered(self._alone, (collected.seen, collected.labels, collected.skipped)), strict=True)
        number, labels, skipped = map(total, counts)
        earlier = before.rounds[-1].labels if before.rounds else 0
        self._check_labels(name, self.samples.number is not None or skipped == earlier)
        if number == 0:
            self._check_labels(name, bool(before.rounds))
            return before.seen, earlier
        labels = total((earlier, labels))
        self._check_labels(name, self._labels.setdefault(index, labels) == labels)
        self.samples.check_number(before.seen + number)
        return before.seen + number, labels

    def _score(
        self, backbone: Backbone, before: Progress, collected: Collected
    ) -> tuple[dict[str, Score], dict[str, Evidence]]:
        """Add up the sums of all processes, and return score and evidence of all samples so far, by source."""
        device, task = self._fabric.device, self.samples.task
        collected.accumulators, mismatches = reduced(collected.accumulators, task, device, self._alone)
        with together(self._alone):
            for source, reason in mismatches.items():
                raise ValueError(f"{in_words(source, backbone.heads)}: {reason}")
            scores, evidence = {}, {}
            fit_intercept = self.rules.scoring.fit_intercept
            for source, one, whole in score(collected.accumulators, before.accumulators, fit_intercept):
                scores[source], evidence[source] = one, whole
        return scores, evidence

    def _peak_memory(self, before: Progress) -> int | None:
        if self._fabric.device.type != "cuda":
            return None
        return max(before.peak_memory or 0, torch.cuda.max_memory_allocated(self._fabric.device))

    def _finish(self, name: str) -> None:
        """Save the results of a candidate that is finished or dropped, and free its accumulators."""
        if self.progress[name].accumulators:
            self.progress[name].accumulators = {}
            if self._store is not None:
                self._store.save(self._candidates[name], self.progress[name])

    def _show(self, name: str, one: Round) -> None:
        metric = METRICS[self.rules.scoring.task]
        for source, found in one.scores.items():
            values = {"logme": found.logme, "gain": found.gain, metric: found.accuracy}
            self._report.point(row_name(name, source), values, one.num_samples)

    def _check_labels(self, name: str, is_same: bool) -> None:
        """Raise if samples differ between candidates, because their scores are then not comparable."""
        if not is_same:
            raise ValueError(f"the labels of {name!r} differ from those of an earlier pass; {SAME_SAMPLES}")

    def _resume(self, name: str) -> None:
        """Load the results of a candidate from the folder, if its first features are still the same."""
        candidate = self._candidates[name]
        saved = self._fabric.broadcast(None if self._store is None else self._store.load(candidate))
        if saved is None or saved.first is None:
            return
        with self._failures(name), self._built(name) as backbone:
            with together(self._alone):
                cause = saved.first.difference(self._first(backbone))
            if self._fabric.broadcast(cause) is not None:
                if self._store is not None:
                    warn_of_restart(candidate, str(cause))
                return
            self.progress[name] = saved
            for index, one in enumerate(saved.rounds):
                self._check_labels(name, self._labels.setdefault(index, one.labels) == one.labels)
                self._show(name, one)
