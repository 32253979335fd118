"""Track how well a network's features suit a task: the log of maximum evidence (LogME) in PyTorch Lightning."""

from lightning_logme.callback import LogMECallback
from lightning_logme.evidence import Evidence
from lightning_logme.heads import find_head
from lightning_logme.history import read_evidence, read_history
from lightning_logme.metric import LogME
from lightning_logme.probe import Probe
from lightning_logme.ranking import Ranking, RankingRow, rank_backbones, score_checkpoints

__all__ = [
    "Evidence",
    "LogME",
    "LogMECallback",
    "Probe",
    "Ranking",
    "RankingRow",
    "find_head",
    "rank_backbones",
    "read_evidence",
    "read_history",
    "score_checkpoints",
]
__version__ = "0.2.0"
