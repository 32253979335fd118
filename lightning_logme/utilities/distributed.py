"""Exchange values and errors between processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Failure(ValueError):
    """The error of one process, raised in all of them."""


@contextmanager
def together(alone: bool) -> Iterator[None]:
    """Run the body in every process. If it fails in one, it fails in all, so that none waits for another.

    Args:
        alone: whether the run has only one process.

    Raises:
        Failure: the reason of the lowest rank that failed, with the rank unless all ranks have the same reason.

    Example:
        >>> from lightning_logme.utilities.distributed import together
        >>> with together(alone=True):
        ...     raise RuntimeError("out of memory")
        Traceback (most recent call last):
        lightning_logme.utilities.distributed.Failure: RuntimeError: out of memory
    """
    reason = None
    try:
        yield
    except Exception as error:
        reason = reason_of(error)
        release(error)
    reasons = gathered(alone, reason)
    found = reason if len(set(reasons)) == 1 else first_reason(reasons)
    if found is not None:
        raise Failure(found) from None


def gathered(alone: bool, mine: T, group: Any = None) -> list[T]:
    """Return the objects of all processes, by rank.

    Args:
        alone: whether the run has only one process, even if torch.distributed has more.
        mine: a picklable object of this process.
        group: the processes that call this together; None stands for all.
    """
    if alone:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def reason_of(error: Exception) -> str:
    """Return the text of an error, with its type unless it is a ValueError, the type that this package raises."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def release(error: Exception) -> None:
    """Drop the traceback of an error that is not raised again. Its frames hold tensors, and memory may be full."""
    error.__traceback__ = error.__context__ = error.__cause__ = None


def first_reason(reasons: Sequence[str | None]) -> str | None:
    """Return the reason of the lowest rank that has one, with the rank; None without reasons."""
    for rank, reason in enumerate(reasons):
        if reason is not None:
            return reason if len(reasons) == 1 else f"{reason} (process {rank})"
    return None
