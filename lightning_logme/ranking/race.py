"""Round after round, twice the samples for those candidates that may still be the best."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from lightning_logme.evidence import Evidence
from lightning_logme.moments import Moments
from lightning_logme.packages import Fabric
from lightning_logme.ranking.candidate import Backbone, Candidate
from lightning_logme.ranking.collect import collect
from lightning_logme.ranking.jackknife import leave_one_out, quantile_to_drop, trailing
from lightning_logme.ranking.processes import Failure, everyone, summed, together
from lightning_logme.ranking.progress import Progress, Round, Store, is_same
from lightning_logme.ranking.report import Report
from lightning_logme.samples import SAME_SAMPLES, Samples, total
from lightning_logme.undisturbed import same_generators

# Of the features' mean square: a spread that is nothing but rounding.
_CONSTANT = 1e-10


@dataclass(frozen=True)
class Rules:
    """What is the same for all candidates."""

    num_outputs: int
    fit_intercept: bool
    race: bool
    seed: int


class Race:
    """The candidates on their way through the samples.

    Attributes:
        samples: the same for all.
        progress: of each candidate.
        evidence: of each candidate that has finished a round.
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
        self._candidates = {candidate.name: candidate for candidate in candidates}
        self.samples = samples
        self._rules = rules
        self._store = store
        self._report = report
        self._labels: dict[int, int] = {}  # by round
        self.progress = {name: Progress() for name in self._candidates}
        self.evidence: dict[str, Evidence] = {}
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
                self._resume()
                if self._rules.race:
                    self._run_by_rounds()
                else:
                    for name in self.running:
                        self._advance(name, enumerate(self.samples.rounds(self._rules.num_outputs)))
        except KeyboardInterrupt:
            self.interrupted = True

    def _run_by_rounds(self) -> None:
        for index, stop in enumerate(self.samples.rounds(self._rules.num_outputs)):
            for name in self.running:
                self._advance(name, [(index, stop)])
            ended = stop == self.samples.number or all(self.progress[name].num_samples < stop for name in self.running)
            if ended:
                return
            self._drop(index)
            if self.dropped and len(self.running) == 1:
                return

    def _drop(self, index: int) -> None:
        rounds = {name: self.progress[name].rounds[index] for name in self.running if self._has(name, index)}
        if len(rounds) < 2:
            return
        scores = {name: round_.logme for name, round_ in rounds.items()}
        replicates = {name: round_.replicates for name, round_ in rounds.items()}
        behind = trailing(scores, replicates, quantile_to_drop(len(self._candidates), index + 1))
        for name, errors in behind.items():
            self._give_up_moments(name)
            self.dropped[name] = f"{errors:.1f} standard errors behind at {rounds[name].num_samples} samples"
            self._report.line(f"{name} is dropped: {self.dropped[name]}.")

    def _has(self, name: str, index: int) -> bool:
        return len(self.progress[name].rounds) > index

    def _advance(self, name: str, rounds: Iterable[tuple[int, int]]) -> None:
        """Take a candidate through rounds it has not been through; what fails here is its failure alone."""
        try:
            with ExitStack() as stack:
                backbone = None
                started = time.perf_counter()
                for index, stop in rounds:
                    if self._has(name, index):
                        continue
                    backbone = backbone or self._build(name, stack)
                    if not self._run_round(name, backbone, index, stop, started):
                        return
                    started = time.perf_counter()
        except Failure as failure:
            self._fail(name, failure)
        finally:
            if self._fabric.device.type == "cuda":
                torch.cuda.empty_cache()  # or what one candidate had could not be had by the next

    def _fail(self, name: str, failure: Failure) -> None:
        self.failed[name] = str(failure)
        self._report.line(f"{name} failed: {failure}")

    def _build(self, name: str, stack: ExitStack) -> Backbone:
        if self._fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._fabric.device)
        candidate, rules = self._candidates[name], self._rules
        ready = candidate.on_device(self._fabric, rules.seed, self.samples.task, self.progress[name].heads)
        backbone = together(self._fabric, lambda: stack.enter_context(ready))
        known = self.progress[name].fingerprint
        if known not in (None, backbone.fingerprint):
            raise Failure(
                "its factory made another network than before; a factory must give the same weights every time, as it "
                "does where it draws them from torch's generator, which is seeded."
            )
        return backbone

    def _run_round(self, name: str, backbone: Backbone, index: int, stop: int, started: float) -> bool:
        """Take a candidate through one round; whether there can be another one."""
        fabric, samples, rules, before = self._fabric, self.samples, self._rules, self.progress[name]
        portions = samples.portions(before.num_samples, stop, fabric.global_rank, fabric.world_size)
        with self._report.bar(name, before.num_samples, stop) as count:
            part = together(
                fabric,
                lambda: collect(backbone, portions, before.num_samples, samples.task, rules.num_outputs, fabric, count),
            )
        labels, skipped = map(total, zip(*everyone(fabric, (part.labels, part.skipped)), strict=True))
        seen = before.rounds[-1].labels if before.rounds else 0
        self._check_labels(name, samples.number is not None or skipped == seen)
        labels = total((seen, labels))
        new = summed(fabric, part.blocks, rules.num_outputs)
        if not new:
            self._check_labels(name, bool(before.rounds))
            self.complete.add(name)  # the stream had ended with the round before
            self._give_up_moments(name)
            return False
        evidence, replicates, blocks = together(fabric, lambda: self._evaluate(new, before.blocks))
        number = evidence.num_samples
        samples.check_number(number)
        self._check_labels(name, self._labels.setdefault(index, labels) == labels)
        finished = Round(number, float(evidence.score), float(evidence.gain), replicates, labels)
        self.evidence[name] = evidence
        self.progress[name] = replace(
            before,
            rounds=[*before.rounds, finished],
            blocks=blocks,
            num_features=blocks[0].num_features,
            constant=_is_constant(Moments.sum(blocks)),
            probe=part.probe if before.probe is None else before.probe,
            fingerprint=backbone.fingerprint,
            num_parameters=backbone.num_parameters,
            heads=before.heads if backbone.heads is None else list(backbone.heads),
            seconds=before.seconds + time.perf_counter() - started,
            peak_memory=torch.cuda.max_memory_allocated(fabric.device) if fabric.device.type == "cuda" else None,
        )
        if self._store is not None and fabric.is_global_zero:
            self._store.save(self._candidates[name], self.progress[name])
        self._report.point(name, finished)
        if number == samples.number or number < stop:
            self.complete.add(name)
            self._give_up_moments(name)
        return number >= stop

    def _give_up_moments(self, name: str) -> None:
        """Of a candidate that nothing will be added to: they are 8 D² numbers."""
        self.progress[name] = replace(self.progress[name], blocks=[])

    def _evaluate(self, new: list[Moments], before: list[Moments]) -> tuple[Evidence, list[float], list[Moments]]:
        device = new[0].gram.device
        blocks = [added.add_(old.to(device)) for added, old in zip(new, before, strict=True)] if before else new
        if not all(bool(torch.isfinite(block.gram.diagonal()).all()) for block in blocks):
            raise ValueError("the features contain NaN or Inf")
        evidence, replicates = leave_one_out(blocks, self.samples.task, self._rules.fit_intercept)
        return evidence.to("cpu"), replicates.tolist(), [block.to("cpu") for block in blocks]

    def _check_labels(self, name: str, same: bool) -> None:
        """Scores of different samples do not compare."""
        if not same:
            raise ValueError(f"{name!r} was given other labels than when samples were read before; {SAME_SAMPLES}")

    def _resume(self) -> None:
        """Take up what a folder holds of candidates that are still the same."""
        if self._store is None:
            return
        for name, candidate in self._candidates.items():
            fabric = self._fabric
            saved = fabric.broadcast(self._store.load(candidate) if fabric.is_global_zero else None)
            if saved is None:
                continue
            try:
                with ExitStack() as stack:
                    backbone = self._build(name, stack)
                    first = self.samples.first()
                    features = together(fabric, lambda: backbone.features(first.batch, first.target, fabric))  # noqa: B023
                    same = is_same(candidate, saved, backbone.fingerprint, features, first.target)
            except Failure as failure:
                self._fail(name, failure)
                continue
            if fabric.broadcast(same):
                self.progress[name] = saved
                self.evidence[name] = Evidence.from_moments(
                    Moments.sum(saved.blocks), self.samples.task, self._rules.fit_intercept
                )
                if saved.num_samples == self.samples.number:
                    self.complete.add(name)
                for index, round_ in enumerate(saved.rounds):
                    self._check_labels(name, self._labels.setdefault(index, round_.labels) == round_.labels)
                    self._report.point(name, round_)


def _is_constant(moments: Moments) -> bool:
    square = float(moments.gram.diagonal().sum())
    return square - float(moments.feature_sum.square().sum() / moments.count) <= _CONSTANT * square
