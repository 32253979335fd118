"""Track how well a network's features suit a task: the log of maximum evidence (LogME) in PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_logme.callback import LogMECallback
    from lightning_logme.features.heads import find_head
    from lightning_logme.metric import LogME
    from lightning_logme.ranking.checkpoints import score_checkpoints
    from lightning_logme.ranking.rank import rank_backbones
    from lightning_logme.ranking.result import Ranking, RankingRow
    from lightning_logme.scores.accuracy import Accuracy
    from lightning_logme.scores.curve import CurvePoint
    from lightning_logme.scores.evidence import Evidence
    from lightning_logme.tracking.history import read_evidence, read_history
    from lightning_logme.tracking.probe import Probe

# Imported on first use (PEP 562), because lightning_logme.functional needs neither Lightning nor torchmetrics.
_MODULES = {
    "Accuracy": "scores.accuracy",
    "CurvePoint": "scores.curve",
    "Evidence": "scores.evidence",
    "LogME": "metric",
    "LogMECallback": "callback",
    "Probe": "tracking.probe",
    "Ranking": "ranking.result",
    "RankingRow": "ranking.result",
    "find_head": "features.heads",
    "rank_backbones": "ranking.rank",
    "read_evidence": "tracking.history",
    "read_history": "tracking.history",
    "score_checkpoints": "ranking.checkpoints",
}

__all__ = [
    "Accuracy",
    "CurvePoint",
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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
