"""From a race, finished or not, to the ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_logme.curve import CurvePoint
from lightning_logme.ranking.jackknife import quantile_of_ties, standard_error, trailing
from lightning_logme.ranking.progress import Progress, Round
from lightning_logme.ranking.race import Race
from lightning_logme.ranking.result import Ended, Ranking, RankingRow


def standing(race: Race) -> Ranking:
    """Order the candidates: those still in the race by their scores, then the dropped, then those without a result."""
    comparable = _comparable(race)
    scores = {name: round_.logme for name, round_ in comparable.items()}
    replicates = {name: round_.replicates for name, round_ in comparable.items()}
    behind = trailing(scores, replicates, quantile_of_ties(len(race.progress)))
    tied = {name for name, score in scores.items() if not math.isnan(score)} - set(behind)

    def place(name: str) -> tuple[int, int, float]:
        rounds = race.progress[name].rounds
        round_ = comparable.get(name) or (rounds[-1] if rounds else None)
        if round_ is None or math.isnan(round_.logme):
            return 3, 0, 0.0
        group = 0 if name in comparable else 1 if name in race.dropped else 2
        return group, -round_.num_samples, -round_.logme

    names = sorted(race.progress, key=place)
    return Ranking(
        rows=[_row(race, name, name in tied) for name in names],
        evidence={name: race.evidence[name] for name in names if name in race.evidence},
        curves={
            name: [CurvePoint(r.num_samples, r.logme, r.gain) for r in race.progress[name].rounds] for name in names
        },
    )


def _comparable(race: Race) -> dict[str, Round]:
    """The last round that all have finished who are still in the race, of each of them."""
    rounds = {name: race.progress[name].rounds for name in race.running if race.progress[name].rounds}
    common = min(map(len, rounds.values()), default=0)
    return {name: finished[common - 1] for name, finished in rounds.items()}


def _row(race: Race, name: str, tied: bool) -> RankingRow:
    progress = race.progress[name]
    last = progress.rounds[-1] if progress.rounds else Round(0, math.nan, math.nan, [math.nan], 0)
    ended, message = _end(race, name, progress)
    return RankingRow(
        name=name,
        logme=last.logme,
        gain=last.gain,
        stderr=standard_error(last.replicates) if progress.rounds else math.nan,
        tied_with_best=tied,
        feature=_feature(progress.heads),
        num_features=progress.num_features,
        num_parameters=progress.num_parameters,
        num_samples=last.num_samples,
        seconds=progress.seconds,
        peak_memory=progress.peak_memory,
        ended=ended,
        message=message,
    )


def _end(race: Race, name: str, progress: Progress) -> tuple[Ended, str]:
    if name in race.failed:
        return "failed", race.failed[name]
    if name in race.dropped:
        return "dropped", race.dropped[name]
    if race.interrupted and name not in race.complete:
        return "interrupted", ""
    if math.isnan(progress.rounds[-1].logme):
        return "finished", "there is no evidence in these samples; a warning says why"
    if progress.constant:
        return "finished", "its features are the same for every sample"
    saturated = int(race.evidence[name].saturated.sum())
    if saturated:
        return "finished", f"a perfect fit of {saturated} outputs, whose evidence has no bound: are labels leaked?"
    return "finished", ""


def _feature(heads: Sequence[str] | None) -> str:
    """What was scored, in words; nothing where no batch has shown it."""
    if heads is None:
        return ""
    return "input of " + " and ".join(map(repr, heads)) if heads else "output"
