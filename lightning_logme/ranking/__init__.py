"""Many backbones, or checkpoints of one, and one target: which one to fine-tune."""

from lightning_logme.ranking.checkpoints import score_checkpoints
from lightning_logme.ranking.rank import rank_backbones
from lightning_logme.ranking.result import Ranking, RankingRow

__all__ = ["Ranking", "RankingRow", "rank_backbones", "score_checkpoints"]
