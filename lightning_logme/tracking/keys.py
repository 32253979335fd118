"""The keys that a callback logs, and the monitors that watch them."""

from __future__ import annotations

from typing import Any

from lightning_logme.scores.accuracy import METRICS
from lightning_logme.utilities.compat import rank_zero_warn


def prefixes(name: str) -> list[str]:
    """Return the prefixes of all logged keys of a callback."""
    return [name, *(f"{name}_{what}" for what in ("gain", *dict.fromkeys(METRICS.values())))]


def is_key(key: Any, name: str, probe: str | None = None) -> bool:
    """Return whether a callback logs a score, a gain or an accuracy under a key.

    Args:
        key: the key, such as the one that a monitor watches.
        name: prefix of all keys of the callback.
        probe: name of a probe; then only its keys count.
    """
    end = "" if probe is None else f"/{probe}"
    return any(key == start + end or str(key).startswith(f"{start}{end}/") for start in prefixes(name))


def warn_of_minimised(trainer: Any, name: str) -> None:
    """Warn about monitors with Lightning's default mode "min", which would keep the worst features."""
    for callback in trainer.callbacks:
        key = getattr(callback, "monitor", None)
        if is_key(key, name) and getattr(callback, "mode", None) == "min":
            kind = type(callback).__name__
            rank_zero_warn(
                f"monitor: {kind} treats the lowest {key!r} as the best, but higher is better; write "
                f"{kind}(monitor={key!r}, mode='max')."
            )
