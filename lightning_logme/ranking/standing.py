"""From a race, finished or not, to the ranking."""

from __future__ import annotations

import math

from lightning_logme.features.extractor import HEAD
from lightning_logme.ranking.race import Race
from lightning_logme.ranking.result import Ended, Ranking, RankingRow, in_words, row_name
from lightning_logme.ranking.resume import Progress, Round, Score
from lightning_logme.scores.curve import CurvePoint
from lightning_logme.scores.jackknife import quantile_of_ties, standard_error, trailing

_NO_SCORE = Score(math.nan, math.nan, [math.nan])


def standing(race: Race) -> Ranking:
    """Order the rows: those of candidates still in the race by score, then of the dropped, then without a result."""
    comparable = _comparable(race)
    scores = {(name, source): score for name, one in comparable.items() for source, score in one.scores.items()}
    sources = {
        name: list(progress.rounds[-1].scores) if progress.rounds else [HEAD]
        for name, progress in race.progress.items()
    }
    pairs = [(name, source) for name, listed in sources.items() for source in listed]
    behind = trailing(
        {pair: score.logme for pair, score in scores.items()},
        {pair: score.replicates for pair, score in scores.items()},
        quantile_of_ties(len(pairs)),
    )

    def place(pair: tuple[str, str]) -> tuple[int, int, float]:
        name, source = pair
        rounds = race.progress[name].rounds
        one = comparable.get(name) or (rounds[-1] if rounds else None)
        if one is None or math.isnan(one.scores[source].logme):
            return 3, 0, 0.0
        group = 0 if name in comparable else 1 if name in race.dropped else 2
        return group, -one.num_samples, -one.scores[source].logme

    pairs.sort(key=place)
    tied = {pair for pair, score in scores.items() if not math.isnan(score.logme)} - set(behind)
    return Ranking(
        rows=[_row(race, *pair, pair in tied) for pair in pairs],
        evidence={
            row_name(name, source): race.progress[name].evidence[source]
            for name, source in pairs
            if source in race.progress[name].evidence
        },
        curves={
            row_name(name, source): [
                CurvePoint(one.num_samples, one.scores[source].logme, one.scores[source].gain)
                for one in race.progress[name].rounds
            ]
            for name, source in pairs
        },
    )


def _comparable(race: Race) -> dict[str, Round]:
    """Return the last round that all candidates still in the race have finished, of each of them."""
    rounds = {name: race.progress[name].rounds for name in race.running if race.progress[name].rounds}
    common = min(map(len, rounds.values()), default=0)
    return {name: finished[common - 1] for name, finished in rounds.items()}


def _row(race: Race, name: str, source: str, tied: bool) -> RankingRow:
    progress = race.progress[name]
    score = progress.rounds[-1].scores[source] if progress.rounds else _NO_SCORE
    ended, message = _end(race, name, source, progress)
    evidence = progress.evidence.get(source)
    return RankingRow(
        name=row_name(name, source),
        logme=score.logme,
        gain=score.gain,
        stderr=standard_error(score.replicates) if progress.rounds else math.nan,
        tied_with_best=tied,
        feature=in_words(source, progress.heads),
        num_features=None if evidence is None else evidence.weight.shape[1],
        num_parameters=progress.num_parameters,
        num_samples=progress.num_samples,
        seconds=progress.seconds,
        peak_memory=progress.peak_memory,
        ended=ended,
        message=message,
    )


def _end(race: Race, name: str, source: str, progress: Progress) -> tuple[Ended, str]:
    if name in race.failed:
        return "failed", race.failed[name]
    if name in race.dropped:
        return "dropped", race.dropped[name]
    if race.interrupted and not progress.is_complete:
        return "interrupted", ""
    if math.isnan(progress.rounds[-1].scores[source].logme):
        return "finished", "there is no evidence in these samples; a warning says why"
    if source in progress.constant:
        return "finished", "its features are the same for every sample"
    saturated = int(progress.evidence[source].saturated.sum())
    if saturated:
        return "finished", f"a perfect fit of {saturated} outputs, whose evidence has no bound: are labels leaked?"
    return "finished", ""
