"""Compare rows on the same samples, with paired standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_logme.ranking.result import METRIC_NAMES, RankBy
from lightning_logme.ranking.resume import Round, Score
from lightning_logme.scores.jackknife import paired_error, trailing

Row = tuple[str, str]  # candidate, source of features

# A difference in accuracy, R² or F1 up to this size hardly matters, however certain it is.
_NEGLIGIBLE = 0.005
# A difference in accuracy up to this number of standard errors may be chance.
_CERTAIN = 2


def value_of(score: Score, rank_by: RankBy) -> float:
    """Return the value of a score that is compared."""
    return score.accuracy if rank_by == "accuracy" else score.logme


@dataclass(frozen=True)
class Comparison:
    """The rows of candidates that have seen the same samples.

    Attributes:
        scores: the score of each row.
        rank_by: what is compared.
    """

    scores: Mapping[Row, Score]
    rank_by: RankBy

    @classmethod
    def of(cls, rounds: Mapping[str, Round], rank_by: RankBy) -> Comparison:
        """Compare the results of one round, given by candidate."""
        rows = {(name, source): score for name, one in rounds.items() for source, score in one.scores.items()}
        return cls({row: score for row, score in rows.items() if not math.isnan(score.logme)}, rank_by)

    def value(self, row: Row) -> float:
        """Return what is compared of a row."""
        return value_of(self.scores[row], self.rank_by)

    def behind(self, quantile: float) -> dict[Row, float]:
        """Return the rows that are behind the leader by more paired standard errors than this, and by how many.

        The error bars of accuracies hold the linear heads fixed, so they leave out part of the variation. To allow for
        it, accuracies are compared with the same quantile of seven degrees of freedom, although 32 blocks have 31.
        """
        by_accuracy = self.rank_by == "accuracy"
        replicates = {
            row: score.accuracy_replicates if by_accuracy else score.replicates for row, score in self.scores.items()
        }
        return trailing({row: self.value(row) for row in self.scores}, replicates, quantile)

    def remark(self, row: Row, metric: str) -> str:
        """Return a remark if a row is significantly behind in LogME, but not clearly in accuracy; otherwise ""."""
        if self.rank_by == "accuracy":
            return ""
        leader, score = self.scores[max(self.scores, key=self.value)], self.scores[row]
        difference = leader.accuracy - score.accuracy
        if math.isnan(difference):
            return ""
        error = paired_error(leader.accuracy_replicates, score.accuracy_replicates)
        if difference > max(_NEGLIGIBLE, _CERTAIN * error):
            return ""
        side = f"only {difference:.3f} ± {error:.3f} lower"
        if difference < 0:
            side = f"{-difference:.3f} ± {error:.3f} higher"
        return f", but {METRIC_NAMES[metric]} is {side}"
