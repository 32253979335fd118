"""Round after round, twice the samples for those candidates that may still be the best."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_logme.features.isolation import same_generators
from lightning_logme.features.labels import Target
from lightning_logme.features.sampling import FIRST_SAMPLES, SAME_SAMPLES, Samples, total
from lightning_logme.ranking.candidate import Backbone, Candidate
from lightning_logme.ranking.report import Report
from lightning_logme.ranking.resume import Progress, Round, Score, Store, warn_of_restart, why_different
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.jackknife import jackknife, quantile_to_drop, trailing
from lightning_logme.scores.reduction import reduced
from lightning_logme.utilities.compat import Fabric
from lightning_logme.utilities.distributed import Failure, gathered, together

_CONSTANT = 1e-10  # of the features' mean square: a spread that is nothing but rounding


@dataclass(frozen=True)
class Rules:
    """What is the same for all candidates.

    Attributes:
        num_outputs: K.
        ignore_index: label of samples that do not count.
        fit_intercept: centre features and targets first.
        normalize: scale the features of each sample to length 1.
        race: whether candidates are dropped early.
        seed: of random weights.
    """

    num_outputs: int
    ignore_index: int | None
    fit_intercept: bool
    normalize: bool
    race: bool
    seed: int


class Part:
    """What this process has accumulated from one pass over a part of the samples.

    Attributes:
        accumulators: by source, with the block of each sample as the segment.
        seen: number of samples.
        labels: digest of their labels.
        skipped: digest of the labels of a stream that came before.
    """

    def __init__(self) -> None:
        self.accumulators: dict[str, Accumulator] = {}
        self.seen, self.labels, self.skipped = 0, 0, 0


class Race:
    """The candidates on their way through the samples.

    Attributes:
        samples: the same for all.
        progress: of each candidate.
        dropped: those that trailed too far, and by how much.
        failed: those that could not go on, and why.
        complete: those that have seen all samples.
        interrupted: whether it ended by Ctrl-C.
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
        self._rules = rules
        self._store = store if fabric.is_global_zero else None
        self._is_resumed = store is not None
        self._report = report
        self._labels: dict[int, int] = {}  # by round
        self._num_rows = len(candidates)
        self.progress = {name: Progress() for name in self._candidates}
        self.dropped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.complete: set[str] = set()
        self.interrupted = False

    @property
    def running(self) -> list[str]:
        """Candidates that may go on."""
        return [name for name in self._candidates if name not in self.dropped and name not in self.failed]

    def run(self) -> None:
        """Go on until one candidate is left, or the samples are used up, or Ctrl-C."""
        try:
            with same_generators():
                if self._is_resumed:
                    for name in self.running:
                        self._resume(name)
                if self._rules.race:
                    self._run_by_rounds()
                else:
                    for name in self.running:
                        self._advance(name, self._rounds())
        except KeyboardInterrupt:
            self.interrupted = True

    def _rounds(self) -> Iterable[tuple[int, int]]:
        """Return the number of each round, and of the samples that have been read at its end."""
        return enumerate(self.samples.rounds(self._rules.num_outputs))

    def _run_by_rounds(self) -> None:
        for index, stop in self._rounds():
            for name in self.running:
                self._advance(name, [(index, stop)])
            is_over = all(self.progress[name].seen < stop for name in self.running)
            if is_over or stop == self.samples.number:
                return
            self._drop(index)
            if self.dropped and len(self.running) == 1:
                return

    def _drop(self, index: int) -> None:
        """Drop the candidates all of whose sources trail the leader."""
        rounds = {name: self.progress[name].rounds[index] for name in self.running if self._has(name, index)}
        scores = {(name, source): score for name, one in rounds.items() for source, score in one.scores.items()}
        if len(rounds) < 2:
            return
        self._num_rows = max(self._num_rows, len(scores))
        behind = trailing(
            {row: score.logme for row, score in scores.items()},
            {row: score.replicates for row, score in scores.items()},
            quantile_to_drop(self._num_rows, index + 1),
        )
        for name, one in rounds.items():
            errors = [behind.get((name, source)) for source in one.scores]
            if None not in errors:
                self.dropped[name] = (
                    f"{min(error for error in errors if error is not None):.1f} standard errors behind at "
                    f"{one.num_samples} samples"
                )
                self._finish(name)
                self._report.line(f"{name} is dropped: {self.dropped[name]}.")

    def _has(self, name: str, index: int) -> bool:
        return len(self.progress[name].rounds) > index

    def _advance(self, name: str, rounds: Iterable[tuple[int, int]]) -> None:
        """Take a candidate through rounds it has not been through; what fails here is its failure alone."""
        started, backbone = time.perf_counter(), None
        with self._failures(name), ExitStack() as stack:
            for index, stop in rounds:
                if name in self.complete:
                    return
                if self._has(name, index):
                    continue
                if self.progress[name].rounds and not self.progress[name].accumulators:
                    # A saved result of a candidate that was dropped, and has to go on now.
                    self.progress[name] = Progress()
                    return self._advance(name, itertools.islice(self._rounds(), index + 1))
                backbone = backbone or stack.enter_context(self._built(name))
                self._run_round(name, backbone, index, stop, started)
                started = time.perf_counter()

    @contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        """Note that a candidate fails, in all processes, and let the others go on."""
        try:
            yield
        except Failure as failure:
            self.failed[name] = str(failure)
            self._report.line(f"{name} failed: {failure}")
        finally:
            if self._fabric.device.type == "cuda":
                torch.cuda.empty_cache()  # or the next candidate could not have the memory of this one

    @contextmanager
    def _built(self, name: str) -> Iterator[Backbone]:
        """Build the network of a candidate. A factory must give the same weights every time."""
        fabric, candidate, before = self._fabric, self._candidates[name], self.progress[name]
        if fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(fabric.device)
        with ExitStack() as stack:
            with together(self._alone):
                backbone = stack.enter_context(candidate.on_device(fabric, self._rules.seed, before.heads))
                cause = None
                if before.first and candidate.is_rebuilt:
                    cause = why_different(before.first, self._first_features(backbone))
                if cause is not None:
                    raise ValueError(
                        f"its factory made another network than before ({cause}); a factory must give the same weights "
                        "every time, as it does where it draws them from torch's generator, which is seeded."
                    )
            yield backbone

    def _first_features(self, backbone: Backbone) -> dict[str, Tensor]:
        """Return the features of the first samples, by which a network is recognised."""
        first, target = self.samples.first, self._target(self.samples.first.target)
        rows = backbone.rows(first.batch, target, self._fabric)
        few = target.first(min(FIRST_SAMPLES, len(first.target)))
        return {source: few.rows(features).features.float().cpu() for source, features in rows.items()}

    def _target(self, labels: Tensor) -> Target:
        return Target.checked(labels, self.samples.task, self._rules.num_outputs, self._rules.ignore_index)

    def _run_round(self, name: str, backbone: Backbone, index: int, stop: int, started: float) -> None:
        """Take a candidate through one round."""
        before, samples = self.progress[name], self.samples
        with self._report.bar(name, before.seen, stop) as count, together(self._alone):
            part = self._collect(backbone, before.seen, stop, count)
            if not before.first and (self._is_resumed or (self._rules.race and self._candidates[name].is_rebuilt)):
                before.first = self._first_features(backbone)
        counts = zip(*gathered(self._alone, (part.seen, part.labels, part.skipped)), strict=True)
        seen, labels, skipped = map(total, counts)
        earlier = before.rounds[-1].labels if before.rounds else 0
        self._check_labels(name, samples.number is not None or skipped == earlier)
        if seen == 0:
            self._check_labels(name, bool(before.rounds))
            self.complete.add(name)  # the stream had ended with the round before
            self._finish(name)
            return
        labels = total((earlier, labels))
        self._check_labels(name, self._labels.setdefault(index, labels) == labels)
        seen += before.seen
        samples.check_number(seen)
        new, mismatches = reduced(part.accumulators, samples.task, self._fabric.device, self._alone)
        with together(self._alone):
            for reason in mismatches.values():
                raise ValueError(reason)
            self._evaluate(before, new, seen, labels)
        before.num_parameters = backbone.num_parameters
        before.heads = None if backbone.heads is None else list(backbone.heads)
        if self._fabric.device.type == "cuda":
            before.peak_memory = torch.cuda.max_memory_allocated(self._fabric.device)
        before.seconds += time.perf_counter() - started
        self._show(name, before.rounds[-1])
        if seen == samples.number or seen < stop:
            self.complete.add(name)
            self._finish(name)

    def _collect(self, backbone: Backbone, start: int, stop: int, count: Callable[[int], object]) -> Part:
        """Accumulate this process's batches of the samples from ``start`` to ``stop``."""
        part, rules, fabric = Part(), self._rules, self._fabric
        for portion in self.samples.portions(start, stop, fabric.global_rank, fabric.world_size):
            if portion.start < start:
                part.skipped += portion.digest()
                continue
            number, target = len(portion.target), self._target(portion.target)
            block, index = target.spread(portion.block), target.index(range(portion.start, portion.start + number))
            for source, features in backbone.rows(portion.batch, target, fabric).items():
                rows = target.rows(features, normalize=rules.normalize)
                if source not in part.accumulators:
                    width, device = rows.features.shape[1], rows.features.device
                    part.accumulators[source] = Accumulator(self.samples.task, width, rules.num_outputs, device)
                part.accumulators[source].add(rows, block, index)
            part.seen += number
            part.labels += portion.digest()
            count(number)
        return part

    def _evaluate(self, before: Progress, new: dict[str, Accumulator], seen: int, labels: int) -> None:
        """Add what a round has accumulated, and score everything so far."""
        scores = {}
        for source, accumulator in new.items():
            if source in before.accumulators:
                accumulator.merge_(before.accumulators[source].to(accumulator.device))
            evidence, replicates = jackknife(accumulator, self._rules.fit_intercept)
            scores[source] = Score(float(evidence.score), float(evidence.gain), replicates)
            before.evidence[source] = evidence.to("cpu")
            before.accumulators[source] = accumulator.to("cpu")
        before.constant = [source for source, accumulator in new.items() if _is_constant(accumulator)]
        number = max(evidence.num_samples for evidence in before.evidence.values())
        before.rounds.append(Round(seen, number, labels, scores))

    def _finish(self, name: str) -> None:
        """Give up the accumulators of a candidate that nothing will be added to, and keep its results."""
        self.progress[name].accumulators = {}
        if self._store is not None:
            self._store.save(self._candidates[name], self.progress[name])

    def _show(self, name: str, one: Round) -> None:
        scores = {row_name(name, source): (score.logme, score.gain) for source, score in one.scores.items()}
        self._report.point(scores, one.num_samples)

    def _check_labels(self, name: str, is_same: bool) -> None:
        """Raise where samples differ between candidates: their scores do not compare."""
        if not is_same:
            raise ValueError(f"{name!r} was given other labels than when samples were read before; {SAME_SAMPLES}")

    def _resume(self, name: str) -> None:
        """Take up what the folder holds of a candidate, if it is still the same."""
        candidate = self._candidates[name]
        saved = self._fabric.broadcast(None if self._store is None else self._store.load(candidate))
        if saved is None:
            return
        with self._failures(name), self._built(name) as backbone:
            with together(self._alone):
                cause = why_different(saved.first, self._first_features(backbone))
            if self._fabric.broadcast(cause) is not None:
                if self._store is not None:
                    warn_of_restart(candidate, str(cause))
                return
            self.progress[name] = saved
            if saved.seen == self.samples.number:
                self.complete.add(name)
            for index, one in enumerate(saved.rounds):
                self._check_labels(name, self._labels.setdefault(index, one.labels) == one.labels)
                self._show(name, one)


def row_name(candidate: str, source: str) -> str:
    """Return the name of the row of one source of a candidate."""
    return f"{candidate}/{source}" if source else candidate


def _is_constant(accumulator: Accumulator) -> bool:
    features = accumulator.sample()[0].features.double()
    square = features.square().sum()
    return bool((features - features.mean(0)).square().sum() <= _CONSTANT * square)
