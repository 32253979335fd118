"""Many backbones, one target: which one to fine-tune."""

from lightning_logme.ranking.rank import rank_backbones
from lightning_logme.ranking.result import CurvePoint, Ranking, RankingRow

__all__ = ["CurvePoint", "Ranking", "RankingRow", "rank_backbones"]
