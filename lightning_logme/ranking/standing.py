"""The ranking that results from a race, whether it has ended or was interrupted."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_logme.features.extractor import HEAD
from lightning_logme.ranking.comparison import Comparison, value_of
from lightning_logme.ranking.race import Race
from lightning_logme.ranking.result import Ended, Ranking, RankingRow, in_words, row_name
from lightning_logme.ranking.resume import Progress, Round, Score
from lightning_logme.scores.accuracy import METRICS
from lightning_logme.scores.curve import CurvePoint
from lightning_logme.scores.jackknife import quantile_of_ties, standard_error

_NO_ROUND = Round(0, 0, 0, {HEAD: Score(math.nan, math.nan, [], math.nan, [])})


def standing(race: Race) -> Ranking:
    """Return the ranking: candidates still in the race by score, then dropped ones, then rows without a result."""
    comparable, metric, rank_by = _comparable(race), METRICS[race.rules.scoring.task], race.rules.rank_by
    comparison = Comparison.of(comparable, rank_by)
    last = {name: progress.rounds[-1] if progress.rounds else _NO_ROUND for name, progress in race.progress.items()}
    pairs = [(name, source) for name, one in last.items() for source in one.scores]
    behind = comparison.behind(quantile_of_ties(len(pairs)))

    def sort_key(pair: tuple[str, str]) -> tuple[int, int, float, float]:
        name, source = pair
        one = comparable.get(name, last[name])
        score = one.scores[source]
        value = value_of(score, rank_by)
        if math.isnan(value):
            return 3, 0, 0.0, 0.0
        group = 0 if name in comparable else 1 if name in race.dropped else 2
        return group, -one.num_samples, -value, -score.logme

    ranking = Ranking([], {}, {}, metric, rank_by)
    for name, source in sorted(pairs, key=sort_key):
        progress, title = race.progress[name], row_name(name, source)
        is_tied = sort_key((name, source))[0] == 0 and (name, source) not in behind
        row = _row(race, name, source, last[name].scores[source], is_tied)
        if (name, source) in behind and not row.message:
            remark = comparison.remark((name, source), metric)
            row = replace(row, message=remark and f"significantly behind in LogME{remark}")
        ranking.rows.append(row)
        if source in progress.evidence:
            ranking.evidence[title] = progress.evidence[source]
        scores = ((one.num_samples, one.scores[source]) for one in progress.rounds)
        ranking.curves[title] = [CurvePoint(n, score.logme, score.gain, score.accuracy) for n, score in scores]
    return ranking


def _comparable(race: Race) -> dict[str, Round]:
    """Return results of the last round that all candidates still in the race have finished, by candidate."""
    rounds = {name: race.progress[name].rounds for name in race.running if race.progress[name].rounds}
    common = min(map(len, rounds.values()), default=0)
    return {name: finished[common - 1] for name, finished in rounds.items()}


def _row(race: Race, name: str, source: str, score: Score, is_tied: bool) -> RankingRow:
    progress = race.progress[name]
    ended, message = _end(race, name, source, progress)
    evidence = progress.evidence.get(source)
    return RankingRow(
        name=row_name(name, source),
        logme=score.logme,
        gain=score.gain,
        stderr=standard_error(score.replicates),
        accuracy=score.accuracy,
        accuracy_stderr=standard_error(score.accuracy_replicates),
        tied_with_best=is_tied,
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
    if math.isnan(float(progress.evidence[source].score)):
        return "finished", "there is no evidence in these samples; a warning gives the cause"
    if source in progress.constant:
        return "finished", "its features are the same for every sample"
    saturated = int(progress.evidence[source].saturated.sum())
    if saturated:
        return "finished", f"a perfect fit of {saturated} outputs: evidence is unbounded; check for leaked labels"
    return "finished", ""
