"""What a checkpoint carries: plain numbers, readable without Lightning and without trust."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from lightning_logme.evidence import Evidence

Row = dict[str, Any]

_OF_SHARDS = "meta.pt"
_FIGURES = ("per_output", "null", "alpha", "beta", "effective_dim", "saturated")


def figures(evidence: Evidence) -> dict[str, Any]:
    """The numbers of an evidence, without its large tensors, as plain floats."""
    plain: dict[str, Any] = {
        "logme": float(evidence.score),
        "gain": float(evidence.gain),
        "num_samples": int(evidence.num_samples),
    }
    for name in _FIGURES:
        value: Tensor = getattr(evidence, name)
        plain[name] = value.tolist()
    return plain


def merge(earlier: list[Row], later: list[Row]) -> list[Row]:
    """Both histories, rows that both hold once."""
    known = set(map(repr, earlier))  # NaN is not equal to itself, but written as itself
    return earlier + [row for row in later if repr(row) not in known]


def read_history(path: str | PathLike[str]) -> list[Row]:
    """The history of LogME in a Lightning checkpoint.

    Args:
        path: of a ``.ckpt`` file, or of the folder that sharded strategies write. It is read with
            ``weights_only=True``: nothing in it is executed.

    Returns:
        One dict a validation and key, oldest first: ``epoch``, ``global_step``, ``key`` (the logged name), ``logme``,
        ``gain`` (nats per sample), ``num_samples`` and ``stage`` ("fit" or "validate").

    Raises:
        ValueError: the file holds no such history, is no whole checkpoint, or holds objects that could run code.
        OSError: there is no such file, or it must not be read.
    """
    return [row for state in _states(path) for row in state["history"]]


def read_evidence(path: str | PathLike[str]) -> dict[str, dict[str, Any]]:
    """The last evidence behind every logged key in a Lightning checkpoint, as plain numbers.

    Args:
        path: of a checkpoint, read as in :func:`read_history`.

    Returns:
        By key: ``logme``, ``gain``, ``num_samples``, and one number an output in the lists ``per_output``, ``null``,
            ``alpha``, ``beta``,
        ``effective_dim`` and ``saturated``, as in :class:`~lightning_logme.Evidence`.

    Raises:
        ValueError, OSError: as in :func:`read_history`.
    """
    return {key: numbers for state in _states(path) for key, numbers in state["evidence"].items()}


def is_state(value: Any) -> bool:
    """Whether this has the form of what a callback leaves in a checkpoint."""
    if not (isinstance(value, Mapping) and {"history", "evidence"} <= value.keys()):
        return False
    history, evidence = value["history"], value["evidence"]
    plain = isinstance(history, list) and all(isinstance(row, dict) and _is_plain(row) for row in history)
    return plain and isinstance(evidence, dict) and all(isinstance(numbers, dict) for numbers in evidence.values())


def _is_plain(row: Row) -> bool:
    named = (row.get(name) for name in ("key", "stage", "epoch", "global_step"))
    return all(isinstance(part, (str, int, NoneType)) for part in named)


def _states(path: str | PathLike[str]) -> list[dict[str, Any]]:
    file = Path(path)
    if file.is_dir():  # of a sharded strategy: what is not weights is in one file
        file /= _OF_SHARDS
    with file.open("rb") as opened:
        try:
            checkpoint = torch.load(opened, map_location="cpu", weights_only=True)
        except Exception as error:
            cause = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{str(path)!r} cannot be read: it is no whole checkpoint, or holds objects that could run code "
                f"({type(error).__name__}: {cause})."
            ) from error
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
    states = [state for state in callbacks.values() if is_state(state)] if isinstance(callbacks, dict) else []
    if not states:
        raise ValueError(
            f"{str(path)!r} holds no history of LogME; it must be a Lightning checkpoint of a run with LogMECallback, "
            "saved without save_weights_only=True."
        )
    return states
